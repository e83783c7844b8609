"""The reference from the faces: in a page, `<!-- face: multicam.cam -->` stands for every name of that face, file by file.

A name that is added to a face is documented by that.
"""

import inspect
import re
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

import multicam
from multicam.faces import homes_of

MARK = re.compile(r"^<!-- face: (\S+) -->$", re.MULTILINE)


def with_faces(page: str) -> str:
    """The text of a page with the entries of the faces that it names."""
    return MARK.sub(lambda found: "\n\n".join(_sections(found[1])), page)


def _sections(face: str) -> list[str]:
    """A section for each file that a face has names from: what the file is about, and its names."""
    package = import_module(face)
    names: dict[str, list[str]] = {}
    for name, home in homes_of(face, str(package.__file__)).items():
        names.setdefault(home, []).append(name)
    return [
        f"## {home.rpartition('.')[2].replace('_', ' ')}\n\n```{{eval-rst}}\n{_summary(home)}\n\n"
        + "\n\n".join(_entry(_path(package, name), getattr(package, name), package.__all__) for name in listed)
        + "\n```"
        for home, listed in names.items()
    ]


def _summary(home: str) -> str:
    return f"{(inspect.getdoc(import_module(home)) or '').splitlines()[0]} ``{home}``"


def _path(package: ModuleType, name: str) -> str:
    """Where users have a name from: the front page if it is there, or else the room."""
    if name in multicam.__all__ and getattr(multicam, name) is getattr(package, name):
        return f"multicam.{name}"
    room = package.__name__.rpartition(".")[2]
    return f"multicam.{room}.{name}" if room in multicam.__all__ else f"{package.__name__}.{name}"


def _entry(path: str, value: Any, names: list[str]) -> str:
    """What autodoc is asked for."""
    if inspect.isclass(value):
        known = all(base.__name__ in names for base in value.__bases__)
        options = ["members:", "special-members: __call__, __getitem__", *["show-inheritance:"] * known]
        return "\n   :".join([f".. autoclass:: {path}", *options])
    if inspect.isroutine(value):
        return f".. autofunction:: {path}"
    keys = [f"   - ``{key}`` {getattr(value[key], 'about', '')}" for key in value] if isinstance(value, Mapping) else []
    return "\n".join([f".. py:data:: {path}", "", *keys])
