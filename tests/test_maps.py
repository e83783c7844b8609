"""Maps by name: what their numbers mean beside each other."""

import pytest
import torch
import torch.nn.functional as F

from multicam import Maps
from multicam.maps import resized


def test_maps_are_a_dict_that_says_its_numbers() -> None:
    maps = Maps({"rgb": torch.tensor([[[1.0, 4.0]]]), "depth": torch.zeros(1, 2, 2)}, comparable=False)
    assert isinstance(maps, dict) and list(maps) == ["rgb", "depth"]
    assert repr(maps) == "Maps(rgb: (1, 1, 2) mean 2.5 max 4, depth: (1, 2, 2) mean 0 max 0, comparable=False)"
    assert Maps({}).comparable


def test_on_one_scale_every_input_counts_alike_in_every_sample() -> None:
    maps = Maps({"rgb": torch.tensor([[[3.0, -1.0]], [[0.0, 0.0]]]), "ecg": torch.tensor([[8.0], [2.0]])}, False)
    scaled = maps.on_one_scale()
    assert scaled["rgb"].tolist() == [[[1.5, -0.5]], [[0.0, 0.0]]]  # an empty map stays empty
    assert scaled["ecg"].tolist() == [[1.0], [1.0]]
    assert not scaled.comparable


def test_what_compares_or_stands_alone_keeps_its_scale() -> None:
    two = Maps({"a": torch.ones(1, 2, 2), "b": 3 * torch.ones(1, 2, 2)})
    one = Maps({"a": 3 * torch.ones(1, 2, 2)}, comparable=False)
    assert two.on_one_scale() is two
    assert one.on_one_scale() is one


def test_shares_are_of_the_positive_evidence_whatever_the_size_of_a_map() -> None:
    maps = Maps({
        "rgb": torch.tensor([[[4.0, -9.0]], [[-1.0, -1.0]], [[0.0, 1.0]]]),
        "depth": torch.tensor([[[6.0]], [[-2.0]], [[0.0]]]),
    })  # fmt: skip
    assert maps.shares().tolist() == [[0.25, 0.75], [0.0, 0.0], [1.0, 0.0]]


@pytest.mark.parametrize(
    ("grid", "size", "mode"),
    [((5,), (8,), "linear"), ((3, 4), (6, 5), "bilinear"), ((2, 3, 2), (4, 2, 5), "trilinear")],
    ids=["signal", "image", "volume"],
)
def test_resizing_is_linear_between_the_middles_of_cells(
    grid: tuple[int, ...], size: tuple[int, ...], mode: str
) -> None:
    maps = torch.rand(2, *grid)
    assert torch.equal(resized(maps, size), F.interpolate(maps[:, None], size, mode=mode)[:, 0])
    ends = resized(torch.tensor([[0.0, 1.0]]), [4])
    assert ends.tolist() == [[0.0, 0.25, 0.75, 1.0]]
