"""A progress bar for what takes longer than a moment."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def progress(items: Iterable[T], total: int, title: str) -> Iterator[T]:
    """The items, with a bar on the standard error once they have taken two seconds.

    `TQDM_DISABLE=1` in the environment turns all bars off.
    """
    from tqdm import tqdm

    yield from tqdm(items, desc=title, total=total, delay=2, leave=False)
