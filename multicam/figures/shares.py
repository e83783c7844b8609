"""Figures of how much each input mattered."""

import torch

from multicam.figures.page import Picture, blank
from multicam.printing import percent
from multicam.shares.shapley import Contribution


def contribution_figure(found: Contribution, *, title: str = "", width: float = 5.0) -> Picture:
    """A row for each player: a dot for every sample's Shapley share in units of the score, and the mean with its interval as a bar.

    Beside its name is its part of all, see `Contribution.shares`. Of one sample, where shares are sampled, the line is the standard error.

    Args:
        found: What `contribution` returned.
        title: The line on top.
        width: In inches.

    Raises:
        MulticamError: If matplotlib is missing.

    Example:
        >>> from torch import nn
        >>> from multicam.shares.shapley import contribution
        >>> inputs = {"input1": torch.rand(5, 2), "input2": torch.rand(5, 2)}
        >>> found = contribution(nn.Bilinear(2, 2, 1), inputs, lambda output: output[:, 0], players=["input1", "input2"])
        >>> contribution_figure(found)  # doctest: +ELLIPSIS
        Picture(0 tiles, ...)
    """
    summary, rows = found.summary(), range(len(found.players))
    page = blank((width, 0.7 + 0.32 * len(rows)), layout="constrained")
    axes = page.add_subplot()
    means = summary.mean.tolist()
    axes.barh(rows, means, height=0.62, color=["#c8545a" if mean > 0 else "#4a7fc1" for mean in means])
    if summary.samples > 1:
        ends = [summary.mean - summary.low, summary.high - summary.mean]
    else:
        ends = [torch.zeros(len(rows)) if found.error is None else found.error[0]] * 2
    axes.errorbar(
        means, rows, xerr=[end.tolist() for end in ends], fmt="none", ecolor="black", elinewidth=0.9, capsize=2
    )
    generator = torch.Generator().manual_seed(0)
    for row in rows if summary.samples > 1 else ():
        shift = 0.5 * (torch.rand(summary.samples, generator=generator, device="cpu") - 0.5)
        axes.plot(
            found.shapley[:, row].tolist(),
            (row + shift).tolist(),
            "o",
            markersize=2.2,
            color="0.25",
            alpha=0.5,
            markeredgewidth=0,
        )
    labels = [f"{name}  {percent(share)}" for name, share in zip(found.players, summary.share.tolist(), strict=True)]
    axes.set_yticks(list(rows), labels, size=8)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.6)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_xlabel(
        "Shapley share, units of the score" + (", mean and its 95 % interval" if summary.samples > 1 else ""), size=8
    )
    axes.set_title(title, size=9)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return Picture(page)
