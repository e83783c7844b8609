from pathlib import Path

import pytest
import torch

import multicam as mc
from multicam.call.files import load_model
from tests.helpers.commands import INPUTS, TWO, kept, one_clean_line, same

pytestmark = pytest.mark.usefixtures("here")


def test_contribution_prints_keeps_and_draws_the_shares(run, two):
    code, out, _ = run("contribution", *TWO, "--target", "3", "--baseline", "mean")  # a progress bar goes to stderr
    assert code == 0
    expected = mc.contribution(load_model("nets.py:build"), two, 3, baseline="mean", output="logits")
    assert out.startswith(repr(expected))
    found = kept("contribution.npz")
    assert found["players"].tolist() == ["rgb", "depth"]
    assert found["target"] == "3"
    names = ("shapley", "shares", "single", "without", "scores", "nothing", "interactions")
    same(found, {name: getattr(expected, name) for name in names})
    assert "error" not in found
    assert Path("contribution.png").stat().st_size > 1000


def test_the_shares_of_several_samples_are_printed_one_by_one(run, two):
    words = ["--baseline", '{"depth": "blur"}', "--player", "both=rgb,depth", "--out", "folder/both.png"]
    code, out, _ = run("contribution", *TWO, *INPUTS, *words)
    assert code == 0
    inputs = {name: torch.cat([x, x]) for name, x in two.items()}
    expected = mc.contribution(
        load_model("nets.py:build"), inputs, None, players={"both": ["rgb", "depth"]}, baseline={"depth": "blur"}, output="logits"
    )  # fmt: skip
    lines = out.splitlines()
    assert lines[-5].split() == ["sample", "score", "nothing", "both"]
    for i, line in enumerate(lines[-4:-2]):
        numbers = [expected.scores[i], expected.nothing[i], expected.shapley[i, 0]]
        assert line.split() == [str(i), *(f"{x.item():.4g}" for x in numbers)]
    assert lines[-2:] == [f"numbers  {Path('folder/both.npz')}", f"picture  {Path('folder/both.png')}"]


@pytest.mark.parametrize(("words", "cuts"), [("rgb=2x1", {"rgb": (2, 1)}), ("2", 2)], ids=["one", "all"])
def test_the_score_is_shared_among_regions(run, two, words, cuts):
    code, out, _ = run("contribution", *TWO, "--target", "3", "--regions", words)
    assert code == 0
    expected = mc.region_contribution(load_model("nets.py:build"), two, 3, regions=cuts, output="logits")
    assert out.startswith(repr(expected.contribution))
    found = kept("contribution.npz")
    assert found["players"].tolist() == list(expected.contribution.players)
    same(found, {"map of rgb": expected.maps["rgb"]})
    assert Path("contribution.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([*TWO, "--player", "dept"], "no input 'dept'; did you mean 'depth'?"),
        ([*TWO, "--player", "rgb", "--player", "rgb"], "there are two players called 'rgb'"),
        ([*TWO, "--player", "rgb", "--player", "a=rgb,depth"], "input 'rgb' belongs to one player, once"),
        ([*TWO, "--regions", "rgb=2xa"], "regions are a number, or rows x columns as in 2x3, not '2xa'"),
        ([*TWO, "--regions", "rgb=2", "--regions", "rgb=3"], "there are two --regions of input 'rgb'"),
        ([*TWO, "--regions", "2", "--regions", "rgb=3"], "give --regions of all images, or of each by name, not both"),
        ([*TWO, "--regions", "2", "--player", "rgb"], "give --player or --regions, not both"),
        ([*TWO[:-2]], "so say what to explain with output="),
    ],
    ids=range(8),
)  # fmt: skip
def test_an_error_is_one_clean_line(run, argv, message):
    one_clean_line(run("contribution", *argv), message)
