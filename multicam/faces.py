"""The face of a package: its public names, each imported when it is first asked for (PEP 562).

The stub beside a package's `__init__` says where its names are from, to type checkers and to `face` alike, so there is one
list of them. Nothing heavy is imported for a name that nobody uses: `multicam --help` needs no PyTorch.
"""

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


def face(
    package: str, file: str, elsewhere: tuple[str, ...] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package, as the stub beside it says.

    Args:
        package: Its name.
        file: Its `__init__.py`. The `__init__.pyi` beside it holds imports such as `from .base import CAM as CAM`.
        elsewhere: Its parts whose names an AttributeError points to.

    Example:
        >>> get, _, names = face("multicam.cam", sys.modules["multicam.cam"].__file__)
        >>> get("GradCAM").__name__, "GradCAM" in names
        ('GradCAM', True)
    """
    homes = homes_of(package, file)

    def get(name: str) -> Any:
        if name not in homes:
            found = [part for part in elsewhere if name in get(part).__all__]
            where = f"; it is {package}.{found[0]}.{name}" if found else ""
            raise AttributeError(
                f"module {package!r} has no attribute {name!r}{where}", name=name, obj=sys.modules[package]
            )
        if homes[name] == package:  # a room
            return import_module(f"{package}.{name}")
        value = getattr(__import__(homes[name], fromlist=[name]), name)
        setattr(sys.modules[package], name, value)  # asked for once
        return value

    return get, lambda: list(homes), list(homes)


def homes_of(package: str, file: str) -> dict[str, str]:
    """The module that each name of a package is from, as `face` reads it."""
    homes: dict[str, str] = {}
    for node in ast.parse(Path(file).with_suffix(".pyi").read_text()).body:
        if isinstance(node, ast.ImportFrom):
            module = f"{package}.{node.module}" if node.module else package
            names = [alias.name for alias in node.names]
            homes |= dict.fromkeys(import_module(module).__all__ if names == ["*"] else names, module)
    return homes
