"""Probes change every sample, and leave the range of its values to nobody."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from multicam.watch.probes import probe, shaken

VALUES = {
    "codes": torch.tensor([[4.0, 1.0, 7.0], [2.0, 2.0, 2.0]]),
    "ids": torch.tensor([[5, 3, 9], [1, 1, 1]]),
    "flags": torch.tensor([[True, False], [False, False]]),
    "zeros": torch.zeros(2, 3, 4, 4),
    "even": torch.full((2, 3, 4, 4), 0.5),
    "complex": torch.ones(2, 3, dtype=torch.complex64),
    "words": torch.rand(2, 5, 3),
}


@pytest.mark.parametrize("kind", VALUES)
def test_every_sample_is_changed_and_keeps_its_shape_and_type(kind: str) -> None:
    x = VALUES[kind]
    found = probe(x)
    assert found.shape == x.shape and found.dtype == x.dtype
    assert (found != x).reshape(len(x), -1).any(1).all()


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6).filter(any))
def test_codes_stay_codes_that_exist(codes: list[int]) -> None:
    for x in (torch.tensor([codes]), torch.tensor([codes], dtype=torch.float32)):
        found = probe(x)
        assert torch.equal(found, found.round())
        assert bool((found >= 0).all() and (found <= x).all())


def test_what_a_layer_returned_is_shaken_row_by_row() -> None:
    x: Tensor = torch.rand(1, 4, 3, 3)
    found = shaken(x, 2, torch.Generator().manual_seed(0))
    assert found.shape == (2, 4, 3, 3) and not torch.equal(found[0], found[1])
    assert bool((found != x).all())


def test_the_last_version_is_so_small_that_thresholds_are_crossed() -> None:
    x = 1 + torch.rand(1, 4, 8, 8)
    found = shaken(x, 3, torch.Generator().manual_seed(0))
    assert bool((found[:-1].mean((1, 2, 3)) > 0.8).all()) and found[-1].mean() < 0.3
