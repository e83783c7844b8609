"""Which axis of a matrix is the queries' and which the keys': by numbers that say it, permuted, folded, padded and cut."""

from itertools import permutations

import pytest
import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from multicam.watch.tokens.matrices import (
    Softmax,
    broadcasts,
    laying,
    line_of,
    order_of,
    role_of,
    sums_to_one,
    varies,
)

ROWS, COLUMNS = torch.arange(3), torch.arange(4)


def numbers(order: tuple[int, ...] = (0, 1, 2)) -> dict[str, Tensor]:
    """The row, column and matrix of every entry of two matrices 3 x 4, their axes in another order."""
    return {
        "matrix": torch.arange(2)[:, None, None].expand(2, 3, 4).permute(order),
        "row": ROWS[:, None].expand(2, 3, 4).permute(order),
        "column": COLUMNS.expand(2, 3, 4).permute(order),
    }


def test_numbers_vary_along_their_own_axis() -> None:
    where = numbers()
    assert [[varies(where[name], axis) for axis in range(3)] for name in ("matrix", "row", "column")] == [
        [True, False, False],
        [False, True, False],
        [False, False, True],
    ]
    copied = where["row"].contiguous()  # without an expanded axis that would tell
    assert [varies(copied, axis) for axis in range(3)] == [False, True, False]
    assert not varies(torch.zeros(2, 1), 1)


def test_what_is_contracted_is_a_row_or_a_column() -> None:
    where = numbers()
    assert role_of(where, 2, 1) == "column"
    assert role_of(where, 1, 2) == "row"
    assert role_of(where, 0, 1) == "mixed"
    folded = {name: w.flatten(1) for name, w in where.items()}
    assert role_of(folded, 1, 0) is None  # both run along it
    assert role_of({name: w[:, :1, :1] for name, w in where.items()}, 2, 1) == "column"  # of a single one, the keys


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_the_line_of_an_axis(order: tuple[int, ...]) -> None:
    where = numbers(order)
    assert line_of(where, order.index(1)) == "row"
    assert line_of(where, order.index(2)) == "column"


def test_the_line_of_an_axis_of_size_one_is_what_no_other_is() -> None:
    single = {"row": torch.zeros(1, 1, dtype=torch.int64).expand(1, 4), "column": COLUMNS[None]}
    assert line_of(single, 0) == "row" and line_of(single, 1) == "column"


@pytest.mark.parametrize(("axis", "name"), [(-1, "keys"), (-2, "queries")])
def test_weights_sum_to_one_along_keys_or_queries(axis: int, name: str) -> None:
    weights = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0)).log().softmax(axis)
    assert sums_to_one(weights) == sums_to_one(weights.bfloat16()) == name
    assert sums_to_one(weights * 1.1) is None
    signed = torch.tensor([[1.5, -0.5], [0.2, 0.8]])
    assert sums_to_one(signed) is None and sums_to_one(signed.mT) is None  # negative ones are no probabilities
    assert sums_to_one(torch.ones(2, 3, 1)) is None and sums_to_one(torch.ones(0, 3, 3)) is None


def test_matrices_are_put_in_the_order_of_their_numbers() -> None:
    numbered = torch.tensor([2, 0, 1])
    order = order_of(numbered)
    assert order is not None and numbered[order].tolist() == [0, 1, 2]
    assert order_of(torch.arange(3)) is None  # they are
    assert order_of(torch.tensor([2, 0])) is None  # one is missing


def softmax(x: Tensor, over: int, where: dict[str, Tensor]) -> Softmax:
    return Softmax("attn", tuple(x.shape), over, where, TensorWeakRef(x))


@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize("over", ["keys", "queries"])
def test_matrices_are_laid_as_heads_queries_keys_whatever_their_order(order: tuple[int, ...], over: str) -> None:
    weights = torch.rand(2, 3, 4)
    given = weights.permute(order)
    it = softmax(given, order.index(2 if over == "keys" else 1), numbers(order))
    found, axes = laying(it, over, "column", None, ROWS.expand(2, 3), COLUMNS.expand(2, 4))
    assert axes == (2,)
    assert torch.equal(found(given), weights)


def test_rows_and_columns_that_are_wanted_in_another_order_or_are_absent() -> None:
    weights = torch.rand(2, 3, 4)
    rows, columns = torch.tensor([2, 5, 0]).expand(2, 3), torch.tensor([3, 1, 7, 0]).expand(2, 4)
    lay, _ = laying(softmax(weights, 2, numbers()), "keys", "column", None, rows, columns)
    expected = torch.zeros(2, 3, 4)
    for i, row in enumerate(rows[0].tolist()):
        for j, column in enumerate(columns[0].tolist()):
            if row < 3 and column < 4:
                expected[:, i, j] = weights[:, row, column]
    assert torch.equal(lay(weights), expected)


def test_matrices_that_are_wanted_in_another_order() -> None:
    weights = torch.rand(2, 3, 4)
    it = softmax(weights, 2, numbers())
    lay, axes = laying(it, "keys", "column", torch.tensor([1, 0]), ROWS.expand(2, 3), COLUMNS.expand(2, 4))
    assert axes == (2,) and torch.equal(lay(weights), weights.flip(0))


@pytest.mark.parametrize("q", [2, 3])
def test_each_query_with_keys_of_its_own_is_a_matrix_of_one_row(q: int) -> None:
    weights = torch.rand(q, 4)
    where = {"column": COLUMNS.expand(q, 4)}
    lay, axes = laying(softmax(weights, 1, where), "keys", "column", None, ROWS[:q, None], COLUMNS.expand(q, 4))
    assert axes == (q,) and torch.equal(lay(weights), weights[:, None])


def test_one_shape_is_spread_over_another() -> None:
    x = torch.empty(2, 3, 4)
    for small in ((3, 1), (2, 1, 4), (4,), (), (2, 3, 4)):
        assert broadcasts(torch.empty(small), x)
    for other in ((2, 1), (1, 2, 3, 4), (3,)):
        assert not broadcasts(torch.empty(other), x)
