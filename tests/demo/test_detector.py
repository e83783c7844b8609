from functools import partial

import numpy as np
import pytest
import torch
from einops import rearrange
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score

from multicam import demo
from multicam.cam.weighted import HiResCAM
from multicam.demo import edits, training
from multicam.demo.detector import LAYERS, WEIGHTS, EditDetector, inputs_of, inputs_of_crops, load
from multicam.demo.edits import CLASSES, EDITS, sample
from multicam.demo.photos import PHOTOS, SIDE
from multicam.demo.training import Trial, areas, calibrate, logits_of, measure, table, train, train_and_measure
from multicam.errors import MulticamError


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def crops():
    """Crops of every final photo, far enough from 0 and 255 for no edit to be clipped."""
    middles = [demo.crop_of(demo.photo(name)) for name in PHOTOS["final"]]
    return rearrange(torch.from_numpy(np.stack(middles)), "b h w c -> b c h w").float() / 4 + 96


@pytest.fixture(scope="module")
def small_trial():
    return Trial.of("tuning", clean=4, each=4)


def test_photos_are_kept_apart_and_all_can_be_read():
    names = [name for group in PHOTOS.values() for name in group]
    paths = [path for group in PHOTOS.values() for path in group.values()]
    assert len(set(names)) == len(set(paths)) == len(names)
    for name in names:
        assert min(demo.photo(name).shape[:2]) >= 2 * SIDE


def test_unknown_photo():
    with pytest.raises(MulticamError, match=r"no photo 'chelsey'; did you mean 'chelsea'\?"):
        demo.photo("chelsey")


def test_a_large_photo_is_cropped_and_a_small_one_enlarged():
    image = demo.photo("china")
    h, w = image.shape[:2]
    assert np.array_equal(demo.crop_of(image), image[h // 2 - 64 : h // 2 + 64, w // 2 - 64 : w // 2 + 64])
    for small in (image[:40, :300], image[:300, :1], image[:128, :127]):
        assert demo.crop_of(np.ascontiguousarray(small)).shape == (SIDE, SIDE, 3)


def test_what_is_no_photo_is_refused():
    for wrong in (np.zeros((300, 300), np.uint8), np.zeros((3, 300, 300), np.uint8), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(MulticamError, match=r"uint8 array \(h w 3\), got uint8 of shape"):
            demo.crop_of(wrong)


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


def test_areas_agree_with_scikit_learn():
    labels = torch.randint(-1, 3, (80,), generator=seeded())
    logits = torch.randn(80, 3, generator=seeded()).round(decimals=1)
    oracle = [roc_auc_score(labels == c, logits[:, c]) for c in range(3)]
    assert areas(logits, labels) == pytest.approx(oracle, abs=1e-6)


def test_calibration_sets_the_false_positives_of_the_worst_photo(small_trial):
    torch.manual_seed(0)
    model = EditDetector().eval()
    calibrate(model, small_trial)
    clean = small_trial.where(small_trial.labels < 0)
    passed = torch.stack([(logits_of(model, clean.crops) > 0)[clean.photos == k].float().mean(0) for k in range(3)])
    assert torch.equal(passed.amax(0), torch.full((3,), 1 / 4))


def test_a_training_batch_tells_the_truth():
    images = training.photos("tuning")
    crops, truth = training.training_batch(seeded(), images, 16)
    again, _ = training.training_batch(seeded(), images, 16)
    assert torch.equal(crops, again) and torch.equal(crops, crops.round().clamp(0, 255))
    share = (truth.amax((2, 3)) > 0).float().mean()
    assert 0.1 < share < 0.6 and truth.min() == 0 and truth.max() == 1


def test_training_is_deterministic_and_leaves_the_global_generator_alone(monkeypatch, small_trial):
    monkeypatch.setattr(training.Trial, "of", lambda *_, **__: small_trial)
    state = torch.get_rng_state()
    one, two = (train(5, epochs=1, steps=1).state_dict() for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_train_and_measure_saves_and_tabulates(monkeypatch, tmp_path, small_trial):
    monkeypatch.setattr(training, "train", lambda seed: load())
    monkeypatch.setattr(training.Trial, "of", lambda *_, **__: small_trial)
    monkeypatch.setattr(training, "measure", partial(measure, group="tuning"))
    rows = train_and_measure(seeds=(0, 1), out=tmp_path / "demo.safetensors")
    saved, bundled = load_file(tmp_path / "demo.safetensors"), load_file(WEIGHTS)
    assert all(torch.equal(saved[name], bundled[name]) for name in bundled)
    assert all(len(values) == 2 and values[0] == values[1] and 0 <= values[0] <= 1 for values in rows.values())
    assert {f"AUC, {name}" for name in CLASSES} < rows.keys()
    assert table(rows).count("\n") == len(rows) + 1


def test_where_keeps_the_rows_together(small_trial):
    part = small_trial.where(small_trial.labels == 1)
    assert len(part.crops) == len(part.photos) == len(part.regions) == 12
    assert (part.labels == 1).all()
