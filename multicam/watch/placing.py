"""From the token ids of a layer's output to its grid: which entries stand for which place of an input."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from multicam.errors import MulticamError
from multicam.maps import resized
from multicam.watch.reshape import Grid
from multicam.watch.tokens.marks import Mark, compressed
from multicam.watch.tokens.places import CONSTANT, LOST, Places, cells_of


class SampleAxis(NamedTuple):
    """Which axis of a tensor holds the samples.

    Attributes:
        axis: Its number.
        each: How many of its entries belong to one sample.
        apart: Whether they lie as many apart as there are samples, as `torch.cat` of whole batches puts them, and not side by side.
    """

    axis: int
    each: int
    apart: bool


@dataclass(frozen=True, eq=False)
class Placed:
    """A reshape from a layer's output to the grid of an input, as a pass showed it: `(b c *grid)`.

    Attributes:
        onto: The input.
        size: The input's, along its axes of space.
        only: Whether the output stands for places of this input alone.
        by_axes: Whether the places themselves were lost, and the grid is that of a convolution behind, which lies corner to corner on the input.
        sides: Of each cell, along the axes of the input, in fractions of it.
        shape: That of the output in the pass.
        samples: Where its samples are; None where the pass had a single one, which does not tell.
        along: The axes of one sample that the places lie on, where `samples.axis` counts for its own part of that axis. All others are channels.
        cells: Which entry of these axes, counted flat, each cell is, or -1 where there is none `(b m cells)`; `b` is 1 where all samples are alike,
            and where a cell has several entries, those are channels, too.
    """

    onto: str
    size: tuple[int, ...]
    only: bool
    by_axes: bool
    sides: tuple[float, ...]
    shape: tuple[int, ...]
    samples: SampleAxis | None
    along: tuple[int, ...]
    cells: Int[Tensor, "b m cells"] = field(repr=False)

    @property
    def grid(self) -> Grid:
        """The number of cells along each axis of the input."""
        return cells_of(self.sides)

    def __call__(self, x: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """The grid `(b c *grid)` of an output.

        Raises:
            MulticamError: If the pass says nothing about such an output.
        """
        split = self._split(x)
        others = [axis for axis in range(split.ndim - 1) if axis not in self.along]
        flat = split.permute(0, *(axis + 1 for axis in (*others, *self.along)))
        flat = flat.reshape(len(split), prod(split.shape[axis + 1] for axis in others), -1)
        if not self._in_order:
            flat = self._taken(flat)
        return flat.reshape(len(split), -1, *self.grid)

    def laid(self, map: Float[Tensor, "b *grid"]) -> Float[Tensor, "b *size"]:
        """A map on the grid, at the size of the input; cells that reach over its edge are cut off there."""
        over = [round(side * cells * size) for side, cells, size in zip(self.sides, self.grid, self.size, strict=True)]
        laid = resized(map, over)
        for axis, size in enumerate(self.size):
            laid = laid.narrow(axis + 1, 0, size)
        return laid

    def same_entries(self, other: "Placed") -> bool:
        """Whether another input's grid has the same entries of the output in the same cells."""
        mine, theirs = ((each.sides, each.shape, each.samples, each.along) for each in (self, other))
        return mine == theirs and torch.equal(self.cells, other.cells)

    def _taken(self, flat: Shaped[Tensor, "b c n"]) -> Shaped[Tensor, "b c m cells"]:
        cells = self.cells.to(flat.device)
        if len(cells) not in (1, len(flat)):
            raise MulticamError(
                f"each of {len(cells)} samples has tokens at places of its own, which say nothing about those of {len(flat)}: explain one "
                "sample at a time"
            )
        at = cells.clamp(min=0).flatten(1)[:, None]
        taken = flat.gather(2, at.expand(len(flat), flat.shape[1], -1))
        taken = taken.view(*flat.shape[:2], *cells.shape[1:])
        if self._has_holes:
            taken = taken.where((cells >= 0)[:, None], taken.new_zeros(()))
        return taken

    @cached_property
    def _in_order(self) -> bool:
        sizes = list(self.shape)
        if self.samples is not None:
            sizes[self.samples.axis] = self.samples.each
        n = prod(sizes[axis] for axis in self.along)
        return self.cells.shape == (1, 1, n) and torch.equal(self.cells[0, 0], torch.arange(n))

    @cached_property
    def _has_holes(self) -> bool:
        return bool((self.cells < 0).any())

    def _split(self, x: Shaped[Tensor, "..."]) -> Shaped[Tensor, "b ..."]:
        """The output with the samples in front, and behind them the axes of one."""
        fits = x.ndim == len(self.shape)
        if self.samples is None:
            fits &= tuple(x.shape) == self.shape
        else:
            axis, each, apart = self.samples
            alike = all(a == b for i, (a, b) in enumerate(zip(x.shape, self.shape, strict=False)) if i != axis)
            fits &= alike and x.shape[axis] % each == 0
        if not fits:
            raise MulticamError(
                f"a pass told the places of input {self.onto!r} in a tensor {self.shape}, which says nothing about {tuple(x.shape)}"
            )
        if self.samples is None:
            return x[None]
        n = x.shape[axis] // each
        split = x.reshape(*x.shape[:axis], *((each, n) if apart else (n, each)), *x.shape[axis + 1 :])
        return split.movedim(axis + apart, 0)


def placed(mark: Mark, shape: tuple[int, ...], places: Places, batch: int, onto: str) -> Placed:
    """The grid of an input that the entries of a tensor of these ids stand for.

    Args:
        mark: The ids.
        shape: The tensor's.
        places: Where the tokens lie.
        batch: The number of samples of the pass.
        onto: The input.

    Raises:
        MulticamError: If there is none; the message says why.
    """
    ids = compressed(mark.ids)
    by_axes = not places.on(ids, onto).any()
    name = Places.BY_AXES if by_axes else onto
    chosen = places.on(ids, name)
    if not chosen.any():
        raise MulticamError(_none(ids, places, onto))
    axis = _sample_axis(places.samples(ids), chosen, shape, batch)
    split, chosen = (_of_samples(x, axis, batch) for x in (ids, chosen))
    sides, flat = places.tiling(split[chosen], name)
    size = places.sizes[onto]
    sides = sides[-len(size) :]  # all three axes, where nothing but the axes tells
    if not places.has_parts(split[chosen]) and chosen.sum() > batch:
        raise MulticamError(f"each of {int(chosen.sum()) // batch} entries stands for the whole of it")
    along = tuple(i for i in range(len(shape)) if split.shape[i + 1] > 1)
    cell = np.full(split.shape, -1)
    cell[chosen] = flat
    rows = [_entries(row, prod(cells_of(sides))) for row in cell.reshape(batch, -1)]
    most = max(len(row) for row in rows)
    rows = [np.pad(row, ((0, most - len(row)), (0, 0)), constant_values=-1) for row in rows]
    alike = all(np.array_equal(row, rows[0]) for row in rows[1:])
    only = not any(places.on(ids, other).any() for other in places.names if other != onto)
    return Placed(
        onto,
        size,
        only,
        by_axes,
        sides,
        tuple(shape),
        axis,
        along,
        torch.from_numpy(np.stack(rows[:1] if alike else rows)),
    )


def _entries(cell: np.ndarray, cells: int) -> np.ndarray:
    """From the cell of each entry to the entries of each cell `(m cells)`, in their order; -1 where a cell has fewer than others."""
    entries = np.flatnonzero(cell >= 0)
    entries = entries[np.argsort(cell[entries], kind="stable")]
    of, counts = np.unique(cell[entries], return_counts=True)
    nth = np.concatenate([np.arange(n) for n in counts]) if len(of) else of
    found = np.full((max(counts, default=1), cells), -1)
    found[nth, cell[entries]] = entries
    return found


def _none(ids: np.ndarray, places: Places, onto: str) -> str:
    """Why nothing stands for an input."""
    if (ids == LOST).all():
        return "where its entries come from was lost"
    if (ids == CONSTANT).all():
        return "its entries come from no input"
    return f"its entries stand for {places.describe(torch.from_numpy(ids.reshape(-1)))}, and none for {onto!r}"


def _sample_axis(samples: np.ndarray, chosen: np.ndarray, shape: tuple[int, ...], batch: int) -> SampleAxis | None:
    """Where the samples lie in a tensor; None for a single one."""
    if batch == 1:
        return None
    for found in _candidates(samples.shape, batch):
        index = np.arange(samples.shape[found.axis])
        expected = index % batch if found.apart else index // found.each
        expected = expected.reshape(-1, *[1] * (samples.ndim - 1 - found.axis))
        if (np.where(chosen, samples, expected) == expected).all():
            return found
    raise MulticamError(f"the samples do not lie along one axis of {shape}")


def _candidates(shape: tuple[int, ...], batch: int) -> Iterator[SampleAxis]:
    for axis, size in enumerate(shape):
        if size > 1 and size % batch == 0:
            each = size // batch
            yield from (SampleAxis(axis, each, apart) for apart in ((False, True) if each > 1 else (False,)))


def _of_samples(x: np.ndarray, axis: SampleAxis | None, batch: int) -> np.ndarray:
    """The samples in front, and the axes of one sample behind them."""
    if axis is None:
        return x[None]
    sizes = (axis.each, batch) if axis.apart else (batch, axis.each)
    split = x.reshape(*x.shape[: axis.axis], *sizes, *x.shape[axis.axis + 1 :])
    return np.moveaxis(split, axis.axis + axis.apart, 0)
