"""The tokens of one forward pass: amounts given to them as a map on an input, and attention between them as one matrix."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from multicam.errors import MulticamError, unknown
from multicam.maps import resized
from multicam.watch.reshape import Tokens
from multicam.watch.tokens.places import Places

Query = int | str | tuple[int | float, int | float]


@dataclass(frozen=True, eq=False)
class Forward:
    """One forward pass of a recording.

    Attributes:
        index: Which one, counted from 0.
        batch: How many samples it had; 0 where nobody knows.
        sizes: The size of each input along its spatial axes.
        places: Where its tokens lie.
        layouts: What the user said about the tokens of an input.
    """

    index: int
    batch: int
    sizes: Mapping[str, tuple[int, ...]]
    places: Places
    layouts: Mapping[str, Tokens]

    def on_input(self, tokens: Int[Tensor, " n"], amounts: Float[Tensor, " n"], onto: str) -> Float[Tensor, "1 *size"]:
        """What each token has been given, as a density on an input: its mean is the sum over the input's tokens.

        Tokens of the same part are added up, and so are the densities of several grids; tokens that stand for the whole of the
        input have no place on it where others have one. With amounts `a` on a grid of `n` cells the density is `n a` in each
        cell, laid on the input by linear interpolation: its mean is `sum a`, and grids of any size compare.

        Args:
            tokens: The ids of the tokens.
            amounts: What each of them has been given.
            onto: The input.

        Raises:
            MulticamError: If no token stands for the input, or the tokens have no grid.
        """
        of = self.places.select(tokens, onto)
        ids, amounts = tokens[of].cpu(), amounts[of]
        if not len(ids):
            raise MulticamError(f"none of the tokens stands for input {onto!r}: {self.places.describe(tokens)}")
        # Several ids may stand for one part: each attention of a learned query has another. Their amounts go to one of them.
        parts, at = torch.unique(self.places.boxes[ids].round(decimals=5), dim=0, return_inverse=True)
        amounts = amounts.new_zeros(len(parts)).index_add_(0, at.to(amounts.device), amounts)
        ids = ids.new_zeros(len(parts)).index_copy_(0, at, ids)
        # Parts of one size are a grid. Pyramids have several, each laid by itself; parts as large as the input count where there is nothing else.
        sizes, size_of = torch.unique(self._sides(ids), dim=0, return_inverse=True)
        local = [i for i, size in enumerate(sizes) if (size < 1).any()] or [0]
        return torch.stack([self._gridded(ids[size_of == i], amounts[size_of == i], onto) for i in local]).sum(0)

    def placed(self, tokens: Int[Tensor, " n"]) -> list[str]:
        """The inputs of which some of these tokens stand for a part."""
        parts = tokens[(self._sides(tokens.cpu()) < 1).any(1).to(tokens.device)]
        return [name for name in self.places.names if self.places.select(parts, name).any()]

    def density(self, grid_map: Float[Tensor, "1 *grid"], onto: str) -> Float[Tensor, "1 *size"]:
        """What each cell of a grid has been given, as a density on an input.

        Args:
            grid_map: The amounts `(1 *grid)`.
            onto: The input, of `sizes[onto]`.

        Returns:
            The density `(1 *size)`; on the grid itself where that has other axes than the input.
        """
        size = self.sizes[onto]
        while grid_map.ndim - 1 > len(size) and grid_map.shape[-1] == 1:
            grid_map = grid_map[..., 0]  # features (b n c) might have been an image
        density = grid_map * prod(grid_map.shape[1:])
        if len(size) != grid_map.ndim - 1:
            return density
        return resized(density, size)

    def _sides(self, ids: Tensor) -> Tensor:
        """How long the parts of these tokens are, rounded, so that equal ones are equal."""
        boxes = self.places.boxes[ids]
        return (boxes[:, 3:] - boxes[:, :3]).round(decimals=5)

    def _gridded(self, ids: Tensor, amounts: Tensor, onto: str) -> Tensor:
        grid, cells = self.places.cells(ids, onto)
        flat = amounts.new_zeros(prod(grid)).index_add_(0, cells.to(amounts.device), amounts)
        return self.density(flat.view(1, *grid), onto)


@dataclass(frozen=True, eq=False)
class Dense:
    """Attention over all tokens of one sample.

    Attributes:
        title: What it is, for messages.
        forward: The pass.
        queries: The ids of the rows.
        keys: The ids of the columns.
        matrix: `(heads queries keys)`.
        numbers: Which row each query of the module is, padding being behind the last; None: they are the rows.
        key_numbers: The same of keys and columns.
    """

    title: str
    forward: Forward
    queries: Int[Tensor, " queries"]
    keys: Int[Tensor, " keys"]
    matrix: Float[Tensor, "heads queries keys"]
    numbers: Int[Tensor, " n"] | None = None
    key_numbers: Int[Tensor, " m"] | None = None

    def line(self, query: Query, of: str | None) -> Float[Tensor, " keys"]:
        """What the queries that the caller means give to each key, in the first head.

        Args:
            query: "mean" over the queries, "cls" for the first one that stands for no input, a number counted among the module's
                queries, or a pixel `(y, x)` of their input.
            of: An input: "mean" is over its tokens only, and a pixel is one of it.

        Raises:
            MulticamError: If there is no such input or query.
        """
        places, rows = self.forward.places, self.matrix[0]
        if of is not None and of not in places.names:
            raise unknown("input", of, places.names)
        if query == "mean":
            chosen = self.queries > 0 if of is None else places.select(self.queries, of)
            if not chosen.any():
                raise MulticamError(f"no query of {self.title} stands for input {of!r}: {self._describe()}")
            return rows[chosen].mean(0)
        if query == "cls":
            own = [i for i, token in enumerate(self.queries.tolist()) if not places.inputs_of(token)]
            if not own:
                raise MulticamError(
                    f"no query of {self.title} is the model's own, such as a class token: {self._describe()}"
                )
            return rows[own[0]]
        return rows[self.at(query, of)]

    def at(self, query: Query, of: str | None) -> int:
        """Which query a number or a pixel means."""
        if isinstance(query, int):
            if self.numbers is None:
                return checked_query(query, len(self.queries), self.title)
            row = int(self.numbers[checked_query(query, len(self.numbers), self.title)])
            if row == len(self.queries):
                raise MulticamError(f"query {query} of {self.title} is padding, or a constant that stands for nothing")
            return row
        if isinstance(query, tuple) and len(query) == 2 and all(isinstance(at, int | float) for at in query):
            return self._at(query, of)
        raise MulticamError(f'a query is "mean", "cls", a number or a pixel (y, x), not {query!r}')

    def transposed(self) -> "Dense":
        """The keys as queries."""
        title = f"{self.title}, read from its keys,"
        return Dense(title, self.forward, self.keys, self.queries, self.matrix.mT, self.key_numbers, self.numbers)

    def footprint(self, query: Query, onto: str) -> Float[Tensor, "1 *size"]:
        """What each key has been given by a query, where the key is."""
        cells = int(self.forward.places.select(self.keys, onto).sum())
        return self.forward.on_input(self.keys, self.line(query, None) / max(cells, 1), onto)

    def _describe(self) -> str:
        return " -> ".join(map(self.forward.places.describe, (self.queries, self.keys)))

    def _at(self, pixel: tuple[int | float, int | float], of: str | None) -> int:
        """The query that covers a pixel of its input, the smallest where several do."""
        places, sizes = self.forward.places, self.forward.sizes
        known = sorted(name for name in inputs_among(places, self.queries) if len(sizes[name]) == 2)
        if of is None and len(known) != 1:
            raise MulticamError(f"the queries of {self.title} stand for {known}: say whose pixel with of=…")
        name = known[0] if of is None else of
        if name not in known:
            raise MulticamError(f"no query of {self.title} stands for a part of an image {name!r}: {self._describe()}")
        height, width = sizes[name]
        y, x = pixel
        if not (0 <= y < height and 0 <= x < width):
            raise MulticamError(f"pixel {pixel} lies outside of input {name!r} of {height} x {width}")
        boxes = places.boxes[self.queries.cpu()]
        at = torch.tensor([(int(y) + 0.5) / height, (int(x) + 0.5) / width])
        covers = ((boxes[:, 1:3] <= at) & (at < boxes[:, 4:6])).all(1) & places.select(self.queries, name).cpu()
        if not covers.any():
            raise MulticamError(f"no query of {self.title} covers pixel {pixel} of {name!r}: {self._describe()}")
        area = (boxes[:, 4:6] - boxes[:, 1:3]).prod(1).where(covers, torch.inf)
        return int(area.argmin())


def inputs_among(places: Places, ids: Tensor) -> frozenset[str]:
    """The inputs that some of these tokens stand for."""
    masks = torch.unique(places.inputs.to(ids.device)[ids.clamp(min=0)]).tolist()
    return frozenset(name for mask in masks for i, name in enumerate(places.names) if mask >> i & 1)


def checked_query(query: Any, n: int, title: str) -> int:
    """The number of a query.

    Raises:
        MulticamError: If there is none of that number.
    """
    if not isinstance(query, int) or not -n <= query < n:
        raise MulticamError(f"{title} has queries 0 to {n - 1}, not {query!r}")
    return query


def without_blind(
    matrix: Float[Tensor, "b heads q k"], axis: int | None, samples: Callable[[], Int[Tensor, "b q"]], title: str
) -> Float[Tensor, "b heads q k"]:
    """The matrix with zeros where a softmax ran over nothing, whose numbers are NaN: there nothing is attended to.

    Args:
        matrix: The probabilities, or weights.
        axis: The axis of the softmax; None: none ran over nothing.
        samples: What tells the sample of each query.
        title: What it is, for the message.

    Raises:
        MulticamError: If other numbers are NaN or infinite, or all of a sample's are.
    """
    if torch.isfinite(matrix).all():
        return matrix
    blind = matrix.isnan().all(axis, keepdim=True) if axis else torch.zeros_like(matrix, dtype=torch.bool)
    found, of = matrix.masked_fill(blind, 0), samples()
    for sample in sorted(set(of.flatten().tolist()) - {-1}):
        own = (of == sample).any(1)
        if blind[own].all() or not torch.isfinite(found[own]).all():
            raise MulticamError(
                f"{title} is NaN or infinite in sample {sample}: it was given such values, or none of its queries sees a key; leave that "
                "attention out, or the sample"
            )
    return found
