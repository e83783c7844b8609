"""Regular grids of cells: what a tensor `(*lead c *grid)` covers of an input, without an id for each cell."""

from dataclasses import dataclass
from math import prod

import numpy as np

from multicam.watch.reshape import Grid


@dataclass(frozen=True)
class Lattice:
    """Regular grids of cells, one for each row of a tensor.

    Attributes:
        samples: The sample of each row `(rows,)`.
        inputs: The inputs of each row as a bit mask `(rows,)`.
        boxes: What each row's grid covers `(2a rows)`, from where to where along each of the axes of `Places`.
        axes: Which of these are the grid's.
        grid: How many cells there are along each.
    """

    samples: np.ndarray
    inputs: np.ndarray
    boxes: np.ndarray
    axes: tuple[int, ...]
    grid: Grid

    def cells(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Samples, inputs and boxes `(2a n)` of all cells, those of the first row first; cells off the input are constant."""
        rows, n, half = len(self.samples), prod(self.grid), len(self.boxes) // 2
        boxes = np.repeat(self.boxes, n, axis=1).reshape(2 * half, rows, *self.grid)
        for i, (axis, size) in enumerate(zip(self.axes, self.grid, strict=True)):
            along = np.arange(size + 1).reshape(-1, *[1] * (len(self.grid) - 1 - i)) / size
            low = self.boxes[axis].reshape(-1, *[1] * len(self.grid))
            side = self.boxes[axis + half].reshape(low.shape) - low
            boxes[axis], boxes[axis + half] = low + side * along[:-1], low + side * along[1:]
        return np.repeat(self.samples, n), np.repeat(self.inputs, n), boxes.reshape(2 * half, -1)

    def extended(self, pads: tuple[tuple[int, int], ...], grid: Grid) -> "Lattice":
        """`grid` cells over what these cells cover together with so many more of them before and behind each axis."""
        boxes, half = self.boxes.copy(), len(self.boxes) // 2
        for axis, size, (before, behind) in zip(self.axes, self.grid, pads, strict=True):
            side = (self.boxes[axis + half] - self.boxes[axis]) / size
            boxes[axis] -= before * side
            boxes[axis + half] += behind * side
        return Lattice(self.samples, self.inputs, boxes, self.axes, grid)


def same_rows(a: Lattice, b: Lattice) -> bool:
    """Whether two lattices are the same."""
    same = a.grid == b.grid and a.axes == b.axes and np.array_equal(a.samples, b.samples)
    return same and bool(np.abs(a.boxes - b.boxes).max() < 1e-6)
