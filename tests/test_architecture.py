"""The house: a file imports from the floors below it, or from its own without a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "multicam"
FLOORS = [
    [
        "errors",
        "columns",
        "maps",
        "attributions",
        "baselines",
        "noise",
        "tree",
        "inputs",
        "packing",
        "targets",
        "boxes",
        "reshape",
        "modalities",
        "progress",
        "render",
        "figures",
        "panels",
        "places",
        "fused",
    ],
    [
        "layers",
        "rectifiers",
        "taint",
        "rows",
        "module_calls",
        "replay",
        "mixing",
        "trace",
        "survey",
        "marks",
        "rearranging",
        "computing",
        "origins",
        "products",
        "forwards",
        "calls",
        "record",
        "recorder",
        "attending",
    ],
    [
        "adapter",
        "cam",
        "methods",
        "perturb",
        "input_cam",
        "saliency",
        "averaging",
        "covering",
        "game",
        "shapley",
        "regions",
        "interactions",
        "explaining",
        "resampling",
        "robustness",
        "randomization",
        "measures",
        "evaluation",
        "ranking",
        "faithfulness",
        "localization",
        "contribution_figures",
        "captum_bridge",
        "saliency_figures",
        "features",
        "feature_figures",
        "dream",
        "objectives",
        "parameterizations",
        "dream_figures",
        "fullgrad",
        "catalogue",
        "wrappers",
        "sess",
        "concepts",
        "metrics",
        "flow",
        "shares",
        "attention_figures",
    ],
    [
        "compat",
        "compat_base",
        "compat_cams",
        "compat_extras",
        "compat_metrics",
        "compat_targets",
        "compat_utils",
        "demo",
        "demo_training",
        "demo_pictures",
        "files",
        "words",
        "cli",
        "cli_arguments",
        "cli_views",
        "cli_answers",
        "__main__",
        "__init__",
    ],
]
FILES = {path.stem: path for path in PACKAGE.glob("*.py")}
# Imported only inside the function that needs them, so that `import multicam` needs none of them.
OPTIONAL = {"matplotlib", "skimage", "sklearn", "safetensors", "tqdm", "PIL", "scipy", "captum", "shapiq"}
HOOKS = {"layers", "module_calls", "recorder", "survey"}  # the only files that touch hooks


def imported(tree: ast.AST) -> set[str]:
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    froms = {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    return names | froms


def own(path: Path) -> set[str]:
    names = imported(ast.parse(path.read_text()))
    return {name.removeprefix("multicam.") for name in names if name.startswith("multicam.")}


def test_every_file_has_a_floor() -> None:
    assert set(FILES) == {name for floor in FLOORS for name in floor}


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_file_imports_from_below(name: str) -> None:
    height = next(i for i, floor in enumerate(FLOORS) if name in floor)
    allowed = {below for floor in FLOORS[: height + 1] for below in floor}
    assert own(FILES[name]) <= allowed


def test_there_is_no_circle() -> None:
    TopologicalSorter({name: own(path) for name, path in FILES.items()}).prepare()


@pytest.mark.parametrize("name", sorted(FILES))
def test_optional_libraries_are_imported_where_they_are_used(name: str) -> None:
    module = ast.parse(FILES[name].read_text())
    at_top = ast.Module([node for node in module.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
    assert not {full.split(".")[0] for full in imported(at_top)} & OPTIONAL


@pytest.mark.parametrize("name", sorted(set(FILES) - HOOKS))
def test_only_the_watching_files_touch_hooks(name: str) -> None:
    calls = {node.attr for node in ast.walk(ast.parse(FILES[name].read_text())) if isinstance(node, ast.Attribute)}
    assert not {attribute for attribute in calls if attribute.startswith("register_")}


def test_the_public_names_exist_and_are_documented() -> None:
    import multicam

    for name in multicam.__all__:
        assert getattr(multicam, name).__doc__, name
