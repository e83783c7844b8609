"""What the commands of `multicam` have in common at their end: files, and lines that say where they are."""

from collections.abc import Callable
from pathlib import Path


def write(label: str, file: Path, save: Callable[[Path], object], *notes: object) -> None:
    """Write a file, in a folder that need not exist yet, and print where it is.

    Args:
        label: What it is, as the printed line begins.
        file: Where to.
        save: What writes it, given the path.
        notes: What else the line says.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    save(file)
    print(f"{label:8}", file, *notes)


def row_names(samples: int) -> list[str]:
    """The names of a figure's rows; one sample needs none.

    Example:
        >>> row_names(2), row_names(1)
        (['sample 0', 'sample 1'], [])
    """
    return [f"sample {i}" for i in range(samples)] if samples > 1 else []
