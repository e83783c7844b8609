"""How many samples a call has, and what in it has a row or an item for each of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Number
from typing import Any, NoReturn

import torch
from torch import Tensor

from multicam.call.items import all_alike, count, hides, taken
from multicam.call.marks import Marks, covered, find, within
from multicam.call.tree import leaves, nodes, rebuild
from multicam.errors import MulticamError

# Integers beyond these do not survive a float canvas.
PACKABLE_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16)


@dataclass(frozen=True)
class Samples:
    """The samples of one call; what each property is, `Inputs` says under the same name.

    Attributes:
        named: The arguments of the call by name.
        marks: What was said of them.
    """

    named: Mapping[str, Any]
    marks: Marks

    def check(self) -> None:
        """Refuse marks of what there is not, and of what cannot have them."""
        self._covered("held", "constant", "rows")
        if self.marks.rows:
            _ = self.listed

    @cached_property
    def leaves(self) -> dict[str, Any]:
        """Every leaf by name."""
        return leaves(self.named)

    @cached_property
    def images(self) -> dict[str, Tensor]:
        """The image leaves by name."""
        marked = self._covered("held", "constant") | self.single
        return {name: leaf for name, leaf in self.leaves.items() if is_image(leaf) and name not in marked}

    @cached_property
    def batch(self) -> int:
        """How many samples there are."""
        images = self.images
        for name in () if images else self._marked_rows:
            return count(self._nodes[name]) or self._refuse_rows(name)
        tensors = images or self._alone or self._tensors
        unbatched = [name for name, leaf in tensors.items() if leaf.ndim == 3 and name.startswith(("image", "img"))]
        if not images and len(unbatched) > 1:
            raise MulticamError(
                f"{self!r}: {unbatched[0]!r} and the others of its list have no batch axis; detectors also take one tensor "
                "(b c h w), so give torch.stack(images). Images of different sizes are explained one by one, as image[None]"
            )
        sizes = {name: leaf.shape[0] for name, leaf in tensors.items()}
        if not sizes:
            raise MulticamError(f"the inputs have no tensor with a batch axis: {self!r}")
        if 0 in sizes.values():
            raise MulticamError(f"the inputs hold no sample: {self!r}")
        if images and len(set(sizes.values())) > 1:
            shapes = ", ".join(f"{name} {tuple(leaf.shape)}" for name, leaf in images.items())
            raise MulticamError(
                f"the image inputs differ in batch size: {shapes}; give each the same number of samples, or say "
                "which of them is the same for every sample with Inputs(…).constant(name), or which list has one item for each "
                "sample with Inputs(…).rows(name)"
            )
        return next(iter(sizes.values()))

    @cached_property
    def batched(self) -> dict[str, Tensor]:
        """The tensors by name that have one row for each sample."""
        found = {}
        for name, leaf in self._tensors.items():
            if leaf.shape[0] == self.batch:
                found[name] = leaf
            elif not any(within(name, path) for path in self.undecided):
                raise MulticamError(
                    f"cannot tell the samples of input {name!r} of shape {tuple(leaf.shape)} with a batch of {self.batch}: if it is "
                    f"the same for every sample, say so with Inputs(…).constant({name!r}); else give it {self.batch} rows"
                )
        return found

    @cached_property
    def listed(self) -> dict[str, Any]:
        """The lists, tuples and arrays by name that are marked by `rows`."""
        others = self._covered("held", "constant")
        for name in self._marked_rows:
            if count(self._nodes[name]) != self.batch:
                self._refuse_rows(name)
            twice = [other for other in others if within(other, name) and other != name]
            if twice:
                raise MulticamError(
                    f"input {twice[0]!r} is marked, and so is {name!r}, in which it is one sample's own"
                )
        return {name: self._nodes[name] for name in self._marked_rows if name in self._lists}

    @cached_property
    def undecided(self) -> dict[str, Any]:
        """What may have one item for each sample, or be the same for all, by name."""
        others = [leaf for leaf in self.leaves.values() if not isinstance(leaf, Tensor | str | Number | None)]
        if self.marks.complete or not (self._lists or others):
            return {}
        known = self._covered("held", "constant", "rows") | self.images.keys()

        def may(path: str, value: Any) -> bool:
            return self._may_follow(path, value) and not any(within(name, path) for name in known)

        return {path: value for path, value in leaves(self.named, may).items() if may(path, value)}

    def _may_follow(self, path: str, value: Any) -> bool:
        if path not in self._lists:
            return path in self.leaves and hides(value, self.batch)
        n = count(value)
        # Several items for each sample cannot be told from others by their number alone; tensors have rows of their own.
        several = n and self.batch > 1 and n % self.batch == 0 and not any(within(t, path) for t in self._tensors)
        return n == self.batch or bool(several)

    @cached_property
    def single(self) -> set[str]:
        """The leaves that are one sample's own, in what `rows` marks."""
        return self._covered("rows") - {*self._marked_rows}

    def take(self, samples: Sequence[int]) -> dict[str, Any]:
        """The arguments by name for these samples."""
        batched, listed, undecided = self.batched, self.listed, self.undecided
        if undecided and [*samples] != [*range(self.batch)]:
            (name, value), *others = undecided.items()
            named = [f"{each!r} = {shown(it)}" for each, it in [(name, value), *others[:2]]]
            more = f" and {len(others) - 2} more" if len(others) > 2 else ""
            way = f"Inputs(…).rows({name!r}) or " if count(value) == self.batch else ""
            besides = "" if way else ", or give a list with one item for each sample by itself"
            raise MulticamError(
                f"cannot tell whether there is one item for each of the {self.batch} samples, or the same for all, in input "
                f"{' and '.join(named)}{more}: say it with {way}"
                f"Inputs(…).constant({name!r}){besides}"
            )

        def moved(name: str, leaf: Any) -> Any:
            return taken(leaf, samples) if name in batched or name in listed else leaf

        found: dict[str, Any] = rebuild(self.named, moved, lambda path, _: path in listed)
        return found

    def alike(self, but: set[str]) -> bool:
        """Whether all samples have the same in everything but the leaves of these names."""
        each = {**self._tensors, **self.listed, **self.undecided}
        return all(all_alike(value) for name, value in each.items() if name not in but and count(value) == self.batch)

    def __repr__(self) -> str:
        return f"Inputs({', '.join(f'{name}={shown(leaf)}' for name, leaf in self.leaves.items())})"

    @cached_property
    def _nodes(self) -> dict[str, Any]:
        return nodes(self.named)

    @cached_property
    def _lists(self) -> set[str]:
        """The names of what has items and is no tensor."""
        return {name for name, node in self._nodes.items() if not isinstance(node, Tensor) and count(node) is not None}

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        """The tensors that have a first axis and are not known to be constant, or one sample's."""
        known = self._covered("constant") | self.single
        return {
            name: leaf
            for name, leaf in self.leaves.items()
            if isinstance(leaf, Tensor) and leaf.ndim and name not in known
        }

    @cached_property
    def _alone(self) -> dict[str, Tensor]:
        """The tensors that are in no list, where each may be one sample's."""
        return {name: leaf for name, leaf in self._tensors.items() if not any(within(name, p) for p in self._lists)}

    @cached_property
    def _marked_rows(self) -> list[str]:
        """The full names of what `rows` marks."""
        return sorted(find(self.named, name) for name in self.marks.rows)

    def _covered(self, *marks: str) -> set[str]:
        """The leaves that are marked so."""
        return covered(self.named, [name for mark in marks for name in getattr(self.marks, mark)])

    def _refuse_rows(self, name: str) -> NoReturn:
        n = count(self._nodes[name])
        raise MulticamError(
            f"rows({name!r}) says that it has one item for each sample, but it has {'no items' if n is None else n}"
            + (f", and there are {self.batch} samples" if n else "")
            + f": {shown(self._nodes[name])}"
        )


def is_image(leaf: Any) -> bool:
    """Whether a leaf can be packed and carry a map: `(b … h w)` with a channel axis, of a packable dtype."""
    return (
        isinstance(leaf, Tensor)
        and leaf.layout is torch.strided
        and not leaf.is_nested
        and leaf.ndim >= 4
        and leaf.numel() > 0
        and (leaf.is_floating_point() or leaf.is_complex() or leaf.dtype in PACKABLE_INTEGERS)
    )


def shown(leaf: Any) -> str:
    """A leaf in few words."""
    if isinstance(leaf, Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}"
    return repr(leaf) if len(repr(leaf)) <= 40 else type(leaf).__name__
