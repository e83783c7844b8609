"""Measures of maps against values by hand, and SciPy."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy, spearmanr

from multicam import MulticamError
from multicam.metrics.localization import agreement, complexity, energy_inside, names_input, pointing_game, sparseness

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


@settings(deadline=None)
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


@settings(deadline=None)
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


def test_sparseness_and_complexity_by_hand() -> None:
    values = torch.tensor([[[1.0, -2.0], [3.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]]])
    assert sparseness(values).tolist() == pytest.approx([2 * (1 + 4 + 9 + 16) / (4 * 10) - 5 / 4, 0.0])
    shares = [0.1, 0.2, 0.3, 0.4]
    assert complexity(values).tolist() == pytest.approx([-sum(p * math.log(p) for p in shares), 0.0])


def test_quantus_finds_the_same() -> None:
    """The numbers of Quantus 0.6.0 for whole regions, with `abs=False, normalise=False` and the absolute or positive values given."""
    maps = torch.cos(3 * torch.arange(32.0)).view(2, 4, 4)
    left = torch.zeros(2, 4, 4, dtype=torch.bool)
    left[..., :2] = True
    assert sparseness(maps).tolist() == pytest.approx([0.331376, 0.139324], abs=1e-5)  # Sparseness
    assert complexity(maps).tolist() == pytest.approx([2.575331, 2.736205], abs=1e-5)  # Complexity
    assert pointing_game(maps, left).tolist() == [True, False]  # PointingGame
    assert energy_inside(maps, left).tolist() == pytest.approx([0.524264, 0.518703], abs=1e-5)  # RelevanceMassAccuracy


def test_measures_are_the_same_in_any_batch() -> None:
    g = torch.Generator().manual_seed(0)
    maps, others = torch.randn(4, 6, 6, generator=g), torch.randn(4, 6, 6, generator=g)
    regions = torch.rand(4, 6, 6, generator=g) > 0.5
    for found in (
        lambda s: pointing_game(maps[s], regions[s]),
        lambda s: energy_inside(maps[s], regions[s]),
        lambda s: sparseness(maps[s]),
        lambda s: complexity(maps[s]),
        lambda s: agreement(maps[s], others[s]),
    ):
        torch.testing.assert_close(torch.cat([found([i]) for i in (2, 0, 3, 1)]), found([2, 0, 3, 1]))


def test_a_map_that_is_no_number_points_nowhere() -> None:
    assert not pointing_game(torch.full((1, 2, 2), torch.nan), torch.ones(1, 2, 2, dtype=torch.bool))


def test_one_truth_for_each_sample():
    maps = {"rgb": torch.tensor([[[1.0, 1.0]], [[9.0, -9.0]], [[0.0, 0.0]]]), "depth": torch.tensor([[[3.0]], [[3.0]], [[0.0]]])}  # fmt: skip
    assert names_input(maps, ["depth", "rgb", "rgb"]).tolist() == [True, True, False]
    assert names_input(maps, ["rgb", "depth", "depth"]).tolist() == [False, False, False]
    with pytest.raises(MulticamError, match="2 names of inputs for 3 samples"):
        names_input(maps, ["rgb", "depth"])
    with pytest.raises(MulticamError, match="there is no map of input 'text'"):
        names_input(maps, ["rgb", "text", "rgb"])
