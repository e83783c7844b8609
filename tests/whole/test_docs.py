"""The documentation: its code runs, what it says is printed is printed, its links lead somewhere, no name is missing.

The code of a page runs from top to bottom in one namespace and an empty folder. A `text` block holds what the code
before it prints; a python block that starts with `# name.py` is a file; an `sh` block holds commands of multicam. Blocks
that start with `# folder/name.py` change the package itself: tests/whole/test_contributing.py does what they say.
"""

import doctest
import importlib.util
import re
import shlex
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from runpy import run_path
from typing import NamedTuple

import pytest

import multicam
from multicam.cli.main import main
from tests.whole.test_architecture import ROOMS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [
    path
    for path in (*ROOT.glob("*.md"), *DOCS.rglob("*.md"))
    if not {"_build", "jupyter_execute", "tutorials"} & {*path.relative_to(ROOT).parts[:-1]}
]
with_faces = run_path(str(DOCS / "faces.py"))["with_faces"]
FENCE = re.compile(r"^```(\S+)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
CHANGES = (ROOT / "CHANGELOG.md").read_text()
NAMES_0_1 = re.findall(
    r"\w+",
    """
    CAM FEM ISCAM KPCACAM MODALITIES RISE SESS SSCAM AblationCAM Attention AttentionCall Attributions Augmented
    Batch Between Binary BoxScore ClassScore Comparison CompleteFullGrad Concepts Contrast Contribution Curve Dream
    EigenCAM EigenGradCAM EigenSmoothed Evaluation Explained FinerCAM Flow FullGrad GradCAM GradCAMElementWise
    GradCAMPlusPlus HiResCAM Infidelity InputCAM Inputs Kernels Layer LayerCAM Maps Masked Metric MulticamError
    OriginalCAM PackedModel Picture Probability QueryScore RandomCAM Randomization RefineCAM RegionContribution
    Regression ScoreCAM SegEigenCAM SegmentationScore ShapleyCAM Similarity Site SmoothGradCAMPlusPlus Spec Tile
    TopBox TopClass Trace WeightedCAM XGradCAM activation_maximization agreement as_it_is attention branch_of
    captum_attribution channels_last colorize compare complexity contribution contribution_figure deconvnet
    deep_dream deletion double_occlusion dream_figure energy_inside evaluate expected_gradients explain_methods
    explainer factorize feature_maps feature_sheet figure flow_figure flow_matrix gradient guided_backprop
    guided_gradcam head_sheet history_figure infidelity input_x_gradient insertion integrated_gradients kernel_sheet
    kernels legrad list_layers names_input normalize occlusion overlay panel parameter_randomization pointing_game
    query_figure record_attention region_contribution relevance road rollout saliency_figure second_order_gradient
    seen_through sensitivity smoothgrad sparseness stacked superpixels tokens vargrad
    """,
)
ENTRY = re.compile(r"^\.\. (?:auto\w+|py:data):: (\S+)", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")


class Block(NamedTuple):
    """One fenced block: its language, its content and the line that it starts on."""

    kind: str
    content: str
    line: int


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for found in FENCE.finditer(text):
        yield Block(found[1], found[2], text.count("\n", 0, found.start(2)))


def command_lines(content: str) -> list[list[str]]:
    return [shlex.split(line)[1:] for line in content.replace("\\\n", " ").splitlines()]


@pytest.fixture(params=sorted(PAGES), ids=lambda page: str(page.relative_to(ROOT)))
def page(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


def test_the_code_of_a_page_does_what_it_says(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": page.stem}
    printed = ""
    for block in blocks(page):
        if block.kind == "text":
            matches = doctest.OutputChecker().check_output(block.content, printed, doctest.ELLIPSIS)
            assert matches, f"{page.name}:{block.line} should be\n{printed}"
            continue
        with redirect_stdout(StringIO()) as out:
            file = re.match(r"# ([\w/]+\.py)\n", block.content)
            if block.kind == "python" and file:
                if "/" not in file[1]:
                    Path(file[1]).write_text(block.content)
            elif block.kind in ("python", "{code-cell}"):
                # The empty lines in front make a traceback point at the page.
                exec(compile("\n" * block.line + block.content, page, "exec"), namespace)
            elif block.kind == "sh":
                assert not any(main(words) for words in command_lines(block.content)), block.content
        printed = out.getvalue()


def test_links_lead_to_files(page: Path) -> None:
    prose = FENCE.sub("", page.read_text())
    targets = {target.partition("#")[0] for target in LINK.findall(prose) if ":" not in target}
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("face", [face for face in ROOMS if hasattr(importlib.import_module(face), "__all__")])
def test_every_name_of_a_face_is_in_the_reference(face: str) -> None:
    """Each page as it is built: with an entry for every name of the faces that it is about."""
    entries = set(ENTRY.findall(reference()))
    for name in importlib.import_module(face).__all__:
        own = {f"{face}.{name}", f"{face.replace('.call.targets', '.targets')}.{name}"}
        same = getattr(multicam, name) if name in multicam.__all__ else None
        front = {f"multicam.{name}"} if same is getattr(importlib.import_module(face), name) else set()
        assert entries & (own | front), name


@pytest.mark.parametrize("name", multicam.__all__)
def test_every_public_name_is_in_the_reference(name: str) -> None:
    rooms = {room.rpartition(".")[2] for room in ROOMS}
    assert name in rooms or f"multicam.{name}" in ENTRY.findall(reference())


def test_an_entry_is_what_its_name_is() -> None:
    page = with_faces("# Title\n\n<!-- face: multicam.call.targets -->\n\nThe end.")
    assert page.startswith("# Title\n\n## scores\n")
    assert page.endswith("\n```\n\nThe end.")
    assert ".. autoclass:: multicam.targets.TopBox\n   :members:" in page
    assert ".. py:data:: multicam.targets.Target\n" in page
    metrics = with_faces("<!-- face: multicam.metrics -->")
    assert ".. autofunction:: multicam.evaluate\n" in metrics  # the front page has it
    assert ".. autofunction:: multicam.metrics.deletion\n" in metrics
    assert "\n   - ``deletion`` the score while the marked places go\n" in metrics


@pytest.mark.parametrize("name", NAMES_0_1)
def test_the_changelog_says_where_a_name_of_0_1_0_is(name: str) -> None:
    if name in multicam.__all__:
        assert name not in moved()
    else:
        with pytest.raises(AttributeError, match=rf"it is {re.escape(moved()[name])}\.{name}$"):
            getattr(multicam, name)


def test_the_changelog_says_where_a_module_of_0_1_0_is() -> None:
    modules = dict(re.findall(r"^  \| `(\w+)` \| (.*) \|$", CHANGES, re.MULTILINE))
    assert len(modules) == 90
    for old, new in modules.items():
        for module in re.findall(r"`([\w.]+)`", new):
            assert importlib.util.find_spec(f"multicam.{module}"), old


def moved() -> dict[str, str]:
    """Where the changelog says that names of the front page went, by name."""
    rows = re.findall(r"^  \| `(multicam\.\w+)` \| (.*) \|$", CHANGES, re.MULTILINE)
    return {name: room for room, names in rows for name in re.findall(r"`(\w+)`", names)}


@cache
def reference() -> str:
    """All pages of the reference as they are built."""
    return "\n".join(with_faces(page.read_text()) for page in (DOCS / "reference").glob("*.md"))
