"""What is no tensor and may have one item for each sample."""

from array import array
from collections import UserList, deque
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

from multicam.call.items import all_alike, count, hides, taken
from tests.helpers.numbered import numbered


class Pair(NamedTuple):
    image: Any
    mask: Any


class Clips(list):
    note = ""


class Sizes(tuple):
    pass


SAMPLES = st.lists(st.integers(0, 3), min_size=1, max_size=7)
KINDS = (list, tuple, deque, UserList, Clips, Sizes, np.array, torch.tensor)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(st.lists(st.integers(), min_size=4, max_size=4), SAMPLES)
def test_items_are_taken_in_the_same_kind_of_value(kind: Any, values: list[int], samples: list[int]) -> None:
    values = [value % 1000 for value in values]
    given_value = kind(values)
    assert count(given_value) == 4
    found = taken(given_value, samples)
    assert type(found) is type(given_value)
    assert [int(x) for x in found] == [values[i] for i in samples]
    assert [int(x) for x in given_value] == values  # what was given is as it was
    assert all_alike(given_value) == (len(set(values)) == 1)


@settings(deadline=None)
@given(st.lists(st.integers(1, 5), min_size=4, max_size=4), SAMPLES)
def test_a_packed_sequence_is_taken_apart_and_packed_again(lengths: list[int], samples: list[int]) -> None:
    sequences = [torch.rand(n, 3) for n in lengths]
    packed = pack_sequence(sequences, enforce_sorted=False)
    assert count(packed) == 4
    found = taken(packed, samples)
    assert isinstance(found, PackedSequence)
    for i, sequence in zip(samples, unpack_sequence(found), strict=True):
        torch.testing.assert_close(sequence, sequences[i], rtol=0, atol=0)


def test_a_deque_may_grow_and_a_subclass_keeps_its_attributes() -> None:
    assert list(taken(deque(["a", "b"], maxlen=2), [1, 0, 1])) == ["b", "a", "b"]
    clips = Clips("ab")
    clips.note = "kept"
    assert taken(clips, [1]).note == "kept"
    assert taken(range(5, 8), [2, 0]) == [7, 5]


def test_arrays_are_taken_along_their_first_axis() -> None:
    array = np.arange(12).reshape(3, 2, 2)
    np.testing.assert_array_equal(taken(array, [2, 2, 0, 1]), array[[2, 2, 0, 1]])
    assert taken(np.array(["a", "b"]), [1]).tolist() == ["b"]
    assert taken(np.array([None, "b"], dtype=object), [1, 0]).tolist() == ["b", None]


@pytest.mark.parametrize(
    "value", ["ab", b"ab", {"a": 1, "b": 2}, {1, 2}, None, 2, torch.tensor(2.0), np.array(2.0), torch.Size([2, 2]), Pair(1, 2),
              torch.rand(2, 2).max(dim=1)],
    ids=numbered(),
)  # fmt: skip
def test_what_has_no_items(value: Any) -> None:
    assert count(value) is None


@pytest.mark.parametrize(
    ("value", "same"),
    [
        ([], True),
        (["a", "a"], True),
        ([{"n": 1}, {"n": 1}], True),
        ([{"n": 1}, {"m": 1}], False),
        ([np.zeros(2), np.zeros(2)], True),
        ([np.zeros(2), np.zeros(3)], False),
        ([torch.zeros(2), torch.zeros(2)], True),
        ([torch.zeros(2), torch.ones(2)], False),
        ([float("nan"), float("nan")], False),
        (np.array([[1, 2], [1, 2]]), True),
        (torch.tensor([[1, 2], [1, 3]]), False),
        (pack_sequence([torch.ones(2), torch.ones(2)]), True),
        (pack_sequence([torch.ones(2), torch.ones(1)]), False),
    ],
)
def test_whether_all_items_are_alike(value: Any, same: bool) -> None:
    assert all_alike(value) is same


class Hiding:
    def __init__(self, value: Any) -> None:
        self.value = value


@pytest.mark.parametrize(
    ("value", "hidden"),
    [
        (Hiding([1, 2]), True),
        (Hiding(np.zeros((2, 5))), True),
        (Hiding(Hiding([1, 2])), False),  # one level, as far as people's classes go
        (Hiding("ab"), False),
        (Hiding(np.array(2)), False),
        (MappingProxyType({"a": (1, 2)}), True),
        (array("i", [1, 2]), True),
        ([1, 2], False),  # a list hides nothing
        (torch.Size([1, 2]), False),
        ("ab", False),
        (None, False),
        ({1, 2}, False),
        (len, False),
        (torch.device("cpu"), False),
    ],
    ids=numbered(),
)
def test_what_may_have_items_that_nobody_knows_how_to_take(value: Any, hidden: bool) -> None:
    assert hides(value, 2) is hidden
    assert not hides(value, 3)
