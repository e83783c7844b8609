"""What modules hold in their attributes, noted and put back: flags, hooks, counters, states that a forward leaves there."""

import operator
import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# Those that Python and torch make; what is in containers of other kinds is somebody else's.
CONTAINERS = frozenset({dict, OrderedDict, defaultdict, list, set, deque})
PLAIN = frozenset({str, int, float, bool, type(None)})


class Attributes:
    """The attributes of a model's modules, and what is in the containers among them, to any depth.

    Put back are the objects, not their insides: what tensors hold is the matter of `multicam.watch.memory`. Generators of random numbers go back to
    their states. State that lies in other objects stays as the pass leaves it.

    Args:
        modules: The modules.

    Attributes:
        tensors: The tensors among the attributes that are not parameters, by name.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        # Every pass comes through here, and a large model has ten thousand attributes, nearly all of them plain or empty.
        self.tensors: dict[str, Tensor] = {}
        self._attributes = [(vars(module), vars(module).copy()) for module in modules]
        self._empty: list[Any] = []
        self._full: dict[int, tuple[Any, Any]] = {}
        self._states: list[Callable[[], object]] = []
        for place, (_, attributes) in enumerate(self._attributes):
            for name, value in attributes.items():
                if type(value) in PLAIN:
                    continue
                if type(value) in CONTAINERS and not value:
                    self._empty.append(value)
                elif name not in ("_parameters", "_modules"):
                    self._note((place, name), value)
                else:
                    self._full[id(value)] = value, value.copy()

    def restore(self) -> None:
        """Put everything back; it may be called again where it was interrupted."""
        for container in self._empty:
            if container:
                container.clear()
        for container, before in self._full.values():
            _refill(container, before)
        for attributes, before in self._attributes:
            _refill(attributes, before)
        for restore in self._states:
            restore()

    def _note(self, path: tuple[object, ...], value: Any) -> None:
        kind = type(value)
        if kind in CONTAINERS:
            if id(value) in self._full:
                return
            self._full[id(value)] = value, value.copy()
        if kind in CONTAINERS or kind is tuple:
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                if type(item) not in PLAIN:
                    self._note((*path, key), item)
        elif isinstance(value, Tensor):
            if not isinstance(value, nn.Parameter):
                self.tensors[".".join(map(str, path))] = value
        elif isinstance(value, torch.Generator):
            self._states.append(partial(value.set_state, value.get_state()))
        elif isinstance(value, np.random.Generator):
            self._states.append(partial(setattr, value.bit_generator, "state", value.bit_generator.state))
        elif isinstance(value, np.random.RandomState):
            self._states.append(partial(value.set_state, value.get_state()))
        elif isinstance(value, random.Random):
            self._states.append(partial(value.setstate, value.getstate()))


def _refill(container: Any, before: Any) -> None:
    """Put the same objects into a container that it held before, in the same order."""
    values = (container.values(), before.values()) if isinstance(container, dict) else ((), ())
    if len(container) == len(before) and all(chain(map(operator.is_, container, before), map(operator.is_, *values))):
        return
    if isinstance(container, list):
        container[:] = before
    elif isinstance(container, dict):
        # In this order, because other threads may be reading a module's attributes.
        container.update(before)
        for key in [key for key in container if key not in before]:
            del container[key]
    else:
        container.clear()
        container.extend(before) if isinstance(container, deque) else container.update(before)
