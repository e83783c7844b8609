"""Images made by gradient ascent: what a channel, a neuron, a layer or a class of a model with several inputs responds to."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal, SupportsIndex

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Generator, Tensor, nn

from multicam.call.inputs import Inputs
from multicam.call.scorer import OutputLike, TargetLike
from multicam.errors import MulticamError, at_least_one, number, unknown
from multicam.inside.objectives import Objective
from multicam.inside.parameterizations import PARAMETERIZATIONS, Bounds, Motion, total_variation
from multicam.printing import progress
from multicam.watch.backward import gradients
from multicam.watch.finite import check_gradient
from multicam.watch.layers import LayerLike
from multicam.watch.undisturbed import undisturbed, unwrapped

COLOURS = 12  # how many flat colours a starting image is chosen from
GRAINS = (0.1, 1.0)  # the standard deviations of the pixels on top of them, before the sigmoid


@dataclass(frozen=True, eq=False, repr=False)
class Dream:
    """Images made by gradient ascent, and what they did to the model.

    Attributes:
        images: `(n c h w)` in the input's own space, within the bounds.
        objective: What was maximised, of each image.
        start: The same of the images that the ascent started from.
        history: The same at every step, of what that step saw: the images a little moved, or part of them.
        input: The name of the input.
        labels: What each image is for.
        bounds: The range of each channel of the input.
    """

    images: Float[Tensor, "n c h w"]
    objective: Float[Tensor, " n"]
    start: Float[Tensor, " n"]
    history: Float[Tensor, "steps n"]
    input: str
    labels: tuple[str, ...]
    bounds: Bounds = field(repr=False)

    def __repr__(self) -> str:
        rows = zip(self.labels, self.start.tolist(), self.objective.tolist(), strict=True)
        risen = ", ".join(f"{label}: {start:.3g} to {end:.3g}" for label, start, end in rows)
        return f"Dream({self.input} {tuple(self.images.shape)}, {risen})"


def activation_maximization(
    model: nn.Module,
    inputs: Any,
    layer: LayerLike | None = None,
    channel: SupportsIndex | Sequence[int] | None = None,
    *,
    at: Sequence[int] | None = None,
    target: TargetLike = None,
    output: OutputLike = None,
    onto: str | None = None,
    steps: int = 128,
    lr: float = 0.3,
    parameterization: Literal["fourier", "pixel"] = "fourier",
    bounds: tuple[Any, Any] | None = None,
    jitter: float = 1 / 16,
    scale: float = 0.05,
    rotate: float = 5.0,
    smoothness: float = 0.0,
    seed: int = 0,
) -> Dream:
    """The images of one input that a channel, a neuron, a layer or a class responds to most, all else of the call held.

    Erhan et al. 2009, "Visualizing Higher-Layer Features of a Deep Network", with the Fourier parameterisation and the
    random moves of Olah et al. 2017, "Feature Visualization", distill.pub. An image is `low + (high - low) * sigmoid(z)`,
    so it keeps to its bounds. It starts from noise on a flat colour: of some colours of the example, with faint and with
    strong noise, the one with the highest objective, because where every ReLU is off there is no gradient to start with. Of a layer's grid `(n c *grid)` the
    objective is the mean of one channel over the grid, that channel at one place, or the mean square of all channels.

    Args:
        model: Any module; it is not changed.
        inputs: An example of what the model takes, see `Inputs.of`. The other inputs of its first sample are held; all its
            samples tell the bounds of the optimised input and how its channels go together.
        layer: The layer. None: a target is maximised instead.
        channel: The layer's channel, or several: one image for each, made as one batch in which none sees another. None:
            all channels together, for one image.
        at: A place on the layer's grid, such as `(row, column)`. None: all of it.
        target: A class, several (one image for each), or any target; see `multicam.call.targets.scores`.
        output: Which part of the model's output the target sees.
        onto: The image input that is optimised `(b c h w)`. None: the only one.
        steps: How many steps of Adam.
        lr: The size of the first step, in standard deviations of the pixels before the sigmoid; it falls to zero linearly.
        parameterization: What is optimised, see `multicam.inside.parameterizations`.
        bounds: `(low, high)`, each a number or one for each channel. None: those of the example.
        jitter: The largest translation in a step, as a share of the side, in whole pixels; 0 for none.
        scale: The largest change of size in a step, as a share; 0 for none.
        rotate: The largest rotation in a step, in degrees; 0 for none, as is right where the axes are frequencies.
        smoothness: The weight of the total variation that is subtracted from the objective: the mean difference of
            neighbouring pixels, as a share of the bounds.
        seed: Of the starting images and the moves; the global random state is not used.

    Raises:
        MulticamError: Inputs, layer, channel, target or bounds do not fit the model, or the objective has no gradient to
            the input or is not finite; the message says what to do.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
        >>> dream = activation_maximization(model, torch.rand(1, 3, 16, 16), "0", [0, 2], steps=20)
        >>> dream.images.shape, bool((dream.objective > dream.start).all())
        (torch.Size([2, 3, 16, 16]), True)
    """
    if parameterization not in PARAMETERIZATIONS:
        raise unknown("parameterization", parameterization, PARAMETERIZATIONS)
    steps, lr, smoothness = at_least_one("steps", steps), _share("lr", lr), _share("smoothness", smoothness)
    motion = Motion(_share("jitter", jitter), _share("scale", scale), _share("rotate", rotate))
    generator = Generator().manual_seed(seed)
    inner = unwrapped(model)
    call = Inputs.of(inputs).bind(inner)  # refuses what no pass can take, before one begins
    with undisturbed(inner, graph=True, call=call, part="dream") as memory:
        objective = Objective.of(
            inner, memory, call, onto, layer=layer, channel=channel, at=at, target=target, output=output
        )
        limits = Bounds.of(bounds, objective.example)
        written = PARAMETERIZATIONS[parameterization](objective.example)
        noise = torch.randn(written.shape, generator=generator).to(objective.example)

        def shares(colours: Tensor, rows: Tensor) -> Tensor:
            return (colours + written.pixels(rows)).sigmoid()

        def rise(rows: Tensor) -> tuple[Tensor, Tensor]:
            image = shares(colours, rows)
            values = objective(motion(limits.at(image), generator))
            return values, values - smoothness * total_variation(image)

        first = list(product(_flat(limits.shares(objective.example), generator), (grain * noise for grain in GRAINS)))
        start, colours, rows = _highest(
            first, lambda *image: objective(limits.at(shares(*image))), len(objective.labels)
        )
        history, moved = _climbed(rows, rise, steps, lr)
        images = limits.at(shares(colours, rows)).detach().to(objective.dtype)
        reached = objective(images)
    _warn_if_stuck(objective.labels, moved)
    return Dream(images, reached, start, history, objective.input, objective.labels, limits)


def deep_dream(
    model: nn.Module,
    inputs: Any,
    layer: LayerLike,
    channel: SupportsIndex | None = None,
    *,
    onto: str | None = None,
    octaves: int = 4,
    octave_scale: float = 1.4,
    steps: int = 10,
    lr: float = 0.01,
    bounds: tuple[Any, Any] | None = None,
    seed: int = 0,
) -> Dream:
    """A larger version of one input, with more in it of what a layer or one of its channels responds to.

    Mordvintsev et al. 2015, "Inceptionism: Going Deeper into Neural Networks". What is found at one size, an octave, is
    enlarged and added to the enlarged original at the next. The original code starts from a shrunken picture and ends at
    the input's size. Many models take one size only, so here octaves go up from it: the picture grows, and the model sees
    tiles of the size that it takes. Each step lays them anew at random, so that they leave no seams. A step goes along the
    gradient divided by its root mean square.

    Args:
        model: As for `activation_maximization`.
        inputs: What the model takes, see `Inputs.of`. Its first sample is dreamt of, and its other inputs are held.
        layer: As for `activation_maximization`, but there must be one.
        channel: The channel whose mean is raised. None: the mean square of all.
        onto: As for `activation_maximization`.
        octaves: How many sizes, with the input's own.
        octave_scale: How much larger each is than the one before.
        steps: How many steps at each size.
        lr: The size of a step, as a share of the bounds.
        bounds: As for `activation_maximization`.
        seed: Of the places of tiles; the global random state is not used.

    Returns:
        One image. Its objective is the mean over the fewest tiles that cover it; its start that of the enlarged input.

    Raises:
        MulticamError: As for `activation_maximization`.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, 2))
        >>> dream = deep_dream(model, torch.rand(1, 3, 16, 16), "2", octaves=3, steps=2)
        >>> dream.images.shape, bool(dream.objective > dream.start)
        (torch.Size([1, 3, 31, 31]), True)
    """
    octaves, steps, lr = at_least_one("octaves", octaves), at_least_one("steps", steps), _share("lr", lr)
    if not number("octave_scale", octave_scale) >= 1:
        raise MulticamError(f"octave_scale is at least 1, not {octave_scale!r}")
    generator = Generator().manual_seed(seed)
    inner = unwrapped(model)
    call = Inputs.of(inputs).bind(inner)
    with undisturbed(inner, graph=True, call=call, part="dream") as memory:
        objective = Objective.of(inner, memory, call, onto, layer=layer, channel=channel)
        if len(objective.labels) > 1:
            raise MulticamError(f"deep_dream takes one channel, or None for all of them, not {channel!r}")
        limits = Bounds.of(bounds, objective.example)
        small = limits.shares(objective.example[:1])
        sides = (small.shape[2], small.shape[3])
        base = image = small
        history = []
        for step in progress(range(octaves * steps), octaves * steps, "deep dream"):
            if step % steps == 0:
                size = [round(side * octave_scale ** (step // steps)) for side in sides]
                detail = _resized(image - base, size)
                base = _resized(small, size).clamp(0, 1)
                image = base + detail
            y, x = (int(torch.randint(side, (), generator=generator)) for side in sides)
            value, gradient = _tiled(objective, limits, image, sides, (y, x))
            image = (image + lr * _unit(gradient)).clamp(0, 1)
            history.append(value)
        start, reached = (_tiled(objective, limits, x, sides, (0, 0))[0] for x in (base, image))
    images = limits.at(image).to(objective.dtype)
    return Dream(images, reached, start, torch.stack(history), objective.input, objective.labels, limits)


def _highest(
    images: Sequence[tuple[Tensor, Tensor]], objective: Callable[[Tensor, Tensor], Tensor], n: int
) -> tuple[Float[Tensor, " n"], Tensor, Tensor]:
    """Of images, each a flat colour and the noise on it, the one with the highest objective, for each of `n` purposes.

    Args:
        images: The colour `(c 1 1)` and the noise of each, as the parameterization writes it.
        objective: From colours and noise of `n` images to a number for each.
        n: For how many purposes an image is chosen.

    Returns:
        The objectives, the colours and the noise, which takes a gradient.
    """
    with torch.no_grad():
        tried = torch.stack([objective(colour, noise.expand(n, *noise.shape)) for colour, noise in images])
    highest, chosen = tried.max(0)
    colours, rows = (torch.stack(list(each)) for each in zip(*(images[i] for i in chosen.tolist()), strict=True))
    return highest, colours, rows.requires_grad_()


def _climbed(
    rows: Tensor, rise: Callable[[Tensor], tuple[Tensor, Tensor]], steps: int, lr: float
) -> tuple[Float[Tensor, "steps n"], Bool[Tensor, " n"]]:
    """Move the rows uphill with Adam, in place, with steps that fall to zero.

    Args:
        rows: What is optimised `(n ...)`.
        rise: From the rows to the objective of each, and to what is maximised.
        steps: How many steps.
        lr: The size of the first.

    Returns:
        The objectives at every step, and whether each row ever had a gradient.
    """
    adam = torch.optim.Adam([rows], lr, maximize=True)
    slower = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, steps)
    moved = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    history = []
    for _ in progress(range(steps), steps, "activation maximization"):
        values, maximised = rise(rows)
        gradient = _slope(maximised, rows)
        moved |= gradient.flatten(1).any(1)
        rows.grad = torch.stack([_unit(row) for row in gradient])  # the units of the objective do not matter
        adam.step()
        slower.step()
        history.append(values.detach())
    return torch.stack(history), moved


def _slope(values: Float[Tensor, " b"], rows: Tensor) -> Tensor:
    (gradient,) = gradients(values.sum(), [rows])
    return torch.zeros_like(rows) if gradient is None else check_gradient(gradient, "the optimised input")


def _tiled(
    objective: Objective,
    limits: Bounds,
    image: Float[Tensor, "1 c h w"],
    sides: tuple[int, int],
    corner: tuple[int, int],
) -> tuple[Float[Tensor, " 1"], Float[Tensor, "1 c h w"]]:
    """The mean objective of the tiles of a size that cover an image of shares and meet at a corner, and its gradient."""
    gradient, count, values = torch.zeros_like(image), torch.zeros_like(image), []
    for y, x in product(*(_places(*of) for of in zip(image.shape[2:], sides, corner, strict=True))):
        at = (..., slice(y, y + sides[0]), slice(x, x + sides[1]))
        tile = image[at].clone().requires_grad_()
        values.append(objective(limits.at(tile)))
        gradient[at] += _slope(values[-1], tile)
        count[at] += 1
    return torch.cat(values).mean(0, keepdim=True).detach(), gradient / count


def _flat(shares: Float[Tensor, "b c h w"], generator: Generator) -> Float[Tensor, "k c 1 1"]:
    """Flat images before the sigmoid: the middle of the bounds, and the colours of some of the example's pixels."""
    colours = shares.movedim(1, -1).flatten(0, 2)
    chosen = colours[torch.randint(len(colours), (COLOURS,), generator=generator).to(colours.device)]
    chosen[0] = 0.5
    return chosen.clamp(0.01, 0.99).logit()[..., None, None]


def _unit(x: Tensor) -> Tensor:
    """With a root mean square of 1; zero stays zero."""
    x = x / x.abs().amax().clamp(min=1e-30)  # the squares of small gradients are zero in float32
    return x / x.square().mean().sqrt().clamp(min=1e-30)


def _warn_if_stuck(labels: Sequence[str], moved: Tensor) -> None:
    stuck = [label for label, any_gradient in zip(labels, moved.tolist(), strict=True) if not any_gradient]
    if stuck:
        warnings.warn(
            f"the image of {', '.join(stuck)} is still noise: the gradient was zero at every step, because an activation is off "
            "wherever the ascent started; take another seed or example, or the layer before the activation",
            stacklevel=3,
        )


def _resized(image: Float[Tensor, "1 c h w"], size: list[int]) -> Float[Tensor, "1 c _ _"]:
    return F.interpolate(image, size, mode="bicubic", align_corners=False)


def _places(size: int, tile: int, corner: int) -> list[int]:
    """Where tiles start that cover a side and meet at a corner; those at the ends are moved inward."""
    return sorted({min(max(place, 0), size - tile) for place in range(corner - tile, size, tile)})


def _share(name: str, value: float) -> float:
    if not number(name, value) >= 0:
        raise MulticamError(f"{name} is at least 0, not {value!r}")
    return value
