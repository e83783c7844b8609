"""Volumes and clips in the tools of others: what works on a layer whose grid has three axes, and what is refused."""

from collections.abc import Callable
from typing import Any

import captum.attr as captum
import pytest
import pytorch_grad_cam as pgc
import torch
import torchcam.methods as torchcam
from torch import Tensor, nn

from multicam import GradCAM, HiResCAM, LayerCAM, MulticamError, PackedModel, Trace
from multicam.watch.layers import Layer
from tests.helpers.engines import CLASS, assert_close, pgc_raw, score_of_class


class Scans(nn.Module):
    """Two volumes."""

    def __init__(self) -> None:
        super().__init__()
        self.mri = nn.Sequential(nn.Conv3d(2, 6, 3, 2, 1), nn.ReLU(), nn.Conv3d(6, 6, 3, 1, 1))
        self.ct, self.head = nn.Conv3d(1, 6, 3, 2, 1), nn.Linear(12, 4)

    def forward(self, mri: Tensor, ct: Tensor) -> Tensor:
        pooled = [branch(x).relu().mean((2, 3, 4)) for branch, x in ((self.mri, mri), (self.ct, ct))]
        return self.head(torch.cat(pooled, 1))


class Watched(nn.Module):
    """A clip, frames first, and a photo of another size."""

    def __init__(self) -> None:
        super().__init__()
        self.clip, self.photo, self.head = nn.Conv3d(3, 6, 3, (1, 2, 2), 1), nn.Conv2d(3, 6, 3), nn.Linear(12, 4)

    def forward(self, clip: Tensor, photo: Tensor) -> Tensor:
        seen = self.clip(clip.transpose(1, 2)).relu().mean((2, 3, 4)), self.photo(photo).relu().mean((2, 3))
        return self.head(torch.cat(seen, 1))


class Flows(nn.Module):
    """One volume whose layer returns channels last, and a photo."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.photo = nn.Conv3d(1, 6, 2, 2), nn.Linear(6, 6), nn.Conv2d(3, 6, 3)
        self.head = nn.Linear(6, 4)

    def forward(self, flow: Tensor, photo: Tensor) -> Tensor:
        tokens = self.block(self.embed(flow).movedim(1, -1)).relu()
        return self.head(tokens.mean((1, 2, 3)) * self.photo(photo).mean((2, 3)))


CASES: dict[str, Callable[[], tuple[nn.Module, dict[str, Tensor], str]]] = {
    "scans": lambda: (Scans(), {"mri": torch.rand(2, 2, 6, 8, 8), "ct": torch.rand(2, 1, 6, 8, 8)}, "mri"),
    "one scan of each": lambda: (Scans(), {"mri": torch.rand(1, 2, 6, 8, 8), "ct": torch.rand(1, 1, 4, 8, 6)}, "ct"),
    "clip": lambda: (Watched(), {"clip": torch.rand(2, 4, 3, 8, 8), "photo": torch.rand(2, 3, 12, 12)}, "clip"),
    "channels last": lambda: (Flows(), {"flow": torch.rand(2, 1, 4, 8, 8), "photo": torch.rand(2, 3, 8, 8)}, "block"),
}
every_case = pytest.mark.parametrize("name", CASES)


def made(name: str, reshape: Any = None) -> tuple[nn.Module, dict[str, Tensor], Layer]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model, inputs, layer = CASES[name]()
        return model.eval(), inputs, Layer(layer, reshape=reshape)


@every_case
def test_gradient_methods_of_captum_and_torchcam_stay_on_the_grid(name: str) -> None:
    model, inputs, layer = made(name)
    site = Trace(model, inputs, {"it": layer}, CLASS).sites["it"]
    packed = PackedModel(model, inputs, layer)
    x, (tap,) = packed.pack(inputs), packed.target_layers
    assert_close(
        captum.LayerGradCam(packed, tap).attribute(x, CLASS)[:, 0].detach(), GradCAM(model, layer).saliency(site)
    )
    products = captum.LayerGradientXActivation(packed, tap).attribute(x, CLASS)
    assert_close(products.sum(1).detach(), HiResCAM(model, layer).saliency(site))
    for engine, method in ((torchcam.GradCAM, GradCAM), (torchcam.LayerCAM, LayerCAM)):
        with engine(packed, tap) as extract:
            (found,) = extract(CLASS, packed(x), normalized=False)
        assert_close(found, method(model, layer).saliency(site).relu())


@every_case
def test_captum_lays_its_map_on_the_volume_and_ours_is_that_times_the_cells(name: str) -> None:
    model, inputs, layer = made(name)
    first = next(iter(inputs)) if layer.path != "ct" else "ct"
    packed = PackedModel(model, inputs, layer)
    found = captum.LayerGradCam(packed, packed.target_layers[0]).attribute(packed.pack(inputs), CLASS)
    size = inputs[first].shape[2:] if name != "clip" else (4, 8, 8)
    laid = captum.LayerAttribution.interpolate(found, size, "trilinear")[:, 0].detach() * found[0].numel()
    assert_close(GradCAM(model, {first: layer})(inputs, CLASS, signed=True)[first], laid)


@every_case
def test_attributions_of_the_packed_tensor_are_unpacked_to_volumes(name: str) -> None:
    model, inputs, _ = made(name)
    packed = PackedModel(model, inputs)
    x = packed.pack(inputs).requires_grad_()
    found = packed.unpack(captum.IntegratedGradients(packed).attribute(x, target=CLASS, n_steps=4).detach()).leaves
    several = tuple(leaf.clone().requires_grad_() for leaf in inputs.values())
    own = captum.IntegratedGradients(model).attribute(several, target=CLASS, n_steps=4)
    for input, expected in zip(inputs, own, strict=True):
        assert_close(found[input], expected.detach())


BY_LAYER = [pgc.GradCAM, pgc.HiResCAM, pgc.GradCAMPlusPlus, pgc.XGradCAM, pgc.LayerCAM, pgc.EigenCAM, pgc.EigenGradCAM,
            pgc.GradCAMElementWise, pgc.ScoreCAM, pgc.AblationCAM, pgc.RandomCAM, pgc.KPCA_CAM, pgc.FEM, pgc.ShapleyCAM,
            pgc.FinerCAM]  # fmt: skip


@pytest.mark.parametrize("engine", BY_LAYER, ids=lambda engine: engine.__name__)
@every_case
def test_pytorch_grad_cam_is_refused_with_what_can(name: str, engine: Any) -> None:
    model, inputs, layer = made(name)
    packed = PackedModel(model, inputs, layer)
    x, taps = packed.pack(inputs), packed.target_layers
    grid = " x ".join(map(str, Trace(model, inputs, {"it": layer}, CLASS).sites["it"].acts.shape[2:]))
    with (
        engine(packed, taps) as cam,
        pytest.raises(
            MulticamError, match=rf"the grid of layer '{layer.path}' is {grid}.*captum's LayerGradCam.*reshape="
        ),
    ):
        cam(x, [score_of_class()] * len(x))
    assert packed.target_layers == taps
    assert packed(x).shape == (len(x), 4)  # its hooks are gone


SLICES: dict[str, Callable[[Tensor], Tensor]] = {
    "slice": lambda x: x[:, :, 1],
    "side by side": lambda x: x.flatten(2, 3),  # every slice under the one before
}


@pytest.mark.parametrize("cut", SLICES)
@pytest.mark.parametrize("engine", BY_LAYER, ids=lambda engine: engine.__name__)
def test_slices_are_maps_for_every_method(engine: Any, cut: str) -> None:
    model, inputs, layer = made("scans", SLICES[cut])
    packed = PackedModel(model, inputs, layer)
    with engine(packed, packed.target_layers) as cam:
        found = cam(packed.pack(inputs), [score_of_class()] * 2)
    assert {name: tuple(laid.shape) for name, laid in packed.maps(found).items()} == {"mri": (2, 8, 8), "ct": (2, 8, 8)}


@pytest.mark.parametrize("cut", SLICES)
def test_the_map_of_a_slice_is_the_slice_of_the_map(cut: str) -> None:
    model, inputs, layer = made("scans", SLICES[cut])
    whole = HiResCAM(model, "mri").saliency(Trace(model, inputs, {"it": "mri"}, CLASS).sites["it"])
    packed = PackedModel(model, inputs, layer)
    found = pgc_raw(pgc.HiResCAM, packed, packed.target_layers[0], packed.pack(inputs))
    assert_close(found, SLICES[cut](whole[:, None])[:, 0])


def test_score_methods_of_torchcam_end_in_an_error_of_their_own() -> None:
    """As the table of the documentation says."""
    model, inputs, layer = made("scans")
    packed = PackedModel(model, inputs, layer)
    with torchcam.ScoreCAM(packed, packed.target_layers[0]) as extract, torch.no_grad():
        packed(packed.pack(inputs))
        with pytest.raises(ValueError, match="same number of spatial dimensions"):
            extract(CLASS)


def test_a_map_of_a_volume_is_none_of_the_canvas() -> None:
    model, inputs, _ = made("scans")
    with pytest.raises(MulticamError, match=r"shape \(b, 8, 8\), given is \(2, 3, 4, 4\).*mode='trilinear'"):
        PackedModel(model, inputs).maps(torch.zeros(2, 3, 4, 4))
