"""From a layer's grid to an input: which input, at which size, and by which interpolation."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multicam import Layer, MulticamError, Trace, tokens
from multicam.cam.laying import ONLY, input_of, laid, refuse_unseen, shown, spatial_size
from multicam.watch.trace import Site
from tests.helpers.models import Captioned, Fusion, Siamese, fusion_inputs, seeded


def site(model: nn.Module, inputs: Any, name: str, layer: Any, output: Any = None) -> Site:
    return Trace(model, inputs, {name: layer}, 1, output).sites[name]


@pytest.mark.parametrize(
    ("shape", "grid", "tokens_said", "size"),
    [
        ((2, 3, 32, 48), (4, 6), False, (32, 48)),
        ((2, 32, 48), (4, 6), False, (32, 48)),
        ((2, 3, 8, 32, 48), (4, 6), False, (32, 48)),
        ((2, 3, 8, 32, 48), (4, 4, 6), False, (8, 32, 48)),
        ((2, 8, 3, 32, 48), (4, 4, 6), False, (8, 32, 48)),
        ((2, 3, 100), (25,), False, (100,)),
        ((2, 7, 64), (7,), True, (7,)),
        ((2, 7, 64), (7,), False, (64,)),
        ((2, 9), (9,), False, (9,)),
        ((2, 3, 32, 48), (9,), False, None),
        ((2,), (9,), False, None),
        ((2, 3, 4, 5, 6, 7), (1, 2, 3, 4), False, None),
    ],
)
def test_the_size_of_an_input_along_the_axes_of_a_map(
    shape: tuple[int, ...], grid: tuple[int, ...], tokens_said: bool, size: tuple[int, ...] | None
) -> None:
    assert spatial_size(torch.empty(shape), grid, tokens_said) == size


def test_what_is_no_tensor_has_no_size() -> None:
    assert spatial_size(None, (4, 6), False) is None and spatial_size([1, 2], (2,), False) is None


@pytest.mark.parametrize(
    ("name", "onto", "found"),
    [
        ("depth", None, ("depth", True)),
        ("anything", "depth", ("depth", True)),
        ("texture", "depth", ("depth", True)),
        ("anything", None, (None, False)),
        (ONLY, None, (None, False)),
    ],
)
def test_the_input_that_a_map_is_laid_on(name: str, onto: str | None, found: tuple[str | None, bool]) -> None:
    it = site(seeded(Fusion), fusion_inputs(), name, Layer("depth", onto=onto))
    assert input_of(it, it.trace.inputs) == found
    assert shown(it) == (name or "depth")


def test_the_only_image_is_meant_without_being_named() -> None:
    call = {"image": torch.rand(2, 3, 16, 16), "ids": torch.ones(2, 5, dtype=torch.int64)}
    it = site(seeded(Captioned), call, ONLY, "image", "logits")
    assert input_of(it, it.trace.inputs) == ("image", False)


def test_a_map_is_resized_to_its_input_or_stays_on_its_grid() -> None:
    model, inputs = seeded(Fusion), fusion_inputs()
    grid_map = torch.rand(2, 4, 8)
    named = site(model, inputs, "depth", "depth")
    expected = F.interpolate(grid_map[:, None], (16, 32), mode="bilinear", align_corners=False)[:, 0]
    assert torch.equal(laid(grid_map, named), expected)
    assert laid(grid_map, site(model, inputs, "grid", "depth")) is grid_map
    signal = nn.Sequential(nn.Conv1d(3, 4, 2, 2), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    line = torch.rand(2, 10)
    found = laid(line, site(signal, torch.rand(2, 3, 20), ONLY, "0"))
    assert torch.equal(found, F.interpolate(line[:, None], 20, mode="linear", align_corners=False)[:, 0])


def test_features_have_a_cell_for_each_token_that_is_said() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).mean(1)

    it = site(Words(), torch.rand(2, 7, 8), ONLY, Layer("layer", reshape=tokens(7)))
    grid_map = torch.rand(2, 7)
    assert torch.equal(laid(grid_map, it), grid_map)


def test_a_map_that_fits_no_axes_of_a_named_input_is_refused_and_else_stays() -> None:
    model, inputs = seeded(Fusion), fusion_inputs()
    line = torch.rand(2, 9)
    with pytest.raises(
        MulticamError, match=r"map of layer 'depth' has the grid \(9,\), which cannot be laid on input 'depth'"
    ):
        laid(line, site(model, inputs, "depth", "depth"))
    single = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert laid(line, site(single, torch.rand(2, 3, 8, 8), ONLY, "0")) is line


def test_an_input_that_the_call_does_not_see_is_refused_and_those_it_sees_are_named() -> None:
    dates = {"before": torch.rand(2, 3, 16, 16), "after": torch.rand(2, 3, 16, 16)}
    refuse_unseen(site(seeded(Siamese), dates, "after", "encoder#1"))
    with pytest.raises(MulticamError, match=r"layer 'encoder#0' does not see input 'after'.*; it sees 'before'"):
        refuse_unseen(site(seeded(Siamese), dates, "after", "encoder#0"))
