"""Does activation maximisation find more than a search? The demo's channels on made images, and on the best of 1,000 photo crops.

For each layer of the three branches of the bundled detector, one image of the branch's input is made for each channel, while the two
other inputs are held. The same objective, the channel's mean, is measured on 1,000 crops of photos in the place of that input. The made
images keep to the range that each channel of the input has in these crops.

    python -m benchmarks.dream
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Generator, Tensor

from benchmarks.command import mark, publish
from benchmarks.tables import table
from multicam import Inputs, Trace
from multicam.demo.detector import EditDetector, inputs_of, inputs_of_crops, load
from multicam.demo.photos import photo
from multicam.demo.training import crop, photos
from multicam.inside.dream import activation_maximization

LAYERS = {
    "rgb": ("rgb_branch.0", "rgb_branch.1", "rgb_branch"),
    "frequency": ("frequency_branch.0", "frequency_branch"),
    "texture": ("texture_branch.0", "texture_branch.1", "texture_branch"),
}
STILL = ("frequency",)  # a spectrum has no rotation
MARK = mark("benchmarks.dream")


def real(count: int) -> dict[str, Tensor]:
    """The inputs of crops of all photos that are not kept for the published figures, in turn."""
    generator = Generator().manual_seed(0)
    images = [*photos("training"), *photos("tuning")]
    return inputs_of_crops(torch.stack([crop(generator, images[i % len(images)]) for i in range(count)]))


def best(
    model: EditDetector, held: dict[str, Tensor], name: str, crops: Tensor, layers: Sequence[str]
) -> dict[str, Tensor]:
    """The highest mean of each channel of the layers over the crops, in the place of one of the held inputs."""
    found: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    for part in torch.split(crops, 100):
        call = {other: x.expand(len(part), *x.shape[1:]) for other, x in held.items()} | {name: part}
        trace = Trace(model, Inputs(**call), {layer: layer for layer in layers}, 0)
        for layer, site in trace.sites.items():
            found[layer].append(site.acts.flatten(2).mean(2).amax(0))
    return {layer: torch.stack(tops).amax(0) for layer, tops in found.items()}


def report(count: int, steps: int, channels: int | None) -> str:
    """A row for each layer."""
    began = time.perf_counter()
    model, crops = load(), real(count)
    held = inputs_of(photo("chelsea"))
    rows = []
    for name, layers in LAYERS.items():
        bounds = crops[name].amin((0, 2, 3)), crops[name].amax((0, 2, 3))
        tops = best(model, held, name, crops[name], layers)
        for layer, top in tops.items():
            chosen = range(len(top))[:channels]
            rotate = 0.0 if name in STILL else 5.0
            dream = activation_maximization(
                model, held, layer, chosen, onto=name, steps=steps, bounds=bounds, rotate=rotate
            )
            top = top[: len(chosen)]
            risen = dream.objective / dream.start.clamp(min=1e-6)
            ratio = (dream.objective / top.clamp(min=1e-6)).quantile(torch.tensor([0.0, 0.5, 1.0]))
            rows.append(
                [
                    f"{name}, {layer}",
                    f"{risen.median():.1f}",
                    f"{int((dream.objective > top).sum())} of {len(top)}",
                    *(f"{value:.2f}" for value in ratio.tolist()),
                ]
            )
    head = [
        "input, layer",
        "median rise over the start, x",
        f"beats the best of {count:,} crops",
        "made / best crop: lowest",
        "median",
        "highest",
    ]
    where_from = (
        f"Each channel's image against the best of {count:,} crops of {len(photos('training')) + len(photos('tuning'))} photos; {steps} steps; "
        f"{(time.perf_counter() - began) / 60:.1f} minutes. The start is already the best of 24 noises."
    )
    return f"{where_from}\n\n{table(head, rows)}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, or write it into a page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dream", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--crops", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--channels", type=int, help="of each layer (all)")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="a page whose results to replace")
    given = parser.parse_args(arguments)
    publish(report(given.crops, given.steps, given.channels), given.write, MARK)


if __name__ == "__main__":
    main()
