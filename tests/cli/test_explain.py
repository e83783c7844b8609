import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import multicam as mc
from multicam import GradCAM, GradCAMPlusPlus, HiResCAM, Maps, Trace, tokens
from multicam.call.files import load_model, read_image
from multicam.call.targets import Binary
from multicam.cam.catalogue import INPUT_METHODS, METHODS
from tests.helpers.commands import (
    INPUTS,
    LAYERED,
    LAYERS,
    help_has_an_example_and_its_lists,
    kept,
    one_clean_line,
    same,
)

pytestmark = pytest.mark.usefixtures("here")
TWO = ["nets.py:build", *INPUTS, *LAYERED, "--output", "logits"]


def test_explain_keeps_the_numbers_and_draws_them(run, two):
    code, out, err = run("explain", *TWO, "--target", "3")
    assert (code, err) == (0, "")
    cam = GradCAM(load_model("nets.py:build"), LAYERS, output="logits")
    maps = cam(two, target=3)
    arrays = kept("panel.npz")
    assert set(arrays) == {"rgb", "depth", "scores", "target"}
    assert all(arrays[name].dtype == np.float32 for name in ("rgb", "depth", "scores"))
    same(arrays, maps)
    scores = Trace(cam.model, two, cam.layers, 3, "logits").scores
    assert torch.equal(torch.from_numpy(arrays["scores"]), scores)
    assert arrays["target"] == "3"
    shares = [f"{share:.0%}" for share in maps.shares()[0].tolist()]
    header, row, note, *files = out.splitlines()
    assert header.split() == ["sample", "score", "rgb", "depth"]
    assert note.startswith("percentages are shares of the positive evidence; --signed keeps")
    assert row.split() == ["0", f"{scores.item():.4g}", *shares]
    assert files == ["maps     panel.npz", "picture  panel.png"]
    with Image.open("panel.png") as picture:
        assert picture.width > 1500


def test_explain_without_a_target_names_the_top_class(run, two):
    _, out, _ = run("explain", *TWO)
    header, row, *_ = out.splitlines()
    logits = load_model("nets.py:build")(**two)["logits"]
    assert header.split()[1] == "class"
    assert row.split()[1:3] == [str(logits.argmax().item()), f"{logits.max().item():.4g}"]
    assert kept("panel.npz")["target"] == "top"


def test_explain_with_several_methods(run, two):
    methods = ["--method", "hirescam", "--method", "GradCAM++", "--signed", "--out", "out/all.png"]
    code, out, _ = run("explain", *TWO, *methods)
    assert code == 0
    for method in (HiResCAM, GradCAMPlusPlus):
        maps = method(load_model("nets.py:build"), LAYERS, output="logits")(two, signed=True)
        same(kept("out/all.npz"), {f"{method.__name__}.{name}": values for name, values in maps.items()})
    header, _, note, whole, *files = out.splitlines()
    assert header.split() == ["sample", "class", "score", "HiResCAM", "rgb", "HiResCAM", "depth"]
    assert note == "GradCAMPlusPlus tells no shares: the scale of its maps means nothing"
    assert whole == "percentages are shares of the evidence, with its sign"
    assert files == ["maps     out/all.npz", "picture  out/all.png"]
    assert sorted(path.name for path in Path("out").iterdir()) == ["all.npz", "all.png"]


@pytest.mark.parametrize(("word", "scale"), [(None, None), ("shared", "column"), ("each", "each")])
def test_several_methods_are_the_comparison_of_the_library(run, monkeypatch, word, scale):
    drawn = {}

    def compare(images, methods, **options):
        drawn.update(images=images, methods=methods, **options)
        return types.SimpleNamespace(save=lambda path: Path(path).touch())

    monkeypatch.setattr("multicam.figures.panels.compare", compare)
    methods = ["--method", "hirescam", "--method", "eigencam", *(["--scale", word] if word else [])]
    assert run("explain", *TWO, *methods, "--spectral", "depth")[0] == 0
    assert list(drawn["images"]) == ["rgb", "depth"]
    assert {name: maps.comparable for name, maps in drawn["methods"].items()} == {"HiResCAM": True, "EigenCAM": False}
    same(
        kept("panel.npz"),
        {f"{method}.{name}": m for method, maps in drawn["methods"].items() for name, m in maps.items()},
    )
    assert (drawn["scale"], drawn["spectral"], drawn["title"]) == (scale, ["depth"], "target top")


def test_help_lists_every_method_and_has_an_example(capsys):
    of_layers, _, rest = help_has_an_example_and_its_lists(capsys, "explain").partition("\nmethods of whole inputs:")
    for listed, methods in ((of_layers, METHODS), (rest, INPUT_METHODS)):
        words = {line.split()[0] for line in listed.splitlines() if line.strip()}
        assert {method.__name__.lower() for method in methods} <= words


def test_explain_without_a_layer(run, two):
    """FullGrad and its like lie on the inputs; what explains layers still needs one."""
    whole = ["nets.py:build", *INPUTS, "--output", "logits", "--target", "3"]
    assert run("explain", *whole, "--method", "fullgrad")[0] == 0
    same(kept("panel.npz"), mc.FullGrad(load_model("nets.py:build"), output="logits")(two, 3))
    code, out, _ = run("explain", *whole, *LAYERED, "--method", "complete-fullgrad", "--method", "gradcam")
    assert code == 0
    assert {"CompleteFullGrad.rgb", "CompleteFullGrad.depth", "GradCAM.depth"} <= set(kept("panel.npz"))
    assert {"CompleteFullGrad", "GradCAM"} <= set(out.split())
    code, _, err = run("explain", *whole)
    assert (code, err) == (
        1,
        "multicam: GradCAM explains a layer: give one with --layer, as `multicam layers` lists them\n",
    )


def test_explain_several_samples_each_with_its_target(run):
    samples = [*INPUTS, *INPUTS]
    code, out, _ = run("explain", "nets.py:build", *samples, *LAYERED, "--output", "logits", "--target", "3,1")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[:3]] == ["sample", "0", "1"]
    scores, rgb = kept("panel.npz")["scores"], kept("panel.npz")["rgb"]
    assert scores[0] != scores[1]
    for target, sample in (("3", 0), ("1", 1)):
        run("explain", *TWO, "--target", target)
        np.testing.assert_allclose(kept("panel.npz")["scores"], scores[sample], rtol=1e-5)
        np.testing.assert_allclose(kept("panel.npz")["rgb"][0], rgb[sample], rtol=1e-4, atol=1e-6)


def test_explain_with_values_weights_and_preprocessing(run, two):
    model = load_model("nets.py:build")
    with torch.no_grad():
        model.head.bias += 1
    torch.save({"state_dict": model.state_dict()}, "best.pt")
    extras = ["--value", "weight=0.25", "--weights", "best.pt", "--preprocess", "nets.py:centred", "--target", "2"]
    assert run("explain", *TWO, *extras, "--dtype", "float64")[0] == 0
    inputs = {"rgb": two["rgb"].double() - 0.5, "depth": read_image("depth.npy", torch.float64), "weight": 0.25}
    score = model.double()(**inputs)["logits"][0, 2].item()
    np.testing.assert_allclose(kept("panel.npz")["scores"], [score], rtol=1e-6)


def test_explain_another_output(run, two):
    one = ["nets.py:build", *INPUTS, "--layer", "rgb=rgb.layer2", "--output", "area", "--target", "regression"]
    code, out, _ = run("explain", *one)
    assert code == 0
    assert out.splitlines()[0].split() == ["sample", "score"]  # one map has no shares
    same(kept("panel.npz"), GradCAM(load_model("nets.py:build"), {"rgb": "rgb.layer2"}, output="area")(two, Binary()))


def test_explain_a_target_of_ones_own(run, two):
    assert run("explain", *TWO, "--target", "nets.py:both")[0] == 0
    logits = load_model("nets.py:build")(**two)["logits"]
    np.testing.assert_allclose(kept("panel.npz")["scores"], logits[:, :2].sum(1).detach(), rtol=1e-6)


def test_a_layer_without_a_name_lies_on_the_only_image(run):
    one = ["explain", "nets.py:single", "--input", "input=rgb.png"]
    assert run(*one, "--layer", "0.layer2")[0] == 0
    assert kept("panel.npz")["input"].shape == (1, 32, 40)
    assert run("explain", "nets.py:build", *INPUTS, "--layer", "rgb.layer2", "--output", "logits")[0] == 0
    assert kept("panel.npz")["map"].shape == (1, 8, 10)


def test_grids_and_signals(run):
    audio = ["--input", "rgb=rgb.png", "--value", "audio=@audio.npy"]
    model = ["explain", "nets.py:patches", *audio]
    layers = ["--layer", "rgb=mix", "--layer", "sound=mix", "--layer", "audio=tune"]
    code, _, err = run(*model, *layers, "--target", "1")
    assert code == 1
    assert "holds places of several inputs" in err and "onto='rgb' (16 x 20)" in err
    grids = ["--grid", "rgb=16x20@1", "--grid", "sound=16@321"]
    assert run(*model, *layers, *grids, "--target", "1", "--spectral", "rgb")[0] == 0
    net, inputs = (
        load_model("nets.py:patches"),
        {"rgb": read_image("rgb.png"), "audio": torch.from_numpy(np.load("audio.npy"))},
    )
    reshapes = {"rgb": tokens(16, 20, part=slice(1, 321)), "sound": tokens(16, part=slice(321, 337))}
    expected = {name: mc.Layer("mix", reshape=reshape) for name, reshape in reshapes.items()} | {"audio": "tune"}
    same(kept("panel.npz"), GradCAM(net, expected)(inputs, 1))
    assert kept("panel.npz")["audio"].shape == (1, 64)


@pytest.mark.parametrize("scale", [None, "shared", "each"])
def test_the_picture_is_the_panel_of_the_library(run, monkeypatch, scale):
    drawn = {}

    def panel(images, maps, **options):
        drawn.update(images=images, maps=maps, **options)
        return types.SimpleNamespace(save=lambda path: Path(path).touch())

    monkeypatch.setattr("multicam.figures.panels.panel", panel)
    assert run("explain", *TWO, *(["--scale", scale] if scale else []), "--spectral", "depth")[0] == 0
    assert list(drawn["images"]) == ["rgb", "depth"]
    assert isinstance(drawn["maps"], Maps)
    same(kept("panel.npz"), drawn["maps"])
    assert (drawn["scale"], drawn["spectral"], drawn["title"]) == (scale, ["depth"], "GradCAM, target top")


def test_maps_go_by_the_short_names_of_inputs_inside_containers(run):
    Path("boxed.py").write_text(
        "from multicam import Inputs\nfrom nets import build as bare\nfrom torch import nn\n"
        "class Boxed(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.net = bare()\n"
        "    def forward(self, batch):\n        return self.net(**batch)['logits']\n"
        "def boxed(given): return Inputs(dict(given))\n"
    )
    layers = ["--layer", "rgb=net.rgb.layer2", "--layer", "depth=net.depth.layer2"]
    assert run("explain", "boxed.py:Boxed", *INPUTS, *layers, "--preprocess", "boxed.py:boxed")[0] == 0
    assert kept("panel.npz")["rgb"].shape == (1, 32, 40)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_explain_on_a_gpu_as_on_the_cpu(run):
    assert run("explain", *TWO, "--target", "3", "--device", "cuda")[0] == 0
    on_gpu = kept("panel.npz")
    assert run("explain", *TWO, "--target", "3")[0] == 0
    np.testing.assert_allclose(on_gpu["rgb"], kept("panel.npz")["rgb"], rtol=1e-2, atol=1e-4)


def test_without_matplotlib_the_numbers_are_kept(run, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run("explain", *TWO)
    assert code == 1
    assert 'pip install "multicam-torch[plot]"' in err
    assert kept("panel.npz")["rgb"].shape == (1, 32, 40)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (TWO[:-2], "the model returns a dict, so say what to explain with output=…, one of: 'logits' (1, 5)"),
        ([*TWO, "--target", "7"], "target class 7 does not exist: the output has classes 0 to 4"),
        ([*TWO, "--target", "tpo"], "no target 'tpo'; did you mean 'top'?"),
        ([*TWO, "--method", "gradcan"], "no method 'gradcan'; did you mean 'gradcam'?"),
        ([*TWO, "--output", "logit"], "no output 'logit'; did you mean 'logits'?"),
        ([*TWO, "--out", "panel.xyz"], "no picture format '.xyz'"),
        ([*TWO, "--spectral", "dpeth"], "no input 'dpeth'; did you mean 'depth'?"),
        ([*TWO, "--weights", "rgb.png"], "these can: .pt, .pth, .safetensors"),
        ([*TWO, "--preprocess", "nets.py:failing"], "the preprocessing nets.py:failing failed with KeyError: 'rbg'"),
        ([*TWO[:5], "--layer", "rgb=rgb.layer9"], "no layer in TwoBranch 'rgb.layer9'; did you mean 'rgb.layer"),
        (["nets.py:broken", *TWO[1:]], "the factory nets.py:broken failed with FileNotFoundError: no backbone here"),
        (["nets.py:build", "--input", "rgb=rbg.png", *LAYERED], "no file 'rbg.png'; did you mean 'rgb.png'?"),
        (["nets.py:build", "--input", "rbg=rgb.png", *LAYERED], "no argument 'rbg'; did you mean 'rgb'?"),
        (
            ["nets.py:build", "--input", "rgb=depth.npy", "--input", "depth=depth.npy", *LAYERED],
            "running the model failed with RuntimeError: Given groups=1",
        ),
    ],
)
def test_an_error_is_one_clean_line(run, argv, message):
    one_clean_line(run("explain", *argv), message)
