"""Which methods name the input that holds the evidence, and find its place? Evidence is planted in inputs made from real photos.

python -m benchmarks.planted --seeds 5 --write docs/explanation/planted-evidence.md
"""

import argparse
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from benchmarks.command import mark, publish
from benchmarks.planted_data import (
    CLASSES,
    INPUTS,
    Batch,
    Samples,
    companions,
    crops,
    planted,
    standardised,
    statistics,
)
from benchmarks.planted_figure import picture
from benchmarks.planted_methods import sources
from benchmarks.planted_report import Key, Run, Scores, report
from multicam import Maps, MulticamError
from multicam.demo.photos import PHOTOS
from multicam.metrics.localization import energy_inside, names_input, pointing_game
from multicam.shares.shapley import Contribution

MARK = mark("benchmarks.planted")
GRID = 8  # tokens along a side
CHANNELS = {"rgb": 3, "frequency": 9, "texture": 1}


@dataclass(frozen=True)
class Size:
    """How much to do: training crops and steps, held-out samples for all methods and for the slow ones, references."""

    crops: int = 2400
    steps: int = 700
    samples: int = 160
    few: int = 24
    references: int = 16


QUICK = Size(crops=1200, steps=400, samples=32, few=4, references=4)


def _block(inward: int, outward: int, kernel: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inward, outward, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outward),
        nn.ReLU(inplace=True),
    )


class Reader(nn.Module):
    """Class scores `(b 4)`: a class token reads the 8 x 8 tokens of each of three inputs."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        # The details of the photo are half its size.
        strides = {"rgb": 4, "frequency": 2, "texture": 4}
        self.encoders = nn.ModuleDict(
            {
                name: nn.Sequential(_block(CHANNELS[name], 24, 5, strides[name]), _block(24, width, 3, 2))
                for name in INPUTS
            }
        )
        self.position = nn.Parameter(0.02 * torch.randn(1, GRID * GRID, width))
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.reads = nn.ModuleDict({name: nn.MultiheadAttention(width, heads, batch_first=True) for name in INPUTS})
        self.head = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(inplace=True), nn.Linear(2 * width, CLASSES))

    def forward(self, rgb: Tensor, frequency: Tensor, texture: Tensor) -> Tensor:
        """The scores."""
        images = zip(INPUTS, (rgb, frequency, texture), strict=True)
        tokens = {name: self.encoders[name](image).flatten(2).mT for name, image in images}
        stream = torch.cat([self.cls_token.expand(len(rgb), -1, -1), tokens["rgb"]], dim=1)
        x = query = stream[:, :1]
        for name, read in tokens.items():
            x = x + self.reads[name](query, read + self.position, read, need_weights=False)[0]
        scores: Tensor = self.head(x[:, 0])
        return scores


def trained(inputs: Batch, photos: Tensor, steps: int, seed: int) -> nn.Module:
    """A model that has learned the classes, from evidence planted anew in every batch."""
    torch.manual_seed(seed)
    generator = Generator().manual_seed(1000 + seed)
    model = Reader()
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(photos), (64,), generator=generator)
        samples = planted({name: x[rows] for name, x in inputs.items()}, photos[rows], generator)
        for i, name in enumerate(INPUTS):  # that an input is missing has to be nothing new
            missing = (samples.where != i) & (torch.rand(len(rows), generator=generator) < 0.15)
            samples.inputs[name][missing] = 0
        loss = F.cross_entropy(model(**samples.inputs), samples.label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def scored(found: Maps | Contribution, samples: Samples) -> Scores:
    """What an explanation got right, sample by sample."""
    n = len(samples.label)
    named, least, hit, best, inside = (torch.zeros(n) for _ in range(5))
    for i, name in enumerate(INPUTS):
        here = samples.where == i
        if not here.any():
            continue
        if isinstance(found, Contribution):
            named[here] = (found.shapley[here].argmax(1) == found.players.index(name)).float()
            continue
        maps = {other: m[here] for other, m in found.items()}
        region = samples.regions[name][here]
        named[here] = names_input(maps, name).float()
        mass = torch.stack([m.clamp(min=0).flatten(1).mean(1) for m in maps.values()])
        least[here] = ((mass <= maps[name].clamp(min=0).flatten(1).mean(1)).sum(0) == 1).float()
        hit[here] = pointing_game(maps[name], region).float()
        inside[here] = energy_inside(maps[name], region)
        others = torch.stack([maps[other].flatten(1).amax(1) for other in INPUTS if other != name]).amax(0)
        best[here] = hit[here] * (maps[name].flatten(1).amax(1) > others)
    if isinstance(found, Contribution):
        return Scores(samples.photos, named)
    return Scores(samples.photos, named, least, hit, inside, best, found.comparable)


def prepared(seed: int, size: Size, group: str) -> tuple[nn.Module, Batch, Samples]:
    """A model of the training photos, references from these, and samples from the photos of another group."""
    torch.set_num_threads(1)
    generator = Generator().manual_seed(seed)
    images, photos = crops("training", size.crops, generator)
    inputs = companions(images)
    known = statistics(inputs)
    inputs = standardised(inputs, known)
    model = trained(inputs, photos, size.steps, seed)
    rows = torch.randperm(size.crops, generator=generator)[: size.references]
    references = planted({name: x[rows] for name, x in inputs.items()}, photos[rows], generator).inputs
    images, photos = crops(group, size.samples, generator)
    return model, references, planted(standardised(companions(images), known), photos, generator)


def run(seed: int, size: Size, group: str) -> Run:
    """One model, and what all explanations of it got right."""
    model, references, samples = prepared(seed, size, group)
    with torch.no_grad():
        right = model(**samples.inputs).argmax(1) == samples.label
    scores: dict[Key, Scores] = {}
    refused = {}
    for source in sources(references):
        given = samples.first(size.few) if source.slow else samples
        with warnings.catch_warnings():
            # Empty maps are a result here.
            warnings.simplefilter("ignore")
            try:
                found = source.make(model, given)
            except MulticamError as error:
                refused[source.name] = str(error)
                continue
        scores |= {(source.whose, name): scored(each, given) for name, each in found.items()}
    return Run(right, scores, refused)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables, or write them into a page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planted", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="models (%(default)s)")
    parser.add_argument("--photos", choices=("tuning", "final"), default="final", help="held-out photos (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread (%(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help="one model, trained for less, and fewer samples: about two minutes"
    )
    parser.add_argument("--write", type=Path, metavar="PAGE", help="a page whose results to replace")
    parser.add_argument(
        "--figure", type=Path, metavar="PICTURE", help="draw one sample of the first model, and nothing else"
    )
    given = parser.parse_args(arguments)
    began = time.perf_counter()
    seeds, size = (1, QUICK) if given.quick else (given.seeds, Size())
    if given.figure is not None:
        model, _, samples = prepared(0, size, given.photos)
        picture(model, samples).save(given.figure)
        return
    with ProcessPoolExecutor(min(given.workers, seeds), mp_context=get_context("spawn")) as pool:
        runs = list(pool.map(run, range(seeds), [size] * seeds, [given.photos] * seeds))
    where = (
        f"{seeds} models, each with {size.samples} samples from {len(PHOTOS[given.photos])} held-out photos ({size.few} for slow "
        f"methods); {(time.perf_counter() - began) / 60:.1f} minutes in {given.workers} processes of one thread. "
        "± is the standard deviation over models; intervals draw models and photos."
    )
    publish(report(runs, where), given.write, MARK)


if __name__ == "__main__":
    main()
