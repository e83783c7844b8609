"""Inputs that a model cannot do without: a what-if whose score is no number is refused by the name of the input, and a baseline that is advised does.

Shares, curves and patches were NaN without a word where a baseline made them so: a depth map of zeros has no spread, a graph without nodes no mean
(PyG #4315).
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import multicam as mc
from multicam import metrics

pytestmark = pytest.mark.filterwarnings("ignore:integrated gradients miss")


class Beside(nn.Module):
    """A photo beside something whose kind has a hole in its middle; both feed one head."""

    def __init__(self) -> None:
        super().__init__()
        self.rgb, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 2)

    def forward(self, rgb: Tensor, other: Tensor) -> Tensor:
        out: Tensor = self.head(self.rgb(rgb).mean((2, 3)) + self.seen(other))
        return out

    def seen(self, other: Tensor) -> Tensor:
        raise NotImplementedError


class Cosine(Beside):
    """An embedding of unit length, written as in CLIP."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 6, 3, bias=False)

    def seen(self, other: Tensor) -> Tensor:
        x = self.embed(other).mean((2, 3))
        return x / x.norm(dim=1, keepdim=True)


class Nodes(Beside):
    """The mean over the nodes of a graph: the pixels that are bright enough."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(1, 6)

    def seen(self, other: Tensor) -> Tensor:
        found = [self.embed(x[x > 0.05][:, None]).mean(0) for x in other]
        return torch.stack(found)


class Padded(Beside):
    """Attention of PyTorch's own, for which places without a measurement are padding; of nothing but padding it makes NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attend = nn.Linear(8, 6), nn.MultiheadAttention(6, 2, batch_first=True)

    def seen(self, other: Tensor) -> Tensor:
        rows = other[:, 0]
        x = self.embed(rows)
        out, _ = self.attend(x[:, :1], x, x, key_padding_mask=rows.amax(2) <= 0.05)
        seen: Tensor = out[:, 0]
        return seen


class Correlated(Beside):
    """The correlation of two halves of a radar image, by which it is registered."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(1, 6)

    def seen(self, other: Tensor) -> Tensor:
        a, b = other.flatten(1).chunk(2, 1)
        a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
        return self.embed((a * b).sum(1, keepdim=True) / (a.square().sum(1) * b.square().sum(1)).sqrt()[:, None])


class Geometric(Beside):
    """A geometric mean with weights that add up to one: densities of tissue."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(1, 6)

    def seen(self, other: Tensor) -> Tensor:
        density = other / other.sum((2, 3), keepdim=True)
        return self.embed((-density * density.log()).sum((2, 3)))


KINDS = [Cosine, Nodes, Padded, Correlated, Geometric]
TRIALS: dict[str, Callable[[nn.Module, dict[str, Tensor], Any], Any]] = {
    "contribution": lambda model, x, base: mc.contribution(model, x, 1, baseline=base).shapley,
    "region_contribution": lambda model, x, base: mc.region_contribution(model, x, 1, regions=1, baseline=base).contribution.shapley,
    "occlusion": lambda model, x, base: mc.occlusion(model, x, 1, patch=8, baseline=base)["other"],
    "deletion": lambda model, x, base: metrics.deletion(
        model, x, {"rgb": torch.zeros(2, 8, 8), "other": torch.ones(2, 8, 8)}, 1, steps=2, baseline=base
    ).area,
    "insertion": lambda model, x, base: metrics.insertion(
        model, x, {"rgb": torch.zeros(2, 8, 8), "other": torch.ones(2, 8, 8)}, 1, steps=2, baseline=base
    ).area,
}  # fmt: skip


def made(kind: type[nn.Module]) -> tuple[nn.Module, dict[str, Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind().eval(), {"rgb": torch.rand(2, 3, 8, 8), "other": torch.rand(2, 1, 8, 8) + 0.1}


@pytest.mark.parametrize("name", TRIALS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_input_at_fault_is_named_and_another_baseline_does(kind: type[nn.Module], name: str) -> None:
    model, x = made(kind)
    with torch.no_grad():
        assert model(**x).isfinite().all()
        assert model(x["rgb"], x["other"] * 0).isnan().all()
    with pytest.raises(mc.MulticamError, match=r"input 'other' .* is NaN"):
        TRIALS[name](model, x, {"rgb": 0.0, "other": 0.0})
    grey = {"rgb": 0.0, "other": torch.linspace(0.2, 0.8, 64).view(1, 1, 8, 8).square()}
    assert torch.as_tensor(TRIALS[name](model, x, grey)).isfinite().all()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_maps_and_shares_of_what_is_there_are_those_by_hand(kind: type[nn.Module]) -> None:
    model, x = made(kind)
    kept: list[Tensor] = []
    handle = model.get_submodule("rgb").register_forward_hook(lambda module, args, out: kept.append(out))
    (gradient,) = torch.autograd.grad(model(**x)[:, 1].sum(), kept)
    handle.remove()
    found = mc.HiResCAM(model, {"rgb": "rgb"})(x, 1, signed=True)["rgb"]
    torch.testing.assert_close(found.mean((1, 2)), (kept[0].detach() * gradient).sum((1, 2, 3)))
    with torch.no_grad():
        expected = (model(**x) - model(x["rgb"] * 0, x["other"]))[:, 1]
    torch.testing.assert_close(mc.contribution(model, x, 1, players=["rgb"]).shapley[:, 0], expected)
