"""The command prints, keeps and draws what the functions of the library return."""

from pathlib import Path

import pytest

import multicam as mc
from multicam.call.files import load_model, read_image
from tests.helpers.commands import (
    INPUTS,
    LAYERED,
    LAYERS,
    TWO,
    kept,
    one_clean_line,
    same,
)

pytestmark = pytest.mark.usefixtures("here")


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
    assert set(found) == {"rgb", "depth", "scores", "target"}
    assert found["target"] == "3"
    same(found, {**expected, "scores": expected.scores})
    assert f"{expected.scores.item():.4g}" in out
    if expected.comparable:
        assert all(f"{evidence.item():.4g}" in out for evidence in expected.evidence.values())
    assert Path("saliency.png").stat().st_size > 1000


def test_guided_gradcam_takes_layers_and_a_method(run, two):
    words = ["--method", "guided-gradcam", "--option", "method=hirescam", *LAYERED, "--target", "3"]
    assert run("saliency", *TWO, *words)[0] == 0
    model = load_model("nets.py:build")
    expected = mc.guided_gradcam(model, two, LAYERS, 3, method=mc.HiResCAM, output="logits")
    same(kept("saliency.npz"), {**expected, "scores": expected.scores})


def test_guided_gradcam_of_a_model_with_one_image(run):
    words = ["--method", "guided-gradcam", "--layer", "0.layer2", "--option", "method=hirescam"]
    assert run("saliency", "nets.py:single", "--input", "input=rgb.png", *words)[0] == 0
    expected = mc.guided_gradcam(load_model("nets.py:single"), read_image("rgb.png"), "0.layer2", method=mc.HiResCAM)
    same(kept("saliency.npz"), {"input": expected["input"]})


def test_some_inputs_are_explained(run):
    assert run("saliency", *TWO, "--wrt", "depth", "--out", "folder/one.png")[0] == 0
    assert set(kept("folder/one.npz")) == {"depth", "scores", "target"}


def test_the_saliency_picture_is_that_of_the_library(run, monkeypatch):
    seen = {}

    def drawn(inputs, found, **options):
        seen.update(options, names=list(inputs), found=list(found))
        return figure(inputs, found, **options)

    figure = mc.figures.saliency_figure
    monkeypatch.setattr("multicam.figures.saliency.saliency_figure", drawn)
    assert run("saliency", *TWO, *INPUTS, "--spectral", "depth", "--channels", "norm", "--target", "1")[0] == 0
    assert seen == {
        "names": ["rgb", "depth"], "found": ["rgb", "depth"], "channels": "norm", "spectral": ["depth"],
        "quantity": "gradient", "rows": ["sample 0", "sample 1"], "title": "target 1",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([*TWO, "--method", "gradients"], "no method 'gradients'; did you mean 'gradient'?"),
        ([*TWO, "--option", "samples=3"], "no option of gradient 'samples'"),
        ([*TWO, "--method", "smoothgrad", "--option", "sample=3"], "did you mean 'samples'?"),
        ([*TWO, "--layer", "rgb.layer1"], "guided_gradcam, and it alone, takes layers"),
        ([*TWO, "--method", "guided-gradcam"], "guided_gradcam, and it alone, takes layers"),
        ([*TWO, "--wrt", "dept"], "no input 'dept'; did you mean 'depth'?"),
    ],
    ids=range(6),
)  # fmt: skip
def test_an_error_is_one_clean_line(run, argv, message):
    one_clean_line(run("saliency", *argv), message)
