"""Text in columns, for whatever prints as a table."""

from collections.abc import Callable, Iterable, Sequence


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
