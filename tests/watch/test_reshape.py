"""Layer outputs as grids: exact, and never a guessed square."""

from collections.abc import Callable

import pytest
import torch
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from multicam import MulticamError, as_it_is, channels_last, stacked, tokens
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


def test_a_signal_is_taken_as_it_is_when_said() -> None:
    x = torch.rand(2, 16, 100)
    assert as_it_is(x) is x
