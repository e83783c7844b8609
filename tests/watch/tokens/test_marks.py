"""The companions of tensors: ids of size one where they are constant, and what a view makes of them."""

from math import prod

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multicam.watch.tokens.marks import (
    Mark,
    broadcast,
    compressed,
    is_lost,
    lost_like,
    same_marks,
    to_numpy,
    viewed,
)
from multicam.watch.tokens.places import LOST

SIZES = st.lists(st.integers(1, 4), min_size=1, max_size=4)


def divided(sizes: list[int], cuts: list[bool]) -> list[int]:
    """Neighbouring axes merged where a cut is false."""
    merged = [sizes[0]]
    for size, cut in zip(sizes[1:], cuts, strict=False):
        if cut:
            merged.append(size)
        else:
            merged[-1] *= size
    return merged


@settings(deadline=None)
@given(
    SIZES,
    st.lists(st.booleans(), min_size=4, max_size=4),
    st.lists(st.booleans(), min_size=4, max_size=4),
    st.booleans(),
)
def test_a_view_of_thin_ids_is_the_view_of_all_of_them(
    sizes: list[int], cuts: list[bool], thin: list[bool], back: bool
) -> None:
    old, new = (divided(sizes, cuts), sizes) if back else (sizes, divided(sizes, cuts))
    shape = [1 if flat else size for size, flat in zip(old, thin, strict=False)]
    ids = np.arange(prod(shape)).reshape(shape)
    found = viewed(ids, old, new)
    expected = np.broadcast_to(ids, old).reshape(new)
    assert np.array_equal(np.broadcast_to(found, new), expected)


def test_a_view_keeps_constant_axes_thin() -> None:
    ids = np.arange(6).reshape(2, 3, 1)  # tokens with features
    assert viewed(ids, (2, 3, 8), (2, 3, 2, 4)).shape == (2, 3, 1, 1)
    assert viewed(ids, (2, 3, 8), (6, 8)).shape == (6, 1)
    assert viewed(ids, (2, 3, 8), (2, 24)).tolist() == np.repeat(ids[..., 0], 8, 1).tolist()


@settings(deadline=None)
@given(SIZES, st.integers(0, 100))
def test_compressed_ids_are_the_same_ids_and_as_thin_as_can_be(sizes: list[int], seed: int) -> None:
    ids = np.random.default_rng(seed).integers(0, 2, sizes)
    found = compressed(ids)
    assert np.array_equal(np.broadcast_to(found, ids.shape), ids)
    for axis, size in enumerate(found.shape):
        constant = bool((ids == ids.take([0], axis)).all())
        assert size == (1 if constant else ids.shape[axis])


def test_ids_of_pixels_are_made_once_and_when_somebody_asks() -> None:
    made = []

    def make() -> np.ndarray:
        made.append(1)
        return np.arange(4).reshape(2, 2)

    mark = Mark(make, (2, 2))
    assert mark.shape == (2, 2) and made == []
    assert mark.ids is mark.ids and made == [1]
    assert mark.at(2) is mark
    assert mark.at(4).ids.shape == (1, 1, 2, 2)


def test_lost_is_for_values_alone() -> None:
    lost = lost_like(torch.rand(2, 3))
    assert lost is not None and lost.ids.tolist() == [[LOST]] and is_lost(lost)
    assert lost_like(torch.ones(2, dtype=torch.int64)) is None and lost_like(torch.ones(2, dtype=torch.bool)) is None
    assert not is_lost(Mark(np.array([[LOST, LOST]]))) and not is_lost(Mark(np.array([3])))


def test_companions_are_equal_by_their_ids() -> None:
    a, b = Mark(np.array([[1, 2]])), Mark(np.array([[1, 2]]))
    assert same_marks(a, b) and same_marks(a, a)
    assert not same_marks(a, Mark(np.array([1, 2]))) and not same_marks(a, Mark(np.array([[1, 3]])))


def test_an_expanded_index_stays_thin() -> None:
    index = torch.arange(3)[:, None, None].expand(3, 4, 5)
    assert to_numpy(index).tolist() == [[[0]], [[1]], [[2]]]


def test_some_axes_at_their_full_size() -> None:
    ids = np.arange(6).reshape(2, 1, 3, 1)
    found = broadcast(ids, (2, 5, 3, 4), 2, 3)
    assert found.shape == (2, 1, 3, 4)
    assert np.array_equal(found, ids.repeat(4, 3))
