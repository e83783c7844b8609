import subprocess
import sys

import numpy as np
import pytest
import torch
from pytorch_grad_cam.feature_factorization.deep_feature_factorization import dff
from sklearn.decomposition import NMF
from torch import Tensor, nn

from multicam import Layer
from multicam.errors import MulticamError
from multicam.inside.concepts import factorize
from tests.helpers.hygiene import Stop, assert_unchanged, dirty, raising, state
from tests.helpers.models import Fusion, Siamese, fusion_inputs, seeded


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def trunk() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 12, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)
        )


class Given(nn.Module):
    """A model whose layer returns its input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.AvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).mean((2, 3))


def planted(b: int = 2, k: int = 3, c: int = 8, side: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Activations mixed from k concepts, each with cells and channels of its own."""
    strengths = torch.rand(b * side * side, k, generator=generator())
    strengths[torch.arange(len(strengths)), torch.arange(len(strengths)) % k] = 0
    for i in range(k):
        strengths[i] = torch.eye(k)[i] * (k - i)
    vectors = torch.rand(k, c, generator=generator(1))
    vectors[:, :k] = torch.eye(k)
    acts = (strengths @ vectors).reshape(b, side, side, c).movedim(-1, 1)
    return acts, strengths.reshape(b, side, side, k).movedim(-1, 1), vectors


# the factorisation


def test_planted_concepts_are_recovered() -> None:
    acts, strengths, vectors = planted()
    found = factorize(Given(), acts, "layer", 3)
    assert found.error < 1e-4
    unit = nn.functional.normalize
    alike = unit(found.vectors, dim=1) @ unit(vectors, dim=1).T
    true = alike.argmax(1)
    assert sorted(true.tolist()) == [0, 1, 2] and alike.amax(1).min() > 0.999
    expected = strengths[:, true] / strengths[:, true].amax((0, 2, 3), keepdim=True)
    assert torch.allclose(found.maps, expected, atol=0.03)


def test_maps_and_vectors_are_sklearns_factors() -> None:
    acts = torch.rand(2, 9, 6, 5, generator=generator())
    found = factorize(Given(), acts, "layer", 4)
    cells = acts.movedim(1, -1).flatten(0, 2).numpy()
    solver = NMF(4, init="nndsvda", random_state=0, max_iter=500)
    size = (cells**2).mean() ** 0.5
    product = solver.fit_transform(cells / size) @ solver.components_ * size
    ours = torch.einsum("bkhw,kc->bhwc", found.maps, found.vectors)
    assert np.allclose(ours.flatten(0, 2).numpy(), product, atol=1e-5)
    assert found.error == pytest.approx(float(((cells - product) ** 2).sum() / (cells**2).sum()), rel=1e-3)


def test_it_reconstructs_as_well_as_pytorch_grad_cam() -> None:
    acts, _, _ = planted(c=10)
    acts = acts + 0.05 * torch.rand(acts.shape, generator=generator(2))
    acts[:, :, 0, 0] = 0  # it subtracts the minimum of each channel, which is zero then
    concepts, explanations = dff(acts.numpy().copy(), 3)
    theirs = np.einsum("ck,bkhw->bchw", concepts, explanations)
    error = ((acts.numpy() - theirs) ** 2).sum() / (acts.numpy() ** 2).sum()
    found = factorize(Given(), acts, "layer", 3)
    assert found.error == pytest.approx(error, rel=0.05)
    ours = torch.einsum("bkhw,kc->bchw", found.maps, found.vectors).numpy()
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.999


def test_the_scale_and_the_order_of_concepts_are_fixed() -> None:
    found = factorize(Given(), torch.rand(3, 9, 6, 5, generator=generator()), "layer", 4)
    assert torch.equal(found.maps.amax((0, 2, 3)), torch.ones(4))
    assert found.maps.amin() >= 0 and found.vectors.amin() >= 0
    energy = found.maps.square().sum((0, 2, 3)) * found.vectors.square().sum(1)
    assert torch.equal(energy, energy.sort(descending=True).values)


def test_the_size_of_activations_only_scales_the_vectors() -> None:
    acts = torch.rand(2, 9, 6, 5, generator=generator())
    found, small = (factorize(Given(), size * acts, "layer", 4) for size in (1.0, 1e-9))
    assert torch.allclose(small.maps, found.maps, atol=1e-3)
    assert torch.allclose(small.vectors * 1e9, found.vectors, atol=1e-3)


def test_the_same_seed_gives_the_same_concepts_and_leaves_the_global_one() -> None:
    x = torch.rand(2, 3, 16, 16, generator=generator())
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    one, two = (factorize(trunk(), x, "1", 4, seed=3) for _ in range(2))
    assert torch.equal(one.maps, two.maps) and torch.equal(one.vectors, two.vectors)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002


def test_more_concepts_explain_more() -> None:
    x = torch.rand(2, 3, 16, 16, generator=generator())
    errors = [factorize(trunk(), x, "1", k).error for k in (1, 3, 8)]
    assert 1 > errors[0] > errors[1] > errors[2] > 0


def test_negative_activations_are_cut_and_count_as_unexplained() -> None:
    acts, _, _ = planted()
    acts[:, 7] = -acts[:, 7]
    with pytest.warns(UserWarning, match=r"\d+ % of the energy of layer 'layer' is negative"):
        found = factorize(Given(), acts, "layer", 3)
    cut = float(acts.clamp(max=0).square().sum() / acts.square().sum())
    assert found.error == pytest.approx(cut, abs=1e-3)
    assert found.vectors[:, 7].abs().max() < 1e-4


# what it is given


def resized(maps: Tensor, *size: int) -> Tensor:
    mode = "bilinear" if len(size) == 2 else "trilinear"
    return nn.functional.interpolate(maps, size, mode=mode, align_corners=False)


def test_each_input_has_the_concepts_of_its_own_layer() -> None:
    layers = {"rgb": "rgb.act", "depth": "depth.act", "named": Layer("rgb.act", onto="rgb"), "grid": "rgb.act"}
    model, inputs = seeded(Fusion), fusion_inputs(3)
    found = factorize(model, inputs, layers, 2)
    assert isinstance(found, dict)
    grid = found["grid"]
    acts = model.rgb(inputs["rgb"]).detach()
    left = acts - torch.einsum("b k h w, k c -> b c h w", grid.maps, grid.vectors)
    assert float(left.square().sum() / acts.square().sum()) == pytest.approx(grid.error, rel=1e-3) and grid.error < 0.5
    torch.testing.assert_close(found["rgb"].maps, resized(grid.maps, 32, 32))
    torch.testing.assert_close(found["named"].maps, found["rgb"].maps)
    alone = factorize(model, inputs, {"depth": "depth.act"}, 2)["depth"]
    assert torch.equal(found["depth"].maps, alone.maps) and alone.maps.shape == (3, 2, 16, 32)


@pytest.mark.filterwarnings("ignore:.* of the energy of layer 'attn' is negative")
def test_tokens_and_volumes_have_grids() -> None:
    tokens = factorize(seeded(Fusion), fusion_inputs(2), {"rgb": "attn", "grid": "attn"}, 3)
    torch.testing.assert_close(tokens["rgb"].maps, resized(tokens["grid"].maps, 32, 32))
    volume = nn.Sequential(nn.Conv3d(1, 4, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten())
    x = torch.rand(2, 1, 8, 12, 10, generator=generator())
    found = factorize(volume, x, "1", 4)
    explained = torch.einsum("b k z y x, k c -> b c z y x", found.maps, found.vectors)
    expected = resized(volume[:2](x).detach(), 8, 12, 10)  # as many concepts as channels leave nothing
    torch.testing.assert_close(explained, expected, atol=0.02, rtol=0)


def test_a_call_that_does_not_see_the_input_is_refused() -> None:
    dates = {"before": torch.rand(2, 3, 16, 16), "after": torch.rand(2, 3, 16, 16)}
    found = factorize(seeded(Siamese), dates, {"before": "encoder#0", "after": "encoder#1"}, 2)
    assert list(found) == ["before", "after"]
    with pytest.raises(MulticamError, match="'encoder#0' does not see input 'after'"):
        factorize(seeded(Siamese), dates, {"after": "encoder#0"}, 2)


def test_the_head_scores_each_concept_in_evaluation_mode() -> None:
    model, x = trunk(), torch.rand(2, 3, 16, 16, generator=generator())
    head = nn.Sequential(nn.Dropout(0.5), model[4]).train()
    found = factorize(model, x, "1", 3, head=head)
    assert torch.allclose(found.scores, model[4](found.vectors)) and not found.scores.requires_grad
    assert head.training and head[0].training
    assert torch.allclose(factorize(model, x, "1", 3, head=lambda v: v[:, :2] * 2).scores, 2 * found.vectors[:, :2])
    assert factorize(model, x, "1", 3).scores is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"concepts": 0}, "layer '1' has 12 channels in 128 cells: it can have 1 to 12 concepts, not 0"),
        ({"concepts": 13}, "it can have 1 to 12 concepts, not 13"),
        ({"layers": {}}, "no layer to factorize"),
        ({"layers": "conv"}, "no layer in Sequential 'conv'"),
        ({"inputs": torch.full((2, 3, 16, 16), torch.nan)}, "activations of layer '1' are not finite"),
        ({"head": lambda v: v.sum()}, r"the head returned \(\) for 2 concepts; it must return \(k classes\)"),
    ],
    ids=["none", "many", "no layer", "unknown layer", "nan", "head"],
)
def test_what_cannot_be_factorized_is_said(change: dict[str, object], message: str) -> None:
    given = {"inputs": torch.rand(2, 3, 16, 16), "layers": "1", "concepts": 2, **change}
    with pytest.raises(MulticamError, match=message):
        factorize(trunk(), **given)


def test_a_layer_that_is_zero_has_no_concepts() -> None:
    with pytest.raises(MulticamError, match="activations of layer 'layer' are zero everywhere"):
        factorize(Given(), torch.zeros(1, 3, 4, 4), "layer", 2)


def test_a_missing_scikit_learn_is_named() -> None:
    code = """
import sys; sys.modules["sklearn.decomposition"] = None
import torch, multicam.inside.concepts as c
try:
    c.factorize(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.ReLU()), torch.rand(1, 3, 4, 4), "1", 2)
except c.MulticamError as error:
    print(error)
"""
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert shown.strip() == "concepts need scikit-learn: pip install scikit-learn"


@pytest.mark.parametrize("when", ["normal", "head raises", "model raises", "interrupted"])
def test_everything_is_left_as_it_was(when: str) -> None:
    model = dirty()
    inputs = {name: x.requires_grad_() for name, x in fusion_inputs().items()}
    stops = {"model raises": Stop, "interrupted": KeyboardInterrupt}
    if when in stops:
        model.head.register_forward_hook(raising(stops[when]))
    head = raising(Stop) if when == "head raises" else None
    before = state(model, inputs)
    if when == "normal":
        assert factorize(model, inputs, {"rgb": "rgb.act"}, 2)["rgb"].maps.grad_fn is None
    else:
        with pytest.raises((Stop, KeyboardInterrupt)):
            factorize(model, inputs, {"rgb": "rgb.act"}, 2, head=head)
    assert_unchanged(before, state(model, inputs))
