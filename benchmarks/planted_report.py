"""What a benchmark of planted evidence found, as Markdown."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from benchmarks.planted_data import CLASSES, INPUTS
from benchmarks.planted_methods import BASELINE, CENTRE, OURS, PEER
from benchmarks.tables import table

CHANCE = 1 / len(INPUTS)
RESAMPLES = 2000
Key = tuple[str, str]


@dataclass(frozen=True)
class Scores:
    """What one method got right, for each sample of one model.

    Attributes:
        photos: The photo that each sample is from.
        named: Whether it names the input.
        least: Whether it would by the map with the least evidence; None for methods that have no map, as below.
        hit: Whether the peak of the right input's map lies in the region.
        inside: The share of that map's evidence that lies there.
        overall: Whether the peak of the maps of all inputs lies there.
        comparable: Whether the method says that its maps of several inputs compare.
    """

    photos: Tensor
    named: Tensor
    least: Tensor | None = None
    hit: Tensor | None = None
    inside: Tensor | None = None
    overall: Tensor | None = None
    comparable: bool = True


@dataclass(frozen=True)
class Run:
    """What one model and its explanations got right.

    Attributes:
        right: Whether each held-out sample was classified right.
        scores: By whose method it is and its name.
        refused: The methods that do not explain this model, and why.
    """

    right: Tensor
    scores: dict[Key, Scores]
    refused: dict[str, str]


def cells(scores: Sequence[Scores], values: Callable[[Scores], Tensor]) -> Tensor:
    """The mean for each model and photo `(seed photo)`: samples of one photo and model are no independent ones."""
    return torch.stack([torch.stack([values(s)[s.photos == p].mean() for p in s.photos.unique()]) for s in scores])


def interval(means: Tensor, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the mean of `(seed photo)`: a bootstrap that draws models, and photos."""
    generator = Generator().manual_seed(seed)
    seeds, photos = means.shape
    rows = torch.randint(seeds, (RESAMPLES, seeds, 1), generator=generator)
    columns = torch.randint(photos, (RESAMPLES, 1, photos), generator=generator)
    low, high = means[rows, columns].mean((1, 2)).quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def report(runs: Sequence[Run], where: str) -> str:
    """The summary and the two tables.

    Args:
        runs: One for each model.
        where: What was run, in a sentence.
    """
    found = {key: [run.scores[key] for run in runs] for key in runs[0].scores}
    named = {key: cells(scores, lambda s: s.named) for key, scores in found.items() if key[1] != CENTRE}
    right = torch.stack([run.right.float().mean() for run in runs])
    accuracy = (
        f"The models classify {right.mean():.1%} of the samples right ({right.min():.1%} to {right.max():.1%}; chance "
        f"{1 / CLASSES:.0%}); all samples are explained, for their true class."
    )
    refused = [f"{name} does not explain this model and says so." for name in runs[0].refused]
    maps = {key: scores for key, scores in found.items() if scores[0].hit is not None}
    parts = [f"{where} {accuracy}", " ".join([*_summary(named, found), *refused])]
    parts += ["### Which input?", _naming(named, found), "### Where in it?", _pointing(maps, named)]
    return "\n\n".join(parts)


def _summary(named: Mapping[Key, Tensor], found: Mapping[Key, Sequence[Scores]]) -> list[str]:
    """How far the best method is ahead of the others in naming the input, and who is not better than chance."""
    best = {whose: _best(named, lambda key, whose=whose: key[0] == whose) for whose in (OURS, BASELINE, PEER)}
    best_map = _best(named, lambda key: key[0] == OURS and found[key][0].hit is not None)
    ours = named[best[OURS]]
    first = f"{_title(best[OURS])} names the input most often, for {ours.mean():.1%} of the samples"
    said = [
        f"**{first}; of the methods of multicam that give maps, {_title(best_map)} does, for {named[best_map].mean():.1%}.**"
    ]
    for whose in (BASELINE, PEER):
        other = named[best[whose]]
        for key in dict.fromkeys([best[OURS], best_map]):
            low, high = interval(named[key] - other)
            ahead = (named[key] - other).mean() * 100
            said.append(
                f"{_title(key)} is {abs(ahead):.1f} points {'ahead of' if ahead > 0 else 'behind'} the best "
                f"{'baseline' if whose == BASELINE else 'result of pytorch-grad-cam'}, {best[whose][1]} ({other.mean():.1%}; "
                f"95 % interval of the difference {low * 100:.1f} to {high * 100:.1f})."
            )
    least = {key: cells(scores, lambda s: s.least) for key, scores in found.items() if key[0] == PEER}
    key = _best(least, lambda _: True)
    low, high = interval(ours - least[key])
    said.append(
        f"Read the other way round, by the map with the least mass, the best result of pytorch-grad-cam is {key[1]} "
        f"({least[key].mean():.1%}), {(ours - least[key]).mean() * 100:.1f} points behind ({low * 100:.1f} to {high * 100:.1f})."
    )
    ends = {key: interval(means) for key, means in named.items()}
    among = [_title(key) for key, (low, high) in ends.items() if low <= CHANCE <= high]
    below = [_title(key) for key, (_, high) in ends.items() if high < CHANCE]
    said.append(f"No better and no worse than chance ({CHANCE:.1%}), by their intervals: {', '.join(among) or 'none'}.")
    said.append(f"Below chance: {', '.join(below) or 'none'}.")
    return said


def _best(named: Mapping[Key, Tensor], among: Callable[[Key], bool]) -> Key:
    return max((key for key in named if among(key)), key=lambda key: float(named[key].mean()))


def _title(key: Key) -> str:
    return f"`{key[1]}`" if key[0] == OURS else f"`{key[1]}` ({key[0]})"


def _naming(named: Mapping[Key, Tensor], found: Mapping[Key, Sequence[Scores]]) -> str:
    rows = []
    for key in sorted(named, key=lambda key: (-float(named[key].mean()), -_hits(found[key]))):
        means, scores = named[key], found[key]
        low, high = interval(means)
        says = "yes" if scores[0].comparable else "no"
        cells = [key[0], says, str(len(scores[0].named)), _spread(means.mean(1)), f"{low:.2f} to {high:.2f}"]
        rows.append([key[1], *cells, _least(scores)])
    head = [
        "method",
        "whose",
        "says that its maps compare",
        "samples a seed",
        "names the input",
        "95 % interval",
        "the least mass would",
    ]
    return table(head, rows)


def _pointing(maps: Mapping[Key, Sequence[Scores]], named: Mapping[Key, Tensor]) -> str:
    rows = []
    for key in sorted(maps, key=lambda key: (-_hits(maps[key]), -_named(named.get(key)))):
        values = [[getattr(scores, value).mean() for scores in maps[key]] for value in ("hit", "inside", "overall")]
        rows.append([key[1], key[0], *(_spread(torch.stack(means)) for means in values)])
    head = [
        "method",
        "whose",
        "peak in the region, right input",
        "energy in the region, right input",
        "peak in the region, of all inputs",
    ]
    return table(head, rows)


def _least(scores: Sequence[Scores]) -> str:
    means = [s.least.mean() for s in scores if s.least is not None]
    return _spread(torch.stack(means)) if means else "-"


def _named(means: Tensor | None) -> float:
    return 0.0 if means is None else float(means.mean())


def _hits(scores: Sequence[Scores]) -> float:
    return float(sum(s.hit.mean() for s in scores if s.hit is not None))


def _spread(values: Tensor) -> str:
    return f"{values.mean():.2f} ± {values.std(correction=0):.2f}"
