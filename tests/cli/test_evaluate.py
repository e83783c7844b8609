import csv
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import multicam as mc
from multicam.call.files import load_model
from multicam.cli.words import read_metric
from multicam.metrics.evaluation import Batch, evaluate
from multicam.metrics.explanations import explainer
from multicam.metrics.measures import METRICS
from tests.helpers.commands import INPUTS, LAYERED, LAYERS, TWO, help_has_an_example_and_its_lists, one_clean_line

pytestmark = pytest.mark.usefixtures("here")
METHOD = ["--method", "gradient"]


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
    assert run("evaluate", *TWO, *INPUTS, *words)[0] == 0
    with Path("evaluation.csv").open(encoding="utf-8", newline="") as file:
        [row] = csv.DictReader(file)
    # The two samples are one photo, and the two regions its halves.
    assert float(row["mean"]) == pytest.approx(0.5, abs=1e-5)
    assert row["samples"] == "2"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([*TWO, "--method", "gradients"], "no method 'gradients'; did you mean 'gradient'?"),
        ([*TWO, *METHOD, "--metric", "deletoin"], "no metric 'deletoin'; did you mean 'deletion'?"),
        ([*TWO, "--method", "gradcam"], "GradCAM explains a layer: give one with --layer"),
        ([*TWO, "--method", "guided-gradcam"], "guided_gradcam explains a layer: give one with --layer"),
        ([*TWO, *METHOD, "--metric", "pointing"], "nothing says where the evidence is"),
        ([*TWO, *METHOD, "--region", "depht=depth.npy"], "no input 'depht'; did you mean 'depth'?"),
        ([*TWO, *METHOD, "--region", "rgb=rgb.png", "--region", "rgb=depth.npy"], "the regions of input 'rgb' must have one size"),
        ([*TWO, *METHOD, "--metric", "energy-within", "--region", "rgb=depth.npy"], "are not as large as its maps"),
        ([*TWO, *METHOD, "--out", "table.txt"], "no kind of table '.txt'"),
        ([*TWO, *METHOD, "--steps", "0"], "steps must be a whole number of at least 1"),
    ],
    ids=range(10),
)  # fmt: skip
def test_an_error_is_one_clean_line(run, argv, message):
    one_clean_line(run("evaluate", *argv), message)


def test_help_lists_every_metric(capsys):
    out = help_has_an_example_and_its_lists(capsys, "evaluate")
    listed = out.partition("\nmetrics;")[2].partition("\ntargets:")[0]
    rows = re.findall(r"^  (\S+) +(up|down): \w", listed, re.MULTILINE)
    assert [(read_metric(word), better) for word, better in rows] == [(m.name, m.better) for m in METRICS.values()]
