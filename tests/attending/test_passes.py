"""The tokens of a pass: what is given to them as a map, and the queries that a caller means, by brute force on small grids."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from multicam import MulticamError
from multicam.attending.passes import Dense, Forward, checked_query, inputs_among
from multicam.watch.tokens.places import Places
from tests.helpers.placed import SIZES, own, places, tokens


def forward(of: Places) -> Forward:
    return Forward(0, 1, SIZES, of, {})


def amounts(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed))


def resized(grid: Tensor, size: tuple[int, ...]) -> Tensor:
    mode = ("linear", "bilinear", "trilinear")[len(size) - 1]
    return F.interpolate(grid[None, None], size, mode=mode, align_corners=False)[0]


@pytest.mark.parametrize(("name", "grid"), [("rgb", (2, 3)), ("words", (5,)), ("clip", (2, 3, 3))])
def test_a_map_is_the_amounts_in_units_of_the_input(name: str, grid: tuple[int, ...]) -> None:
    of = places()
    ids = tokens(of, name, *grid)
    given = amounts(len(ids))
    shuffled = torch.randperm(len(ids), generator=torch.Generator().manual_seed(1))
    found = forward(of).on_input(ids[shuffled], given[shuffled], name)
    torch.testing.assert_close(found, resized(given.view(grid) * len(ids), SIZES[name]))


def test_a_map_is_constant_where_a_token_lies_alone_and_its_mean_is_what_all_were_given() -> None:
    of = places()
    ids, given = tokens(of, "rgb", 8, 12), amounts(96)
    found = forward(of).on_input(ids, given, "rgb")
    torch.testing.assert_close(found, given.view(1, 8, 12) * 96)
    assert float(found.mean()) == pytest.approx(float(given.sum()))


def test_tokens_of_the_same_part_are_added_up_and_so_are_several_grids() -> None:
    of = places()
    coarse, again, fine = tokens(of, "rgb", 2, 3), tokens(of, "rgb", 2, 3), tokens(of, "rgb", 4, 6)
    first, second, third = amounts(6), amounts(6, 1), amounts(24, 2)
    found = forward(of).on_input(torch.cat([coarse, fine, again]), torch.cat([first, third, second]), "rgb")
    expected = resized((first + second).view(2, 3) * 6, (8, 12)) + resized(third.view(4, 6) * 24, (8, 12))
    torch.testing.assert_close(found, expected)


def test_other_inputs_own_tokens_and_those_of_the_whole_have_no_place_on_it() -> None:
    of = places()
    ids = torch.cat([own(of, 2), tokens(of, "rgb", 2, 3), tokens(of, "words", 5), tokens(of, "rgb", 1, 1)])
    given = amounts(len(ids))
    found = forward(of).on_input(ids, given, "rgb")
    torch.testing.assert_close(found, resized(given[2:8].view(2, 3) * 6, (8, 12)))
    with pytest.raises(MulticamError, match="none of the tokens stands for input 'clip': 2 own"):
        forward(of).on_input(ids, given, "clip")
    with pytest.raises(MulticamError, match="stands for the whole of 'rgb'"):
        forward(of).on_input(ids[-1:], given[-1:], "rgb")


def test_absent_tokens_are_given_nothing() -> None:
    of = places()
    ids, given = tokens(of, "rgb", 8, 12), amounts(96)
    kept = torch.arange(96) % 5 != 0
    expected = (given * kept).view(1, 8, 12) * 96
    torch.testing.assert_close(forward(of).on_input(ids[kept], given[kept], "rgb"), expected)


def test_the_inputs_that_tokens_stand_for_a_part_of() -> None:
    of = places()
    parts, whole = tokens(of, "words", 5), tokens(of, "rgb", 1, 1)
    ids = torch.cat([whole, own(of), parts, torch.tensor([0, -1])])
    assert forward(of).placed(ids) == ["words"]
    assert inputs_among(of, ids) == {"words", "rgb"}
    assert inputs_among(of, torch.tensor([0, -1])) == frozenset()


def test_a_grid_is_spread_over_its_input_as_a_density() -> None:
    of = places()
    grid = amounts(6).view(1, 2, 3)
    torch.testing.assert_close(forward(of).density(grid, "rgb"), resized(grid[0] * 6, (8, 12)))
    line = amounts(5).view(1, 5, 1)  # words that might have been an image
    torch.testing.assert_close(forward(of).density(line, "words"), line[..., 0] * 5)
    torch.testing.assert_close(forward(of).density(amounts(4)[None], "rgb"), amounts(4)[None] * 4)  # no map of it


def dense(of: Places, queries: Tensor, keys: Tensor, numbers: Tensor | None = None) -> Dense:
    matrix = torch.rand(2, len(queries), len(keys), generator=torch.Generator().manual_seed(3))
    return Dense("layer 'a'", forward(of), queries, keys, matrix, numbers)


def test_a_line_is_that_of_the_queries_that_are_meant() -> None:
    of = places()
    rgb, words, cls = tokens(of, "rgb", 2, 3), tokens(of, "words", 5), own(of)
    it = dense(of, torch.cat([words, cls, rgb, torch.tensor([0])]), tokens(of, "clip", 1, 2, 2))
    rows = it.matrix[0]
    assert torch.equal(it.line(3, None), rows[3]) and torch.equal(it.line(-1, None), rows[12])
    torch.testing.assert_close(it.line("mean", "rgb"), rows[6:12].mean(0))
    torch.testing.assert_close(it.line("mean", None), rows[:12].mean(0))  # padding asks nothing
    assert torch.equal(it.line("cls", None), rows[5])
    for y in range(8):
        for x in range(12):
            assert torch.equal(it.line((y, x), "rgb"), rows[6 + y // 4 * 3 + x // 4])


def test_a_pixel_means_the_smallest_token_that_covers_it() -> None:
    of = places()
    coarse, fine = tokens(of, "rgb", 1, 2), tokens(of, "rgb", 4, 6)
    it = dense(of, torch.cat([coarse, fine[:12]]), coarse)  # the lower half is covered by the coarse ones alone
    for y in range(8):
        for x in range(12):
            expected = 2 + y // 2 * 6 + x // 2 if y < 4 else x // 6
            assert it.at((y, x), None) == expected
    assert it.at((3.9, 11.5), "rgb") == 2 + 1 * 6 + 5
    for pixel in [(8, 0), (0, 12), (-1, 0)]:
        with pytest.raises(MulticamError, match=r"lies outside of input 'rgb' of 8 x 12"):
            it.at(pixel, "rgb")
    with pytest.raises(MulticamError, match=r"no query of layer 'a' covers pixel \(7, 0\) of 'rgb'"):
        dense(of, fine[:12], coarse).at((7, 0), None)


def test_queries_have_the_numbers_of_the_module_and_padding_none() -> None:
    of = places()
    words = tokens(of, "words", 5)
    it = dense(of, words, words, torch.tensor([4, 3, 5, 0]))
    assert [it.at(i, None) for i in (0, 1, 3, -1)] == [4, 3, 0, 0]
    with pytest.raises(MulticamError, match="query 2 of layer 'a' is padding"):
        it.at(2, None)
    with pytest.raises(MulticamError, match="layer 'a' has queries 0 to 3, not 4"):
        it.at(4, None)
    assert checked_query(-2, 2, "it") == -2


def test_the_keys_as_queries() -> None:
    of = places()
    rgb, words = tokens(of, "rgb", 2, 3), tokens(of, "words", 5)
    turned = dense(of, rgb, words, torch.tensor([1, 0])).transposed()
    assert torch.equal(turned.line(2, None), dense(of, rgb, words).matrix[0, :, 2])
    assert torch.equal(turned.queries, words) and torch.equal(turned.keys, rgb)
    assert turned.numbers is None and turned.key_numbers.tolist() == [1, 0]


def test_a_footprint_is_the_line_where_the_keys_are() -> None:
    of = places()
    rgb, words = tokens(of, "rgb", 2, 3), tokens(of, "words", 5)
    it = dense(of, words, torch.cat([rgb, words]))
    torch.testing.assert_close(it.footprint(1, "rgb"), resized(it.matrix[0, 1, :6].view(2, 3), (8, 12)))
    torch.testing.assert_close(it.footprint(1, "words"), it.matrix[:1, 1, 6:])


def test_what_a_query_cannot_be_is_said() -> None:
    of = places()
    it = dense(of, tokens(of, "rgb", 2, 3), tokens(of, "words", 5))
    with pytest.raises(MulticamError, match="no input 'rbg'; did you mean 'rgb'"):
        it.line(0, "rbg")
    with pytest.raises(MulticamError, match="no query of layer 'a' stands for input 'words': rgb 2 x 3 -> words 5"):
        it.line("mean", "words")
    with pytest.raises(MulticamError, match="no query of layer 'a' is the model's own"):
        it.line("cls", None)
    with pytest.raises(MulticamError, match='a query is "mean", "cls", a number or a pixel'):
        it.line("all", None)
    with pytest.raises(MulticamError, match="no query of layer 'a' stands for a part of an image 'words'"):
        it.at((0, 0), "words")
    both = dense(of, torch.cat([it.queries, tokens(places(), "rgb", 1, 1)]), it.keys)
    assert both.at((0, 0), None) == 0
    with pytest.raises(MulticamError, match=r"the queries of layer 'a' stand for \[\]: say whose pixel with of=…"):
        dense(of, it.keys, it.keys).at((0, 0), None)
