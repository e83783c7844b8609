"""The weights that the convolutions of a pass really use, in the order in which they run."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from multicam.watch.convolved import Convolved


def found(run: nn.Module, x: Tensor) -> list[tuple[Tensor, bool, int]]:
    with torch.no_grad(), Convolved() as seen:
        run(x)
    return seen.found


@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_however_many_axes_and_either_way_round(d: int, groups: int, transposed: bool) -> None:
    kind = getattr(nn, f"Conv{'Transpose' * transposed}{d}d")
    conv = kind(4, 6, 3, padding=1, groups=groups)
    [(weight, way, parts)] = found(conv, torch.rand(2, 4, *[5] * d))
    assert torch.equal(weight, conv.weight)
    assert (way, parts) == (transposed, groups)


@pytest.mark.parametrize("padding", ["same", "valid", 2])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
def test_however_it_is_padded(padding: str | int, mode: str) -> None:
    conv = nn.Conv2d(3, 4, 3, padding=padding, padding_mode=mode)
    [(weight, _, _)] = found(conv, torch.rand(1, 3, 6, 6))
    assert torch.equal(weight, conv.weight)


def test_a_weight_that_is_computed_is_the_one_of_the_pass() -> None:
    conv = weight_norm(nn.Conv2d(3, 4, 3))
    with torch.no_grad():
        conv.parametrizations.weight.original0.mul_(2)
    [(weight, _, _)] = found(conv, torch.rand(1, 3, 6, 6))
    assert torch.equal(weight, conv.weight)


def test_functions_count_and_the_order_is_that_of_the_pass() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 1)
            self.fixed = torch.rand(3, 1, 2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(F.conv2d(self.second(x).relu(), self.fixed, groups=3))

    model, x = Backwards(), torch.rand(2, 3, 8, 8)
    seen = found(model, x)
    assert [groups for _, _, groups in seen] == [1, 3, 1]
    for (weight, _, _), expected in zip(seen, (model.second.weight, model.fixed, model.first.weight), strict=True):
        assert torch.equal(weight, expected)


def test_nothing_else_is_told_and_the_output_is_the_models_own() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 2)), torch.rand(2, 3, 6, 6)
    with Convolved() as seen:
        out = model(x)
    model(x)
    assert torch.equal(out, model(x))
    assert len(seen.found) == 1
