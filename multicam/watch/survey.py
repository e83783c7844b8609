"""One pass that shows, for every layer, which places of which inputs its output stands for, and which inputs it depends on."""

from collections import Counter, OrderedDict
from collections.abc import Hashable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from threading import get_ident
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from multicam.call.inputs import Inputs
from multicam.call.refusals import transformed
from multicam.call.tree import leaves, rebuild
from multicam.errors import MulticamError, out_of_memory
from multicam.watch.attributes import Attributes
from multicam.watch.hooks import after, numbers_of_others, takes_hooks
from multicam.watch.layers import Layer, LayerLike, Tap, Taps, picked
from multicam.watch.module_calls import FAILURES
from multicam.watch.placing import Placed, placed
from multicam.watch.taint import Taint
from multicam.watch.tokens.follow import Follower
from multicam.watch.tokens.marks import Mark
from multicam.watch.tokens.origins import Origins
from multicam.watch.tokens.places import Places
from multicam.watch.tokens.queries import Queries
from multicam.watch.tokens.raw import Raw
from multicam.watch.undisturbed import module_paths, undisturbed

REMEMBERED = 8  # kinds of calls of one model
aten = torch.ops.aten
# What picks entries by numbers that may have been computed.
PICKING = {
    aten.index.Tensor,
    aten.index_select.default,
    aten.gather.default,
    aten.masked_select.default,
    aten.masked_scatter.default,
    aten.index_put.default,
    aten.index_put_.default,
    aten.masked_scatter_.default,
}


@dataclass(frozen=True, eq=False)
class Surveyed:
    """One call of a module in the pass.

    Attributes:
        path: The module's.
        call: Which call of it.
        kind: Its class.
        returned: What it returned, with tensors that have no values.
        marks: The token ids of its tensors, by their paths; none for what comes from no input.
        colours: Which inputs its values depend on, as bits; the highest for places that were chosen by values.
        transformed: Whether a transform of torch.func inside of the model runs it.
    """

    path: str
    call: int
    kind: type[nn.Module]
    returned: Any
    marks: Mapping[str, Mark | Raw | None] = field(repr=False)
    colours: int
    transformed: bool


class Survey:
    """What one pass of a model showed of the calls of its modules.

    Attributes:
        names: The inputs that are tensors.
        batch: The number of samples.
        calls: The calls of modules, in the order in which they returned.
        counts: How often each module was called, by its path.
        elsewhere: The modules that other threads called, too.
        left: The inputs whose values became numbers or shapes, on which anything may depend that came later.
    """

    def __init__(self, model: nn.Module, call: Inputs) -> None:
        call = call.own()  # apart, also where two inputs are one tensor
        self.batch, self._images = call.batch, tuple(call.images)
        self.calls: list[Surveyed] = []
        self.counts: Counter[str] = Counter()
        self.elsewhere: set[str] = set()
        self._thread = get_ident()
        with undisturbed(model, graph=False, call=call, part="survey") as memory, ExitStack() as hooks:
            given = {name: leaf for name, leaf in memory.call.leaves.items() if isinstance(leaf, Tensor)}
            self.names = tuple(given)
            taint, listener = _Values(1 << len(given)), Queries()
            taint.know([*model.parameters(), *Attributes(model.modules()).tensors.values()])
            for i, leaf in enumerate(given.values()):
                taint.mark(leaf, colours=1 << i)
            for path, module in module_paths(model).items():
                hooks.enter_context(after(module, partial(self._returned, path, taint, listener)))
            if takes_hooks(model):  # of TorchScript no module's call is heard
                hooks.enter_context(Follower(model, listener, call=memory.call).watch())
            hooks.enter_context(taint)
            if any(map(_is_renamed, given.values())):
                hooks.enter_context(torch._C.DisableTorchFunctionSubclass())
            memory.call.run(model)
        self._places = listener.origins.places if takes_hooks(model) else Places({})
        self.left = self.inputs_of(taint.left)
        self._found = {(each.path, each.call): each for each in self.calls}
        self._placed: dict[tuple[str, int, str, str | None], Placed] = {}

    def _returned(
        self, path: str, taint: "_Values", listener: Queries, module: nn.Module, given: Any, output: Any
    ) -> None:
        tensors = {key: leaf for key, leaf in leaves(output).items() if isinstance(leaf, Tensor)}
        if isinstance(module, nn.RNNBase):
            _recur(listener.origins, given, output)
        if get_ident() != self._thread:
            self.elsewhere.add(path)
            if isinstance(module, nn.modules.conv._ConvNd) and isinstance(output, Tensor):
                listener.origins.again(output)
        number = self.counts[path]
        self.counts[path] += 1
        marks = {key: listener.origins.kept(x) for key, x in tensors.items()}
        without = rebuild(output, lambda _, leaf: _meta(leaf))
        self.calls.append(
            Surveyed(
                path,
                number,
                type(module),
                without,
                marks,
                taint.colours([_inside(x) for x in tensors.values()]),
                transformed(),
            )
        )

    @classmethod
    def of(cls, model: nn.Module, call: Inputs) -> "Survey":
        """The survey of a kind of call, which is made once for its shapes, types, values that are no tensors, and hooks of others."""
        known = _KNOWN.setdefault(model, OrderedDict())
        key = _kind(model, call)
        if key not in known:
            known[key] = cls(model, call)
            if len(known) > REMEMBERED:
                known.popitem(last=False)
        known.move_to_end(key)
        return known[key]

    def sees(self, path: str, layer: Layer) -> tuple[str, ...]:
        """The inputs on whose values those of a layer depend; none where the pass does not call it."""
        found = self.find(path, layer)
        return self.inputs_of(found.colours) if found else ()

    def find(self, path: str, layer: Layer) -> Surveyed | None:
        """The call of a module that a layer means; None where there is none, or more than one."""
        several = layer.call is None and self.counts[path] > 1
        return None if several else self._found.get((path, layer.call or 0))

    def inputs_of(self, colours: int) -> tuple[str, ...]:
        """The names of inputs by their bits."""
        return tuple(name for i, name in enumerate(self.names) if colours >> i & 1)

    def reshape(self, path: str, layer: Layer, onto: str | None) -> Placed:
        """The grid of a layer that the pass calls.

        Args:
            path: The layer's module.
            layer: Which call of it, and which tensor of its output.
            onto: The input on which its map lies; None: the only one whose places it has.

        Raises:
            MulticamError: If there is none; the message says why.
        """
        found = self.find(path, layer)
        assert found is not None
        label = path if layer.call is None else f"{path}#{layer.call}"
        return self.place(found, label, picked(layer, label, found.kind, found.returned), onto)

    def usual(self, path: str, layer: Layer) -> str | None:
        """The input that is meant where nobody named one: the only picture, if the layer has a grid on it."""
        if len(self._images) != 1:
            return None
        try:
            self.reshape(path, layer, self._images[0])
        except MulticamError:
            return None
        return self._images[0]

    def chosen_by_values(self, path: str, layer: Layer) -> bool:
        """Whether the places of a layer are others where the inputs have other values."""
        found = self.find(path, layer)
        return found is not None and bool(found.colours >> len(self.names) & 1)

    def place(self, found: Surveyed, label: str, pick: str, onto: str | None) -> Placed:
        """The grid of a tensor of a module's output; the arguments and errors are those of `reshape`."""
        key = found.path, found.call, pick, onto
        if key not in self._placed:
            self._placed[key] = self._place(found, label, pick, onto)
        return self._placed[key]

    def _place(self, found: Surveyed, label: str, pick: str, onto: str | None) -> Placed:
        shape, mark = tuple(leaves(found.returned)[pick].shape), found.marks[pick]
        mark = mark.mark(self._places) if isinstance(mark, Raw) else mark
        said = f"layer {label!r} returns {shape}"
        if found.transformed:
            raise MulticamError(
                f"layer {label!r} runs inside of a torch.vmap of the model's own, which shows it one sample at a time: take a layer "
                "outside of it"
            )
        if len(shape) <= 2:
            raise MulticamError(f"{said}: it has no spatial axes left to lay a map on; take an earlier layer")
        if mark is None:
            inputs = self.inputs_of(found.colours)
            why = f"comes from {', '.join(inputs)}, which has no places" if inputs else "comes from no input"
            raise MulticamError(f"{said}, which {why}")
        sees = self.inputs_of(found.colours)
        if onto is not None and onto in self.names and onto not in (*sees, *self.left):
            raise MulticamError(
                f"layer {label!r} does not see input {onto!r}, on which its map would be laid"
                + (f"; it sees {', '.join(map(repr, sees))}" if sees else "")
                + "; list_layers(model, inputs) shows what each call sees"
            )
        names = [name for name in self._places.names if name in sees]
        candidates, reasons = {}, {}
        for name in names if onto is None else [onto]:
            try:
                candidates[name] = self._on(mark, shape, name)
            except MulticamError as error:
                reasons[name] = str(error)
        if onto is None and len(candidates) > 1:
            candidates = self._told_apart(said, candidates)
        if not candidates:
            why = f" ({mark.lost_by})" if mark.lost_by else ""
            told = "; ".join(f"{name!r}: {reason}" for name, reason in reasons.items()) or "it sees no input"
            raise MulticamError(
                f"{said}, and a pass shows no grid of places in it{why}: {told}; take another layer, see list_layers(model, inputs), or say it "
                "with Layer(…, reshape=tokens(rows, columns, prefix=class and register tokens)), reshape=as_it_is for (b c *grid) or "
                "reshape=channels_last"
            )
        return next(iter(candidates.values()))

    def _on(self, mark: Mark, shape: tuple[int, ...], name: str) -> Placed:
        if name not in self._places.names:
            raise MulticamError("it has no places to follow")
        return placed(mark, shape, self._places, self.batch, name)

    def _told_apart(self, said: str, candidates: dict[str, Placed]) -> dict[str, Placed]:
        """One of several inputs, where it does not matter which."""
        first = next(iter(candidates.values()))
        if all(other.same_entries(first) for other in candidates.values()):
            return {first.onto: first}
        grids = ", ".join(f"onto={name!r} ({' x '.join(map(str, each.grid))})" for name, each in candidates.items())
        raise MulticamError(f"{said}, which holds places of several inputs: say which with Layer(…, {grids})")


_KNOWN: WeakKeyDictionary[nn.Module, OrderedDict[Hashable, Survey]] = WeakKeyDictionary()


def located(model: nn.Module, call: Inputs, layers: Mapping[str, LayerLike]) -> dict[str, Layer]:
    """The layers with the reshape to their grid, said or shown by a pass with this call.

    Args:
        model: The model.
        call: What it takes.
        layers: By the caller's names for them; a name that is an input's lays the map on that input, and "" is none.

    Raises:
        MulticamError: If a layer does not exist, or has no grid; the message says why.
    """
    taps = Taps(model, list(layers.values()))
    named = dict(zip(layers, zip(taps.layers, taps.names, strict=True), strict=True))
    asked = [each for each in named.values() if not each[0].reshape]
    if not asked:
        return {name: layer for name, (layer, _) in named.items()}
    survey = Survey.of(model, call)
    for layer, path in asked:
        if survey.find(path, layer) is None:
            calls, elsewhere = survey.counts[path], path in survey.elsewhere
            taps.check_calls(Tap(layer, path, taps.paths[path], calls, elsewhere=elsewhere))
    if any(survey.chosen_by_values(path, layer) for layer, path in asked):
        survey = Survey(model, call)
    found = {}
    for name, (layer, path) in named.items():
        onto = named_input(name, layer, call) or (None if name else survey.usual(path, layer))
        found[name] = layer if layer.reshape else replace(layer, reshape=survey.reshape(path, layer, onto))
    return found


def located_for_any_number(model: nn.Module, call: Inputs, layers: Mapping[str, LayerLike]) -> dict[str, Layer]:
    """The same for calls with any number of samples, where the model can run two of them."""
    if call.batch != 1 or all(Layer.of(layer).reshape for layer in layers.values()):
        return located(model, call, layers)
    try:
        two = call.take([0, 0])
        Survey.of(model, two)
    except (*FAILURES, MulticamError) as error:
        if out_of_memory(error):
            raise
        return located(model, call, layers)
    return located(model, two, layers)


def named_input(name: str, layer: Layer, call: Inputs) -> str | None:
    """The input on which the caller says that the map of a layer lies."""
    if layer.onto is not None:
        return call.name(layer.onto)
    if name and any(f".{leaf}".endswith(f".{name}") for leaf in call.leaves):
        return call.name(name)
    return None


class _Values(Taint):  # type: ignore[no-untyped-call]
    """Marks what is computed from marked values, and nothing else: a number or a shape carries no mark on.

    Args:
        picked: The colour of what was picked by places that were computed.

    Attributes:
        left: The colours of what became a number or a shape.
    """

    def __init__(self, picked: int) -> None:
        super().__init__()
        self.left = 0
        self._picked = picked

    def escape(self, colours: int) -> None:
        """See `Taint`."""
        self.left |= colours

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = super().__torch_dispatch__(func, types, args, kwargs)
        if func in PICKING:
            x, *places = (x for x in tree_leaves(args) if isinstance(x, Tensor))
            if self.colours(x) and any(self.colours(each) for each in places if not each.is_floating_point()):
                self.mark(*(x for x in tree_leaves(returned) if isinstance(x, Tensor)), colours=self._picked)
        return returned


def _recur(origins: Origins, given: Any, output: Any) -> None:
    """Each step that a recurrent layer returns is the token that it has come to."""
    x = given[0] if given else None
    if isinstance(x, Tensor) and isinstance(output[0], Tensor) and origins.mark(x) is not None:
        origins.give(output[0], origins.ids(x, -1), -1)


def _is_renamed(x: Tensor) -> bool:
    """Whether a tensor is one of a class that changes nothing but its name, to which results are converted out of the dispatcher's sight."""
    own: Any = type(x).__torch_function__
    default: Any = Tensor.__torch_function__
    return type(x) is not Tensor and getattr(own, "__func__", None) is default.__func__


def _inside(x: Tensor) -> Tensor:
    """The tensor that transforms of torch.func have wrapped in another."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def _meta(leaf: Any) -> Any:
    return torch.empty(leaf.shape, dtype=leaf.dtype, device="meta") if isinstance(leaf, Tensor) else leaf


def _kind(model: nn.Module, call: Inputs) -> Hashable:
    hooks = tuple(number for module in model.modules() for number in numbers_of_others(module))
    return (hooks, call.batch, tuple(call.images), *(_described(name, leaf) for name, leaf in call.leaves.items()))


def _described(name: str, leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return name, leaf.shape, leaf.dtype, leaf.device
    if isinstance(leaf, np.ndarray):
        return name, leaf.shape, leaf.dtype.str
    return name, type(leaf), leaf if isinstance(leaf, str | int | float) else None
