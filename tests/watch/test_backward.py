"""Gradients are those of the numbers, also where PyTorch's own are not."""

from collections.abc import Callable
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import multicam as mc
from multicam.watch.backward import gradients


def slopes(score: Callable[[Tensor], Tensor], x: Tensor, step: float = 1e-6) -> Tensor:
    """The gradient of a score by central differences."""
    found = torch.zeros_like(x)
    for i in range(x.numel()):
        change = torch.zeros_like(x)
        change.view(-1)[i] = step
        found.view(-1)[i] = (score(x + change) - score(x - change)).detach() / (2 * step)
    return found


def normalised(channels: int) -> nn.Module:
    norm = nn.BatchNorm2d(channels).double().eval()
    nn.init.uniform_(norm.running_var, 0.5, 1.5)
    nn.init.normal_(norm.running_mean)
    return norm


class Hybrid(nn.Module):
    """A convolution with its normalisation, then attention of places to each other, written out."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.conv, self.norm = how, nn.Conv2d(2, 4, 3, padding=1).double(), normalised(4)

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(self.features, x, use_reentrant=False) if self.how == "checkpoint" else self.features(x)
        z = h.flatten(2).mT
        return ((z @ z.mT / 2).softmax(-1) @ z).square().sum(1)

    def features(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        if self.how == "functional":
            return F.batch_norm(h, self.norm.running_mean, self.norm.running_var, self.norm.weight, self.norm.bias)
        if self.how == "instance":
            return F.instance_norm(h)
        return self.norm(h)


@pytest.mark.parametrize("how", ["module", "functional", "instance", "checkpoint"])
@pytest.mark.parametrize("batch", [1, 2])
def test_normalised_images_whose_places_attend_to_each_other(how: str, batch: int) -> None:
    torch.manual_seed(0)
    model, x = Hybrid(how).eval(), torch.rand(batch, 2, 4, 3, dtype=torch.float64)
    expected = slopes(lambda x: model(x)[:, 1].sum(), x)
    torch.testing.assert_close(mc.gradient(model, x, 1)["x"], expected, rtol=1e-5, atol=1e-6)
    acts = model.conv(x).detach()
    by_acts = slopes(lambda a: rest(model, a)[:, 1].sum(), acts)
    if how != "checkpoint":  # which a layer cannot be in
        found = mc.HiResCAM(model, "conv")(x, 1, signed=True)
        evidence = (by_acts * acts).sum(1)
        torch.testing.assert_close(found.mean((1, 2)), evidence.sum((1, 2)).to(found), rtol=1e-4, atol=1e-5)


def rest(model: Hybrid, acts: Tensor) -> Tensor:
    conv, model.conv = model.conv, nn.Identity()
    try:
        return model(acts)
    finally:
        model.conv = conv


class Turned(nn.Module):
    """A normalisation of an image that lies in memory in one order, before numbers that lie in another."""

    def __init__(self, shape: tuple[int, ...], first: tuple[int, ...], second: tuple[int, ...]) -> None:
        super().__init__()
        self.norm, self.first, self.second = normalised(shape[1]), first, second
        self.register_buffer("weight", torch.rand(shape, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (laid(self.norm(laid(x, self.first)), self.second) * self.weight).sum((1, 2, 3))[:, None]


def laid(x: Tensor, order: tuple[int, ...]) -> Tensor:
    return x.permute(order).contiguous().permute([order.index(i) for i in range(4)])


@pytest.mark.parametrize("first", [*permutations(range(4))])
@pytest.mark.parametrize("shape", [(1, 4, 3, 2), (2, 4, 1, 3), (1, 4, 2, 1), (1, 1, 3, 2), (2, 3, 2, 2)])
def test_gradients_of_any_layout(shape: tuple[int, ...], first: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.rand(shape, dtype=torch.float64)
    for second in permutations(range(4)):
        model = Turned(shape, first, second).eval()
        norm = model.norm
        scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).view(1, -1, 1, 1).detach()
        torch.testing.assert_close(mc.gradient(model, x, 0)["x"], scale * model.weight)


# Of each shape, strides that are those of the channels first or last but for an axis of one entry.
ODD = [((1, 3, 4, 5), (1, 1, 15, 3)), ((2, 3, 1, 4), (12, 1, 7, 3)), ((1, 3, 4, 1), (1, 1, 3, 7))]
FUNCTIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "evaluation": lambda x, mean, var: F.batch_norm(x, mean, var, var, mean),
    "training": lambda x, mean, var: F.batch_norm(x, None, None, var, mean, training=True),
    "without weights": lambda x, mean, var: F.batch_norm(x, mean, var),
    "checkpoint": lambda x, mean, var: checkpoint(F.batch_norm, x.contiguous(), mean, var, use_reentrant=False),
}


@pytest.mark.parametrize("how", FUNCTIONS)
@pytest.mark.parametrize(("shape", "strides"), ODD)
def test_functions_that_normalise_an_odd_layout(shape: tuple[int, ...], strides: tuple[int, ...], how: str) -> None:
    g = torch.Generator().manual_seed(0)
    values, weight = (torch.rand(shape, dtype=torch.float64, generator=g) for _ in range(2))
    mean, var = (torch.rand(shape[1], dtype=torch.float64, generator=g) + 0.5 for _ in range(2))

    def score(x: Tensor) -> Tensor:
        return (FUNCTIONS[how](x, mean, var).square() * weight).sum()

    x = torch.empty_strided(shape, strides, dtype=torch.float64).copy_(values).requires_grad_()
    (found,) = gradients(score(x), [x], create_graph=True)
    assert found is not None
    torch.testing.assert_close(found.detach(), slopes(score, values), rtol=1e-5, atol=1e-6)
    (second,) = gradients(found.sum(), [x])
    assert second is not None

    def slope(values: Tensor) -> Tensor:
        plain = values.clone().requires_grad_()
        return torch.autograd.grad(score(plain), plain)[0].sum()

    torch.testing.assert_close(second, slopes(slope, values), rtol=1e-4, atol=1e-5)


def test_what_is_not_used_has_none_and_no_hook_stays() -> None:
    x, y = torch.rand(1, 4, 2, 2, requires_grad=True), torch.rand(2, requires_grad=True)
    score = nn.BatchNorm2d(4).eval()(x).sum()
    first = gradients(score, [x, y], retain_graph=True)
    assert first[1] is None
    heard: list[object] = []
    score.grad_fn.next_functions[0][0].register_prehook(lambda grads: heard.append(grads[0].stride()))
    torch.autograd.grad(score, x, retain_graph=True)
    assert heard == [(0, 0, 0, 0)]
