"""Where on which input the tokens of one forward pass lie."""

from collections.abc import Mapping, Sequence
from itertools import permutations
from math import ceil, prod

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from multicam.errors import MulticamError
from multicam.watch.reshape import Grid
from multicam.watch.tokens.lattices import Lattice

LOST, CONSTANT = -1, 0
_MIXED, _OWN, _LOCAL = 0, 1, 2  # how much an id says about place: nothing, the whole input or no input, a part of it
_NEAR = 1e-6  # of an input's side
_PAIR = 1 << 31  # more than there are ids in a pass


class Places:
    """The table behind the token ids of one forward pass.

    An id is an index into the table: `sample[id]`, `boxes[id]`. Two ids are none: -1 for a token whose place is not known,
    0 for a constant, such as padding. A token of the model's own (a class token, a query) stands for no input.

    Attributes:
        names: The inputs.

    `BY_AXES` is the name, on top of those of the inputs, for what stands for a place of whatever it comes from by its axes alone: a convolution made it
    of entries whose own places were lost.

    Args:
        sizes: The size of each input along its axes of places, of which the last is x, the one before it y, then z: of words the number, of images
            height and width.

    Example:
        >>> places = Places({"rgb": (32, 48)})
        >>> ids = torch.from_numpy(places.lay(places.whole("rgb", samples=1, grid=(2, 3))))
        >>> places.cells(ids[3:], "rgb")
        ((2, 3), tensor([3, 4, 5]))
        >>> places.describe(ids)
        'rgb 2 x 3'
    """

    BY_AXES = ""

    def __init__(self, sizes: Mapping[str, Sequence[int]]) -> None:
        self.names = tuple(sizes)
        self._most = max([3, *map(len, sizes.values())])  # axes
        self.sizes = {name: tuple(size) for name, size in sizes.items()}
        self._bits = {name: 1 << i for i, name in enumerate(self.names)} | {self.BY_AXES: 1 << 62}
        self._n = 1
        self._sample = np.full(1024, -1)
        self._inputs = np.zeros(1024, np.int64)
        self._level = np.zeros(1024, np.int64)
        self._boxes = np.repeat([0.0, 1.0], self._most)[:, None].repeat(1024, axis=1)
        self._known: dict[bytes, np.ndarray] = {}
        self._slots: dict[int, tuple[int, int]] = {}  # of own tokens that nothing attends to yet: which one of how many
        self._one: dict[
            int, int
        ] = {}  # of own tokens that became one: the token they became, or the next on the way there

    def __len__(self) -> int:
        return self._n

    @property
    def sample(self) -> Int[Tensor, "n"]:
        """The sample of each id from 0 on; -1 for constants."""
        return torch.from_numpy(self._sample[: self._n])

    @property
    def inputs(self) -> Int[Tensor, "n"]:
        """Which inputs each id stands for: bit `i` is `names[i]`."""
        return torch.from_numpy(self._inputs[: self._n])

    @property
    def boxes(self) -> Float[Tensor, "n 6"]:
        """`(z0 y0 x0 z1 y1 x1)` of each id as fractions of its inputs; axes in front of these are left out."""
        half = self._most
        return torch.from_numpy(self._boxes[[*range(half - 3, half), *range(2 * half - 3, 2 * half)], : self._n].T)

    def inputs_of(self, token: int) -> tuple[str, ...]:
        """The names of the inputs that a token stands for; none for the model's own and for lost ones."""
        mask = self._inputs[token] if token > 0 else 0
        return tuple(name for i, name in enumerate(self.names) if mask >> i & 1)

    def axes(self, name: str) -> int:
        """How many axes of space an input has."""
        return len(self.sizes[name])

    def tell(self, name: str, size: Sequence[int]) -> None:
        """From now on an input has these sizes along its axes of places; tokens of it must not have been laid before."""
        self.sizes[name] = tuple(size)

    def _axes(self, name: str) -> tuple[int, ...]:
        n = self._most if name == self.BY_AXES else len(self.sizes[name])
        return tuple(range(self._most - n, self._most))

    def select(self, ids: Int[Tensor, "*n"], onto: str) -> Bool[Tensor, "*n"]:
        """Which tokens stand for the input `onto`, alone or together with others."""
        bit = 1 << self.names.index(onto)
        return (ids > 0) & ((self.inputs[ids.clamp(min=0).cpu()] & bit) != 0).to(ids.device)

    def cells(self, ids: Int[Tensor, "n"], onto: str) -> tuple[Grid, Int[Tensor, "n"]]:
        """The grid that the boxes of these tokens tile on an input, and the cell of each, counted flat.

        Some cells may be absent: those of masked tokens, or of all windows but one.

        Args:
            ids: The tokens, each for another part of the input.
            onto: The input.

        Returns:
            The number of cells along each axis of the input, and for each token its cell in that grid, row by row.

        Raises:
            MulticamError: If the tokens have no such grid.
        """
        remedy = f'; where the model\'s code tells the place, say it with layouts={{"{onto}": tokens(rows, columns, prefix=…)}}'
        try:
            sides, flat = self.tiling(ids.cpu().numpy(), onto)
        except MulticamError as error:
            raise MulticamError(f"{error}{remedy}") from None
        if (np.array(sides) > 1 - _NEAR).all():
            raise MulticamError(f"each token stands for the whole of {onto!r}, so it has no place on it{remedy}")
        if len(np.unique(flat)) != len(flat):
            raise MulticamError(f"several of the tokens stand for the same part of {onto!r}{remedy}")
        return cells_of(sides), torch.from_numpy(flat)

    def tiling(self, ids: np.ndarray, onto: str) -> tuple[tuple[float, ...], np.ndarray]:
        """The sides of the tokens' boxes along each axis of an input, in fractions of it, and the cell of each among all that have such sides.

        Raises:
            MulticamError: If the boxes tile nothing.
        """
        lost = int((~self._stand_for(ids, onto)).sum())
        if lost or not len(ids):
            raise MulticamError(
                f"{lost} of {len(ids)} tokens do not stand for input {onto!r} as far as could be followed: "
                f"{self.describe(torch.from_numpy(ids))}"
            )
        axes = np.array(self._axes(onto))
        table = self._boxes[:, ids]
        low, high = table[axes], table[axes + self._most]
        side = (high - low).max(1, keepdims=True)
        # What is merged with padding stands for a smaller part, at the edge of the input.
        whole = (np.abs(high - low - side) < _NEAR) | (np.abs(high - 1) < _NEAR)
        if not whole.all():
            sizes = sorted({" x ".join(f"{x:.3g}" for x in column) for column in (high - low).T})
            raise MulticamError(
                f"the tokens cover parts of {onto!r} of {len(sizes)} sizes (in fractions of it: {', '.join(sizes[:4])}), "
                "so they are no grid"
            )
        # Equal boxes are a grid if they begin at whole multiples of their side: cell = low / side along each axis. A last cell that the input cuts
        # short (1 / side is no whole number) counts as a whole one.
        index = np.rint(low / side)
        if np.abs(low / side - index).max() > 0.01:
            raise MulticamError(f"the tokens' parts of {onto!r} lie beside a grid of their size")
        sides = tuple(map(float, side[:, 0]))
        grid = cells_of(sides)
        if (index < 0).any() or (index >= np.array(grid)[:, None]).any():
            raise MulticamError(f"some of the tokens' parts of {onto!r} lie outside of it")
        return sides, np.ravel_multi_index(tuple(index.astype(np.int64)), grid)

    def on(self, ids: np.ndarray, onto: str) -> np.ndarray:
        """Which tokens stand for a part of an input, and which for the whole where none stands for a part."""
        there = self._stand_for(ids, onto)
        local = there & (self._level[ids] == _LOCAL)
        return local if local.any() else there

    def _stand_for(self, ids: np.ndarray, onto: str) -> np.ndarray:
        found: np.ndarray = (ids > 0) & (self._inputs[ids] & self._bits[onto] != 0)
        return found

    def has_parts(self, ids: np.ndarray) -> bool:
        """Whether any of these tokens stands for a part of an input."""
        return bool(((ids > 0) & (self._level[ids] == _LOCAL)).any())

    def describe(self, ids: Int[Tensor, "*n"]) -> str:
        """The tokens of one row in words: `1 own + rgb 14 x 14`."""
        flat = ids.flatten().cpu()
        mask = self.inputs[flat.clamp(min=0)]
        kinds = torch.where(flat < 0, -2, torch.where(flat == 0, -1, mask)).tolist()
        return (
            " + ".join(self._part(kind, flat[torch.tensor(kinds) == kind]) for kind in dict.fromkeys(kinds)) or "none"
        )

    def _part(self, kind: int, ids: Tensor) -> str:
        n = len(ids)
        if kind <= 0:
            return f"{n} {('own', 'constant', 'unknown')[-kind]}"
        names = self.inputs_of(int(ids[0]))
        label = " and ".join(names)
        if bool((torch.from_numpy(self._level)[ids] == _OWN).all()):
            return f"{n} of the whole {label}"
        try:
            grid, flat = self.cells(ids, names[0])
        except MulticamError:
            return f"{n} of {label}"
        places = np.unravel_index(flat.numpy(), grid)
        if grid[1:] == (1,):  # features (b n c) might have been an image
            grid, places = grid[:1], places[:1]
        window = tuple(int(np.ptp(place)) + 1 for place in places)
        full = " x ".join(map(str, grid))
        if n == prod(grid):
            return f"{label} {full}"
        return f"{label} {' x '.join(map(str, window)) if n == prod(window) else n} of {full}"

    # What follows is for `multicam.watch.tokens.origins`, on arrays.

    def add(self, samples: np.ndarray, inputs: np.ndarray, boxes: np.ndarray) -> np.ndarray:
        """Fresh ids `(n,)` for these samples `(n,)`, bit masks `(n,)` and boxes `(2a n)`."""
        start, stop = self._n, self._n + len(samples)
        if stop > len(self._sample):
            room = max(stop, 2 * len(self._sample)) - len(self._sample)
            self._sample, self._inputs, self._level = (
                np.pad(column, (0, room)) for column in (self._sample, self._inputs, self._level)
            )
            self._boxes = np.pad(self._boxes, ((0, 0), (0, room)))
        self._n = stop
        everything = ((boxes[: self._most] < _NEAR) & (boxes[self._most :] > 1 - _NEAR)).all(0)
        self._sample[start:stop] = samples
        self._inputs[start:stop] = inputs
        self._boxes[:, start:stop] = boxes
        self._level[start:stop] = np.where((inputs == 0) | everything, _OWN, _LOCAL)
        return np.arange(start, stop)

    def unite(self, names: Sequence[str]) -> None:
        """From now on the tokens of each of these inputs stand for all of them: they are one tensor."""
        bits = sum(1 << self.names.index(name) for name in names)
        self._bits |= dict.fromkeys(names, bits)

    def fresh(self, samples: np.ndarray) -> np.ndarray:
        """Fresh ids for tokens of the model's own, of these samples, in their shape; lost where the sample is negative."""
        flat = samples.reshape(-1)
        boxes = np.repeat([0.0, 1.0], self._most)[:, None].repeat(flat.size, axis=1)
        ids = self.add(flat, np.zeros(flat.size, np.int64), boxes)
        n = samples.shape[-1]
        self._slots |= {token: (i % n, n) for i, token in enumerate(ids.tolist())}
        return np.where(flat < 0, LOST, ids).reshape(samples.shape)

    def attended(self, ids: Int[Tensor, "..."]) -> None:
        """Take note that something attends to these tokens: what becomes one with them later was not read with them."""
        for token in torch.unique(ids).tolist():
            self._slots.pop(token, None)

    def one(self, ids: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """The ids with own tokens that became one as one.

        A learned query that reads several inputs by several attentions is another token in each; where their results are added, or mixed channel by
        channel, they are one token that read all of them.
        """
        return torch.tensor([self._root(token) for token in ids.tolist()], dtype=ids.dtype, device=ids.device)

    def whole(self, name: str, samples: int, grid: Grid) -> Lattice:
        """A grid over the whole of an input, for each sample."""
        bit = np.full(samples, self._bits[name])
        boxes = np.repeat([0.0, 1.0], self._most)[:, None].repeat(samples, axis=1)
        return Lattice(np.arange(samples), bit, boxes, self._axes(name)[-len(grid) :] if grid else (), grid)

    def lay(self, lattice: Lattice) -> np.ndarray:
        """Fresh ids for the cells of a lattice, flat."""
        samples, inputs, boxes = lattice.cells()
        ids = self.add(samples, inputs, boxes)
        off = (boxes[: self._most] > 1 - _NEAR).any(0) | (boxes[self._most :] < _NEAR).any(0)
        return np.where(off, CONSTANT, ids) if off.any() else ids

    def samples(self, ids: np.ndarray) -> np.ndarray:
        """The sample of each id, -1 for lost ones and constants."""
        return np.where(ids < 0, -1, self._sample[ids])

    def union(self, ids: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
        """One id for all along some axes, which stay with size 1: what covers the boxes of all.

        Constants do not count, nor do own tokens and tokens of whole inputs where others have a place. The ids of several
        samples have no union, nor have lost ones.
        """
        moved = np.moveaxis(ids, axes, range(-len(axes), 0))
        rows = moved.reshape(prod(moved.shape[: -len(axes)]), -1)
        # A union is asked for again and again with the same ids: in every layer, and for every channel. The same ids in any order have the same
        # one, so a row's key is the sum of well mixed ids (64 bits: two of a million rows have the same with a probability of 3e-8).
        keys, first, back = np.unique(_mixed(rows).sum(1), return_index=True, return_inverse=True)
        key = b"union" + keys.tobytes()
        if key not in self._known:
            self._known[key] = self._union(rows[first])
        shape = [1 if axis in axes else size for axis, size in enumerate(ids.shape)]
        return self._known[key][back.reshape(-1)].reshape(shape)

    def _union(self, rows: np.ndarray) -> np.ndarray:
        # Of each row only the ids that say most about place count: parts of inputs before whole inputs and own tokens, these before constants. One
        # counted id is the union itself (least == most); several are a new one, whose box is the smallest around theirs.
        level = self._level[rows] * (rows > 0)
        counted = (level == level.max(1, keepdims=True)) & (level > 0)
        least = np.where(counted, rows, np.iinfo(np.int64).max).min(1)
        most = np.where(counted, rows, 0).max(1)
        sample = self._sample[rows]
        one = np.where(level > 0, sample, -1).max(1)
        mixed = (level > 0) & (sample != one[:, None])
        lost = (rows < 0).any(1) | mixed.any(1)
        new = ~lost & (most > least)
        result = np.where(lost, LOST, np.where(most > 0, least, CONSTANT))
        if new.any():
            rows, counted = rows[new], counted[new]
            boxes = [
                np.where(counted, side[rows], 2.0).min(1)
                if i < self._most
                else np.where(counted, side[rows], -2.0).max(1)
                for i, side in enumerate(self._boxes)
            ]
            inputs = np.bitwise_or.reduce(np.where(counted, self._inputs[rows], 0), axis=1)
            result[new] = self.add(one[new], inputs, np.stack(boxes))
            for i in np.flatnonzero(inputs == 0) if self._slots else ():
                self._become(int(result[new][i]), np.unique(rows[i][counted[i]]).tolist())
        return result

    def _become(self, token: int, several: Sequence[int]) -> None:
        """Make one of own tokens that are the same one of equally many, as far as nothing attends to them yet."""
        slots = {self._slots.get(other) for other in several}
        if len(slots) > 1 or None in slots:
            return
        self._slots[token] = self._slots[several[0]]
        for other in several:
            if (root := self._root(other)) != self._root(token):
                self._one[root] = self._root(token)

    def _root(self, token: int) -> int:
        while token in self._one:
            token = self._one[token]
        return token

    def joined(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """What becomes of ids that meet in an element-wise operation, by the rules in `multicam.watch.tokens.origins`."""
        # Few different pairs meet, in tensors of many entries: each pair is one number, and the rules are asked once for each.
        codes, back = np.unique((a + 1) * _PAIR + (b + 1), return_inverse=True)
        key = b"joined" + codes.tobytes()
        if key not in self._known:
            self._known[key] = self._joined(codes // _PAIR - 1, codes % _PAIR - 1)
        return np.asarray(self._known[key][back]).reshape(np.broadcast_shapes(a.shape, b.shape))

    def _joined(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        # Whoever says more about place wins. Two parts (`both`) that differ are
        # - the same box of different inputs (`near`): a token of all these inputs, unless one of the two is that already;
        # - different boxes of the same inputs: the smallest box around both;
        # - else, parts of different inputs at different places: the first stays.
        level_a, level_b = self._level[a] * (a > 0), self._level[b] * (b > 0)
        result = np.where(level_b > level_a, b, a)
        both = (level_a == level_b) & (level_a == _LOCAL) & (a != b)
        near = np.abs(self._boxes[:, a] - self._boxes[:, b]).max(0) < _NEAR
        inputs_a, inputs_b = self._inputs[a], self._inputs[b]
        inputs = inputs_a | inputs_b
        result = np.where(both & near & (inputs == inputs_b) & (inputs != inputs_a), b, result)
        new = both & np.where(near, (inputs != inputs_a) & (inputs != inputs_b), inputs_a == inputs_b)
        mixed = (level_a > 0) & (level_b > 0) & (self._sample[a] != self._sample[b])
        new &= ~mixed
        for i in np.flatnonzero((level_a == _OWN) & (level_b == _OWN) & (a != b) & ~mixed) if self._slots else ():
            self._become(int(a[i]), [int(a[i]), int(b[i])])
        if new.any():
            first, second = self._boxes[:, a[new]], self._boxes[:, b[new]]
            half = self._most
            boxes = np.concatenate([np.minimum(first[:half], second[:half]), np.maximum(first[half:], second[half:])])
            result[new] = self.add(self._sample[a[new]], inputs[new], boxes)
        return np.where(mixed | (a < 0) | (b < 0), LOST, result)

    def lattice(self, ids: np.ndarray) -> tuple[Lattice, tuple[tuple[int, int], ...]] | None:
        """The lattice that ids `(rows *grid)` are, and how many constants surround it along each axis; None if none."""
        n = ids.ndim - 1
        pads = []
        for axis in range(1, n + 1):
            filled = np.flatnonzero((ids != CONSTANT).any(tuple(i for i in range(n + 1) if i != axis)))
            if not len(filled):
                return None
            pads.append((int(filled[0]), ids.shape[axis] - 1 - int(filled[-1])))
        inner = ids[(slice(None), *(slice(p, size - q) for (p, q), size in zip(pads, ids.shape[1:], strict=True)))]
        rows = inner.reshape(len(ids), -1)
        first = rows[:, :1]
        if (rows <= 0).any() or (self._sample[rows] != self._sample[first]).any():
            return None
        if (self._inputs[rows] != self._inputs[first]).any():
            return None
        # A grid lies over its outermost cells. Which axis of the tensor is which of the input is tried out, the usual order first: the cells of
        # the right lattice are these boxes.
        table = self._boxes[:, rows]
        half = self._most
        boxes = np.concatenate([table[:half].min(2), table[half:].max(2)])
        for axes in sorted(permutations(range(half), n), key=_unusual):
            found = Lattice(self._sample[first[:, 0]], self._inputs[first[:, 0]], boxes, axes, inner.shape[1:])
            if np.abs(found.cells()[2] - table.reshape(2 * half, -1)).max() < _NEAR:
                return found, tuple(pads)
        return None


def cells_of(sides: tuple[float, ...]) -> Grid:
    """How many cells with these sides, in fractions of an input, cover it."""
    return tuple(ceil(1 / side - 0.01) for side in sides)


def _mixed(ids: np.ndarray) -> np.ndarray:
    """64 bits for each id that look random (the finalizer of SplitMix64, Steele et al. 2014)."""
    z = ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _unusual(axes: tuple[int, ...]) -> tuple[bool, tuple[int, ...]]:
    return axes != tuple(sorted(axes)), tuple(-axis for axis in axes)
