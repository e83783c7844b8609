"""The score as a game: what it is when only some of the inputs are there."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from multicam.call.baselines import Baseline, baselines, references_of
from multicam.call.inputs import Inputs, as_names
from multicam.call.outputs import by_sample
from multicam.call.scorer import OutputLike, Scorer, TargetLike, select_output
from multicam.call.tree import rebuild
from multicam.errors import MulticamError, at_least_one, unknown
from multicam.printing import progress
from multicam.watch.finite import Asked, How, shown
from multicam.watch.mixing import Mixing
from multicam.watch.module_calls import alike
from multicam.watch.rows import any_reading, settled
from multicam.watch.singly import Singly
from multicam.watch.trace import Trace
from multicam.watch.undisturbed import unwrapped

OF_REFERENCES = How("at a reference", "the model is not defined there; give other references, or a baseline")
FEW = 16  # rows up to which a sample's are run one by one

Players = Sequence[str | Sequence[str]] | Mapping[str, str | Sequence[str]]


class Scored(ABC):
    """What shares are computed of: a score for every coalition of players.

    Attributes:
        players: Each player by its name.
        used: Whether the score depends on each of them.
        batch: How many samples there are.
    """

    players: Mapping[str, Any]
    used: list[bool]
    batch: int

    @abstractmethod
    def __call__(self, coalitions: Bool[Tensor, "n k"], samples: Sequence[int] | None = None) -> Float[Tensor, "b n"]:
        """The scores with these players.

        Args:
            coalitions: Which of the players are there.
            samples: Of which samples; None: of all.
        """


class Game(Scored):
    """The scores of every sample when some players are there, and the others are replaced by their baselines.

    Each encoder runs once for every sample and once for every baseline, see `multicam.watch.mixing`; a player that the score does not
    depend on is found out and never tried.

    Args:
        model: Any module.
        inputs: What it takes, see `Inputs.of`.
        players: As for `contribution`.
        target: As for the call of a `CAM`.
        output: As for `CAM`.
        baseline, references: As for `contribution`.
        batch_size: How many rows of the fusion run in one pass.

    Attributes:
        players: The inputs of each player, by its name.
        references: What each input is replaced by `(b n …)`, or `(1 n …)` if it is the same for every sample.
        used: Whether the score depends on each player.
        how: What is done to a player that is not there.

    Raises:
        MulticamError: As for `contribution`; and a call, if a score is not finite.

    Example:
        >>> model = nn.Bilinear(2, 2, 1, bias=False)
        >>> inputs = {"input1": torch.rand(3, 2), "input2": torch.rand(3, 2)}
        >>> game = Game(model, inputs, ["input1", "input2"], lambda output: output[:, 0])
        >>> both, one = game(torch.tensor([[True, True], [True, False]])).T
        >>> torch.allclose(both, model(**inputs)[:, 0]), bool((one == 0).all())
        (True, True)
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        players: Players | None = None,
        target: TargetLike = None,
        *,
        output: OutputLike = None,
        baseline: Baseline | Mapping[str, Baseline | None] = 0.0,
        references: Any = None,
        batch_size: int = 32,
    ) -> None:
        self._model = unwrapped(model)
        call = Inputs.of(inputs).bind(self._model).own()
        self._call = any_reading(settled(self._model, call, output, Scorer(target, output).target))
        self._scores_of = _Scores(Scorer(target, output))
        self.batch, self.batch_size = self._call.batch, at_least_one("batch_size", batch_size)
        if references is not None and not (isinstance(baseline, float) and baseline == 0):
            raise MulticamError("give a baseline, or references to take its place, not both")
        given = {self._call.name(name): x for name, x in baseline.items()} if isinstance(baseline, Mapping) else {}
        self.players: dict[str, list[str]] = _players(self._call, players, given, references is not None)
        self._gone = _gone(self.players, given)
        self._mixed = [i for i in range(len(self.players)) if i not in self._gone]
        self.references = self._stand_ins(given if isinstance(baseline, Mapping) else baseline, references)
        self.how = How(baseline=baseline, references=True) if references is None else OF_REFERENCES
        self._games: dict[tuple[int, ...], Mixing] = {}
        self._doubted: set[int] = set()
        few = self.batch == 1 and 2 ** len(self._mixed) * self._apart[1] <= FEW
        self._singly = few or self.batch_size == 1
        self._fix()
        used = self._mixing(()).singly.used if self._singly else self._mixing(()).used
        self.used = [i in self._gone or used[self._mixed.index(i)] for i in range(len(self.players))]

    def _fix(self) -> None:
        """Decide what the target chooses from the output for the samples themselves."""
        mixing, scores = self._mixing(()), self._scores_of
        self._singly = self._singly or mixing.output is None
        self._asked = Asked(self._model, self._call, scores.unfixed)
        if self._singly:
            self._decide()
            found = torch.stack([mixing.singly.score_of(sample) for sample in range(self.batch)])
        else:
            output = self._of_samples(mixing.output)
            scores.fix(output, self.batch)
            if self.batch > 1 and not hasattr(scores.scorer.target, "take"):
                Trace(
                    self._model, self._call, {}, scores.scorer.target, scores.scorer.output
                ).refuse_target_without_samples()
            found = scores.scorer.read(output, range(self.batch))
            self._asked = Asked(self._model, self._call, scores.scorer)
        self._asked.check(found)

    def _decide(self) -> None:
        """Have the call as it is decide what the target chooses, for samples that run alone from then on."""
        scores = self._scores_of
        if self.batch == 1 or scores.decided is not None:
            return
        trace = Trace(self._model, self._call, {}, scores.unfixed.target, scores.unfixed.output)
        trace.refuse_target_without_samples()
        scores.decided, self._before = trace.scorer, trace.scores
        self._asked = Asked(self._model, self._call, trace.scorer)

    def _doubt(self, samples: Sequence[int]) -> None:
        """Say where a sample has another score alone than in its batch."""
        self._decide()
        for sample in {*samples} - self._doubted if self.batch > 1 else ():
            self._doubted.add(sample)
            alone, before = self._mixing(()).singly.score_of(sample), self._before[sample]
            if not alike(alone[None], before[None]):
                warnings.warn(
                    f"sample {sample} has the score {alone:.6g} alone and {before:.6g} in its batch: scores of {type(self._model).__name__} depend on "
                    "what else is in the batch, and shares are those of the sample alone; explain one sample at a time",
                    stacklevel=2,
                )

    def _stand_ins(
        self, baseline: Baseline | Mapping[str, Baseline | None], references: Any
    ) -> dict[str, Shaped[Tensor, "b n ..."]]:
        """What each input of the players is replaced by: one value, or that of every reference."""
        parts = list(self.players.values())
        names = [name for i in self._mixed for name in parts[i]]
        # An input that is no player's is a sample's own, and what replaces the others must stand beside it, row by row.
        alone = not (set(self._call.batched) - set(names) or self._call.listed)
        if references is not None:
            known = references_of(self._model, self._call, references, names)
            return {name: x[None].expand(1 if alone else self.batch, *x.shape) for name, x in known.items()}
        values: Any = {name: baseline.get(name, 0.0) for name in names} if isinstance(baseline, Mapping) else baseline
        found = baselines(self._call, names, values)
        alike = alone and all(torch.equal(x, x[:1].expand_as(x)) for x in found.values())
        return {name: (x[:1] if alike else x)[:, None] for name, x in found.items()}

    def __call__(self, coalitions: Bool[Tensor, "n k"], samples: Sequence[int] | None = None) -> Float[Tensor, "b n"]:
        """The scores with these players, see `Scored`."""
        samples = range(self.batch) if samples is None else samples
        gone = [tuple(i for i in self._gone if not row[i]) for row in coalitions.tolist()]
        found = []
        for without in dict.fromkeys(gone):
            chosen = [n for n, each in enumerate(gone) if each == without]
            found.append((chosen, self._scores(without, coalitions[chosen][:, self._mixed].tolist(), samples)))
        scores = torch.empty(len(samples), len(coalitions), dtype=found[0][1].dtype)
        for chosen, part in found:
            scores[:, chosen] = part
        if not torch.isfinite(scores).all():
            raise self._refusal(scores, coalitions, samples)
        return scores

    def _refusal(
        self, scores: Float[Tensor, "b n"], coalitions: Bool[Tensor, "n k"], samples: Sequence[int]
    ) -> MulticamError:
        """What to say of scores that are not finite: of a coalition that most players are in, as it tells best what is at fault."""
        bad = ~torch.isfinite(scores)
        n = int(coalitions.sum(1).where(bad.any(0).to(coalitions.device), -1).argmax())
        row = int(bad[:, n].nonzero()[0])
        sample, there = samples[row], coalitions[n].tolist()
        away = [name for i, names in enumerate(self.players.values()) if not there[i] for name in names]
        each = next(iter(self.references.values()), torch.empty(1, 1)).shape[1]

        def values(j: int) -> dict[str, Tensor | None]:
            known = {name: x[sample if len(x) > 1 else 0, j][None] for name, x in self.references.items()}
            return {name: known.get(name) for name in away}

        of = next((j for j in range(each) if self._asked.fails(values(j), sample)), 0)
        return self._asked.refusal(shown(scores[row, n]), values(of), sample, self.how)

    def _scores(
        self, without: tuple[int, ...], coalitions: Sequence[Sequence[bool]], samples: Sequence[int]
    ) -> Float[Tensor, "b n"]:
        mixing = self._mixing(without)
        singly = mixing.singly if self._singly or not mixing.together else None
        if singly:
            self._doubt(samples)
        apart, each = self._apart
        rows = list(product(samples, coalitions, range(each)))
        starts = range(0, len(rows), self.batch_size)
        found = []
        for start in progress(starts, len(starts), "coalitions"):
            part = rows[start : start + self.batch_size]
            sources = [
                [s if there[i] else self.batch + (s * each if apart else 0) + j for s, there, j in part]
                for i in range(len(self._mixed))
            ]
            found.append((singly or mixing)(sources, [s for s, _, _ in part]))
        return torch.cat(found).cpu().view(len(samples), len(coalitions), each).mean(2)

    @property
    def _apart(self) -> tuple[bool, int]:
        """Whether each sample has references of its own, and how many there are."""
        any_of = next(iter(self.references.values()), torch.empty(1, 1))
        return len(any_of) > 1 or self.batch == 1, any_of.shape[1]

    def _of_samples(self, output: Any) -> Any:
        """What the model returned for the samples themselves, without that for what replaces them."""
        apart, each = self._apart
        rows = self.batch + (self.batch if apart else 1) * each
        if by_sample(output, rows):
            return output[: self.batch]  # detections, sample by sample
        return rebuild(
            output, lambda _, x: x[: self.batch] if isinstance(x, Tensor) and x.ndim and len(x) == rows else x
        )

    def _mixing(self, without: tuple[int, ...]) -> Mixing:
        """All samples, and behind them their references, as one call; without some players there is None instead of them."""
        if without in self._games:
            return self._games[without]
        parts = list(self.players.values())
        call = self._call.replace({name: None for i in without for name in parts[i]})
        apart, each = self._apart
        owners = [*range(self.batch), *(s for s in range(self.batch if apart else 1) for _ in range(each))]
        both = {name: torch.cat([call.leaves[name], x.flatten(0, 1)]) for name, x in self.references.items()}

        whole = call.take(owners).replace(both)
        mixed = [parts[i] for i in self._mixed]
        singly = Singly(self._model, whole, mixed, partial(self._scores_of.alone, owners), self.batch)
        together = partial(self._scores_of.together, owners)
        self._games[without] = Mixing(self._model, whole, mixed, together, self.batch, singly)
        return self._games[without]


class _Scores:
    """From outputs to the scores of the rows in them, with everything decided that the target chooses from that of the unchanged call.

    Args:
        scorer: With nothing decided.

    Attributes:
        unfixed: The scorer with nothing decided.
        scorer: What scores the samples together.
        decided: What scores each that runs alone; None: nothing is decided yet.
    """

    def __init__(self, scorer: Scorer) -> None:
        self.unfixed = self.scorer = scorer
        self.decided: Scorer | None = None
        self._alone: dict[int, Scorer] = {}

    def fix(self, output: Any, batch: int) -> None:
        """Decide by the output for all samples."""
        fixed = self.unfixed.pinned(select_output(output, self.unfixed.output))
        self.scorer = self.unfixed if fixed is self.unfixed else fixed.take(range(batch))

    def together(self, owners: Sequence[int], output: Any, rows: Sequence[int]) -> Float[Tensor, " n"]:
        """The scores of rows that ran together.

        Args:
            owners: The sample that each row of the call belongs to.
            output: What the model returned.
            rows: The rows of the call.
        """
        return self.scorer.read(output, [owners[row] for row in rows])

    def alone(self, owners: Sequence[int], output: Any, rows: Sequence[int]) -> Float[Tensor, " n"]:
        """The scores of copies of one row that ran alone; where nothing is decided, a sample's first decides what the target chooses."""
        sample = owners[rows[0]]
        if self.decided is not None:
            return self.decided.read(output, [sample] * len(rows))
        if sample not in self._alone:
            scorer = self.unfixed.take([sample] * len(rows))
            self._alone[sample] = scorer.pinned(select_output(output, scorer.output))
        return self._alone[sample].read(output, [0] * len(rows))


def _players(call: Inputs, players: Players | None, given: Mapping[str, Any], referred: bool) -> dict[str, list[str]]:
    """The full names of each player's inputs; `given` are the baselines by name, or there are references."""
    if players is None:
        players = [*call.images, *(name for name in given if name not in call.images)]
    if isinstance(players, str) or not isinstance(players, Sequence | Mapping):
        raise MulticamError(f"players are names of inputs, or groups of such, in a list or a dict, not {players!r}")
    found: dict[str, list[str]] = {}
    for label, group in players.items() if isinstance(players, Mapping) else ((_called(one), one) for one in players):
        if str(label) in found:
            raise MulticamError(f"two players are called {str(label)!r}: name an input once, and groups in a dict")
        found[str(label)] = [call.name(name) for name in as_names(group) or ()]
    several = [name for names in found.values() for name in names]
    for name in several:
        if name not in call.batched:
            raise unknown("input with a value for each sample", name, call.batched)
        if several.count(name) > 1:
            raise MulticamError(f"input {name!r} belongs to one player, once, but players={players!r}")
        leaf = call.leaves[name]
        if not (leaf.is_floating_point() or leaf.is_complex() or name in call.images or name in given or referred):
            raise MulticamError(
                f"input {name!r} is {str(leaf.dtype).removeprefix('torch.')}: say what stands for nothing in it, such as the id of a "
                f"padding token, with baseline={{{name!r}: …}}, or leave it out"
            )
    if not found or not all(found.values()):
        raise MulticamError(f"there is no input to be a player in {call!r}")
    return found


def _gone(players: Mapping[str, Sequence[str]], given: Mapping[str, Any]) -> list[int]:
    """The numbers of the players whose inputs become None; `given` are the baselines by full name.

    Raises:
        MulticamError: There is no such input, or only some inputs of a player become None.
    """
    known = [name for part in players.values() for name in part]
    for name in given:
        if name not in known:
            raise unknown("player's input", name, known)
    nothing = {name for name, value in given.items() if value is None}
    for player, part in players.items():
        some = sorted(nothing & {*part})
        if some and not nothing.issuperset(part):
            raise MulticamError(
                f"the inputs of player {player!r} become None together or not at all, but the baseline of {some[0]!r} "
                "alone is None"
            )
    return [i for i, part in enumerate(players.values()) if nothing.issuperset(part)]


def _called(one: str | Sequence[str]) -> str:
    return "+".join(as_names(one) or ())
