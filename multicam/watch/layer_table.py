"""Which layers a model has, and which inputs each of them sees."""

from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from multicam.call.inputs import Inputs
from multicam.call.tree import leaves
from multicam.errors import MulticamError, out_of_memory
from multicam.printing import aligned
from multicam.watch.hooks import after
from multicam.watch.layers import Layer
from multicam.watch.module_calls import FAILURES, tensors_of
from multicam.watch.placing import Placed
from multicam.watch.probes import probe
from multicam.watch.reshape import Grid
from multicam.watch.survey import Survey, Surveyed
from multicam.watch.undisturbed import module_paths, undisturbed, unwrapped


@dataclass(frozen=True)
class LayerInfo:
    """One call of one module in one forward pass.

    Attributes:
        path: What `Layer.of` takes: the module's path, with `#call` where it is called more than once.
        kind: The module's class.
        shapes: The shape of each tensor it returns, by the path that `Layer(pick=…)` takes; `""` for a plain tensor.
        grid: The grid that its map has; None where nothing proves one.
        sees: The inputs on whose values those that it returns depend.
        note: Why there is no grid; empty otherwise.
        transformed: Whether a transform of torch.func (vmap, jvp …) inside of the model runs it.
        reshape: From what it returns to the grid.
    """

    path: str
    kind: str
    shapes: dict[str, tuple[int, ...]]
    grid: Grid | None
    sees: tuple[str, ...]
    note: str
    transformed: bool = False
    reshape: Placed | None = field(default=None, repr=False)


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

    One pass shows it. Only for an input whose values become a number or a shape in the model, by which anything may be decided, it runs twice more.

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
    survey = Survey.of(model, call)
    late = {name: _changed(model, call, name) for name in survey.left}
    return LayerTable(
        _info(survey, each, tuple(name for name, changed in late.items() if changed[i]))
        for i, each in enumerate(survey.calls)
        if each.path
    )


def _info(survey: Survey, each: Surveyed, late: tuple[str, ...]) -> LayerInfo:
    layer = Layer(each.path, call=each.call if survey.counts[each.path] > 1 else None)
    path = each.path if layer.call is None else f"{each.path}#{each.call}"
    reshape, note = None, ""
    try:
        reshape = survey.reshape(each.path, layer, survey.usual(each.path, layer))
    except MulticamError as error:
        note = str(error)
    shapes = {key: tuple(leaf.shape) for key, leaf in leaves(each.returned).items() if isinstance(leaf, Tensor)}
    known = {*survey.inputs_of(each.colours), *late}
    sees = tuple(name for name in survey.names if name in known)
    grid = reshape.grid if reshape else None
    return LayerInfo(path, each.kind.__name__, shapes, grid, sees, note, each.transformed, reshape)


def _changed(model: nn.Module, call: Inputs, name: str) -> list[bool]:
    """Which calls of modules return something else where an input has other values: two passes."""
    before = _sums(model, call)
    try:
        after = _sums(model, call.replace({name: probe(call.leaves[name])}))
    except FAILURES as error:
        if out_of_memory(error):
            raise
        return [True] * len(before)
    return [a != b for a, b in zip_longest(before, after)]


def _sums(model: nn.Module, call: Inputs) -> list[tuple[float, ...]]:
    """What tells the values of all that each call of a module returns from others."""
    found: list[tuple[float, ...]] = []

    def note(module: nn.Module, _: Any, output: Any) -> None:
        found.append(tuple(_sum(x) for x in tensors_of(output).values()))

    with undisturbed(model, graph=False, call=call) as memory, ExitStack() as hooks:
        for module in module_paths(model).values():
            hooks.enter_context(after(module, note))
        memory.call.run(model)
    return found


def _sum(x: Tensor) -> float:
    wide = torch.view_as_real(x).double() if x.is_complex() else x.double()
    return float((wide.flatten() * torch.linspace(1, 2, wide.numel(), dtype=torch.float64, device=x.device)).nansum())


def _row(info: LayerInfo) -> tuple[str, str, str, str, str]:
    shapes = ", ".join(f"{key}: {shape}" if key else str(shape) for key, shape in info.shapes.items())
    grid = "-" if info.grid is None else " x ".join(map(str, info.grid))
    return info.path, info.kind, shapes, grid, ", ".join(info.sees) or "-"
