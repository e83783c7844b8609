"""Nets whose layers have a grid of one, two or three axes, or that of their input."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

GRIDS = [(9,), (5, 7), (3, 4, 5), (3, 2)]  # with more cells than channels and, in the last, fewer
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)


def small(grid: tuple[int, ...], c: int, pooled: bool = False) -> tuple[nn.Module, Tensor]:
    """A net on 1-D, 2-D or 3-D input whose layer `"conv"` has the grid; what follows is smooth, or pooling and a head."""
    torch.manual_seed(len(grid))
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(grid)]
    model = nn.Sequential()
    model.add_module("conv", conv(3, c, 3, padding=1))
    if pooled:
        model.add_module("pool", nn.Sequential(nn.Flatten(2), nn.AdaptiveAvgPool1d(1)))
    else:
        model.add_module("tail", nn.Sequential(nn.SiLU(), conv(c, 6, 3, padding=1), nn.Tanh()))
    model.add_module("flat", nn.Flatten())
    model.add_module("head", nn.Linear(c if pooled else 6 * int(np.prod(grid)), 5))
    return model.double(), torch.rand(2, 3, *grid, dtype=torch.float64)


def same_size() -> tuple[nn.Sequential, Tensor]:
    """A net whose layer `"1"` has the grid of its input: enlarging does nothing, whatever the library does there."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        mixed = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Tanh(), nn.Flatten()]
        return nn.Sequential(*mixed, nn.Linear(4 * 8 * 6, 4)).eval(), torch.rand(2, 3, 10, 8)
