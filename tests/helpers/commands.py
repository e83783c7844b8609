"""What the tests of the commands say to them, and what is expected of each."""

import numpy as np
import pytest
import torch

from multicam.cli.main import main

INPUTS = ["--input", "rgb=rgb.png", "--input", "depth=depth.npy"]
TWO = ["nets.py:build", *INPUTS, "--output", "logits"]
LAYERS = {"rgb": "rgb.layer2", "depth": "depth.layer2"}
LAYERED = [word for name, path in LAYERS.items() for word in ("--layer", f"{name}={path}")]


def kept(path):
    """The arrays of an .npz file."""
    with np.load(path) as arrays:
        return dict(arrays)


def same(arrays, expected):
    """The arrays of those names are those tensors, bit by bit."""
    found = {name: torch.from_numpy(arrays[name]) for name in expected}
    torch.testing.assert_close(found, dict(expected), rtol=0, atol=0)


def one_clean_line(answer, message):
    """The command failed, and says no more than what is wrong and what to do."""
    code, _, err = answer
    assert code == 1
    assert err.startswith("multicam: ")
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" not in err


def help_of(capsys, *words):
    """What `--help` prints."""
    with pytest.raises(SystemExit, match="0"):
        main([*words, "--help"])
    return capsys.readouterr().out


def help_has_an_example_and_its_lists(capsys, name):
    """The help ends with an example, and every place of a list is filled."""
    out = help_of(capsys, name)
    assert f"\n  multicam {name} " in out.partition("\nexample:")[2]
    assert not [place for place in ("{targets}", "{grids}", "{methods}", "{attributions}") if place in out]
    return out
