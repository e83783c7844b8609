"""The one exception of the library, and the helper that says what exists."""

from collections.abc import Iterable
from difflib import get_close_matches
from numbers import Real
from operator import index

# How PyTorch's allocators, CUDA's libraries, C++ and OpenCV say it, whose exceptions are of no kind of their own.
NO_MEMORY = (
    "out of memory",
    "cannot allocate memory",
    "can't allocate memory",
    "failed to allocate",
    "unable to allocate",
    "not enough memory",
    "insufficient memory",
    "status_alloc_failed",
    "bad_alloc",
    "bad allocation",
)


class MulticamError(ValueError):
    """What was given, what exists, and what to do about it."""


def unknown(what: str, given: object, names: Iterable[str]) -> MulticamError:
    """An error for a name that does not exist, with the closest names that do.

    Args:
        what: What kind of thing was looked up, such as `"layer"`.
        given: The name as the caller wrote it.
        names: The names that exist.

    Example:
        >>> raise unknown("input", "rbg", ["rgb", "depth"])
        Traceback (most recent call last):
        multicam.errors.MulticamError: no input 'rbg'; did you mean 'rgb'? There are: 'rgb', 'depth'
    """
    known = list(names)
    text = str(given)
    close = get_close_matches(text, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    shown = ", ".join(map(repr, known[:20])) or "none"
    more = f" and {len(known) - 20} more" if len(known) > 20 else ""
    return MulticamError(f"no {what} {text!r}{hint} There are: {shown}{more}")


def number(name: str, value: float) -> float:
    """The value of an argument, if it is a number.

    Raises:
        MulticamError: If it is not.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        raise MulticamError(f"{name} is a number, not {value!r}")
    return value


def at_least_one(name: str, value: int) -> int:
    """The value of an argument, if it is a whole number of at least one.

    Raises:
        MulticamError: If it is not.
    """
    if not hasattr(value, "__index__") or isinstance(value, bool) or value < 1:
        raise MulticamError(f"{name} must be a whole number of at least 1, not {value!r}")
    return index(value)


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, there or in what led to the error.

    That is nobody's to catch: another name for it would blame the model or its inputs, and another way may need even more.
    """
    # By its name, because this file needs no PyTorch; the CPU's allocator raises a plain RuntimeError.
    kinds = {kind.__name__ for kind in type(error).__mro__}
    said = str(error).lower()
    if kinds & {"MemoryError", "OutOfMemoryError"} or any(words in said for words in NO_MEMORY):
        return True
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return cause is not None and out_of_memory(cause)
