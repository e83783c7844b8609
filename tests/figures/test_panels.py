"""Every map stands beside or over its input, on the scale and with the words that its numbers allow."""

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from multicam.errors import MulticamError
from multicam.figures.colours import colorize, overlay, to_rgb
from multicam.figures.panels import compare, panel
from multicam.maps import Maps
from tests.helpers.pictures import axes, contoured, golden, grey, limits, pixels, said, texts


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {"rgb": torch.randn(2, 3, 8, 8, generator=g), "fft": torch.randn(2, 1, 8, 8, generator=g)}


@pytest.fixture
def maps() -> Maps:
    return Maps({"rgb": torch.full((2, 8, 8), 3.0), "fft": torch.full((2, 8, 8), 1.0)})


# panel


def test_every_input_stands_beside_its_map_on_one_scale(inputs, maps) -> None:
    picture = panel(inputs, maps)
    tiles = pixels(picture)
    assert len(tiles) == 8
    for i in range(2):
        for j, name in enumerate(inputs):
            image, evidence = tiles[4 * i + 2 * j : 4 * i + 2 * j + 2]
            assert np.array_equal(image, to_rgb(inputs[name][i]))
            assert np.array_equal(evidence, overlay(grey(inputs[name][i]), maps[name][i] / 3))


def test_the_colour_bar_ends_at_the_strongest_evidence(inputs, maps) -> None:
    assert limits(panel(inputs, maps)) == [(0, 3)]
    assert limits(panel(inputs, {"rgb": -maps["rgb"], "fft": maps["fft"]})) == [(-3, 3)]
    assert limits(panel(inputs, maps, scale="column")) == [(0, 3), (0, 1)]
    assert limits(panel(inputs, {})) == []
    shown = texts(panel(inputs, maps))
    assert {"0", "1.5", "3", "evidence, units of the score"} <= {*shown}


def test_a_scale_of_its_own_for_each_map_has_no_units(inputs, maps) -> None:
    picture = panel(inputs, maps, scale="each")
    assert {"0", "max", "evidence, each map by its own maximum"} <= {*texts(picture)}
    tiles = pixels(picture)
    assert np.array_equal(tiles[3], overlay(grey(inputs["fft"][0]), torch.ones(8, 8)))


def test_maps_that_cannot_be_compared_share_neither_scale_nor_evidence(inputs, maps) -> None:
    picture = panel(inputs, Maps(maps, comparable=False))
    assert "evidence, each map by its own maximum" in texts(picture)
    assert not any("%" in text for text in texts(picture))
    assert "evidence, arbitrary units" in texts(panel(inputs, Maps(maps, comparable=False), scale="column"))


def test_captions_are_the_shares_of_the_evidence_unless_given(inputs, maps) -> None:
    shown = [text.replace("\N{NO-BREAK SPACE}", " ") for text in texts(panel(inputs, maps))]
    assert shown.count("rgb 75 %") == shown.count("fft 25 %") == 2
    assert "percentages are shares of the positive evidence" in shown
    against = said(panel(inputs, {"rgb": maps["rgb"] - 12, "fft": maps["fft"]}, quantity="interaction"))
    assert against.count("rgb -90 %") == against.count("fft 10 %") == 2
    assert "percentages are shares of the interaction, with its sign" in against
    first = {"fft": ["first", "second"]}
    for own in (
        panel(inputs, {"rgb": maps["rgb"]}),
        panel(inputs, maps, captions={}),
        panel(inputs, maps, captions=first),
    ):
        assert not any("%" in text or "percent" in text for text in texts(own))
    assert {"first", "second"} <= {*texts(own)}


def test_no_map_is_laid_over_a_spectrum(inputs, maps) -> None:
    for i in range(2):
        image, evidence = pixels(panel(inputs, maps, spectral=("fft",)))[4 * i + 2 : 4 * i + 4]
        assert np.array_equal(image, to_rgb(inputs["fft"][i]))
        assert np.array_equal(evidence, colorize(maps["fft"][i] / 3))


def test_grid_maps_and_maps_of_no_input_are_shown_alone(inputs) -> None:
    grids = {"rgb": torch.rand(2, 4, 4), "fusion": torch.rand(2, 3, 5)}
    picture = panel(inputs, grids)
    assert [tile.shape[:2] for tile in pixels(picture)] == [(8, 8), (4, 4), (8, 8), (3, 5)] * 2
    assert [text for text in texts(picture) if text in ("rgb", "fft", "fusion")] == ["rgb", "fft", "fusion"]


def test_regions_are_outlined_on_the_evidence(inputs, maps) -> None:
    region = torch.zeros(2, 16, 16, dtype=torch.bool)
    region[0, :5, 3:9] = True
    assert contoured(panel(inputs, maps, regions=region)) == [False, True, False, True] + [False] * 4
    assert contoured(panel(inputs, maps, regions=region, spectral=["fft"])) == [False, True] + [False] * 6
    assert contoured(panel(inputs, maps, regions={"fft": region})) == [False, False, False, True] + [False] * 4
    assert contoured(panel(inputs, {}, regions=~region)) == [True] * 4


def test_the_outline_of_a_coarse_region_leaves_its_picture_as_large_as_it_was(inputs, maps) -> None:
    picture = panel(inputs, maps, regions={"rgb": torch.eye(2).bool().expand(2, 2, 2)}, quantity="interaction")
    assert {(axes.get_xlim(), axes.get_ylim()) for axes in picture.figure.axes if axes.get_label() == "tile"} == {
        ((0.0, 1.0), (1.0, 0.0))
    }
    assert "interaction, units of the score" in texts(picture)


def test_a_clip_is_shown_where_its_evidence_is() -> None:
    clip, evidence = torch.rand(1, 3, 6, 8, 8), torch.zeros(1, 3, 8, 8)
    evidence[0, 2, 1, 1] = 2.0
    image, laid = pixels(panel({"clip": clip}, {"clip": evidence}))
    assert np.array_equal(image, to_rgb(clip[0, :, 3]))
    assert np.array_equal(laid, overlay(grey(clip[0, :, 4]), evidence[0, 2] / 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spectral": ["ftt"]}, "no input 'ftt'; did you mean 'fft'"),
        ({"captions": {"rbg": ["a", "b"]}}, "no map 'rbg'; did you mean 'rgb'"),
        ({"captions": {"rgb": ["a"]}}, "equally many samples of everything, not .*\"captions of 'rgb'\": 1"),
        ({"regions": {"depth": torch.ones(2, 8, 8) > 0}}, "no input or map 'depth'"),
        ({"regions": torch.ones(3, 8, 8) > 0}, "equally many samples"),
        ({"inputs": {"text": torch.ones(2, 77)}}, r"input 'text' \(2, 77\) is no image .* leave it out"),
        ({"maps": {"rgb": torch.ones(1, 8, 8)}}, "equally many samples of everything, not .*\"map 'rgb'\": 1"),
        ({"maps": {"rgb": torch.ones(2, 8)}}, r"the map in row 0, column 1 is \(8,\): a tile shows \(h w\)"),
        ({"maps": {"rgb": torch.full((2, 8, 8), torch.nan)}}, "the map in row 0, column 1 has NaN"),
        ({"rows": ["one"]}, r"2 rows of tiles, but 1 labels: \['one'\]"),
        ({"width": 0.3}, "4 columns of tiles do not fit into 0.3 inches"),
        ({"colormap": "jet", "maps": {"rgb": -torch.ones(2, 8, 8)}}, "'jet' shows 0..1"),
    ],
)
def test_what_does_not_fit_is_named(inputs, maps, change, message) -> None:
    with pytest.raises(MulticamError, match=message):
        panel(**{"inputs": inputs, "maps": maps, **change})


def test_a_clip_with_frames_first_is_shown_by_its_frames() -> None:
    clip = torch.zeros(1, 3, 8, 6, 6)
    clip[0, :, 5] = 1
    map = torch.zeros(1, 8, 6, 6)
    map[0, 5, 2, 2] = 1
    shown = [panel({"clip": x}, {"clip": map}).rgb for x in (clip, clip.transpose(1, 2))]
    assert np.array_equal(*shown)


def test_a_panel_looks_as_approved() -> None:
    photo = torch.from_numpy(data.astronaut()[:384:4, 64:448:4].copy()).permute(2, 0, 1)[None]
    y, x = torch.meshgrid(torch.linspace(-1, 1, 96), torch.linspace(-1, 1, 96), indexing="ij")
    blob = torch.exp(-8 * (x**2 + y**2))[None]
    spectrum = torch.fft.fftshift(torch.fft.fft2(photo.float().mean(1, keepdim=True)))
    picture = panel(
        {"rgb": photo, "fft": spectrum},
        {"rgb": blob, "fft": 0.3 * blob},
        spectral=["fft"],
        regions=blob > 0.4,
        title="golden",
    )
    height, width = (n // 4 for n in picture.rgb.shape[:2])
    small = np.asarray(Image.fromarray(picture.rgb).resize((width, height), Image.Resampling.BOX))
    golden("panel", small, tolerance=2)


# compare


def test_every_method_has_its_own_scale_which_its_inputs_share(inputs, maps) -> None:
    double = Maps({name: 2 * m for name, m in maps.items()})
    picture = compare(inputs, {"ours": maps, "theirs": double}, spectral=["fft"])
    assert limits(picture) == [(0, 3), (0, 6)]
    tiles = pixels(picture)
    assert len(tiles) == 12  # samples, inputs; the input and two methods
    for i in range(2):
        image, ours, theirs = tiles[6 * i : 6 * i + 3]
        assert np.array_equal(image, to_rgb(inputs["rgb"][i]))
        assert np.array_equal(ours, theirs)
        assert np.array_equal(ours, overlay(grey(inputs["rgb"][i]), torch.ones(8, 8)))
        assert np.array_equal(tiles[6 * i + 4], colorize(torch.full((8, 8), 1 / 3)))
    shown = [text.replace("\N{NO-BREAK SPACE}", " ") for text in texts(picture)]
    assert shown.count("rgb 75 %") == shown.count("fft 25 %") == 4
    assert "evidence, units of the score, one scale for each method" in shown
    assert "percentages are shares of the positive evidence" in shown
    against = Maps({"rgb": maps["rgb"], "fft": -3 * maps["fft"]})
    text = " ".join(said(compare(inputs, {"ours": maps, "theirs": against})))
    assert text.count("rgb 75 % rgb 50 %") == text.count("fft 25 % fft -50 %") == 2
    assert "shares of the positive evidence (ours) and of the evidence, with its sign (theirs)" in text


def test_a_method_that_does_not_compare_shares_no_scale(inputs, maps) -> None:
    picture = compare(inputs, {"ours": maps, "theirs": Maps(maps, comparable=False)})
    assert np.array_equal(pixels(picture)[5], overlay(grey(inputs["fft"][0]), torch.ones(8, 8)))
    shown = texts(picture)
    assert " ".join(shown[-1].split()).endswith("one scale for each method; max: each map by its own maximum")
    assert "percentages are shares of the positive evidence" in " ".join(said(picture))
    assert {"3", "max"} <= {*shown} and sum("%" in text for text in shown) == 4
    assert "evidence, each map by its own maximum" in texts(compare(inputs, {"theirs": Maps(maps, comparable=False)}))
    forced = compare(inputs, {"theirs": Maps(maps, comparable=False)}, scale="column")
    assert "arbitrary units" in " ".join(" ".join(texts(forced)).split())


def test_tensors_of_methods_lie_on_the_only_input(inputs, maps) -> None:
    picture = compare({"rgb": inputs["rgb"]}, {"ours": maps["rgb"], "theirs": -maps["rgb"]}, rows=["a", "b"])
    tiles = pixels(picture)
    assert np.array_equal(tiles[1], overlay(grey(inputs["rgb"][0]), torch.ones(8, 8), colormap="diverging"))
    assert np.array_equal(tiles[2], overlay(grey(inputs["rgb"][0]), -torch.ones(8, 8)))
    assert [text for text in texts(picture) if text in ("input", "ours", "theirs", "a", "b", "rgb")] == [
        "input", "ours", "theirs", "a", "b",
    ]  # fmt: skip


def test_a_method_without_a_map_of_an_input_leaves_its_place_empty(inputs, maps) -> None:
    assert len(pixels(compare(inputs, {"a": maps, "b": {"rgb": maps["rgb"]}}))) == 10
    assert len(pixels(compare(inputs, {"b": {"rgb": maps["rgb"]}}))) == 4
    assert len(pixels(compare({}, {"a": maps}))) == 4


@pytest.mark.parametrize("count", [1, 2, 8, 20])
def test_any_number_of_methods_is_legible(count: int) -> None:
    methods = {f"SmoothGradCAMPlusPlus{i}": Maps({"rgb": torch.rand(1, 8, 8)}) for i in range(count)}
    picture = compare({"rgb": torch.rand(1, 3, 8, 8)}, methods)
    sizes = [a.get_window_extent().height / picture.figure.dpi for a in axes(picture, "tile")]
    assert len(sizes) == count + 1 and min(sizes) > 0.75
    assert min(text.get_size() for text in picture.figure.texts) > 6
    assert picture.figure.get_size_inches()[0] <= 7.001


@pytest.mark.parametrize(
    ("methods", "change", "message"),
    [
        ({}, {}, "compare takes the maps of each method, .* not none"),
        (Maps({"rgb": torch.ones(2, 8, 8)}), {}, "not the maps of one, which are for panel"),
        ({"a": {"rgb": torch.ones(1, 8, 8)}}, {}, "equally many samples of everything, not .*\"a map 'rgb'\": 1"),
        ({"a": {"rgb": torch.ones(2, 8, 8)}}, {"rows": ["one"]}, r"2 samples, but 1 labels: \['one'\]"),
        ({"a": {"rgb": torch.ones(2, 8, 8)}}, {"spectral": ["ftt"]}, "no input 'ftt'; did you mean 'fft'"),
    ],
)
def test_what_does_not_compare_is_named(inputs, methods, change, message) -> None:
    with pytest.raises(MulticamError, match=message):
        compare(inputs, methods, **change)
