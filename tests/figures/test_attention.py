"""Figures of attention: every tile shows the map that it claims, the outline is the query's patch, the numbers are the shares."""

import matplotlib.contour
import numpy as np
import pytest
import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from multicam.attending.attend import attention, record_attention
from multicam.attending.attentions import Attention
from multicam.attending.between import flow_matrix
from multicam.call.targets.scores import TopClass
from multicam.demo.detector import EditDetector
from multicam.errors import MulticamError
from multicam.figures.attention import flow_figure, head_sheet, query_figure
from multicam.figures.colours import colorize, overlay, to_rgb
from multicam.figures.page import Picture
from multicam.figures.tiles import Tile, figure
from multicam.watch.reshape import tokens
from tests.helpers.pictures import axes, contoured, grey, limits, pixels, texts


class Joint(nn.Module):
    """Two images and a class token in one sequence, for two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.rgb_patches = nn.Conv2d(3, 16, 8, stride=8)
        self.depth_patches = nn.Conv2d(1, 16, 8, stride=8)
        self.token = nn.Parameter(torch.rand(1, 1, 16))
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, heads, 32, batch_first=True) for heads in (2, 4))
        self.head = nn.Linear(16, 3)

    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        streams = (self.rgb_patches(rgb), self.depth_patches(depth))
        tokens = torch.cat([self.token.expand(len(rgb), -1, -1), *(x.flatten(2).mT for x in streams)], 1)
        for layer in self.layers:
            tokens = layer(tokens)
        return self.head(tokens[:, 0])


@pytest.fixture
def joint_inputs() -> dict[str, Tensor]:
    return {"rgb": torch.rand(2, 3, 32, 24), "depth": torch.rand(2, 1, 16, 40)}


@pytest.fixture
def joint(joint_inputs: dict[str, Tensor]) -> Attention:
    return attention(Joint(), joint_inputs, TopClass())


@pytest.fixture
def demo_inputs() -> dict[str, Tensor]:
    shapes = {"rgb": (1, 3, 64, 64), "frequency": (1, 64, 16, 16), "texture": (1, 3, 32, 32)}
    return {name: torch.rand(shape) for name, shape in shapes.items()}


@pytest.fixture
def demo(demo_inputs: dict[str, Tensor]) -> Attention:
    return attention(EditDetector(), demo_inputs)


def shown(image: Tensor, map: Tensor, limit: float) -> np.ndarray:
    return overlay(grey(image), map / limit)


def outline(picture: Picture, tile: int) -> tuple[float, ...]:
    """The box `(y0 x0 y1 x1)` of the contour on a tile, in fractions of it."""
    (contour,) = [
        child
        for child in axes(picture, "tile")[tile].get_children()
        if isinstance(child, matplotlib.contour.QuadContourSet)
    ][:1]
    points = contour.get_paths()[0].vertices
    (x0, y0), (x1, y1) = points.min(0), points.max(0)
    return y0, x0, y1, x1


# head_sheet


def test_a_sheet_has_every_head_of_every_layer(joint: Attention, joint_inputs: dict[str, Tensor]) -> None:
    picture = head_sheet(joint, "depth", "cls", inputs=joint_inputs, sample=1)
    found = [(call, head) for call in joint for head in range(call.heads)]
    maps = [call.heatmap("depth", "cls", heads=head)[1] for call, head in found]
    assert len(pixels(picture)) == 6  # the first layer has two heads only
    top = max(map.max().item() for map in maps)
    for tile, map in zip(pixels(picture), maps, strict=True):
        assert np.array_equal(tile, shown(joint_inputs["depth"][1], map, top))
    assert limits(picture) == [pytest.approx((0, top))]
    assert {*(f"head\N{NO-BREAK SPACE}{i}" for i in range(4)), "layers 0", "layers 1"} <= {*texts(picture)}


def test_a_sheet_without_images_shows_the_maps_alone(demo: Attention) -> None:
    call = demo["frequency_attention"]
    tiles = pixels(head_sheet(call, query=(3, 60)))
    maps = [call.heatmap("frequency", (3, 60), heads=head)[0] for head in range(2)]
    top = max(map.max() for map in maps)
    assert all(np.array_equal(tile, colorize(map / top)) for tile, map in zip(tiles, maps, strict=True))


def test_the_colour_bar_says_what_a_value_is(joint: Attention) -> None:
    assert "attention, 1 is attention spread evenly over the input" in texts(head_sheet(joint, "rgb"))
    assert "evidence, units of the score" in texts(head_sheet(joint, "rgb", value="grad*weights"))


# query_figure


@pytest.mark.parametrize(("pixel", "box"), [((0, 0), (0, 0, 1, 1)), ((31, 8), (3, 1, 4, 2)), ((17, 23), (2, 2, 3, 3))])
def test_the_outline_is_the_patch_of_the_query(joint, joint_inputs, pixel, box) -> None:
    picture = query_figure(joint[0], joint_inputs, pixel, of="rgb")
    assert contoured(picture) == [True, False, False, False]
    assert outline(picture, 0) == pytest.approx(np.array(box) / [4, 3, 4, 3], abs=0.02)


def test_a_query_is_shown_beside_its_attention_on_every_input(joint, joint_inputs) -> None:
    call = joint[1]
    picture = query_figure(call, joint_inputs, [(4, 4), (20, 20)], of="rgb", sample=1)
    maps = {name: [call.heatmap(name, q, of="rgb")[1] for q in ((4, 4), (20, 20))] for name in joint_inputs}
    top = max(map.max().item() for each in maps.values() for map in each)
    rgb, depth = joint_inputs["rgb"][1], joint_inputs["depth"][1]
    for i in range(2):
        of, on_rgb, depth_itself, on_depth = pixels(picture)[4 * i : 4 * i + 4]
        assert np.array_equal(of, to_rgb(rgb)) and np.array_equal(depth_itself, to_rgb(depth))
        assert np.array_equal(on_depth, shown(depth, maps["depth"][i], top))
        assert np.array_equal(on_rgb, shown(rgb, maps["rgb"][i], top))
    assert [text for text in texts(picture) if text.startswith("y ")] == ["y 4, x 4", "y 20, x 20"]


def test_captions_are_the_shares_of_the_attention(joint, joint_inputs) -> None:
    call = joint[0]
    line = call.weights.mean(1)[0, 1]  # the first patch of rgb, to the class token, 12 patches of rgb and 10 of depth
    expected = [f"{100 * part.sum():.0f}\N{NO-BREAK SPACE}% of its attention" for part in (line[1:13], line[13:])]
    found = texts(query_figure(call, joint_inputs, (0, 0), of="rgb"))
    assert [text.replace("\n", " ") for text in found if "of its" in text] == expected


def test_no_attention_is_laid_over_a_spectrum(demo, demo_inputs) -> None:
    picture = query_figure(demo, demo_inputs, (40, 30), spectral=["frequency"])
    _, spectrum, on_spectrum, _, _ = pixels(picture)
    map = demo["frequency_attention"].heatmap("frequency", (40, 30))[0]
    assert np.array_equal(spectrum, to_rgb(demo_inputs["frequency"][0]))
    assert np.array_equal(on_spectrum, colorize(map / limits(picture)[0][1]))
    assert not any("of its" in text for text in texts(picture))  # all of it goes there


def test_attentions_to_one_input_are_told_apart(joint, joint_inputs) -> None:
    found = texts(query_figure(joint, joint_inputs, (0, 0), "depth", of="rgb"))
    assert {"depth, layers 0", "depth, layers 1"} <= {*found}
    assert "depth" in texts(query_figure(joint[0], joint_inputs, (0, 0), "depth", of="rgb"))


@pytest.mark.parametrize("query", ["cls", "mean", 0])
def test_a_query_without_a_place_has_no_outline(joint, joint_inputs, query) -> None:
    assert contoured(query_figure(joint[0], joint_inputs, query)) == [False] * 4  # both inputs and their maps


def test_the_patch_of_a_query(joint) -> None:
    assert joint[0].patch(0) is None
    assert joint[0].patch(13) == joint[0].patch((7, 7), of="depth") == ("depth", (0, 0, 0, 1, 0.5, 0.2))


def test_tokens_that_were_said_to_be_an_image_are_drawn(joint_inputs) -> None:
    said = attention(Joint(), joint_inputs, layouts={"depth": tokens(2, 5, prefix=13)})
    picture = query_figure(said[0], joint_inputs, 13, "depth")
    assert len(pixels(picture)) == 2 and contoured(picture)[0]


# flow_figure


def test_the_numbers_are_those_of_the_flow_matrix(joint: Attention) -> None:
    shares = flow_matrix(joint).shares.mean(0)  # (layers, from, to)
    picture = flow_figure(joint)
    numbers = [text for text in texts(picture) if text.isdigit()][: shares.numel()]
    assert sorted(numbers) == sorted(f"{100 * share:.0f}" for share in shares.flatten())
    assert {"from rgb", "from depth", "from own tokens", "to rgb", "to depth", "to own tokens"} <= {
        text.replace("\n", " ") for text in texts(picture)
    }
    whole = flow_matrix(joint).shares.sum(-1)
    assert torch.allclose(whole, torch.ones_like(whole))


def test_cells_of_tokens_that_never_meet_are_empty(demo: Attention) -> None:
    assert len(pixels(flow_figure(demo))) == 2  # of two attentions, each to an input of its own
    assert [text for text in texts(flow_figure(demo)) if text == "100"] == ["100"] * 3  # and at the end of the bar


def test_text_in_a_tile_can_be_read() -> None:
    dark, bright = Tile(map=torch.zeros(1, 1), text="dark"), Tile(map=torch.ones(1, 1), text="bright")
    picture = figure([[dark, bright]])
    colours = {text.get_text(): text.get_color() for text in picture.figure.texts}
    assert (colours["dark"], colours["bright"]) == ("white", "black")


# errors


@pytest.mark.parametrize("draw", [head_sheet, flow_figure, lambda calls: query_figure(calls, {}, 0)], ids=["heads", "flow", "query"])  # fmt: skip
def test_no_attention_is_no_figure(draw) -> None:
    with pytest.raises(MulticamError, match="at least one attention"):
        draw([])


def test_what_does_not_exist_is_said(joint, joint_inputs, demo, demo_inputs) -> None:
    with pytest.raises(MulticamError, match="samples are 0 to 1, not 2"):
        head_sheet(joint, "rgb", sample=2)
    with pytest.raises(MulticamError, match=r"did you mean 'frequency'"):
        query_figure(demo, demo_inputs, (0, 0), spectral=["frequenzy"])
    with pytest.raises(MulticamError, match=r"none of these attentions looks at rgb:\n  frequency_attention#0"):
        query_figure(demo, demo_inputs, (0, 0), "rgb")
    with pytest.raises(MulticamError, match="lies outside"):
        query_figure(joint, joint_inputs, (40, 0), of="rgb")


def test_several_passes_are_drawn_one_at_a_time() -> None:
    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3).eval()
    with torch.no_grad(), record_attention(model) as att:
        for _ in range(2):
            model(torch.rand(1, 3, 16, 16))
    with pytest.raises(MulticamError, match="pass"):
        flow_figure(att)
    assert {"blocks 0", "blocks 1"} <= {*texts(flow_figure(att, forward=1))}
