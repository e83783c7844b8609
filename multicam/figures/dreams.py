"""Figures of dreams: the images, and how what they were made for rose."""

from math import ceil, sqrt

from jaxtyping import Float
from torch import Tensor

from multicam.figures.page import Picture, blank
from multicam.figures.tiles import Tile, figure
from multicam.inside.dream import Dream


def dream_figure(dream: Dream, *, title: str = "", width: float = 7.0, tallest: float = 1.6) -> Picture:
    """The images of a dream, each with what it is for and how far its objective rose.

    Up to three channels are shown on one scale, from the lowest to the highest of their bounds. Of more channels the mean
    is shown, each as a share of its own bounds, stretched to black and white.

    Args:
        dream: What `activation_maximization` or `deep_dream` returned.
        title: The line on top.
        width: See `figure`.
        tallest: See `figure`.

    Example:
        >>> import torch
        >>> from multicam.inside.dream import activation_maximization
        >>> model = torch.nn.Conv2d(3, 4, 3)
        >>> dream_figure(activation_maximization(model, torch.rand(1, 3, 16, 16), "", [0, 1, 2], steps=5))  # doctest: +ELLIPSIS
        Picture(3 tiles, ...)
    """
    images = _shown(dream)
    rows = zip(images, dream.labels, dream.start.tolist(), dream.objective.tolist(), strict=True)
    tiles = [Tile(image, caption=f"{label}\n{start:.3g} to {end:.3g}") for image, label, start, end in rows]
    across = ceil(sqrt(2 * len(tiles))) if len(tiles) > 4 else len(tiles)
    across = ceil(len(tiles) / ceil(len(tiles) / across))  # rows of equal length, as far as they go
    tiles += [Tile()] * (-len(tiles) % across)
    lines = [tiles[i : i + across] for i in range(0, len(tiles), across)]
    return figure(lines, title=title, width=width, tallest=tallest)


def history_figure(dream: Dream, *, title: str = "", width: float = 3.4) -> Picture:
    """The objective of each image at every step of the ascent, a line each.

    Args:
        dream, title: As for `dream_figure`.
        width: In inches.

    Example:
        >>> import torch
        >>> from multicam.inside.dream import activation_maximization
        >>> model = torch.nn.Conv2d(3, 4, 3)
        >>> history_figure(activation_maximization(model, torch.rand(1, 3, 16, 16), "", [0, 1], steps=5))  # doctest: +ELLIPSIS
        Picture(0 tiles, 3.4 x 2.2 in)
    """
    page = blank((width, 0.65 * width), layout="constrained")
    axes = page.add_subplot()
    for line, label in zip(dream.history.T.cpu().numpy(), dream.labels, strict=True):
        axes.plot(range(1, len(line) + 1), line, linewidth=0.8, label=label)
    axes.set_title(title, size=9)
    axes.set_xlabel("step", size=8)
    axes.set_ylabel("objective", size=8)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    if len(dream.labels) <= 10:
        axes.legend(fontsize=6, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return Picture(page)


def _shown(dream: Dream) -> Float[Tensor, "n _ h w"]:
    """The images within 0 … 1, with at most three channels."""
    images = dream.images.to(dream.bounds.low).cpu()
    if images.shape[1] <= 3:
        low, high = dream.bounds.low.min().cpu(), dream.bounds.high.max().cpu()
        return (images - low) / (high - low)
    mean = dream.bounds.shares(dream.images.to(dream.bounds.low)).mean(1, keepdim=True).cpu()
    low, high = mean.amin((1, 2, 3), keepdim=True), mean.amax((1, 2, 3), keepdim=True)
    return (mean - low) / (high - low).clamp(min=1e-12)
