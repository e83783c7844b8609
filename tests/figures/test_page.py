"""A page is white, can be saved in any format, and leaves matplotlib as it was."""

import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from multicam.errors import MulticamError
from multicam.figures.page import Picture
from multicam.figures.tiles import Tile, figure


def outlined() -> Picture:
    map = torch.arange(64.0).view(8, 8)
    return figure([[Tile(map.expand(3, -1, -1) / 64, map, "caption", region=map > 40)]], title="图")


def test_a_picture_is_saved_shown_and_read(tmp_path: Path) -> None:
    picture = figure([[Tile(torch.rand(3, 8, 8), torch.rand(8, 8))]], title="title")
    width, height = picture.figure.get_size_inches()
    assert picture._repr_png_()[:4] == b"\x89PNG"
    assert picture.rgb.dtype == np.uint8 and picture.rgb.shape[2] == 3
    assert np.allclose(np.array(picture.rgb.shape[:2]) / 150, [height, width], atol=0.01)
    with Image.open(picture.save(tmp_path / "a.png", dpi=200)) as saved:
        assert np.allclose(np.array(saved.size) / 200, [width, height], atol=0.01)
    assert b"/Type3" not in picture.save(str(tmp_path / "a.pdf")).read_bytes()
    with pytest.raises(MulticamError, match=r"no picture format '.pgn'; did you mean '.png'"):
        picture.save(tmp_path / "a.pgn")


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MulticamError, match=r'pip install "multicam-torch\[plot\]"'):
        figure([[Tile(torch.rand(3, 8, 8))]])


def test_chinese_labels_and_formulas_do_not_warn(tmp_path: Path) -> None:
    picture = figure(
        [[Tile(torch.rand(3, 8, 8), caption="频域 72 %")]], columns=["照片"], rows=["$x_f$ 样本"], title="图"
    )
    for suffix in (".png", ".pdf", ".svg"):
        assert picture.save(tmp_path / f"a{suffix}").stat().st_size > 1000


def test_a_dark_style_does_not_reach_the_page() -> None:
    dark = {"savefig.facecolor": "black", "axes.facecolor": "black", "text.color": "white", "savefig.bbox": "tight"}
    plain = outlined().rgb
    with matplotlib.rc_context({**dark, "figure.autolayout": True, "image.interpolation": "bilinear"}):
        assert np.array_equal(outlined().rgb, plain)


def test_nothing_global_changes(tmp_path: Path) -> None:
    before, rng = dict(matplotlib.rcParams), torch.get_rng_state()
    outlined().save(tmp_path / "a.pdf")
    assert dict(matplotlib.rcParams) == before
    assert torch.equal(torch.get_rng_state(), rng)
