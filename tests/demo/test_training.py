"""How the bundled detector was trained and measured, and that it can be again."""

from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score

from multicam.demo import training
from multicam.demo.detector import WEIGHTS, EditDetector, load
from multicam.demo.edits import CLASSES
from multicam.demo.training import areas, calibrate, logits_of, measure, table, train, train_and_measure
from tests.helpers.generators import seeded


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
