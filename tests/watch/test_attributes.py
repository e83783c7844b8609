"""What a pass leaves in attributes, and in the containers and objects there, is gone behind it; what it takes away is back."""

import copy
import itertools
import queue
import random
import threading
from collections import Counter, OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from multicam.watch.attributes import Attributes
from multicam.watch.undisturbed import undisturbed
from tests.helpers.insides import changes, insides


@dataclass
class State:
    """As spiking nets keep it."""

    potential: Any = None
    steps: int = 0


@dataclass(slots=True)
class Slotted:
    potential: Any = None
    steps: int = 0


@dataclass(frozen=True)
class Frozen:
    potential: list[int] = field(default_factory=list)


class Cache:
    """Objects in a container in an object."""

    def __init__(self) -> None:
        self.layers = [State(), Slotted()]
        self.cache = self  # and a circle


class Pair(NamedTuple):
    first: list[int]
    second: State


class Words(dict[str, int]):
    pass


def grown(kept: dict[str, Any]) -> None:
    """Write into all kinds of containers."""
    kept["list"].append(1)
    kept["deque"].append(torch.ones(2))
    kept["dict"]["a"][0]["b"] += 1
    kept["ordered"].move_to_end("first")
    kept["default"]["new"].append(1)
    kept["counter"]["new"] += 1
    kept["set"].add(1)
    kept["tuple"][0].append(1)
    kept["named"].first.append(1)
    kept["named"].second.steps += 1
    kept["words"]["new"] = 1
    kept["user"]["new"] = 1
    kept["removed"].clear()


def containers() -> dict[str, Any]:
    return {
        "list": [],
        "deque": deque([0], maxlen=1),
        "dict": {"a": [{"b": 0}]},
        "ordered": OrderedDict(first=1, second=2),
        "default": defaultdict(list),
        "counter": Counter("aab"),
        "set": {0},
        "tuple": ([],),
        "named": Pair([], State()),
        "words": Words(old=0),
        "user": UserDict(old=0),
        "removed": [1, 2],
    }


def objects() -> dict[str, Any]:
    return {
        "state": State(),
        "slotted": Slotted(),
        "frozen": Frozen(),
        "cache": Cache(),
        "space": SimpleNamespace(potential=None),
        "holder": State(torch.zeros(9000)),
    }


def moved(kept: dict[str, Any]) -> None:
    """Write into objects."""
    kept["state"].potential, kept["state"].steps, kept["state"].more = torch.ones(2), 1, 2
    kept["slotted"].potential, kept["slotted"].steps = torch.ones(2), 1
    kept["frozen"].potential.append(1)
    kept["cache"].layers[0].steps += 1
    kept["cache"].layers[1].steps += 1
    kept["cache"].layers.append(State())
    kept["space"].potential = torch.ones(2)
    kept["holder"].potential.add_(1)
    del kept["holder"].steps


def generators() -> dict[str, Any]:
    return {
        "torch": torch.Generator(),
        "numpy": np.random.default_rng(0),
        "older": np.random.RandomState(0),
        "python": random.Random(0),
        "nested": [np.random.default_rng(1)],
    }


def drawn(kept: dict[str, Any]) -> None:
    torch.rand(3, generator=kept["torch"])
    kept["numpy"].random()
    kept["older"].rand()
    kept["python"].random()
    kept["nested"][0].random()


def arrays() -> dict[str, Any]:
    fixed = np.zeros(3)
    fixed.flags.writeable = False
    return {"many": np.zeros(9000), "few": [np.zeros(3)], "objects": np.array([None, "a"], object), "fixed": fixed}


def filled(kept: dict[str, Any]) -> None:
    kept["many"] += 1
    kept["few"][0][1] = 2
    kept["objects"][0] = 3


KEPT: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[dict[str, Any]], None]]] = {
    "containers": (containers, grown),
    "objects": (objects, moved),
    "generators": (generators, drawn),
    "arrays": (arrays, filled),
}


class Holding(nn.Module):
    """Holds something in its attributes, one by one."""

    def __init__(self, kept: dict[str, Any]) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        for name, value in kept.items():
            setattr(self.inner, name, value)


@pytest.mark.parametrize("kind", KEPT)
def test_insides_of_attributes_are_put_back(kind: str) -> None:
    make, write = KEPT[kind]
    kept = make()
    model = Holding(kept)
    before = insides(model)
    for _ in range(2):
        with undisturbed(model, graph=False):
            write(kept)
            assert changes(before, insides(model)) != []
    assert changes(before, insides(model)) == []


def test_attributes_are_put_back_in_their_order() -> None:
    model = Holding({"first": 1, "gone": None, "last": 2})
    model.inner.register_forward_hook(print)
    handle = model.inner.register_forward_hook(id)
    before, order, hooks = insides(model), list(vars(model.inner)), model.inner._forward_hooks
    with undisturbed(model, graph=False):
        model.inner.first, model.inner.new = 3, torch.ones(2)
        del model.inner.gone
        model.inner.register_buffer("buffer", torch.ones(2))
        model.inner.more = nn.Linear(2, 2)
        model.inner.weight = nn.Parameter(torch.ones(2))
        model.more = nn.ReLU()
        model.inner.register_forward_hook(lambda *_: None, prepend=True)
        hooks.move_to_end(handle.id, last=False)
    assert changes(before, insides(model)) == []
    assert list(vars(model.inner)) == order and list(model._modules) == ["inner"]
    assert list(hooks.values()) == [print, id]


def test_modules_that_no_module_registered_are_put_back() -> None:
    hidden = [nn.BatchNorm1d(3)]
    model = Holding({"hidden": hidden, "table": {"linear": nn.Linear(90, 90)}})
    before = insides(model)
    with undisturbed(model, graph=False):
        hidden[0](torch.rand(4, 3))
        with torch.no_grad():
            model.inner.table["linear"].weight.add_(1)
    assert changes(before, insides(model)) == []


def test_a_module_made_in_the_first_pass_is_gone_behind_it_and_made_the_same_by_the_next() -> None:
    class Lazy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if not hasattr(self, "head"):
                self.head = nn.Linear(3, 2)
            out: Tensor = self.head(x)
            return out

    model, found = Lazy(), []
    for _ in range(2):
        with undisturbed(model, graph=False):
            found.append(model(torch.ones(1, 3)))
    assert torch.equal(*found) and not list(model.parameters())


def test_a_flag_and_the_hooks_that_it_stands_for_go_together() -> None:
    class Capturing(nn.Module):
        """Installs its hooks at its first call, as Transformers does."""

        def __init__(self) -> None:
            super().__init__()
            self.layer, self.installed, self.states = nn.Linear(3, 3), False, []

        def forward(self, x: Tensor) -> Tensor:
            if not self.installed:
                self.layer.register_forward_hook(lambda module, args, output: self.states.append(output))
                self.installed = True
            self.states.clear()
            self.layer(x)
            return torch.stack(self.states).sum(0)

    model = Capturing()
    for _ in range(2):
        with undisturbed(model, graph=False):
            assert model(torch.ones(1, 3)).shape == (1, 3)
        assert not model.installed and not model.layer._forward_hooks and not model.states


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_weights_that_are_computed_before_each_call_are_as_before() -> None:
    norms = nn.utils.parametrizations
    model = nn.Sequential(
        nn.utils.spectral_norm(nn.Linear(3, 3)),
        norms.spectral_norm(nn.Linear(3, 3)),
        norms.weight_norm(nn.Linear(3, 3)),
        nn.utils.weight_norm(nn.Linear(3, 3)),
    )
    model(torch.rand(4, 3)).sum().backward()
    before = insides(model)
    with undisturbed(model, graph=True):
        model(torch.rand(4, 3, requires_grad=True))
    assert changes(before, insides(model)) == []


def test_what_belongs_to_python_stays_as_it_is_left() -> None:
    kept: dict[str, Any] = {"queue": queue.Queue(), "lock": threading.Lock(), "local": threading.local()}
    model = Holding(kept | {"steps": itertools.count(), "function": lambda: None, "kind": State})
    attributes = Attributes(model.modules())
    kept["queue"].put(1)
    kept["local"].x = 1
    assert set(attributes.left) == {"1.queue", "1.local", "1.steps"}
    attributes.restore()
    assert kept["queue"].qsize() == 1 and kept["local"].x == 1


def test_tensors_are_named_and_switches_listed() -> None:
    model = Holding({"cache": {"keys": [torch.ones(1)]}, "on": True, "state": State(torch.ones(2))})
    model.register_buffer("mean", torch.ones(3))
    model.register_buffer("nothing", None)
    attributes = Attributes(model.modules(), {"extra": [torch.ones(4)]})
    assert {name: x.numel() for name, x in attributes.tensors.items()} == {
        "0.mean": 3,
        "1.cache.keys.0": 1,
        "1.state.potential": 2,
        "extra.0": 4,
    }
    assert attributes.switches == [True, True, True]
    model.inner.eval()
    assert Attributes(model.modules()).switches == [True, False, True]


def test_what_is_changed_is_named() -> None:
    model = Holding({"cache": {"keys": []}, "state": State(), "slotted": Slotted()})
    attributes = Attributes([model.inner])
    assert attributes.changed() == []
    model.inner.cache["keys"].append(1)
    model.inner.state.steps = model.inner.slotted.steps = 2
    assert sorted(attributes.changed()) == ["0.cache.keys", "0.slotted", "0.state"]
    attributes.restore()
    attributes.restore()
    assert attributes.changed() == []


def test_a_long_chain_of_objects_is_followed_to_its_end() -> None:
    first = State()
    last = first
    for _ in range(3000):
        last.potential = State()
        last = last.potential
    attributes = Attributes(Holding({"chain": first}).modules())
    last.steps = 7
    assert len(attributes.changed()) == 1
    attributes.restore()
    assert last.steps == 0


def test_a_model_can_be_copied_behind_a_pass() -> None:
    model = Holding(containers() | objects())
    with undisturbed(model, graph=False):
        moved(vars(model.inner))
    assert copy.deepcopy(model).inner.state == model.inner.state


def test_what_a_tools_hooks_leave_on_their_modules_stays_for_its_backward_pass() -> None:
    hooked, other = nn.Linear(2, 2), nn.Linear(2, 2)
    hooked.old = 1
    hooked.register_forward_hook(lambda module, args, output: setattr(module, "seen", output))
    for foreign, left in ((True, ["seen"]), (False, [])):
        before = [list(vars(module)) for module in (hooked, other)]
        attributes = Attributes([hooked, other], foreign=foreign)
        hooked(torch.rand(1, 2))
        hooked.old, other.seen = 2, 3
        attributes.restore()
        assert [list(vars(module)) for module in (hooked, other)] == [before[0] + left, before[1]]
        assert hooked.old == 1
        hooked.__dict__.pop("seen", None)


class Counting(nn.Module):
    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return x + self.steps


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("make", [torch.jit.script, lambda model: torch.jit.trace(model, torch.ones(3))])
def test_buffers_of_torchscript_are_put_back(make: Callable[[nn.Module], nn.Module]) -> None:
    model = make(Counting())
    before = model.steps.clone()
    for _ in range(2):
        with undisturbed(model, graph=False):
            model(torch.ones(3))
    assert torch.equal(model.steps, before)
