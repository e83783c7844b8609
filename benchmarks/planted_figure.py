"""A picture of planted evidence: one sample, and what three methods see in it."""

from functools import partial

from torch import Tensor, nn

from benchmarks.planted_data import INPUTS, Samples
from benchmarks.planted_methods import LAYERS, attention_maps, peer_maps
from multicam import HiResCAM, Maps
from multicam.figures.page import Picture
from multicam.figures.tiles import Tile, figure

METHODS = {
    "HiResCAM,\nmulticam": lambda model, samples: HiResCAM(model, LAYERS)(samples.inputs, samples.label.tolist()),
    "HiResCAM,\npytorch-grad-cam": partial(peer_maps, "HiResCAM"),
    "attention": lambda model, samples: attention_maps(model, samples)["attention"],
}


def picture(model: nn.Module, samples: Samples) -> Picture:
    """The inputs of the first sample, and beside them its maps, those of one method on one scale; the evidence is outlined."""
    columns: dict[str, Maps] = {name: explain(model, samples) for name, explain in METHODS.items()}
    tiles = []
    for name in INPUTS:
        image = _shown(samples.inputs[name][0])
        region = samples.regions[name][0] if samples.regions[name][0].any() else None
        tiles.append(
            [Tile(image, region=region), *(Tile(image, maps[name][0], region=region) for maps in columns.values())]
        )
    return figure(
        tiles,
        columns=["input", *columns],
        rows=INPUTS,
        scale="column",
        quantity="the method's own values",
        units="one scale for each column",
    )


def _shown(x: Tensor) -> Tensor:
    return x if len(x) == 3 else x.mean(0, keepdim=True)
