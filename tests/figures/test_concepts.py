"""Concepts are drawn in their colours, as strong as they are, with heads that say what they are."""

import numpy as np
import pytest
import torch
from torch import Tensor

from multicam.errors import MulticamError
from multicam.figures.concepts import COLOURS, OPACITY, concept_figure
from multicam.inside.concepts import Concepts
from tests.helpers.pictures import axes, grey, pixels, said


@pytest.fixture
def two() -> tuple[Tensor, Concepts]:
    image = torch.rand(1, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    maps = torch.zeros(1, 2, 4, 6)
    maps[0, 0, :, :3], maps[0, 1, :, 4:], maps[0, 1, :, :3] = 1, 0.5, 0.2
    return image, Concepts(maps, torch.rand(2, 5), 0.1, torch.tensor([[1.0, 2.5], [-1.0, -3.0]]))


def test_the_picture_shows_each_place_in_the_colour_of_its_strongest_concept(two: tuple[Tensor, Concepts]) -> None:
    image, concepts = two
    shown, strongest, first, second = pixels(concept_figure(concepts, image))
    below = grey(image[0])[0].numpy().astype(float)[..., None].repeat(3, -1)
    for tile, at, colour, strength in (
        (strongest, np.s_[:, :3], 0, 1), (strongest, np.s_[:, 4:], 1, 0.5), (first, np.s_[:, :3], 0, 1),
        (second, np.s_[:, :3], 1, 0.2), (second, np.s_[:, 4:], 1, 0.5),
    ):  # fmt: skip
        expected = below[at] + OPACITY * strength * (np.array(COLOURS[colour]) - below[at])
        assert np.abs(tile[at] - expected).max() <= 1
    for tile, at in ((strongest, np.s_[:, 3]), (first, np.s_[:, 3:]), (second, np.s_[:, 3])):
        assert np.abs(tile[at] - below[at]).max() <= 1
    assert not np.array_equal(shown[..., 0], shown[..., 1])


def test_its_heads_say_what_the_concepts_are(two: tuple[Tensor, Concepts]) -> None:
    image, concepts = two
    assert said(concept_figure(concepts, image)) == [
        "input", "strongest concept", "concept 1 class 1 2.5", "concept 2 class 0 \N{MINUS SIGN}1"
    ]  # fmt: skip
    named = concept_figure(
        concepts, image, names=["sky", "sea"], classes=["cat", "dog"], rows=["holiday"], title="Views"
    )
    assert {"sky dog 2.5", "sea cat \N{MINUS SIGN}1", "holiday", "Views"} <= {*said(named)}
    assert len(axes(named, "tile")) == 4 and axes(named, "bar") == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.rand(1, 3, 4, 4)}, r"concepts \(1, 2, 4, 6\) do not lie on images \(1, 3, 4, 4\)"),
        ({"images": torch.rand(2, 3, 4, 6)}, "do not lie on images"),
        ({"names": ["sky"]}, "2 concepts, but 1 names"),
        ({"classes": ["cat"]}, "the head has 2 classes, but 1 names were given"),
    ],
    ids=["size", "samples", "names", "classes"],
)
def test_what_does_not_fit_a_picture_is_said(
    two: tuple[Tensor, Concepts], change: dict[str, object], message: str
) -> None:
    image, concepts = two
    with pytest.raises(MulticamError, match=message):
        concept_figure(concepts, **{"images": image, **change})


def test_a_picture_has_at_most_seven_colours() -> None:
    concepts = Concepts(torch.rand(1, 8, 4, 4), torch.rand(8, 5), 0.1)
    with pytest.raises(MulticamError, match="7 concepts apart by colour, not 8"):
        concept_figure(concepts, torch.rand(1, 3, 4, 4))
