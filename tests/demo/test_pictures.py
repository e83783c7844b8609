"""The pictures of the demo: what is drawn in which tile, and a photo of the user's own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from multicam.cam.catalogue import ONE_PASS
from multicam.cam.weighted import HiResCAM
from multicam.demo import pictures
from multicam.demo.detector import LAYERS, EditDetector, inputs_of, load
from multicam.demo.edits import CLASSES, Sample, sample
from multicam.demo.photos import crop_of
from multicam.demo.pictures import SINGLE, TRIPLE
from multicam.figures.page import Picture
from multicam.figures.tiles import Tile, figure
from multicam.maps import Maps

Drawn = list[tuple[tuple[Any, ...], dict[str, Any]]]


@pytest.fixture(scope="module")
def model() -> EditDetector:
    return load()


@pytest.fixture(scope="module")
def singles() -> dict[str, Sample]:
    return {edit: sample(name, [edit], seed=seed) for edit, (name, seed) in SINGLE.items()}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """What the pictures are drawn of."""
    calls = []

    def told(draw: Callable[..., Picture]) -> Callable[..., Picture]:
        def drawing(*args: Any, **options: Any) -> Picture:
            calls.append((args, options))
            return draw(*args, **options)

        return drawing

    for name in ("figure", "panel"):
        monkeypatch.setattr(pictures, name, told(getattr(pictures, name)))
    return calls


def evidence(model: EditDetector, edited: Sample, logit: int) -> Maps:
    """What speaks for a logit on each input of one photo, cut at zero where it is drawn."""
    maps = HiResCAM(model, LAYERS)(inputs_of(edited.image), logit, signed=True)
    return Maps({name: m.relu() for name, m in maps.items()})


def close(found: Tensor | None, expected: Tensor) -> None:
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_one_edit_each_is_explained_by_its_own_logit(
    model: EditDetector, singles: dict[str, Sample], drawn: Drawn
) -> None:
    pictures.one_edit_each(model, singles)
    [((inputs, maps), options)] = drawn
    for i, (edit, edited) in enumerate(singles.items()):
        of_edit = evidence(model, edited, CLASSES.index(edit))
        for name, x in inputs_of(edited.image).items():
            assert torch.equal(inputs[name][i], x[0])
            close(maps[name][i], of_edit[name][0])
            assert torch.equal(options["regions"][name][i], edited.regions[edit])


def test_every_logit_has_a_column_and_its_evidence_lies_on_the_diagonal(model: EditDetector, drawn: Drawn) -> None:
    edited = sample(TRIPLE[0], seed=TRIPLE[1])
    pictures.every_logit(model, edited)
    [((tiles,), options)] = drawn
    inputs = inputs_of(edited.image)
    with torch.no_grad():
        logits = model(**inputs)[0].tolist()
    assert options["columns"] == [f"{edit}: {logit:+.1f}" for edit, logit in zip(CLASSES, logits, strict=True)]
    for i, edit in enumerate(CLASSES):
        maps = evidence(model, edited, i)
        shares = maps.shares()[0]
        assert shares.argmax() == i
        for j, name in enumerate(inputs):
            tile = tiles[1 + j][i]
            close(tile.map, maps[name][0])
            assert tile.caption == f"{shares[j]:.0%} of its positive evidence"
            assert tile.region is edited.regions[edit]


def test_every_method_of_one_pass_is_drawn_on_the_input_that_shows_the_edit(
    model: EditDetector, singles: dict[str, Sample], drawn: Drawn
) -> None:
    pictures.every_method(model, singles)
    [((tiles,), options)] = drawn
    assert options["columns"] == [method.__name__ for method in ONE_PASS]
    for i, (row, name, edited) in enumerate(zip(tiles, LAYERS, singles.values(), strict=True)):
        assert len(row) == len(ONE_PASS)
        assert all(tile.image.equal(inputs_of(edited.image)[name][0]) for tile in row)
        close(row[ONE_PASS.index(HiResCAM)].map, evidence(model, edited, i)[name][0])


def test_the_same_maps_stand_on_one_scale_and_each_on_its_own(
    model: EditDetector, singles: dict[str, Sample], drawn: Drawn
) -> None:
    pictures.both_scales(model, singles)
    [((tiles,), _)] = drawn
    for i, (row, edited) in enumerate(zip(tiles, singles.values(), strict=True)):
        maps = list(evidence(model, edited, i).values())
        top = max(m.max() for m in maps)
        for tile, m in zip(row[:3], maps, strict=True):
            close(tile.map, m[0] / top)
        for tile, m in zip(row[3:], maps, strict=True):
            close(tile.map, m[0] / m.max().where(m.max() > 0, 1))


@pytest.mark.filterwarnings("ignore:.*has 16 bits:UserWarning")
def test_a_photo_of_ones_own_keeps_its_values_whatever_its_depth(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    explained: list[Any] = []
    for name in ("one_edit_each", "every_logit", "every_method", "both_scales"):
        monkeypatch.setattr(
            pictures, name, lambda _, of: explained.append(of) or figure([[Tile(torch.zeros(3, 4, 4))]])
        )
    deep = np.linspace(0, 40000, 140 * 150, dtype=np.uint16).reshape(140, 150)
    cv2.imwrite(str(tmp_path / "mine.png"), deep)
    out = tmp_path / "new" / "folder"
    written = list(pictures.write(out, tmp_path / "mine.png"))
    names = ["panel", "three-edits", "methods", "scales", "photo-mine"]
    assert written == [out / f"{name}.png" for name in names] and all(path.exists() for path in written)
    _, triple, _, _, own = explained
    assert np.array_equal(triple.image, sample(TRIPLE[0], seed=TRIPLE[1]).image)
    assert own.regions == {}
    assert np.array_equal(own.image, crop_of(np.round(deep[..., None] / 65535 * 255).repeat(3, 2).astype(np.uint8)))
