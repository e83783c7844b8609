"""The house: rooms, one above the other; a face for each; and what only some of them may touch."""

import ast
import importlib
import inspect
import re
from graphlib import TopologicalSorter
from itertools import chain
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "multicam"
# From the ground up. A room imports from those below, and those of one floor do not import from each other.
FLOORS = (
    ("errors", "faces", "maps", "printing", "chance"),
    ("call",),
    ("watch",),
    ("attending", "cam"),
    ("saliency", "inside"),
    ("shares", "metrics"),
    ("figures", "compat"),
    ("generation", "report", "scale"),
    ("demo",),
    ("cli",),
)
GROUND = FLOORS[0]
# Imported only inside the function that needs them, so that `import multicam` needs none of them.
OPTIONAL = {"matplotlib", "skimage", "sklearn", "safetensors", "tqdm", "PIL", "scipy", "captum", "shapiq"}
FILES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
INNER = sorted(set(FILES) - {"multicam", "multicam.__main__"})
ROOMS = sorted(name for name, path in FILES.items() if path.stem == "__init__" and name != "multicam")


def room(name: str) -> str:
    return name.split(".")[1]


def imported(tree: ast.AST) -> set[str]:
    """The modules that some code imports, here or in a function."""
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            modules = {f"{node.module}.{alias.name}" for alias in node.names} & set(FILES)
            names |= modules or {str(node.module)}
    return names


def inside(name: str) -> set[str]:
    """The modules of the package that one of them imports."""
    return imported(ast.parse(FILES[name].read_text())) & set(FILES)


@pytest.mark.parametrize("name", INNER)
def test_a_file_imports_from_the_rooms_below(name: str) -> None:
    floor = next(i for i, rooms in enumerate(FLOORS) if room(name) in rooms)
    below = {*chain(*FLOORS[:floor]), room(name), *(GROUND if room(name) in GROUND else ())}
    assert {room(other) for other in inside(name) - {"multicam"}} <= below


def test_there_is_no_circle() -> None:
    TopologicalSorter({name: inside(name) for name in INNER}).prepare()


@pytest.mark.parametrize("name", sorted(FILES))
def test_optional_libraries_are_imported_where_they_are_used(name: str) -> None:
    module = ast.parse(FILES[name].read_text())
    at_top = ast.Module([node for node in module.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
    assert not {full.split(".")[0] for full in imported(at_top)} & OPTIONAL


@pytest.mark.parametrize("name", [name for name in INNER if room(name) != "watch"])
def test_only_the_watching_room_touches_hooks_and_modes(name: str) -> None:
    tree = ast.parse(FILES[name].read_text())
    called = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    bases = {ast.unparse(base) for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for base in node.bases}
    assert not {attribute for attribute in called if attribute.startswith("register_")}
    assert not bases & {"TorchDispatchMode", "TorchFunctionMode"}


@pytest.mark.parametrize("name", ["multicam", *ROOMS])
def test_a_face_exports_no_name_of_a_module_beside_it(name: str) -> None:
    face = importlib.import_module(name)
    beside = {other.rpartition(".")[2] for other in FILES if other.rpartition(".")[0] == name}
    clashes = beside & set(getattr(face, "__all__", ()))
    assert {
        other for other in clashes if getattr(face, other) is not importlib.import_module(f"{name}.{other}")
    } == set()


def test_the_public_names_exist_and_are_documented() -> None:
    import multicam

    for name in multicam.__all__:
        assert getattr(multicam, name).__doc__, name


@pytest.mark.parametrize(
    "test", sorted((PACKAGE.parent / "tests").rglob("test_*.py")), ids=lambda test: "/".join(test.parts[-2:])
)
def test_tests_mirror_the_rooms(test: Path) -> None:
    place = test.relative_to(PACKAGE.parent / "tests")
    if place.parts[0] not in ("whole", "fuzz", "reports"):  # what is true of several rooms
        assert (PACKAGE / place.parent / place.name.removeprefix("test_")).exists()


# What all commands share; it is seen in the tests of each.
SHARED = {"multicam.cli.help", "multicam.cli.results"}


@pytest.mark.parametrize("name", sorted({*INNER} - {*ROOMS} - SHARED))
def test_every_file_has_its_tests(name: str) -> None:
    place = FILES[name].relative_to(PACKAGE)
    assert (PACKAGE.parent / "tests" / place.parent / f"test_{place.name}").exists()


def arguments_told(docstring: str) -> set[str]:
    """The names that a docstring's Args explain; several may share a line."""
    section = re.search(r"^Args:\n((?: {4}.*\n|\n)+)", inspect.cleandoc(docstring) + "\n", re.MULTILINE)
    lines = [] if section is None else section[1].split("\n")
    heads = [found[1] for line in lines if (found := re.match(r" {4}([\w*][\w*, ]*?)(?: \(.*\))?:", line))]
    return {name.strip().lstrip("*") for head in heads for name in head.split(",")}


@pytest.mark.parametrize("name", INNER)
def test_where_arguments_are_told_all_are(name: str) -> None:
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        docstring = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
        told = arguments_told(docstring) if docstring else set()
        if isinstance(node, ast.FunctionDef) and told:
            taken = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
            assert told == {arg.arg for arg in taken if arg} - {"self", "cls"}, node.name
