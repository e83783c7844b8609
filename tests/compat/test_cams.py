"""The drop-in for pytorch-grad-cam 1.5.7: equal to it wherever it is right, and right where it is not."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import pytorch_grad_cam as peer
from beartype.roar import BeartypeCallHintViolation
from torch import Tensor, nn

from multicam import MulticamError, compat
from tests.helpers.drop_in import METHODS, Large, Net, Soft, ViT, images, linear_zoom, resnet, seeded

SIGNED_BY_CHANCE = [
    "base_cam",
    "eigen_cam",
    "eigen_grad_cam",
    "hirescam",
    "layer_cam",
    "grad_cam_elementwise",
    "fullgrad_cam",
]
pytestmark = [
    pytest.mark.filterwarnings("ignore:the .* map of layer:UserWarning"),
    # pytorch-grad-cam's Shapley-CAM cannot release its hooks.
    pytest.mark.filterwarnings(
        "ignore:Exception ignored in. <function BaseCAM:pytest.PytestUnraisableExceptionWarning"
    ),
]


def targets_for(name: str) -> list[Callable[[Tensor], Tensor]]:
    make = {"ScoreCAM": compat.ClassifierOutputTarget, "ShapleyCAM": Soft}.get(name, Large)
    return [make(3), make(7)]


@pytest.fixture
def their_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give pytorch-grad-cam's components the sign that agrees with the sum over channels, which there is left to chance."""
    from pytorch_grad_cam.utils import svd_on_activations as svd

    def signed(project: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        def projected(x: np.ndarray, *args: Any) -> np.ndarray:
            found = project(x, *args)
            flat = x.reshape(*x.shape[:2], -1)
            agrees = (found.reshape(len(x), -1) * (flat - flat.mean(2, keepdims=True)).sum(1)).sum(1)
            return found * np.where(agrees < 0, -1, 1).reshape(-1, *[1] * (found.ndim - 1))

        return projected

    for module in SIGNED_BY_CHANCE:
        monkeypatch.setattr(f"pytorch_grad_cam.{module}.get_2d_projection", signed(svd.get_2d_projection))
    monkeypatch.setattr("pytorch_grad_cam.kpca_cam.get_2d_projection_kernel", signed(svd.get_2d_projection_kernel))


@pytest.fixture
def their_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pytorch-grad-cam enlarge volumes and Score-CAM's masks linearly between the centres of cells, as it does maps."""

    monkeypatch.setattr("pytorch_grad_cam.utils.image.zoom", linear_zoom)
    monkeypatch.setattr(nn, "UpsamplingBilinear2d", lambda size: nn.Upsample(size=size, mode="bilinear"))


CASES: dict[str, tuple[Callable[[], nn.Module], list[str], tuple[int, ...], Any]] = {
    "convnet": (Net, ["third"], (2, 3, 24, 28), None),
    "two layers": (Net, ["second", "third"], (2, 3, 24, 28), None),
    "resnet18": (resnet, ["layer3.1", "layer4.1"], (2, 3, 64, 64), None),
    "vit": (ViT, ["blocks.0"], (2, 3, 32, 40), lambda t: compat.vit_reshape_transform(t, 4, 5)),
    "volumes": (lambda: Net(3), ["second", "third"], (2, 3, 16, 16, 16), None),
}
NOT_THEIRS = {  # what pytorch-grad-cam cannot do, or takes a minute for
    *itertools.product(["ScoreCAM", "AblationCAM"], ["resnet18"]),
    *itertools.product(["ScoreCAM", "AblationCAM", "FullGrad"], ["volumes"]),
    *itertools.product(["ShapleyCAM"], ["two layers", "resnet18", "volumes", "vit"]),
    *itertools.product(["AblationCAM", "FullGrad"], ["vit"]),
}


def both(name: str, case: str, targets: Any, **call: Any) -> tuple[np.ndarray, np.ndarray]:
    make, paths, shape, reshape = CASES[case]
    model, x = seeded(make), images(*shape)
    layers = [model.get_submodule(path) for path in paths]
    ours = getattr(compat, name)(model, layers, reshape)(x, targets, **call)
    theirs = getattr(peer, name)(model, layers, reshape)(x, targets, **call)
    assert ours.dtype == theirs.dtype == np.float32 and ours.shape == theirs.shape
    return ours, theirs


@pytest.mark.usefixtures("their_signs", "their_sizes")
@pytest.mark.parametrize(("name", "case"), [p for p in itertools.product(METHODS, CASES) if p not in NOT_THEIRS])
def test_the_maps_are_theirs(name: str, case: str) -> None:
    ours, theirs = both(name, case, targets_for(name))
    assert np.abs(ours - theirs).max() < 1e-4


@pytest.mark.usefixtures("their_signs", "their_sizes")
@pytest.mark.parametrize("option", ["eigen_smooth", "aug_smooth"])
@pytest.mark.parametrize("name", METHODS)
def test_the_smoothed_maps_are_theirs(name: str, option: str) -> None:
    ours, theirs = both(name, "convnet", targets_for(name), **{option: True})
    assert np.abs(ours - theirs).max() < 1e-4


@pytest.mark.usefixtures("their_signs", "their_sizes")
@pytest.mark.parametrize(
    "name", [name for name in METHODS if name not in ("GradCAMPlusPlus", "FullGrad", "AblationCAM")]
)
def test_without_targets_the_top_class_is_explained_as_there(name: str) -> None:
    ours, theirs = both(name, "convnet", None)
    assert np.abs(ours - theirs).max() < 1e-4


def test_every_name_of_the_library_is_there() -> None:
    public = {name for name, value in vars(peer).items() if callable(value)}
    assert public <= set(compat.__all__)


# What is different: with those of the base and the targets, one test for each row of the table in
# docs/howto/from-pytorch-grad-cam.md.


def test_ablation_does_not_depend_on_a_constant_in_the_score_or_on_the_size_of_a_batch() -> None:
    model, x = seeded(Net), images(2, 3, 16, 16)
    shift = [[lambda out, s=s: out[3] + s] * 2 for s in (-3.0, 3.0)]
    maps = [compat.AblationCAM(model, [model.third])(x, targets) for targets in shift]
    assert np.abs(maps[0] - maps[1]).max() < 1e-3
    signed = [compat.AblationCAM(model, [model.third[0]], batch_size=n)(x) for n in (1, 8)]
    assert np.abs(signed[0] - signed[1]).max() < 1e-5
    assert isinstance(model.third, nn.Sequential)
    for options in ({"ratio_channels_to_ablate": 0.5}, {"ablation_layer": nn.Identity()}):
        with pytest.raises((MulticamError, BeartypeCallHintViolation)):
            compat.AblationCAM(model, [model.third], **options)
    compat.AblationCAM(model, [model.third], ablation_layer=compat.AblationLayerVit())


def test_grad_cam_plus_plus_does_not_depend_on_the_size_of_small_gradients() -> None:
    model, x = seeded(Net), images(1, 3, 24, 28)
    small, large = ([lambda out, f=factor: f * out[3]] for factor in (1e-4, 1.0))
    ours, theirs = (
        np.abs(
            module.GradCAMPlusPlus(model, [model.third])(x, small)
            - module.GradCAMPlusPlus(model, [model.third])(x, large)
        )
        for module in (compat, peer)
    )
    assert ours.max() < 0.05 < theirs.max()


def test_full_grad_needs_no_order_of_definition() -> None:
    class Mixed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = self.second, self.first
            self.forward_first, self.forward_second = "second", "first"

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.third(self.first(self.second(x))).mean((2, 3)))

    a, b, x = seeded(Net), seeded(Mixed), images(1, 3, 16, 16)
    b.load_state_dict(
        {
            name.replace("first", "*").replace("second", "first").replace("*", "second"): value
            for name, value in a.state_dict().items()
        }
    )
    ours = [compat.FullGrad(model, [])(x, [Large(3)]) for model in (a, b)]
    assert np.array_equal(*ours)
