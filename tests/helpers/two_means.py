"""A model whose evidence is known by hand, and a method that says what it is told to."""

import torch
from torch import Tensor, nn

from multicam import Maps


class TwoMeans(nn.Module):
    """Class 0: the mean of `x` and three times that of `y`, which has fewer and so larger places; class 1: nothing."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        score = x.mean((1, 2, 3)) + 3 * y.mean((1, 2, 3))
        return torch.stack([score, torch.zeros_like(score)], 1)


X, Y = torch.tensor([[[[0.4, 0.1], [0.3, 0.2]]]]), torch.tensor([[[[0.5]]]])
EXACT = {"x": X[:, 0], "y": 3 * Y[:, 0]}  # densities in units of the score, of mass 0.25 and 1.5
CORNER = torch.tensor([[[True, False], [False, False]]])
NOWHERE = torch.zeros(1, 1, 1, dtype=torch.bool)


def told(maps, comparable=True):
    """A method that says the same of whatever it is given."""
    return lambda model, inputs, target: Maps({name: m.clone() for name, m in maps.items()}, comparable)
