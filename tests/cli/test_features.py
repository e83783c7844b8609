from pathlib import Path

import pytest
import torch

import multicam as mc
from multicam.call.files import load_model
from tests.helpers.commands import INPUTS, kept, one_clean_line, same

pytestmark = pytest.mark.usefixtures("here")


def test_features_are_those_of_the_layer(run, two):
    code, out, err = run("features", "nets.py:build", *INPUTS, "--layer", "rgb=rgb.layer1", "--channels", "5,0")
    assert (code, err) == (0, "")
    maps = mc.feature_maps(load_model("nets.py:build"), two, "rgb.layer1")
    same(kept("features.npz"), {"maps": maps})
    assert out == f"maps     features.npz {tuple(maps.shape)}\npicture  features.png\n"
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


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nets.py:build", *INPUTS, "--layer", "rgb.layer9"], "no layer in TwoBranch 'rgb.layer9'"),
        (["nets.py:build", *INPUTS, "--layer", "rgb.layer1", "--channels", "8"], "channels are 0 to 7, not 8"),
        (["nets.py:build", *INPUTS, "--layer", "rgb.layer1", "--sample", "1"], "samples are 0 to 0, not 1"),
    ],
    ids=range(3),
)  # fmt: skip
def test_an_error_is_one_clean_line(run, argv, message):
    one_clean_line(run("features", *argv), message)
