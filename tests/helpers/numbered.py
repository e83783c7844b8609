"""Names of parameters that are the same in every process, for values that print with an address or random numbers."""

from collections.abc import Callable
from itertools import count


def numbered() -> Callable[[object], str]:
    """A function for `ids=` that counts the values."""
    numbers = count()
    return lambda value: f"{type(value).__name__}{next(numbers)}"
