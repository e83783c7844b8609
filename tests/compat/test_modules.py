"""Scripts that are switched by the command of the how-to page run here, whatever way they import pytorch-grad-cam."""

import pkgutil
import re
import shlex
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import pytorch_grad_cam as peer

from multicam import MulticamError, compat
from multicam.compat.modules import MODULES, NOT_OFFERED

PAGE = Path(__file__).parents[2] / "docs/howto/from-pytorch-grad-cam.md"
THEIRS = sorted(found.name for found in pkgutil.walk_packages(peer.__path__, "pytorch_grad_cam."))
MODEL = """
import torch
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)).eval()
x = torch.rand(2, 3, 16, 16)
photo = x[0].permute(1, 2, 0).numpy()
"""
SCRIPTS = {
    "the package": """
import pytorch_grad_cam
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
cam = pytorch_grad_cam.HiResCAM(model, [model[1]])(x, [ClassifierOutputTarget(2)] * 2)
picture = pytorch_grad_cam.utils.image.show_cam_on_image(photo, cam[0], use_rgb=True)
assert (picture.shape, cam.shape) == ((16, 16, 3), (2, 16, 16))
""",
    "another name": """
import numpy, pytorch_grad_cam as cam, sys
import pytorch_grad_cam.metrics.road as road, pytorch_grad_cam.utils.image
maps = cam.GradCAM(model=model, target_layers=[model[0]])(input_tensor=x, targets=None)
scores = road.ROADCombined(percentiles=[50])(x, maps, [cam.utils.model_targets.ClassifierOutputTarget(1)] * 2, model)
assert scores.shape == (2,) and numpy.isfinite(scores).all()
""",
    "names": """
from pytorch_grad_cam import (
    GradCAM, HiResCAM,
    ActivationsAndGradients)
from pytorch_grad_cam.grad_cam import GradCAM as Same
from pytorch_grad_cam.utils.image import show_cam_on_image, preprocess_image
from pytorch_grad_cam.utils.reshape_transforms import vit_reshape_transform
from pytorch_grad_cam.metrics.cam_mult_image import CamMultImageConfidenceChange
from pytorch_grad_cam.sobel_cam import sobel_cam
from pytorch_grad_cam import sobel_cam as function
with GradCAM(model, [model[1]]) as cam:
    maps = cam(preprocess_image(photo))
assert Same is GradCAM and function is sobel_cam and show_cam_on_image(photo, maps[0]).any()
assert sobel_cam((255 * photo).astype("uint8")).shape == (16, 16)
""",
    "everything": """
from pytorch_grad_cam import *
from pytorch_grad_cam.utils.image import *
assert show_cam_on_image(photo, EigenCAM(model, [model[1]])(x)[0]).any()
""",
    "importlib": """
import importlib
name = "ScoreCAM"
made = getattr(importlib.import_module("pytorch_grad_cam"), name)(model, [model[1]])
image = importlib.import_module("pytorch_grad_cam.utils.image")
again = importlib.import_module(".image", 'pytorch_grad_cam.utils')
assert image is again and image.show_cam_on_image(photo, made(x)[0]).shape == (16, 16, 3)
""",
    "inside": """
def explain():
    try:
        import pytorch_grad_cam
    except ImportError:
        pytorch_grad_cam = None
        raise
    from pytorch_grad_cam.base_cam import BaseCAM
    class Mine(BaseCAM):
        def get_cam_weights(self, input_tensor, target_layer, targets, activations, grads):
            return grads.mean((2, 3))
    return Mine(model, [model[1]])(x) - pytorch_grad_cam.GradCAM(model, [model[1]])(x)
assert abs(explain()).max() < 1e-5
""",
    "a name of its own": """
my_pytorch_grad_cam, pytorch_grad_cam_layers = 3, [model[1]]
from pytorch_grad_cam import LayerCAM
assert LayerCAM(model, pytorch_grad_cam_layers)(x).shape == (2, 16, 16) and my_pytorch_grad_cam == 3
""",
    "a notebook": """
import json
cell = json.loads('["import pytorch_grad_cam\\\\n", "cam = pytorch_grad_cam.FEM(model, [model[1]])"]')
exec("".join(cell))
assert cam(x).shape == (2, 16, 16)
""",
}
RUN = """
import runpy, sys
import multicam.compat
assert "torch" not in sys.modules and "cv2" not in sys.modules
assert type(multicam.compat.sobel_cam) is type(lambda: 0)  # and not the module of its name
for script in sys.argv[1:]:
    runpy.run_path(script, run_name="__main__")
    assert not [name for name in sys.modules if name.startswith("pytorch_grad_cam")], script
print("all ran")
"""


def command() -> str:
    """The command of the page that switches a script."""
    (found,) = re.findall(r"^\$ (sed .*) my_script\.py$", PAGE.read_text(), re.MULTILINE)
    return str(found)


def test_switched_scripts_run_here(tmp_path: Path) -> None:
    scripts = []
    for name, body in SCRIPTS.items():
        scripts.append(tmp_path / f"of_{name.replace(' ', '_')}.py")
        scripts[-1].write_text(MODEL + body)
    subprocess.run([*shlex.split(command()), *map(str, scripts)], check=True)
    assert all("import pytorch_grad_cam" not in script.read_text() for script in scripts)
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", RUN, *map(str, scripts)], capture_output=True, text=True, cwd=tmp_path
    )
    assert ran.stdout.endswith("all ran\n"), ran.stderr


def test_every_module_of_the_library_is_there() -> None:
    assert {f"pytorch_grad_cam.{name}" for name in MODULES} == {*THEIRS}


@pytest.mark.parametrize("name", THEIRS)
def test_every_name_of_a_module_is_there_or_refused_in_words(name: str) -> None:
    theirs, ours = import_module(name), import_module(name.replace("pytorch_grad_cam", "multicam.compat"))
    defined = {
        key: value
        for key, value in vars(theirs).items()
        if not key.startswith("_") and getattr(value, "__module__", None) == name
    }
    for key in defined:
        if key in NOT_OFFERED:
            with pytest.raises(MulticamError, match=f"multicam.compat has no {key} of pytorch-grad-cam's: "):
                getattr(ours, key)
        elif name.endswith("sobel_cam"):
            assert getattr(ours, key) is compat.sobel_cam
        else:
            assert getattr(ours, key) is getattr(compat, key)


def test_the_modules_are_modules() -> None:
    assert compat.utils.image.show_cam_on_image is compat.show_cam_on_image
    assert compat.metrics.road.ROADCombined is compat.ROADCombined
    assert find_spec("multicam.compat.utils").submodule_search_locations == []
    assert find_spec("multicam.compat.utils.image").name == "multicam.compat.utils.image"
    with pytest.raises(AttributeError, match="has no attribute 'show_cam'"):
        compat.utils.image.show_cam  # noqa: B018
    assert not hasattr(compat.utils.image, "__file__")
    with pytest.raises(ImportError):
        import_module("multicam.compat.utils.pictures")
    with pytest.raises(MulticamError, match="guides every ReLU of a model"):
        from multicam.compat.guided_backprop import GuidedBackpropReLUasModule  # noqa: F401
