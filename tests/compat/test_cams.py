"""The drop-in for pytorch-grad-cam 1.5.7: equal to it wherever it is right, and right where it is not."""

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import pytorch_grad_cam as peer
import torch
import torch.nn.functional as F
from beartype.roar import BeartypeCallHintViolation
from pytorch_grad_cam.sobel_cam import sobel_cam
from pytorch_grad_cam.utils import find_layers, model_targets, reshape_transforms
from pytorch_grad_cam.utils import image as peer_image
from torch import Tensor, nn
from torchvision.models import resnet18

from multicam import Layer, MulticamError, compat
from tests.helpers.drop_in import Net, images, seeded
from tests.helpers.hygiene import Stop, assert_unchanged, raising, state
from tests.helpers.models import Fusion, fusion_inputs

SIGNED_BY_CHANCE = [
    "base_cam",
    "eigen_cam",
    "eigen_grad_cam",
    "hirescam",
    "layer_cam",
    "grad_cam_elementwise",
    "fullgrad_cam",
]
GRADIENT = ["GradCAM", "HiResCAM", "GradCAMElementWise", "GradCAMPlusPlus", "XGradCAM", "LayerCAM"]
EIGEN = ["EigenCAM", "EigenGradCAM", "SegEigenCAM", "KPCA_CAM"]
METHODS = [*GRADIENT, *EIGEN, "FEM", "ShapleyCAM", "ScoreCAM", "AblationCAM", "FullGrad"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:the .* map of layer:UserWarning"),
    # pytorch-grad-cam's Shapley-CAM cannot release its hooks.
    pytest.mark.filterwarnings(
        "ignore:Exception ignored in. <function BaseCAM:pytest.PytestUnraisableExceptionWarning"
    ),
]


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 16))
        self.blocks = nn.Sequential(
            *(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True, norm_first=True) for _ in range(2))
        )
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).mT
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], 1)
        return self.head(self.blocks(tokens).mean(1))


class Large:
    """A class score so large that the epsilons of pytorch-grad-cam do not count."""

    def __init__(self, category: int) -> None:
        self.category = category

    def __call__(self, output: Tensor) -> Tensor:
        return 1000 * output[self.category] + 5000


class Soft(Large):
    """A probability, whose curvature makes Shapley-CAM differ from Grad-CAM."""

    def __call__(self, output: Tensor) -> Tensor:
        return 1000 * output.softmax(-1)[self.category]


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


def resnet() -> nn.Module:
    return resnet18(num_classes=10)


@pytest.fixture
def their_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pytorch-grad-cam enlarge volumes and Score-CAM's masks linearly between the centres of cells, as it does maps."""

    def zoomed(x: np.ndarray, factors: list[float]) -> np.ndarray:
        size = [round(side * factor) for side, factor in zip(x.shape, factors, strict=True)]
        return F.interpolate(torch.from_numpy(x)[None, None], size, mode="trilinear")[0, 0].numpy()

    monkeypatch.setattr("pytorch_grad_cam.utils.image.zoom", zoomed)
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


@pytest.mark.parametrize("categories", [None, [1, 4]])
def test_finer_cam_is_theirs(categories: list[int] | None) -> None:
    model, x = seeded(Net), images(2, 3, 24, 28)
    call = {"alpha": 0.6, "comparison_categories": categories}
    ours = compat.FinerCAM(model, [model.third], base_method=compat.HiResCAM)(x, **call)
    theirs = peer.FinerCAM(model, [model.third], base_method=peer.HiResCAM)(x, **call)
    assert np.abs(ours - theirs).max() < 1e-4


def test_refine_cam_is_theirs() -> None:
    model, x = seeded(Net), images(2, 3, 24, 28)
    layers = [model.second, model.third]
    ours = compat.RefineCAM(model, layers, base_method=compat.LayerCAM)(x, [Large(3), Large(4)])
    theirs = peer.RefineCAM(model, layers, base_method=peer.LayerCAM)(x, [Large(3), Large(4)])
    assert np.abs(ours - theirs).max() < 1e-4


def test_sess_is_nearly_theirs() -> None:
    model, x = seeded(Net), images(2, 3, 24, 24)
    targets = [compat.ClassifierOutputTarget(3)] * 2
    options = {"base_method": compat.LayerCAM, "scales": [24, 36, 50], "step_size": 12}
    ours = compat.SESS(model, [model.third], **options)(x, targets)
    theirs = peer.SESS(model, [model.third], **options | {"base_method": peer.LayerCAM})(x, targets)
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.95


def test_guided_backpropagation_is_theirs_and_leaves_the_model_alone() -> None:
    model, x = seeded(resnet), images(1, 3, 32, 32)
    before = list(model.modules())
    ours = compat.GuidedBackpropReLUModel(model)(x, target_category=3)
    assert list(model.modules()) == before
    assert not x.requires_grad
    again = compat.GuidedBackpropReLUModel(model)(x, target_category=3)
    theirs = peer.GuidedBackpropReLUModel(model)(x.clone(), target_category=3)
    assert np.array_equal(ours, again)
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()


def test_deep_feature_factorization_finds_what_theirs_finds() -> None:
    model, x = seeded(Net), images(2, 3, 24, 28)
    concepts, maps, scores = compat.DeepFeatureFactorization(model, model.third, computation_on_concepts=model.head)(
        x, 2
    )
    theirs, their_maps, their_scores = peer.DeepFeatureFactorization(
        model, model.third, computation_on_concepts=model.head
    )(x, 2)
    assert (concepts.shape, scores.shape) == (theirs.shape, their_scores.shape)
    assert [m.shape for m in maps] == [m.shape for m in their_maps]
    assert all(m.min() >= 0 and m.max() <= 1 for m in maps)


OUTPUTS = torch.tensor([1.0, -2.0, 3.0])
TARGETS: dict[str, Callable[[Any], Any]] = {
    "ClassifierOutputTarget": lambda module: module.ClassifierOutputTarget(2),
    "ClassifierOutputSoftmaxTarget": lambda module: module.ClassifierOutputSoftmaxTarget(1),
    "ClassifierOutputReST": lambda module: module.ClassifierOutputReST(0),
    "BinaryClassifierOutputTarget": lambda module: module.BinaryClassifierOutputTarget(0),
    "SoftmaxOutputTarget": lambda module: module.SoftmaxOutputTarget(),
    "RawScoresOutputTarget": lambda module: module.RawScoresOutputTarget(),
    "FinerWeightedTarget": lambda module: module.FinerWeightedTarget(0, [1, 2], 0.5),
}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("output", [OUTPUTS, torch.stack([OUTPUTS, -OUTPUTS])], ids=["image", "batch"])
def test_the_targets_are_theirs(name: str, output: Tensor) -> None:
    make = TARGETS[name]
    assert torch.allclose(make(compat)(output), make(model_targets)(output))


def test_the_targets_of_segmentation_and_detection_are_theirs() -> None:
    mask = np.array([[1.0, 0.0], [1.0, 1.0]])
    out = images(3, 2, 2)
    ours, theirs = (m.SemanticSegmentationTarget(1, mask)(out) for m in (compat, model_targets))
    assert torch.allclose(ours.double(), theirs.double())
    found = {
        "boxes": torch.tensor([[0.0, 0.0, 4.0, 4.0], [3.0, 3.0, 9.0, 9.0]]),
        "labels": torch.tensor([1, 2]),
        "scores": torch.tensor([0.9, 0.6]),
    }
    boxes = [np.array(box, np.float32) for box in ([0, 0, 4, 3], [3, 3, 9, 8], [0, 0, 4, 4])]
    ours, theirs = (m.FasterRCNNBoxScoreTarget([1, 2, 2], boxes)(found) for m in (compat, model_targets))
    assert ours.shape == (1,) and torch.allclose(ours, theirs)


@pytest.mark.parametrize("name", ["vit_reshape_transform", "swinT_reshape_transform"])
def test_the_reshapes_are_theirs(name: str) -> None:
    tokens = images(2, 6 + (name[0] == "v"), 4)
    assert torch.equal(getattr(compat, name)(tokens, 2, 3), getattr(reshape_transforms, name)(tokens, 2, 3))


def test_the_pyramid_reshape_is_theirs_and_no_reshape_for_a_gradient() -> None:
    levels = {"0": images(1, 2, 8, 8), "pool": images(1, 2, 4, 4)}
    assert torch.equal(
        compat.fasterrcnn_reshape_transform(levels), reshape_transforms.fasterrcnn_reshape_transform(levels)
    )
    model = seeded(Net)
    with pytest.raises(MulticamError, match="computes new ones"):
        compat.EigenCAM(model, [model.third], lambda x: 2 * x)(images(1, 3, 16, 16))


@pytest.mark.parametrize("use_rgb", [False, True])
def test_the_pictures_are_theirs(use_rgb: bool) -> None:
    img, mask = np.abs(images(8, 9, 3).numpy()).clip(0, 1), np.abs(images(8, 9).numpy()).clip(0, 1)
    for weight in (0.5, 0.2):
        ours, theirs = (
            m.show_cam_on_image(img, mask, use_rgb=use_rgb, image_weight=weight) for m in (compat, peer_image)
        )
        assert np.abs(ours.astype(int) - theirs).max() <= 1
    assert np.array_equal(compat.deprocess_image(img), peer_image.deprocess_image(img))
    eight = (img * 255).astype(np.uint8)
    for picture in (eight, img):
        assert torch.allclose(compat.preprocess_image(picture), peer_image.preprocess_image(picture), atol=1e-6)
    assert np.array_equal(compat.sobel_cam(eight), sobel_cam(eight))
    concepts, colours = np.abs(images(3, 8, 9).numpy()).clip(0, 1), list(np.eye(3))
    ours = compat.show_factorization_on_image(img, concepts, colours)
    theirs = peer_image.show_factorization_on_image(img, concepts.copy(), list(colours))
    assert np.abs(ours.astype(int) - theirs).max() <= 1
    scores = images(2, 4).numpy()
    labels = dict(enumerate(["a, b, c, d", "e", "f", "g"]))
    assert compat.create_labels_legend(scores, labels) == peer_image.create_labels_legend(scores, labels)
    legend = compat.show_factorization_on_image(img, concepts, concept_labels=["x", "y", "z"])
    assert legend.shape == (8, 18, 3)


def test_the_scaling_is_theirs() -> None:
    x = images(2, 3, 5, 6).numpy()
    assert np.allclose(compat.scale_cam_image(x[0], (12, 7)), peer_image.scale_cam_image(x[0], (12, 7)), atol=1e-5)
    assert np.allclose(compat.scale_cam_image(x), peer_image.scale_cam_image(x), atol=1e-6)
    ours, theirs = (m.scale_accross_batch_and_channels(x, (12, 7)) for m in (compat, peer_image))
    assert np.allclose(ours, theirs, atol=1e-5)


def test_the_helpers_for_layers_are_theirs() -> None:
    model = seeded(Net)
    assert compat.find_layer_types_recursive(model, [nn.ReLU]) == find_layers.find_layer_types_recursive(
        model, [nn.ReLU]
    )
    identity = nn.Identity()
    assert compat.replace_layer_recursive(model, model.third[1], identity)
    assert model.third[1] is identity
    assert not compat.replace_layer_recursive(model, nn.ReLU(), identity)
    compat.replace_all_layer_type_recursive(model, nn.ReLU, identity)
    assert compat.find_layer_types_recursive(model, [nn.ReLU]) == []


def test_every_name_of_the_library_is_there() -> None:
    public = {name for name, value in vars(peer).items() if callable(value)}
    assert public <= set(compat.__all__)


# What is different: one test for each row of the table in docs/howto/from-pytorch-grad-cam.md.


def hires(model: nn.Module, *layers: Any, **options: Any) -> compat.HiResCAM:
    return compat.HiResCAM(model, list(layers), **options)


def test_operations_in_place_do_not_reach_the_map() -> None:
    plain = seeded(lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 5)))
    writing = nn.Sequential(plain[0], nn.ReLU(inplace=True), *plain[2:])
    x = images(1, 3, 8, 8)
    a, b = (compat.GradCAM(model, [model[0]])(x) for model in (plain, writing))
    assert np.array_equal(a, b)
    a, b = (peer.GradCAM(model, [model[0]])(x, None) for model in (plain, writing))
    assert np.abs(a - b).max() > 0.1


class Twice(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(
            (self.third(self.second(self.first(x))) + self.third(self.second(self.first(x.flip(0))))).mean((2, 3))
        )


def test_a_shared_layer_needs_the_number_of_its_call() -> None:
    model, x = seeded(Twice), images(2, 3, 16, 16)
    with pytest.raises(MulticamError, match="called 2 times"):
        hires(model, model.third)(x)
    first = hires(model, "third#0")(x)
    assert np.abs(first - peer.HiResCAM(model, [model.third])(x, None)).max() < 1e-4
    assert np.abs(first - hires(model, Layer(model.third, call=1))(x)).max() > 0.1


def test_a_sequential_is_one_layer_with_its_own_output() -> None:
    model, x = seeded(Net), images(1, 3, 16, 16)
    assert np.array_equal(compat.HiResCAM(model, model.third)(x), hires(model, model.third)(x))
    assert np.array_equal(hires(model, "third")(x), hires(model, model.third[1])(x))


def test_targets_fit_the_images_or_are_refused() -> None:
    model, x = seeded(Net), images(3, 3, 16, 16)
    cam = hires(model, model.third)
    with pytest.raises(MulticamError, match="1 targets for 3 images"):
        cam(x, [compat.ClassifierOutputTarget(1)])
    with pytest.raises(MulticamError, match="class 5000 does not exist"), cam:
        cam(x, [compat.ClassifierOutputTarget(5000)] * 3)
    with pytest.raises(MulticamError, match=r"returned shape \(10,\)"):
        cam(x, [compat.RawScoresOutputTarget()] * 3)


def test_outputs_that_are_no_tensor_are_given_to_each_target_by_image() -> None:
    class Heads(Net):
        def forward(self, x: Tensor) -> Any:
            features = self.third(self.second(self.first(x)))
            return {"logits": self.head(features.mean((2, 3))), "features": features}

    model, plain, x = seeded(Heads), seeded(Net), images(2, 3, 16, 16)
    expected = hires(plain, plain.third)(x, [compat.ClassifierOutputTarget(c) for c in (3, 4)])
    named = [lambda out: out["logits"][3], lambda out: out["logits"][4]]
    assert np.array_equal(hires(model, model.third)(x, named), expected)
    picked = hires(model, model.third, output="logits")
    assert np.array_equal(picked(x, [compat.ClassifierOutputTarget(c) for c in (3, 4)]), expected)
    with pytest.raises(MulticamError, match="output"):
        hires(model, model.third)(x)

    class Detector(Net):
        def forward(self, x: Tensor) -> Any:
            return [{"scores": row} for row in super().forward(x)]

    detector = seeded(Detector)
    found = hires(detector, detector.third)(x, [lambda out: out["scores"][3], lambda out: out["scores"][4]])
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("name", ["EigenCAM", "KPCA_CAM", "FEM"])
def test_methods_without_a_target_take_any_output(name: str) -> None:
    class Odd(Net):
        def forward(self, x: Tensor) -> Any:
            super().forward(x)
            return "boxes", [1, 2]

    model, plain, x = seeded(Odd), seeded(Net), images(2, 3, 16, 16)
    expected = getattr(compat, name)(plain, [plain.third])(x)
    assert np.array_equal(getattr(compat, name)(model, [model.third])(x), expected) and expected.any()


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


def test_aug_smooth_explains_one_class_and_takes_any_transforms() -> None:
    model, x = seeded(Net), images(1, 3, 16, 16)
    cam = hires(model, model.third)
    top = int(model(x).argmax())
    assert np.array_equal(cam(x, aug_smooth=True), cam(x, [compat.ClassifierOutputTarget(top)], aug_smooth=True))

    class Same:
        def augment_image(self, x: Tensor) -> Tensor:
            return x

        deaugment_mask = augment_image

    cam.tta_transforms = [Same()]
    assert np.array_equal(cam(x, aug_smooth=True), cam(x))


def test_refine_cam_smooths_as_it_says() -> None:
    model, x = seeded(Net), images(1, 3, 16, 16)
    cam = compat.RefineCAM(model, [model.second, model.third], base_method=compat.HiResCAM)
    plain, eigen, augmented = cam(x), cam(x, None, True), cam(x, aug_smooth=True)
    assert np.abs(plain - eigen).max() > 1e-3 < np.abs(eigen - augmented).max()


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


def test_multi_input_models_say_on_which_input_a_map_lies() -> None:
    model = seeded(Fusion)
    inputs = fusion_inputs()
    with pytest.raises(MulticamError, match="onto"):
        hires(model, "rgb")(inputs)
    found = hires(model, Layer("depth", onto="depth"))(inputs)
    assert found.shape == tuple(inputs["depth"][:, 0].shape)
    with pytest.raises(MulticamError, match="several sizes"):
        hires(model, Layer("depth", onto="depth"), Layer("rgb", onto="rgb"))(inputs)
    with pytest.raises(MulticamError, match="one image input"):
        hires(model, Layer("depth", onto="depth"))(inputs, aug_smooth=True)


@pytest.mark.parametrize("when", ["normal", "target raises", "model raises", "interrupted"])
@pytest.mark.parametrize("name", [*METHODS, "FinerCAM", "RefineCAM", "SESS"])
def test_everything_is_left_as_it_was(name: str, when: str) -> None:
    model = seeded(Net).train()
    model.second.eval()
    model(images(2, 3, 16, 16)).sum().backward()
    stops = {"model raises": Stop, "interrupted": KeyboardInterrupt}
    if when in stops:
        model.head.register_forward_hook(raising(stops[when]))
    targets = [raising(Stop)] * 2 if when == "target raises" else [compat.ClassifierOutputTarget(3)] * 2
    inputs = {"x": images(2, 3, 16, 16).requires_grad_()}
    before = state(model, inputs)
    options = {"scales": [16, 24]} if name == "SESS" else {}
    silent = when == "normal" or (when == "target raises" and name in ("EigenCAM", "KPCA_CAM", "FEM"))
    with getattr(compat, name)(model, [model.third], **options) as cam, contextlib.ExitStack() as stack:
        if not silent:
            stack.enter_context(pytest.raises((Stop, KeyboardInterrupt)))
        cam(inputs["x"], targets)
    cam.activations_and_grads.release()
    assert_unchanged(before, state(model, inputs))


def test_a_with_block_swallows_nothing() -> None:
    model = seeded(Net)
    with pytest.raises(IndexError), hires(model, model.third):
        [][0]


def test_the_outputs_of_the_last_call_hold_no_graph() -> None:
    model, x = seeded(Net), images(2, 3, 16, 16)
    cam = hires(model, model.third)
    cam(x)
    assert torch.equal(cam.outputs, model(x).detach())
    assert not cam.outputs.requires_grad
    assert torch.equal(cam.activations_and_grads(x), model(x))


@pytest.mark.parametrize("name", ["ShapleyCAM", "LayerCAM"])
def test_transformers_need_no_reshape_where_the_model_proves_the_grid(name: str) -> None:
    model, x = seeded(ViT), images(2, 3, 32, 40)
    found = getattr(compat, name)(model, [model.blocks[0], model.blocks[1].norm1])(x)
    said = getattr(compat, name)(
        model, [model.blocks[0], model.blocks[1].norm1], lambda t: compat.vit_reshape_transform(t, 4, 5)
    )(x)
    assert found.shape == (2, 32, 40)
    assert np.array_equal(found, said)


def test_frozen_weights_inference_mode_and_half_precision_work() -> None:
    model, x = seeded(Net), images(2, 3, 16, 16)
    expected = hires(model, model.third)(x)
    with torch.inference_mode():
        assert np.array_equal(hires(model, model.third)(x), expected)
    model.requires_grad_(False)
    assert np.array_equal(hires(model, model.third)(x), expected)
    half = hires(model.bfloat16(), model.third)(x.bfloat16())
    assert half.dtype == np.float32
    assert np.corrcoef(half.ravel(), expected.ravel())[0, 1] > 0.9
    model.head.weight.data[:] = torch.nan
    with pytest.raises(MulticamError, match="NaN"):
        hires(model, model.third)(x.bfloat16(), [compat.ClassifierOutputTarget(1)] * 2)


def test_the_pictures_refuse_what_they_cannot_show() -> None:
    img, mask = np.ones((4, 4, 3), np.float32), np.ones((4, 4), np.float32)
    for wrong in ((2 * img, mask), (-img, mask), (img, 2 * mask), (img, mask[:2])):
        with pytest.raises(MulticamError):
            compat.show_cam_on_image(*wrong)
    with pytest.raises(MulticamError, match="image_weight"):
        compat.show_cam_on_image(img, mask, image_weight=2.0)
    assert not compat.show_cam_on_image(0 * img, mask, image_weight=1.0).any()
    concepts = np.ones((2, 4, 4), np.float32)
    compat.show_factorization_on_image(img, concepts)
    assert concepts.all()


def test_concepts_of_one_image_are_shown() -> None:
    class Named(Net):
        config = type("Config", (), {"id2label": {i: f"class {i}" for i in range(10)}})

    model, x = seeded(Named), images(3, 16, 16)
    shown = compat.run_dff_on_image(model, model.third, model.head, np.zeros((16, 16, 3), np.uint8), x, None, 2)
    assert shown.shape == (16, 48, 3)
