"""The methods against their papers, the contract of a map, and its warnings."""

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import Fusion, Siamese, fusion_inputs, seeded
from torch import Tensor, nn

import multicam
from multicam import (
    CAM,
    EigenCAM,
    EigenGradCAM,
    GradCAM,
    GradCAMElementWise,
    GradCAMPlusPlus,
    HiResCAM,
    Inputs,
    Layer,
    LayerCAM,
    Maps,
    MulticamError,
    Site,
    Trace,
    XGradCAM,
    explain_methods,
    list_layers,
)
from multicam.catalogue import METHODS


def small(grid: tuple[int, ...], c: int = 4) -> tuple[nn.Module, Tensor]:
    """A convolutional net on 1-D, 2-D or 3-D input whose layer `"conv"` has the grid, with smooth activations."""
    torch.manual_seed(len(grid))
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(grid)]
    model = nn.Sequential()
    model.add_module("conv", conv(3, c, 3, padding=1))
    model.add_module("act", nn.SiLU())
    model.add_module("mix", conv(c, 6, 3, padding=1))
    model.add_module("tanh", nn.Tanh())
    model.add_module("flat", nn.Flatten())
    model.add_module("head", nn.Linear(6 * int(torch.tensor(grid).prod()), 5))
    return model.double(), torch.rand(2, 3, *grid, dtype=torch.float64)


def paper(method: type[CAM], A: Tensor, G: Tensor) -> Tensor:
    """The formula of each paper for one sample, `(c n)` activations and gradients, in loops and NumPy's words."""
    channels = range(len(A))
    if method is GradCAM:
        return sum(G[c].mean() * A[c] for c in channels)
    if method is HiResCAM:
        return sum(G[c] * A[c] for c in channels)
    if method is GradCAMElementWise:
        return sum((G[c] * A[c]).clamp(min=0) for c in channels)
    if method is GradCAMPlusPlus:
        alpha = [G[c] ** 2 / (2 * G[c] ** 2 + A[c].sum() * G[c] ** 3) for c in channels]
        return sum((alpha[c] * G[c].clamp(min=0)).sum() * A[c] for c in channels)
    if method is XGradCAM:
        return sum((G[c] * A[c] / A[c].sum()).sum() * A[c] for c in channels)
    if method is LayerCAM:
        return sum(G[c].clamp(min=0) * A[c] for c in channels)
    X = (A if method is EigenCAM else G * A).T
    X = X - X.mean(0)
    projection = X @ torch.linalg.svd(X, full_matrices=False)[2][0]
    return projection * torch.sign(projection @ X.sum(1))


@pytest.mark.parametrize("grid", [(9,), (5, 7), (3, 4, 5), (3, 2)], ids=str)
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)
def test_every_method_is_its_papers_formula(method: type[CAM], grid: tuple[int, ...]) -> None:
    """With more cells than channels and, in the last grid, nearly as few."""
    model, x = small(grid, c=4 if len(grid) != 2 else 8)
    site = Trace(model, x, {"conv": "conv"}, 3).sites["conv"]
    found = method(model, "conv").saliency(site).flatten(1)
    for b in range(2):
        expected = paper(method, site.acts[b].flatten(1), site.grads[b].flatten(1))
        assert torch.allclose(found[b], expected, rtol=1e-5, atol=1e-8 * expected.abs().max())


def sum_of_products(site: Site) -> Tensor:
    return (site.grads * site.acts).flatten(1).sum(1)


@pytest.mark.parametrize("method", [GradCAM, HiResCAM, XGradCAM], ids=lambda m: m.__name__)
def test_the_mean_of_a_map_is_the_evidence_in_units_of_the_score(method: type[CAM]) -> None:
    """With a pooled linear head the evidence is the logit without its bias, on any grid and by three methods."""
    torch.manual_seed(0)
    head = nn.Linear(6, 5)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    for size in (8, 13):
        x = torch.rand(2, 3, size, size)
        grid_map = method(model, {"grid": "1"})(x, 3, signed=True)["grid"]
        assert torch.allclose(grid_map.mean((1, 2)), model(x)[:, 3] - head.bias[3], rtol=1e-4)
        with pytest.raises(AttributeError):
            _ = grid_map.comparable  # a plain tensor


def test_hirescam_sums_to_gradient_times_activation_on_every_branch() -> None:
    trace = Trace(seeded(Fusion), fusion_inputs(), {"rgb": "rgb", "depth": "depth", "texture": "texture"}, 1)
    maps = HiResCAM(seeded(Fusion), {"rgb": "rgb"}).maps(trace, signed=True)
    for name, site in trace.sites.items():
        laid = maps[name].mean((1, 2))
        assert torch.allclose(laid, sum_of_products(site), rtol=0.05, atol=0.02 * maps[name].abs().mean())


def test_gradcam_equals_hirescam_for_a_pooled_linear_head() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
    x = torch.rand(2, 3, 9, 9)
    assert torch.allclose(GradCAM(model, "0")(x, 1, signed=True), HiResCAM(model, "0")(x, 1, signed=True), atol=1e-6)


def test_gradcam_plus_plus_has_no_epsilon() -> None:
    """Gradients a million times smaller leave the shape of the map alone, where an epsilon decides it elsewhere."""
    model, x = small((5, 7))
    maps = [
        GradCAMPlusPlus(model, "conv")(x, lambda out, s=s: s * out[:, 3], signed=True).flatten() for s in (1e-9, 1e-15)
    ]
    assert torch.allclose(maps[0] * 1e-6, maps[1], rtol=1e-5)


@pytest.mark.parametrize("method", [EigenCAM, EigenGradCAM], ids=lambda m: m.__name__)
def test_the_sign_of_a_component_is_fixed(method: type[CAM]) -> None:
    """A bright object stays positive under perturbations that flip an SVD's sign freely."""
    model = nn.Sequential(
        nn.Conv2d(1, 8, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2, bias=False)
    )
    with torch.no_grad():
        model[0].weight.abs_()
        model[3].weight.abs_()
    x = torch.zeros(1, 1, 8, 8)
    x[..., 2:4, 2:4] = 1
    for seed in range(20):
        noisy = x + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
        found = method(model, "0")(noisy, 0, signed=True)[0]
        assert found[2:4, 2:4].min() > found.abs().mean()


def test_a_name_that_is_an_input_lays_the_map_on_it() -> None:
    model, inputs = seeded(Fusion), fusion_inputs()
    layers = {"rgb": "rgb", "depth": "depth", "mixed": "attn", "other": Layer("attn", onto="texture")}
    maps = EigenCAM(model, layers)(inputs, signed=True)
    assert {name: tuple(m.shape) for name, m in maps.items()} == {
        "rgb": (2, 32, 32), "depth": (2, 16, 32), "mixed": (2, 8, 8), "other": (2, 32, 16),
    }  # fmt: skip
    upsampled = F.interpolate(maps["mixed"][:, None], (32, 16), mode="bilinear", align_corners=False)[:, 0]
    assert torch.equal(maps["other"], upsampled)
    assert EigenCAM(model, "rgb")(inputs).shape == (2, 8, 8)  # three inputs, and nobody said which
    assert EigenCAM(model, Layer("rgb", onto="rgb"))(inputs).shape == (2, 32, 32)


def test_short_names_and_the_only_image_of_a_dict_model() -> None:
    class Batched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, batch: dict[str, Any]) -> Tensor:
            return self.conv(batch["image"]).mean((2, 3))

    batch = Inputs({"image": torch.rand(2, 3, 9, 7), "ids": torch.arange(2)})
    assert HiResCAM(Batched(), {"image": "conv"})(batch, signed=True)["image"].shape == (2, 9, 7)
    assert HiResCAM(Batched(), "conv")(batch, signed=True).shape == (2, 9, 7)
    assert HiResCAM(Batched(), {"grid": "conv"})(batch, signed=True)["grid"].shape == (2, 9, 7)
    with pytest.raises(MulticamError, match=r"grid \(7, 5\), which cannot be laid on input 'batch\.ids' \(\(2,\)\)"):
        HiResCAM(Batched(), {"ids": "conv"})(batch, signed=True)
    with pytest.raises(MulticamError, match="no input 'imgae'"):
        HiResCAM(Batched(), Layer("conv", onto="imgae"))(batch, signed=True)


@pytest.mark.parametrize(
    ("shape", "stride", "laid"),
    [
        ((2, 3, 20), 2, (2, 20)),
        ((2, 3, 8, 12), 2, (2, 8, 12)),
        ((2, 3, 4, 8, 12), 2, (2, 4, 8, 12)),
    ],
)
def test_signals_images_and_volumes(shape: tuple[int, ...], stride: int, laid: tuple[int, ...]) -> None:
    conv = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[len(shape)](3, 4, 3, stride, 1)
    model = nn.Sequential(conv, nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 2))
    assert HiResCAM(model, "0")(torch.rand(shape), 0, signed=True).shape == laid


def test_clips_with_frames_first_get_their_map_on_the_frames() -> None:
    class Video(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv3d(3, 4, 3, 2, 1)

        def forward(self, pixel_values: Tensor) -> Tensor:
            return self.conv(pixel_values.transpose(1, 2)).mean((2, 3, 4))

    clip = torch.rand(1, 8, 3, 12, 14)
    assert HiResCAM(Video(), "conv")(clip, 0, signed=True).shape == (1, 8, 12, 14)


def test_axes_are_told_by_what_the_layer_made_of_them() -> None:
    signal = nn.Sequential(nn.Conv1d(16, 8, 4, 4), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    assert HiResCAM(signal, "0")(torch.rand(2, 16, 64), 1, signed=True).shape == (2, 64)
    contrasts = nn.Sequential(nn.Conv3d(4, 8, 3, padding=1), nn.AdaptiveAvgPool3d(1), nn.Flatten())
    assert HiResCAM(contrasts, "0")(torch.rand(1, 4, 3, 8, 8), 1, signed=True).shape == (1, 3, 8, 8)


def test_negative_evidence_is_cut_unless_signed() -> None:
    model, inputs = seeded(Fusion), fusion_inputs()
    signed = HiResCAM(model, {"grid": "rgb"})(inputs, 1, signed=True)["grid"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cut = HiResCAM(model, {"grid": "rgb"})(inputs, 1)["grid"]
    assert signed.min() < 0
    assert torch.equal(cut, signed.relu())


def test_maps_of_several_inputs_compare() -> None:
    """Two branches, one weighted a hundred times less: the masses say so, and per-map scaling could not."""

    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Conv2d(1, 4, 3), nn.Conv2d(1, 4, 3)
            self.right.load_state_dict(self.left.state_dict())

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return (self.left(left).relu() + 0.01 * self.right(right).relu()).mean((2, 3))

    torch.manual_seed(0)
    x = torch.rand(2, 1, 8, 8)
    maps = HiResCAM(Weighted(), {"left": "left", "right": "right"})((x, x), lambda out: out.sum(1))
    assert isinstance(maps, Maps)
    assert maps.comparable
    assert torch.allclose(maps["right"] * 100, maps["left"], rtol=1e-4)
    assert torch.allclose(maps.shares()[:, 1], torch.tensor(1 / 101), rtol=1e-3)
    assert Maps({"a": torch.zeros(1, 2, 2)}).shares().tolist() == [[0.0]]
    assert not EigenCAM(Weighted(), {"left": "left"})((x, x)).comparable
    assert "left: (2, 8, 8) mean" in repr(maps)


def test_a_batch_is_its_samples() -> None:
    model = seeded(Fusion)
    inputs = fusion_inputs(3)
    layers = {"rgb": "rgb", "depth": "depth.net.3", "attn": "attn"}
    for method in METHODS:
        together = method(model, layers)(inputs, [0, 3, 1], signed=True)
        for b, target in enumerate([0, 3, 1]):
            alone = method(model, layers)({name: x[b : b + 1] for name, x in inputs.items()}, target, signed=True)
            for name in layers:
                assert torch.allclose(
                    alone[name][0], together[name][b], rtol=1e-3, atol=1e-4 * together[name].abs().max()
                )


def test_many_methods_cost_one_forward_and_one_backward() -> None:
    model, inputs = seeded(Fusion), fusion_inputs()
    runs = []
    model.head.register_forward_hook(lambda m, i, o: runs.append(1))
    model.head.register_full_backward_hook(lambda m, i, o: runs.append(-1))
    layers = {"rgb": "rgb", "attn": "attn"}
    found = explain_methods(model, inputs, layers, METHODS, 1, signed=True)
    assert runs == [1, -1]
    assert list(found) == [method.__name__ for method in METHODS]
    for method in METHODS:
        expected = method(model, layers)(inputs, 1, signed=True)
        assert all(torch.equal(found[method.__name__][name], expected[name]) for name in layers)
    assert torch.equal(
        explain_methods(model, inputs, "rgb", [HiResCAM], 1, signed=True)["HiResCAM"],
        HiResCAM(model, "rgb")(inputs, 1, signed=True),
    )


def test_a_method_without_gradients_runs_no_backward() -> None:
    model = seeded(Fusion)
    model.head.register_full_backward_hook(lambda m, i, o: pytest.fail("backward"))
    assert EigenCAM(model, "rgb")(fusion_inputs()).any()


def test_a_method_of_ones_own_is_a_few_lines() -> None:
    class Energy(CAM):
        """The activations' energy."""

        def saliency(self, site: Site) -> Tensor:
            return site.acts.square().sum(1)

    assert Energy(seeded(Fusion), {"rgb": "rgb"})(fusion_inputs())["rgb"].shape == (2, 32, 32)
    assert repr(Energy(seeded(Fusion), "rgb")) == "Energy(Fusion, Layer('rgb'))"


class Reader(nn.Module):
    """A transformer-like head on a grid, in the ways that make maps empty."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.conv, self.norm = how, nn.Conv2d(3, 8, 3), nn.LayerNorm(8, elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        tokens = y.flatten(2).mT
        if self.how == "class token":
            return (tokens * 0).sum(1)
        if self.how == "norm":
            return self.norm(tokens).mean(1)
        return -y.square().mean((2, 3))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("class token", r"map of layer 'conv' for 2 of 2 samples is empty: the gradient is zero on the whole grid"),
        ("norm", r"is meaningless: gradient times activation cancels.*normalisation follows"),
        ("negative", r"is empty: all its evidence is negative; signed=True shows it"),
    ],
)
def test_a_map_that_is_empty_by_construction_says_why(how: str, message: str) -> None:
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=message):
        HiResCAM(Reader(how), {"conv": "conv"})(torch.rand(2, 3, 8, 8), 1)


def test_overflow_is_an_error_and_not_an_empty_map() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(MulticamError, match=r"HiResCAM of layer '0' is not finite.*bfloat16"):
        HiResCAM(model, "0")(torch.full((1, 3, 8, 8), float("inf")), 1)


def test_the_layers_of_a_model_and_what_they_see() -> None:
    table = list_layers(seeded(Fusion), fusion_inputs())
    row = {info.path: info for info in table}
    assert row["rgb.net.0"].grid == (16, 16)
    assert row["rgb.net.0"].sees == ("rgb",)
    assert row["attn"].shapes == {"0": (2, 64, 16), "1": (2, 64, 64)}
    assert row["attn"].grid == (8, 8)
    assert row["attn"].sees == ("rgb", "depth", "texture")
    assert row["head"].grid is None
    assert "no spatial axes" in row["head"].note
    assert [info.path for info in table.find("Multihead")] == ["attn"]
    assert str(table).splitlines()[0].split() == ["layer", "kind", "returns", "grid", "sees"]
    x = torch.rand(2, 3, 16, 16)
    calls = [info for info in list_layers(seeded(Siamese), (x, x)) if info.kind == "Branch"]
    assert [(info.path, info.sees) for info in calls] == [("encoder#0", ("before",)), ("encoder#1", ("after",))]
    for info in calls:
        assert HiResCAM(seeded(Siamese), info.path)((x, x), 1, signed=True).shape == (2, *info.grid)


def test_integer_inputs_alone_still_list_their_layers() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten())
    assert [(i.path, i.sees) for i in list_layers(model, torch.zeros(2, 3, dtype=torch.long))] == [("0", ()), ("1", ())]


@pytest.mark.parametrize("name", [n for n in multicam.__all__ if isinstance(getattr(multicam, n), type)])
def test_everything_public_says_what_it_is(name: str) -> None:
    assert getattr(multicam, name).__repr__ is not object.__repr__
