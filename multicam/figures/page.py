"""The sheet that a picture is drawn on: the only file that knows matplotlib."""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from multicam.errors import MulticamError, unknown

if TYPE_CHECKING:
    import matplotlib.figure

_SCREEN_DPI = 150
_HUMP = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_WIDE_FONTS = (  # for Chinese labels, in order of preference; the last one draws a box for any character
    "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "PingFang SC", "Hiragino Sans GB", "Microsoft YaHei",
    "SimHei", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Arial Unicode MS", "Droid Sans Fallback",
    "Last Resort High-Efficiency",
)  # fmt: skip


@dataclass(frozen=True, eq=False, repr=False)
class Picture:
    """A finished figure: notebooks show it, `save` writes it, and `figure` is matplotlib's for the last touches."""

    figure: "matplotlib.figure.Figure"

    def save(self, path: str | Path, dpi: int = 300) -> Path:
        """The path written to; its suffix (.png, .pdf, .svg …) says the format.

        Raises:
            MulticamError: The suffix is no format that matplotlib writes.
        """
        path = Path(path)
        formats = self.figure.canvas.get_supported_filetypes()
        if path.suffix[1:].lower() not in formats:
            raise unknown("picture format", path.suffix, [f".{name}" for name in formats])
        self._write(path, dpi)
        return path

    @property
    def rgb(self) -> UInt8[np.ndarray, "h w 3"]:
        """The pixels, as a notebook shows them."""
        from PIL import Image

        return np.asarray(Image.open(io.BytesIO(self._repr_png_())).convert("RGB"))

    def _write(self, to: Path | io.BytesIO, dpi: int) -> None:
        import matplotlib

        # Many publishers refuse the Type 3 fonts that matplotlib embeds by default; the rest keeps a user's style
        # from painting over the white page or cutting it.
        with matplotlib.rc_context(
            {"pdf.fonttype": 42, "savefig.facecolor": "auto", "savefig.transparent": False, "savefig.bbox": None}
        ):
            self.figure.savefig(to, dpi=dpi)

    def _repr_png_(self) -> bytes:
        self._write(png := io.BytesIO(), _SCREEN_DPI)
        return png.getvalue()

    def __repr__(self) -> str:
        width, height = self.figure.get_size_inches()
        tiles = sum(axes.get_label() == "tile" for axes in self.figure.axes)
        return f"Picture({tiles} tiles, {width:.1f} x {height:.1f} in)"


@dataclass(frozen=True)
class Texts:
    """Texts wrapped so that at one size, in points, each fits the width it was given."""

    texts: list[str]
    size: float
    width: float

    @property
    def height(self) -> float:
        """In inches, that of the text with the most lines."""
        lines = max((text.count("\n") + 1 for text in self.texts if text), default=0)
        return lines * self.size * 1.2 / 72

    def part(self, start: int, count: int) -> "Texts":
        """Some of them, at the size of all."""
        return replace(self, texts=self.texts[start : start + count])


def blank(
    size: tuple[float, float] | None = None, layout: Literal["none", "constrained"] = "none"
) -> "matplotlib.figure.Figure":
    """An empty white page.

    Args:
        size: Its width and height in inches; None: not known yet.
        layout: Whether matplotlib moves what is drawn, so that its labels fit on the page.

    Raises:
        MulticamError: If matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MulticamError('figures need matplotlib: pip install "multicam-torch[plot]"') from error
    page = Figure(size, dpi=_SCREEN_DPI, facecolor="white")
    page.set_layout_engine(layout)
    FigureCanvasAgg(page)  # the page keeps it, and measures its texts with it
    return page


class Sheet:
    """A page measured in inches from its top left corner."""

    def __init__(self) -> None:
        self.page = blank()

    def fit(self, texts: Sequence[str], widths: Sequence[float] | np.ndarray, size: float) -> Texts:
        """The texts wrapped at spaces, and the size up to `size` at which all keep to their widths."""

        def measure(line: str) -> float:
            artist = self.page.text(0, 0, line, size=size, family=_families(line))
            length = artist.get_window_extent().width / self.page.dpi
            artist.remove()
            return length

        wrapped = [_wrap(text, width, measure) for text, width in zip(texts, widths, strict=True)]
        lengths = [max(map(measure, text.split("\n"))) for text in wrapped]
        shrink = min((width / max(length, width) for length, width in zip(lengths, widths, strict=True)), default=1.0)
        return Texts(wrapped, size * shrink, max(lengths, default=0.0) * shrink)

    def write(
        self,
        texts: Texts,
        xs: Sequence[float] | np.ndarray,
        y: float,
        ha: str = "center",
        va: str = "top",
        color: str = "black",
    ) -> None:
        """Put each text at its x, all at one y, in inches from the upper left corner."""
        width, height = self.page.get_size_inches()
        for text, x in zip(texts.texts, xs, strict=False):
            place = x / width, 1 - y / height
            self.page.text(*place, text, size=texts.size, family=_families(text), ha=ha, va=va, color=color)

    def show(
        self,
        rgb: UInt8[np.ndarray, "h w 3"],
        box: tuple[float, float, float, float],
        label: str,
        span: tuple[float, float] = (0.0, 1.0),
        region: Tensor | None = None,
    ) -> None:
        """Put a picture into a box `(x, y, width, height)` in inches from the upper left corner, and a region's outline on it."""
        width, height = self.page.get_size_inches()
        x, y, w, h = box
        place = x / width, 1 - (y + h) / height, w / width, h / height
        axes = self.page.add_axes(place, label=label, facecolor="white")
        axes.imshow(rgb, extent=(*span, 1, 0), aspect="auto", interpolation="auto")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(linewidth=0.4, color="0.55")
        if region is not None and region.any():
            # A rim of False closes the contour of a region that touches the border.
            mask = np.pad(region.cpu().numpy().astype(np.float32), 1)
            ys, xs = ((np.arange(n) - 0.5) / (n - 2) for n in mask.shape)
            for color, line in (("black", 1.4), ("white", 0.7)):
                axes.contour(xs, ys, mask, levels=[0.5], colors=color, linewidths=line)
            axes.set(xlim=span, ylim=(1, 0))  # the rim of a coarse region lies outside, and contours make room for it


def _wrap(text: str, width: float, measure: Callable[[str], float]) -> str:
    """The text with a line break wherever the next word would pass the width, also inside a long NameOfAClass."""
    lines = []
    for paragraph in text.split("\n"):
        lines.append("")
        for word in paragraph.split(" "):
            humps = [word] if "$" in word or measure(word) <= width else _HUMP.split(word)
            for gap, part in zip([" ", *[""] * len(humps)], humps, strict=False):
                longer = lines[-1] + gap + part if lines[-1] else part
                if not lines[-1] or measure(longer) <= width:
                    lines[-1] = longer
                else:
                    lines.append(part)
    return "\n".join(lines)


def _families(text: str) -> list[str]:
    """The user's fonts, and for characters they may lack the first installed font that has them."""
    import matplotlib
    from matplotlib import font_manager

    families = list(matplotlib.rcParams["font.family"])
    if not text.isascii():
        installed = {font.name for font in font_manager.fontManager.ttflist}
        families += [name for name in _WIDE_FONTS if name in installed][:1]
    return families
