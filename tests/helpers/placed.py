"""Tokens that stand for parts of an image, words and a clip."""

import torch
from torch import Tensor

from multicam.watch.tokens.places import Places

SIZES = {"rgb": (8, 12), "words": (5,), "clip": (4, 6, 6)}


def places() -> Places:
    return Places(SIZES)


def tokens(of: Places, name: str, *grid: int) -> Tensor:
    return torch.from_numpy(of.lay(of.whole(name, 1, grid)))


def own(of: Places, n: int = 1) -> Tensor:
    return torch.from_numpy(of.fresh(torch.zeros(n, dtype=torch.int64).numpy()))
