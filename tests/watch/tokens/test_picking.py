"""What picks entries, or puts them somewhere: the ids that come out must be the values that come out."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from multicam.watch.tokens.places import LOST
from tests.helpers.following import after
from tests.helpers.moves import PICKS


@pytest.mark.parametrize("move", sorted(PICKS))
@pytest.mark.parametrize("i", [0, 1, 2])
def test_every_move_alone(move: str, i: int) -> None:
    origins, y = after(lambda x: PICKS[move](x, i), torch.arange(1, 49).view(2, 4, 6))
    assert torch.equal(origins.ids(y), y)


EVERY_THIRD = torch.arange(48).view(2, 4, 6) % 3 == 0
ROWS = torch.tensor([[True, False, True, False], [False, True, True, False]])


def put(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[ROWS] = x[ROWS.flip(1)]
    return y


@pytest.mark.parametrize(
    "op",
    [
        pytest.param(lambda x: x.gather(1, torch.tensor([[[3, 0], [1, 1]]])), id="a corner gathered"),
        pytest.param(lambda x: x.take_along_dim(x.flip(2) % 6, 2), id="by its own values"),
        pytest.param(lambda x: x[ROWS], id="a condition over two axes"),
        pytest.param(lambda x: x[ROWS, 1:], id="a condition and a slice"),
        pytest.param(lambda x: x[:, torch.tensor([3, 0]), torch.tensor([5, 1])], id="pairs behind the batch"),
        pytest.param(put, id="put where a condition holds"),
        pytest.param(lambda x: x.select_scatter(x.select(1, 3), 1, 0), id="one row over another"),
        pytest.param(lambda x: x.slice_scatter(x[:, :, :2], 2, 1, 5, 2), id="every other column"),
        pytest.param(lambda x: torch.zeros_like(x).masked_scatter(EVERY_THIRD, x), id="filled up in order"),
        pytest.param(lambda x: x.masked_scatter(EVERY_THIRD, torch.zeros_like(x)), id="emptied"),
        pytest.param(lambda x: x.masked_select(EVERY_THIRD[:, :1]), id="a condition for every row"),
    ],
)
def test_ids_are_the_values_that_are_picked(op: Callable[[Tensor], Tensor]) -> None:
    origins, y = after(op, torch.arange(1, 49).view(2, 4, 6))
    assert torch.equal(origins.ids(y), y)


def test_a_condition_covers_as_many_axes_as_it_has() -> None:
    def op(x: Tensor) -> Tensor:
        return x[..., None].expand(2, 4, 6)[ROWS, torch.tensor([0, 5, 1, 4])]  # the same along the last axis

    origins, y = after(op, torch.arange(1, 9).view(2, 4))
    assert torch.equal(origins.ids(y), y)


def test_what_a_table_has_at_a_place_is_of_this_place() -> None:
    x, table = torch.arange(1, 9).view(2, 4), torch.rand(9, 5)
    origins, y = after(lambda x: table[x], x)
    assert torch.equal(y, table[x])
    assert torch.equal(origins.ids(y), x[..., None].expand(2, 4, 5))


def test_what_is_added_where_it_is_put_is_lost() -> None:
    x = torch.arange(1.0, 9).view(2, 4)
    origins, y = after(lambda x: x.index_put((torch.tensor([0]),), x[1], accumulate=True), x)
    assert (origins.ids(y) == LOST).all()
