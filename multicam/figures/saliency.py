"""Figures of attributions: what stands in each entry of an input, what is strongest in each place, and both on the input."""

from collections.abc import Collection, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from multicam.errors import MulticamError, number, unknown
from multicam.figures.colours import Colormap, signed_rgb
from multicam.figures.page import Picture
from multicam.figures.tiles import Tile, figure, line_labels, strongest_frame
from multicam.saliency.attributions import Attributions, Channels, channels_second

REDUCED = {"sum": "sum of channels", "max": "largest of channels", "norm": "norm of channels"}


def saliency_figure(
    inputs: Tensor | Mapping[str, Tensor],
    attributions: Attributions,
    *,
    channels: Channels | None = None,
    clip: float = 0.99,
    spectral: Collection[str] = (),
    quantity: str = "attribution",
    rows: Sequence[str] = (),
    title: str = "",
    colormap: Colormap | None = None,
    width: float = 7.0,
) -> Picture:
    """The four pictures of each input: the input, its attributions channel by channel, channels taken together, and these on the input.

    The second is in colours around one grey, which is zero: of three channels each has its own colour, any other
    number is summed. Where attributions are in units of the score, all inputs and samples share a scale; gradients of
    different inputs do not compare, so each picture has its own. A few entries are often so strong that all others look
    empty: the strongest hundredth is cut, see `clip`. Of a clip, the frame with the strongest attribution is shown.

    Args:
        inputs: Name to images `(b c h w)`, or clips; further ones are left out. Where there is one input, it may stand alone.
        attributions: What a function of `multicam.saliency.gradients` returns. Those of other tensors than images are left out.
        channels: How channels are taken together, see `Attributions.maps`.
        clip: The share of places that is shown without cutting; 1 cuts nothing.
        spectral: The inputs whose axes are frequencies: nothing is laid over them.
        quantity: What to call the attributions, as in "gradient".
        rows: A label for each sample.
        title: The line on top.
        colormap: See `colorize`.
        width: See `figure`.

    Raises:
        MulticamError: There are no attributions of images, a name does not exist, or numbers of samples differ.

    Example:
        >>> from multicam.demo.detector import EditDetector
        >>> from multicam.saliency.gradients import gradient
        >>> inputs = {"rgb": torch.rand(1, 3, 64, 64), "frequency": torch.rand(1, 64, 16, 16), "texture": torch.rand(1, 3, 32, 32)}
        >>> saliency_figure(inputs, gradient(EditDetector(), inputs, 0))  # doctest: +ELLIPSIS
        Picture(12 tiles, ...)
    """
    images = _images(inputs, attributions, spectral)
    if not 0 < number("clip", clip) <= 1:
        raise MulticamError(f"clip is a share above 0 and up to 1, not {clip!r}")
    maps, parts = attributions.maps(channels), {name: _parts(attributions, name) for name in images}
    samples = len(next(iter(images.values())))
    shared = [
        max(_peaks(values, clip).max().item() for values in of)
        for of in ([maps[name] for name in images], [part.abs().amax(1) for part in parts.values()])
    ]

    def line(name: str, i: int) -> list[Tile]:
        image, part, map = images[name][i], parts[name][i], maps[name][i]
        if map.ndim == 3:
            frame = strongest_frame(map)
            image, part, map = image[:, frame], part[:, frame], map[frame]
        own = (map, part.abs().amax(0))
        tops = shared if maps.comparable else [_peaks(values[None], clip).item() for values in own]
        top, limit = (value or 1.0 for value in tops)
        map = map.clamp(-top, top)
        over = Tile() if name in spectral else Tile(image, map)
        return [Tile(image), Tile(torch.from_numpy(signed_rgb(part, limit)).movedim(-1, 0)), Tile(map=map), over]

    return figure(
        [line(name, i) for i in range(samples) for name in images],
        columns=["input", quantity, REDUCED[channels or ("sum" if attributions.comparable else "max")], "on the input"],
        rows=line_labels(rows, list(images), samples),
        title=title,
        scale="shared" if maps.comparable else "each",
        quantity=quantity + (f", cut at the {100 * clip:g}th percentile" if clip < 1 else ""),
        units="units of the score" if maps.comparable else "score per unit of the input",
        colormap=colormap,
        width=width,
    )


def _images(
    inputs: Tensor | Mapping[str, Tensor], attributions: Attributions, spectral: Collection[str]
) -> dict[str, Float[Tensor, "b c *grid"]]:
    """The images that there are attributions of, if everything fits."""
    if not isinstance(attributions, Attributions):
        raise MulticamError(f"attributions are what gradient() and its kin return, not a {type(attributions).__name__}")
    if isinstance(inputs, Tensor):
        if len(attributions) > 1:
            raise MulticamError(f"give each of the inputs by name: {', '.join(map(repr, attributions))}")
        inputs = dict.fromkeys(attributions, inputs)
    names = [name for name, values in attributions.items() if values.ndim > 3]
    if not names:
        raise MulticamError(f"there is no image in {attributions!r}")
    for name in [*names, *spectral]:
        if name not in inputs:
            raise unknown("input", name, inputs)
    for name in names:
        shape = tuple(inputs[name].shape)
        if inputs[name].shape != attributions[name].shape:
            raise MulticamError(
                f"input {name!r} {shape} is not what its attributions {tuple(attributions[name].shape)} are of"
            )
        if len(shape) > 5:
            raise MulticamError(f"input {name!r} {shape} is neither an image nor a clip: leave it out")
    return {name: channels_second(inputs[name]) for name in names}


def _peaks(maps: Tensor, clip: float) -> Tensor:
    """The absolute value of each sample that a share of its places stays below; its largest, where that is zero."""
    flat = maps.detach().abs().float().flatten(1)
    found = flat.quantile(clip, dim=1)
    return found.where(found > 0, flat.amax(1))


def _parts(attributions: Attributions, name: str) -> Tensor:
    """What the second picture shows `(b c *grid)`: three channels, or their sum; as a density where there are units."""
    values = channels_second(attributions[name])
    values = values if values.shape[1] == 3 else values.sum(1, keepdim=True)
    return values if attributions.weights is None else values * (attributions.weights[name] * values[0, 0].numel())
