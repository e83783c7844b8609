import re

import pytest
import torch

import multicam
from multicam import Layer, MulticamError, as_it_is, channels_last, tokens
from multicam.call.targets.scores import Binary, ClassScore, Contrast, Probability, Regression, TopClass
from multicam.cli.help import GRIDS, TARGETS
from multicam.cli.words import read_grid, read_layers, read_method, read_target


def test_layers_have_names_calls_and_picks():
    assert read_layers(["a.b"]) == {"map": Layer("a.b")}
    assert read_layers(["a.b"], ["7x9"], unnamed="rgb") == {"rgb": Layer("a.b", reshape=tokens(7, 9))}
    assert read_layers(["rgb=a#1:x.0", "depth=b"], ["depth=4x4"]) == {
        "rgb": Layer("a", call=1, pick="x.0"),
        "depth": Layer("b", reshape=tokens(4, 4)),
    }


@pytest.mark.parametrize(
    ("layers", "grids", "message"),
    [
        (["a", "b"], [], "several layers need a name each"),
        (["a", "rgb=b"], [], "several layers need a name each"),
        (["rgb=a", "b"], [], "several layers need a name each"),
        (["rgb=a", "rgb=b"], [], "several layers need a name each"),
        (["target=a"], [], "a map cannot be called 'target'"),
        (["rgb=a"], ["rbg=4x4"], "no layer called 'rbg'; did you mean 'rgb'"),
        (["rgb=a#x"], [], "must be a number counted from 0"),
    ],
)
def test_layers_that_cannot_be_told_apart(layers, grids, message):
    with pytest.raises(MulticamError, match=message):
        read_layers(layers, grids)


@pytest.mark.parametrize(
    ("text", "reshape", "shape"),
    [
        ("4x6", tokens(4, 6), (2, 24, 5)),
        ("4x6+2", tokens(4, 6, prefix=2), (2, 26, 5)),
        ("4x6@3", tokens(4, 6, part=slice(3, 27)), (2, 40, 5)),
        ("4x6@0,sequence-first", tokens(4, 6, part=slice(0, 24), sequence_first=True), (40, 2, 5)),
        ("2x4x6", tokens(2, 4, 6), (2, 48, 5)),
        ("24", tokens(24), (2, 24, 5)),
        ("channels-last", channels_last, (2, 4, 6, 5)),
        ("as-it-is", as_it_is, (2, 5, 4, 6)),
    ],
)
def test_grids_are_reshapes(text, reshape, shape):
    x = torch.arange(torch.Size(shape).numel()).view(shape)
    assert torch.equal(read_grid(text)(x), reshape(x))


@pytest.mark.parametrize("text", GRIDS)
def test_the_grids_that_errors_list_are_understood(text):
    assert callable(read_grid(text))


@pytest.mark.parametrize("text", ["", "14x", "x", "14x14+", "14 x 14", "chanels-last"])
def test_a_grid_that_is_none(text):
    with pytest.raises(MulticamError, match=rf"no grid '{re.escape(text)}'.* There are: '14x14', "):
        read_grid(text)


@pytest.mark.parametrize("text", ["gradcam", "GradCAM", "grad-cam", "GRAD_CAM"])
def test_methods_go_by_their_names(text):
    assert read_method(text) is multicam.GradCAM
    assert read_method("rise") is multicam.RISE
    assert read_method("gradcam++") is read_method("GradCAMPlusPlus") is multicam.GradCAMPlusPlus


def test_a_method_that_is_none():
    with pytest.raises(MulticamError, match=r"no method 'gradcan'; did you mean 'gradcam'.*'eigencam'"):
        read_method("GradCAN")
    for word in ("finer-cam", "SESS", "Eigen_Smoothed"):
        with pytest.raises(MulticamError, match=r"refines another method's maps, .*\(GradCAM\(model, layers\)\)"):
            read_method(word)
    with pytest.raises(MulticamError, match="no method 'cam'"):  # the abstract one
        read_method("CAM")


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("top", TopClass()),
        ("3", ClassScore(3)),
        ("-1", ClassScore(-1)),
        ("3,1,0", ClassScore([3, 1, 0])),
        ("prob:3", Probability(3)),
        ("prob:3,1", Probability([3, 1])),
        ("contrast:3,5,7", Contrast(3, 5, 7)),
        ("binary", Binary()),
        ("binary:no", Binary(positive=False)),
        ("regression", Regression()),
        ("regression:2", Regression(2)),
    ],
)
def test_targets(text, target):
    assert read_target(text) == target


@pytest.mark.parametrize("text", TARGETS)
def test_the_targets_that_errors_list_are_understood(text):
    assert callable(read_target(text))


def test_a_target_of_ones_own(tmp_path):
    (tmp_path / "mine.py").write_text("def area(output):\n    return output.mean((1, 2, 3))\n")
    target = read_target(f"{tmp_path}/mine.py:area")
    assert torch.equal(target(torch.ones(2, 3, 4, 4)), torch.ones(2))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tpo", "no target 'tpo'; did you mean 'top'"),
        ("porb:3", "no target 'porb:3'; did you mean 'prob:3'"),
        ("prob:three", "no target 'prob:three'"),
        ("binary:maybe", "no target 'binary:maybe'; did you mean"),
        ("regression:1,2", "no target 'regression:1,2'"),
        ("1.5", "no target '1.5'"),
        ("", "no target ''"),
        ("contrast:3", "Contrast needs at least one other class"),
        ("no_such_module:area", "importing no_such_module failed"),
    ],
)
def test_a_target_that_is_none(text, message):
    with pytest.raises(MulticamError, match=message):
        read_target(text)
