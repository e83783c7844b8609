"""Mixed rows that run alone have the scores of plain passes of one row, whatever the model makes of a batch."""

from itertools import count, product

import pytest
import torch
from torch import Tensor, nn

from multicam import Inputs
from multicam.watch.singly import Singly
from tests.helpers.counting import counted


class Fusing(nn.Module):
    """Encoders of two inputs, and a third input that belongs to a row, in ways that a batch shares."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a, self.b, self.head = nn.Linear(4, 3), nn.Linear(4, 3), nn.Bilinear(3, 3, 2)

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        match self.how:
            case "per sample":
                a = torch.cat([self.a(row[None]) for row in x])
            case "max":
                a = self.a(x)
                a = a / a.abs().amax()
            case "first":
                a = self.a(x - x[:1] / 2)
            case "one row":
                a = self.a(x.squeeze(0))[None]
            case "two rows":
                assert len(x) > 1
                a = self.a(x)
            case _:
                a = self.a(x)
        return self.head(a, self.b(y)) * z


@pytest.mark.parametrize("how", ["plain", "per sample", "max", "first", "one row", "two rows"])
def test_every_mixed_row_is_a_plain_pass_of_it(how: str) -> None:
    torch.manual_seed(0)
    model = Fusing(how).double().eval()
    x, y, z = torch.rand(3, 4).double(), torch.rand(3, 4).double(), torch.rand(3, 1).double()
    inputs = Inputs(x, y, z).bind(model)
    mixing = Singly(model, inputs, [["x"], ["y"]], lambda output, rows: output[:, 1], 3)
    rows = list(product(range(3), range(3), range(3)))
    left, right, own = (list(each) for each in zip(*rows, strict=True))
    copies = 2 if how == "two rows" else 1
    expected = [model(*(t[[i] * copies] for t, i in zip((x, y, z), row, strict=True)))[0, 1].detach() for row in rows]
    torch.testing.assert_close(mixing([left, right], own), torch.stack(expected))


def test_encoders_run_once_for_each_row_of_the_call_and_twice_for_the_proof() -> None:
    torch.manual_seed(0)
    model = Fusing("plain").eval()
    x = torch.rand(2, 4)
    inputs = Inputs(x, torch.rand(2, 4), torch.ones(2, 1)).bind(model)
    with counted(model) as counts:
        mixing = Singly(model, inputs, [["x"], ["y"]], lambda output, rows: output[:, 1], 1)
        mixing([[0, 0, 1, 1], [0, 1, 0, 1]], [0, 0, 0, 0])
    assert counts["a"] == counts["b"] == 2 + 2
    assert counts["head"] == 2 + 2 + 1  # both mixed rows are known from the proof, and one of them is compared
    assert mixing.used == [True, True]


def test_what_is_not_used_is_found_out() -> None:
    class Deaf(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x[:, :2] + 0 * len(y)

    model = Deaf()
    inputs = Inputs(torch.rand(2, 4), torch.rand(2, 4)).bind(model)
    assert Singly(model, inputs, [["x"], ["y"]], lambda output, rows: output[:, 1], 1).used == [True, False]


def test_a_row_that_is_one_of_the_call_in_all_that_matters_does_not_run() -> None:
    torch.manual_seed(0)
    model = Fusing("plain").eval()
    inputs = Inputs(torch.rand(3, 4), torch.rand(3, 4), torch.tensor([[1.0], [1.0], [2.0]])).bind(model)
    offset = torch.tensor([0.0, 10.0, 20.0])
    mixing = Singly(model, inputs, [["x"], ["y"]], lambda output, rows: output[:, 1] + offset[rows], 3)
    plain = model(*inputs.args)[:, 1].detach()
    mixing([[0, 1], [0, 1]], [0, 1])
    with counted(model) as counts:
        found = mixing([[1, 0], [1, 0]], [0, 1])  # both have the same third input
    assert not counts
    torch.testing.assert_close(found, plain[[1, 0]] + offset[:2])
    torch.testing.assert_close(mixing([[0], [0]], [2]), 2 * plain[:1] + offset[2])


def test_a_state_of_somebody_elses_that_only_a_mixed_row_changes_is_no_reason_to_run_all_rows_together() -> None:
    passes, seen = count(1), {"late": 0}

    class Bag(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            if len(x) != 1:
                raise ValueError("exactly one bag")
            seen["late"] += next(passes) == 5  # the first of a mixed row: two passes looked whether two differ
            return x * y

    model = Bag().eval()
    inputs = Inputs(torch.rand(2, 2), torch.rand(2, 2)).bind(model)
    mixing = Singly(model, inputs, [["x"], ["y"]], lambda output, rows: output[:, 1], 1)
    x, y = inputs.args
    torch.testing.assert_close(mixing([[0], [1]], [0]), (x[:1] * y[1:])[:, 1])
    assert seen["late"] == 1
