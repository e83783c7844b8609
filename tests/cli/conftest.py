"""A folder with a module of models and files to give them."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from multicam.call.files import read_image
from multicam.cli.main import main

NETS = Path(__file__).parents[1] / "helpers" / "nets.py"


@pytest.fixture
def here(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    shutil.copy(NETS, tmp_path)
    Image.fromarray(rng.integers(0, 256, (32, 40, 3), dtype=np.uint8)).save(tmp_path / "rgb.png")
    np.save(tmp_path / "depth.npy", rng.random((16, 20)))
    np.save(tmp_path / "audio.npy", rng.random((1, 1, 64), dtype=np.float32))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    return tmp_path


@pytest.fixture
def run(capsys, monkeypatch):
    # Progress bars appear after two seconds: here never, however slow the machine is.
    monkeypatch.setattr("tqdm.std.time", lambda: 0.0)

    def run(*argv):
        code = main(argv)
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def two():
    return {"rgb": read_image("rgb.png"), "depth": read_image("depth.npy")}
