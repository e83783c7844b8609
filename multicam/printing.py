"""A progress bar for what takes longer than a moment."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def progress(items: Iterable[T], total: int, title: str) -> Iterator[T]:
    """The items, with a bar on the standard error once they have taken two seconds.

    `TQDM_DISABLE=1` in the environment turns all bars off.
    """
    from tqdm import tqdm

    yield from tqdm(items, desc=title, total=total, delay=2, leave=False)


def aligned(rows: Iterable[Sequence[str]], adjust: Callable[[str, int], str] = str.ljust) -> str:
    """The rows, a line each, with every column as wide as its longest cell.

    Args:
        rows: Equally many cells each; the first row may be a head.
        adjust: `str.ljust` or `str.rjust`.

    Example:
        >>> print(aligned([("input", "share"), ("rgb", "9 %")]))
        input  share
        rgb    9 %
    """
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(adjust, row, widths)).rstrip() for row in rows)


def percent(share: float) -> str:
    """A share as tables print it, with its sign.

    Example:
        >>> percent(0.071), percent(-0.93), percent(-0.001)
        ('7%', '-93%', '0%')
    """
    return f"{share:z.0%}"
