"""Maps into colours: scaling, colour maps, and maps laid over images.

Scaling happens once, where it is asked for: `normalize` divides, `colorize` and `overlay` refuse values that were not
divided.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Literal, get_args, overload

import cv2
import numpy as np
import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from multicam.errors import MulticamError, unknown
from multicam.maps import Maps

Colormap = Literal["inferno", "viridis", "jet", "diverging"]
_LIMIT = 1 + 1e-4  # resizing a normalised map may overshoot by rounding


@overload
def normalize(maps: Tensor, scale: Literal["shared", "each"] | None = None) -> Tensor: ...


@overload
def normalize(maps: Maps, scale: Literal["shared", "each"] | None = None) -> Maps: ...


@overload
def normalize(maps: Mapping[str, Tensor], scale: Literal["shared", "each"] | None = None) -> dict[str, Tensor]: ...


def normalize(
    maps: Tensor | Mapping[str, Tensor], scale: Literal["shared", "each"] | None = None
) -> Tensor | dict[str, Tensor]:
    """Maps divided to lie in 0..1, or in -1..1 where there is negative evidence; the same type as given.

    Nothing is ever subtracted, so no evidence stays 0 and an empty map stays empty.

    Args:
        maps: One tensor `(b h w)` or one per name; more axes are fine, the first is the batch.
        scale: `"shared"` divides everything by the largest absolute value of all maps and samples, which keeps their
            ratios; `"each"` divides every sample of every map by its own. None means shared, except for `Maps` whose
            values are not comparable.

    Raises:
        MulticamError: A map has NaN or infinite values.

    Example:
        >>> import torch
        >>> maps = {"rgb": torch.tensor([[[0.0, 4.0]]]), "depth": torch.tensor([[[1.0, 2.0]]])}
        >>> normalize(maps)["depth"], normalize(maps, "each")["depth"]
        (tensor([[[0.2500, 0.5000]]]), tensor([[[0.5000, 1.0000]]]))
    """
    if isinstance(maps, Tensor):
        return normalize({"": maps}, scale)[""]
    if scale is None:
        scale = "each" if isinstance(maps, Maps) and not maps.comparable else "shared"
    if scale not in ("shared", "each"):
        raise unknown("scale", scale, ("shared", "each"))
    tops = {name: peaks(m, f"the map {name!r}" if name else "the map") for name, m in maps.items()}
    if scale == "shared":
        top = max((t.max().item() for t in tops.values()), default=0.0)
        divided = {name: m / (top or 1) for name, m in maps.items()}
    else:
        tops = {name: top.where(top > 0, 1) for name, top in tops.items()}
        divided = {name: m / tops[name].view(-1, *[1] * (m.ndim - 1)) for name, m in maps.items()}
    return Maps(divided, maps.comparable and scale == "shared") if isinstance(maps, Maps) else divided


def peaks(maps: Float[Tensor, "b ..."], what: str) -> Float[Tensor, "b"]:
    """The largest absolute value of each sample; `what` names the maps in the error for those without one.

    Example:
        >>> import torch
        >>> peaks(torch.tensor([[[1.0, -3.0]], [[0.0, 0.0]]]), "the map")
        tensor([3., 0.])
    """
    if not maps.numel():
        raise MulticamError(f"{what} is empty: {tuple(maps.shape)}")
    found = maps.detach().abs().flatten(1).amax(1)
    if not found.isfinite().all():
        raise MulticamError(f"{what} has NaN or infinite values in sample {int((~found.isfinite()).nonzero()[0])}")
    return found


@lru_cache
def _table(colormap: Colormap) -> UInt8[np.ndarray, "n 3"]:
    """The colours of a colour map, in RGB."""
    if colormap != "diverging":
        code = getattr(cv2, f"COLORMAP_{colormap.upper()}")
        bgr = cv2.applyColorMap(np.arange(256, dtype=np.uint8)[:, None], code)
        return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB).reshape(-1, 3)
    # Straight lines in CIELAB from one light grey to a blue and a red of equal lightness and chroma, so equal evidence
    # of either sign looks equally strong; the arms of the usual blue-white-red maps differ in lightness.
    # 255 colours, so that 0 is one of them.
    v = np.linspace(-1, 1, 255)
    hue = np.radians(np.where(v < 0, 285, 30))
    lab = np.stack([95 - 50 * np.abs(v), 62 * np.abs(v) * np.cos(hue), 62 * np.abs(v) * np.sin(hue)], axis=1)
    rgb = cv2.cvtColor(lab.astype(np.float32)[None], cv2.COLOR_LAB2RGB)
    return np.rint(rgb * 255).astype(np.uint8).reshape(-1, 3)


def colorize(map: Float[Tensor, "... h w"], colormap: Colormap | None = None) -> UInt8[np.ndarray, "... h w 3"]:
    """The colours of a normalised map, as uint8 RGB.

    Args:
        map: Values in 0..1, or in -1..1 for a signed map.
        colormap: None chooses inferno, or diverging when a value is negative. inferno, viridis and diverging are
            perceptually uniform: equal steps of evidence look equal. jet is not.

    Raises:
        MulticamError: The values are outside of what the colour map shows.

    Example:
        >>> import torch
        >>> colorize(torch.tensor([[0.0, 1.0]])).tolist()
        [[[0, 0, 4], [252, 255, 164]]]
    """
    values = map.detach().float().cpu().numpy()
    low, high = (values.min(), values.max()) if values.size else (0, 0)
    if not max(-low, high) <= _LIMIT:  # true of NaN, too
        raise MulticamError(f"colours are for values in 0..1 or -1..1, not {low:.4g}..{high:.4g}: use normalize first")
    colormap = colormap or ("diverging" if low < 0 else "inferno")
    if colormap not in get_args(Colormap):
        raise unknown("colour map", colormap, get_args(Colormap))
    if low < 0 and colormap != "diverging":
        raise MulticamError(f"{colormap!r} shows 0..1 but the map goes down to {low:.4g}: use colormap='diverging'")
    table = _table(colormap)
    unit = (values + 1) / 2 if colormap == "diverging" else values
    return np.asarray(table[np.rint(unit.clip(0, 1) * (len(table) - 1)).astype(np.intp)], dtype=np.uint8)


def to_rgb(image: Shaped[Tensor, "..."]) -> UInt8[np.ndarray, "... 3"]:
    """How a model's input is shown: `(h w 3)` for an image `(c h w)`, `(b h w 3)` for a batch, as uint8 RGB.

    uint8, bool and floats within 0..1 are shown as they are. Any other range (ImageNet-normalised, metres, log
    magnitudes) is stretched for each image alone so that its darkest and brightest half percent become black and
    white; the channels share that stretch, which keeps their balance. NaN is black.

    One channel is grey, two are red against cyan, three are RGB, any more are shown by their mean. A clip or volume
    `(b c t h w)` shows its middle frame, a complex image its log magnitude.

    Example:
        >>> import torch
        >>> to_rgb(torch.tensor([[[0.0, 0.5, 1.0]]])).tolist()
        [[[0, 0, 0], [128, 128, 128], [255, 255, 255]]]
    """
    if image.ndim == 3:
        return to_rgb(image[None]).squeeze(0)
    if image.ndim not in (4, 5) or not image.numel():
        raise MulticamError(f"{tuple(image.shape)} is no image: give (c h w), (b c h w) or (b c t h w)")
    x = image.detach().cpu()
    if x.ndim == 5:
        x = x[:, :, x.shape[2] // 2]
    if x.is_complex():
        x = x.abs().log1p()
    x = x / 255 if x.dtype == torch.uint8 else x.float()
    channels = {1: [0, 0, 0], 2: [0, 1, 1], 3: [0, 1, 2]}.get(x.shape[1])
    x = x.mean(1, keepdim=True).expand(-1, 3, -1, -1) if channels is None else x[:, channels]
    return np.stack([_display(one) for one in x.permute(0, 2, 3, 1).numpy()])


def _display(image: Float[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    seen = image[np.isfinite(image)]
    if seen.size and not (seen.min() >= 0 and seen.max() <= 1):
        low, high = np.percentile(seen, (0.5, 99.5))
        image = (image - low) / (high - low if high > low else 1)
    return np.asarray(np.rint(np.nan_to_num(image, nan=0.0).clip(0, 1) * 255), dtype=np.uint8)


def signed_rgb(values: Float[Tensor, "... c h w"], limit: float) -> UInt8[np.ndarray, "... h w 3"]:
    """How signed values of an image's channels, gradients or weights, are shown: as uint8 RGB, in which zero is one grey.

    One channel, or more than three, are the diverging colours of their sum; of three each is its own colour, half bright
    where it is zero.

    Args:
        values: Any signed values.
        limit: The absolute value that has the strongest colour; larger ones are cut.

    Example:
        >>> import torch
        >>> signed_rgb(torch.tensor([-1.0, 0.0, 2.0]).view(3, 1, 1), limit=2.0).tolist()
        [[[64, 128, 255]]]
    """
    if values.shape[-3] != 3:
        return colorize((values.detach().sum(-3) / limit).clamp(-1, 1), "diverging")
    unit = (0.5 + values.detach().float().movedim(-3, -1).cpu().numpy() / (2 * limit)).clip(0, 1)
    return np.asarray(np.rint(unit * 255), dtype=np.uint8)


def overlay(
    image: Shaped[Tensor, "..."],
    map: Float[Tensor, "... h w"],
    *,
    colormap: Colormap | None = None,
    opacity: float = 0.85,
) -> UInt8[np.ndarray, "... h w 3"]:
    """A map laid over its image, as uint8 RGB: `(h w 3)`, or `(b h w 3)` for a batch.

    The opacity is the square root of the evidence: where there is none the image is left as it is.

    Args:
        image: `(c h w)`, `(b c h w)` or `(b c t h w)`, shown as `to_rgb` shows it.
        map: `(h w)` or `(b h w)`, normalised: see `normalize`.
        colormap: See `colorize`.
        opacity: How much of the image the strongest evidence (1 or -1) hides.

    Raises:
        MulticamError: The map is not as large as the image, or is not normalised.

    Example:
        >>> import torch
        >>> overlay(torch.ones(3, 1, 2), torch.tensor([[0.0, 1.0]]), opacity=1.0).tolist()
        [[[255, 255, 255], [252, 255, 164]]]
    """
    below = to_rgb(image)
    if below.shape[:-1] != tuple(map.shape):
        raise MulticamError(
            f"a map {tuple(map.shape)} does not lie on an image {tuple(image.shape)}: "
            "resize the map to the image, or show it alone with colorize"
        )
    above = colorize(map, colormap)
    share = opacity * map.detach().float().abs().clamp(max=1).sqrt().cpu().numpy()[..., None]
    return np.asarray(np.rint(below + share * (above.astype(np.float32) - below)), dtype=np.uint8)
