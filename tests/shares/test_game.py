"""The score with some of the inputs: by full passes, coalition by coalition, and the exact shares that follow from it."""

from collections.abc import Callable
from itertools import permutations, product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from multicam import MulticamError
from multicam.shares.game import Game
from multicam.shares.shapley import contribution
from tests.helpers.counting import counted
from tests.helpers.models import Captioned, Fusion, fusion_inputs, seeded

CLASS = 2
EVERY = torch.tensor(list(product([True, False], repeat=3)))


def by_full_passes(
    model: nn.Module, inputs: dict[str, Tensor], parts: list[list[str]], nothing: dict[str, Any]
) -> Tensor:
    """The scores `(b n)` of all coalitions of three players, in the order of `EVERY`."""
    found = []
    for row in EVERY.tolist():
        absent = {name for names, there in zip(parts, row, strict=True) if not there for name in names}
        with torch.no_grad():
            output = model(**{name: nothing[name] if name in absent else x for name, x in inputs.items()})
        found.append((output["logits"] if isinstance(output, dict) else output)[:, CLASS])
    return torch.stack(found, 1)


def shapley(scores: Tensor) -> Tensor:
    """The mean over all orders in which three players come of what each brings `(b 3)`, from the scores of `EVERY`."""
    value = {tuple(row): scores[:, n] for n, row in enumerate(EVERY.tolist())}
    shares = torch.zeros(len(scores), 3)
    for order in permutations(range(3)):
        there = [False] * 3
        for player in order:
            before = value[tuple(there)]
            there[player] = True
            shares[:, player] += (value[tuple(there)] - before) / 6
    return shares


BASELINES: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
    "a number": (0.3, lambda x: torch.full_like(x, 0.3)),
    "mean": ("mean", lambda x: x.mean((2, 3), keepdim=True).expand_as(x)),
    "a tensor": ({"depth": 1.0}, torch.zeros_like),
}


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("batch_size", [3, 32])
def test_every_coalition_is_a_full_pass_with_baselines(name: str, batch_size: int) -> None:
    model, inputs = seeded(Fusion), fusion_inputs(3)
    baseline, make = BASELINES[name]
    nothing = {key: make(x) for key, x in inputs.items()}
    if name == "a tensor":
        nothing["depth"] = torch.ones_like(inputs["depth"])
    expected = by_full_passes(model, inputs, [[key] for key in inputs], nothing)
    game = Game(model, inputs, None, CLASS, baseline=baseline, batch_size=batch_size)
    torch.testing.assert_close(game(EVERY), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(game(EVERY[[5, 0]], [2, 0]), expected[[2, 0]][:, [5, 0]], rtol=1e-4, atol=1e-5)
    found = contribution(model, inputs, CLASS, baseline=baseline)
    torch.testing.assert_close(found.shapley, shapley(expected), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found.shapley.sum(1), expected[:, 0] - expected[:, -1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 32])
def test_shared_references_are_scored_for_the_class_of_each_sample(batch_size: int) -> None:
    torch.manual_seed(0)
    model = nn.Bilinear(2, 2, 3).double()
    x, y, others = (torch.rand(n, 2, dtype=torch.float64) for n in (3, 3, 4))
    references = {"input1": others, "input2": others.flip(0)}
    game = Game(
        model, {"input1": x, "input2": y}, ["input1", "input2"], [0, 2, 1], references=references, batch_size=batch_size
    )
    nothing = game(torch.tensor([[False, False]]))[:, 0]
    torch.testing.assert_close(nothing, model(**references).mean(0)[[0, 2, 1]].detach())


@pytest.mark.parametrize("held", [False, True], ids=["alone", "beside held inputs"])
def test_references_are_averaged_over_for_players_together(held: bool) -> None:
    model, inputs = seeded(Fusion), fusion_inputs(2)
    references = {name: torch.rand(4, *x.shape[1:]) for name, x in inputs.items()}
    each = [
        by_full_passes(model, inputs, [[k] for k in inputs], {k: x[i : i + 1].expand(2, *x.shape[1:]) for k, x in references.items()})
        for i in range(4)
    ]  # fmt: skip
    players = ["rgb", "depth"] if held else [*inputs]
    tried = EVERY[:, 2] | (not held)
    game = Game(model, inputs, players, CLASS, references=references)
    expected = torch.stack(each).mean(0)[:, tried]
    torch.testing.assert_close(game(EVERY[tried][:, : len(players)]), expected, rtol=1e-4, atol=1e-5)
    assert all(len(x) == (2 if held else 1) for x in game.references.values())


def test_inputs_that_may_be_none_and_whole_numbers_with_a_padding_token() -> None:
    model = seeded(Captioned)
    g = torch.Generator().manual_seed(0)
    inputs = {
        "image": torch.rand(3, 3, 16, 16, generator=g),
        "ids": torch.randint(1, 50, (3, 5), generator=g),
        "mask": torch.rand(3, 5, generator=g) + 0.1,
    }
    nothing = {"image": torch.zeros(3, 3, 16, 16), "ids": torch.zeros(3, 5, dtype=torch.int64), "mask": None}
    expected = by_full_passes(model, inputs, [["image"], ["ids"], ["mask"]], nothing)
    players = ["image", "ids", "mask"]
    game = Game(model, inputs, players, CLASS, output="logits", baseline={"ids": 0, "mask": None})
    torch.testing.assert_close(game(EVERY), expected, rtol=1e-4, atol=1e-5)
    assert game.used == [True, True, True]


def test_a_group_is_one_player_and_all_else_stays() -> None:
    model, inputs = seeded(Fusion), fusion_inputs(2)
    nothing = {name: torch.zeros_like(x) for name, x in inputs.items()}
    expected = by_full_passes(model, inputs, [["rgb", "depth"], [], []], nothing)
    game = Game(model, inputs, {"camera": ["rgb", "depth"]}, CLASS)
    assert game.players == {"camera": ["rgb", "depth"]}
    torch.testing.assert_close(game(torch.tensor([[True], [False]])), expected[:, [0, 4]], rtol=1e-4, atol=1e-5)
    assert list(Game(model, inputs, [["rgb", "depth"], "texture"], CLASS).players) == ["rgb+depth", "texture"]


def test_each_sample_has_its_own_class_that_of_the_unchanged_inputs() -> None:
    model, inputs = seeded(Fusion), {name: 10 * x for name, x in fusion_inputs(6).items()}
    with torch.no_grad():
        whole, empty = model(**inputs), model(**{name: torch.zeros_like(x) for name, x in inputs.items()})
    for target in (None, [4, 0, 1, 3, 2, 2]):
        classes = whole.argmax(1).tolist() if target is None else target
        found = Game(model, inputs, None, target)(torch.tensor([[True] * 3, [False] * 3]))
        expected = torch.stack([whole[range(6), classes], empty[range(6), classes]], 1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_as_many_heads_as_samples_and_what_replaces_them_are_no_list_of_samples() -> None:

    class Heads(Fusion):
        def forward(self, rgb: Tensor, depth: Tensor, texture: Tensor) -> Any:
            scores = super().forward(rgb, depth, texture)
            return [scores, -scores, scores + 1]

    inputs = fusion_inputs(2)
    expected = contribution(seeded(Fusion), inputs, None)
    for output in (-1, 2, lambda heads: heads[-1]):
        found = contribution(seeded(Heads), inputs, None, output=output)
        torch.testing.assert_close(found.shapley, expected.shapley, rtol=1e-4, atol=1e-6)


def test_a_player_that_the_score_ignores_is_found_out_and_encoders_run_once() -> None:
    class Deaf(Fusion):
        def forward(self, rgb: Tensor, depth: Tensor, texture: Tensor) -> Tensor:
            return self.head(self.rgb(rgb).mean((2, 3)) + self.texture(texture).mean((2, 3))) + depth.shape[1]

    model, inputs = seeded(Deaf), fusion_inputs(3)
    game = Game(model, inputs, None, CLASS)
    assert game.used == [True, False, True]
    game(EVERY[:1])  # pays for the proof
    with counted(model) as runs:
        game(EVERY)
    assert set(runs) == {"", "head"}


@pytest.mark.parametrize(
    ("players", "options", "message"),
    [
        (["rbg"], {}, "no input .rbg.; did you mean .rgb."),
        ([["rgb", "depth"], "rgb"], {}, "input 'rgb' belongs to one player, once"),
        ({"a": "rgb", "b": "rgb"}, {}, "input 'rgb' belongs to one player, once"),
        ({"a": ["rgb", "rgb"]}, {}, "input 'rgb' belongs to one player, once"),
        (["rgb", "depth", "rgb"], {}, "two players are called 'rgb'"),
        ([["rgb", "depth"], ["rgb", "depth"]], {}, r"two players are called 'rgb\+depth'"),
        ([["rgb"], "rgb"], {}, "two players are called 'rgb'"),
        ([[]], {}, "there is no input to be a player"),
        ("rgb", {}, "players are names of inputs, or groups of such"),
        ([], {}, "there is no input to be a player"),
        (["rgb"], {"baseline": {"depth": 0.0}}, "no player's input 'depth'"),
        ([["rgb", "depth"]], {"baseline": {"rgb": None}}, "become None together or not at all.*baseline of 'rgb'"),
        (["rgb"], {"baseline": 1.0, "references": fusion_inputs()}, "give a baseline, or references"),
    ],
)
def test_what_is_no_game_is_refused(players: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(MulticamError, match=message):
        Game(seeded(Fusion), fusion_inputs(), players, CLASS, **options)
