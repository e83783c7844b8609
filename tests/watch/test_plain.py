"""The memory of tensors of every kind, each number once."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from multicam.watch.plain import address, has_memory, is_same, is_usual, plain, same_bytes, sampled
from tests.helpers.wrapped import Wrapped


def nested(layout: torch.layout) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are new
        return torch.nested.nested_tensor([torch.rand(2), torch.rand(3)], layout=layout)


def quantised() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are old
        return torch.quantize_per_tensor(torch.rand(9), 0.1, 0, torch.quint8)


@pytest.mark.parametrize(
    ("make", "numbers"),
    [
        (lambda: torch.rand(2, 3), [6]),
        (lambda: nn.Parameter(torch.rand(2, 3)), [6]),
        (lambda: torch.rand(2, 3)[:, 1:], [4]),
        (lambda: torch.rand(1, 3).expand(5, 3), [3]),
        (lambda: torch.rand(()).expand(5, 3), [1]),
        (lambda: torch.rand(0, 3), []),
        (lambda: torch.rand(3, device="meta"), []),
        (lambda: torch.eye(3).to_sparse(), [6, 3]),
        (lambda: nested(torch.strided), [5]),
        (lambda: Wrapped(torch.rand(4)), [4]),
        (lambda: Wrapped(Wrapped(torch.rand(4))), [4]),
        (quantised, [9]),
        (lambda: torch.zeros(4, dtype=torch.uint8).view(torch.uint4), [4]),
    ],
)
def test_plain_tensors_hold_each_number_once(make: Callable[[], Tensor], numbers: list[int]) -> None:
    assert [memory.numel() for memory in plain(make())] == numbers


def test_plain_tensors_show_the_memory_itself() -> None:
    x = torch.rand(3, dtype=torch.complex64)
    for each in (x.conj(), x.conj().imag, x.expand(2, 3), Wrapped(x)):
        (memory,) = plain(each)
        assert address(memory) == address(x) and not memory.is_conj() and not memory.is_neg()
    assert 5 in [memory.numel() for memory in plain(nested(torch.jagged))]


def test_which_tensors_have_memory() -> None:
    assert has_memory(torch.rand(2)) and not has_memory(torch.rand(2, device="meta"))
    assert not has_memory(nested(torch.strided)) and not has_memory(torch.eye(2).to_sparse())
    seen: list[bool] = []
    torch.vmap(lambda x: seen.append(has_memory(x)) or x)(torch.rand(2))
    assert seen == [False]


def test_bytes_tell_numbers_apart_that_are_equal_and_nan_is_nan() -> None:
    nan = torch.tensor([1.0, float("nan")])
    assert same_bytes(nan, nan.clone()) and not same_bytes(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert same_bytes(torch.rand(4, 5).T[1:3], torch.rand(0)) is False
    x = torch.rand(4, 5)
    assert same_bytes(x.T[1:3], x.T[1:3].clone()) and same_bytes(torch.tensor(1), torch.tensor(1))


@pytest.mark.parametrize("x", [torch.rand(70, 100), torch.rand(9, 9, 9, 9).transpose(0, 3), torch.rand(9000)[::2]])
def test_samples_are_few_and_change_with_the_tensor(x: Tensor) -> None:
    few = sampled(x)
    assert 16 <= few.numel() <= 300 and few.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    before = few.clone()
    x.mul_(2)
    assert torch.equal(few, 2 * before)


def test_a_tensor_that_shows_something_else_is_not_the_same() -> None:
    x = torch.rand(3, 4)
    alias = x.data
    assert is_usual(x) and is_same(x, alias)
    x.t_()
    assert not is_usual(x) and not is_same(x, alias)
    x.data = torch.rand(3, 4)
    assert is_usual(x) and not is_same(x, alias)
    x.data = alias.half()
    assert not is_same(x, alias)
    assert not is_same(torch.eye(2).to_sparse(), alias)  # that cannot be told
    assert is_same(Wrapped(x), alias)
