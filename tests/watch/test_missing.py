"""Why no gradient arrives, said of every way in which one can be lost."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from multicam import Inputs, MulticamError
from multicam.call.scorer import Scorer
from multicam.watch.layers import Taps
from multicam.watch.missing import another, at_layer, refuse_detached

WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "unused": lambda x: 0 * x[:0].sum() + torch.ones(len(x), 2),
    "detached": lambda x: x.detach().mean((2, 3)),
    "rounded": lambda x: x.mean((2, 3)).mul(50).round(),
    "chosen": lambda x: x.flatten(1).argmax(1)[:, None].expand(-1, 2) * 1.0,
}
SAID = {"unused": "does not depend on layer 'conv'", "no grad": "runs under the model's own torch.no_grad()"}


class Losing(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.conv = way, nn.Conv2d(2, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "no grad":
            with torch.no_grad():
                return self.conv(x).mean((2, 3))
        return WAYS[self.way](self.conv(x))


@pytest.mark.parametrize("way", [*WAYS, "no grad"])
def test_what_is_said_of_a_layer(way: str) -> None:
    torch.manual_seed(0)
    model, call, scorer = Losing(way).eval(), Inputs(x=torch.rand(2, 2, 9, 9)), Scorer(1)
    with Taps(model, ["conv"]).observe(lambda i, tap, x: x) as (tap,):
        scores = scorer.of(model(**call.kwargs), 2).detach()
    expected = SAID.get(way, "depends on layer 'conv', but not by a gradient")
    assert expected in str(at_layer(model, call, tap, scorer, scores))


@pytest.mark.parametrize("way", WAYS)
def test_what_is_said_of_an_input(way: str) -> None:
    torch.manual_seed(0)
    model, call, scorer = Losing(way).eval(), Inputs(x=torch.rand(2, 2, 9, 9)), Scorer(1)
    scores = scorer.of(model(**call.kwargs), 2).detach()
    if way == "unused":
        refuse_detached(model, call, "x", scorer, scores)
        return
    with pytest.raises(MulticamError, match="depends on input 'x', but not by a gradient"):
        refuse_detached(model, call, "x", scorer, scores)


@pytest.mark.parametrize("x", [torch.rand(1, 3), torch.rand(1, 3, dtype=torch.complex64), torch.arange(3)[None]])
def test_another_value_is_another_everywhere_it_can_be(x: Tensor) -> None:
    found = another(Inputs(x=x, y=x), "x").leaves
    assert found["x"].dtype is x.dtype and not torch.equal(found["x"], x) and torch.equal(found["y"], x)
