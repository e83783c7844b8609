"""What a picture shows, read back from it; and pictures that were approved."""

import os
from pathlib import Path

import matplotlib.axes
import matplotlib.contour
import numpy as np
import torch
from PIL import Image

from multicam.figures.colours import to_rgb
from multicam.figures.page import Picture

GOLDEN = Path(__file__).parents[1] / "figures" / "golden"


def golden(name: str, pixels: np.ndarray, tolerance: float) -> None:
    """Compare with tests/figures/golden/<name>.png; MULTICAM_OVERWRITE_GOLDEN=1 writes it."""
    path = GOLDEN / f"{name}.png"
    if os.environ.get("MULTICAM_OVERWRITE_GOLDEN"):
        GOLDEN.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path, optimize=True)
    expected = np.asarray(Image.open(path).convert("RGB"))
    assert pixels.shape == expected.shape
    assert np.abs(pixels.astype(int) - expected).mean() <= tolerance


def axes(picture: Picture, label: str) -> list[matplotlib.axes.Axes]:
    """The parts of a picture with one label: `tile` or `bar`."""
    return [a for a in picture.figure.axes if a.get_label() == label]


def pixels(picture: Picture) -> list[np.ndarray]:
    """The pixels of each tile."""
    return [np.asarray(a.images[0].get_array()) for a in axes(picture, "tile")]


def texts(picture: Picture) -> list[str]:
    """All texts, as they are wrapped."""
    return [text.get_text() for text in picture.figure.texts if text.get_text()]


def said(picture: Picture) -> list[str]:
    """All texts, each in one line."""
    return [" ".join(text.replace("\N{NO-BREAK SPACE}", " ").split()) for text in texts(picture)]


def limits(picture: Picture) -> list[tuple[float, float]]:
    """The values at the ends of each colour bar."""
    return [tuple(map(float, a.get_xlim())) for a in axes(picture, "bar")]


def contoured(picture: Picture) -> list[bool]:
    """Whether each tile has an outline."""
    sets = matplotlib.contour.QuadContourSet
    return [any(isinstance(c, sets) for c in a.get_children()) for a in axes(picture, "tile")]


def grey(image: torch.Tensor) -> torch.Tensor:
    """An image as a map is laid on it."""
    return torch.from_numpy(to_rgb(image).mean(-1).round().astype(np.uint8))[None]
