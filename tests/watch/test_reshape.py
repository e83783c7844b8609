"""Layer outputs as grids: exact, and never a guessed square."""

from collections.abc import Callable

import pytest
import torch
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from multicam import MulticamError, as_it_is, channels_last, stacked, tokens
from multicam.watch.grids import Evidence, Scope, find_reshape
from multicam.watch.reshape import positions

SIDES = st.integers(1, 6)


@given(SIDES, SIDES, st.integers(0, 3), st.integers(0, 3))
def test_tokens_cut_class_tokens_and_keep_rows_and_columns(h: int, w: int, prefix: int, suffix: int) -> None:
    x = torch.rand(2, prefix + h * w + suffix, 5)
    grid = rearrange(x[:, prefix : prefix + h * w], "b (h w) c -> b c h w", h=h)
    assert torch.equal(tokens(h, w, prefix=prefix, suffix=suffix)(x), grid)
    assert torch.equal(tokens(h, w, part=slice(prefix, prefix + h * w))(x), grid)
    assert torch.equal(tokens(h, w, prefix=prefix, suffix=suffix, sequence_first=True)(x.transpose(0, 1)), grid)


def test_tokens_of_clips_signals_and_parts_from_the_end() -> None:
    x = torch.rand(2, 24, 5)
    assert torch.equal(tokens(2, 3, 4)(x), rearrange(x, "b (d h w) c -> b c d h w", d=2, h=3))
    assert torch.equal(tokens(24)(x), x.mT)
    assert torch.equal(tokens(2, 4, part=slice(-8, None))(x), rearrange(x[:, 16:], "b (h w) c -> b c h w", h=2))


def test_other_kinds() -> None:
    x = torch.rand(6, 3, 4, 5)
    assert torch.equal(channels_last(x), rearrange(x, "b h w c -> b c h w"))
    assert torch.equal(stacked(1, of=2)(x), x[3:])
    assert torch.equal(stacked(1, of=3, inner=True)(x), x[[1, 4]])
    assert torch.equal(stacked(0, of=2, then=channels_last)(x), channels_last(x[:3]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: tokens(14, 14)(torch.rand(1, 197, 8)),
            r"14 x 14 = 196 tokens, but of the layer's 197 tokens 197 are left",
        ),
        (lambda: tokens(14, 14, prefix=1)(torch.rand(1, 201, 8)), "201 tokens 200 are left"),
        (lambda: tokens(14, 14)(torch.rand(1, 8, 14, 14)), r"takes tokens \(b n c\)"),
        (lambda: tokens(), r"a token grid is positive.*given is \(\)"),
        (lambda: tokens(14, 0), r"given is \(14, 0\)"),
        (lambda: tokens(14, prefix=1, part=slice(3)), "either part=, or prefix="),
        (lambda: stacked(2, of=2), "between 0 and 1"),
        (lambda: stacked(0, of=2)(torch.rand(3, 1, 1, 1)), "a batch axis of 3 cannot hold 2"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(call: Callable[[], object], message: str) -> None:
    with pytest.raises(MulticamError, match=message):
        call()


@pytest.mark.parametrize(
    ("reshape", "shape"),
    [
        (tokens(2, 3, prefix=1, suffix=2), (2, 9, 4)),
        (tokens(2, 3, sequence_first=True), (6, 2, 4)),
        (channels_last, (2, 3, 4, 5)),
        (stacked(1, of=2), (4, 3, 2, 2)),
        (lambda x: x[:, 1:3], (2, 4, 2, 2)),
    ],
)
def test_positions_write_back_where_the_grid_was_read(
    reshape: Callable[[Tensor], Tensor], shape: tuple[int, ...]
) -> None:
    x = torch.randn(shape)
    x.view(-1)[0] = float("nan")
    index = positions(reshape, x)
    written = x.flatten().scatter(0, index.flatten(), torch.full((index.numel(),), 7.0)).view(shape)
    assert (reshape(written) == 7).all()
    assert int((written == 7).sum()) == index.numel()


@pytest.mark.parametrize(
    "reshape",
    [lambda x: x * 2, lambda x: x.float().cumsum(1), lambda x: x[:, :1] + x[:, 1:2]],
    ids=["scales", "sums", "adds"],
)
def test_a_reshape_that_computes_is_refused(reshape: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(MulticamError, match="must only rearrange or select"):
        positions(reshape, torch.rand(2, 3, 2, 2) + 1)


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


def test_a_signal_is_taken_as_it_is_when_said() -> None:
    x = torch.rand(2, 16, 100)
    assert as_it_is(x) is x
