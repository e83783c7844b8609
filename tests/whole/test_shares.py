"""One definition of a share: tables, captions, texts and files of one run say the same number for the same question."""

import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import multicam as mc
from multicam.call.files import load_model
from multicam.cli.main import main
from multicam.figures import contribution_figure
from multicam.figures.page import Picture
from tests.helpers.pictures import said

# What the left and the right half of each input bring to the score: of either sign, none, and halves that differ in sign.
BRINGS = {
    "one against": ((0.3, 0.4), (-2.0, -1.0)),
    "all against": ((-0.3, -0.1), (-2.0, -1.0)),
    "one without": ((0.3, 0.4), (0.0, 0.0)),
    "all without": ((0.0, 0.0), (0.0, 0.0)),
    "halves apart": ((2.0, -1.5), (0.2, -0.9)),
}
NETS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, rgb, depth):
        super().__init__()
        self.rgb, self.depth = nn.Conv2d(3, 1, 1, bias=False), nn.Conv2d(1, 1, 1, bias=False)
        for conv in (self.rgb, self.depth):
            nn.init.ones_(conv.weight)
        self.brings = {"rgb": rgb, "depth": depth}

    def forward(self, rgb, depth):
        score = 0
        for name, x in (("rgb", self.rgb(rgb)), ("depth", self.depth(depth))):
            for half, much in zip(x.chunk(2, 3), self.brings[name]):
                score = score + much * half.mean((1, 2, 3))
        return torch.stack([score, -score], 1)
"""
TWO = ["nets.py:build", "--input", "rgb=rgb.npy", "--input", "depth=depth.npy", "--target", "0"]
LAYERS = {"rgb": "rgb", "depth": "depth"}
LAYERED = ["--layer", "rgb=rgb", "--layer", "depth=depth"]
pytestmark = [
    pytest.mark.parametrize("brings", BRINGS.values(), ids=BRINGS),
    pytest.mark.filterwarnings("ignore:the .* map of layer:UserWarning"),
]
PERCENT = re.compile(r"^(-?\d+)\s*%$")


@pytest.fixture
def two(brings: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    monkeypatch.chdir(tmp_path)
    # Progress bars appear after two seconds: here never, however slow the machine is.
    monkeypatch.setattr("tqdm.std.time", lambda: 0.0)
    Path("nets.py").write_text(f"{NETS}\ndef build():\n    return Net{brings}\n")
    inputs = {}
    for name, channels in (("rgb", 3), ("depth", 1)):
        values = np.random.default_rng(channels).random((1, channels, 4, 6), dtype=np.float32) + 0.5
        np.save(f"{name}.npy", values)
        inputs[name] = torch.from_numpy(values)
    return inputs


@pytest.fixture
def expected(brings: tuple, two: dict[str, torch.Tensor]) -> list[list[float]]:
    """What each half of each input brings: how much, times the mean of what the convolution makes of it."""
    return [
        [much * half.sum(1).mean().item() for half, much in zip(x.chunk(2, 3), of, strict=True)]
        for x, of in zip(two.values(), brings, strict=True)
    ]


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *argv: str) -> tuple[str, Picture, dict]:
    """What the command printed, drew, and kept."""
    drawn: list[Picture] = []
    save = Picture.save

    def saved(picture: Picture, path: Path, dpi: int = 300) -> Path:
        drawn.append(picture)
        return save(picture, path, 30)

    monkeypatch.setattr(Picture, "save", saved)
    assert main([*argv, "--out", "out.png"]) == 0
    with np.load("out.npz") as arrays:
        return capsys.readouterr().out, drawn[-1], dict(arrays)


def whole(amounts: list[float]) -> list[int]:
    """The definition, in whole percents."""
    total = sum(map(abs, amounts))
    return [round(100 * amount / total) if total else 0 for amount in amounts]


def percents(words: list[str]) -> list[int]:
    return [int(found[1]) for word in words if (found := PERCENT.match(word))]


def rows(out: str, first: str) -> list[list[str]]:
    """The words of the lines that begin so."""
    return [line.split() for line in out.splitlines() if line.split()[:1] == [first]]


def captions(picture: Picture) -> dict[str, int]:
    """The percentages of the captions, by name."""
    found = [re.fullmatch(r"(\S+) (-?\d+) %", text) for text in said(picture)]
    return {match[1]: int(match[2]) for match in found if match}


def test_contribution(two, expected, capsys, monkeypatch) -> None:
    out, picture, arrays = run(capsys, monkeypatch, "contribution", *TWO)
    shares = whole([sum(halves) for halves in expected])
    found = mc.contribution(load_model("nets.py:build"), two, 0)
    assert out.startswith(repr(found))
    assert [percents(line) for name in two for line in rows(out, name)] == [[share] for share in shares]
    labels = [text.get_text().rpartition("  ")[2] for text in picture.figure.axes[0].get_yticklabels()]
    again = [
        text.get_text().rpartition("  ")[2] for text in contribution_figure(found).figure.axes[0].get_yticklabels()
    ]
    assert percents(labels) == percents(again) == shares
    assert [round(100 * share) for share in arrays["shares"][0].tolist()] == shares
    assert whole(arrays["shapley"][0].tolist()) == shares
    assert np.array_equal(arrays["shares"], found.shares.numpy())


def test_contribution_of_regions(two, expected, capsys, monkeypatch) -> None:
    out, picture, arrays = run(capsys, monkeypatch, "contribution", *TWO, "--regions", "1x2")
    regions = whole([half for halves in expected for half in halves])
    inputs = whole([sum(halves) for halves in expected])
    found = mc.region_contribution(load_model("nets.py:build"), two, 0, regions=(1, 2))
    assert out.startswith(repr(found.contribution))
    named = [f"{name}[{i}]" for name in two for i in range(2)]
    assert [percents(line) for name in named for line in rows(out, name)] == [[share] for share in regions]
    assert percents(rows(out, "0")[-1]) == inputs  # the table of the inputs comes last
    assert list(captions(picture).values()) == percents(re.findall(r"-?\d+%", repr(found))) == inputs
    from_python = mc.panel(two, found.maps)
    assert captions(from_python) == captions(picture)
    assert [round(100 * arrays[f"share of {name}"].item()) for name in two] == inputs
    assert [round(100 * share) for share in arrays["shares"][0].tolist()] == regions
    assert whole([float(arrays[f"map of {name}"].mean()) for name in two]) == inputs


@pytest.mark.parametrize("signed", [False, True], ids=["cut", "signed"])
def test_explain(two, expected, capsys, monkeypatch, signed: bool) -> None:
    out, picture, arrays = run(
        capsys, monkeypatch, "explain", *TWO, *LAYERED, "--method", "hirescam", *["--signed"] * signed
    )
    evidence = [sum(halves if signed else (max(half, 0.0) for half in halves)) for halves in expected]
    shares = whole(evidence)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        maps = mc.HiResCAM(load_model("nets.py:build"), LAYERS)(two, 0, signed=signed)
    assert percents(rows(out, "0")[0]) == list(captions(picture).values()) == shares
    assert captions(mc.panel(two, maps)) == captions(picture)
    assert [round(100 * share) for share in maps.shares()[0].tolist()] == shares
    assert whole([float(arrays[name].mean(dtype=np.float64)) for name in two]) == shares
    # Evidence that was cut is called what it is, on paper and on the screen.
    against = any(half < 0 for halves in expected for half in halves) and signed
    words = "shares of the evidence, with its sign" if against else "shares of the positive evidence"
    assert f"percentages are {words}" in out and f"percentages are {words}" in said(picture)


def test_explain_by_several_methods(two, expected, capsys, monkeypatch) -> None:
    methods = ["--method", "hirescam", "--method", "gradcam", "--signed"]
    out, picture, _ = run(capsys, monkeypatch, "explain", *TWO, *LAYERED, *methods)
    table = percents(rows(out, "0")[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = mc.explain_methods(load_model("nets.py:build"), two, LAYERS, [mc.HiResCAM, mc.GradCAM], 0, signed=True)
    assert table == [round(100 * s) for maps in found.values() for s in maps.shares()[0].tolist()]
    assert table[:2] == whole([sum(halves) for halves in expected])
    drawn = [re.fullmatch(r"(rgb|depth) (-?\d+) %", text) for text in said(picture)]
    by_row = [int(match[2]) for match in drawn if match]  # an input is a row, a method a column
    assert by_row == [table[i] for i in (0, 2, 1, 3)]


def test_attributions(two, expected) -> None:
    """Evidence entry by entry: its maps, their picture and its sum."""
    found = mc.input_x_gradient(load_model("nets.py:build"), two, 0)
    shares = whole([sum(halves) for halves in expected])
    assert whole([each.item() for each in found.evidence.values()]) == shares
    assert list(captions(mc.panel(two, found.maps())).values()) == shares
