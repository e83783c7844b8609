"""What was proved of passes of a model, for later passes of the same kind."""

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from multicam.call.inputs import Inputs
from multicam.watch.attributes import PLAIN
from multicam.watch.hooks import has_others
from multicam.watch.module_calls import Key


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


_PLANS: WeakKeyDictionary[nn.Module, dict[Hashable, Plan]] = WeakKeyDictionary()


def plans_of(model: nn.Module) -> dict[Hashable, Plan]:
    """The plans of a model by the kinds of their calls, see `kind_of`; they are forgotten with the model."""
    return _PLANS.setdefault(model, {})


def kind_of(model: nn.Module, call: Inputs) -> Hashable | None:
    """What passes have in common that run in the same way, as long as no value of a tensor decides; None: it cannot be told.

    That is: the shapes and types of tensors, all plain values of inputs and of the modules' attributes, and whose hooks there are.
    """
    inputs: list[Hashable] = []
    for name, leaf in call.leaves.items():
        if isinstance(leaf, Tensor):
            inputs.append((name, tuple(leaf.shape), leaf.dtype, leaf.stride()))
        elif type(leaf) in PLAIN:
            inputs.append((name, leaf))
        else:
            return None
    modules = [
        (id(module), has_others(module), *(item for item in vars(module).items() if type(item[1]) in PLAIN))
        for module in model.modules()
    ]
    return (*inputs, *modules)
