"""Gradients of variations are those of rows alone, whatever else is in the pass."""

import pytest
import torch
from torch import Tensor, nn

from multicam.errors import MulticamError
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
            case "two rows" if len(x) < 2:
                raise ValueError("expected more than one row")
            case "pairs" if len(x) < 2:
                raise ValueError("expected more than one row")
            case "pairs":
                return h - h.mean(0)
            case "samples":  # a row of another sample, told by its first number, is what disturbs
                return h - h * (x[:, 0, 0] > 0.5).any() * (x[:, 0, 0] < 0.5)[:, None]
            case "branch":
                return h if x.mean() > 0.4 else -h
            case "other branch":
                return h if self.head.bias.sum() < 100 else -h
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


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_model_that_needs_two_rows_is_given_copies(size: int) -> None:
    torch.manual_seed(0)
    model, x = Company("two rows").double().eval(), torch.rand(2, 2, 3, dtype=torch.float64)
    varied = Varied(Trace(model, x, {}, 1), ["x"], CHANGED)
    rows = torch.rand(size, 2, 3, dtype=torch.float64)
    expected = alone(renamed(model), rows)
    torch.testing.assert_close(varied.gradients([i % 2 for i in range(size)], {"x": rows})["x"], expected)


def renamed(model: nn.Module) -> nn.Module:
    found = Company("none").double().eval()
    found.load_state_dict(model.state_dict())
    return found


@pytest.mark.parametrize("size", [1, 3])
def test_a_model_that_needs_two_rows_and_compares_them_is_refused(size: int) -> None:
    torch.manual_seed(0)
    varied = Varied(Trace(Company("pairs").eval(), torch.rand(2, 2, 3), {}, 1), ["x"], CHANGED)
    with pytest.raises(MulticamError, match="cannot run sample 0 alone, and with 2 copies of it the score is 0 where"):
        varied.gradients([i % 2 for i in range(size)], {"x": torch.rand(size, 2, 3)})


def test_a_model_that_runs_no_variation_is_refused_in_our_words() -> None:
    class Once(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.max() > 1:
                raise ValueError("pixels must be between 0 and 1")
            return x.flatten(1)

    varied = Varied(Trace(Once().eval(), torch.rand(2, 2, 3), {}, 1), ["x"], CHANGED)
    with pytest.raises(MulticamError, match="neither a variation of sample 1 alone nor copies of it: pixels must be"):
        varied.gradients([1], {"x": 2 + torch.rand(1, 2, 3)})


def test_rows_of_samples_that_meet_later_are_tried_alone_then() -> None:
    torch.manual_seed(0)
    model, x = Company("samples").double().eval(), torch.rand(2, 2, 3, dtype=torch.float64)
    varied = Varied(Trace(model, x, {}, 1), ["x"], CHANGED)
    rows = 0.5 * torch.rand(8, 2, 3, dtype=torch.float64)
    model.head.weight.data.abs_()
    rows[6] = 1  # it disturbs the others, and has the highest score of its pass itself
    for part, samples in ((slice(0, 3), [0, 0, 0]), (slice(3, 5), [0, 0]), (slice(5, 8), [0, 1, 0])):
        found = varied.gradients(samples, {"x": rows[part]})["x"]
        torch.testing.assert_close(found, alone(model, rows[part]))
    assert varied.apart


@pytest.mark.parametrize("how", ["branch", "other branch"])
def test_a_number_that_decides_for_all_rows_lets_each_run_alone(how: str) -> None:
    torch.manual_seed(0)
    model, x = Company(how).double().eval(), torch.rand(1, 2, 3, dtype=torch.float64)
    model.head.weight.data[1] = torch.tensor([0.4, 0.1, 0.1, 0.1, 0.1, 0.1])
    varied = Varied(Trace(model, x, {}, 1), ["x"], CHANGED)
    rows = torch.linspace(0.5, 0.9, 9, dtype=torch.float64)[:, None, None] * torch.ones(2, 3)
    rows[4] = torch.tensor([[1.8, 0, 0], [0, 0, 0]])  # of another branch alone, and with a score amid the others
    torch.testing.assert_close(varied.gradients([0] * 9, {"x": rows})["x"], alone(model, rows))
    assert varied.apart == (how == "branch")
