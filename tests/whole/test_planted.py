"""The planted evidence is where the benchmark says it is, its scores are right by hand, and its command runs."""

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from multicam import Maps
from multicam.demo.photos import PHOTOS
from multicam.shares.shapley import Contribution

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        yield importlib.import_module("benchmarks.planted_data")


@pytest.fixture(scope="module")
def planted(data: ModuleType) -> ModuleType:
    del data
    return importlib.import_module("benchmarks.planted")


@pytest.fixture(scope="module")
def report(data: ModuleType) -> ModuleType:
    del data
    return importlib.import_module("benchmarks.planted_report")


def drawn(data: ModuleType, n: int) -> tuple[dict[str, torch.Tensor], object]:
    """Empty inputs and what is planted into them."""
    empty = {
        "rgb": torch.zeros(n, 3, 64, 64),
        "frequency": torch.zeros(n, 9, 32, 32),
        "texture": torch.zeros(n, 1, 64, 64),
    }
    return empty, data.planted(empty, torch.arange(n) % 4, torch.Generator().manual_seed(0))


def test_a_region_is_exactly_what_was_changed_in_one_input(data: ModuleType) -> None:
    empty, samples = drawn(data, 40)
    for i, name in enumerate(data.INPUTS):
        here = samples.where == i
        assert not samples.regions[name][~here].any()
        region, changed = samples.regions[name][here], samples.inputs[name][here] != 0
        side = region.shape[-1]
        assert (region.flatten(1).sum(1) == (side // 4) ** 2).all()
        assert not (changed & ~region[:, None]).any()
        assert changed.flatten(2).sum(2).float().mean() > 0.9 * (side // 4) ** 2
        assert not empty[name].any()


def test_what_belongs_to_no_class_has_the_same_energy(data: ModuleType) -> None:
    _, samples = drawn(data, 40)
    for x in samples.inputs.values():
        energy = x.square().sum((2, 3)) / (x.shape[-1] // 4) ** 2
        torch.testing.assert_close(energy, torch.full_like(energy, data.STRENGTH))


def test_the_class_says_nothing_about_the_input(data: ModuleType) -> None:
    _, samples = drawn(data, 3000)
    counts = torch.zeros(data.CLASSES, len(data.INPUTS))
    counts.index_put_((samples.label, samples.where), torch.ones(3000), accumulate=True)
    assert (counts / 3000 - 1 / 12).abs().max() < 0.02


def test_classes_are_told_by_their_angle_alone(data: ModuleType) -> None:
    waves = data.gratings(torch.arange(4), 16, torch.Generator().manual_seed(0))
    spectra = torch.fft.fft2(waves, s=(64, 64)).abs()
    row, column = (spectra[:, :, :32].flatten(1).argmax(1) // 32, spectra[:, :, :32].flatten(1).argmax(1) % 32)
    row = torch.where(row > 32, row - 64, row)
    angle = torch.rad2deg(torch.atan2(row.float(), column.float())) % 180
    distance = (angle - 45 * torch.arange(4)).abs()
    assert (torch.minimum(distance, 180 - distance) < 5).all()


def test_no_photo_is_both_trained_on_and_held_out(data: ModuleType) -> None:
    assert not set(PHOTOS["training"]) & set(PHOTOS["final"])
    assert not set(PHOTOS["training"]) & set(PHOTOS["tuning"])
    assert not set(PHOTOS["tuning"]) & set(PHOTOS["final"])
    images, photos = data.crops("final", 6, torch.Generator().manual_seed(0))
    assert images.shape == (6, 3, 64, 64)
    assert photos.tolist() == [0, 1, 2, 3, 0, 1]


def test_training_statistics_standardise(data: ModuleType) -> None:
    inputs = data.companions(torch.rand(8, 3, 64, 64))
    assert {name: x.shape[1:] for name, x in inputs.items()} == {
        "rgb": (3, 64, 64),
        "frequency": (9, 32, 32),
        "texture": (1, 64, 64),
    }
    for x in data.standardised(inputs, data.statistics(inputs)).values():
        torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(x.shape[1]), atol=1e-4, rtol=0)
        torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(x.shape[1]))


def test_scores_by_hand(data: ModuleType, planted: ModuleType) -> None:
    _, samples = drawn(data, 6)
    true = Maps({name: region.float() for name, region in samples.regions.items()})
    # Equal peaks all have to lie inside, and do.
    right = planted.scored(true, samples)
    assert right.comparable
    for values in (right.named, right.hit, right.inside, right.overall):
        assert torch.equal(values, torch.ones(6))
    assert not right.least.any()
    wrong = planted.scored(Maps({name: 1 - m for name, m in true.items()}, comparable=False), samples)
    assert not wrong.comparable
    for values in (wrong.named, wrong.hit, wrong.inside, wrong.overall):
        assert torch.equal(values, torch.zeros(6))
    assert wrong.least.all()
    # Right maps of which another input has more: named and peaked elsewhere, yet the place is right.
    louder = {name: m + 2 * (samples.where != i).float()[:, None, None] for i, (name, m) in enumerate(true.items())}
    misled = planted.scored(Maps(louder), samples)
    assert (misled.named.sum(), misled.hit.sum(), misled.overall.sum()) == (0, 6, 0)


def test_the_largest_share_names_the_input(data: ModuleType, planted: ModuleType) -> None:
    _, samples = drawn(data, 6)
    shapley = torch.nn.functional.one_hot(samples.where, 3).float()
    nothing = torch.zeros(6)
    scores = planted.scored(Contribution(data.INPUTS, shapley, shapley, shapley, nothing, nothing), samples)
    assert scores.named.sum() == 6
    assert scores.hit is None
    scores = planted.scored(Contribution(data.INPUTS, -shapley, shapley, shapley, nothing, nothing), samples)
    assert scores.named.sum() == 0


def test_intervals_draw_models_and_photos(report: ModuleType) -> None:
    scores = report.Scores(torch.tensor([0, 0, 1]), torch.tensor([1.0, 0.0, 1.0]))
    means = report.cells([scores, scores], lambda s: s.named)
    assert means.tolist() == [[0.5, 1.0], [0.5, 1.0]]
    assert report.interval(means) == (0.5, 1.0)  # both photos one or the other in a quarter of the draws
    assert report.interval(torch.full((3, 4), 0.25)) == (0.25, 0.25)


def test_the_command_writes_every_method_into_its_page(planted: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"Before.\n\n{planted.MARK}\n\nolder numbers\n")
    command = ["-m", "benchmarks.planted", "--quick", "--write", str(page)]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)
    text = page.read_text()
    assert text.startswith("Before.")
    assert "older numbers" not in text
    naming, pointing = text.split("### Where in it?")
    methods = importlib.import_module("benchmarks.planted_methods")
    catalogue = importlib.import_module("multicam.cam.catalogue")
    classes = [cam.__name__ for cam in (*catalogue.METHODS, *catalogue.INPUT_METHODS) if cam.__name__ != "OriginalCAM"]
    functions = [function.__name__ for function in importlib.import_module("multicam.saliency.catalogue").ATTRIBUTIONS]
    for name in (*classes, *functions, "expected_gradients", *methods.READINGS):
        assert f"\n| {name}" in naming
        assert f"\n| {name}" in pointing
    for peer in methods.PEERS:
        assert f"\n| {peer} | pytorch-grad-cam | no |" in naming
    assert naming.count("\n| contribution, ") == 3
    named = {line.split(" | ")[0]: float(line.split(" | ")[4].split()[0]) for line in naming.split("\n| ")[3:]}
    assert named["contribution, baseline 0"] > 0.7
    assert max(named["magnitude of the input"], named["random"]) < 0.6
    assert "contribution" not in pointing
    assert "OriginalCAM does not explain this model" in naming


def test_the_page_of_the_documentation_has_a_place_for_the_numbers(planted: ModuleType) -> None:
    assert (ROOT / "docs" / "explanation" / "planted-evidence.md").read_text().count(planted.MARK) == 1
