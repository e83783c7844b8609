"""The pictures of `multicam demo`: where the bundled detector looked, on photos it never saw."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from multicam.call.files import read_image
from multicam.cam.catalogue import ONE_PASS
from multicam.cam.weighted import HiResCAM
from multicam.demo.detector import LAYERS, EditDetector, inputs_of, load
from multicam.demo.edits import CLASSES, Sample, sample
from multicam.demo.photos import crop_of
from multicam.figures.colours import normalize
from multicam.figures.page import Picture
from multicam.figures.panels import panel
from multicam.figures.tiles import Tile, figure
from multicam.maps import Maps
from multicam.printing import percent
from multicam.watch.trace import Trace

# One edit of each kind, each in a photo that served neither training nor tuning.
SINGLE = {"colour": ("chelsea", 0), "frequency": ("china", 1), "texture": ("rocket", 2)}
TRIPLE = ("camera", 7)  # picked as an example with three clear regions; the measurements are README's


def write(out: Path, image: Path | None = None) -> Iterator[Path]:
    """The pictures, one path after the other as each is written: four, and one of the user's own photo if given.

    Args:
        out: The folder to write to; made if it is not there.
        image: A photo to explain as well.

    Raises:
        MulticamError: If the photo cannot be read, or matplotlib or safetensors is missing.
    """
    out.mkdir(parents=True, exist_ok=True)
    model = load()
    singles = {edit: sample(name, [edit], seed=seed) for edit, (name, seed) in SINGLE.items()}
    pictures: dict[str, Callable[[], Picture]] = {
        "panel": lambda: one_edit_each(model, singles),
        "three-edits": lambda: every_logit(model, sample(TRIPLE[0], seed=TRIPLE[1])),
        "methods": lambda: every_method(model, singles),
        "scales": lambda: both_scales(model, singles),
    }
    if image is not None:
        pixels = read_image(str(image))[0].expand(3, -1, -1)
        brightest = pixels.max().clamp(min=1)  # those of floating point keep their values
        eight_bit = (pixels / brightest * 255).round().byte().movedim(0, -1).numpy()
        pictures[f"photo-{image.stem}"] = lambda: every_logit(model, Sample(crop_of(eight_bit), {}))
    for name, draw in pictures.items():
        yield draw().save(out / f"{name}.png", dpi=200)


def one_edit_each(model: EditDetector, singles: dict[str, Sample]) -> Picture:
    """Three photos with one edit each: the inputs, and the maps of the edited class on one shared scale."""
    inputs = _stacked(list(singles.values()))
    return panel(
        inputs,
        _evidence(model, inputs),
        regions={name: torch.stack([s.regions[edit] for edit, s in singles.items()]) for name in inputs},
        rows=[f"{edit} edit in {SINGLE[edit][0]!r}" for edit in singles],
        title="Where the evidence for the edit lies (HiResCAM, one scale for all; white: the true region)",
    )


def every_logit(model: EditDetector, edited: Sample) -> Picture:
    """One photo with all its edits: the map of each logit on each input. Evidence belongs on the diagonal."""
    inputs = {name: x.expand(3, -1, -1, -1) for name, x in inputs_of(edited.image).items()}
    maps = _evidence(model, inputs)
    with torch.no_grad():
        logits = model(**inputs)[0]
    shares = maps.shares().tolist()
    region = [edited.regions.get(edit) for edit in CLASSES]
    photo = [Tile(inputs["rgb"][i], region=region[i]) for i in range(3)]
    on_inputs = [
        [
            Tile(inputs[name][i], maps[name][i], f"{percent(shares[i][j])} of its positive evidence", region[i])
            for i in range(3)
        ]
        for j, name in enumerate(inputs)
    ]
    return figure(
        [photo, *on_inputs],
        columns=[f"{edit}: {logit:+.1f}" for edit, logit in zip(CLASSES, logits.tolist(), strict=True)],
        rows=["photo", *(f"on {name}" for name in inputs)],
        title="Each logit's evidence on each input; above zero it says 'edited'",
        scale="column",
    )


def every_method(model: EditDetector, singles: dict[str, Sample]) -> Picture:
    """The edits of `one_edit_each` by every method, each on the input that shows this edit."""
    inputs = _stacked(list(singles.values()))
    trace = Trace(model, inputs, LAYERS, range(3))
    found = {method: method(model, LAYERS).maps(trace, signed=True) for method in ONE_PASS}
    tiles = [
        [Tile(inputs[name][i], found[method][name][i].relu(), region=edited.regions[edit]) for method in ONE_PASS]
        for i, ((edit, edited), name) in enumerate(zip(singles.items(), inputs, strict=True))
    ]
    return figure(
        tiles,
        columns=[method.__name__ for method in ONE_PASS],
        rows=[f"{edit} on {name}" for edit, name in zip(singles, inputs, strict=True)],
        title="Every method of one pass, each map by its own maximum (white: the true region)",
        scale="each",
    )


def both_scales(model: EditDetector, singles: dict[str, Sample]) -> Picture:
    """The same maps on one shared scale, and each on its own, as single-input tools draw them."""
    inputs = _stacked(list(singles.values()))
    maps = _evidence(model, inputs)
    tiles = []
    for i, (edit, edited) in enumerate(singles.items()):
        of_sample = {name: maps[name][i : i + 1] for name in inputs}
        tiles.append(
            [
                Tile(inputs[name][i], scaled[name][0], region=edited.regions[edit])
                for scaled in (normalize(of_sample, "shared"), normalize(of_sample, "each"))
                for name in inputs
            ]
        )
    return figure(
        tiles,
        columns=[f"{name}{mark}" for mark in ("", " ") for name in inputs],
        rows=[f"{edit} edit" for edit in singles],
        title="Left: one scale for the three inputs, the edited one stands out. Right: each map by its own maximum",
        units="share of the strongest",
    )


def _evidence(model: EditDetector, inputs: dict[str, Tensor]) -> Maps:
    """What speaks for class i in sample i, on each input. A logit without any on an input is no reason to warn here."""
    maps = HiResCAM(model, LAYERS).maps(Trace(model, inputs, LAYERS, range(3)), signed=True)
    return Maps({name: m.relu() for name, m in maps.items()})


def _stacked(samples: Sequence[Sample]) -> dict[str, Tensor]:
    each = [inputs_of(s.image) for s in samples]
    return {name: torch.cat([inputs[name] for inputs in each]) for name in each[0]}
