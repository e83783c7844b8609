"""pytorch-grad-cam's helpers for images, projections and layers, by their names there."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import cv2
import numpy as np
import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor, nn

from multicam.cam.components import KPCACAM, first_component
from multicam.cam.laying import ONLY
from multicam.compat.targets import Nothing
from multicam.errors import MulticamError
from multicam.maps import resized
from multicam.watch.layers import Layer
from multicam.watch.reshape import as_it_is

Array = Float[np.ndarray, "*size"]


def array(x: Tensor) -> Array:
    """A tensor as float32 NumPy."""
    return np.asarray(x.detach().float().cpu().numpy())


def as_array(x: Any) -> Array:
    """A tensor or what NumPy takes as an array of floats, float64 where it is."""
    if isinstance(x, Tensor):
        x = x.detach().cpu()
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    found = np.asarray(x)
    return found if found.dtype in (np.float32, np.float64) else found.astype(np.float32)


def scale_cam_image(
    cam: Float[np.ndarray, "b *grid"], target_size: Sequence[int] | None = None
) -> Float[np.ndarray, "b *size"]:
    """Each map scaled to 0..1, then resized.

    Args:
        cam: Maps or images.
        target_size: Width and height, in this order; for volumes width, height and depth.

    Example:
        >>> scale_cam_image(np.array([[[1.0, 3.0]]]))[0].round(3).tolist()
        [[0.0, 1.0]]
    """
    size = None if target_size is None else tuple(reversed(target_size))
    return np.asarray(scaled(torch.as_tensor(np.asarray(cam, dtype=np.float32)), size).numpy())


def scaled(maps: Float[Tensor, "b *grid"], size: Sequence[int] | None = None) -> Float[Tensor, "b *size"]:
    """Each map less its minimum, divided by its maximum (plus 1e-7), then enlarged."""
    axes = tuple(range(1, maps.ndim))
    above = maps - maps.amin(axes, keepdim=True)
    unit = above / (1e-7 + above.amax(axes, keepdim=True))
    if size is None:
        return unit
    return resized(unit, size)


def scale_accross_batch_and_channels(
    tensor: Float[np.ndarray, "b c *grid"], target_size: Sequence[int]
) -> Float[np.ndarray, "b c *size"]:
    """Each channel scaled to 0..1, then resized to width and height."""
    flat = scale_cam_image(tensor.reshape(-1, *tensor.shape[2:]), target_size)
    return flat.reshape(*tensor.shape[:2], *flat.shape[1:])


def preprocess_image(
    img: Shaped[np.ndarray, "h w *c"],
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.5, 0.5, 0.5),
) -> Float[Tensor, "1 c h w"]:
    """An image as a normalised batch of one; uint8 is divided by 255 before.

    Example:
        >>> preprocess_image(np.full((2, 4, 3), 255, np.uint8)).shape
        torch.Size([1, 3, 2, 4])
    """
    x = torch.from_numpy(np.ascontiguousarray(np.atleast_3d(img))).permute(2, 0, 1)
    x = x / 255 if x.dtype == torch.uint8 else x.clone()
    centre, spread = (torch.as_tensor(values, dtype=x.dtype).view(-1, 1, 1) for values in (mean, std))
    return ((x - centre) / spread)[None]


def deprocess_image(img: Float[np.ndarray, "*size"]) -> UInt8[np.ndarray, "*size"]:
    """Gradients as a picture: mean grey, ten standard deviations from black to white."""
    standard = (img - img.mean()) / (img.std() + 1e-5)
    return np.asarray((standard * 0.1 + 0.5).clip(0, 1) * 255).astype(np.uint8)


def show_cam_on_image(
    img: Float[np.ndarray, "h w 3"],
    mask: Float[np.ndarray, "_ _"],
    use_rgb: bool = False,
    colormap: int = cv2.COLORMAP_JET,
    image_weight: float = 0.5,
) -> UInt8[np.ndarray, "h w 3"]:
    """A map mixed with its image, as uint8; `multicam.figures.overlay` leaves the image alone where there is no evidence.

    Args:
        img: The image, 0..1.
        mask: The map, 0..1, of the same size.
        use_rgb: Whether the image is RGB; else the colours are made for BGR.
        colormap: One of OpenCV's.
        image_weight: The share of the image in the mixture.

    Raises:
        MulticamError: If image, map or weight are out of range, or the sizes differ.

    Example:
        >>> show_cam_on_image(np.ones((2, 2, 3), np.float32), np.eye(2, dtype=np.float32), use_rgb=True)[0].tolist()
        [[255, 169, 169], [169, 169, 255]]
    """
    if img.max() > 1 or img.min() < 0:
        raise MulticamError(f"the image is float in the range 0..1, not {img.min():.4g}..{img.max():.4g}")
    if not 0 <= image_weight <= 1:
        raise MulticamError(f"image_weight is in the range 0..1, not {image_weight}")
    if not (mask.min() >= 0 and mask.max() <= 1 + 1e-4):
        raise MulticamError(f"the map is in the range 0..1, not {mask.min():.4g}..{mask.max():.4g}")
    if img.shape[:2] != mask.shape:
        raise MulticamError(f"a map {mask.shape} does not lie on an image {img.shape}")
    heat = cv2.applyColorMap((255 * mask).clip(0, 255).astype(np.uint8), colormap).astype(np.float32) / 255
    heat = heat[..., ::-1] if use_rgb else heat
    mixed = (1 - image_weight) * heat + image_weight * img
    return np.asarray(255 * (mixed / (mixed.max() or 1))).astype(np.uint8)


def create_labels_legend(
    concept_scores: Float[np.ndarray, "k classes"], labels: Mapping[int, str] | Sequence[str], top_k: int = 2
) -> list[str]:
    r"""For each concept, its `top_k` classes and their scores, one a line.

    Example:
        >>> create_labels_legend(np.array([[0.25, 0.75]]), ["cat, tabby", "dog"])
        ['dog:0.75\ncat, tabby:0.25']
    """

    def line(scores: Float[np.ndarray, "classes"], category: int) -> str:
        return f"{','.join(labels[category].split(',')[:3])}:{scores[category]:.2f}"

    best = concept_scores.argsort(1)[:, ::-1][:, :top_k]
    return ["\n".join(line(scores, int(c)) for c in row) for scores, row in zip(concept_scores, best, strict=True)]


def show_factorization_on_image(
    img: Float[np.ndarray, "h w 3"],
    explanations: Float[np.ndarray, "k h w"],
    colors: Sequence[Any] | None = None,
    image_weight: float = 0.5,
    concept_labels: Sequence[str] | None = None,
) -> UInt8[np.ndarray, "h _ 3"]:
    """The strongest concept of each pixel in that concept's colour, as bright as it is strong, mixed with the image.

    Args:
        img: The image, RGB in 0..1.
        explanations: The concepts' maps, 0..1; they are not changed.
        colors: One RGB colour in 0..1 for each concept; None: matplotlib's gist_rainbow.
        image_weight: The share of the image in the mixture.
        concept_labels: A text for each concept; a legend of the size of the image is then put on its right.
    """
    k = len(explanations)
    if colors is None:
        from matplotlib import colormaps

        colors = [colormaps["gist_rainbow"](i / k) for i in range(k)]
    strongest = explanations.argmax(0)
    table = (np.array([color[:3] for color in colors]) * 255).astype(np.uint8)
    hsv = cv2.cvtColor(table[strongest], cv2.COLOR_RGB2HSV)
    hsv[..., 2] = (255 * explanations.max(0)).astype(np.uint8)
    painted = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB).astype(np.float32) / 255
    result = ((img * image_weight + painted * (1 - image_weight)) * 255).astype(np.uint8)
    return result if concept_labels is None else np.hstack([result, _legend(concept_labels, colors, img.shape)])


def _legend(labels: Sequence[str], colors: Sequence[Any], shape: Sequence[int]) -> UInt8[np.ndarray, "h w 3"]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    height, width = shape[:2]
    figure = Figure((width / 100, height / 100), dpi=100)
    canvas = FigureCanvasAgg(figure)
    handles = [Patch(color=tuple(color[:3]), label=label) for label, color in zip(labels, colors, strict=True)]
    figure.legend(handles=handles, loc="center", fontsize=14 * height / 256 / max(1, len(labels) / 6), frameon=False)
    canvas.draw()  # type: ignore[no-untyped-call]
    drawn = np.asarray(canvas.buffer_rgba())[..., :3]  # type: ignore[no-untyped-call]
    return np.asarray(cv2.resize(drawn, (width, height)), dtype=np.uint8)


def sobel_cam(img: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w"]:
    """The strength of the edges of an RGB image."""
    grey = cv2.cvtColor(img, cv2.COLOR_RGB2GRAY)
    across, down = (cv2.convertScaleAbs(cv2.Sobel(grey, cv2.CV_64F, dx, dy, ksize=3)) for dx, dy in ((1, 0), (0, 1)))
    return np.asarray(cv2.addWeighted(across, 0.5, down, 0.5, 0), dtype=np.uint8)


def get_2d_projection(activation_batch: Float[np.ndarray, "b c *grid"]) -> Float[np.ndarray, "b *grid"]:
    """The activations projected on their first principal component; NaN counts as zero."""
    return np.asarray(first_component(_without_nan(activation_batch)).numpy())


def get_2d_projection_kernel(
    activation_batch: Float[np.ndarray, "b c *grid"], kernel: str = "sigmoid", gamma: float | None = None
) -> Float[np.ndarray, "b *grid"]:
    """The first kernel principal component of the activations, see `multicam.KPCACAM`; NaN counts as zero."""
    acts = _without_nan(activation_batch)
    method = KPCACAM(nn.Sequential(nn.Identity()), Layer("0", reshape=as_it_is), kernel=kernel, gamma=gamma)
    return np.asarray(method.saliency(method.trace(acts, Nothing(len(acts))).sites[ONLY]).numpy())


def get_2d_projection_with_sign_correction(
    activation_batch: Float[np.ndarray, "b c *grid"],
) -> Float[np.ndarray, "b *grid"]:
    """As `get_2d_projection`, with the sign that makes the largest number positive."""
    found = get_2d_projection(activation_batch)
    axes = tuple(range(1, found.ndim))
    return np.where(found.max(axes, keepdims=True) + found.min(axes, keepdims=True) < 0, -found, found)


def _without_nan(x: Float[np.ndarray, "b c *grid"]) -> Float[Tensor, "b c *grid"]:
    return torch.from_numpy(np.nan_to_num(x, nan=0.0).astype(np.float32))


# Layers


def find_layer_predicate_recursive(model: nn.Module, predicate: Callable[[nn.Module], bool]) -> list[nn.Module]:
    """The modules inside of a model for which `predicate` holds, in the order of their definition."""
    inside = [module for path, module in model.named_modules(remove_duplicate=False) if path]
    return [module for module in inside if predicate(module)]


def find_layer_types_recursive(model: nn.Module, layer_types: Iterable[type[nn.Module]]) -> list[nn.Module]:
    """The modules of exactly these types."""
    types = tuple(layer_types)
    return find_layer_predicate_recursive(model, lambda module: type(module) in types)


def replace_layer_recursive(model: nn.Module, old_layer: nn.Module, new_layer: nn.Module) -> bool:
    """Exchange one module of the model, in place; whether it was there."""
    for module in model.modules():
        for name, child in module._modules.items():
            if child is old_layer:
                module._modules[name] = new_layer
                return True
    return False


def replace_all_layer_type_recursive(model: nn.Module, old_layer_type: type[nn.Module], new_layer: nn.Module) -> None:
    """Exchange all modules of a type for the one given, in place."""
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if isinstance(child, old_layer_type):
                module._modules[name] = new_layer


class Mirrored:
    """One of the copies that `aug_smooth` averages over: mirrored or not, and multiplied.

    Args:
        flip: Whether to mirror left to right.
        factor: What the image is multiplied by.
    """

    FACTORS: ClassVar = (0.9, 1.0, 1.1)

    def __init__(self, flip: bool, factor: float) -> None:
        self.flip = flip
        self.factor = factor

    @classmethod
    def all(cls) -> "list[Mirrored]":
        """The six copies of pytorch-grad-cam."""
        return [cls(flip, factor) for flip in (False, True) for factor in cls.FACTORS]

    def augment_image(self, image: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """The copy."""
        return self.deaugment_mask(image) * self.factor

    def deaugment_mask(self, mask: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """A map of the copy, laid back on the image."""
        return mask.flip(-1) if self.flip else mask
