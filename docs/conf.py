"""Sphinx settings. Build from the root: sphinx-build -nW --keep-going -b html docs docs/_build/html."""

import os
import re
import shutil
import sys
from pathlib import Path

from sphinx.application import Sphinx

import multicam

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from faces import with_faces  # noqa: E402

os.environ["TQDM_DISABLE"] = "1"  # progress bars have no place on a page

project = "multicam"
author = "the multicam authors"
version = release = multicam.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "jupyter_execute"]

html_theme = "furo"
html_title = "multicam"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_show_copyright = False
html_copy_source = False

myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3

nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_merge_streams = True

# Docstrings quote code with single backticks. As references they become links where the name is documented, and stay
# plain code everywhere else.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
maximum_signature_line_length = 110
napoleon_use_ivar = True
napoleon_attr_annotations = False
python_use_unqualified_type_names = True
nitpick_ignore_regex = [
    ("py:obj", ".*"),
    # Types of other libraries: their documentation would have to be downloaded to link to it.
    ("py:class", r"(torch|numpy|jaxtyping|collections\.abc|pathlib|matplotlib)\..*|Tensor|ndarray"),
    ("py:class", r"multicam\.[a-z.]+\.([A-Z]|Point)|LayerLike"),  # type variables and aliases
    ("py:class", r"'[a-z0-9_*.+/() ]*'"),  # the shapes in annotations
]

# Sphinx reads only what lies below this folder; git ignores the copies.
for notebook in (HERE.parent / "notebooks").glob("*.ipynb"):
    shutil.copy2(notebook, HERE / "tutorials")


def as_restructuredtext(_: object, what: str, *rest: object) -> None:
    """Keeps text from being read as markup: `.grad`, |F| and, in properties, "The size: its height" (napoleon)."""
    lines = rest[-1]
    assert isinstance(lines, list)
    lines[:] = [re.sub(r"(^|[\s(])`\.(?=\w)", r"\1`!.", line.replace("|", r"\|")) for line in lines]
    if what == "property":
        lines[0] = lines[0].replace(": ", " \N{EN DASH} ")


def with_reference(_: Sphinx, page: str, text: list[str]) -> None:
    """Puts the names of faces into their pages."""
    text[0] = with_faces(text[0])


def without_inherited_signature(
    _: object, what: str, name: str, found: object, *rest: object
) -> tuple[str, str] | None:
    """Shows how a class is made only where its documentation says it: not of results, nor of what is made like its base."""
    return ("", "") if what == "class" and "Args:" not in (found.__doc__ or "") else None


def setup(app: Sphinx) -> None:
    """Registers the hooks; that for docstrings in front of napoleon, which has priority 500."""
    app.connect("source-read", with_reference)
    app.connect("autodoc-process-signature", without_inherited_signature)
    app.connect("autodoc-process-docstring", as_restructuredtext, priority=400)
