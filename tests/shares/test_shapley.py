"""Shapley shares against closed forms, captum and the axioms; and that encoders run once for each version of their input."""

import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, product
from math import factorial
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import ShapleyValues
from torch import Tensor, nn

from multicam import Inputs, MulticamError
from multicam.call.targets import Probability, SegmentationScore
from multicam.shares.game import Game
from multicam.shares.regions import region_contribution
from multicam.shares.shapley import EXACT, Contribution, contribution
from multicam.watch.mixing import Mixing
from multicam.watch.singly import Singly
from tests.helpers.models import Captioned, Fusion, Siamese, fusion_inputs, seeded


class Product(nn.Module):
    """`x y + 3 z`, each the mean of its image; `w` is not read."""

    def forward(self, x: Tensor, y: Tensor, z: Tensor, w: Tensor) -> Tensor:
        x, y, z = (each.mean((1, 2, 3)) for each in (x, y, z))
        return torch.stack([x * y + 3 * z, x - y], 1)


def images(names: str = "xyzw", b: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {name: torch.rand(b, 2, 4, 4, generator=generator) + 0.5 for name in names}


def shapley(values: dict[frozenset[str], Tensor], players: list[str]) -> Tensor:
    """The definition, coalition by coalition."""
    k = len(players)
    shares = []
    for player in players:
        others = [other for other in players if other != player]
        total = torch.zeros_like(values[frozenset()])
        for size in range(k):
            weight = factorial(size) * factorial(k - size - 1) / factorial(k)
            for chosen in map(frozenset, combinations(others, size)):
                total = total + weight * (values[chosen | {player}] - values[chosen])
        shares.append(total)
    return torch.stack(shares, 1)


def naive(
    model: nn.Module, inputs: dict[str, Tensor], target: int, base: dict[str, Tensor]
) -> dict[frozenset[str], Tensor]:
    """The score of every coalition, from a full pass each."""
    found = {}
    with torch.no_grad():
        for there in product([False, True], repeat=len(inputs)):
            chosen = frozenset(name for name, is_there in zip(inputs, there, strict=True) if is_there)
            found[chosen] = model(**{name: x if name in chosen else base[name] for name, x in inputs.items()})[
                :, target
            ]
    return found


def test_the_closed_form_of_a_product() -> None:
    inputs = images()
    found = contribution(Product(), inputs, 0)
    x, y, z, w = (each.mean((1, 2, 3)) for each in inputs.values())
    torch.testing.assert_close(found.shapley, torch.stack([x * y / 2, x * y / 2, 3 * z, 0 * w], 1))
    torch.testing.assert_close(found.single, torch.stack([0 * x, 0 * y, 3 * z, 0 * w], 1))
    torch.testing.assert_close(found.without, torch.stack([x * y, x * y, 3 * z, 0 * w], 1))
    assert found.interactions is not None
    torch.testing.assert_close(found.interactions[:, 0, 1], x * y)
    torch.testing.assert_close(found.interactions, found.interactions.mT)
    found.interactions[:, [0, 1], [1, 0]] = 0
    torch.testing.assert_close(found.interactions, torch.zeros(3, 4, 4), atol=1e-6, rtol=0)


def test_a_player_that_is_not_read_has_exactly_nothing() -> None:
    found = contribution(Product(), images(), 0)
    assert found.interactions is not None
    for values in (found.shapley[:, 3], found.single[:, 3], found.without[:, 3], found.interactions[:, 3]):
        assert torch.equal(values, torch.zeros_like(values))


@pytest.mark.parametrize("base", [0.0, "mean", "blur"])
def test_a_fusion_is_the_definition_on_full_passes(base: Any) -> None:
    model, inputs = seeded(Fusion).eval(), fusion_inputs()
    found = contribution(model, inputs, 2, baseline=base)
    game = Game(model, inputs, baseline=base)
    held = {name: rows[:, 0].expand_as(inputs[name]) for name, rows in game.references.items()}
    values = naive(model, inputs, 2, held)
    torch.testing.assert_close(found.shapley, shapley(values, list(inputs)), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.scores, values[frozenset(inputs)])
    torch.testing.assert_close(found.nothing, values[frozenset()])
    torch.testing.assert_close(found.shapley.sum(1), found.scores - found.nothing, atol=1e-5, rtol=0)


def test_captum_agrees() -> None:
    model, inputs = seeded(Fusion).eval(), fusion_inputs()
    masks = tuple(torch.full_like(x[:1], i, dtype=torch.long) for i, x in enumerate(inputs.values()))
    theirs = ShapleyValues(model).attribute(tuple(inputs.values()), target=[1, 3], feature_mask=masks)
    expected = torch.stack([x.flatten(1)[:, 0] for x in theirs], 1)
    torch.testing.assert_close(contribution(model, inputs, [1, 3]).shapley, expected, atol=1e-6, rtol=1e-4)


def test_players_that_are_alike_have_alike_shares() -> None:
    x = torch.rand(2, 3, 16, 16)
    model = Product()
    same = dict.fromkeys("xyzw", x)
    found = contribution(model, same, 0)
    assert torch.equal(found.shapley[:, 0], found.shapley[:, 1])


def test_each_encoder_runs_on_its_input_and_its_baseline_only() -> None:
    model, inputs = seeded(Fusion).eval(), fusion_inputs(b=2)
    rows: Counter[str] = Counter()

    def counting(name: str, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            rows.update({name: len(x)})
            return forward(x)

        return run

    for name in inputs:
        encoder = getattr(model, name)
        encoder.forward = counting(name, encoder.forward)
    contribution(model, inputs, 2)
    # Two samples, the baseline that both share, and a mixed row of each for the check; all eight coalitions of both would be 16 rows.
    assert rows == dict.fromkeys(inputs, 3 + 2)
    rows.clear()
    contribution(model, inputs, 2, baseline="mean")  # each sample has its own
    assert rows == dict.fromkeys(inputs, 4 + 2)


def test_groups_are_one_player() -> None:
    model, inputs = seeded(Fusion).eval(), fusion_inputs()
    found = contribution(model, inputs, 2, players={"photo": "rgb", "rest": ["depth", "texture"]})
    assert found.players == ("photo", "rest")
    base = {name: torch.zeros_like(x) for name, x in inputs.items()}
    values = naive(model, inputs, 2, base)
    grouped = {
        frozenset(): values[frozenset()],
        frozenset(["photo"]): values[frozenset(["rgb"])],
        frozenset(["rest"]): values[frozenset(["depth", "texture"])],
        frozenset(["photo", "rest"]): values[frozenset(inputs)],
    }
    torch.testing.assert_close(found.shapley, shapley(grouped, ["photo", "rest"]), atol=1e-6, rtol=1e-5)
    listed = contribution(model, inputs, 2, players=["rgb", ["depth", "texture"]])
    assert listed.players == ("rgb", "depth+texture")
    assert torch.equal(listed.shapley, found.shapley)


def test_inputs_that_are_no_players_stay_as_they_are() -> None:
    model, inputs = seeded(Fusion).eval(), fusion_inputs()
    found = contribution(model, inputs, 2, players=["rgb", "depth"])
    base = {name: torch.zeros_like(x) for name, x in inputs.items()}
    values = naive(model, inputs, 2, base)
    held = {chosen - {"texture"}: score for chosen, score in values.items() if "texture" in chosen}
    torch.testing.assert_close(found.shapley, shapley(held, ["rgb", "depth"]), atol=1e-6, rtol=1e-5)


def test_a_shared_encoder() -> None:
    model = seeded(Siamese).eval()
    generator = torch.Generator().manual_seed(0)
    inputs = {name: torch.rand(2, 3, 16, 16, generator=generator) for name in ("before", "after")}
    base = {name: torch.zeros_like(x) for name, x in inputs.items()}
    expected = shapley(naive(model, inputs, 1, base), list(inputs))
    torch.testing.assert_close(contribution(model, inputs, 1).shapley, expected, atol=1e-6, rtol=1e-5)


def captioned(b: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(b, 3, 16, 16, generator=generator)
    return {"image": image, "ids": torch.randint(1, 50, (b, 5), generator=generator)}


def test_token_ids_with_a_padding_token() -> None:
    model, inputs = seeded(Captioned).eval(), captioned()
    found = contribution(model, inputs, 1, baseline={"ids": 0}, output="logits")
    assert found.players == ("image", "ids")
    base = {"image": torch.zeros_like(inputs["image"]), "ids": torch.zeros_like(inputs["ids"])}

    class Logits(nn.Module):
        def forward(self, image: Tensor, ids: Tensor) -> Tensor:
            return model(image, ids)["logits"]

    expected = shapley(naive(Logits(), inputs, 1, base), list(inputs))
    torch.testing.assert_close(found.shapley, expected, atol=1e-6, rtol=1e-5)


def test_an_input_that_may_be_none() -> None:
    model = seeded(Captioned).eval()
    inputs = captioned() | {"mask": torch.tensor([[1.0, 1, 1, 0, 0]]).expand(3, 5).contiguous()}
    found = contribution(
        model, inputs, 1, players=["image", "mask"], baseline={"mask": None, "image": 0.5}, output="logits"
    )
    grey = torch.full_like(inputs["image"], 0.5)

    def run(image: Tensor, mask: Tensor | None) -> Tensor:
        with torch.no_grad():
            return model(image, inputs["ids"], mask)["logits"][:, 1]

    image, mask = inputs["image"], inputs["mask"]
    values = {
        frozenset(): run(grey, None),
        frozenset(["image"]): run(image, None),
        frozenset(["mask"]): run(grey, mask),
        frozenset(["image", "mask"]): run(image, mask),
    }
    torch.testing.assert_close(found.shapley, shapley(values, ["image", "mask"]), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("held", [False, True], ids=["alone", "beside held inputs"])
def test_references_are_averaged_over(held: bool) -> None:
    model, inputs = seeded(Fusion).eval(), fusion_inputs(b=2)
    others = {
        name: torch.rand(4, *x.shape[1:], generator=torch.Generator().manual_seed(3)) for name, x in inputs.items()
    }
    players = ["rgb", "depth"] if held else list(inputs)
    found = contribution(model, inputs, 2, players=players, references=others)
    each = []
    for j in range(4):
        base = {name: x[j : j + 1].expand(2, *x.shape[1:]) for name, x in others.items()}
        values = naive(model, inputs, 2, base)
        if held:
            values = {chosen - {"texture"}: score for chosen, score in values.items() if "texture" in chosen}
        each.append(shapley(values, players))
    torch.testing.assert_close(found.shapley, torch.stack(each).mean(0), atol=1e-6, rtol=1e-5)


def test_a_top_class_is_that_of_the_unchanged_inputs() -> None:
    model, inputs = seeded(Fusion).eval(), fusion_inputs(b=3)
    with torch.no_grad():
        top = model(**inputs).argmax(1)
    found = contribution(model, inputs)
    assert torch.equal(found.shapley, contribution(model, inputs, top).shapley)
    assert torch.equal(found.scores, contribution(model, inputs, top.tolist()).scores)


def test_the_batch_size_and_other_samples_change_nothing() -> None:
    model, inputs = seeded(Fusion).eval(), fusion_inputs(b=3)
    whole = contribution(model, inputs, Probability(1))
    torch.testing.assert_close(contribution(model, inputs, Probability(1), batch_size=3).shapley, whole.shapley)
    for i in range(3):
        alone = contribution(model, {name: x[i : i + 1] for name, x in inputs.items()}, Probability(1))
        torch.testing.assert_close(alone.shapley[0], whole.shapley[i], atol=1e-6, rtol=1e-5)


class Many(nn.Module):
    """`sum_i (i + 1) x_i + 5 x_0 x_1`, of as many inputs as are given."""

    def forward(self, xs: list[Tensor]) -> Tensor:
        means = torch.stack([x.mean((1, 2, 3)) for x in xs], 1)
        return (means * torch.arange(1, len(xs) + 1)).sum(1, keepdim=True) + 5 * means[:, :1] * means[:, 1:2]


def test_many_players_are_sampled() -> None:
    xs = [torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(EXACT + 2)]
    found = contribution(Many(), Inputs(xs), 0, permutations=8)
    assert found.interactions is None
    assert found.error is not None
    means = torch.stack([x.mean((1, 2, 3)) for x in xs], 1)
    expected = means * torch.arange(1, len(xs) + 1)
    expected[:, :2] += 2.5 * means[:, :1] * means[:, 1:2]
    # An order and its reversal together give a product of two to both in equal parts: here sampling is exact.
    torch.testing.assert_close(found.shapley, expected, atol=1e-5, rtol=1e-5)
    assert found.error.max() < 1e-5
    torch.testing.assert_close(found.shapley.sum(1), found.scores - found.nothing, atol=1e-5, rtol=1e-5)
    few = contribution(Many(), Inputs(xs[:EXACT]), 0)
    assert few.error is None


class Triple(nn.Module):
    """The product of the first three inputs: orders matter, so sampled shares have an error."""

    def forward(self, xs: list[Tensor]) -> Tensor:
        means = [x.mean((1, 2, 3)) for x in xs]
        return (means[0] * means[1] * means[2] + 0 * sum(means))[:, None]


def test_the_standard_error_is_that_of_the_shares() -> None:
    xs = [torch.ones(1, 1, 2, 2) for _ in range(EXACT + 1)]
    runs = [contribution(Triple(), Inputs(xs), 0, permutations=20, seed=seed) for seed in range(30)]
    shares = torch.stack([run.shapley[0, 0] for run in runs])
    errors = torch.stack([run.error[0, 0] for run in runs if run.error is not None])
    assert (shares.mean() - 1 / 3).abs() < 3 * errors.mean() / 30**0.5
    assert 0.6 < shares.std() / errors.mean() < 1.6


def test_shares_summary_and_joining() -> None:
    inputs = images(b=6)
    whole = contribution(Product(), inputs, 0)
    parts = [contribution(Product(), {name: x[i : i + 2] for name, x in inputs.items()}, 0) for i in (0, 2, 4)]
    joined = Contribution.join(parts)
    torch.testing.assert_close(joined.shapley, whole.shapley)
    torch.testing.assert_close(joined.interactions, whole.interactions)
    torch.testing.assert_close(whole.shares.sum(1), torch.ones(6))
    against = replace(whole, shapley=whole.shapley * torch.tensor([1.0, -1.0, 1.0, 1.0]))
    torch.testing.assert_close(against.shares, whole.shares * torch.tensor([1.0, -1.0, 1.0, 1.0]))
    torch.testing.assert_close(against.summary().share, against.shares.mean(0))
    assert f"y       {against.shares[:, 1].mean():.0%}" in repr(against)
    summary = whole.summary(confidence=0.9)
    torch.testing.assert_close(summary.mean, whole.shapley.mean(0))
    torch.testing.assert_close(summary.spread, whole.shapley.std(0))
    assert (summary.low <= summary.mean).all()
    assert (summary.mean <= summary.high).all()
    error = whole.shapley[:, 2].std(correction=0) / 6**0.5
    assert 0.5 < (summary.high - summary.low)[2] / (2 * 1.645 * error) < 1.5
    assert repr(whole).splitlines()[0].split() == ["player", "share", "mean", "spread", "interval"]
    assert repr(whole).endswith("6 samples")
    assert repr(parts[0]).endswith("2 samples")


def test_a_fusion_that_looks_at_the_batch_runs_each_row_alone_with_a_warning() -> None:
    class Ranked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 2, 3), nn.Conv2d(1, 2, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            mixed = self.a(x).mean((2, 3)) * self.b(y).mean((2, 3))
            return mixed - mixed.mean(0)

    inputs = {name: torch.rand(4, 1, 8, 8) for name in "xy"}
    each = [contribution(seeded(Ranked), {k: x[i : i + 1] for k, x in inputs.items()}, 0).shapley for i in range(4)]
    with pytest.warns(UserWarning, match="sample . has the score .* alone and .* in its batch"):
        found = contribution(seeded(Ranked), inputs, 0)
    torch.testing.assert_close(found.shapley, torch.cat(each))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"players": "rgb"}, "players are names of inputs"),
        ({"players": ["rgb", "dept"]}, "no input 'dept'; did you mean 'depth'"),
        ({"players": ["rgb", ["rgb", "depth"]]}, "input 'rgb' belongs to one player, once"),
        ({"players": []}, "there is no input to be a player"),
        ({"baseline": 0.5, "references": {}}, "a baseline, or references"),
        ({"players": [["rgb", "depth"]], "baseline": {"rgb": None}}, "become None together"),
        ({"batch_size": 0}, "batch_size must be a whole number"),
        ({"target": lambda output: output[:, 0] * torch.tensor([1.0, 2.0])}, "treats each sample differently"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:20],
)  # fmt: skip
def test_bad_input(options: dict[str, Any], message: str) -> None:
    options = {"target": 0} | options
    with pytest.raises(MulticamError, match=message):
        contribution(seeded(Fusion), fusion_inputs(), **options)


def test_token_ids_need_a_baseline() -> None:
    with pytest.raises(MulticamError, match="say what stands for nothing in it"):
        contribution(seeded(Captioned), captioned(), 0, players=["image", "ids"], output="logits")


def test_references_stand_for_nothing_in_token_ids() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 4), nn.Bilinear(4, 3, 2)

        def forward(self, ids: Tensor, x: Tensor) -> Tensor:
            return self.head(self.embed(ids).mean(1), x)

    torch.manual_seed(0)
    model, inputs = Words().eval(), {"ids": torch.tensor([[1, 5]]), "x": torch.rand(1, 3)}
    others = {"ids": torch.tensor([[2, 2], [8, 3]]), "x": torch.rand(2, 3)}
    found = contribution(model, inputs, 0, players=["ids", "x"], references=others)
    both = model(**inputs)[0, 0]
    nothing, ids, x = (
        model(*(torch.cat([t[name].expand(2, -1)]) for t, name in zip(some, inputs, strict=True)))[:, 0].mean()
        for some in ((others, others), (inputs, others), (others, inputs))
    )
    expected = torch.stack([ids - nothing + both - x, x - nothing + both - ids])[None] / 2
    torch.testing.assert_close(found.shapley, expected.detach())


def test_mixing_is_a_full_pass_of_mixed_rows() -> None:
    model, inputs = seeded(Fusion).eval(), fusion_inputs(b=3)
    call, parts = Inputs(**inputs).bind(model), [["rgb"], ["depth", "texture"]]
    singly = Singly(model, call, parts, lambda out, rows: out[:, 1], 2)
    mixing = Mixing(model, call, parts, lambda out, rows: out[:, 1], 2, singly)
    sources, rows = [[0, 1, 2, 2, 0], [2, 2, 1, 0, 0]], [0, 0, 1, 1, 2]
    found = mixing(sources, rows)
    with torch.no_grad():
        expected = model(inputs["rgb"][sources[0]], inputs["depth"][sources[1]], inputs["texture"][sources[1]])[:, 1]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert mixing.used == [True, True]


def as_shapiq_sees_it(values: dict[frozenset[str], Tensor], players: list[str], sample: int) -> Any:
    """The scores of one sample by coalition, as a game for shapiq."""

    def value(coalitions: Any) -> Any:
        rows = [frozenset(name for name, there in zip(players, row, strict=True) if there) for row in coalitions]
        return np.array([float(values[row][sample]) for row in rows])

    return value


@pytest.mark.parametrize("kind", ["fusion", "five"])
def test_shapiq_agrees_where_all_coalitions_are_tried(kind: str) -> None:
    shapiq = pytest.importorskip("shapiq")
    if kind == "fusion":
        model, inputs = seeded(Fusion), fusion_inputs(size=16)
    else:
        model, inputs = Tangled(), images("vwxyz", b=2)
    players = list(inputs)
    found = contribution(model, inputs, 0)
    assert found.interactions is not None
    values = naive(model, inputs, 0, {name: torch.zeros_like(x) for name, x in inputs.items()})
    for sample in range(2):
        exact = shapiq.ExactComputer(as_shapiq_sees_it(values, players, sample), n_players=len(players))
        shares = torch.from_numpy(exact("SV", order=1).get_n_order_values(1)).float()
        pairs = torch.from_numpy(exact("SII", order=2).get_n_order_values(2)).float()
        torch.testing.assert_close(found.shapley[sample], shares, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.interactions[sample], pairs, atol=1e-5, rtol=1e-4)


class Tangled(nn.Module):
    """Products of two, three and all five, and a maximum."""

    def forward(self, v: Tensor, w: Tensor, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        v, w, x, y, z = (each.mean((1, 2, 3)) for each in (v, w, x, y, z))
        return (v * w - x * y * z + v * w * x * y * z + torch.maximum(w, 2 * z))[:, None]


def many(n: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """Inputs of `Many`, their shares, and the interaction of the first two."""
    xs = [torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(n)]
    means = torch.stack([x.mean((1, 2, 3)) for x in xs], 1)
    both = 5 * means[:, 0] * means[:, 1]
    expected = means * torch.arange(1, n + 1)
    expected[:, :2] += both[:, None] / 2
    return xs, expected, both


@pytest.mark.parametrize("n", [13, 16])
def test_a_budget_of_coalitions(n: int) -> None:
    pytest.importorskip("shapiq")
    xs, expected, both = many(n)
    found = contribution(Many(), Inputs(xs), 0, budget=600)
    assert found.error is None
    assert found.interactions is not None
    torch.testing.assert_close(found.shapley, expected, atol=0.15, rtol=0.05)
    torch.testing.assert_close(found.shapley.sum(1), found.scores - found.nothing, atol=1e-4, rtol=0)
    pairs = torch.zeros(2, n, n)
    pairs[:, 0, 1] = pairs[:, 1, 0] = both
    torch.testing.assert_close(found.interactions, pairs, atol=0.2, rtol=0)
    torch.testing.assert_close(found.interactions, found.interactions.mT)
    assert not found.interactions.diagonal(dim1=1, dim2=2).any()
    linear = torch.stack([x.mean((1, 2, 3)) for x in xs], 1) * torch.arange(1, n + 1)
    torch.testing.assert_close(found.single, linear, atol=1e-4, rtol=1e-4)
    linear[:, :2] += both[:, None]
    torch.testing.assert_close(found.without, linear, atol=1e-4, rtol=1e-4)


def test_a_budget_that_is_enough_for_every_coalition_is_exact() -> None:
    pytest.importorskip("shapiq")
    xs, expected, both = many(13)
    found = contribution(Many(), Inputs([x[:1] for x in xs]), 0, budget=2**13, batch_size=1024)
    assert found.interactions is not None
    torch.testing.assert_close(found.shapley, expected[:1], atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(found.interactions[:, 0, 1], both[:1], atol=1e-3, rtol=1e-3)


class Unread(nn.Module):
    """`Many`, of all inputs but the first and the last two."""

    def forward(self, xs: list[Tensor]) -> Tensor:
        return Many()(xs[1:-2])


@pytest.mark.parametrize("options", [{"budget": 300}, {"permutations": 2}], ids=str)
def test_sampled_players_that_are_not_read_have_exactly_nothing(options: dict[str, Any]) -> None:
    if "budget" in options:
        pytest.importorskip("shapiq")
    xs, expected, _ = many(13)
    blank = [torch.rand(2, 1, 4, 4) for _ in range(3)]
    found = contribution(Unread(), Inputs([blank[0], *xs, *blank[1:]]), 0, **options)
    for values in (found.shapley, found.single, found.without):
        assert torch.equal(values[:, [0, -2, -1]], torch.zeros(2, 3))
    torch.testing.assert_close(found.shapley[:, 1:-2], expected, atol=0.3, rtol=0.1)
    if found.interactions is not None:
        assert not found.interactions[:, [0, -2, -1]].any()
        assert not found.interactions[:, :, [0, -2, -1]].any()
    # Fewer that matter than are sampled: every coalition of these.
    few = contribution(Unread(), Inputs([blank[0], *xs[:5], *[blank[1]] * 8]), 0, **options)
    assert few.error is None
    assert few.interactions is not None


def test_a_budget_is_drawn_by_its_seed_and_leaves_the_random_states() -> None:
    pytest.importorskip("shapiq")
    xs, _, _ = many(13)
    mine, theirs = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    found = [contribution(Many(), Inputs(xs), 0, budget=150, seed=seed).shapley for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert torch.equal(torch.get_rng_state(), mine)
    assert np.array_equal(np.random.get_state()[1], theirs)  # noqa: NPY002
    alone = contribution(Many(), Inputs([x[1:] for x in xs]), 0, budget=150).shapley
    torch.testing.assert_close(alone[0], found[0][1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("budget", [0, 1, 91])
def test_too_small_a_budget_is_refused(budget: int) -> None:
    pytest.importorskip("shapiq")
    xs, _, _ = many(13)
    message = "whole number of at least 1" if not budget else "13 players have 92 shares and interactions"
    with pytest.raises(MulticamError, match=message):
        contribution(Many(), Inputs(xs), 0, budget=budget)


def test_a_budget_without_shapiq(monkeypatch: pytest.MonkeyPatch) -> None:
    xs, _, _ = many(13)
    monkeypatch.setitem(sys.modules, "shapiq", None)
    with pytest.raises(
        MulticamError, match=r'a budget of coalitions needs shapiq: pip install "multicam-torch\[shapiq\]"'
    ):
        contribution(Many(), Inputs(xs), 0, budget=200)
    assert contribution(Many(), Inputs(xs[:3]), 0, budget=200).error is None  # all coalitions of three need none


@pytest.mark.parametrize(
    "options",
    [{"baseline": 0.0}, {"baseline": "mean"}, {"players": ["rgb", "depth"]}, {"references": 3}, {"baseline": {"rgb": None}}],
    ids=str,
)  # fmt: skip
def test_a_game_of_some_samples_is_a_part_of_that_of_all(options: dict[str, Any]) -> None:
    class Lacking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fusion = seeded(Fusion)

        def forward(self, rgb: Tensor | None, depth: Tensor, texture: Tensor) -> Tensor:
            return self.fusion(torch.ones(len(depth), 3, 16, 16) if rgb is None else rgb, depth, texture)

    inputs = fusion_inputs(b=3, size=16)
    if "references" in options:
        generator = torch.Generator().manual_seed(0)
        options = {"references": {name: torch.rand(3, *x.shape[1:], generator=generator) for name, x in inputs.items()}}
    game = Game(Lacking().eval(), inputs, target=[0, 1, 2], batch_size=4, **options)
    k = len(game.players)
    coalitions = torch.tensor(list(product([False, True], repeat=k)))
    whole = game(coalitions)
    for samples in ([1], [2, 0], [0, 1, 2]):
        torch.testing.assert_close(game(coalitions, samples), whole[samples], atol=1e-6, rtol=1e-4)


class Beside(nn.Module):
    """A fusion without modules, whose scores depend on the rest of the batch, or on the place in it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        scores = (x * y).mean((2, 3))
        return scores - scores.mean(0) if self.how == "batch" else scores * torch.arange(1.0, 1 + len(x))[:, None]


@pytest.mark.parametrize("how", ["batch", "place"])
def test_a_model_without_modules_that_looks_at_the_batch_is_told_of(how: str) -> None:
    inputs = {name: torch.rand(3, 2, 4, 4) for name in "xy"}
    each = [contribution(Beside(how), {k: x[i : i + 1] for k, x in inputs.items()}, 0).shapley for i in range(3)]
    with pytest.warns(UserWarning, match="sample . has the score .* alone and .* in its batch"):
        found = contribution(Beside(how), inputs, 0)
    torch.testing.assert_close(found.shapley, torch.cat(each))


def test_targets_of_each_sample_are_those_of_the_samples_alone() -> None:
    model, inputs = nn.Conv2d(6, 3, 1, bias=False), {name: torch.rand(2, 3, 4, 4) for name in "xy"}

    class Segments(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return model(torch.cat([x, y], 1))

    torch.nn.init.constant_(model.weight[:2], -1.0)
    torch.nn.init.constant_(model.weight[2:], 1.0)  # class 2 everywhere, and nowhere in the baseline
    found = contribution(Segments(), inputs, SegmentationScore([2, 2]))
    torch.testing.assert_close(found.shapley, torch.stack([x.sum(1).mean((1, 2)) for x in inputs.values()], 1))


def test_double_precision() -> None:
    inputs = {name: x.double() for name, x in images().items()}
    found, single = contribution(Product(), inputs, 0), contribution(Product(), images(), 0)
    torch.testing.assert_close(found.shapley, single.shapley)


class Ignoring(nn.Module):
    """Reads the photo and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)

    def forward(self, rgb: Tensor, depth: Tensor | None, table: Tensor | None) -> Tensor:
        return self.conv(rgb).mean((2, 3))


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("players", [["depth"], ["depth", "table"], [["depth", "table"]], {"sensor": "depth"}], ids=str)
@pytest.mark.parametrize("how", ["zeros", "mean", "None", "references"])
def test_players_that_the_score_ignores_have_shares_of_zero(batch: int, players: Any, how: str) -> None:
    model = seeded(Ignoring)
    g = torch.Generator().manual_seed(0)
    inputs = {
        "rgb": torch.rand(batch, 3, 8, 8, generator=g),
        "depth": torch.rand(batch, 1, 8, 8, generator=g),
        "table": torch.rand(batch, 4, generator=g),
    }
    named = {"depth", "table"} & {*re.findall(r"\w+", str(players))}
    options: dict[str, Any] = {
        "zeros": {},
        "mean": {"baseline": {"depth": "mean"}},
        "None": {"baseline": dict.fromkeys(named)},
        "references": {"references": {name: torch.cat([x, x]) for name, x in inputs.items()}},
    }[how]
    found = contribution(model, inputs, 2, players=players, **options)
    scores = model(**inputs)[:, 2].detach()
    torch.testing.assert_close(found.scores, scores)
    torch.testing.assert_close(found.nothing, scores)
    for zeros in (found.shapley, found.single, found.without, found.shares, found.interactions):
        assert not zeros.any()
    assert found.shapley.shape == (batch, len(players))
    if how != "None":
        regions = region_contribution(model, inputs, 2, regions=dict.fromkeys(named, 2), **options)
        assert not regions.contribution.shapley.any()
        assert regions.maps.keys() == named


@pytest.mark.filterwarnings("ignore:sample . has the score:UserWarning")
@pytest.mark.parametrize("batch_size", [1, 32])
def test_the_top_class_is_that_of_the_call_as_it_is(batch_size: int) -> None:
    class Relative(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            both = x + y
            return both - 0.9 * both.mean(0)

    # Alone, the first sample has class 0 at the top, and beside the second class 1.
    model, x, y = Relative().eval(), torch.tensor([[2.0, 1.0], [8.0, 1.0]]), torch.ones(2, 2)
    assert model(x, y).argmax(1).tolist() == [1, 0] and int(model(x[:1], y[:1]).argmax()) == 0
    found = contribution(model, {"x": x, "y": y}, players=["x", "y"], batch_size=batch_size)
    torch.testing.assert_close(found.scores, torch.tensor([0.1 * 2, 0.1 * 9]))
