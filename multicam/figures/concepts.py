"""Concepts of a layer, drawn."""

from collections.abc import Sequence

import torch
from einops import einsum
from jaxtyping import Float, UInt8
from torch import Tensor

from multicam.errors import MulticamError
from multicam.figures.colours import to_rgb
from multicam.figures.page import Picture
from multicam.figures.tiles import Tile, figure
from multicam.inside.concepts import Concepts

# Okabe and Ito's colours: told apart by colour-blind readers too, and all of them stand out from grey.
COLOURS = (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167)
OPACITY = 0.85


def concept_figure(
    found: Concepts,
    images: Float[Tensor, "b _ h w"],
    *,
    names: Sequence[str] = (),
    classes: Sequence[str] = (),
    rows: Sequence[str] = (),
    title: str = "",
    width: float = 7.0,
) -> Picture:
    """A printable figure: each image, its strongest concept in every place, and every concept alone.

    Each concept has one colour, and its strength is the opacity, the same for all samples. Above a concept stand
    its name and the class that the head gives the highest score.

    Args:
        found: What `factorize` returned for one layer.
        images: The images that the maps lie on `(b c h w)`.
        names: What to call the concepts; empty: by number.
        classes: The names of the head's classes; empty: by number.
        rows: A label for each sample.
        title: The line on top.
        width: See `figure`.

    Raises:
        MulticamError: If images, names or classes do not fit the concepts, or there are more than seven of these.
    """
    maps = found.maps.detach().float().cpu()
    k = maps.shape[1]
    if k > len(COLOURS):
        raise MulticamError(f"a picture tells {len(COLOURS)} concepts apart by colour, not {k}: factorize into fewer")
    if maps.ndim != 4 or len(images) != len(maps) or images.shape[2:] != maps.shape[2:]:
        raise MulticamError(f"concepts {tuple(maps.shape)} do not lie on images {tuple(images.shape)}")
    if names and len(names) != k:
        raise MulticamError(f"{k} concepts, but {len(names)} names: {list(names)}")
    colours = torch.tensor(COLOURS[:k])

    def tiles(image: Tensor, strengths: Tensor) -> list[Tile]:
        grey = torch.from_numpy(to_rgb(image)).float().mean(-1, keepdim=True)
        alone = (Tile(_painted(grey, strengths[i : i + 1], colours[i : i + 1])) for i in range(k))
        return [Tile(image), Tile(_painted(grey, strengths, colours)), *alone]

    heads = [names[i] if names else f"concept {i + 1}" for i in range(k)]
    if found.scores is not None:
        heads = [f"{head}\n{_best(scores, classes)}" for head, scores in zip(heads, found.scores, strict=True)]
    return figure(
        [tiles(image, strengths) for image, strengths in zip(images, maps, strict=True)],
        columns=["input", "strongest concept", *heads],
        rows=rows,
        title=title,
        width=width,
    )


def _painted(
    grey: Float[Tensor, "h w 1"], strengths: Float[Tensor, "k h w"], colours: Tensor
) -> UInt8[Tensor, "3 h w"]:
    """The grey image under the colour of the strongest concept of each place, as opaque as that is strong."""
    # A high power is all but a choice; colours melt only where two concepts are all but equal, without a jagged rim.
    weights = strengths.clamp(0, 1).pow(16)
    weights = weights / weights.sum(0).clamp(min=1e-30)
    colour = einsum(weights, colours.float(), "k h w, k rgb -> h w rgb")
    share = OPACITY * strengths.amax(0).clamp(0, 1)[..., None]
    return (grey + share * (colour - grey)).round().byte().movedim(-1, 0)


def _best(scores: Float[Tensor, " classes"], classes: Sequence[str]) -> str:
    if classes and len(classes) != len(scores):
        raise MulticamError(f"the head has {len(scores)} classes, but {len(classes)} names were given")
    best = int(scores.argmax())
    score = f"{scores[best]:.2g}".replace("-", "\N{MINUS SIGN}")
    return f"{classes[best] if classes else f'class {best}'} {score}"
