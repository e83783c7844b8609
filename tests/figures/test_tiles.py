import subprocess
import sys
from itertools import combinations
from pathlib import Path

import matplotlib
import matplotlib.axes
import matplotlib.contour
import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from multicam.errors import MulticamError
from multicam.figures.colours import colorize, overlay, to_rgb
from multicam.figures.page import Picture
from multicam.figures.panels import compare, panel
from multicam.figures.tiles import Tile, figure
from multicam.maps import Maps
from tests.figures.test_colours import golden


def axes(picture: Picture, label: str) -> list[matplotlib.axes.Axes]:
    return [a for a in picture.figure.axes if a.get_label() == label]


def pixels(picture: Picture) -> list[np.ndarray]:
    return [np.asarray(a.images[0].get_array()) for a in axes(picture, "tile")]


def texts(picture: Picture) -> list[str]:
    return [text.get_text() for text in picture.figure.texts if text.get_text()]


def limits(picture: Picture) -> list[tuple[float, float]]:
    return [tuple(map(float, a.get_xlim())) for a in axes(picture, "bar")]


def contoured(picture: Picture) -> list[bool]:
    sets = matplotlib.contour.QuadContourSet
    return [any(isinstance(c, sets) for c in a.get_children()) for a in axes(picture, "tile")]


def grey(image: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(to_rgb(image).mean(-1).round().astype(np.uint8))[None]


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
    assert not any("%" in text for text in texts(panel(inputs, {"rgb": maps["rgb"]})))
    assert not any("%" in text for text in texts(panel(inputs, maps, captions={})))
    shown = texts(panel(inputs, maps, captions={"fft": ["first", "second"]}))
    assert {"first", "second"} <= {*shown} and not any("%" in text for text in shown)


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


def test_a_method_that_does_not_compare_shares_no_scale(inputs, maps) -> None:
    picture = compare(inputs, {"ours": maps, "theirs": Maps(maps, comparable=False)})
    assert np.array_equal(pixels(picture)[5], overlay(grey(inputs["fft"][0]), torch.ones(8, 8)))
    shown = texts(picture)
    assert " ".join(shown[-1].split()).endswith("one scale for each method; max: each map by its own maximum")
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


# figure


def test_a_scale_for_each_column() -> None:
    map = torch.rand(4, 4)
    picture = figure([[Tile(map=map), Tile(map=2 * map)], [Tile(map=map / 2), Tile(map=map)]], scale=["column", "each"])
    tiles = pixels(picture)
    assert np.array_equal(tiles[1], tiles[3]) and not np.array_equal(tiles[0], tiles[2])
    with pytest.raises(MulticamError, match="2 columns of tiles, but 1 scales"):
        figure([[Tile(map=map), Tile(map=map)]], scale=["each"])


def test_methods_side_by_side_each_on_the_scale_of_its_column() -> None:
    image, map = torch.rand(3, 8, 8), torch.rand(8, 8)
    top = map.max().item()
    picture = figure(
        [[Tile(image), Tile(image, map), Tile(image, 9 * map)], [Tile(), Tile(map=map / 2), Tile(map=map)]],
        columns=["input", "ours", "theirs"],
        rows=["rgb", "depth"],
        scale="column",
    )
    assert limits(picture) == [(0, pytest.approx(top)), (0, pytest.approx(9 * top))]
    tiles = pixels(picture)
    assert len(tiles) == 5
    assert np.abs(tiles[1].astype(int) - tiles[2]).max() <= 1
    assert np.array_equal(tiles[3], colorize(map / 2 / top))
    assert repr(picture).startswith("Picture(5 tiles, ")


def test_a_signed_map_makes_the_whole_figure_diverging() -> None:
    positive, signed = torch.rand(4, 4), torch.eye(4) * -2
    tiles = pixels(figure([[Tile(map=positive), Tile(map=signed)]]))
    assert np.array_equal(tiles[0], colorize(positive / 2, "diverging"))


def test_no_evidence_anywhere_is_no_colour() -> None:
    picture = figure([[Tile(map=torch.zeros(4, 4))]])
    assert np.array_equal(pixels(picture)[0], colorize(torch.zeros(4, 4)))
    assert limits(picture) == [(0, 1)]


@pytest.mark.parametrize("tiles", [[], [[]], [[Tile()], [Tile(), Tile()]]])
def test_tiles_stand_in_rows_and_columns(tiles: list[list[Tile]]) -> None:
    with pytest.raises(MulticamError, match="rows of equally many tiles"):
        figure(tiles)


@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (3, 6), (16, 2)])
@pytest.mark.parametrize("size", [(8, 8), (8, 60), (60, 8)])
def test_nothing_overlaps_or_leaves_the_page(columns: int, rows: int, size: tuple[int, int]) -> None:
    tile = Tile(torch.rand(3, *size), torch.rand(size), caption="a longer caption 100 %")
    other = Tile(torch.rand(3, 8, 8))
    picture = figure(
        [[tile, other, tile, other][r % 2 : r % 2 + 1] * columns for r in range(rows)],
        columns=[f"a method with a name {c // 2}" for c in range(columns)],
        rows=["a label of several words that has to be wrapped"] * rows,
        title="a title that is longer than the page is wide when there is but one column",
        width=14.0,
    )
    page = picture.figure.bbox
    assert page.width <= 14.001 * picture.figure.dpi
    boxes = [text.get_window_extent() for text in picture.figure.texts if text.get_text()]
    boxes += [a.get_window_extent() for a in picture.figure.axes]
    slack = 2.0  # pixels: glyphs reach a little over their line
    for box in boxes:
        assert box.x0 >= -slack and box.y0 >= -slack and box.x1 <= page.width + slack and box.y1 <= page.height + slack
    for a, b in combinations(boxes, 2):
        across, down = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert across <= slack or down <= slack


def test_tiles_of_a_row_and_of_a_column_are_aligned_and_undistorted() -> None:
    picture = figure([[Tile(torch.rand(3, 6, 9)), Tile(map=torch.rand(12, 18))]] * 2, rows=["a", "b"])
    a, b, c, d = (axis.get_window_extent() for axis in axes(picture, "tile"))
    assert a.y0 == pytest.approx(b.y0) and a.x0 == pytest.approx(c.x0) and b.x1 == pytest.approx(d.x1)
    assert all(box.width / box.height == pytest.approx(1.5) for box in (a, b, c, d))


def test_chinese_labels_and_formulas_do_not_warn(tmp_path: Path) -> None:
    picture = figure(
        [[Tile(torch.rand(3, 8, 8), caption="频域 72 %")]], columns=["照片"], rows=["$x_f$ 样本"], title="图"
    )
    for suffix in (".png", ".pdf", ".svg"):
        assert picture.save(tmp_path / f"a{suffix}").stat().st_size > 1000


# Picture


def test_a_picture_is_saved_shown_and_read(tmp_path: Path) -> None:
    picture = figure([[Tile(torch.rand(3, 8, 8), torch.rand(8, 8))]], title="title")
    width, height = picture.figure.get_size_inches()
    assert picture._repr_png_()[:4] == b"\x89PNG"
    assert picture.rgb.dtype == np.uint8 and picture.rgb.shape[2] == 3
    assert np.allclose(np.array(picture.rgb.shape[:2]) / 150, [height, width], atol=0.01)
    with Image.open(picture.save(tmp_path / "a.png", dpi=200)) as saved:
        assert np.allclose(np.array(saved.size) / 200, [width, height], atol=0.01)
    assert b"/Type3" not in picture.save(str(tmp_path / "a.pdf")).read_bytes()
    with pytest.raises(MulticamError, match=r"no picture format '.pgn'; did you mean '.png'"):
        picture.save(tmp_path / "a.pgn")


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MulticamError, match=r'pip install "multicam-torch\[plot\]"'):
        figure([[Tile(torch.rand(3, 8, 8))]])


def test_a_dark_style_does_not_reach_the_page(inputs, maps) -> None:
    dark = {"savefig.facecolor": "black", "axes.facecolor": "black", "text.color": "white", "savefig.bbox": "tight"}
    region = torch.ones(2, 8, 8) > 0
    plain = panel(inputs, maps, regions=region).rgb
    with matplotlib.rc_context({**dark, "figure.autolayout": True, "image.interpolation": "bilinear"}):
        assert np.array_equal(panel(inputs, maps, regions=region).rgb, plain)


def test_nothing_global_changes(inputs, maps, tmp_path: Path) -> None:
    before, rng = dict(matplotlib.rcParams), torch.get_rng_state()
    panel(inputs, maps, title="图").save(tmp_path / "a.pdf")
    assert dict(matplotlib.rcParams) == before
    assert torch.equal(torch.get_rng_state(), rng)


def test_unknown_choices_are_named_and_pyplot_is_never_imported() -> None:
    # In a process of its own: here the type checks would object first, and other libraries have imported pyplot.
    code = """
import sys, torch, multicam.figures as f, multicam.figures.colours as r
assert "matplotlib" not in sys.modules
x = torch.rand(1, 4, 4)
f.figure([[f.Tile(x, x[0])]]).rgb
assert "matplotlib.pyplot" not in sys.modules
for call in (
    lambda: r.normalize(x, "share"),
    lambda: r.colorize(x, "infernal"),
    lambda: f.figure([[f.Tile(map=x[0])]], scale="columns"),
):
    try:
        call()
    except f.MulticamError as error:
        print(error)
"""
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.splitlines()
    assert [line.split("?")[0] for line in shown] == [
        "no scale 'share'; did you mean 'shared'",
        "no colour map 'infernal'; did you mean 'inferno'",
        "no scale 'columns'; did you mean 'column'",
    ]


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


def test_a_clip_with_frames_first_is_shown_by_its_frames() -> None:
    clip = torch.zeros(1, 3, 8, 6, 6)
    clip[0, :, 5] = 1
    map = torch.zeros(1, 8, 6, 6)
    map[0, 5, 2, 2] = 1
    shown = [panel({"clip": x}, {"clip": map}).rgb for x in (clip, clip.transpose(1, 2))]
    assert np.array_equal(*shown)
