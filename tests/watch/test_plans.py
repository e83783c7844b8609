"""What was proved of one call holds for later ones of its kind, and for no others."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from multicam import Inputs, contribution
from multicam.watch.plans import Plan, kind_of, planned_pass, plans_of
from tests.helpers.counting import counted


class Pair(nn.Module):
    """Two encoders, which a flag exchanges, and a fusion."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 3), nn.Linear(4, 3), nn.Bilinear(3, 3, 2)
        self.swap, self.order, self.config = False, ["xy"], SimpleNamespace(swap=False)

    turned = False

    def forward(self, x: Tensor, y: Tensor, half: bool = False) -> Tensor:
        if self.swap or self.config.swap or self.order[0] == "yx" or self.turned:
            x, y = y, x
        return self.head(self.a(x), self.b(y) / (2 if half else 1))


def by_hand(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    rest = {name: x for name, x in inputs.items() if not isinstance(x, Tensor)}
    with torch.no_grad():
        v = {
            some: model(inputs["x"] * some[0], inputs["y"] * some[1], **rest)[:, 1]
            for some in product([0, 1], repeat=2)
        }
    first, second = v[1, 0] - v[0, 0] + v[1, 1] - v[0, 1], v[0, 1] - v[0, 0] + v[1, 1] - v[1, 0]
    return torch.stack([first, second], 1) / 2


def fresh() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    return Pair().eval(), {name: torch.rand(1, 4) for name in "xy"}


def shares(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return contribution(model, inputs, 1, players=["x", "y"]).shapley


def test_the_second_call_of_a_kind_has_no_proof() -> None:
    model, inputs = fresh()
    runs = []
    for _ in range(3):
        with counted(model) as counts:
            torch.testing.assert_close(shares(model, inputs), by_hand(model, inputs))
        runs.append(counts["a"])
    assert runs[0] > runs[1] == runs[2]


def weights(model: Pair) -> None:
    with torch.no_grad():
        model.a.weight.mul_(2)


def data(model: Pair) -> None:
    model.b.weight.data = -model.b.weight.data


def flag(model: Pair) -> None:
    model.swap = True


def hook(model: Pair) -> None:
    model.a.register_forward_hook(lambda module, args, output: output.square())


def module(model: Pair) -> None:
    model.b = nn.Linear(4, 3)


def setting(model: Pair) -> None:
    model.config.swap = True


def listed(model: Pair) -> None:
    model.order[0] = "yx"


def of_the_class(model: Pair) -> None:
    model.__class__ = type("Turned", (Pair,), {"turned": True})


@pytest.mark.parametrize("change", [weights, data, flag, hook, module, setting, listed, of_the_class])
def test_no_plan_holds_for_a_model_that_changed(change: Callable[[Pair], None]) -> None:
    model, inputs = fresh()
    shares(model, inputs)
    change(model)
    for _ in range(2):
        torch.testing.assert_close(shares(model, inputs), by_hand(model, inputs))


def test_plain_values_of_inputs_tell_kinds_apart() -> None:
    model, inputs = fresh()
    for half in (False, True, False):
        call = {**inputs, "half": half}
        torch.testing.assert_close(shares(model, call), by_hand(model, call))
    kinds = {kind_of(model, Inputs(**inputs, half=half)) for half in (False, True)}
    assert len(kinds) == 2
    assert kind_of(model, Inputs(**inputs, half=object())) is None


class Deciding(Pair):
    """What a value decides, no plan holds."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if bool(x.mean() > y.mean()):
            x, y = y, x
        return self.head(self.a(x), self.b(y))


class ByWeight(Pair):
    """The same for a weight, which nobody marks."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.a.weight.sum().item() > 0:
            x, y = y, x
        return self.head(self.a(x), self.b(y))


def test_what_a_weight_decides_no_plan_holds() -> None:
    torch.manual_seed(0)
    model, inputs = ByWeight().eval(), {name: torch.rand(1, 4) for name in "xy"}
    for _ in range(3):
        torch.testing.assert_close(shares(model, inputs), by_hand(model, inputs))
        model.a.weight.data = -model.a.weight.data


def test_where_a_value_decides_there_is_no_plan() -> None:
    torch.manual_seed(0)
    model = Deciding().eval()
    for scale in (0.1, 10.0, 0.1):
        inputs = {"x": torch.rand(1, 4) * scale, "y": torch.rand(1, 4)}
        torch.testing.assert_close(shares(model, inputs), by_hand(model, inputs))
    assert not plans_of(model)


def test_an_encoder_may_return_more_than_tensors() -> None:
    class Told(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, str, None]:
            return super().forward(x), "encoded", None

    model, _ = fresh()
    model.a, read = Told(4, 3), model.head.forward
    model.head.forward = lambda a, b: read(a[0], b)
    for _ in range(3):
        inputs = {name: torch.rand(1, 4) for name in "xy"}
        torch.testing.assert_close(shares(model, inputs), by_hand(model, inputs))


def test_a_planned_pass_keeps_copies_of_what_its_plan_says() -> None:
    model, inputs = fresh()
    call = Inputs(**inputs).bind(model)
    key = (id(model.a), 0)
    counts = Counter({id(module): 1 for module in model.modules()})
    plan = Plan({key: 1}, {key: Counter({id(model.a): 1})}, 3, counts)
    kept: list[Tensor] = []
    model.a.register_forward_hook(lambda module, args, output: kept.append(output))
    found = planned_pass(model, call, plan)
    assert found is not None and torch.equal(found[0], model(**inputs))
    (record,) = found[1].values()
    assert torch.equal(record.output, kept[0]) and record.output.data_ptr() != kept[0].data_ptr()
    assert not record.output.requires_grad and record.inside == plan.inside[key]
    assert planned_pass(model, call, replace(plan, counts=counts + Counter({id(model.b): 1}))) is None
