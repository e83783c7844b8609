from pathlib import Path

import pytest

import multicam as mc
from multicam.call.files import load_model
from tests.helpers.commands import INPUTS, TWO, one_clean_line

pytestmark = pytest.mark.usefixtures("here")


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
        (["nets.py:build", *INPUTS, "--onto", "rgb"], "say what to maximise"),
        ([*TWO, "--onto", "rgb", "--octaves", "2"], "a deep dream is of a layer"),
        ([*TWO, "--onto", "rgb", "--layer", "rgb.layer1", "--channel", "0,1", "--octaves", "2"], "a deep dream is of one channel, not of 2"),
        ([*TWO, "--layer", "rgb.layer1"], "say with onto="),
    ],
    ids=range(4),
)  # fmt: skip
def test_an_error_is_one_clean_line(run, argv, message):
    one_clean_line(run("dream", *argv), message)
