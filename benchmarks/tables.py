"""Costs and goals as Markdown."""

from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.meter import MIB, Cost, Goal, Part


def side_by_side(costs: Mapping[str, Cost], work: str) -> str:
    """A row for each side; the first is the unit."""
    unit = next(iter(costs.values()))
    rows = []
    for name, cost in costs.items():
        low, high = np.percentile(cost.times, [25, 75])
        times = [f"{cost.median:.3f}", f"{low:.3f} to {high:.3f}", ratio(cost.median, unit.median)]
        rows.append([name, *times, mib(cost.memory), ratio(cost.memory, unit.memory)])
    return table([work, "median s", "quartiles", "x forward", "peak extra MiB", "x forward"], rows)


def growth(groups: Mapping[str, Mapping[str, Cost]], work: str) -> str:
    """A row for each group of a bare forward, multicam, and a peer if there is one."""
    rows = []
    for name, costs in groups.items():
        unit, ours, *peers = costs.values()
        (peer_name,) = list(costs)[2:] or [""]
        peer = peers[0] if peers else Cost([], None)
        row = [name, f"{unit.median:.3f}", ratio(ours.median, unit.median), mib(ours.memory)]
        row += [ratio(ours.memory, unit.memory), peer_name]
        row += [ratio(peer.median, unit.median), ratio(peer.memory, unit.memory)] if peers else ["", ""]
        row += [ratio(peer.median, ours.median) if peers else ""]
        rows.append(row)
    ours_columns = ["multicam, x forward", "extra MiB", "memory, x forward"]
    peer_columns = ["peer", "x forward", "memory, x forward", "peer's time / multicam's"]
    return table([work, "forward s", *ours_columns, *peer_columns], rows)


def goals_met(goals: Sequence[Goal]) -> str:
    """A row for each goal: the number, the limit, and whether it is kept."""
    return table(
        ["goal", "measured", "limit", ""],
        [
            [
                goal.work,
                f"{goal.value:.3g}",
                f"{'at least' if goal.least else 'at most'} {goal.limit:g}",
                "reached" if goal.reached else "**missed**",
            ]
            for goal in goals
        ],
    )


def section(part: Part) -> str:
    """A part of the report."""
    return "\n\n".join([f"### {part.title}", part.text, *part.tables])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text, and whose others are numbers."""
    rule = ["---", *["--:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def ratio(value: float | None, unit: float | None) -> str:
    """How many times the unit, or a dash where it was not measured."""
    return "-" if value is None or unit is None else f"{value / unit:.2f}"


def mib(memory: int | None) -> str:
    """Bytes as MiB, or a dash where they were not measured."""
    return "-" if memory is None else f"{memory / MIB:.1f}"
