"""Maps by name: what their numbers mean beside each other."""

import pytest
import torch
import torch.nn.functional as F

from multicam import Maps, MulticamError
from multicam.maps import resized, shares, shares_of


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


def test_shares_are_of_the_evidence_with_its_sign_whatever_the_size_of_a_map() -> None:
    maps = Maps({
        "rgb": torch.tensor([[[4.0, -9.0]], [[-1.0, -1.0]], [[0.0, 1.0]], [[0.0, 0.0]]]),
        "depth": torch.tensor([[[7.5]], [[-3.0]], [[0.0]], [[0.0]]]),
    })  # fmt: skip
    assert maps.shares().tolist() == [[-0.25, 0.75], [-0.25, -0.75], [1.0, 0.0], [0.0, 0.0]]
    assert maps.signed and shares_of({"ours": maps}) == "percentages are shares of the evidence, with its sign"
    cut = Maps({name: m.relu() for name, m in maps.items()})
    torch.testing.assert_close(cut.shares()[:2], torch.tensor([[2 / 9.5, 7.5 / 9.5], [0.0, 0.0]]))
    assert not cut.signed and shares_of({"": cut}) == "percentages are shares of the positive evidence"
    both = shares_of({"a": cut, "b": maps, "c": cut}, "interaction")
    assert both == "percentages are shares of the positive interaction (a, c) and of the interaction, with its sign (b)"
    assert shares_of({}) == ""


def test_what_cancels_has_no_share_that_rounding_makes() -> None:
    cells = torch.rand(1, 64, 64, generator=torch.Generator().manual_seed(0))
    cancelled = cells - cells.mean()
    assert cancelled.mean() != 0  # as computed, by rounding
    assert Maps({"rgb": cancelled, "depth": -cancelled}).shares().tolist() == [[0.0, 0.0]]
    assert Maps({"rgb": cancelled + 1e-3, "depth": 0 * cancelled}).shares().tolist() == [[1.0, 0.0]]


def test_shares_need_numbers_that_compare() -> None:
    two = {"rgb": torch.ones(2, 1, 2), "depth": torch.ones(2, 3)}
    with pytest.raises(MulticamError, match="the maps of 'rgb', 'depth' do not compare"):
        Maps(two, comparable=False).shares()
    assert Maps({"rgb": torch.ones(1, 2)}, comparable=False).shares().tolist() == [[1.0]]
    with pytest.raises(MulticamError, match="the map 'depth' has NaN or infinite values in sample 1"):
        Maps(two | {"depth": torch.tensor([[1.0], [torch.inf]])}).shares()
    with pytest.raises(MulticamError, match=r"NaN or infinite has no share: \[\[1.0, nan\]\]"):
        shares(torch.tensor([[1.0, torch.nan]]))


def test_the_sizes_of_shares_add_up_also_where_their_sum_overflows() -> None:
    amounts = torch.tensor([[3e38, -3e38], [1e-40, 3e-40], [0.0, 0.0]])
    torch.testing.assert_close(shares(amounts), torch.tensor([[0.5, -0.5], [0.25, 0.75], [0.0, 0.0]]))
    assert shares(amounts.double()).dtype == torch.float64


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
