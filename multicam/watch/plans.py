"""What was proved of passes of a model, for later passes of the same kind."""

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from multicam.call.inputs import Inputs
from multicam.call.tree import rebuild
from multicam.watch.attributes import PLAIN
from multicam.watch.hooks import numbers_of_others
from multicam.watch.module_calls import Key, ModuleCall, every_call


@dataclass(frozen=True)
class Plan:
    """Which calls of modules a record keeps, where no value decides what runs.

    Attributes:
        colours: Which parts each kept call depends on, as bits.
        inside: How many calls of each module each of them makes, its own among them.
        used: Which parts the output depends on, as bits.
        counts: How many calls of each module a pass makes.
    """

    colours: dict[Key, int]
    inside: dict[Key, Counter[int]]
    used: int
    counts: Counter[int] = field(default_factory=Counter)


def planned_pass(model: nn.Module, call: Inputs, plan: Plan) -> tuple[Any, dict[Key, ModuleCall]] | None:
    """What a model returns for a call of a planned kind, and the calls that the plan keeps; None where it is of another kind after all."""
    counts: Counter[int] = Counter()
    calls: dict[Key, ModuleCall] = {}

    def begin(call: ModuleCall, _: Any) -> None:
        counts[id(call.module)] += 1

    def end(call: ModuleCall, output: Any) -> None:
        if call.key in plan.colours:
            call.output = rebuild(output, lambda _, x: x.detach().clone() if isinstance(x, Tensor) else x)
            call.inside = plan.inside[call.key]
            calls[call.key] = call

    with every_call(model, begin, end):
        output = call.run(model)
    return (output, calls) if counts == plan.counts else None


# The containers of nn.Module itself, whose modules and tensors are no plain values, and whose hooks are told apart.
OWN = frozenset(vars(nn.Module()))
_PLANS: WeakKeyDictionary[nn.Module, dict[Hashable, Plan]] = WeakKeyDictionary()


def plans_of(model: nn.Module) -> dict[Hashable, Plan]:
    """The plans of a model by the kinds of their calls, see `kind_of`; they are forgotten with the model."""
    return _PLANS.setdefault(model, {})


def kind_of(model: nn.Module, call: Inputs) -> Hashable | None:
    """What passes have in common that run in the same way, as long as no value of a tensor decides; None: it cannot be told.

    That is: the shapes and types of tensors, all plain values of inputs, and of modules, their classes and the objects among their attributes, and
    which hooks there are.
    """
    inputs: list[Hashable] = []
    for name, leaf in call.leaves.items():
        if isinstance(leaf, Tensor):
            inputs.append((name, tuple(leaf.shape), leaf.dtype, leaf.stride()))
        elif type(leaf) in PLAIN:
            inputs.append((name, leaf))
        else:
            return None
    classes = {kind: tuple(map(_plain_of, kind.__mro__)) for kind in {type(module) for module in model.modules()}}
    modules = [
        (id(module), classes[type(module)], tuple(numbers_of_others(module)), _plain_of(module, deep=True))
        for module in model.modules()
    ]
    return (*inputs, *modules)


def _plain_of(holder: object, *, deep: bool = False) -> tuple[Hashable, ...]:
    """The plain values among the attributes of a class or an object, and of what it holds."""
    found: list[Hashable] = []
    for name, value in vars(holder).items():
        if type(value) in PLAIN:
            found.append((name, value))
        elif deep and isinstance(value, list | tuple | dict | set) and name not in OWN:
            found.append((name, _plain_in(value)))
        elif deep and hasattr(value, "__dict__") and not isinstance(value, Tensor | nn.Module | type):
            found.append((name, _plain_of(value)))
    return tuple(found)


def _plain_in(container: Any) -> tuple[Hashable, ...]:
    items = container.items() if isinstance(container, dict) else enumerate(container)
    return tuple((str(key), value if type(value) in PLAIN else id(value)) for key, value in items)
