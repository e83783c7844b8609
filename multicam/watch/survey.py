"""Which layers a model has, and which inputs each of them sees."""

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from multicam.call.inputs import Inputs
from multicam.call.refusals import transformed
from multicam.call.tree import leaves
from multicam.errors import MulticamError
from multicam.printing import aligned
from multicam.watch.grids import Grids
from multicam.watch.hooks import after
from multicam.watch.layers import Layer, Tap
from multicam.watch.reshape import Grid
from multicam.watch.undisturbed import module_paths, undisturbed, unwrapped


@dataclass(frozen=True)
class LayerInfo:
    """One call of one module in one forward pass.

    Attributes:
        path: What `Layer.of` takes: the module's path, with `#call` where it is called more than once.
        kind: The module's class.
        shapes: The shape of each tensor it returns, by the path that `Layer(pick=…)` takes; `""` for a plain tensor.
        grid: The grid that its map has; None where nothing proves one.
        sees: The inputs that its output depends on, as far as gradients tell: its map can be laid on any of these.
        note: Why there is no grid; empty otherwise.
        transformed: Whether a transform of torch.func (vmap, jvp …) inside of the model runs it.
    """

    path: str
    kind: str
    shapes: dict[str, tuple[int, ...]]
    grid: Grid | None
    sees: tuple[str, ...]
    note: str
    transformed: bool = False


class LayerTable(list[LayerInfo]):
    """The layers of a model in the order in which they return; prints as a table."""

    def __repr__(self) -> str:
        rows = [("layer", "kind", "returns", "grid", "sees"), *map(_row, self)]
        return aligned(rows)

    def find(self, text: str) -> "LayerTable":
        """The layers whose path or class contains `text`."""
        return LayerTable(info for info in self if text in info.path or text in info.kind)


def list_layers(model: nn.Module, inputs: Any) -> LayerTable:
    """Every layer that one forward pass calls: its path, what it returns, its grid and the inputs it sees.

    The model runs once for each floating-point input, with a gradient on that input alone, to see how far it reaches.

    Args:
        model: Any module; it is not changed.
        inputs: What it takes, see `Inputs.of`.

    Raises:
        MulticamError: If the inputs do not fit the model.

    Example:
        >>> import torch
        >>> list_layers(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.rand(2, 3, 8, 8))
        layer  kind    returns       grid   sees
        0      Conv2d  (2, 4, 6, 6)  6 x 6  input
        1      ReLU    (2, 4, 6, 6)  6 x 6  input
    """
    model = unwrapped(model)
    call = Inputs.of(inputs).bind(model)
    floating = [name for name, leaf in call.leaves.items() if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    passes = {name: _watch(model, call, name) for name in floating}
    seen = next(iter(passes.values())) if passes else _watch(model, call, None)
    return LayerTable(
        replace(info, sees=tuple(name for name, infos in passes.items() if infos[i].sees))
        for i, info in enumerate(seen)
    )


def _watch(model: nn.Module, call: Inputs, source: str | None) -> list[LayerInfo]:
    """Every module call of one forward pass; `sees` is `source` where its gradient arrives."""
    grids = Grids(module_paths(model))
    batch = call.batch
    counts: Counter[str] = Counter()
    found: list[tuple[Tap, LayerInfo]] = []

    def with_gradient(name: str, leaf: Any) -> Any:
        # A clone, for a model that writes into its input: it may not write into a leaf that wants a gradient.
        return leaf.requires_grad_().clone() if name == source else leaf

    with undisturbed(model, graph=True, call=call, part=("layers", source)) as memory, ExitStack() as hooks:

        def called(path: str, module: nn.Module, _: Any, output: Any) -> None:
            tap = Tap(Layer(path, call=counts[path]), path, module)
            counts[path] += 1
            tensors = {key: leaf for key, leaf in leaves(output).items() if isinstance(leaf, Tensor)}
            grid, note = None, ""
            try:
                picked = tensors[tap.pick(output)].detach()
                reshape = grids.reshape(picked, tap.label, path, module, batch, seen)
                grid = tuple(reshape(picked).shape[2:])
            except MulticamError as error:
                note = str(error)
            reached = source is not None and any(map(_is_reached, tensors.values()))
            shapes = {key: tuple(leaf.shape) for key, leaf in tensors.items()}
            sees = (str(source),) if reached else ()
            info = LayerInfo(path, type(module).__name__, shapes, grid, sees, note, transformed())
            found.append((tap, info))

        for path, module in model.named_modules():
            if path:
                hooks.enter_context(after(module, partial(called, path)))
        seen = hooks.enter_context(grids.watch())  # who comes last is told first
        memory.call.map(with_gradient).run(model)
    return [info if counts[info.path] == 1 else replace(info, path=tap.label) for tap, info in found]


def _is_reached(x: Tensor) -> bool:
    """Whether a gradient arrives at a tensor, or at one that a transform of torch.func has wrapped in it."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x) and not x.requires_grad:
        x = torch._C._functorch.get_unwrapped(x)
    return x.requires_grad


def _row(info: LayerInfo) -> tuple[str, str, str, str, str]:
    shapes = ", ".join(f"{key}: {shape}" if key else str(shape) for key, shape in info.shapes.items())
    grid = "-" if info.grid is None else " x ".join(map(str, info.grid))
    return info.path, info.kind, shapes, grid, ", ".join(info.sees) or "-"
