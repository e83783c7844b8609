"""What moves entries: each entry of the input is its own id, so the ids that come out must be the values that come out."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.following import after

MOVES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "transpose": lambda x, i: x.transpose(i % x.ndim, (i + 1) % x.ndim),
    "permute": lambda x, i: x.permute(*range(1, x.ndim), 0),
    "flatten": lambda x, i: x.flatten(1),
    "merge": lambda x, i: x.flatten(i % (x.ndim - 1), i % (x.ndim - 1) + 1) if x.ndim > 2 else x,
    "divide": lambda x, i: x.unflatten(i % x.ndim, (2, -1)) if x.shape[i % x.ndim] % 2 == 0 and x.ndim < 6 else x,
    "roll": lambda x, i: x.roll((i, -1), (i % x.ndim, (i + 1) % x.ndim)),
    "flip": lambda x, i: x.flip(i % x.ndim),
    "slice": lambda x, i: x.narrow(i % x.ndim, 1, x.shape[i % x.ndim] - 1) if x.shape[i % x.ndim] > 2 else x,
    "step": lambda x, i: x[..., i % 2 :: 2] if x.shape[-1] > 2 else x,
    "pad": lambda x, i: F.pad(x, (i, 1, 0, 1), value=0) if varied(x) else x,
    "crop": lambda x, i: F.pad(x, (-1, 1)) if x.shape[-1] > 2 and varied(x) else x,
    "split": lambda x, i: torch.cat(x.split(1 + i % 3, i % x.ndim)[::-1], i % x.ndim),
    "stack": lambda x, i: torch.stack([x.select(0, 0), x.select(0, -1)], i % x.ndim),
    "unbind": lambda x, i: torch.cat(x.unbind(i % x.ndim), 0) if x.ndim > 2 else x,
    "repeat": lambda x, i: x.repeat(*([1] * (x.ndim - 1)), 2) if x.numel() < 500 else x,
    "repeat_interleave": lambda x, i: x.repeat_interleave(2, i % x.ndim) if x.numel() < 500 else x,
    "expand": lambda x, i: x[None].expand(2, *x.shape).flatten(0, 1) if x.numel() < 500 else x,
    "index": lambda x, i: x[:, torch.arange(x.shape[1]).flip(0)],
    "two indices": lambda x, i: x[torch.arange(2)[:, None] % len(x), torch.arange(3)[None] % x.shape[1]],
    "mask": lambda x, i: x[:, torch.arange(x.shape[1]) % 2 == 0],
    "gather": lambda x, i: x.gather(-1, (torch.arange(x.shape[-1]).flip(0) % x.shape[-1]).expand(x.shape)),
    "index_select": lambda x, i: x.index_select(i % x.ndim, torch.tensor([0, x.shape[i % x.ndim] - 1, 0])),
    "masked_select": lambda x, i: x.masked_select(x % 3 != 0).view(1, -1) if (x % 3 != 0).any() else x,
    "unfold": lambda x, i: x.unfold(-1, 2, 1).flatten(-2) if x.shape[-1] > 2 and x.numel() < 500 else x,
    "as_strided": lambda x, i: x.contiguous().as_strided((2, 2), (x.numel() // 2, 1)) if x.numel() > 3 else x,
    "write": lambda x, i: written(x, lambda y: y.narrow(i % x.ndim, 0, 1).copy_(x.narrow(i % x.ndim, -1, 1))),
    "write a view of a view": lambda x, i: written(x, lambda y: y.transpose(0, 1)[0].copy_(x.transpose(0, 1)[-1])),
    "put": lambda x, i: written(x, lambda y: y.__setitem__(torch.tensor([0]), x[-1:])),
    "slice_scatter": lambda x, i: x.slice_scatter(x.narrow(0, len(x) - 1, 1), 0, 0, 1),
    "contiguous": lambda x, i: x.mT.contiguous().clone(),
    "masked_scatter": lambda x, i: torch.zeros_like(x).masked_scatter(torch.ones_like(x, dtype=torch.bool), x.flip(0)),
}


def varied(x: Tensor) -> bool:
    """Whether no axis looks like features: along these, what is added to a token becomes a part of it."""
    return all(bool((x != x.narrow(axis, 0, 1)).any()) for axis in (-1, -2))


def written(x: Tensor, write: Callable[[Tensor], Any]) -> Tensor:
    y = torch.zeros_like(x)
    y[:] = x
    write(y)
    return y


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(MOVES)), st.integers(0, 3)), max_size=8))
def test_ids_go_where_the_entries_go(moves: list[tuple[str, int]]) -> None:
    def chain(x: Tensor) -> Tensor:
        for name, i in moves:
            x = MOVES[name](x, i)
        return x

    origins, y = after(chain, torch.arange(1, 2 * 4 * 6 + 1).view(2, 4, 6))
    assert torch.equal(origins.ids(y), y)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(set(MOVES) - {"masked_select", "crop", "pad"})), st.integers(0, 3)), max_size=4
    )
)
def test_pixels_go_where_their_values_go_in_every_channel(moves: list[tuple[str, int]]) -> None:
    def chain(x: Tensor) -> Tensor:
        for name, i in moves:
            x = MOVES[name](x, i)
        return x

    x = torch.arange(1.0, 2 * 4 * 6 + 1).view(2, 1, 4, 6).expand(2, 3, 4, 6).contiguous()
    origins, y = after(chain, x)
    assert torch.equal(origins.ids(y).float(), y)


@pytest.mark.parametrize("move", sorted(MOVES))
@pytest.mark.parametrize("i", [0, 1, 2])
def test_every_move_alone(move: str, i: int) -> None:
    origins, y = after(lambda x: MOVES[move](x, i), torch.arange(1, 49).view(2, 4, 6))
    assert torch.equal(origins.ids(y), y)


@pytest.mark.parametrize(
    "op",
    [
        pytest.param(lambda x: F.unfold(x, 2, stride=2), id="unfold"),
        pytest.param(
            lambda x: F.unfold(x, (2, 3), dilation=(1, 2), padding=1, stride=(1, 2)), id="unfold with all options"
        ),
        pytest.param(lambda x: F.pixel_unshuffle(x, 2), id="pixel_unshuffle"),
        pytest.param(lambda x: F.pixel_shuffle(x, 2), id="pixel_shuffle"),
        pytest.param(lambda x: F.pad(x, (1, 2, 2, 1), mode="reflect"), id="reflect"),
        pytest.param(lambda x: F.pad(x, (1, 2, 2, 1), mode="replicate"), id="replicate"),
        pytest.param(lambda x: F.pad(x, (1, 2, 2, 1), mode="circular"), id="circular"),
        pytest.param(lambda x: rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=2, q=3), id="patches"),
        pytest.param(lambda x: rearrange(x, "b c (h p) (w q) -> (b p q) h w c", p=2, q=3), id="grid windows"),
        pytest.param(lambda x: repeat(x, "b c h w -> (b t) h w c", t=2), id="repeat"),
        pytest.param(lambda x: torch.stack([x, x.flip(-1)], 1).flatten(0, 1), id="pairs"),
        pytest.param(lambda x: F.pad(x, (0, 0, 1, 1))[:, :, 1:-1].relu() * 1.0, id="pad and cut"),
    ],
)
def test_images_are_rearranged_exactly(op: Callable[[Tensor], Tensor]) -> None:
    x = torch.arange(1.0, 49).view(2, 1, 4, 6).expand(2, 4, 4, 6).contiguous()
    origins, y = after(op, x)
    assert torch.equal(origins.ids(y).float(), y)
