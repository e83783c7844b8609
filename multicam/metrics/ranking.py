"""How several methods rank by several metrics, and whether one is better than another or it is noise."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from multicam.chance import mean_interval
from multicam.errors import MulticamError, unknown
from multicam.printing import aligned

Better = Literal["up", "down"] | None
ARROWS: dict[Better, str] = {"up": " ↑", "down": " ↓", None: ""}
APART = "maps of several inputs do not compare, so each is divided by its mean absolute value where places are ranked together"


@dataclass(frozen=True)
class Row:
    """What one method reaches by one metric: the mean over the samples, and the interval that it lies in; NaN without meaning."""

    method: str
    metric: str
    mean: float
    low: float
    high: float


@dataclass(frozen=True, repr=False)
class Comparison:
    """Whether one method is better than another by a metric, sample by sample.

    Attributes:
        first: The one method.
        second: The other.
        metric: The metric.
        better: Which direction is better.
        mean: The mean difference, first less second.
        low: The lower end of its interval.
        high: Its upper end.
        wins: The share of samples on which the first is better.
        samples: How many samples.
    """

    first: str
    second: str
    metric: str
    better: Literal["up", "down"]
    mean: float
    low: float
    high: float
    wins: float
    samples: int

    @property
    def sure(self) -> bool:
        """Whether the interval leaves no doubt that one of them is better; a single sample proves nothing."""
        return self.samples > 1 and not self.low <= 0 <= self.high

    def __repr__(self) -> str:
        best = self.first if (self.mean > 0) == (self.better == "up") else self.second
        verdict = f"{best} is better" if self.sure else "either may be better"
        return (
            f"{self.metric}{ARROWS[self.better]}, {self.first} less {self.second}: {self.mean:.3g} ({self.low:.3g} to "
            f"{self.high:.3g}), better on {self.wins:.0%} of {self.samples} samples; {verdict}"
        )


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
    """What several methods reach by several metrics, printed as a table.

    Attributes:
        values: By method and metric, a number for each sample `(n)`; NaN where it has no meaning.
        better: Which direction of each metric is better.
        apart: The methods whose maps of several inputs do not compare.

    Example:
        >>> values = {"a": {"energy": torch.tensor([0.5, 0.7])}, "b": {"energy": torch.tensor([0.1, 0.4])}}
        >>> found = Evaluation(values, {"energy": "up"}, frozenset())
        >>> found
                    energy ↑
        a   0.6 (0.5 to 0.7) *
        b  0.25 (0.1 to 0.4)
        2 samples, * the best
        >>> found.compare("a", "b", "energy")
        energy ↑, a less b: 0.35 (0.3 to 0.4), better on 100% of 2 samples; a is better
    """

    values: Mapping[str, Mapping[str, Float[Tensor, " n"]]]
    better: Mapping[str, Better]
    apart: frozenset[str]

    @property
    def samples(self) -> int:
        """How many samples."""
        return len(self.of(next(iter(self.values)), next(iter(self.better))))

    def of(self, method: str, metric: str) -> Float[Tensor, " n"]:
        """The numbers of all samples.

        Raises:
            MulticamError: If there is no such method or metric.
        """
        if method not in self.values:
            raise unknown("method", method, self.values)
        if metric not in self.values[method]:
            raise unknown("metric", metric, self.values[method])
        return self.values[method][metric]

    def mean(self, method: str, metric: str) -> float:
        """The mean over all samples.

        Raises:
            MulticamError: If there is no such method or metric.
        """
        return self.of(method, metric).double().mean().item()

    def table(self, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> list[Row]:
        """The means with their intervals, method by method.

        Args:
            confidence: Of the intervals, a percentile bootstrap over the samples.
            resamples: Of the bootstrap.
            seed: Of the bootstrap; the global random state is not used.
        """
        names = [(method, metric) for method in self.values for metric in self.better]
        every = torch.stack([self.of(*name).double() for name in names], 1)
        low, high = mean_interval(every, confidence=confidence, resamples=resamples, seed=seed)
        numbers = zip(names, every.mean(0).tolist(), low.tolist(), high.tolist(), strict=True)
        return [Row(*name, *each) for name, *each in numbers]

    def compare(
        self, first: str, second: str, metric: str, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
    ) -> Comparison:
        """Whether one method is better than another: their difference on the same samples, with its interval.

        Two intervals of `table` may overlap and the difference still be sure, because what is hard for one method often is for the other.

        Args:
            first: The one method.
            second: The other.
            metric: The metric.
            confidence, resamples, seed: As for `table`.

        Raises:
            MulticamError: If there is no such method or metric, or neither direction of the metric is better.
        """
        gain = self.of(first, metric).double() - self.of(second, metric).double()
        better = self.better[metric]
        if better is None:
            raise MulticamError(
                f"nothing says which direction of {metric!r} is better: make it with Metric(…, better='up')"
            )
        if gain.isnan().any():
            raise MulticamError(
                f"{metric!r} has no number for every sample of {first!r} and {second!r}: it has no meaning there"
            )
        low, high = mean_interval(gain, confidence=confidence, resamples=resamples, seed=seed)
        wins = (gain > 0 if better == "up" else gain < 0).double().mean()
        mean, ends = gain.mean().item(), (low.item(), high.item())
        return Comparison(first, second, metric, better, mean, *ends, wins.item(), len(gain))

    def markdown(self) -> str:
        """The table in Markdown, the best of each column in bold."""
        head, *rows = self._cells("**{}**")
        lines = [head, ["---"] + ["---:"] * len(self.better), *rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return "\n\n".join([table, *([f"† {APART}"] if self.apart else [])]) + "\n"

    def csv(self, path: str | Path) -> None:
        """Writes the table, a line for each method and metric.

        Args:
            path: The file.
        """
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["method", "metric", "better", "mean", "low", "high", "samples"])
            for row in self.table():
                numbers = [row.mean, row.low, row.high]
                writer.writerow([row.method, row.metric, self.better[row.metric] or "", *numbers, self.samples])

    def __repr__(self) -> str:
        lines = self._cells("{} *")
        left = max(len(name) for name, *_ in lines)
        table = [
            [name.ljust(left), *(cell if cell.endswith("*") else f"{cell}  " for cell in cells)]
            for name, *cells in lines
        ]
        notes = [f"{self.samples} sample{'s' * (self.samples != 1)}" + ", * the best" * (len(self.values) > 1)]
        return "\n".join([aligned(table, str.rjust), *notes, *([f"† {APART}"] if self.apart else [])])

    def _cells(self, best: str) -> list[list[str]]:
        """The table as text, with a head; the best of each column as `best` says."""
        rows = {(row.method, row.metric): row for row in self.table()}
        lines = [["", *(metric + ARROWS[better] for metric, better in self.better.items())]]
        lines += [[f"{method} †" if method in self.apart else method] for method in self.values]
        for metric, better in self.better.items():
            column = [rows[method, metric] for method in self.values]
            means = [row.mean for row in column if row.mean == row.mean]
            top = None
            if better and len({*means}) > 1:
                top = max(means) if better == "up" else min(means)
            for line, row in zip(lines[1:], column, strict=True):
                text = "-" if row.mean != row.mean else f"{row.mean:.3g}"
                if text != "-" and self.samples > 1:
                    text += f" ({row.low:.3g} to {row.high:.3g})"
                line.append(best.format(text) if row.mean == top else text)
        return lines
