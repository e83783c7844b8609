from pathlib import Path

import pytest

import multicam as mc
from multicam.call.files import load_model
from tests.helpers.commands import one_clean_line

pytestmark = pytest.mark.usefixtures("here")


def test_kernels_need_no_inputs(run, monkeypatch):
    seen = {}
    sheet = mc.figures.kernel_sheet
    monkeypatch.setattr(
        "multicam.figures.features.kernel_sheet",
        lambda found, **options: seen.update(options) or sheet(found, **options),
    )
    code, out, err = run(
        "kernels", "nets.py:build", "--layer", "rgb.layer1.0", "--channels", "1,2", "--in-channels", "0"
    )
    assert (code, err) == (0, "")
    assert repr(mc.kernels(load_model("nets.py:build").rgb.layer1[0])) in out
    assert seen == {"channels": [1, 2], "in_channels": [0], "most": 64, "title": "rgb.layer1.0"}
    assert Path("kernels.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nets.py:build", "--layer", "head"], "kernels are those of a convolution"),
        (["nets.py:build", "--layer", "rgb.layer1.9"], "no layer in TwoBranch 'rgb.layer1.9'"),
    ],
    ids=range(2),
)  # fmt: skip
def test_an_error_is_one_clean_line(run, argv, message):
    one_clean_line(run("kernels", *argv), message)
