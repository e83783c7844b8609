"""What was said of parts of a call: what is held, what is the same for all samples, and what has one item for each."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from multicam.call.tree import leaves, nodes, resolve


@dataclass(frozen=True)
class Marks:
    """Names of leaves, or of containers for all that is in them; short ones as people gave them.

    Attributes:
        held: What is carried as it is, never packed and never explained.
        constant: What is the same for every sample.
        rows: What has one row or item for each sample.
        complete: Whether lists and arrays that are not in `rows` are known to have no item for each sample.

    Example:
        >>> Marks().adding(rows=["lengths"]).rows
        frozenset({'lengths'})
    """

    held: frozenset[str] = frozenset()
    constant: frozenset[str] = frozenset()
    rows: frozenset[str] = frozenset()
    complete: bool = False

    def adding(self, **names: Iterable[str]) -> "Marks":
        """The marks with more names, by the kind of the mark."""
        return replace(self, **{mark: getattr(self, mark) | frozenset(more) for mark, more in names.items()})

    def renamed(self, names: Mapping[str, str]) -> "Marks":
        """The marks where the first part of a name has become another."""

        def new(marked: frozenset[str]) -> frozenset[str]:
            parts = (name.partition(".") for name in marked)
            return frozenset(names.get(head, head) + dot + rest for head, dot, rest in parts)

        return replace(self, held=new(self.held), constant=new(self.constant), rows=new(self.rows))


def find(value: Any, short: str) -> str:
    """The full name of the leaf in `value`, or else of the container, that a short name means.

    Raises:
        MulticamError: If there is none, or more than one.

    Example:
        >>> find({"batch": {"lengths": [12, 9]}}, "lengths")
        'batch.lengths'
    """
    known, every = leaves(value), nodes(value)
    if short in every:
        return short
    containers = [path for path in every if path not in known]
    meant = next((names for names in (known, containers) if any(name.endswith(f".{short}") for name in names)), known)
    return resolve("input", short, meant)


def covered(value: Any, names: Iterable[str]) -> set[str]:
    """The full names of the leaves in `value` that marks of these names mean.

    Example:
        >>> sorted(covered({"image": 1, "lengths": [12, 9]}, ["lengths"]))
        ['lengths.0', 'lengths.1']
    """
    meant = [find(value, name) for name in names]
    known = leaves(value) if meant else {}
    return {name for full in meant for name in known if within(name, full)}


def within(name: str, container: str) -> bool:
    """Whether a full name is that of a container or of something in it.

    Example:
        >>> within("batch.lengths.0", "batch.lengths"), within("lengths2", "lengths")
        (True, False)
    """
    return name == container or name.startswith(container + ".")
