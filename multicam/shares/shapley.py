"""How much each input mattered: exact Shapley shares of the score, and what inputs did together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import factorial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from multicam.call.baselines import Baseline
from multicam.call.scorer import OutputLike, TargetLike
from multicam.chance import mean_interval
from multicam.errors import MulticamError, at_least_one
from multicam.maps import shares
from multicam.printing import aligned, percent, progress
from multicam.shares.game import Game, Players, Scored

EXACT = 12  # players up to which all coalitions are tried


@dataclass(frozen=True, eq=False, repr=False)
class Contribution:
    """How much of each sample's score is due to each player.

    Attributes:
        players: Their names.
        shapley: The Shapley share `(b k)`, in units of the score: they add up to `scores - nothing`.
        single: What each brings alone `(b k)`: the score with it only, less that with nothing.
        without: What each takes away `(b k)`: the score, less that without it.
        scores: The scores `(b)`.
        nothing: The scores with no player, all at their baselines `(b)`.
        interactions: What two bring together beyond what they bring apart `(b k k)`: above zero they need each other
            (synergy), below zero they say the same (redundancy); the diagonal is zero. None where shares are sampled.
        error: The standard error of each share `(b k)` where they are sampled; None where they are exact.
    """

    players: tuple[str, ...]
    shapley: Float[Tensor, "b k"]
    single: Float[Tensor, "b k"]
    without: Float[Tensor, "b k"]
    scores: Float[Tensor, " b"]
    nothing: Float[Tensor, " b"]
    interactions: Float[Tensor, "b k k"] | None = None
    error: Float[Tensor, "b k"] | None = None

    @property
    def shares(self) -> Float[Tensor, "b k"]:
        """What each player brings as a part of the sizes of all, with its sign; zero where none of them mattered. See `multicam.maps.shares`.

        Example:
            >>> zero = torch.zeros(1, 2)
            >>> Contribution(("a", "b"), torch.tensor([[3.0, -1.0]]), zero, zero, zero[:, 0], zero[:, 0]).shares
            tensor([[ 0.7500, -0.2500]])
        """
        return shares(self.shapley)

    @classmethod
    def join(cls, parts: Sequence["Contribution"]) -> "Contribution":
        """The contributions of all samples of several batches.

        Raises:
            MulticamError: If there are none, or they are of different players.
        """
        if not parts or len({part.players for part in parts}) > 1:
            raise MulticamError(
                f"contributions of the same players can be joined, not {[part.players for part in parts]}"
            )

        def joined(name: str) -> Tensor | None:
            values = [getattr(part, name) for part in parts]
            return None if any(value is None for value in values) else torch.cat(values)

        fields = ("shapley", "single", "without", "scores", "nothing", "interactions", "error")
        return cls(parts[0].players, **{name: joined(name) for name in fields})  # type: ignore[arg-type]

    def summary(self, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> "Summary":
        """The mean share of each player over the samples, its spread, and how sure the mean is.

        Args:
            confidence: Of the interval, which is a percentile bootstrap over the samples.
            resamples: Of the bootstrap.
            seed: Of the bootstrap; the global random state is not used.
        """
        b = len(self.shapley)
        low, high = mean_interval(self.shapley, confidence=confidence, resamples=resamples, seed=seed)
        spread = self.shapley.std(0) if b > 1 else torch.zeros_like(self.shapley[0])
        return Summary(self.players, b, self.shapley.mean(0), spread, low, high, self.shares.mean(0))

    def __repr__(self) -> str:
        return repr(self.summary())


@dataclass(frozen=True, eq=False, repr=False)
class Summary:
    """The Shapley shares of several samples, player by player.

    Attributes:
        players: Their names.
        samples: How many samples.
        mean: The mean share, in units of the score.
        spread: The standard deviation over the samples.
        low: The lower end of the interval of the mean.
        high: Its upper end.
        share: The mean over the samples, each counting alike, of what `Contribution.shares` says: a player's part of all, with its sign.
    """

    players: tuple[str, ...]
    samples: int
    mean: Float[Tensor, " k"]
    spread: Float[Tensor, " k"]
    low: Float[Tensor, " k"]
    high: Float[Tensor, " k"]
    share: Float[Tensor, " k"]

    def __repr__(self) -> str:
        head = ["player", "share", "mean", "spread", "interval"]
        rows = [
            [name, percent(share), f"{mean:.4g}", f"{spread:.4g}", f"{low:.4g} to {high:.4g}"]
            for name, share, mean, spread, low, high in zip(
                self.players, self.share.tolist(), self.mean, self.spread, self.low, self.high, strict=True
            )
        ]
        return f"{aligned([head, *rows])}\n{self.samples} sample{'s' * (self.samples != 1)}"


def contribution(
    model: nn.Module,
    inputs: Any,
    target: TargetLike = None,
    *,
    players: Players | None = None,
    baseline: Baseline | Mapping[str, Baseline | None] = 0.0,
    references: Any = None,
    output: OutputLike = None,
    permutations: int = 100,
    budget: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> Contribution:
    """How much of the score is due to each input: Shapley shares, which add up to the score less that of the baselines.

    `phi_i = sum_S |S|! (k - |S| - 1)! / k! (v(S + i) - v(S))` over the coalitions S of the other players, where `v(S)` is the
    score when only the inputs of S are there. Shapley 1953; Lundberg and Lee 2017, arXiv:1705.07874. Two players' interaction is
    `sum_S |S|! (k - |S| - 2)! / (k - 1)! (v(S + ij) - v(S + i) - v(S + j) + v(S))`, Grabisch and Roubens 1999.

    Up to 12 players all coalitions are tried; what depends on one player only, such as its encoder, runs twice however many
    there are. Above, shares are means over random permutations and their reversals, with standard errors; or see `budget`.

    Args:
        model: Any module; it is not changed.
        inputs: What it takes, see `Inputs.of`.
        target: As for the call of a `CAM`; a top class is that of the unchanged inputs.
        players: Names of inputs, of any kind that has a value for each sample, or groups of such, as in
            `["rgb", ["ids", "mask"]]` or `{"picture": "rgb", "text": ["ids", "mask"]}`. None: every image input, and what `baseline` names.
        baseline: What an input that is not there is replaced by: a number, `"mean"`, `"blur"`, a tensor, None (the model is
            given None), or one of these for each input by name; see `multicam.call.baselines.baselines`. Token ids need one.
        references: Inputs with any number of other samples; a score is then the mean over them in the place of the baseline.
        output: As for `CAM`.
        permutations: How many random orders, each with its reversal, where there are more than 12 players.
        budget: Instead of permutations, how many random coalitions of each sample shapiq (an extra) tries, besides those of one and of
            all but one, and fits a regression to, which gives interactions too and no error: KernelSHAP-IQ, Fumagalli et al. 2024,
            PMLR 235.
        batch_size: How many rows of the fusion run in one pass. It bounds the memory and does not change the result.
        seed: Of the permutations; the global random state is not used.

    Raises:
        MulticamError: If inputs, players, baselines, target or output do not fit the model; the message says what does.

    Example:
        >>> model = nn.Bilinear(2, 2, 1, bias=False)
        >>> inputs = {"input1": torch.rand(3, 2), "input2": torch.rand(3, 2)}
        >>> found = contribution(model, inputs, lambda output: output[:, 0], players=["input1", "input2"])
        >>> torch.allclose(found.shapley.sum(1), found.scores - found.nothing, atol=1e-6)
        True
        >>> torch.allclose(found.interactions[:, 0, 1], found.scores, atol=1e-6)  # neither brings anything alone
        True
    """
    game = Game(
        model, inputs, players, target, output=output, baseline=baseline, references=references, batch_size=batch_size
    )
    return solved(game, permutations, budget, seed)


def solved(game: Scored, permutations: int, budget: int | None, seed: int) -> Contribution:
    """The shares of a game's players: exact up to 12 that matter, sampled above.

    Args:
        game: Of inputs, or of regions.
        permutations, budget, seed: As for `contribution`.

    Raises:
        MulticamError: If players are many and `permutations` or `budget` too small, or shapiq is missing.
    """
    used = [i for i, is_used in enumerate(game.used) if is_used]
    names, k = tuple(game.players), len(game.used)
    if len(used) > EXACT:
        if budget is not None:
            return _regressed(game, names, used, at_least_one("budget", budget), seed)
        return _sampled(game, names, used, at_least_one("permutations", permutations), seed)
    coalitions = torch.zeros(2 ** len(used), k, dtype=torch.bool)
    coalitions[:, used] = torch.tensor(list(product([False, True], repeat=len(used))), dtype=torch.bool)
    values = game(coalitions).double().view(game.batch, *[2] * len(used))
    shapley, single, without = (torch.zeros(game.batch, k, dtype=torch.float64) for _ in range(3))
    interactions = torch.zeros(game.batch, k, k, dtype=torch.float64)
    nothing, scores = values.view(game.batch, -1)[:, [0, -1]].unbind(1)
    for a, i in enumerate(used):
        gains = values.select(a + 1, 1) - values.select(a + 1, 0)
        flat = gains.reshape(game.batch, -1)
        shapley[:, i], single[:, i], without[:, i] = _weighted(gains, 1), flat[:, 0], flat[:, -1]
        for c, j in enumerate(used[a + 1 :], a + 1):
            together = gains.select(c, 1) - gains.select(c, 0)  # the axis of i is gone
            interactions[:, i, j] = interactions[:, j, i] = _weighted(together, 2)
    exact = (shapley, single, without, scores, nothing, interactions)
    return Contribution(names, *(x.float() for x in exact))


def _weighted(gains: Float[Tensor, "b *others"], taken: int) -> Float[Tensor, " b"]:
    """The mean of gains over the coalitions of the others, every size counting alike; `taken` players are not among them."""
    others = gains.ndim - 1
    k = others + taken
    sizes = [sum(each) for each in product([0, 1], repeat=others)]
    # A coalition of s others has s! (k - s - taken)! / (k - taken + 1)!, the weight in `contribution`: each of the
    # k - taken + 1 sizes weighs the same in all, and so does every coalition of one size.
    weights = [factorial(s) * factorial(k - s - taken) / factorial(k - taken + 1) for s in sizes]
    return gains.reshape(len(gains), -1) @ torch.tensor(weights, dtype=gains.dtype)


def _ends(game: Scored, used: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What every way of sampling shares: each player alone and without each `(b k)`, and the scores of all and of none `(b)`."""
    k = len(game.used)
    everyone = torch.zeros(k, dtype=torch.bool)
    everyone[list(used)] = True
    alone = torch.eye(k, dtype=torch.bool) & everyone
    ends = game(torch.cat([torch.zeros(1, k, dtype=torch.bool), everyone[None], alone, everyone & ~alone])).double()
    nothing, scores = ends[:, 0], ends[:, 1]
    return ends[:, 2 : 2 + k] - nothing[:, None], scores[:, None] - ends[:, 2 + k :], scores, nothing


def _sampled(game: Scored, names: tuple[str, ...], used: Sequence[int], permutations: int, seed: int) -> Contribution:
    """Shares over random orders, each followed by its reversal."""
    generator = torch.Generator().manual_seed(seed)
    single, without, scores, nothing = _ends(game, used)
    pairs = []
    for _ in progress(range(permutations), permutations, "permutations"):
        order = [used[i] for i in torch.randperm(len(used), generator=generator, device="cpu").tolist()]
        gains = torch.zeros(game.batch, len(names), dtype=torch.float64)
        for ordered in (order, order[::-1]):
            values = game(_growing(ordered, len(names))).double()
            steps = torch.cat([nothing[:, None], values, scores[:, None]], 1).diff(dim=1)
            gains[:, ordered] += steps / 2
        pairs.append(gains)
    every = torch.stack(pairs)
    error = every.std(0) / permutations**0.5 if permutations > 1 else torch.full_like(every[0], torch.nan)
    found = (every.mean(0), single, without, scores, nothing)
    return replace(Contribution(names, *(x.float() for x in found)), error=error.float())


def _regressed(game: Scored, names: tuple[str, ...], used: Sequence[int], budget: int, seed: int) -> Contribution:
    """Shares and interactions of the weighted regression that shapiq fits to random coalitions."""
    try:
        from shapiq import KernelSHAPIQ
    except ImportError as error:
        raise MulticamError('a budget of coalitions needs shapiq: pip install "multicam-torch[shapiq]"') from error
    n, k = len(used), len(names)
    fewest = 1 + n + n * (n - 1) // 2
    if budget < fewest:
        raise MulticamError(
            f"{n} players have {fewest} shares and interactions: give a budget of at least as many, not {budget}"
        )
    ends = _ends(game, used)
    shapley = torch.zeros(game.batch, k, dtype=torch.float64)
    interactions = torch.zeros(game.batch, k, k, dtype=torch.float64)

    for sample in range(game.batch):

        def value(chosen: Any, sample: int = sample) -> Any:
            coalitions = torch.zeros(len(chosen), k, dtype=torch.bool)
            coalitions[:, list(used)] = torch.from_numpy(chosen.astype(bool))
            return game(coalitions, [sample])[0].double().numpy()

        found = KernelSHAPIQ(n, max_order=2, index="SII", pairing_trick=True, random_state=seed).approximate(
            budget, value
        )
        shapley[sample, list(used)] = torch.from_numpy(found.get_n_order_values(1))
        interactions[sample][np.ix_(used, used)] = torch.from_numpy(found.get_n_order_values(2))
    return Contribution(names, *(x.float() for x in (shapley, *ends, interactions)))


def _growing(order: Sequence[int], k: int) -> Bool[Tensor, "n k"]:
    """The coalitions of an order's first players, without the empty one and that of all."""
    rows = torch.zeros(len(order) - 1, k, dtype=torch.bool)
    for place, player in enumerate(order[:-1]):
        rows[place:, player] = True
    return rows
