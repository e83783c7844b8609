"""The commands print, keep and draw the numbers of the library."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

import multicam as mc
from multicam.call.files import load_model
from multicam.cli.main import main
from multicam.cli.words import read_metric
from multicam.metrics.evaluation import Batch, evaluate
from multicam.metrics.explanations import explainer
from multicam.metrics.measures import METRICS

pytestmark = pytest.mark.usefixtures("here")
TWO = ["nets.py:build", "--input", "rgb=rgb.png", "--input", "depth=depth.npy", "--output", "logits"]
FURTHER = ["--input", "rgb=rgb.png", "--input", "depth=depth.npy"]
LAYERS = {"rgb": "rgb.layer2", "depth": "depth.layer2"}
LAYERED = ["--layer", "rgb=rgb.layer2", "--layer", "depth=depth.layer2"]


def kept(path):
    with np.load(path) as arrays:
        return dict(arrays)


def test_contribution_prints_keeps_and_draws_the_shares(run, two):
    code, out, _ = run("contribution", *TWO, "--target", "3", "--baseline", "mean")  # a progress bar goes to stderr
    assert code == 0
    expected = mc.contribution(load_model("nets.py:build"), two, 3, baseline="mean", output="logits")
    assert out.startswith(repr(expected))
    found = kept("contribution.npz")
    assert found["players"].tolist() == ["rgb", "depth"]
    assert found["target"] == "3"
    for name in ("shapley", "shares", "single", "without", "scores", "nothing", "interactions"):
        torch.testing.assert_close(torch.from_numpy(found[name]), getattr(expected, name), rtol=0, atol=0)
    assert "error" not in found
    assert Path("contribution.png").stat().st_size > 1000


def test_the_shares_of_several_samples_are_printed_one_by_one(run, two):
    words = ["--baseline", '{"depth": "blur"}', "--player", "both=rgb,depth", "--out", "folder/both.png"]
    code, out, _ = run("contribution", *TWO, *FURTHER, *words)
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
    torch.testing.assert_close(torch.from_numpy(found["map of rgb"]), expected.maps["rgb"], rtol=0, atol=0)
    assert Path("contribution.png").stat().st_size > 1000


def test_evaluate_prints_and_keeps_the_table(run, two):
    np.save("mask.npy", np.arange(16 * 20).reshape(16, 20) > 150)
    words = ["--method", "hires-cam", "--method", "Integrated-Gradients", "--method", "fullgrad", *LAYERED]
    metrics = ["--metric", "deletion", "--metric", "Energy-Within", "--metric", "names_input", "--metric", "complexity"]
    rest = ["--region", "depth=mask.npy", "--target", "3", "--signed", "--baseline", "mean", "--steps", "3", "--seed", "2"]  # fmt: skip
    code, out, _ = run("evaluate", *TWO, *words, *metrics, *rest)  # a progress bar goes to stderr
    assert code == 0
    methods = {
        "HiResCAM": explainer(mc.HiResCAM, LAYERS, output="logits", signed=True),
        "integrated_gradients": lambda *call: mc.integrated_gradients(*call, output="logits"),
        "FullGrad": explainer(mc.FullGrad, ["rgb", "depth"], output="logits", signed=True),
    }
    names = ["deletion", "energy within", "names input", "complexity"]
    mask = torch.from_numpy(np.load("mask.npy"))[None]
    expected = evaluate(
        load_model("nets.py:build"), methods, names, [Batch(two, 3, {"depth": mask})],
        output="logits", baseline="mean", steps=3, seed=2,
    )  # fmt: skip
    assert out == f"{expected!r}\ntable    evaluation.csv\n"
    with Path("evaluation.csv").open(encoding="utf-8", newline="") as file:
        rows = {(row["method"], row["metric"]): float(row["mean"]) for row in csv.DictReader(file)}
    expected_rows = {(row.method, row.metric): row.mean for row in expected.table()}
    assert rows == pytest.approx(expected_rows, nan_ok=True)


def test_one_image_needs_no_name_and_a_table_may_be_markdown(run):
    words = ["--input", "input=rgb.png", "--layer", "0.layer2", "--method", "gradcam", "--method", "guided-gradcam"]
    code, out, _ = run("evaluate", "nets.py:single", *words, "--steps", "2", "--out", "folder/table.md")
    assert code == 0
    assert out.splitlines()[0].split() == ["deletion", "↓", "insertion", "↑"]
    assert "†" not in out
    table = Path("folder/table.md").read_text(encoding="utf-8").splitlines()
    assert table[0] == "|  | deletion ↓ | insertion ↑ |"
    assert [line.split("|")[1].strip() for line in table[2:]] == ["GradCAM", "guided_gradcam"]


def test_pictures_of_regions_are_of_every_sample(run):
    """Whatever is not black lies inside."""
    from PIL import Image

    for name, rows in (("top", slice(0, 16)), ("low", slice(16, 32))):
        mask = np.zeros((32, 40, 3), np.uint8)
        mask[rows, :, 1] = 1
        Image.fromarray(mask).save(f"{name}.png")
    regions = ["--region", "rgb=top.png", "--region", "rgb=low.png"]
    words = ["--method", "input-x-gradient", "--metric", "energy-within", "--target", "1", *regions]
    assert run("evaluate", *TWO, *FURTHER, *words)[0] == 0
    with Path("evaluation.csv").open(encoding="utf-8", newline="") as file:
        [row] = csv.DictReader(file)
    # The two samples are one photo, and the two regions its halves.
    assert float(row["mean"]) == pytest.approx(0.5, abs=1e-5)
    assert row["samples"] == "2"


METHOD = ["--method", "gradient"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["contribution", *TWO, "--player", "dept"], "no input 'dept'; did you mean 'depth'?"),
        (["contribution", *TWO, "--player", "rgb", "--player", "rgb"], "there are two players called 'rgb'"),
        (["contribution", *TWO, "--player", "rgb", "--player", "a=rgb,depth"], "input 'rgb' belongs to two players"),
        (["contribution", *TWO, "--regions", "rgb=2xa"], "regions are a number, or rows x columns as in 2x3, not '2xa'"),
        (["contribution", *TWO, "--regions", "rgb=2", "--regions", "rgb=3"], "there are two --regions of input 'rgb'"),
        (["contribution", *TWO, "--regions", "2", "--regions", "rgb=3"], "give --regions of all images, or of each by name, not both"),
        (["contribution", *TWO, "--regions", "2", "--player", "rgb"], "give --player or --regions, not both"),
        (["contribution", *TWO[:-2]], "so say what to explain with output="),
        (["evaluate", *TWO, "--method", "gradients"], "no method 'gradients'; did you mean 'gradient'?"),
        (["evaluate", *TWO, *METHOD, "--metric", "deletoin"], "no metric 'deletoin'; did you mean 'deletion'?"),
        (["evaluate", *TWO, "--method", "gradcam"], "GradCAM explains a layer: give one with --layer"),
        (["evaluate", *TWO, "--method", "guided-gradcam"], "guided_gradcam explains a layer: give one with --layer"),
        (["evaluate", *TWO, *METHOD, "--metric", "pointing"], "nothing says where the evidence is"),
        (["evaluate", *TWO, *METHOD, "--region", "depht=depth.npy"], "no input 'depht'; did you mean 'depth'?"),
        (["evaluate", *TWO, *METHOD, "--region", "rgb=rgb.png", "--region", "rgb=depth.npy"], "the regions of input 'rgb' must have one size"),
        (["evaluate", *TWO, *METHOD, "--metric", "energy-within", "--region", "rgb=depth.npy"], "are not as large as its maps"),
        (["evaluate", *TWO, *METHOD, "--out", "table.txt"], "no kind of table '.txt'"),
        (["evaluate", *TWO, *METHOD, "--steps", "0"], "steps must be a whole number of at least 1"),
    ],
    ids=range(18),
)  # fmt: skip
def test_an_error_is_one_clean_line(run, argv, message):
    code, _, err = run(*argv)
    assert code == 1
    assert err.startswith("multicam: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", ["contribution", "evaluate"])
def test_help_has_an_example_and_the_targets(capsys, name):
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    out = capsys.readouterr().out
    assert f"\n  multicam {name} nets.py:build" in out
    assert "\n  prob:3 " in out
    assert "{targets}" not in out


def test_help_lists_every_metric(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["evaluate", "--help"])
    listed = capsys.readouterr().out.partition("\nmetrics;")[2].partition("\ntargets:")[0]
    words = [word.strip(",:") for line in listed.splitlines()[1:] for word in line.partition(":")[0].split()]
    named = [word for word in words if word not in ("up", "down")]
    assert sorted(map(read_metric, named)) == sorted(METRICS)
