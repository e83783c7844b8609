"""Hooks that stay: heard in every pass until they are removed."""

import torch
from torch import Tensor, nn

from multicam.watch.standing import on_gradient, on_return


def test_returns_are_heard_until_the_hooks_are_removed() -> None:
    model, x = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU()), torch.rand(1, 1, 2, 2)
    heard: list[tuple[nn.Module, Tensor, Tensor]] = []
    hooks = on_return([model[0], model[1], model[0]], lambda *call: heard.append(call))
    out = model(x)
    assert [module for module, _, _ in heard] == [model[0], model[0], model[1]]
    assert heard[0][1][0] is x and heard[2][2] is out
    for hook in hooks:
        hook.remove()
    model(x)
    assert len(heard) == 3 and not model[0]._forward_hooks


def test_several_hear_each_return_in_order() -> None:
    heard: list[str] = []
    on_return([layer := nn.ReLU()], lambda *_: heard.append("a"), lambda *_: heard.append("b"))
    layer(torch.ones(1))
    assert heard == ["a", "b"]


def test_the_gradient_is_told_when_it_comes() -> None:
    x, told = torch.tensor([1.0, 2.0], requires_grad=True), []
    on_gradient(y := 3 * x, told.append)
    assert not told
    (y**2).sum().backward()
    assert told[0].tolist() == [6.0, 12.0]
