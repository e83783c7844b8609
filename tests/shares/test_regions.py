"""Shares of regions against the definition on full passes, closed forms, captum and the axioms."""

import builtins
import re
from collections.abc import Callable, Mapping
from itertools import combinations
from math import comb
from typing import Any

import pytest
import torch
from captum.attr import ShapleyValues, ShapleyValueSampling
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from multicam import Inputs, MulticamError
from multicam.call.baselines import baselines
from multicam.call.targets import Probability, SegmentationScore
from multicam.shares.regions import RegionContribution, region_contribution, superpixels
from multicam.shares.shapley import EXACT, contribution
from tests.helpers.counting import counted
from tests.helpers.hygiene import assert_unchanged, state
from tests.helpers.models import Captioned, Fusion, fusion_inputs, seeded


def definition(value: Callable[[frozenset[int]], Tensor], k: int) -> Tensor:
    """The mean gain of each player over the coalitions of the others, every size counting alike."""
    shares = []
    for i in range(k):
        others = [j for j in range(k) if j != i]
        chosen = [frozenset(each) for size in range(k) for each in combinations(others, size)]
        shares.append(sum((value(each | {i}) - value(each)) / (k * comb(k - 1, len(each))) for each in chosen))
    return torch.stack(shares, 1)


def scorer(
    run: Callable[..., Tensor], inputs: Mapping[str, Tensor], labels: Mapping[str, Tensor], base: Mapping[str, Tensor]
) -> Callable[[frozenset[int]], Tensor]:
    """The score with some regions, numbered through all inputs, by a full pass of changed inputs."""
    known: dict[frozenset[int], Tensor] = {}

    def value(there: frozenset[int]) -> Tensor:
        if there not in known:
            changed, first = dict(inputs), 0
            for name, numbers in labels.items():
                count = int(numbers.max()) + 1
                stays = torch.stack([numbers == i for i in range(-1, count) if i == -1 or first + i in there]).any(0)
                x = inputs[name]
                mask = stays.view(len(x), *[1] * (x.ndim - stays.ndim), *stays.shape[1:])
                changed[name] = torch.where(mask, x, base[name])
                first += count
            with torch.no_grad():
                known[there] = run(**changed)
        return known[there]

    return value


def zeros(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(x) for name, x in inputs.items()}


def grid(rows: int, columns: int, x: Tensor) -> Tensor:
    """Numbers of the cells of an even grid."""
    cells = torch.arange(rows * columns).view(rows, columns)
    return (
        cells.repeat_interleave(x.shape[-2] // rows, 0)
        .repeat_interleave(x.shape[-1] // columns, 1)[None]
        .expand(len(x), *x.shape[-2:])
    )


class Corners(nn.Module):
    """`3 x[corner] y[corner] + 2 x[far corner]`, of the means of quarters; `z` is not read."""

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        near, far = x[..., :2, :2].mean((1, 2, 3)), x[..., 2:, 2:].mean((1, 2, 3))
        return torch.stack([3 * near * y[..., :2, :2].mean((1, 2, 3)) + 2 * far, near], 1)


def corners(b: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {name: torch.rand(b, 2, 4, 4, generator=generator) + 0.5 for name in "xyz"}


def test_the_closed_form_of_a_product_of_regions() -> None:
    inputs = corners()
    found = region_contribution(Corners(), inputs, 0, regions={"x": 2, "y": 2, "z": 1})
    near, far = inputs["x"][..., :2, :2].mean((1, 2, 3)), inputs["x"][..., 2:, 2:].mean((1, 2, 3))
    both = 3 * near * inputs["y"][..., :2, :2].mean((1, 2, 3))
    expected = torch.zeros(3, 9)
    expected[:, 0], expected[:, 3], expected[:, 4] = both / 2, 2 * far, both / 2
    shares = found.contribution
    assert shares.players == (*(f"{name}[{i}]" for name in "xy" for i in range(4)), "z[0]")
    torch.testing.assert_close(shares.shapley, expected, atol=1e-5, rtol=1e-5)
    assert shares.interactions is not None
    torch.testing.assert_close(shares.interactions[:, 0, 4], both, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shares.interactions.mT, shares.interactions)
    with_corner = found.interaction("x", 0)
    assert list(with_corner) == ["x", "y", "z"]
    wanted = torch.zeros(3, 4, 4)
    wanted[:, :2, :2] = both[:, None, None] * 4  # a density: a quarter of the area has all of it
    torch.testing.assert_close(with_corner["y"], wanted, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(with_corner["x"], torch.zeros(3, 4, 4), atol=1e-4, rtol=0)
    assert not with_corner["z"].any()
    torch.testing.assert_close(found.evidence, {"x": both / 2 + 2 * far, "y": both / 2, "z": torch.zeros(3)})


@pytest.mark.parametrize("regions", [2, 3], ids=["every coalition", "random orders"])
def test_regions_of_an_input_that_is_not_read_have_exactly_nothing(regions: int) -> None:
    found = region_contribution(Corners(), corners(), 0, regions=regions, permutations=2)
    unread = slice(2 * regions**2, None)
    for values in (found.contribution.shapley, found.contribution.single, found.contribution.without):
        assert torch.equal(values[:, unread], torch.zeros(3, regions**2))
    assert not found.maps["z"].any()
    assert (found.contribution.error is None) == (regions == 2)


CUTS: dict[str, Any] = {
    "grids": {"rgb": (1, 2), "depth": (2, 1)},
    "one held": {"texture": (2, 2)},
    "drawn": {"rgb": torch.tensor([[0, -1], [2, 2]]).repeat_interleave(8, 0).repeat_interleave(8, 1), "depth": 1},
}


@pytest.mark.parametrize(
    ("cut", "base"),
    [
        ("grids", 0.0),
        ("grids", "blur"),
        ("grids", {"rgb": 0.25, "depth": "mean"}),
        ("one held", "mean"),
        ("drawn", 0.5),
    ],
    ids=str,
)
def test_a_fusion_is_the_definition_on_full_passes(cut: str, base: Any) -> None:
    model, inputs, regions = seeded(Fusion), fusion_inputs(size=16), CUTS[cut]
    found = region_contribution(model, inputs, Probability(2), regions=regions, baseline=base)
    held = baselines(Inputs(**inputs), list(regions), base)
    value = scorer(lambda **x: model(**x).softmax(1)[:, 2], inputs, found.labels, held)
    k = len(found.contribution.players)
    torch.testing.assert_close(found.contribution.shapley, definition(value, k), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found.contribution.nothing, value(frozenset()), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.contribution.scores, value(frozenset(range(k))), atol=1e-6, rtol=1e-5)
    change = found.contribution.scores - found.contribution.nothing
    torch.testing.assert_close(found.contribution.shapley.sum(1), change, atol=1e-5, rtol=0)
    torch.testing.assert_close(sum(found.evidence.values()), change, atol=1e-5, rtol=0)
    for name, map in found.maps.items():
        torch.testing.assert_close(map.mean((1, 2)), found.evidence[name], atol=1e-6, rtol=1e-5)


def test_one_region_for_each_input_is_contribution() -> None:
    model, inputs = seeded(Fusion), fusion_inputs(size=16)
    found, whole = region_contribution(model, inputs, [1, 3], regions=1), contribution(model, inputs, [1, 3])
    for field in ("shapley", "single", "without", "scores", "nothing", "interactions"):
        torch.testing.assert_close(getattr(found.contribution, field), getattr(whole, field), atol=1e-6, rtol=1e-4)


def test_captum_agrees() -> None:
    model, inputs = seeded(Fusion), fusion_inputs(size=16)
    masks = grid(1, 2, inputs["rgb"])[:1, None], grid(2, 1, inputs["depth"])[:1, None] + 2
    theirs = ShapleyValues(model).attribute(
        (inputs["rgb"], inputs["depth"]), target=[1, 3], feature_mask=masks, additional_forward_args=inputs["texture"]
    )
    found = region_contribution(model, inputs, [1, 3], regions={"rgb": (1, 2), "depth": (2, 1)})
    expected = torch.stack(
        [theirs[0][:, 0, 0, 0], theirs[0][:, 0, 0, -1], theirs[1][:, 0, 0, 0], theirs[1][:, 0, -1, 0]], 1
    )
    torch.testing.assert_close(found.contribution.shapley, expected, atol=1e-6, rtol=1e-4)


def test_captum_agrees_where_orders_are_drawn() -> None:
    model = seeded(Weighted)
    x = torch.rand(2, 2, 8, 8, generator=torch.Generator().manual_seed(2))
    mask = grid(4, 4, x)[:1, None]
    theirs = ShapleyValueSampling(model).attribute(x, target=0, feature_mask=mask, n_samples=1)
    found = region_contribution(model, x, 0, permutations=1)
    assert len(found.contribution.players) == 16
    torch.testing.assert_close(found.maps["x"] / x[0, 0].numel(), theirs[:, 0] / 4, atol=1e-5, rtol=1e-4)


class Weighted(nn.Module):
    """The sum of all entries with a weight each."""

    def __init__(self, size: tuple[int, ...] = (2, 8, 8)) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, generator=torch.Generator().manual_seed(1)))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).flatten(1).sum(1, keepdim=True)


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_a_weighted_sum_in_any_regions(data: st.DataObject) -> None:
    b, c, h, w = (data.draw(st.integers(1, top)) for top in (3, 2, 6, 6))
    frames = data.draw(st.sampled_from([(), (2,)]))
    kind = data.draw(st.sampled_from(["n", "grid", "shared", "own"]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    most = data.draw(st.integers(1, 6))
    if kind in ("n", "grid"):
        rows, columns = data.draw(st.integers(1, min(h, 3))), data.draw(st.integers(1, min(w, 2)))
        cut: Any = min(rows, columns) if kind == "n" else (rows, columns)
    else:
        cut = torch.randint(-1, most, (h, w) if kind == "shared" else (b, h, w), generator=generator)
        cut.view(-1)[0] = 0
    x = torch.randn(b, c, *frames, h, w, generator=generator)
    model = Weighted((c, *frames, h, w))
    found = region_contribution(model, x, 0, regions=cut, baseline=0.5, permutations=1)
    labels = found.labels["x"]
    assert labels.shape == (b, h, w)
    if isinstance(cut, Tensor):
        assert torch.equal(labels, cut.expand(b, h, w))
    else:
        rows, columns = (cut, cut) if isinstance(cut, int) else cut
        for n, side, seen in ((rows, h, labels[0, :, 0] // columns), (columns, w, labels[0, 0] % columns)):
            counts = seen.bincount()
            assert len(counts) == n  # none is empty, and sizes differ by one at most
            assert counts.max() - counts.min() <= (side % n > 0)
    places = ((x - 0.5) * model.weight.detach()).flatten(1, -3).sum(1)
    k = len(found.contribution.players)
    expected = torch.stack([places.where(labels == i, 0).sum((1, 2)) for i in range(k)], 1)
    torch.testing.assert_close(found.contribution.shapley, expected, atol=1e-4, rtol=1e-4)
    map = found.maps["x"]
    torch.testing.assert_close(map.mean((1, 2)), expected.sum(1), atol=1e-4, rtol=1e-4)
    assert not map[labels < 0].any()
    for sample, numbers in enumerate(labels):
        for i in numbers[numbers >= 0].unique().tolist():
            inside = map[sample][numbers == i]
            torch.testing.assert_close(inside, inside[:1].expand_as(inside))
            torch.testing.assert_close(inside.sum() / numbers.numel(), expected[sample, i], atol=1e-4, rtol=1e-4)


def test_samples_with_more_and_fewer_regions() -> None:
    model, inputs = seeded(Fusion), fusion_inputs(size=16)
    numbers = torch.zeros(2, 16, 16, dtype=torch.int32)
    numbers[0, 5:, 3:] = 1
    numbers[0, :2] = -1
    numbers[1, 2:, 9:], numbers[1, 8:, :5], numbers[1, -1:] = 1, 2, 3
    found = region_contribution(model, inputs, 2, regions={"rgb": numbers, "depth": (1, 2)})
    value = scorer(lambda **x: model(**x)[:, 2], inputs, found.labels, zeros(inputs))
    torch.testing.assert_close(found.contribution.shapley, definition(value, 6), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found.contribution.shapley[0, 2:4], torch.zeros(2), atol=1e-6, rtol=0)
    for i in range(2):
        alone = region_contribution(
            model,
            {name: x[i : i + 1] for name, x in inputs.items()},
            2,
            regions={"rgb": numbers[i : i + 1], "depth": (1, 2)},
        )
        torch.testing.assert_close(alone.maps["rgb"][0], found.maps["rgb"][i], atol=1e-5, rtol=1e-4)


def test_numbers_may_have_gaps_and_are_the_callers() -> None:
    x = torch.rand(1, 2, 8, 8)
    numbers = torch.zeros(8, 8, dtype=torch.long)
    numbers[4:] = 3
    found = region_contribution(Weighted(), x, 0, regions=numbers)
    assert found.contribution.players == tuple(f"x[{i}]" for i in range(4))
    assert torch.equal(found.contribution.shapley[:, 1:3], torch.zeros(1, 2))
    before = found.maps["x"]
    numbers.zero_()
    assert torch.equal(found.maps["x"], before)


def test_regions_that_are_alike_have_alike_shares() -> None:
    class Squared(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return (x.sum((1, 2, 3)) * y.sum((1, 2, 3)) ** 2)[:, None]

    same = {name: torch.full((1, 1, 4, 4), 0.5) for name in "xy"}
    found = region_contribution(Squared(), same, 0, regions=2).contribution.shapley.view(2, 4)
    torch.testing.assert_close(found, found[:, :1].expand(2, 4))
    assert found[0, 0] != found[1, 0]


def test_signals_rows_of_numbers_and_words_by_name() -> None:
    class Heard(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(20, 3)

        def forward(self, rgb: Tensor, audio: Tensor, table: Tensor, ids: Tensor) -> Tensor:
            parts = [rgb.mean((1, 2, 3)), audio[:, 0, :4].sum(1) * table[:, 0], self.words(ids)[:, 2, 0]]
            return torch.stack(parts, 1).sum(1, keepdim=True)

    model = seeded(Heard)
    inputs = {
        "rgb": torch.rand(2, 3, 4, 4),
        "audio": torch.rand(2, 1, 8),
        "table": torch.rand(2, 2),
        "ids": torch.tensor([[4, 5, 6, 7], [1, 2, 3, 4]]),
    }
    found = region_contribution(
        model,
        inputs,
        0,
        regions={"audio": 2, "table": (2,), "ids": torch.arange(4)},
        baseline={"ids": 0},
    )
    both = inputs["audio"][:, 0, :4].sum(1) * inputs["table"][:, 0]
    table = model.words.weight.detach()[:, 0]
    word = table[inputs["ids"][:, 2]] - table[0]
    none = torch.zeros(2)
    expected = torch.stack([both / 2, none, both / 2, none, none, none, word, none], 1)
    torch.testing.assert_close(found.contribution.shapley, expected, atol=1e-5, rtol=1e-5)
    assert {name: tuple(map.shape) for name, map in found.maps.items()} == {
        "audio": (2, 8),
        "table": (2, 2),
        "ids": (2, 4),
    }
    torch.testing.assert_close(found.maps["audio"].mean(1), both / 2, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(2, 3, 2, 6, 6), (2, 2, 3, 6, 6)], ids=["b c t h w", "b t c h w"])
def test_a_region_of_a_clip_is_of_all_its_frames(shape: tuple[int, ...]) -> None:
    x = torch.rand(shape)
    model = Weighted(shape[1:])
    found = region_contribution(model, x, 0, regions=(1, 2))
    halves = (x * model.weight.detach()).sum((1, 2, 3)).view(2, 2, 3).sum(2)
    torch.testing.assert_close(found.contribution.shapley, halves, atol=1e-5, rtol=1e-4)
    assert found.maps["x"].shape == (2, 6, 6)


def test_integer_images_stay_integers() -> None:
    class Bytes(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            assert image.dtype == torch.uint8
            return image.float().mean((1, 2, 3))[:, None] / 255

    x = torch.randint(0, 256, (2, 3, 6, 6), dtype=torch.uint8)
    found = region_contribution(Bytes(), x, 0, regions=(3, 1), baseline=128)
    expected = (x.float() - 128).mean((1, 3)).view(2, 3, 2).mean(2) / 255 / 3
    torch.testing.assert_close(found.contribution.shapley, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_precisions(dtype: torch.dtype) -> None:
    inputs = fusion_inputs(size=16)
    regions = {"rgb": (1, 2), "depth": 1}
    expected = region_contribution(seeded(Fusion), inputs, 2, regions=regions).contribution
    model, cast = seeded(Fusion).to(dtype), {name: x.to(dtype) for name, x in inputs.items()}
    found = region_contribution(model, cast, 2, regions=regions)
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(found.contribution.shapley, expected.shapley, atol=tolerance, rtol=0)
    assert found.maps["rgb"].dtype == torch.float32


@pytest.mark.parametrize("held", [False, True], ids=["alone", "beside held inputs"])
def test_references_are_averaged_over(held: bool) -> None:
    model, inputs = seeded(Fusion), fusion_inputs(size=16)
    generator = torch.Generator().manual_seed(3)
    others = {name: torch.rand(3, *x.shape[1:], generator=generator) for name, x in inputs.items()}
    regions = {"rgb": (1, 2), "depth": 1} | ({} if held else {"texture": 1})
    found = region_contribution(model, inputs, 2, regions=regions, references=others)
    k = len(found.contribution.players)
    each = []
    for j in range(3):
        base = {name: x[j : j + 1].expand_as(inputs[name]) for name, x in others.items()}
        each.append(definition(scorer(lambda **x: model(**x)[:, 2], inputs, found.labels, base), k))
    torch.testing.assert_close(found.contribution.shapley, torch.stack(each).mean(0), atol=1e-6, rtol=1e-4)


def test_a_baseline_of_each_sample() -> None:
    x, base = torch.rand(3, 2, 8, 8), torch.rand(3, 2, 8, 8)
    model = Weighted()
    found = region_contribution(model, x, 0, regions=1, baseline={"x": base})
    expected = model(x - base).detach()
    torch.testing.assert_close(found.contribution.shapley, expected, atol=1e-5, rtol=1e-4)


def test_held_inputs_stay_with_their_samples() -> None:
    model = seeded(Captioned)
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "image": torch.rand(3, 3, 16, 16, generator=generator),
        "ids": torch.randint(1, 50, (3, 5), generator=generator),
    }
    found = region_contribution(model, inputs, 1, regions=(2, 1), output="logits")
    value = scorer(lambda **x: model(**x)["logits"][:, 1], inputs, found.labels, zeros(inputs))
    torch.testing.assert_close(found.contribution.shapley, definition(value, 2), atol=1e-6, rtol=1e-4)


def test_a_constant_input_is_left_alone() -> None:
    class Prompted(nn.Module):
        def forward(self, image: Tensor, prompts: Tensor) -> Tensor:
            return image.mean((2, 3)) @ prompts.T

    image, prompts = torch.rand(2, 3, 4, 4), torch.rand(5, 3)
    found = region_contribution(Prompted(), Inputs(image, prompts).constant("prompts"), 4, regions=(2, 1))
    halves = image.view(2, 3, 2, 2, 4).sum((3, 4)) / 16
    expected = torch.einsum("b c r, c -> b r", halves, prompts[4])
    torch.testing.assert_close(found.contribution.shapley, expected, atol=1e-5, rtol=1e-4)


def test_a_top_class_is_that_of_the_unchanged_inputs() -> None:
    class Fickle(nn.Module):
        """The top class of what is covered is another one."""

        def forward(self, x: Tensor) -> Tensor:
            mean = x.mean((1, 2, 3))
            return torch.stack([mean, 0.2 + 0 * mean], 1)

    x = torch.ones(2, 1, 4, 4)
    x[1] *= 0.1
    found = region_contribution(Fickle(), x, regions=2)
    torch.testing.assert_close(found.contribution.shapley, torch.tensor([[0.25] * 4, [0.0] * 4]))
    torch.testing.assert_close(found.contribution.scores, torch.tensor([1.0, 0.2]))


def test_the_batch_size_changes_nothing() -> None:
    model, inputs = seeded(Fusion), fusion_inputs(size=16)
    found = [
        region_contribution(model, inputs, 2, regions={"rgb": (1, 2), "depth": 1}, batch_size=n).contribution.shapley
        for n in (32, 3)
    ]
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-4)


def test_what_only_depends_on_uncut_inputs_is_not_run_again() -> None:
    model, inputs = seeded(Fusion), fusion_inputs(size=16)
    with counted(model) as counts:
        region_contribution(model, inputs, 2, regions={"rgb": (2, 3)})
    assert counts["rgb"] >= 2 * 2**6 // 32
    assert counts["texture"] < counts[""] / 2  # in full passes and proofs


@pytest.mark.filterwarnings("ignore:sample . has the score")
def test_a_model_that_looks_at_the_batch_runs_each_alone() -> None:
    class Ranked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            m = x.flatten(1)[:, ::5]
            return ((m - 0.5 * m.mean(0)) ** 2).sum(1, keepdim=True)

    x = torch.rand(2, 1, 4, 4)
    found = region_contribution(Ranked(), x, 0, regions=(2, 1), batch_size=1).contribution.shapley
    each = torch.cat(
        [
            region_contribution(Ranked(), x[i : i + 1], 0, regions=(2, 1), batch_size=1).contribution.shapley
            for i in range(2)
        ]
    )
    torch.testing.assert_close(found, each)
    with pytest.warns(UserWarning, match="sample 0 has the score .* alone and .* in its batch"):
        together = region_contribution(Ranked(), x, 0, regions=(2, 1)).contribution.shapley
    torch.testing.assert_close(together, each)


def test_many_regions_are_sampled() -> None:
    x = torch.rand(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))

    class Paired(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x[..., 0, 0].sum(1) * x[..., -1, -1].sum(1) + x.sum((1, 2, 3)))[:, None]

    found = region_contribution(Paired(), x, 0, permutations=3)
    cells = x.view(2, 2, 4, 2, 4, 2).sum((1, 3, 5)).flatten(1)
    both = x[..., 0, 0].sum(1) * x[..., -1, -1].sum(1)
    expected = cells.clone()
    expected[:, 0] += both / 2
    expected[:, -1] += both / 2
    shares = found.contribution
    assert len(shares.players) == 16 > EXACT
    torch.testing.assert_close(shares.shapley, expected, atol=1e-4, rtol=1e-4)
    assert shares.error is not None
    assert shares.error.max() < 1e-4
    with pytest.raises(MulticamError, match="random orders give no interactions"):
        found.interaction("x", 0)
    again = region_contribution(Paired(), x, 0, permutations=3)
    assert torch.equal(again.contribution.shapley, shares.shapley)


def test_many_regions_and_a_budget() -> None:
    pytest.importorskip("shapiq")
    x, y = torch.rand(2, 2, 8, 8), torch.rand(2, 1, 2, 2)

    class Beside(nn.Module):
        """`x[first] x[last] + sum x`; `y` is not read."""

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return (x[..., 0, 0].sum(1) * x[..., -1, -1].sum(1) + x.sum((1, 2, 3)))[:, None]

    found = region_contribution(Beside(), (x, y), 0, regions={"y": 2, "x": 4}, budget=400)
    both = x[..., 0, 0].sum(1) * x[..., -1, -1].sum(1)
    expected = x.view(2, 2, 4, 2, 4, 2).sum((1, 3, 5)).flatten(1)
    expected[:, 0] += both / 2
    expected[:, -1] += both / 2
    shares = found.contribution
    assert torch.equal(shares.shapley[:, :4], torch.zeros(2, 4))
    torch.testing.assert_close(shares.shapley[:, 4:], expected, atol=0.1, rtol=0.05)
    torch.testing.assert_close(shares.shapley.sum(1), shares.scores - shares.nothing, atol=1e-4, rtol=0)
    map = found.interaction("x", 0)
    assert not map["y"].any()
    torch.testing.assert_close(map["x"][:, -1, -1], both * 16, atol=0.5, rtol=0.1)
    assert not map["x"][:, :2, :2].any()


@pytest.mark.parametrize("raises", [False, True], ids=["returns", "raises"])
def test_nothing_of_the_callers_is_changed(raises: bool) -> None:
    model, inputs = seeded(Fusion).train(), fusion_inputs(size=16)
    model.head.eval()
    model.rgb.requires_grad_(False)
    for x in inputs.values():
        x.requires_grad_()
    before = state(model, inputs)

    def target(output: Tensor) -> Tensor:
        if raises:
            raise KeyError("mine")
        return output[:, 1]

    try:
        with torch.no_grad():
            region_contribution(model, inputs, target, regions={"rgb": (1, 2), "depth": 1})
    except KeyError:
        assert raises
    assert_unchanged(before, state(model, inputs))


def test_a_region_contribution_shows_itself() -> None:
    found = region_contribution(Weighted(), torch.ones(2, 2, 8, 8), 0, regions=2)
    assert isinstance(found, RegionContribution)
    mean = Weighted().weight.detach().sum().item()
    assert repr(found) == f"RegionContribution(4 regions; mean evidence x: {mean:.4g})"


def test_the_regions_of_an_input_have_a_share_together() -> None:
    class Against(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x.mean((1, 2, 3)) - 3 * y[..., :4].mean((1, 2, 3)) + y[..., 4:].mean((1, 2, 3))

    found = region_contribution(
        Against(), (torch.ones(2, 1, 4, 8), torch.ones(2, 1, 4, 8)), lambda s: s, regions=(1, 2)
    )
    torch.testing.assert_close(found.contribution.shares, torch.tensor([[0.5, 0.5, -3.0, 1.0]]).expand(2, 4) / 5)
    torch.testing.assert_close(found.shares, torch.tensor([[1.0, -2.0]]).expand(2, 2) / 3)  # of inputs, not of regions
    assert torch.equal(found.shares, found.maps.shares())
    assert repr(found) == "RegionContribution(4 regions; mean evidence x: 1 (33%), y: -2 (-67%))"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regions": {"rbg": 2}}, "no input 'rbg'; did you mean 'rgb'"),
        ({"regions": {}}, "there is no image input to cut"),
        ({"regions": 0}, "'rgb' (2, 3, 16, 16) cannot be cut into a grid of 0 along (16, 16)"),
        ({"regions": {"depth": (9, 2)}}, "'depth' (2, 1, 8, 16) cannot be cut into a grid of (9, 2) along (8, 16)"),
        ({"regions": (2, 2, 2)}, "cannot be cut into a grid of (2, 2, 2)"),
        ({"regions": {"rgb": torch.zeros(16, 8, dtype=torch.long)}}, "must be numbers of regions (16, 16) or (2, 16, 16)"),
        ({"regions": {"rgb": torch.zeros(1, 16, 16, dtype=torch.long)}}, "must be numbers of regions (16, 16)"),
        ({"regions": {"rgb": torch.zeros(16, 16)}}, "the regions torch.float32 (16, 16) of input 'rgb' (2, 3, 16, 16)"),
        ({"regions": {"rgb": torch.zeros(16, 16, dtype=torch.bool)}}, "are counted from 0, and -1 is of none"),
        ({"regions": {"rgb": torch.full((16, 16), -1)}}, "are counted from 0, and -1 is of none"),
        ({"regions": {"rgb": torch.eye(16, dtype=torch.long) * -2}}, "are counted from 0, and -1 is of none"),
        ({"baseline": {"rgb": None}}, "a region of input 'rgb' cannot become None"),
        ({"baseline": 0.5, "references": {}}, "give a baseline, or references"),
        ({"batch_size": 0}, "batch_size must be a whole number"),
        ({"permutations": 0, "regions": 3}, "permutations must be a whole number"),
        ({"target": 5}, "target class 5 does not exist"),
        ({"target": lambda output: output[:, 0] * torch.tensor([1.0, 2.0])}, "treats each sample differently"),
    ],
    ids=lambda given: re.sub(" at 0x[0-9a-f]+", "", str(given)),
)  # fmt: skip
def test_bad_input(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MulticamError) as error:
        region_contribution(seeded(Fusion), fusion_inputs(size=16), **{"target": 0, "regions": 1} | options)
    assert message in str(error.value)


def test_more_bad_input() -> None:
    class Told(nn.Module):
        def forward(self, x: Tensor, ids: Tensor, scale: float, weight: Tensor) -> Tensor:
            return (x.mean((1, 2, 3)) * ids.sum(1) * scale * weight)[:, None]

    inputs = {
        "x": torch.rand(2, 1, 4, 4),
        "ids": torch.ones(2, 3, dtype=torch.long),
        "scale": 2.0,
        "weight": torch.ones(2),
    }
    for name in ("scale", "weight"):
        with pytest.raises(
            MulticamError, match=f"no input with places for each sample '{name}'.* There are: 'x', 'ids'"
        ):
            region_contribution(Told(), inputs, 0, regions={name: 1})
    with pytest.raises(MulticamError, match="say what stands for nothing in it"):
        region_contribution(Told(), inputs, 0, regions={"ids": 3})
    found = region_contribution(Told(), inputs, 0, regions={"x": 2})
    with pytest.raises(MulticamError, match=r"no region 'x\[4\]'"):
        found.interaction("x", 4)
    with pytest.raises(MulticamError, match="no region 'y"):
        found.interaction("y", 0)


# Superpixels


def test_superpixels_follow_the_edges() -> None:
    images = torch.zeros(2, 3, 24, 24)
    images[0, :, :, 9:] = 1
    images[1, :, 14:] = 1
    found = superpixels(images, 4, compactness=0.1)
    assert found.dtype == torch.long
    assert found.shape == (2, 24, 24)
    for image, numbers in zip(images, found, strict=True):
        assert numbers.unique().tolist() == list(range(int(numbers.max()) + 1))
        for i in numbers.unique():
            inside = image[0][numbers == i]
            assert torch.equal(inside, inside[:1].expand_as(inside))


def test_superpixels_of_any_scale_and_channels() -> None:
    coarse = torch.rand(2, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    images = nn.functional.interpolate(coarse, (16, 16), mode="bilinear")
    found = superpixels(images, 9)
    assert 4 <= int(found.max()) <= 16
    assert torch.equal(superpixels(images * 4 - 2, 9), found)  # powers of two round nothing
    assert torch.equal(superpixels(images[:1], 9), found[:1])
    for other in (images.bfloat16(), (images * 255).to(torch.uint8), images.requires_grad_()):
        assert superpixels(other, 9).shape == (2, 16, 16)
    assert superpixels(torch.ones(1, 1, 16, 16), 4).max() < 16


def test_superpixels_are_regions() -> None:
    model, inputs = seeded(Fusion), fusion_inputs(size=16)
    numbers = superpixels(inputs["rgb"], 4)
    found = region_contribution(model, inputs, 2, regions={"rgb": numbers})
    assert torch.equal(found.labels["rgb"], numbers)
    k = int(numbers.max()) + 1
    value = scorer(lambda **x: model(**x)[:, 2], inputs, found.labels, zeros(inputs))
    torch.testing.assert_close(found.contribution.shapley, definition(value, k), atol=1e-6, rtol=1e-4)


def test_bad_superpixels(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand(1, 3, 8, 8)
    with pytest.raises(MulticamError, match="superpixels need finite numbers"):
        superpixels(images / 0)
    with pytest.raises(MulticamError, match=r"images \(b c h w\), not of \(0, 3, 8, 8\)"):
        superpixels(images[:0])
    with pytest.raises(MulticamError, match="count must be a whole number"):
        superpixels(images, 0)
    with pytest.raises(MulticamError, match="compactness is above zero, not 0"):
        superpixels(images, compactness=0.0)
    there = builtins.__import__

    def missing(name: str, *args: Any, **options: Any) -> Any:
        if name.startswith("skimage"):
            raise ImportError(name)
        return there(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MulticamError, match="pip install scikit-image"):
        superpixels(images)


def test_one_mask_for_all_samples_is_that_of_one_sample_alone() -> None:
    torch.manual_seed(0)
    mask = torch.zeros(4, 6)
    mask[1, 1] = mask[3, 2] = 1
    model, x = nn.Conv2d(3, 4, 1), torch.rand(1, 3, 4, 6)
    shared, own = (
        region_contribution(model, x, SegmentationScore(1, m), regions=2).contribution.shapley
        for m in (mask, mask[None])
    )
    torch.testing.assert_close(shared, own)
