"""How the demo's detector is trained and measured: minutes on a laptop's processor, `train_and_measure` does it all."""

import math
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from multicam.cam.base import CAM
from multicam.cam.weighted import GradCAM, HiResCAM
from multicam.demo.detector import LAYERS, WEIGHTS, EditDetector, inputs_of_crops
from multicam.demo.edits import CLASSES, EDITS, blurred, edited, regions, to_rgb, to_ycc, turned, uniform
from multicam.demo.photos import PHOTOS, SIDE, photo
from multicam.figures.colours import normalize
from multicam.maps import Maps

EPOCHS, STEPS, BATCH = 10, 64, 32
FALSE_POSITIVES = 0.05  # on the unedited crops of the worst tuning photo, by which the logits are set to zero


def photos(group: str) -> list[Float[Tensor, "3 _ _"]]:
    """The photos of one group of `PHOTOS`, values 0..255."""
    return [rearrange(torch.tensor(photo(name)), "h w c -> c h w").float() for name in PHOTOS[group]]


def crop(generator: Generator, image: Float[Tensor, "3 h w"]) -> Float[Tensor, "3 128 128"]:
    """A crop from a random place."""
    top, left = (int(torch.randint(side - SIDE + 1, (), generator=generator)) for side in image.shape[1:])
    return image[:, top : top + SIDE, left : left + SIDE]


def training_batch(
    generator: Generator, images: Sequence[Float[Tensor, "3 _ _"]], n: int = BATCH
) -> tuple[Float[Tensor, "n 3 128 128"], Float[Tensor, "n 3 16 16"]]:
    """Crops and how much of each of 16 x 16 places was edited, by class; a third of the crops carries a given edit.

    What happens to photos anyway comes first, so that none of it counts as an edit: other colours, contrast, blur,
    grain, and local changes of brightness, sharpness and content with the same feathered border as the edits.
    """
    crops = []
    for choice in torch.randint(len(images), (n,), generator=generator):
        turns, flip = (int(torch.randint(k, (), generator=generator)) for k in (4, 2))
        turned_crop = crop(generator, images[choice]).rot90(turns, (1, 2))
        crops.append(turned_crop.flip(2) if flip else turned_crop)
    x = _confounded(generator, _varied(generator, torch.stack(crops))).round().clamp(0, 255)
    truth = torch.zeros(n, len(CLASSES), 16, 16)
    for c, edit in enumerate(EDITS.values()):
        chosen = _chosen(generator, n, 0.35)
        region = regions(generator, len(chosen))
        x[chosen] = edited(generator, x[chosen], edit, region)
        truth[chosen, c] = reduce(region, "b 1 (h p) (w q) -> b h w", "mean", p=SIDE // 16, q=SIDE // 16)
    return x, truth


def _chosen(generator: Generator, n: int, probability: float) -> Int[Tensor, " k"]:
    return (torch.rand(n, generator=generator) < probability).nonzero().flatten()


def _varied(generator: Generator, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
    """The crops as another camera, light and file might have given them."""
    n = len(x)
    often, seldom = ((torch.rand(n, 1, 1, 1, generator=generator) < p).float() for p in (0.5, 0.3))
    ycc = turned(to_ycc(x), often * uniform(generator, n, -math.pi, math.pi))
    luma, chroma = ycc[:, :1], ycc[:, 1:] * uniform(generator, n, -0.7, 0.3).exp()
    level = luma.mean((2, 3), keepdim=True)
    angle = uniform(generator, n, 0.0, 2 * math.pi)
    tint = seldom * torch.cat([angle.cos(), angle.sin()], dim=1)
    chroma = chroma + tint * (uniform(generator, n, 0.0, 8.0) + uniform(generator, n, -0.1, 0.1) * (luma - level))
    luma = (luma - level) * uniform(generator, n, 0.7, 1.1) + level + uniform(generator, n, -15.0, 15.0)
    x = to_rgb(torch.cat([luma, chroma], dim=1)).clamp(0, 255)
    soft = _chosen(generator, n, 0.3)
    x[soft] = torch.lerp(x[soft], blurred(x[soft]), uniform(generator, len(soft), 0.0, 1.0))
    noisy = _chosen(generator, n, 0.3)
    noise = torch.randn(len(noisy), 1, SIDE, SIDE, generator=generator)
    x[noisy] += (noise - blurred(noise)) * uniform(generator, len(noisy), 0.0, 5.0)
    return x


def _confounded(generator: Generator, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
    """The crops with local changes that are none of the three edits: of light, of focus, and of what is to be seen."""
    bright = _chosen(generator, len(x), 0.2)
    light = uniform(generator, len(bright), -40.0, 40.0)
    x[bright] = torch.lerp(x[bright], x[bright] + light, regions(generator, len(bright)))
    soft = _chosen(generator, len(x), 0.2)
    x[soft] = torch.lerp(x[soft], blurred(blurred(x[soft])), regions(generator, len(soft)))
    rough = _chosen(generator, len(x), 0.3)
    luma = to_ycc(x)[torch.randperm(len(x), generator=generator)[: len(rough)], :1]
    detail = (luma - luma.mean((2, 3), keepdim=True)) * uniform(generator, len(rough), 0.3, 1.0)
    x[rough] += detail * regions(generator, len(rough))
    return x


@dataclass(frozen=True)
class Trial:
    """Crops of one group of photos: of each photo some unedited ones and as many with one edit of each class.

    Attributes:
        crops: Values 0..255.
        labels: The class of the edit, -1 for none.
        photos: Which photo of the group.
        regions: Where the edit is.
    """

    crops: Float[Tensor, "n 3 128 128"]
    labels: Int[Tensor, " n"]
    photos: Int[Tensor, " n"]
    regions: Bool[Tensor, "n 128 128"]

    @classmethod
    def of(cls, group: str, clean: int, each: int, seed: int = 0) -> "Trial":
        """The trial of a group with `clean` unedited crops and `each` edits of each class by photo."""
        generator = Generator().manual_seed(seed)
        crops, labels, owners, truth = [], [], [], []
        for owner, image in enumerate(photos(group)):
            for label, count in ((-1, clean), *((c, each) for c in range(len(CLASSES)))):
                x = torch.stack([crop(generator, image) for _ in range(count)])
                region = regions(generator, count) * (label >= 0)
                crops.append(edited(generator, x, EDITS[CLASSES[label]], region) if label >= 0 else x)
                labels += [label] * count
                owners += [owner] * count
                truth.append(region[:, 0] > 0.5)
        return cls(torch.cat(crops), torch.tensor(labels), torch.tensor(owners), torch.cat(truth))

    def where(self, chosen: Bool[Tensor, " n"]) -> "Trial":
        """The part of the trial that is chosen."""
        return Trial(self.crops[chosen], self.labels[chosen], self.photos[chosen], self.regions[chosen])


@torch.no_grad()
def logits_of(model: EditDetector, crops: Float[Tensor, "n 3 128 128"]) -> Float[Tensor, "n 3"]:
    """The model's logits for crops with values 0..255."""
    return torch.cat([model(**inputs_of_crops(part)) for part in torch.split(crops, BATCH)])


def areas(logits: Float[Tensor, "n 3"], labels: Int[Tensor, " n"]) -> list[float]:
    """Area under the ROC curve of each logit: how often a crop with its edit scores above one without."""
    found = []
    for c in range(len(CLASSES)):
        with_edit, without = logits[labels == c, c], logits[labels != c, c]
        above = (with_edit[:, None] > without).float() + (with_edit[:, None] == without).float() / 2
        found.append(above.mean().item())
    return found


def train(seed: int, *, epochs: int = EPOCHS, steps: int = STEPS) -> EditDetector:
    """A detector in eval mode, at its best epoch on the tuning photos; the same for the same `seed`.

    Two losses: whether each place was edited, and whether the crop was. An input is left out of every fifth crop and
    takes its kind of edit out of the truth, so that each logit is to be read off its own input: grain, say, is faintly
    visible in the photo as well, and a model that may use it does.

    Args:
        seed: Decides about weights, crops and edits.
        epochs: How often the detector is tried on the tuning photos.
        steps: Batches in between.
    """
    from tqdm import tqdm

    generator = Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = EditDetector()
    # Halved, a photo gives crops of the same things at another scale and sharpness.
    images = [scaled for image in photos("training") for scaled in (image, F.avg_pool2d(image, 2).round())]
    trial = Trial.of("tuning", clean=80, each=40)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * steps, pct_start=0.2)
    best, weights = -1.0, model.state_dict()
    bar = tqdm(total=epochs * steps, desc=f"seed {seed}", unit="batch")
    for _ in range(epochs):
        model.train()
        for _ in range(steps):
            loss = _loss(model, generator, images)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            bar.update()
        reached = areas(logits_of(model.eval(), trial.crops), trial.labels)
        bar.set_postfix({name: f"{area:.3f}" for name, area in zip(CLASSES, reached, strict=True)})
        if mean(reached) > best:
            best, weights = mean(reached), {name: value.clone() for name, value in model.state_dict().items()}
    bar.close()
    model.load_state_dict(weights)
    calibrate(model, trial)
    return model


def _loss(model: EditDetector, generator: Generator, images: Sequence[Float[Tensor, "3 _ _"]]) -> Float[Tensor, ""]:
    crops, truth = training_batch(generator, images)
    inputs = inputs_of_crops(crops)
    kept = (torch.rand(len(crops), len(LAYERS), 1, 1, generator=generator) >= 0.2).float()
    inputs = {name: x * kept[:, i, None] for i, (name, x) in enumerate(inputs.items())}
    truth = truth * kept
    votes = model.votes(**inputs)
    places = F.binary_cross_entropy_with_logits(votes, rearrange(truth, "b c h w -> b (h w) c"))
    whole = F.binary_cross_entropy_with_logits(model.pooled(votes), (truth.amax((2, 3)) > 0).float())
    return places + whole


@torch.no_grad()
def calibrate(model: EditDetector, trial: Trial) -> None:
    """Move the logits so that zero is the threshold: at most `FALSE_POSITIVES` of each photo's unedited crops pass."""
    clean = trial.where(trial.labels < 0)
    logits = logits_of(model, clean.crops)
    thresholds = [
        logits[clean.photos == owner].quantile(1 - FALSE_POSITIVES, dim=0) for owner in set(clean.photos.tolist())
    ]
    *_, last = model.head.parameters()
    last.sub_(torch.stack(thresholds).amax(0))


def measure(model: EditDetector, group: str = "final", clean: int = 100, each: int = 50) -> dict[str, float]:
    """What the detector and its maps are worth on one group of photos, row by row.

    Args:
        model: In eval mode.
        group: `"tuning"`, or `"final"`, which is looked at for the published figures only.
        clean: Unedited crops of each photo.
        each: Crops of each photo with one edit, by class.
    """
    trial = Trial.of(group, clean, each, seed=1)
    logits = logits_of(model, trial.crops)
    unedited = trial.labels < 0
    rows = {f"AUC, {name}": area for name, area in zip(CLASSES, areas(logits, trial.labels), strict=True)}
    for c, name in enumerate(CLASSES):
        rows[f"detected, {name}"] = _share(logits[trial.labels == c, c] > 0)
    for c, name in enumerate(CLASSES):
        rows[f"false positives, {name}"] = _share(logits[unedited, c] > 0)
        for owner, which in enumerate(PHOTOS[group]):
            rows[f"false positives, {name}, {which}"] = _share(logits[unedited & (trial.photos == owner), c] > 0)
    edits = trial.where(~unedited)
    rows["hit, random place"] = edits.regions.float().mean().item()
    rows["hit, middle of the crop"] = _share(edits.regions[:, SIDE // 2, SIDE // 2])
    for method in (GradCAM, HiResCAM):
        for c, (name, own) in enumerate(zip(CLASSES, LAYERS, strict=True)):
            part = trial.where(trial.labels == c)
            own_map = maps_of(method(model, {own: LAYERS[own]}), part.crops, c)[own]
            rows[f"hit, {method.__name__}, {name}"] = _share(_hits(own_map, part.regions))
    evidence = HiResCAM(model, LAYERS)
    maps = maps_of(evidence, edits.crops)
    for how, compared in (("as they are", maps), ("each scaled to 0..1", Maps(normalize(maps, "each")))):
        named = compared.shares().argmax(1)
        for c, name in enumerate(CLASSES):
            rows[f"largest map names the input, {how}, {name}"] = _share((named == c)[edits.labels == c])
    for c, name in enumerate(CLASSES):
        named = maps_of(evidence, trial.crops[unedited], c).shares().argmax(1)
        rows[f"largest map names the input, unedited, {name}"] = _share(named == c)
    return rows


def maps_of(cam: CAM, crops: Float[Tensor, "n 3 128 128"], target: int | None = None) -> Maps:
    """The maps of many crops, a batch at a time."""
    parts = defaultdict(list)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an empty map is a miss, and counted as one
        for some in torch.split(crops, BATCH):
            found = cam(inputs_of_crops(some), target)
            assert isinstance(found, Maps)
            for name, map_ in found.items():
                parts[name].append(map_)
    return Maps({name: torch.cat(maps) for name, maps in parts.items()}, cam.comparable)


def _hits(maps: Float[Tensor, "b h w"], regions: Bool[Tensor, "b 128 128"]) -> Bool[Tensor, " b"]:
    """Whether a map has a peak and the peak lies in the region."""
    peak, place = maps.flatten(1).max(1)
    cell = SIDE // maps.shape[-1]
    rows, columns = (at * cell + cell // 2 for at in (place // maps.shape[-1], place % maps.shape[-1]))
    return (peak > 0) & regions[torch.arange(len(maps)), rows, columns]


def _share(true: Bool[Tensor, " n"]) -> float:
    return true.float().mean().item()


def train_and_measure(seeds: Sequence[int] = (0, 1, 2), out: Path = WEIGHTS) -> dict[str, list[float]]:
    """Train one detector a seed, save the one that is best on the tuning photos, and measure all on the final ones.

    Args:
        seeds: One detector each.
        out: The safetensors file to write.

    Returns:
        One list a row of `measure`, in the order of the seeds; `table` writes it out.
    """
    from safetensors.torch import save_file

    models = [train(seed) for seed in seeds]
    trial = Trial.of("tuning", clean=80, each=40)
    best = max(models, key=lambda model: mean(areas(logits_of(model, trial.crops), trial.labels)))
    save_file(best.state_dict(), out)
    rows: dict[str, list[float]] = defaultdict(list)
    for model in models:
        for name, value in measure(model).items():
            rows[name].append(value)
    return dict(rows)


def table(rows: dict[str, list[float]]) -> str:
    """The measurements in Markdown: mean and standard deviation over the seeds.

    Example:
        >>> print(table({"AUC, colour": [0.9, 0.94]}))
        | on the final photos, 2 seeds | mean | spread |
        | --- | --- | --- |
        | AUC, colour | 0.920 | 0.028 |
    """
    seeds = len(next(iter(rows.values())))
    lines = [f"| on the final photos, {seeds} seeds | mean | spread |", "| --- | --- | --- |"]
    for name, values in rows.items():
        lines.append(f"| {name} | {mean(values):.3f} | {stdev(values) if seeds > 1 else 0:.3f} |")
    return "\n".join(lines)
