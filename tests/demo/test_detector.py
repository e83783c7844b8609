"""The bundled detector: what it is given, that it detects, and where its evidence lies."""

import torch
from safetensors.torch import load_file

from multicam import demo
from multicam.cam.weighted import HiResCAM
from multicam.demo import training
from multicam.demo.detector import LAYERS, WEIGHTS, EditDetector, inputs_of, inputs_of_crops, load
from multicam.demo.photos import SIDE
from multicam.demo.training import areas, logits_of
from tests.helpers.generators import seeded


def test_inputs_cover_the_same_crop_place_by_place(crops):
    changed = crops.clone()
    changed[:, :, 40:48, 72:80] += 20 * torch.randn(8, 8, generator=seeded())
    before, after = inputs_of_crops(crops), inputs_of_crops(changed)
    for name, x in before.items():
        cell = SIDE // x.shape[-1]
        rows, columns = torch.nonzero((after[name] - x).abs().amax((0, 1)) > 1e-4).T
        reach = {"rgb": 1, "frequency": 0, "texture": 4}[name]
        assert rows.min() * cell >= 40 - reach - cell and rows.max() * cell < 48 + reach
        assert columns.min() * cell >= 72 - reach - cell and columns.max() * cell < 80 + reach


def test_the_bundled_weights_are_small_and_fit():
    assert WEIGHTS.stat().st_size < 2_000_000
    model = load()
    assert not model.training
    assert load_file(WEIGHTS).keys() == EditDetector().state_dict().keys()


def test_the_bundled_detector_detects_and_its_evidence_lies_in_the_input_edited(small_trial):
    model = load()
    assert min(areas(logits_of(model, small_trial.crops), small_trial.labels)) > 0.85
    edits = small_trial.where(small_trial.labels >= 0)
    maps = training.maps_of(HiResCAM(model, LAYERS), edits.crops)
    assert {name: tuple(m.shape[1:]) for name, m in maps.items()} == {
        "rgb": (64, 64),
        "frequency": (16, 16),
        "texture": (32, 32),
    }
    assert (maps.shares().argmax(1) == edits.labels).float().mean() > 0.7


def test_the_detector_takes_any_photo():
    assert load()(**inputs_of(demo.photo("coffee"))).shape == (1, 3)
