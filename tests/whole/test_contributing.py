"""What CONTRIBUTING.md says to do, done in a copy of the package: the toys are where it says that they are then."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.whole.test_docs import ROOT, blocks

PAGE = ROOT / "CONTRIBUTING.md"
HAS = r"""
from runpy import run_path

import torch
from torch import nn
import multicam as mc
from multicam.cam.catalogue import METHODS, ONE_PASS
from multicam.metrics.measures import METRICS

assert mc.EnergyCAM in METHODS and mc.EnergyCAM in ONE_PASS
torch.manual_seed(0)
conv = nn.Conv2d(3, 4, 3, padding=1)
model = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
x = torch.rand(2, 3, 8, 8)
acts = conv(x).detach()
methods = [mc.EnergyCAM, mc.GradCAM]
maps = mc.explain_methods(model, x, "0", methods, 1, signed=True)
torch.testing.assert_close(maps["EnergyCAM"], 64 * acts.square().sum(1))

table = mc.evaluate(model, {kind.__name__: mc.explainer(kind, "0") for kind in methods}, ["peak", "deletion"], [x])
shares = acts.square().sum(1).flatten(1)
torch.testing.assert_close(table.of("EnergyCAM", "peak"), shares.amax(1) / shares.sum(1))
assert table.table()[0].metric == "peak" and "peak ↑" in str(table)

found = mc.gradient(model, x, mc.targets.Entropy())["input"]
leaf = x.clone().requires_grad_()
torch.distributions.Categorical(logits=model(leaf)).entropy().sum().backward()
torch.testing.assert_close(found, leaf.grad)

with_faces = run_path("docs/faces.py")["with_faces"]
for face, name in {"cam": "EnergyCAM", "call.targets": "targets.Entropy"}.items():
    assert f".. autoclass:: multicam.{name}\n" in with_faces(f"<!-- face: multicam.{face} -->"), name
assert "- ``peak`` the largest share" in with_faces("<!-- face: multicam.metrics -->")
"""


def changed(text: str, diff: str) -> str:
    """A text in which the lines that a diff finds, in one place only, have become those that it leaves; or with these at its end."""
    lines = diff.splitlines(keepends=True)
    old, new = ("".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +"))
    if not old:
        return text + new
    assert text.count(old) == 1, f"not once:\n{old}"
    return text.replace(old, new)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, its tests and its documentation after what the page says."""
    root = tmp_path_factory.mktemp("copy")
    for folder in ("multicam", "tests", "docs"):
        shutil.copytree(
            ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__", "_build", "tutorials")
        )
    for name in ("setup.cfg", "conftest.py"):
        shutil.copy2(ROOT / name, root)
    for block in blocks(PAGE):
        named = re.match(r"# (\S+/\S+)\n", block.content)
        if named and block.kind == "python":
            assert not (root / named[1]).exists()
            (root / named[1]).write_text(block.content)
        elif named and block.kind == "diff":
            file = root / named[1]
            file.write_text(changed(file.read_text(), block.content[named.end() :]))
    return root


def run(copy: Path, *words: str) -> str:
    """What Python prints in the copy, where `multicam` is the copy's."""
    environment = os.environ | {"PYTHONPATH": str(copy)}
    done = subprocess.run([sys.executable, *words], cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_toys_are_where_the_page_says(copy: Path) -> None:
    run(copy, "-c", HAS)


@pytest.mark.parametrize(
    ("command", "line"), [("explain", "energycam  +Energy-CAM: "), ("evaluate", "peak  +up: the ")]
)
def test_the_help_of_the_command_lists_them(copy: Path, command: str, line: str) -> None:
    assert re.search(rf"^  {line}", run(copy, "-m", "multicam", command, "--help"), re.MULTILINE)


def test_the_tests_of_the_page_pass(copy: Path) -> None:
    measure = "tests/metrics/test_measures.py::test_the_peak_is_a_share_of_the_places_of_all_inputs"
    target = "tests/call/targets/test_scores.py::test_targets_by_value"
    of_all_methods = "tests/cam/test_wrappers.py::test_wrappers_take_any_method[EnergyCAM]"
    tests = ["tests/cam/test_energy.py", measure, target, of_all_methods]
    printed = run(copy, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", *tests)
    assert re.search(r"^\d+ passed", printed, re.MULTILINE)
