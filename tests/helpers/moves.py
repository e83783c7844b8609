"""Operations that move entries, and those that pick entries or put them somewhere."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Move = Callable[[Tensor, int], Tensor]
MOVES: dict[str, Move] = {
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
    "unfold": lambda x, i: x.unfold(-1, 2, 1).flatten(-2) if x.shape[-1] > 2 and x.numel() < 500 else x,
    "as_strided": lambda x, i: x.contiguous().as_strided((2, 2), (x.numel() // 2, 1)) if x.numel() > 3 else x,
    "contiguous": lambda x, i: x.mT.contiguous().clone(),
}
PICKS: dict[str, Move] = {
    "index": lambda x, i: x[:, torch.arange(x.shape[1]).flip(0)],
    "two indices": lambda x, i: x[torch.arange(2)[:, None] % len(x), torch.arange(3)[None] % x.shape[1]],
    "mask": lambda x, i: x[:, torch.arange(x.shape[1]) % 2 == 0],
    "gather": lambda x, i: x.gather(-1, (torch.arange(x.shape[-1]).flip(0) % x.shape[-1]).expand(x.shape)),
    "index_select": lambda x, i: x.index_select(i % x.ndim, torch.tensor([0, x.shape[i % x.ndim] - 1, 0])),
    "masked_select": lambda x, i: x.masked_select(x % 3 != 0).view(1, -1) if (x % 3 != 0).any() else x,
    "write": lambda x, i: written(x, lambda y: y.narrow(i % x.ndim, 0, 1).copy_(x.narrow(i % x.ndim, -1, 1))),
    "write a view of a view": lambda x, i: written(x, lambda y: y.transpose(0, 1)[0].copy_(x.transpose(0, 1)[-1])),
    "put": lambda x, i: written(x, lambda y: y.__setitem__(torch.tensor([0]), x[-1:])),
    "slice_scatter": lambda x, i: x.slice_scatter(x.narrow(0, len(x) - 1, 1), 0, 0, 1),
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
