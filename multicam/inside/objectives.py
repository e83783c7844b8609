"""What is to be maximised, as a function of one image input while all else of a call is held."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import index
from typing import Any, SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor, nn

from multicam.call.inputs import Inputs
from multicam.call.scorer import OutputLike, Scorer, TargetLike, select_output
from multicam.call.targets.scores import ClassScore
from multicam.errors import MulticamError
from multicam.watch.finite import holding
from multicam.watch.layers import Layer, LayerLike, Tap, Taps
from multicam.watch.memory import Memory
from multicam.watch.reshape import as_it_is
from multicam.watch.rows import settled
from multicam.watch.survey import located_for_any_number

Read = Callable[[Inputs], Tensor]


@dataclass(frozen=True, eq=False)
class Objective:
    """One number for each of `n` images, each for a purpose of its own. The model must be `undisturbed` around every use.

    Each use runs the model anew: what the one before left in it is put back.

    Attributes:
        held: The call, with `n` rows of its first sample.
        input: The name of the input that the images take the place of.
        example: All samples of that input, in float32 at least.
        dtype: What the model takes of it.
        labels: What each image is for.
        read: From a call of `n` rows to the numbers.
        memory: That of the pass that all uses are in.
    """

    held: Inputs
    input: str
    example: Float[Tensor, "b c h w"]
    dtype: torch.dtype
    labels: tuple[str, ...]
    read: Read
    memory: Memory

    @classmethod
    def of(
        cls,
        model: nn.Module,
        memory: Memory,
        inputs: Any,
        onto: str | None,
        *,
        layer: LayerLike | None = None,
        channel: SupportsIndex | Sequence[int] | None = None,
        at: Sequence[int] | None = None,
        target: TargetLike = None,
        output: OutputLike = None,
    ) -> "Objective":
        """The objective that the arguments of `activation_maximization` mean.

        Raises:
            MulticamError: They do not fit each other, or the model.
        """
        call = Inputs.of(inputs).bind(model).own()
        name = _optimised(call, onto)
        if not torch.isfinite(call.leaves[name]).all():
            raise MulticamError(
                f"{holding(call, 0)}, and an example tells what an input looks like: fill in what is missing"
            )
        call = settled(model, call, output)
        one = call.take([0])
        if (layer is None) == (target is None):
            raise MulticamError("say what to maximise: a layer, with a channel or all of them, or a target; not both")
        if layer is not None:
            if output is not None:
                raise MulticamError("output= belongs to a target; a layer needs none")
            labels, read = _of_layer(model, one, Layer.of(layer), channel, at)
        else:
            if channel is not None or at is not None:
                raise MulticamError("channel= and at= belong to a layer; a class is given by target=")
            labels, read = _of_target(model, one, target, output)
        image = call.leaves[name]
        wide = image.to(torch.promote_types(image.dtype, torch.float32))
        return cls(call.take([0] * len(labels)), name, wide, image.dtype, labels, read, memory)

    def __call__(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
        """The numbers, with a graph where the images need one.

        Raises:
            MulticamError: They have no gradient to the images, or are not finite.
        """
        self.memory.rewind()  # only now, because the last use's gradient needed what it left
        # A copy, because the model may write into what it is given.
        values = self.read(self.held.own().replace({self.input: images.to(self.dtype, copy=True)}))
        what = ", ".join(dict.fromkeys(self.labels))
        if images.requires_grad and not values.requires_grad:
            raise MulticamError(
                f"{what} has no gradient to input {self.input!r}: it does not see that input, or something between is "
                "detached (.detach(), no_grad, argmax, rounding); list_layers(model, inputs) shows which layer sees what"
            )
        if not torch.isfinite(values).all():
            raise MulticamError(
                f"{what} is not finite: the model overflows for these images (float16 weights often do; use bfloat16 or "
                "float32, or closer bounds)"
            )
        return values


def _optimised(call: Inputs, onto: str | None) -> str:
    """The name of the input to optimise."""
    images = call.images
    if onto is None and len(images) != 1:
        known = ", ".join(map(repr, images)) or "none"
        raise MulticamError(f"say with onto= which image input is optimised; there are: {known}")
    name = next(iter(images)) if onto is None else call.name(onto)
    leaf = call.leaves[name]
    if name not in images or leaf.ndim != 4 or not leaf.is_floating_point():
        given = f"{leaf.dtype} {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else type(leaf).__name__
        raise MulticamError(f"only floating-point images (b c h w) can be optimised; input {name!r} is {given}")
    return name


def _of_layer(
    model: nn.Module, one: Inputs, layer: Layer, channel: SupportsIndex | Sequence[int] | None, at: Sequence[int] | None
) -> tuple[tuple[str, ...], Read]:
    """What is read of a layer, once a pass has shown its shape."""
    if layer.reshape is None and _acts(model, one, replace(layer, reshape=as_it_is)).ndim == 2:
        layer = replace(layer, reshape=_one_cell)
    layer = located_for_any_number(model, one, {"": layer})[""]
    acts = _acts(model, one, layer)
    channels = None if channel is None else _numbers("channel", channel, acts.shape[1])
    cell: tuple[Any, ...] = ()
    if at is not None:
        grid = tuple(acts.shape[2:])
        if not isinstance(at, Sequence) or len(at) != len(grid):
            raise MulticamError(f"at={at!r} is no place on the layer's grid {grid}")
        cell = tuple(_numbers("place", i, side)[0] for i, side in zip(at, grid, strict=True))

    def read(call: Inputs) -> Tensor:
        acts = _acts(model, call, layer)
        seen = acts[:, :, *cell] if cell else acts.flatten(2).mean(2) if channels else acts.flatten(1)
        return seen[range(len(seen)), channels] if channels else seen.square().mean(1)

    place = f" at {', '.join(map(str, cell))}" if cell else ""
    return tuple(f"channel {c}{place}" for c in channels) if channels else (f"all channels{place}",), read


def _of_target(model: nn.Module, one: Inputs, target: TargetLike, output: OutputLike) -> tuple[tuple[str, ...], Read]:
    """What a target reads, with everything decided that it takes from the example's output."""
    scorer = Scorer(target, output)
    several = getattr(scorer.target, "index", None)
    n = len(several) if isinstance(several, tuple) else 1
    pinned = scorer.pinned(select_output(one.take([0] * n).own().run(model), output))
    chosen = pinned.target

    def read(call: Inputs) -> Tensor:
        return pinned.of(call.run(model), n)

    if isinstance(chosen, ClassScore):
        classes = chosen.index if isinstance(chosen.index, tuple) else (chosen.index,)
        return tuple(f"class {c}" for c in classes), read
    return (repr(chosen),) * n, read


def _acts(model: nn.Module, call: Inputs, layer: Layer) -> Float[Tensor, "n c *grid"]:
    """A layer's output in one pass, as the grid that its reshape makes of it."""
    found: list[Tensor] = []

    def keep(i: int, tap: Tap, x: Tensor) -> Tensor:
        assert layer.reshape is not None
        acts = layer.reshape(x.clone())
        found.append(acts.to(torch.promote_types(acts.dtype, torch.float32)))
        return x.detach().clone()  # what follows needs no graph

    with Taps(model, [layer]).observe(keep):
        call.run(model)
    return found[0]


def _one_cell(x: Float[Tensor, "b c"]) -> Float[Tensor, "b c 1"]:
    """The features of a linear layer as a grid of one cell."""
    return x[..., None]


def _numbers(what: str, given: Any, count: int) -> list[int]:
    """One or several numbers from 0 to below a count.

    Raises:
        MulticamError: They are none.
    """
    given = given.tolist() if hasattr(given, "tolist") else given  # a tensor or an array
    values = list(given) if isinstance(given, Sequence | range) else [given]
    if not values or not all(hasattr(value, "__index__") and not isinstance(value, bool) for value in values):
        raise MulticamError(f"a {what} is an int, not {given!r}")
    wrong = [value for value in values if not 0 <= value < count]
    if wrong:
        raise MulticamError(f"{what} {wrong[0]} does not exist: there are 0 to {count - 1}")
    return [index(value) for value in values]
