"""The companions of the tensors of a pass: token ids, and what the rules need of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from multicam.watch.tokens.lattices import Lattice
from multicam.watch.tokens.places import LOST, Places

Shape = Sequence[int]
Pads = tuple[tuple[int, int], ...]


class Mark:
    """The companion of a tensor; shared by tensors with the same ids.

    Attributes:
        shape: The shape of the ids.
        lattice: The grids that a tensor `(*lead c *grid)` is, where it is known without looking at the ids.
        pads: How many entries along each axis surround them.
        inner: The companion before these were added.
        lost_by: The operation that lost the places, and where; empty where none did.
    """

    lost_by = ""

    def __init__(
        self,
        ids: np.ndarray | Callable[[], np.ndarray],
        shape: Shape = (),
        lattice: Lattice | None = None,
        pads: Pads = (),
        inner: "Mark | None" = None,
    ) -> None:
        self._ids = ids if callable(ids) else np.asarray(ids)
        self.shape = ids.shape if isinstance(ids, np.ndarray) else tuple(shape)
        self.lattice = lattice
        self.pads = pads
        self.inner = inner

    @property
    def ids(self) -> np.ndarray:
        """The ids; those of pixels are made when somebody asks for them."""
        if not isinstance(self._ids, np.ndarray):
            self._ids = self._ids()
        return self._ids

    def at(self, ndim: int) -> "Mark":
        """The same with axes of size 1 in front, as broadcasting adds them."""
        if len(self.shape) == ndim:
            return self
        return Mark(self.ids.reshape((1,) * (ndim - len(self.shape)) + self.shape))


class Marks:
    """The companions of the tensors of one pass.

    Attributes:
        places: Where the tokens lie.
        batch: The number of samples.
        by_axes: Whether a convolution of what was lost has places again, corner to corner, see `Places.BY_AXES`.

    Args:
        sizes: See `Places`.
        batch: The number of samples.
    """

    def __init__(self, sizes: Mapping[str, Sequence[int]], batch: int) -> None:
        self.places = Places(sizes)
        self.batch = batch
        self.by_axes = False
        self._marks: Any = WeakTensorKeyDictionary()
        self._made: dict[tuple[Mark, Any], Mark] = {}

    def once(self, mark: Mark, how: Any, make: Callable[[], Mark]) -> Mark:
        """What becomes of a companion in an operation, so that the same operation again makes the same ids."""
        # Here and not with the companion: what is made may read its ids when they are asked for, and that would be a cycle.
        if (mark, how) not in self._made:
            self._made[mark, how] = make()
        return self._made[mark, how]

    def mark(self, x: Any) -> Mark | None:
        """The companion of a tensor; None for what is not followed."""
        return self._marks.get(x) if isinstance(x, Tensor) else None


def frames_of(lattice: Lattice) -> Lattice:
    """The cells along the first axis as rows of their own."""
    frames = Lattice(lattice.samples, lattice.inputs, lattice.boxes, lattice.axes[:1], lattice.grid[:1])
    return Lattice(*frames.cells(), lattice.axes[1:], lattice.grid[1:])


def lay_images(places: Places, lattice: Lattice, lead: Shape) -> Mark:
    """The companion of images `(*lead c *grid)` whose rows are the grids of a lattice."""
    shape = (*lead, 1, *lattice.grid)
    return Mark(partial(_laid, places, lattice, shape), shape, lattice)


def by_axes(origins: Marks, out: Tensor, n: int) -> Mark | None:
    """The companion of what a convolution over n axes made of lost entries; None where it stays lost."""
    if not origins.by_axes or len(out) != origins.batch:
        return None
    lattice = origins.places.whole(Places.BY_AXES, origins.batch, tuple(out.shape[-n:]))
    return lay_images(origins.places, lattice, out.shape[:1])


def _laid(places: Places, lattice: Lattice, shape: Shape) -> np.ndarray:
    # Of the places only: who holds the companions would be held by them in a cycle.
    return places.lay(lattice).reshape(shape)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def lost_like(out: Tensor) -> Mark | None:
    """Lost, for values; indices and conditions are not followed."""
    return Mark(np.full((1,) * out.ndim, LOST)) if out.is_floating_point() or out.is_complex() else None


def is_lost(mark: Mark) -> bool:
    """Whether a companion knows nothing."""
    return prod(mark.shape) == 1 and bool((mark.ids == LOST).all())


def compressed(ids: np.ndarray) -> np.ndarray:
    """The ids with size 1 along axes over which they are constant."""
    for axis in range(ids.ndim):
        first = ids.take([0], axis)
        if (ids == first).all():
            ids = first
    return ids


def to_numpy(index: Tensor) -> np.ndarray:
    """An index as an array, of size 1 along expanded axes."""
    thin = index.detach()[tuple(slice(1) if stride == 0 else slice(None) for stride in index.stride())]
    return thin.cpu().numpy()


def broadcast(ids: np.ndarray, shape: Shape, *axes: int) -> np.ndarray:
    """The ids with some axes at their full size."""
    return np.broadcast_to(ids, [shape[a] if a in axes else size for a, size in enumerate(ids.shape)])


def viewed(ids: np.ndarray, old: Shape, new: Shape) -> np.ndarray:
    """The companion after a view: groups of axes with equal products are matched, constant groups stay so."""
    before: list[int] = []
    after: list[int] = []
    i = j = 0
    while i < len(old) or j < len(new):
        start, begin = i, j
        left, right = prod(old[i : i + 1]), prod(new[j : j + 1])
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                left, i = left * old[i], i + 1
            else:
                right, j = right * new[j], j + 1
        i, j = min(i, len(old)), min(j, len(new))
        sizes = ids.shape[start:i]
        constant = prod(sizes) == 1
        alone = i - start == j - begin == 1
        before += sizes if constant or alone else old[start:i]
        after += [1] * (j - begin) if constant else sizes if alone else new[begin:j]
    # Broadcasting to the same shape would cost as much as all the rest.
    return (ids if list(ids.shape) == before else np.broadcast_to(ids, before)).reshape(after)


class Operation(NamedTuple):
    """An operation that has run: its arguments, and the tensor (or list of tensors) that came out."""

    origins: Marks
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    out: Any

    def get(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by its place or name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def mark(self, position: int = 0) -> Mark | None:
        """The companion of an argument."""
        return self.origins.mark(self.args[position])


Rule = Callable[[Operation], Any]  # the companion of what came out, or a list for several tensors


def lose(op: Operation) -> list[Mark | None]:
    """For what has no rule."""
    return [lost_like(x) for x in tensors_in(op.out)]


def same_marks(a: Mark, b: Mark) -> bool:
    """Whether two companions are equal, as far as can be told without making the ids of pixels."""
    if a is b or (a.lattice and b.lattice):
        return a is b
    return a.shape == b.shape and np.array_equal(a.ids, b.ids)


def lay_rows(origins: Marks, lattice: Lattice, lead: Shape) -> Mark:
    """The companion of a tensor `(*lead *grid)` whose rows are the grids of a lattice."""
    shape = (*lead, *lattice.grid)
    return Mark(partial(_laid, origins.places, lattice, shape), shape, lattice)
