"""What a forward changes outside of its model is named."""

import itertools
import queue
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from multicam.watch.attributes import Attributes
from multicam.watch.outside import Outside

STEPS = 0
TABLE: dict[str, Any] = {}
HISTORY = torch.zeros(3)
OTHER = nn.BatchNorm1d(3)


def count() -> None:
    global STEPS
    STEPS += 1


class Global(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        TABLE["seen"] = x
        return x


class Helped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        count()
        return x


class Inner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return next(HISTORY.add_(1) for _ in range(1)) + x


class Class(nn.Module):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        return x


class ClassList(nn.Module):
    seen: list[Tensor] = []  # noqa: RUF012 (as people write)

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return x


class Module(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = OTHER(x)
        return out


class Property(nn.Module):
    @property
    def table(self) -> dict[str, Any]:
        return TABLE

    def forward(self, x: Tensor) -> Tensor:
        self.table[str(len(TABLE))] = x
        return x


class Derived(Class):
    pass


def around() -> nn.Module:
    steps, state = 0, {"potential": torch.zeros(3)}

    class Around(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            nonlocal steps
            steps += 1
            state["potential"] = state["potential"] + x.mean()
            return x

    return Around()


class Holding(nn.Module):
    def __init__(self, name: str, value: Any, use: Callable[[Any], Any]) -> None:
        super().__init__()
        setattr(self, name, value)
        self.use = lambda: use(value)

    def forward(self, x: Tensor) -> Tensor:
        self.use()
        return x


class Clean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(x) + len(TABLE) + HISTORY.sum()


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (Global, ["TABLE"]),
        (Helped, ["STEPS"]),
        (Inner, ["HISTORY"]),
        (Class, ["Class.calls"]),
        (Derived, []),  # it gets an attribute of its own
        (ClassList, ["ClassList.seen"]),
        (Module, [f"OTHER._buffers.{name}" for name in ("num_batches_tracked", "running_mean", "running_var")]),
        (Property, ["TABLE"]),
        (around, ["state", "steps"]),
        (lambda: Holding("steps", itertools.count(), next), ["0.steps"]),
        (lambda: Holding("rows", iter([1, 2]), next), ["0.rows"]),
        (lambda: Holding("queue", queue.Queue(), lambda q: q.put(1)), ["0.queue", "0.queue.queue"]),
        (lambda: Holding("local", threading.local(), lambda x: setattr(x, "y", 1)), ["0.local"]),
        (Clean, []),
        (nn.ReLU, []),
    ],
)
def test_what_a_pass_changes_outside(make: Callable[[], nn.Module], names: list[str]) -> None:
    model = make()
    modules = list(model.modules())
    outside = Outside(modules, Attributes(modules).left)
    assert outside.changed() == []
    model(torch.rand(4, 3))
    assert outside.changed() == names
    TABLE.clear()
