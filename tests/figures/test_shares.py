"""Bars are means, whiskers are how sure they are, and dots are samples."""

import matplotlib.axes
import numpy as np
import pytest
import torch
from torch import Tensor

from multicam.figures.page import Picture
from multicam.figures.shares import contribution_figure
from multicam.shares.shapley import Contribution

SHAPLEY = torch.tensor([[1.0, -2.0, 0.0], [3.0, -1.0, 0.5], [2.0, -3.0, 0.1]])


def contribution(shapley: Tensor, error: Tensor | None = None) -> Contribution:
    return Contribution(("rgb", "depth", "words"), shapley, *[shapley] * 2, *[shapley.sum(1)] * 2, error=error)


def axes(picture: Picture) -> matplotlib.axes.Axes:
    (found,) = picture.figure.axes
    return found


def whiskers(picture: Picture) -> np.ndarray:
    """Where the line of each player begins and ends."""
    (lines,) = [c for c in axes(picture).collections if hasattr(c, "get_segments")]
    return np.array([[start[0], end[0]] for start, end in lines.get_segments()])


def test_bars_are_means_with_their_intervals() -> None:
    found = contribution(SHAPLEY)
    picture, summary = contribution_figure(found, title="Shares"), found.summary()
    bars = [bar.get_width() for bar in axes(picture).patches]
    assert bars == pytest.approx([2.0, -2.0, 0.2])
    colours = [bar.get_facecolor() for bar in axes(picture).patches]
    assert colours[0] == colours[2] != colours[1]  # for the score, against it
    assert np.allclose(whiskers(picture), torch.stack([summary.low, summary.high], 1), atol=1e-6)
    labels = [text.get_text() for text in axes(picture).get_yticklabels()]
    assert labels == [f"{name}  {share:.0%}" for name, share in zip(found.players, summary.share, strict=True)]
    assert axes(picture).yaxis_inverted()  # the first player on top
    assert axes(picture).get_title() == "Shares" and "95 % interval" in axes(picture).get_xlabel()


def test_every_sample_is_a_dot_in_its_players_row() -> None:
    picture = contribution_figure(contribution(SHAPLEY))
    dots = [line for line in axes(picture).lines if line.get_marker() == "o"]
    assert len(dots) == 3
    for row, line in enumerate(dots):
        assert np.allclose(line.get_xdata(), SHAPLEY[:, row])
        assert np.abs(np.array(line.get_ydata()) - row).max() <= 0.25
    again = contribution_figure(contribution(SHAPLEY))
    assert np.array_equal(picture.rgb, again.rgb)


@pytest.mark.parametrize("error", [None, torch.tensor([[0.5, 0.25, 0.0]])], ids=["exact", "sampled"])
def test_of_one_sample_the_line_is_the_standard_error(error: Tensor | None) -> None:
    picture = contribution_figure(contribution(SHAPLEY[:1], error))
    assert not [line for line in axes(picture).lines if line.get_marker() == "o"]
    half = torch.zeros(3) if error is None else error[0]
    assert np.allclose(whiskers(picture), torch.stack([SHAPLEY[0] - half, SHAPLEY[0] + half], 1))
    assert axes(picture).get_xlabel() == "Shapley share, units of the score"
