"""What each edit changes, where, and what it leaves alone."""

import numpy as np
import pytest
import torch

from multicam import demo
from multicam.demo import edits
from multicam.demo.detector import LAYERS, inputs_of_crops
from multicam.demo.edits import CLASSES, EDITS, sample
from multicam.demo.photos import PHOTOS, SIDE
from multicam.errors import MulticamError
from tests.helpers.generators import seeded


@pytest.mark.parametrize(("edit", "blind"), [("colour", ("frequency", "texture")), ("frequency", ("rgb", "texture"))])
def test_edits_are_invisible_to_the_other_inputs(crops, edit, blind):
    before, after = inputs_of_crops(crops), inputs_of_crops(EDITS[edit](seeded(), crops))
    for name in LAYERS:
        # The outermost cells see the mirrored border, where a lattice does not cancel.
        change = (after[name] - before[name])[..., 1:-1, 1:-1].abs().max()
        assert (change < 1e-3) == (name in blind)


def test_grain_shows_in_the_texture_far_more_than_in_the_photo(crops):
    before, after = inputs_of_crops(crops), inputs_of_crops(EDITS["texture"](seeded(), crops))
    assert (after["texture"] - before["texture"]).mean() > 0.5
    assert (after["rgb"] - before["rgb"]).std() < 0.02


def test_recolouring_keeps_luma(crops):
    luma = torch.tensor([0.299, 0.587, 0.114])
    after = EDITS["colour"](seeded(), crops)
    assert torch.allclose(torch.einsum("c,bchw->bhw", luma, after - crops), torch.zeros(()), atol=1e-3)
    assert torch.allclose(edits.to_rgb(edits.to_ycc(crops)), crops, atol=1e-3)


def test_a_lattice_is_a_line_at_the_highest_frequency():
    flat = torch.full((20, 3, SIDE, SIDE), 128.0)
    lines = inputs_of_crops(EDITS["frequency"](seeded(), flat))["frequency"] - inputs_of_crops(flat)["frequency"]
    assert set(lines.mean((2, 3)).argmax(1).tolist()) == {7, 56, 63}


def test_regions_have_the_size_they_promise():
    soft = edits.regions(seeded(), 200)
    area = (soft > 0.5).float().mean((1, 2, 3))
    assert soft.min() == 0 and soft.max() == 1
    assert area.min() > 1 / 20 and area.max() < 1 / 5


def test_blurring_keeps_a_constant_and_wipes_out_the_lattice():
    sign = (1.0 - 2 * (torch.arange(16) % 2)).expand(1, 1, 16, 16)
    assert torch.equal(edits.blurred(torch.ones(1, 1, 8, 8)), torch.ones(1, 1, 8, 8))
    assert edits.blurred(sign)[..., 1:-1].abs().max() == 0


@pytest.mark.parametrize("name", PHOTOS["final"])
def test_samples_are_edited_inside_disjoint_regions_only(name):
    one, two = sample(name, seed=3), sample(name, seed=3)
    assert np.array_equal(one.image, two.image) and list(one.regions) == list(CLASSES)
    assert torch.stack(list(one.regions.values())).sum(0).max() == 1
    for edit, region in sample(name, ["texture"], corner=(20, 30)).regions.items():
        original = demo.photo(name)[20:148, 30:158]
        changed = torch.from_numpy((sample(name, [edit], corner=(20, 30)).image != original).any(2))
        near = torch.nn.functional.max_pool2d(region[None].float(), 11, stride=1, padding=5)[0] > 0
        assert changed[region].float().mean() > 0.5 and not changed[~near].any()
    top, left = demo.VIEWS[name]
    assert np.array_equal(sample(name, []).image, demo.photo(name)[top : top + SIDE, left : left + SIDE])


def test_a_sample_without_a_view_shows_the_middle():
    assert np.array_equal(sample("coins", []).image, demo.crop_of(demo.photo("coins")))


def test_impossible_samples_are_refused():
    with pytest.raises(MulticamError, match="no edit 'color'; did you mean 'colour'"):
        sample("chelsea", ["color"])
    with pytest.raises(MulticamError, match=r"at \(200, 0\) reaches beyond 'chelsea', \(300, 451\)"):
        sample("chelsea", corner=(200, 0))
