"""From token ids to the cells of a grid, and what is refused."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from multicam import MulticamError
from multicam.watch.tokens.lattices import Lattice
from multicam.watch.tokens.places import Places

SIZES = {"rgb": (32, 32), "depth": (32, 32), "text": (5,), "clip": (8, 32, 32)}


def lay(places: Places, name: str, *grid: int, samples: int = 1) -> Tensor:
    return torch.from_numpy(places.lay(places.whole(name, samples, grid)))


@given(st.permutations(range(12)), st.integers(1, 12))
def test_cells_are_found_in_any_order_and_with_some_absent(order: list[int], kept: int) -> None:
    places = Places(SIZES)
    ids = lay(places, "rgb", 3, 4)
    grid, flat = places.cells(ids[order[:kept]], "rgb")
    assert grid == (3, 4)
    assert flat.tolist() == order[:kept]


@pytest.mark.parametrize(("name", "grid"), [("text", (7,)), ("rgb", (14, 9)), ("clip", (4, 3, 2))])
def test_an_input_has_as_many_axes_as_its_grid(name: str, grid: tuple[int, ...]) -> None:
    places = Places(SIZES)
    ids = lay(places, name, *grid, samples=3)
    n = len(ids) // 3
    for sample, row in enumerate(ids.split(n)):
        assert places.cells(row, name)[0] == grid
        assert torch.equal(places.cells(row, name)[1], torch.arange(n))
        assert (places.sample[row] == sample).all()
    assert places.describe(ids[:n]) == f"{name} {' x '.join(map(str, grid))}"


def test_the_table_grows_without_losing_rows() -> None:
    places = Places(SIZES)
    first = lay(places, "rgb", 2, 2)
    before = places.boxes[first].clone()
    more = lay(places, "depth", 100, 100, samples=2)
    assert torch.equal(places.boxes[first], before)
    for ids, name, samples in ((first, "rgb", [0]), (more, "depth", [0, 1])):
        assert places.select(ids, name).all() and places.sample[ids].unique().tolist() == samples
    assert places.describe(first) == "rgb 2 x 2" and places.describe(more[:10000]) == "depth 100 x 100"
    assert before.tolist()[1] == [0, 0, 0.5, 1, 0.5, 1]
    assert len(places) == len(places.sample) == len(places.inputs) == 1 + 4 + 20000


def test_tokens_stand_for_the_inputs_that_they_come_from() -> None:
    places = Places(SIZES)
    rgb, depth = lay(places, "rgb", 2, 2), lay(places, "depth", 2, 2)
    both = torch.from_numpy(places.joined(rgb.numpy(), depth.numpy()))
    ids = torch.cat([torch.tensor([-1, 0]), rgb[:1], depth[:1], both[:1]])
    assert [places.inputs_of(int(i)) for i in ids] == [(), (), ("rgb",), ("depth",), ("rgb", "depth")]
    assert places.select(ids, "depth").tolist() == [False, False, False, True, True]
    assert places.cells(both, "rgb")[1].tolist() == places.cells(both, "depth")[1].tolist() == [0, 1, 2, 3]


def test_what_meets_keeps_its_place() -> None:
    places = Places(SIZES)
    rgb, depth, fine = (lay(places, *args).numpy() for args in (("rgb", 2, 2), ("depth", 2, 2), ("rgb", 4, 1)))
    own = places.fresh(np.zeros(4, np.int64))
    whole = places.union(rgb, (0,)).repeat(4)
    nothing, lost = np.zeros(4, np.int64), np.full(4, -1)
    for local, other in ((rgb, own), (rgb, whole), (rgb, nothing), (depth, whole), (own, nothing)):
        assert np.array_equal(places.joined(local, other), local)
        assert np.array_equal(places.joined(other, local), local)
        assert (places.joined(lost, other) == -1).all()
    assert np.array_equal(places.joined(rgb, depth), places.joined(rgb, depth)), "the same pair is the same token"
    assert np.array_equal(places.joined(rgb, depth[[1, 0, 2, 3]])[:2], rgb[:2]), "parts of two inputs: the first"
    union = torch.from_numpy(places.joined(rgb[:1], fine[1:2]))
    assert places.boxes[union].tolist() == [[0, 0, 0, 1, 0.5, 1]]
    other_sample = lay(places, "rgb", 2, 2, samples=2).numpy()[4:]
    for mine in (rgb, own, whole):
        assert (places.joined(mine, other_sample) == -1).all() and (places.joined(other_sample, mine) == -1).all()


def test_a_union_covers_all_and_is_the_same_in_any_order() -> None:
    places = Places(SIZES)
    ids = lay(places, "rgb", 4, 4).numpy().reshape(2, 2, 2, 2)
    merged = places.union(ids, (1, 3))
    assert merged.shape == (2, 1, 2, 1)
    assert places.cells(torch.from_numpy(merged.reshape(-1)), "rgb") == ((2, 2), pytest.approx([0, 1, 2, 3]))
    assert np.array_equal(places.union(ids[:, ::-1], (1, 3)), merged)
    own = places.fresh(np.zeros((2, 1, 2, 1), np.int64))
    assert np.array_equal(places.union(np.concatenate([merged, own, 0 * own], 1), (1,)), merged), (
        "own tokens have no place"
    )
    mixed = lay(places, "rgb", 1, 2, samples=2).numpy().reshape(2, 2)
    assert places.union(mixed, (0,)).tolist() == [[-1, -1]]
    assert (places.union(mixed, (1,)) > 0).all()


def test_a_lattice_is_known_by_its_ids() -> None:
    places = Places(SIZES)
    ids = lay(places, "rgb", 4, 6, samples=2).numpy().reshape(2, 4, 6)
    lattice, pads = places.lattice(np.pad(ids, ((0, 0), (1, 0), (0, 2)))) or pytest.fail("a padded grid is one")
    assert (lattice.grid, lattice.axes, pads) == ((4, 6), (1, 2), ((1, 0), (0, 2)))
    windows = ids.reshape(2, 2, 2, 2, 3).transpose(0, 1, 3, 2, 4).reshape(8, 2, 3)
    found, _ = places.lattice(windows) or pytest.fail("each window is a grid")
    assert found.boxes[:, 1].tolist() == [0, 0, 0.5, 1, 0.5, 1]
    turned, _ = places.lattice(ids.transpose(0, 2, 1)) or pytest.fail("rows and columns may be exchanged")
    assert (turned.grid, turned.axes) == ((6, 4), (2, 1))
    assert np.array_equal(turned.cells()[2], places.boxes[ids.transpose(0, 2, 1).reshape(-1)].numpy().T)
    assert places.lattice(ids[:, [0, 2, 1, 3]]) is None
    for one, other in (ids, ids[::-1]):
        assert places.lattice(np.concatenate([one[:, :3], other[:, 3:]], axis=1)[None]) is None, "two samples"


def test_cells_beyond_the_input_are_padding() -> None:
    places = Places(SIZES)
    image = places.whole("rgb", 1, (8, 8))
    ids = torch.from_numpy(places.lay(image.extended(((0, 4), (0, 2)), (3, 3)))).view(3, 3)
    assert (ids > 0).tolist() == [[True] * 3, [True] * 3, [False] * 3]
    grid, flat = places.cells(ids[:2].flatten(), "rgb")
    assert grid == (2, 3)
    assert flat.tolist() == [0, 1, 2, 3, 4, 5]


def test_what_is_no_grid_is_refused() -> None:
    places = Places(SIZES)
    coarse, fine = lay(places, "rgb", 2, 2), lay(places, "rgb", 4, 4)
    whole = torch.from_numpy(places.union(fine.numpy(), (0,)))
    box = np.array([[0, 0.125, 0.25, 1, 0.375, 0.5]]).T
    beside = torch.from_numpy(places.lay(Lattice(np.zeros(1, int), np.ones(1, int), box, (1, 2), (1, 1))))
    for ids, onto, message in (
        (torch.cat([fine, coarse]), "rgb", r"of 'rgb' of 2 sizes .*0\.25 x 0\.25, 0\.5 x 0\.5"),
        (
            torch.tensor([-1, 3]),
            "rgb",
            r"1 of 2 tokens do not stand for input 'rgb'.*: 1 unknown \+ rgb 1 x 1 of 2 x 2",
        ),
        (coarse, "depth", r"4 of 4 tokens do not stand for input 'depth'.*: rgb 2 x 2"),
        (whole, "rgb", "the whole of 'rgb', so it has no place"),
        (torch.cat([fine, fine[:1]]), "rgb", "several of the tokens stand for the same part"),
        (beside, "rgb", "lie beside a grid"),
    ):
        with pytest.raises(MulticamError, match=message) as caught:
            places.cells(ids, onto)
        assert f'layouts={{"{onto}": tokens(rows, columns, prefix=…)}}' in str(caught.value)


def test_tokens_in_words() -> None:
    places = Places(SIZES)
    own = torch.from_numpy(places.fresh(np.zeros(2, np.int64)))
    rgb, text = lay(places, "rgb", 4, 4), lay(places, "text", 5)
    whole = torch.from_numpy(places.union(rgb.numpy(), (0,)))
    joint = torch.from_numpy(places.joined(rgb.numpy(), lay(places, "depth", 4, 4).numpy()))
    for ids, words in (
        (torch.cat([own, rgb, text]), "2 own + rgb 4 x 4 + text 5"),
        (rgb.view(4, 4)[1:3, 1:3].flatten(), "rgb 2 x 2 of 4 x 4"),
        (rgb[[0, 5, 9]], "rgb 3 of 4 x 4"),
        (torch.cat([whole, joint]), "1 of the whole rgb + rgb and depth 4 x 4"),
        (torch.tensor([-1, 0, 0]), "1 unknown + 2 constant"),
        (rgb[:0], "none"),
    ):
        assert places.describe(ids) == words
