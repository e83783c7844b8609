"""The commands print, keep and draw what the functions of the library return."""

from pathlib import Path

import numpy as np
import pytest
import torch

import multicam as mc
from multicam.call.files import load_model, read_image
from multicam.cli.main import main

pytestmark = pytest.mark.usefixtures("here")
INPUTS = ["--input", "rgb=rgb.png", "--input", "depth=depth.npy"]
TWO = ["nets.py:build", *INPUTS, "--output", "logits"]
LAYERS = {"rgb": "rgb.layer2", "depth": "depth.layer2"}


def kept(path):
    with np.load(path) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays if arrays[name].dtype.kind == "f"}


@pytest.mark.parametrize(
    ("words", "function", "options"),
    [
        ([], mc.gradient, {}),
        (["--method", "Input-x-Gradient"], mc.input_x_gradient, {}),
        (["--method", "guidedbackprop"], mc.guided_backprop, {}),
        (["--method", "deconvnet"], mc.deconvnet, {}),
        (["--method", "smoothgrad", "--option", "samples=3", "--option", "std=0.1"], mc.smoothgrad, {"samples": 3, "std": 0.1}),
        (["--method", "vargrad", "--option", "seed=4"], mc.vargrad, {"seed": 4}),
        (
            ["--method", "integrated_gradients", "--option", "baseline={'rgb': 'mean'}", "--option", "steps=20"],
            mc.integrated_gradients,
            {"baseline": {"rgb": "mean"}, "steps": 20},
        ),
        (["--method", "occlusion", "--option", "patch=(4, 10)", "--option", "stride=2"], mc.occlusion, {"patch": (4, 10), "stride": 2}),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)  # fmt: skip
def test_saliency_keeps_the_numbers_and_draws_them(run, two, words, function, options):
    code, out, err = run("saliency", *TWO, "--target", "3", *words)
    assert (code, err) == (0, "")
    expected = function(load_model("nets.py:build"), two, 3, output="logits", **options)
    found = kept("saliency.npz")
    torch.testing.assert_close(found, {**expected, "scores": expected.scores}, rtol=0, atol=0)
    assert f"{expected.scores.item():.4g}" in out
    if expected.comparable:
        assert all(f"{evidence.item():.4g}" in out for evidence in expected.evidence.values())
    assert Path("saliency.png").stat().st_size > 1000


def test_guided_gradcam_takes_layers_and_a_method(run, two):
    layers = ["--layer", "rgb=rgb.layer2", "--layer", "depth=depth.layer2"]
    words = ["--method", "guided-gradcam", "--option", "method=hirescam", *layers, "--target", "3"]
    assert run("saliency", *TWO, *words)[0] == 0
    model = load_model("nets.py:build")
    expected = mc.guided_gradcam(model, two, LAYERS, 3, method=mc.HiResCAM, output="logits")
    torch.testing.assert_close(kept("saliency.npz"), {**expected, "scores": expected.scores}, rtol=0, atol=0)


def test_guided_gradcam_of_a_model_with_one_image(run):
    words = [
        "--input",
        "input=rgb.png",
        "--method",
        "guided-gradcam",
        "--layer",
        "0.layer2",
        "--option",
        "method=hirescam",
    ]
    assert run("saliency", "nets.py:single", *words)[0] == 0
    expected = mc.guided_gradcam(load_model("nets.py:single"), read_image("rgb.png"), "0.layer2", method=mc.HiResCAM)
    torch.testing.assert_close(kept("saliency.npz")["input"], expected["input"], rtol=0, atol=0)


def test_some_inputs_are_explained(run):
    assert run("saliency", *TWO, "--wrt", "depth", "--out", "folder/one.png")[0] == 0
    assert set(kept("folder/one.npz")) == {"depth", "scores"}


def test_the_saliency_picture_is_that_of_the_library(run, monkeypatch):
    seen = {}

    def drawn(inputs, found, **options):
        seen.update(options, names=list(inputs), found=list(found))
        return figure(inputs, found, **options)

    figure = mc.figures.saliency_figure
    monkeypatch.setattr("multicam.figures.saliency.saliency_figure", drawn)
    further = ["--input", "rgb=rgb.png", "--input", "depth=depth.npy"]
    assert run("saliency", *TWO, *further, "--spectral", "depth", "--channels", "norm", "--target", "1")[0] == 0
    assert seen == {
        "names": ["rgb", "depth"], "found": ["rgb", "depth"], "channels": "norm", "spectral": ["depth"],
        "quantity": "gradient", "rows": ["sample 0", "sample 1"], "title": "target 1",
    }  # fmt: skip


def test_features_are_those_of_the_layer(run, two):
    code, out, err = run("features", "nets.py:build", *INPUTS, "--layer", "rgb=rgb.layer1", "--channels", "5,0")
    assert (code, err) == (0, "")
    maps = mc.feature_maps(load_model("nets.py:build"), two, "rgb.layer1")
    torch.testing.assert_close(kept("features.npz")["maps"], maps, rtol=0, atol=0)
    assert str(tuple(maps.shape)) in out
    assert Path("features.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("layer", "shown"), [("rgb=rgb.layer1", "rgb"), ("depth=depth.layer1", "depth"), ("rgb.layer1", None)]
)
def test_features_stand_behind_the_input_that_is_named(run, two, monkeypatch, layer, shown):
    seen = {}
    sheet = mc.figures.feature_sheet
    monkeypatch.setattr(
        "multicam.figures.features.feature_sheet",
        lambda maps, **options: seen.update(options) or sheet(maps, **options),
    )
    assert run("features", "nets.py:build", *INPUTS, "--layer", layer, "--most", "3", "--scale", "each")[0] == 0
    assert (seen["most"], seen["scale"], seen["channels"], seen["sample"]) == (3, "each", None, 0)
    assert (seen["image"] is None) == (shown is None)
    assert shown is None or torch.equal(seen["image"], two[shown][0])


def test_kernels_need_no_inputs(run, monkeypatch):
    seen = {}
    sheet = mc.figures.kernel_sheet
    monkeypatch.setattr(
        "multicam.figures.features.kernel_sheet",
        lambda found, **options: seen.update(options) or sheet(found, **options),
    )
    code, out, err = run(
        "kernels", "nets.py:build", "--layer", "rgb.layer1.0", "--channels", "1,2", "--in-channels", "0"
    )
    assert (code, err) == (0, "")
    assert repr(mc.kernels(load_model("nets.py:build").rgb.layer1[0])) in out
    assert seen == {"channels": [1, 2], "in_channels": [0], "most": 64, "title": "rgb.layer1.0"}
    assert Path("kernels.png").stat().st_size > 1000


def test_a_dream_of_channels(run, two):
    words = ["--onto", "rgb", "--layer", "rgb.layer2", "--channel", "3,0", "--steps", "4", "--seed", "2"]
    code, out, err = run("dream", "nets.py:build", *INPUTS, *words)
    assert (code, err) == (0, "")
    model = load_model("nets.py:build")
    expected = mc.activation_maximization(model, two, "rgb.layer2", [3, 0], onto="rgb", steps=4, seed=2)
    for label, start, end in zip(expected.labels, expected.start, expected.objective, strict=True):
        assert f"{label}: {start:.4g} to {end:.4g}" in out
    assert Path("dream.png").stat().st_size > 1000
    assert Path("dream-history.png").stat().st_size > 1000


def test_a_dream_of_a_class(run):
    code, out, _ = run("dream", *TWO, "--onto", "depth", "--target", "2", "--steps", "3", "--out", "a/class.png")
    assert code == 0
    assert "class 2: " in out
    assert Path("a/class-history.png").exists()


def test_a_deep_dream_grows(run, two):
    words = ["--onto", "rgb", "--layer", "rgb.layer2", "--octaves", "2", "--steps", "2"]
    code, out, _ = run("dream", "nets.py:build", *INPUTS, *words)
    assert code == 0
    expected = mc.deep_dream(load_model("nets.py:build"), two, "rgb.layer2", onto="rgb", octaves=2, steps=2)
    assert f"{expected.start.item():.4g} to {expected.objective.item():.4g}" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["saliency", *TWO, "--method", "gradients"], "no method 'gradients'; did you mean 'gradient'?"),
        (["saliency", *TWO, "--option", "samples=3"], "no option of gradient 'samples'"),
        (["saliency", *TWO, "--method", "smoothgrad", "--option", "sample=3"], "did you mean 'samples'?"),
        (["saliency", *TWO, "--layer", "rgb.layer1"], "guided_gradcam, and it alone, takes layers"),
        (["saliency", *TWO, "--method", "guided-gradcam"], "guided_gradcam, and it alone, takes layers"),
        (["saliency", *TWO, "--wrt", "dept"], "no input 'dept'; did you mean 'depth'?"),
        (["features", "nets.py:build", *INPUTS, "--layer", "rgb.layer9"], "no layer in TwoBranch 'rgb.layer9'"),
        (["features", "nets.py:build", *INPUTS, "--layer", "rgb.layer1", "--channels", "8"], "channels are 0 to 7, not 8"),
        (["features", "nets.py:build", *INPUTS, "--layer", "rgb.layer1", "--sample", "1"], "samples are 0 to 0, not 1"),
        (["kernels", "nets.py:build", "--layer", "head"], "kernels are those of a convolution"),
        (["kernels", "nets.py:build", "--layer", "rgb.layer1.9"], "no layer in TwoBranch 'rgb.layer1.9'"),
        (["dream", "nets.py:build", *INPUTS, "--onto", "rgb"], "say what to maximise"),
        (["dream", *TWO, "--onto", "rgb", "--octaves", "2"], "a deep dream is of a layer"),
        (["dream", *TWO, "--onto", "rgb", "--layer", "rgb.layer1", "--channel", "0,1", "--octaves", "2"], "a deep dream is of one channel, not of 2"),
        (["dream", *TWO, "--layer", "rgb.layer1"], "say with onto="),
    ],
    ids=lambda value: None if isinstance(value, list) else value[:30],
)  # fmt: skip
def test_an_error_is_one_clean_line(run, argv, message):
    code, _, err = run(*argv)
    assert code == 1
    assert err.startswith("multicam: ")
    assert message in err
    assert err.count("\n") == 1


def test_numbers_are_read_with_commas(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["kernels", "nets.py:build", "--layer", "rgb", "--channels", "1,x"])
    assert "'1,x' is not a number" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["saliency", "features", "kernels", "dream"])
def test_help_has_an_example_and_its_lists(capsys, name):
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    out = capsys.readouterr().out
    assert f"\n  multicam {name} nets.py:build" in out
    assert "{" not in out.replace("{sum,max,norm}", "").replace("{shared,each}", "").replace("{float32", "").replace(
        '{"rgb"', ""
    )
