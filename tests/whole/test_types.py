"""Types: README's and the notebooks' code passes `mypy --strict`, and a result has the type that was asked for, without a cast."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.whole.test_docs import ROOT, blocks

PAGES = ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted((ROOT / "notebooks").glob("*.ipynb"))
# What a user has to say who checks such code: the libraries beside torch that have no types. What is said of multicam itself
# is only for a checkout: of a package that is installed, mypy shows no errors by itself.
SETTINGS = """
[mypy]
strict = true
untyped_calls_exclude = torch,skimage

[mypy-captum.*,pytorch_grad_cam.*,skimage.*,sklearn.*,timm.*,torchvision.*,tqdm.*]
ignore_missing_imports = true

[mypy-multicam.*]
follow_imports = silent

# It has types, and reading them takes longer than all else.
[mypy-transformers.*]
follow_imports = skip
"""
# What users get; an ignored line must be an error, or the ignore is one.
PROMISES = """
from collections.abc import Mapping
from typing import TypeVar, assert_type

import torch
from torch import Tensor, nn

import multicam as mc
from multicam.cam.base import LayersLike
from multicam.watch.layers import LayerLike

model, x = nn.Sequential(nn.Conv2d(3, 4, 3)), torch.rand(1, 3, 8, 8)
layers: Mapping[str, LayerLike] = {"rgb": "0"}


# One layer is a tensor, several are maps, however they are given.
assert_type(mc.GradCAM(model, "0")(x), Tensor)
assert_type(mc.HiResCAM(model, model[0])(x, 3, signed=True), Tensor)
assert_type(mc.LayerCAM(model, mc.Layer("0"))(x, [3]), Tensor)
assert_type(mc.GradCAM(model, {"rgb": "0"})(x), mc.Maps)
assert_type(mc.EigenCAM(model, {"rgb": "0", "depth": mc.Layer("0"), "both": model[0]})({"rgb": x}), mc.Maps)
assert_type(mc.OriginalCAM(model, layers)(x), mc.Maps)
assert_type(mc.GradCAM(model, {"rgb": "0"})(x)["rgb"], Tensor)

# So it is with methods of more parameters.
assert_type(mc.ScoreCAM(model, "0", masked="rgb")(x), Tensor)
assert_type(mc.AblationCAM(model, {"rgb": "0"}, batch_size=8)(x), mc.Maps)
assert_type(mc.SmoothGradCAMPlusPlus(model, "0", samples=2)(x), Tensor)
assert_type(mc.KPCACAM(model, layers, kernel="rbf")(x), mc.Maps)
assert_type(mc.FEM(model, "0", output="logits", k=1.5)(x), Tensor)

# A wrapper returns what the method in it returns.
assert_type(mc.FinerCAM(mc.GradCAM(model, "0"))(x), Tensor)
assert_type(mc.FinerCAM(mc.GradCAM(model, {"rgb": "0"}), 0.5)(x), mc.Maps)
assert_type(mc.SESS(mc.EigenSmoothed(mc.GradCAM(model, "0")), scales=(1.0, 1.5))(x), Tensor)
assert_type(mc.Augmented(mc.RefineCAM(mc.GradCAM(model, layers)), "rgb")(x), mc.Maps)

# One input or several; without names it is one or several, as the model has.
assert_type(mc.RISE(model, "rgb", masks=9)(x), Tensor)
assert_type(mc.RISE(model, ["rgb", "depth"])(x), mc.Maps)
assert_type(mc.FullGrad(model, ("rgb", "depth"))(x), mc.Maps)
assert_type(mc.CompleteFullGrad(model, "rgb")(x), Tensor)
assert_type(mc.FullGrad(model)(x), Tensor | mc.Maps)

# Many methods.
assert_type(mc.explain_methods(model, x, "0", [mc.GradCAM, mc.EigenCAM]), dict[str, Tensor])
assert_type(mc.explain_methods(model, x, {"rgb": "0", "depth": mc.Layer("0")}, [mc.GradCAM]), dict[str, mc.Maps])
methods = [mc.GradCAM, mc.HiResCAM]
assert_type(mc.explain_methods(model, x, layers, methods, 3, signed=True), dict[str, mc.Maps])


def chosen(method: type[mc.CAM], places: LayersLike) -> Tensor | mc.Maps:
    return assert_type(method(model, places)(x), Tensor | mc.Maps)


# A method of one's own says nothing of types, or passes them on.
class Toy(mc.CAM):
    def saliency(self, site: mc.Site) -> Tensor:
        return site.acts.mean(1)


L = TypeVar("L", bound=LayersLike, covariant=True)


class Passing(mc.CAM[L]):
    def saliency(self, site: mc.Site) -> Tensor:
        return site.acts.mean(1)


assert_type(Toy(model, "0")(x), Tensor | mc.Maps)
assert_type(Passing(model, "0")(x), Tensor)
assert_type(Passing(model, {"rgb": "0"})(x), mc.Maps)
chosen(Toy, "0")

# Attention.
att = mc.attention(model, x, target=3)
assert_type(att["fusion"], mc.attending.AttentionCall)
assert_type(att[0], mc.attending.AttentionCall)
assert_type(att[:2], mc.attending.Calls)
assert_type(att.find("*").between("rgb", "depth"), mc.attending.Calls)
assert_type(att["fusion"].heatmap("rgb"), Tensor)
assert_type(mc.relevance(att).maps(), mc.Maps)
with mc.record_attention(model) as seen:
    assert_type(seen["fusion"], mc.attending.AttentionCall)
mc.figures.query_figure(att, {"rgb": x}, [(1, 2), (3, 4)])
mc.figures.query_figure(att, {"rgb": x}, [(0.5, 1.5)])

# The rest.
assert_type(mc.contribution(model, x), mc.shares.Contribution)
assert_type(mc.contribution(model, x).shapley, Tensor)
assert_type(mc.region_contribution(model, x, regions={"input": 2}).maps, mc.Maps)
assert_type(mc.gradient(model, x), mc.saliency.Attributions)
assert_type(mc.integrated_gradients(model, x)["input"], Tensor)
assert_type(mc.evaluate(model, {"gradient": mc.gradient, "RISE": mc.explainer(mc.RISE)}, ["deletion"], [x]), mc.metrics.Evaluation)
assert_type(mc.feature_maps(model, x, "0"), Tensor)
assert_type(mc.feature_maps(model, x, {"first": "0"}), dict[str, Tensor])
assert_type(mc.factorize(model, x, "0"), mc.inside.Concepts)
assert_type(mc.factorize(model, x, {"first": "0", "same": mc.Layer("0")}), dict[str, mc.inside.Concepts])
assert_type(mc.figures.normalize(mc.GradCAM(model, layers)(x)), mc.Maps)

# What is wrong is an error.
mc.GradCAM(model, 3)  # type: ignore[type-var]
mc.GradCAM(model, layer="0")  # type: ignore[call-arg]
mc.GradCAM("model", "0")  # type: ignore[arg-type]
mc.GradCAM(model, "0")(x, signd=True)  # type: ignore[call-overload]
mc.RISE(model, 3)  # type: ignore[arg-type]
mc.FinerCAM(model)  # type: ignore[arg-type]
mc.explain_methods(model, x, {"rgb": 3}, [mc.GradCAM])  # type: ignore[dict-item]
mc.explain_methods(model, x, "0", [mc.RISE])  # type: ignore[list-item]
mc.factorize(model, x, {"first": 3})  # type: ignore[dict-item]
mc.GradCAM(model, "0")(x)["rgb"]  # type: ignore[index]
mc.GradCAM(model, layers)(x).mean()  # type: ignore[attr-defined]
att[1.5]  # type: ignore[call-overload]
mc.GradCam  # type: ignore[attr-defined]
"""


# To pyright the same is said by stubs that say nothing.
SILENT = (
    "captum/attr",
    "pytorch_grad_cam/__init__",
    "pytorch_grad_cam/utils/model_targets",
    "sklearn/datasets",
    "transformers/__init__",
)
PYRIGHT = {
    "typeCheckingMode": "standard",
    "extraPaths": [str(ROOT)],
    "reportUnusedExpression": False,  # pages show what they compute
    "reportUnnecessaryTypeIgnoreComment": "error",
}


def code_of(page: Path) -> str:
    """The Python code of a page, one block after another."""
    if page.suffix == ".ipynb":
        cells = json.loads(page.read_text())["cells"]
        return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    code = ""
    for block in blocks(page):
        if block.kind == "python":
            code += "\n" * (block.line - code.count("\n")) + block.content  # an error has the line of the page
    return code


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a module for each page, one for what is promised, and the settings."""
    for page in PAGES:
        (tmp_path / f"{re.sub(r'[^a-zA-Z0-9]', '_', page.name)}.py").write_text(code_of(page))
    (tmp_path / "promises.py").write_text(PROMISES)
    (tmp_path / "mypy.ini").write_text(SETTINGS)
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(PYRIGHT))
    for name in SILENT:
        stub = tmp_path / "typings" / f"{name}.pyi"
        stub.parent.mkdir(parents=True, exist_ok=True)
        stub.write_text("def __getattr__(name: str): ...\n")
    return tmp_path


def said(folder: Path, *command: str) -> str:
    """What a type checker says about the folder."""
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"MYPYPATH": str(ROOT)},
    )
    return done.stdout + done.stderr


def test_mypy_finds_nothing_in_what_users_write(folder: Path) -> None:
    pages = sorted(path.name for path in folder.glob("*.py"))
    found = said(folder, "mypy", "--config-file", "mypy.ini", *pages)
    assert found == f"Success: no issues found in {len(pages)} source files\n", found


def test_pyright_finds_nothing_in_what_users_write(folder: Path) -> None:
    pytest.importorskip("basedpyright", reason="pyright as a wheel that downloads nothing")
    found = said(folder, "basedpyright", "--pythonpath", sys.executable)
    assert found == "0 errors, 0 warnings, 0 notes\n", found
