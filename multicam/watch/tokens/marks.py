"""The companions of the tensors of a pass: token ids, and what the rules need of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from multicam.call.inputs import frames_second
from multicam.watch.tokens.places import LOST, Lattice, Places

Shape = Sequence[int]
Pads = tuple[tuple[int, int], ...]


class Mark:
    """The companion of a tensor; shared by tensors with the same ids.

    Attributes:
        shape: The shape of the ids.
        lattice: The grids that a tensor `(*lead c *grid)` is, where it is known without looking at the ids.
        pads: How many entries along each axis surround them.
        inner: The companion before these were added.
        open: Whether a tensor `(b n c)` may be features of n tokens, a signal along c, or an image: the next operation tells.
    """

    def __init__(
        self,
        ids: np.ndarray | Callable[[], np.ndarray],
        shape: Shape = (),
        lattice: Lattice | None = None,
        pads: Pads = (),
        inner: "Mark | None" = None,
        open: bool = False,
    ) -> None:
        self._ids = ids
        self.shape = ids.shape if isinstance(ids, np.ndarray) else tuple(shape)
        self.lattice = lattice
        self.pads = pads
        self.inner = inner
        self.open = open

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

    Args:
        axes: See `Places`.
    """

    def __init__(self, axes: Mapping[str, tuple[int, ...]]) -> None:
        self.places = Places(axes)
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


def layout_of(x: Any) -> "tuple[tuple[int, ...], Callable[[Marks, str, Tensor], Mark]] | None":
    """Which axes of space a leaf has, and how its companion is made; None for a leaf that is not followed."""
    if not isinstance(x, Tensor) or x.layout is not torch.strided or x.is_nested or not x.numel():
        return None
    if x.ndim == 2:
        return ((2,), _vector if x.is_floating_point() else _words)
    if x.ndim == 3:
        return ((1, 2), _features if x.is_floating_point() else _plane)
    return {4: ((1, 2), _channels_last if channels_are_last(x) else _image), 5: ((0, 1, 2), _clip)}.get(x.ndim)


def _words(origins: Marks, name: str, x: Tensor) -> Mark:
    return Mark(origins.places.lay(origins.places.whole(name, len(x), (x.shape[1],))).reshape(x.shape))


def _vector(origins: Marks, name: str, x: Tensor) -> Mark:
    lattice = origins.places.whole(name, len(x), tuple(x.shape[1:]))
    rows = Lattice(lattice.samples, lattice.inputs, lattice.boxes, (), ())
    return Mark(partial(_laid, origins.places, rows, (len(x), 1)), (len(x), 1), lattice, open=True)


def _plane(origins: Marks, name: str, x: Tensor) -> Mark:
    return Mark(origins.places.lay(origins.places.whole(name, len(x), tuple(x.shape[1:]))).reshape(x.shape))


def _features(origins: Marks, name: str, x: Tensor) -> Mark:
    lattice = origins.places.whole(name, len(x), tuple(x.shape[1:]))
    rows = Lattice(lattice.samples, lattice.inputs, lattice.boxes, (1,), lattice.grid[:1])
    shape = (*x.shape[:2], 1)
    return Mark(partial(_laid, origins.places, rows, shape), shape, lattice, open=True)


def _image(origins: Marks, name: str, x: Tensor) -> Mark:
    return lay_images(origins, origins.places.whole(name, len(x), tuple(x.shape[2:])), x.shape[:1])


def _channels_last(origins: Marks, name: str, x: Tensor) -> Mark:
    lattice = origins.places.whole(name, len(x), tuple(x.shape[1:3]))
    shape = (*x.shape[:3], 1)
    return Mark(partial(_laid, origins.places, lattice, shape), shape)


def channels_are_last(x: Tensor) -> bool:
    """Whether an image is `(b h w c)`: its last axis may be colour, and the others are too long for that."""
    return x.ndim == 4 and x.shape[-1] in (1, 3, 4) and min(x.shape[1:3]) >= 8


def _clip(origins: Marks, name: str, x: Tensor) -> Mark:
    clip = frames_second(x)
    lattice = origins.places.whole(name, len(x), tuple(clip.shape[2:]))
    return (
        lay_images(origins, lattice, x.shape[:1]) if clip is x else lay_images(origins, frames_of(lattice), x.shape[:2])
    )


def frames_of(lattice: Lattice) -> Lattice:
    """The cells along the first axis as rows of their own."""
    frames = Lattice(lattice.samples, lattice.inputs, lattice.boxes, lattice.axes[:1], lattice.grid[:1])
    return Lattice(*frames.cells(), lattice.axes[1:], lattice.grid[1:])


def lay_images(origins: Marks, lattice: Lattice, lead: Shape) -> Mark:
    """The companion of images `(*lead c *grid)` whose rows are the grids of a lattice."""
    shape = (*lead, 1, *lattice.grid)
    return Mark(partial(_laid, origins.places, lattice, shape), shape, lattice)


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


def same_rows(a: Lattice, b: Lattice) -> bool:
    """Whether two lattices are the same."""
    same = a.grid == b.grid and a.axes == b.axes and np.array_equal(a.samples, b.samples)
    return same and bool(np.abs(a.boxes - b.boxes).max() < 1e-6)


def lay_rows(origins: Marks, lattice: Lattice, lead: Shape) -> Mark:
    """The companion of a tensor `(*lead *grid)` whose rows are the grids of a lattice."""
    shape = (*lead, *lattice.grid)
    return Mark(partial(_laid, origins.places, lattice, shape), shape, lattice)
