"""Whatever the texts and the shapes of tiles, nothing overlaps and everything is aligned."""

from itertools import combinations, pairwise

import pytest
import torch

from multicam.figures.tiles import Tile, figure
from tests.helpers.pictures import axes


@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (3, 6), (16, 2)])
@pytest.mark.parametrize("size", [(8, 8), (8, 60), (60, 8)])
def test_nothing_overlaps_or_leaves_the_page(columns: int, rows: int, size: tuple[int, int]) -> None:
    tile = Tile(torch.rand(3, *size), torch.rand(size), caption="a longer caption 100 %")
    other = Tile(torch.rand(3, 8, 8))
    picture = figure(
        [[tile, other, tile, other][r % 2 : r % 2 + 1] * columns for r in range(rows)],
        columns=[f"a method with a name {c // 2}" for c in range(columns)],
        rows=["a label of several words that has to be wrapped"] * rows,
        title="a title that is longer than the page is wide when there is but one column",
        width=14.0,
    )
    page = picture.figure.bbox
    assert page.width <= 14.001 * picture.figure.dpi
    boxes = [text.get_window_extent() for text in picture.figure.texts if text.get_text()]
    boxes += [a.get_window_extent() for a in picture.figure.axes]
    slack = 2.0  # pixels: glyphs reach a little over their line
    for box in boxes:
        assert box.x0 >= -slack and box.y0 >= -slack and box.x1 <= page.width + slack and box.y1 <= page.height + slack
    for a, b in combinations(boxes, 2):
        across, down = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert across <= slack or down <= slack


def test_tiles_of_a_row_and_of_a_column_are_aligned_and_undistorted() -> None:
    picture = figure([[Tile(torch.rand(3, 6, 9)), Tile(map=torch.rand(12, 18))]] * 2, rows=["a", "b"])
    a, b, c, d = (axis.get_window_extent() for axis in axes(picture, "tile"))
    assert a.y0 == pytest.approx(b.y0) and a.x0 == pytest.approx(c.x0) and b.x1 == pytest.approx(d.x1)
    assert all(box.width / box.height == pytest.approx(1.5) for box in (a, b, c, d))


def test_tiles_of_any_shape_keep_it_in_the_middle_of_their_place() -> None:
    sizes = [(6, 9), (8, 8), (9, 6), (4, 20)]
    picture = figure([[Tile(torch.rand(3, *size)) for size in sizes], [Tile(torch.rand(3, 8, 8)) for _ in sizes]])
    boxes = [axis.get_window_extent() for axis in axes(picture, "tile")]
    shapes = [width / height for height, width in sizes] + [1.0] * 4
    assert [box.width / box.height for box in boxes] == pytest.approx(shapes)
    above, below = boxes[:4], boxes[4:]
    assert [box.x0 + box.x1 for box in above] == pytest.approx([box.x0 + box.x1 for box in below])
    assert all(left.x1 < right.x0 for left, right in pairwise(above))
    assert len({round(box.y0 + box.y1) for box in above}) == len({round(box.y0 + box.y1) for box in below}) == 1
