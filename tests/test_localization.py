"""Measures of maps against values by hand, and SciPy."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy, spearmanr

from multicam import MulticamError
from multicam.localization import agreement, complexity, energy_inside, names_input, pointing_game, sparseness

MAP = torch.tensor([[[0.0, 3.0], [1.0, -4.0]]])
LEFT, TOP = torch.tensor([[[True, False], [True, False]]]), torch.tensor([[[True, True], [False, False]]])


def test_pointing_by_hand() -> None:
    assert pointing_game(MAP, TOP).tolist() == [True]
    assert pointing_game(MAP, LEFT).tolist() == [False]
    assert energy_inside(MAP, TOP).tolist() == [0.75]
    assert energy_inside(MAP, LEFT).tolist() == [0.25]


def test_a_map_without_evidence_hits_nothing() -> None:
    """Ties and empty maps count as hits elsewhere: an even map would then do better than chance."""
    assert pointing_game(torch.zeros(1, 2, 2), TOP).tolist() == [False]
    assert energy_inside(torch.zeros(1, 2, 2), TOP).tolist() == [0.0]
    assert pointing_game(torch.zeros(1, 2, 2), torch.ones(1, 2, 2, dtype=torch.bool)).tolist() == [True]


def test_an_empty_region_is_refused() -> None:
    """Quantus writes NaN into an array of bools, which reads as a hit."""
    regions = torch.cat([TOP, torch.zeros_like(TOP)])
    for measure in (pointing_game, energy_inside):
        with pytest.raises(MulticamError, match="the region of sample 1 is empty"):
            measure(MAP.expand(2, -1, -1), regions)
        with pytest.raises(MulticamError, match="are not as large as the maps"):
            measure(MAP, TOP[:, :1])


def test_the_largest_evidence_names_the_input() -> None:
    maps = {"rgb": torch.tensor([[[1.0, 1.0]], [[9.0, -9.0]]]), "depth": torch.tensor([[[3.0]], [[3.0]]])}
    assert names_input(maps, "depth").tolist() == [True, False]
    assert names_input(maps, "rgb").tolist() == [False, True]
    even = {name: torch.ones(1, 2, 2) for name in ("rgb", "depth")}
    assert names_input(even, "rgb").tolist() == names_input(even, "depth").tolist() == [False]
    with pytest.raises(MulticamError, match="there is no map of input 'text'"):
        names_input(maps, "text")


@given(st.lists(st.floats(0, 1e3, width=32), min_size=2, max_size=30))
def test_sparseness_and_complexity_are_their_definitions(values: list[float]) -> None:
    x = torch.tensor(values)
    found = sparseness(x.view(1, 1, -1))
    total = x.double().sum()
    if total > 0:
        pairs = (x.double()[:, None] - x.double()[None]).abs().sum()
        torch.testing.assert_close(found.double(), (pairs / (2 * len(x) * total)).view(1), atol=1e-5, rtol=1e-4)
        assert complexity(x.view(1, 1, -1)).item() == pytest.approx(entropy(x.double().numpy()), abs=1e-4)
    else:
        assert found.item() == 0


@given(st.lists(st.integers(0, 5), min_size=3, max_size=20), st.integers(0, 99))
def test_agreement_is_scipys(values: list[int], seed: int) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    y = torch.randint(5, x.shape, generator=torch.Generator().manual_seed(seed)).float()
    found = agreement(x.view(1, 1, -1), y.view(1, 1, -1)).item()
    if x.unique().numel() > 1 and y.unique().numel() > 1:
        assert found == pytest.approx(spearmanr(x.numpy(), y.numpy()).statistic, abs=1e-6)
    else:
        assert found == 0


def test_maps_of_two_shapes_cannot_agree() -> None:
    with pytest.raises(MulticamError, match="maps of one shape can agree"):
        agreement(MAP, MAP[:, :1])
