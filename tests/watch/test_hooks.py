"""Hooks of a pass come first, whoever else has hooks, and what these keep or make is part of the model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from multicam import AblationCAM, HiResCAM, PackedModel
from multicam.watch.hooks import after, before, has_others


class Reading(nn.Module):
    """A model that reads what hooks kept of its stages."""

    def __init__(self) -> None:
        super().__init__()
        self.s1, self.s2 = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.head = nn.Linear(16, 3)
        self.seen: dict[str, Tensor] = {}

    def keep(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, args, output: self.seen.__setitem__(name, output)

    def forward(self, x: Tensor) -> Tensor:
        self.s2(self.s1(x).relu())
        return self.head(torch.cat([self.seen[n].tanh().mean((2, 3)) for n in ("s1", "s2")], 1))


class AtFirst(Reading):
    """Its hooks come at the first call, as in transformers."""

    hooked = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.hooked:
            self.hooked = True
            for name in ("s1", "s2"):
                getattr(self, name).register_forward_hook(self.keep(name))
        return super().forward(x)


def made(how: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    if how == "first call":
        return AtFirst().eval(), None
    model, handle = Reading().eval(), None
    if how == "global":
        names = {model.s1: "s1", model.s2: "s2"}
        handle = register_module_forward_hook(
            lambda module, args, output: model.keep(names[module])(module, args, output) if module in names else None
        )
        return model, handle
    for name in ("s1", "s2"):
        getattr(model, name).register_forward_hook(model.keep(name), prepend=how == "prepended")
    return model, handle


@pytest.mark.parametrize("how", ["own", "prepended", "first call", "global"])
@pytest.mark.parametrize("name", ["s1", "s2"])
def test_a_map_counts_the_ways_through_what_hooks_keep(how: str, name: str) -> None:
    model, handle = made(how)
    x = torch.rand(1, 3, 16, 16)
    try:
        plain = Reading().eval()
        plain.load_state_dict(model.state_dict())
        a = plain.s1(x).detach().requires_grad_()
        b = plain.s2(a.relu())
        score = plain.head(torch.cat([a.tanh().mean((2, 3)), b.tanh().mean((2, 3))], 1))[0, 1]
        at = {"s1": a, "s2": b}[name]
        truth = (at * torch.autograd.grad(score, at)[0]).sum()
        for _ in range(2):
            torch.testing.assert_close(HiResCAM(model, name)(x, 1, signed=True).mean(), truth)
        assert AblationCAM(model, name)(x, 1, signed=True).abs().max() > 1e-5
        packed = PackedModel(model, x, layers=[name])
        assert packed(packed.pack(x)).requires_grad
    finally:
        if handle is not None:
            handle.remove()


def test_a_hook_that_changes_an_output_is_part_of_the_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(256, 2)).eval()
    model[0].register_forward_hook(lambda module, args, output: output.square())
    x = torch.rand(1, 3, 8, 8)
    a = model[0].forward(x).detach().requires_grad_()
    truth = (a * torch.autograd.grad(model[1:](a.square())[0, 1], a)[0]).sum()
    torch.testing.assert_close(HiResCAM(model, "0")(x, 1, signed=True).mean(), truth)


def test_hooks_are_told_in_front_of_others_and_others_are_known() -> None:
    layer, told = nn.Identity(), []
    assert not has_others(layer)
    other = layer.register_forward_hook(lambda *_: told.append("other"))
    with after(layer, lambda *_: told.append("after")), before(layer, lambda *_: told.append("before")):
        layer(torch.ones(1))
    assert told == ["before", "after", "other"]
    assert has_others(layer)
    other.remove()
    with after(layer, lambda *_: None), before(layer, lambda *_: None):
        assert not has_others(layer)
