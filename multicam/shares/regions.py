"""Which part of which input mattered: inputs cut into regions, whose shares of the score add up like those of inputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Real
from torch import Tensor, nn

from multicam.call.baselines import Baseline
from multicam.call.inputs import Inputs
from multicam.call.scorer import OutputLike, TargetLike
from multicam.errors import MulticamError, at_least_one, number, unknown
from multicam.maps import Maps
from multicam.printing import percent, progress
from multicam.shares.game import Game, Scored
from multicam.shares.shapley import Contribution, solved
from multicam.watch.trace import Trace
from multicam.watch.undisturbed import unwrapped

Cut = int | Sequence[int] | Tensor


@dataclass(frozen=True, eq=False, repr=False)
class RegionContribution:
    """How much of each sample's score is due to each region of each input.

    Attributes:
        contribution: The regions as players, called `"rgb[0]"`, `"rgb[1]"` …; what a sample does not have has a share of zero.
        labels: By input, the number of the region that each place belongs to; -1 for places of none, which always stay.
    """

    contribution: Contribution
    labels: dict[str, Int[Tensor, "b *places"]]

    @property
    def maps(self) -> Maps:
        """The Shapley shares as maps: densities in units of the score, signed, whose means are the `evidence`.

        Example:
            >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 1, bias=False))
            >>> x = torch.rand(2, 1, 4, 4)
            >>> found = region_contribution(model, x, 0, regions=2)
            >>> torch.allclose(found.maps["input"].mean((1, 2)), model(x)[:, 0], atol=1e-5)
            True
        """
        maps = {}
        for name, labels in self.labels.items():
            shares = self._of(name).to(labels.device)
            sizes = torch.stack([(labels == i).flatten(1).sum(1) for i in range(shares.shape[1])], 1)
            density = shares / sizes.clamp(min=1) * labels[0].numel()
            flat = density.gather(1, labels.flatten(1).clamp(min=0)).where(labels.flatten(1) >= 0, 0)
            maps[name] = flat.view(labels.shape)
        return Maps(maps)

    @property
    def evidence(self) -> dict[str, Float[Tensor, " b"]]:
        """The shares of all regions of an input, by input."""
        return {name: self._of(name).sum(1) for name in self.labels}

    @property
    def shares(self) -> Float[Tensor, "b inputs"]:
        """What all regions of an input bring together as a part of the sizes of all inputs, with its sign: the captions of the `maps`.

        Example:
            >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 1, bias=False))
            >>> region_contribution(model, torch.rand(2, 1, 4, 4), 0, regions=2).shares.abs()
            tensor([[1.],
                    [1.]])
        """
        return self.maps.shares()

    def interaction(self, name: str, region: int) -> Maps:
        """With which regions of all inputs one works together: the interactions as maps, densities in units of the score.

        Above zero they need each other (synergy), below they say the same (redundancy); the region itself is zero.

        Args:
            name: Its input.
            region: Its number there.

        Raises:
            MulticamError: If there is no such region, or interactions were not computed, as with permutations.
        """
        if self.contribution.interactions is None:
            raise MulticamError(
                "random orders give no interactions: take fewer regions, up to 12 in all, or a budget of coalitions"
            )
        called = f"{name}[{region}]"
        if called not in self.contribution.players:
            raise unknown("region", called, self.contribution.players)
        row = self.contribution.interactions[:, self.contribution.players.index(called)]
        rest = {field: getattr(self.contribution, field) for field in ("single", "without", "scores", "nothing")}
        return RegionContribution(Contribution(self.contribution.players, row, **rest), self.labels).maps

    def _of(self, name: str) -> Float[Tensor, "b k"]:
        return self.contribution.shapley[:, [i for i, (of, _) in enumerate(_players(self.labels)) if of == name]]

    def __repr__(self) -> str:
        parts = zip(self.evidence.items(), self.shares.mean(0).tolist(), strict=True)
        several = len(self.labels) > 1
        shown = ", ".join(
            f"{name}: {each.mean():.4g}" + f" ({percent(share)})" * several for (name, each), share in parts
        )
        return f"RegionContribution({len(self.contribution.players)} regions; mean evidence {shown})"


def region_contribution(
    model: nn.Module,
    inputs: Any,
    target: TargetLike = None,
    *,
    regions: Cut | Mapping[str, Cut] = 4,
    baseline: Baseline | Mapping[str, Baseline | None] = 0.0,
    references: Any = None,
    output: OutputLike = None,
    permutations: int = 100,
    budget: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> RegionContribution:
    """How much of the score is due to each region of each input: Shapley shares of the regions of all inputs together.

    The formula is that of `contribution`. Up to 12 regions in all every coalition is tried; above, 100 permutations and their
    reversals of `k` regions take 200 k changed versions of each sample, or as many as `budget` says.

    Args:
        model, inputs, target: As for `contribution`.
        regions: How an input is cut along its last two axes (a signal's last one): into a grid of n x n, or of (rows, columns);
            or the number of each place's region as a tensor of integers `(h w)` or `(b h w)`, such as `superpixels` gives, -1 for
            places that always stay. For every image input, or by name: then inputs without an entry stay as they are, and
            signals `(b c l)`, rows of numbers and token ids `(b l)` can be cut too.
        baseline, references, output, permutations, budget: As for `contribution`.
        batch_size: How many changed versions run in one pass. It bounds the memory and does not change the result.
        seed: As for `contribution`.

    Raises:
        MulticamError: As for `contribution`; or regions do not fit their input.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 1, bias=False))
        >>> found = region_contribution(model, torch.rand(2, 1, 4, 4), 0, regions={"input": (2, 1)})
        >>> found.contribution.players, found.maps["input"].shape
        (('input[0]', 'input[1]'), torch.Size([2, 4, 4]))
    """
    call = Inputs.of(inputs).bind(unwrapped(model)).own()
    cuts = regions if isinstance(regions, Mapping) else dict.fromkeys(call.images, regions)
    if not cuts:
        raise MulticamError(
            f"there is no image input to cut in {call!r}; name other inputs, as in regions={{'audio': 8}}"
        )
    labels = {}
    for short, cut in cuts.items():
        name, places = placed(call, short)
        labels[name] = _labels(name, call.leaves[name], places, cut)
    whole = Game(model, call, list(labels), target, output=output, baseline=baseline, references=references)
    for name in labels:
        if name not in whole.references:
            raise MulticamError(f"a region of input {name!r} cannot become None: give it a baseline that shows nothing")
    game = RegionGame(model, call, labels, whole, target, output, batch_size)
    return RegionContribution(solved(game, permutations, budget, seed), labels)


def superpixels(images: Real[Tensor, "b c h w"], count: int = 50, *, compactness: float = 10.0) -> Int[Tensor, "b h w"]:
    """The number of the superpixel that each pixel belongs to: regions that follow the edges of the image.

    SLIC, Achanta et al. 2012, as scikit-image computes it, on images scaled to 0 … 1 (colours are not converted to Lab).

    Args:
        images: Any number of channels.
        count: About how many superpixels an image has.
        compactness: How much nearness counts against likeness: high values make squares.

    Raises:
        MulticamError: If scikit-image is missing, or the images, `count` or `compactness` are none.

    Example:
        >>> superpixels(torch.rand(2, 3, 32, 32), 9).shape
        torch.Size([2, 32, 32])
    """
    try:
        from skimage.segmentation import slic
    except ImportError as error:
        raise MulticamError("superpixels need scikit-image: pip install scikit-image") from error
    if images.ndim != 4 or not len(images):
        raise MulticamError(f"superpixels are of images (b c h w), not of {tuple(images.shape)}")
    if not torch.isfinite(images).all():
        raise MulticamError("superpixels need finite numbers, and the images hold others")
    if number("compactness", compactness) <= 0:
        raise MulticamError(f"compactness is above zero, not {compactness}")
    lowest, highest = images.detach().float().amin((1, 2, 3), True), images.detach().float().amax((1, 2, 3), True)
    scaled = (images.detach().float() - lowest) / (highest - lowest).where(highest > lowest, 1)
    found = [
        slic(
            image.permute(1, 2, 0).double().cpu().numpy(),
            at_least_one("count", count),
            compactness / 100,
            start_label=0,
            convert2lab=False,
            channel_axis=-1,
        )
        for image in scaled
    ]
    return torch.stack([torch.from_numpy(each) for each in found]).long().to(images.device)


class RegionGame(Scored):
    """The scores of every sample when some regions of its inputs are there, and the others show their baselines.

    Args:
        model: As for `region_contribution`.
        call: The call, bound to the model.
        labels: As of a `RegionContribution`.
        whole: The game of the whole inputs, which knows their baselines and which of them the score depends on.
        target: As for the call of a `CAM`.
        output: As for `CAM`.
        batch_size: How many changed versions run in one pass.
    """

    def __init__(
        self,
        model: nn.Module,
        call: Inputs,
        labels: Mapping[str, Int[Tensor, "b *places"]],
        whole: Game,
        target: TargetLike,
        output: OutputLike,
        batch_size: int,
    ) -> None:
        self._labels, self._references = labels, whole.references
        self._how = replace(whole.how, part="regions of ")
        self._trace = Trace(model, call, {}, target, output)
        self._batch_size = at_least_one("batch_size", batch_size)
        self.batch = call.batch
        self.players = {f"{name}[{region}]": (name, region) for name, region in _players(labels)}
        known = dict(zip(labels, whole.used, strict=True))
        self.used = [known[name] and bool((labels[name] == region).any()) for name, region in self.players.values()]

    def __call__(self, coalitions: Bool[Tensor, "n k"], samples: Sequence[int] | None = None) -> Float[Tensor, "b n"]:
        """The scores with these regions, see `multicam.shares.game.Scored`."""
        samples = range(self.batch) if samples is None else samples
        parts = torch.split(coalitions, self._batch_size)
        work = [(sample, part) for sample, part in product(samples, parts)]
        found = [self._scores(part, sample) for sample, part in progress(work, len(work), "regions")]
        return torch.cat(found).cpu().view(len(samples), len(coalitions))

    def _scores(self, coalitions: Bool[Tensor, "n k"], sample: int) -> Float[Tensor, " n"]:
        each = next(iter(self._references.values())).shape[1]
        total = torch.zeros(len(coalitions))
        for reference in range(each):
            rows = {}
            for name, labels in self._labels.items():
                mine = [i for i, (of, _) in enumerate(self.players.values()) if of == name]
                there = torch.cat(
                    [coalitions[:, mine], torch.ones(len(coalitions), 1, dtype=torch.bool)], 1
                )  # -1 stays
                keep = there.to(labels.device)[:, labels[sample]]
                image, others = self._trace.inputs.leaves[name][sample], self._references[name]
                other = others[sample if len(others) > 1 else 0, reference]
                between = [1] * (image.ndim - labels[sample].ndim)
                rows[name] = torch.where(keep.view(len(keep), *between, *keep.shape[1:]), image, other)
            total += self._trace.rescore(rows, sample, self._how).cpu()
        return total / each


def _players(labels: Mapping[str, Tensor]) -> list[tuple[str, int]]:
    """The input and the number of each region."""
    return [(name, region) for name, each in labels.items() for region in range(int(each.max()) + 1)]


def placed(call: Inputs, short: str) -> tuple[str, tuple[int, ...]]:
    """The full name of an input, and its size along the axes that regions lie in: its last two, a signal's last one.

    Raises:
        MulticamError: If it has none for each sample.
    """
    name = call.name(short)
    having = {other: leaf for other, leaf in call.batched.items() if leaf.ndim > 1}
    if name not in having:
        raise unknown("input with places for each sample", name, having)
    shape = having[name].shape
    return name, tuple(shape[-2:] if len(shape) > 3 else shape[-1:])


def _labels(name: str, leaf: Tensor, places: tuple[int, ...], cut: Cut) -> Int[Tensor, "b *places"]:
    if isinstance(cut, Tensor):
        if cut.is_floating_point() or tuple(cut.shape) not in (places, (len(leaf), *places)):
            raise MulticamError(
                f"the regions {cut.dtype} {tuple(cut.shape)} of input {name!r} {tuple(leaf.shape)} must be numbers of regions "
                f"{places} or {(len(leaf), *places)}"
            )
        if cut.dtype == torch.bool or int(cut.min()) < -1 or int(cut.max()) < 0:
            raise MulticamError(f"the regions of input {name!r} are counted from 0, and -1 is of none")
        return cut.long().clone().expand(len(leaf), *places).to(leaf.device)
    counts = list(cut) if isinstance(cut, Sequence) else [cut] * len(places)
    if len(counts) != len(places) or not all(
        isinstance(n, int) and 1 <= n <= side for n, side in zip(counts, places, strict=True)
    ):
        raise MulticamError(f"input {name!r} {tuple(leaf.shape)} cannot be cut into a grid of {cut!r} along {places}")
    grid = torch.zeros((), dtype=torch.long, device=leaf.device)
    for n, side in zip(counts, places, strict=True):
        grid = grid[..., None] * n + torch.arange(side, device=leaf.device) * n // side
    return grid.expand(len(leaf), *places)
