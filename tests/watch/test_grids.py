"""Grids that are proved, and the refusal of those that are not."""

import pytest
import torch
from torch import Tensor, nn

from multicam import HiResCAM, Layer, MulticamError, Trace, tokens
from multicam.watch.grids import Evidence, Scope, find_reshape
from tests.helpers.models import seeded


def scope(
    channels: tuple[int, ...] = (),
    features: tuple[int, ...] = (),
    grids: tuple[tuple[int, ...], ...] = (),
    extras: tuple[int, ...] = (0,),
    queries: tuple[int, ...] = (),
) -> Scope:
    return Scope(frozenset(channels), frozenset(features), frozenset(grids), frozenset(extras), frozenset(queries))


def evidence(*scopes: Scope, turned: bool | None = False) -> Evidence:
    return Evidence("net", 2, turned, scopes)


CNN = scope(channels=(16,))


def transformer(*grids: tuple[int, ...], extras: tuple[int, ...] = (0,), queries: tuple[int, ...] = ()) -> Scope:
    return scope(features=(16, 64), grids=grids, extras=extras, queries=queries)


@pytest.mark.parametrize(
    ("shape", "known", "grid"),
    [
        ((2, 16, 7, 9), evidence(CNN), (16, 7, 9)),
        ((2, 16, 7, 9), evidence(scope(grids=((14, 17),))), (16, 7, 9)),
        ((2, 16, 16, 16), evidence(CNN), (16, 16, 16)),
        ((2, 16, 3, 7, 9), evidence(CNN), (16, 3, 7, 9)),
        ((2, 7, 9, 16), evidence(transformer((7, 9))), (16, 7, 9)),
        ((2, 7, 9, 16), evidence(transformer((14, 17))), (16, 7, 9)),
        ((2, 7, 9, 16), evidence(scope(), transformer((28, 36))), (16, 7, 9)),
        ((2, 64, 64, 16), evidence(scope(), transformer((64, 64)), CNN), (16, 64, 64)),
        ((2, 3, 7, 9, 16), evidence(transformer((3, 7, 9))), (16, 3, 7, 9)),
        ((2, 16, 100), evidence(scope(channels=(16,), grids=((100,),))), (16, 100)),
        ((2, 63, 16), evidence(transformer((7, 9))), (16, 7, 9)),
        ((2, 64, 32), evidence(scope(channels=(64,), grids=((8, 8),))), (32, 8, 8)),
        ((2, 64, 16), evidence(transformer((7, 9), extras=(0, 1))), (16, 7, 9)),
        ((63, 2, 16), evidence(transformer((7, 9))), (16, 7, 9)),
        ((2, 2, 16), evidence(transformer((2,)), turned=True), (16, 2)),
        ((2, 24, 16), evidence(transformer((2, 3, 4))), (16, 2, 3, 4)),
    ],
)
def test_a_grid_is_found_where_it_is_proved(shape: tuple[int, ...], known: Evidence, grid: tuple[int, ...]) -> None:
    x = torch.rand(shape)
    assert find_reshape(x, known)(x).shape == (2, *grid)


@pytest.mark.parametrize(
    ("shape", "known", "message"),
    [
        ((2, 16), evidence(CNN), r"returns \(2, 16\): it has no spatial axes left"),
        (
            (2, 64, 16),
            evidence(transformer()),
            r"64 tokens whose grid nothing proves \(grids seen in the model: none\).*tokens\(",
        ),
        ((2, 64, 16), evidence(transformer((7, 9))), r"grids seen in the model: 7 x 9"),
        ((2, 64, 16), evidence(transformer((8, 8), (4, 16))), r"64 tokens, which fit 4 x 16, 8 x 8"),
        ((2, 64, 16), evidence(transformer((8, 8), (7, 9), extras=(0, 1))), r"which fit 7 x 9 \+ 1, 8 x 8"),
        ((2, 64, 16), evidence(transformer((8, 8), queries=(64,))), "may be the model's 64 learned queries"),
        ((64, 2, 16), evidence(transformer()), "sequence_first=True"),
        (
            (2, 1, 12, 16),
            evidence(transformer((8, 8))),
            r"nothing proves that \(1, 12\) is a grid.*8 x 8.*channels_last",
        ),
        (
            (2, 3, 17, 64),
            evidence(scope(grids=((4, 4),))),
            "nothing tells whether its channels are the second axis or the last",
        ),
        ((2, 32, 32, 32), evidence(scope(grids=((32, 32),))), "nothing tells whether its channels"),
        (
            (2, 2, 16),
            evidence(transformer((2,)), turned=None),
            "nothing tells which of the first two axes is the batch",
        ),
        ((4, 16, 8, 8), evidence(CNN), r"returns \(4, 16, 8, 8\) for 2 samples.*stacked\(index, of=count\)"),
        ((32, 49, 16), evidence(transformer()), "folds something into the batch axis"),
    ],
)
def test_nothing_is_guessed(shape: tuple[int, ...], known: Evidence, message: str) -> None:
    with pytest.raises(MulticamError, match=message):
        find_reshape(torch.rand(shape), known)


def test_the_nearest_module_with_a_fitting_grid_decides() -> None:
    known = evidence(transformer((4, 16)), transformer((4, 16), (8, 8)))
    x = torch.rand(2, 64, 16)
    assert find_reshape(x, known)(x).shape == (2, 16, 4, 16)


class VisionTransformer(nn.Module):
    def __init__(self, registers: int = 0) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 8, 4, 4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 8))
        self.reg_token = nn.Parameter(torch.randn(1, registers, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens_ = self.patch_embed(x).flatten(2).mT
        front = torch.cat([self.cls_token, self.reg_token], 1).expand(len(x), -1, -1)
        return self.head(self.block(torch.cat([front, tokens_], 1)).mean(1))


@pytest.mark.parametrize("registers", [0, 4])
def test_the_patch_embedding_and_the_class_tokens_prove_the_grid(registers: int) -> None:
    model = VisionTransformer(registers).eval()
    x = torch.rand(2, 3, 16, 24)
    trace = Trace(model, x, {"block": "block"}, 1)
    expected = Trace(model, x, {"block": Layer("block", reshape=tokens(4, 6, prefix=1 + registers))}, 1)
    assert torch.equal(trace.sites["block"].acts, expected.sites["block"].acts)
    assert trace.sites["block"].acts.shape == (2, 8, 4, 6)


def test_two_branches_with_different_grids_are_told_apart() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = VisionTransformer(), VisionTransformer(2)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.left(left) + self.right(right)

    # 4 x 4 + 1 and 2 x 7 + 3 are both 17 tokens: only the branch itself can tell.
    inputs = {"left": torch.rand(1, 3, 16, 16), "right": torch.rand(1, 3, 8, 28)}
    maps = Trace(Two().eval(), inputs, {"l": "left.block", "r": "right.block"}, 1).sites
    assert maps["l"].acts.shape == (1, 8, 4, 4)
    assert maps["r"].acts.shape == (1, 8, 2, 7)


def test_words_do_not_get_the_grid_of_the_photo() -> None:
    """64 words beside a photo with an 8 x 8 grid."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image, self.embed = nn.Conv2d(3, 16, 8, 8), nn.Embedding(50, 32)
            self.text = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
            self.head = nn.Linear(48, 2)

        def forward(self, image: Tensor, ids: Tensor) -> Tensor:
            seen = self.image(image).relu().mean((2, 3))
            return self.head(torch.cat([seen, self.text(self.embed(ids)).mean(1)], 1))

    inputs = {"image": torch.rand(2, 3, 64, 64), "ids": torch.randint(0, 50, (2, 64))}
    with pytest.raises(MulticamError, match="layer 'text' does not see input 'image'"):
        HiResCAM(seeded(Both), "text")(inputs, 1, signed=True)


@pytest.mark.parametrize("batch_first", [True, False])
def test_recurrent_layers_say_which_axis_is_the_batch(batch_first: bool) -> None:
    """With as many samples as tokens, nothing but the layer itself can tell."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.rnn = nn.Conv2d(3, 8, 4, 4), nn.GRU(8, 6, batch_first=batch_first)
            self.head = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            order = (0, 2, 1) if batch_first else (2, 0, 1)
            return self.head(self.rnn(self.conv(x).flatten(2).permute(order))[0].mean(1 if batch_first else 0))

    model, x = seeded(Recurrent), torch.rand(16, 3, 16, 16)
    cam = HiResCAM(model, Layer("rnn", pick=0))
    assert torch.allclose(cam(x, 1, signed=True)[3:5], cam(x[3:5], 1, signed=True), atol=1e-6)


def test_a_class_token_counts_once_for_all_that_is_around_it() -> None:
    class Embedded(nn.Module):
        """A class token from a table, and another token that no name tells."""

        def __init__(self) -> None:
            super().__init__()
            self.patches, self.cls_token = nn.Conv2d(3, 8, 4, 4), nn.Embedding(1, 8)
            self.extra, self.block = nn.Parameter(torch.rand(1, 1, 8)), nn.LayerNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            front = torch.cat([self.cls_token.weight[None], self.extra], 1).expand(len(x), -1, -1)
            return self.block(torch.cat([front, self.patches(x).flatten(2).mT], 1)).mean(1)

    with pytest.raises(MulticamError, match=r"18 tokens whose grid nothing proves \(grids seen in the model: 4 x 4\)"):
        Trace(seeded(Embedded), torch.rand(2, 3, 16, 16), {"block": "block"}, 1)
