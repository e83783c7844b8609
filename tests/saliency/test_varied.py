"""Gradients of variations are those of rows alone, whatever else is in the pass."""

import pytest
import torch
from torch import Tensor, nn

from multicam.saliency.varied import Varied
from multicam.watch.finite import CHANGED
from multicam.watch.trace import Trace


class Company(nn.Module):
    """A linear score, of which something that a batch shares is taken away or divided by."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.head = how, nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.head(x.flatten(1)).tanh()
        match self.how:
            case "max":
                return h / h.abs().amax()
            case "mean":
                return h - h.mean(0) / 2
            case "first":
                return h * h[:1].detach().abs()
            case "one row":
                return self.head(x.squeeze(0).flatten()[None]).tanh()
            case _:
                return h


def alone(model: nn.Module, rows: Tensor) -> Tensor:
    found = []
    for row in rows:
        x = row[None].clone().requires_grad_()
        found += torch.autograd.grad(model(x)[:, 1].sum(), x)
    return torch.cat(found)


@pytest.mark.parametrize("how", ["max", "mean", "first", "one row", "none"])
@pytest.mark.parametrize("batch", [1, 2])
def test_gradients_and_scores_are_those_of_rows_alone(how: str, batch: int) -> None:
    if how == "one row" and batch == 2:
        batch = 1
    torch.manual_seed(0)
    model, x = Company(how).double().eval(), torch.rand(batch, 2, 3, dtype=torch.float64)
    varied = Varied(Trace(model, x, {}, 1), ["x"], CHANGED)
    samples = [i % batch for i in range(7)]
    rows = torch.rand(7, 2, 3, dtype=torch.float64)
    for _ in range(2):
        torch.testing.assert_close(varied.gradients(samples, {"x": rows})["x"], alone(model, rows))
    assert varied.apart == (how != "none")
    ends = torch.cat([model(row[None])[:, 1] for row in rows[:batch]]).detach()
    torch.testing.assert_close(varied.scores({"x": rows[:batch]}), ends)


def test_rows_that_may_run_together_take_one_pass_more_than_the_first_time() -> None:
    torch.manual_seed(0)
    model, sizes = Company("none").eval(), []
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    varied = Varied(Trace(model, torch.rand(1, 2, 3), {}, 1), ["x"], CHANGED)
    rows = {"x": torch.rand(6, 2, 3)}
    varied.gradients([0] * 6, rows)
    sizes.clear()
    varied.gradients([0] * 6, rows)
    assert sizes == [6, 1]
