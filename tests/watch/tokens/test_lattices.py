"""Regular grids without an id for each cell: what their cells cover, and when two are the same."""

import numpy as np
import pytest

from multicam.watch.tokens.lattices import same_rows
from multicam.watch.tokens.places import Places


def test_lattices_are_the_same_by_what_their_cells_cover() -> None:
    places = Places({"x": (32, 32), "y": (32, 32)})
    lattice = places.whole("x", 2, (4, 6))
    assert same_rows(lattice, places.whole("y", 2, (4, 6)))
    part = lattice.extended(((0, -2), (0, 0)), (4, 6))
    for other in (places.whole("x", 2, (4, 5)), places.whole("x", 2, (5, 7)), places.whole("x", 3, (4, 6)), part):
        assert not same_rows(lattice, other) and not same_rows(other, lattice)


def test_cells_divide_what_a_row_covers() -> None:
    lattice = Places({"clip": (8, 32, 32)}).whole("clip", 2, (2, 2, 4))
    samples, inputs, boxes = lattice.cells()
    assert samples.tolist() == [0] * 16 + [1] * 16 and set(inputs) == {1}
    low, high = boxes[:3], boxes[3:]
    assert np.allclose(high - low, [[0.5], [0.5], [0.25]])
    assert low[:, :5].T.tolist() == [[0, 0, 0], [0, 0, 0.25], [0, 0, 0.5], [0, 0, 0.75], [0, 0.5, 0]]


def test_cells_put_around_have_the_side_of_those_inside() -> None:
    lattice = Places({"photo": (32, 32)}).whole("photo", 1, (4, 2))
    around = lattice.extended(((1, 2), (0, 0)), (7, 2))
    assert around.boxes[[1, 4], 0].tolist() == pytest.approx([-0.25, 1.5])
    low = around.cells()[2][1].reshape(7, 2)[:, 0]
    assert low.tolist() == pytest.approx([-0.25, 0, 0.25, 0.5, 0.75, 1, 1.25])
