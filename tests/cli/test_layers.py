import pytest

import multicam as mc
from multicam.call.files import load_model
from tests.helpers.commands import INPUTS

pytestmark = pytest.mark.usefixtures("here")


def test_layers_are_the_table_of_the_library(run, two):
    table = mc.list_layers(load_model("nets.py:build"), two)
    assert run("layers", "nets.py:build", *INPUTS) == (0, f"{table!r}\n", "")
    assert run("layers", "nets.py:build", *INPUTS, "--find", "layer2") == (0, f"{table.find('layer2')!r}\n", "")


def test_a_layer_that_is_not_found(run):
    code, out, err = run("layers", "nets.py:build", *INPUTS, "--find", "layer3")
    assert (code, out) == (1, "")
    assert err.startswith("multicam: no layer 'layer3'")
