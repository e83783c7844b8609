"""Where the samples of a batch lie in a tensor, the calls of a model's modules, and when two passes agree."""

import inspect
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from multicam.watch.module_calls import (
    ModuleCall,
    Rows,
    alike,
    confirmed,
    every_call,
    rounding,
    skipping,
    where,
    within,
)
from tests.helpers.counting import counted

LAYOUTS = [(1, False), (3, False), (3, True)]


def laid(samples: list[Tensor], axis: int, apart: bool) -> Tensor:
    """Samples `(each c)` side by side along an axis, or as whole batches behind one another."""
    return torch.stack(samples, 1 if apart else 0).flatten(0, 1).movedim(0, axis)


@pytest.mark.parametrize(("each", "apart"), LAYOUTS)
@pytest.mark.parametrize("axis", [0, 1])
def test_rows_of_one_sample_wherever_they_lie(axis: int, each: int, apart: bool) -> None:
    one = [torch.rand(each, 2) for _ in range(4)]
    found = Rows(4, axis, each, apart).copies(laid(one, axis, apart), 2, 5)
    assert torch.equal(found, laid([one[2]] * 5, axis, apart))


@pytest.mark.parametrize(("each", "apart"), LAYOUTS)
@pytest.mark.parametrize("axis", [0, 1])
def test_rows_of_several_samples_wherever_they_lie(axis: int, each: int, apart: bool) -> None:
    one = [torch.rand(each, 2) for _ in range(4)]
    found = Rows(4, axis, each, apart).take(laid(one, axis, apart), [3, 0, 3])
    assert torch.equal(found, laid([one[3], one[0], one[3]], axis, apart))


def test_a_tensor_without_samples_stays_as_it_is() -> None:
    x = torch.rand(4, 2)
    assert Rows(4).take(x, [1, 1]) is x
    assert Rows(4).copies(x, 1, 7) is x


@pytest.mark.parametrize(("each", "apart"), LAYOUTS)
@pytest.mark.parametrize("axis", [0, 1])
def test_another_size_of_the_batch_tells_where_the_samples_lie(axis: int, each: int, apart: bool) -> None:
    one = [torch.rand(each, 2) for _ in range(4)]
    x, again = (laid(samples, axis, apart) for samples in (one, [one[2], one[0], one[2]]))
    assert where(x, again, 4, [2, 0, 2], None) == [Rows(4, axis, each, apart)]
    assert where(x, again, 4, [2, 0, 1], None) == []
    assert where(x, again, 4, [2, 0, 2], [Rows(4, axis, each, not apart)]) == []
    assert where(x, again.double(), 4, [2, 0, 2], None) == where(x, again[..., None], 4, [2, 0, 2], None) == []


def test_one_sample_may_lie_in_two_ways_until_another_pass_decides() -> None:
    one = [torch.rand(3, 2) for _ in range(4)]
    x = laid(one, 0, apart=True)
    assert where(x, one[1], 4, [1], None) == [Rows(4, 0, 3, True)]
    either = [Rows(4, 0, 3, False), Rows(4, 0, 3, True)]
    assert where(torch.ones(12, 2), torch.ones(3, 2), 4, [1], None) == either


def test_tensors_that_do_not_grow_must_be_equal() -> None:
    x = torch.rand(5, 2)
    assert where(x, x.clone(), 4, [2], None) == [Rows(4)]
    assert where(x, x + 1, 4, [2], None) == []
    assert where(torch.rand(4, 4), torch.rand(2, 2), 4, [0, 1], None) == []  # two axes grow
    assert where(torch.rand(4, 2), torch.rand(3, 2), 4, [0, 1], None) == []  # but not as the batch does


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(2, 2), nn.Sequential(nn.Tanh(), nn.Linear(2, 2))

    def forward(self, x: Tensor, *, twice: bool = False) -> Tensor:
        y = self.inner(x)
        return self.outer(self.inner(input=y) if twice else y)


def test_every_call_is_told_with_its_number_what_it_was_given_and_what_it_returned() -> None:
    model, x = Nested(), torch.rand(3, 2)
    told: list[tuple[str, int]] = []
    given, returned, ended = [], [], []
    names = {module: name for name, module in model.named_modules()}

    def begin(call: ModuleCall, what: object) -> None:
        told.append((names[call.module], call.index))
        given.append(what)

    def end(call: ModuleCall, output: object) -> None:
        ended.append(call.key)
        returned.append(output)

    with torch.no_grad(), every_call(model, begin, end):
        output = model(x, twice=True)
    inner = model.inner(x)
    assert told == [("", 0), ("inner", 0), ("inner", 1), ("outer", 0), ("outer.0", 0), ("outer.1", 0)]
    assert given[0][0][0] is x and given[0][1] == {"twice": True}
    assert torch.equal(given[2][1]["input"], inner) and given[2][0] == ()
    assert torch.equal(returned[0], inner) and returned[-1] is output  # calls end from the inside out
    parts = [model.inner, model.inner, *model.outer, model.outer, model]
    assert ended == [(id(module), index) for module, index in zip(parts, [0, 1, 0, 0, 0, 0], strict=True)]
    told.clear()
    model(x)
    assert told == []


def test_recorded_calls_do_not_run_and_those_inside_them_count_as_seen() -> None:
    model, x = Nested(), torch.rand(3, 2)
    key = id(model.outer), 0
    record = ModuleCall(model.outer, 0, output=torch.ones(3, 2), inside=Counter([id(model.outer), id(model.outer[1])]))
    second = ModuleCall(model.outer[1], 1, output=torch.full((3, 2), 7.0), inside=Counter([id(model.outer[1])]))
    calls = {key: record, (id(model.outer[1]), 1): second}
    with torch.no_grad(), counted(model) as runs, skipping(calls, lambda call: call.output + 1):
        first = model(x)
        again = model(x)  # the second call of `outer` runs, and that of what is inside is recorded
    assert torch.equal(first, torch.full((3, 2), 2.0))
    assert torch.equal(again, torch.full((3, 2), 8.0))
    assert runs == {"": 2, "inner": 2, "outer": 1, "outer.0": 1}
    assert torch.equal(model(x), model.outer(model.inner(x)))


def test_hooks_are_told_of_a_call_that_does_not_run_and_what_they_make_of_it_goes_on() -> None:
    model, x = Nested(), torch.rand(3, 2)
    told = []
    model.outer.register_forward_pre_hook(lambda module, args: told.append(args[0]))
    model.outer.register_forward_hook(lambda module, args, output: told.append(output))
    model.outer.register_forward_hook(lambda module, args, output: 3 * output)
    record = ModuleCall(model.outer, 0, output=torch.ones(3, 2), inside=Counter([id(model.outer)]))
    with torch.no_grad(), counted(model) as runs, skipping({record.key: record}, lambda call: call.output):
        found = model(x)
    assert runs == {"": 1, "inner": 1}
    assert torch.equal(told[0], model.inner(x)) and told[1] is record.output
    assert torch.equal(found, torch.full((3, 2), 3.0))


def test_a_hook_that_calls_another_module_before_one_that_does_not_run() -> None:
    model, x = Nested(), torch.rand(3, 2)
    seen = []
    model.outer.register_forward_pre_hook(lambda module, args: seen.append(model.inner(x + 1)))
    record = ModuleCall(model.outer, 0, output=torch.ones(3, 2), inside=Counter([id(model.outer)]))
    third = ModuleCall(model.inner, 2, output=torch.zeros(3, 2), inside=Counter([id(model.inner)]))
    with torch.no_grad(), skipping({record.key: record, third.key: third}, lambda call: call.output):
        found = model(x)
    assert torch.equal(seen[0], model.inner(x + 1)) and torch.equal(found, torch.ones(3, 2))


def test_a_forward_of_an_instances_own_is_skipped_looks_the_same_and_comes_back() -> None:
    class Looking(Nested):
        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) if "scale" in inspect.signature(self.inner.forward).parameters else x

    model, x = Looking(), torch.rand(3, 2)

    def own(x: Tensor, scale: float = 2.0) -> Tensor:
        return scale * x

    model.inner.forward = own
    record = ModuleCall(model.inner, 0, output=torch.ones(3, 2), inside=Counter([id(model.inner)]))
    with skipping({record.key: record}, lambda call: call.output):
        assert torch.equal(model(x), torch.ones(3, 2))
    assert vars(model.inner)["forward"] is own and "_call_impl" not in vars(model.inner)


def test_modules_run_again_after_whatever_was_raised() -> None:
    model = Nested()
    with pytest.raises(KeyError), skipping({(id(model.outer), 0): ModuleCall(model.outer, 0)}, lambda call: {}["none"]):
        model(torch.rand(3, 2))
    assert not any({"_call_impl", "forward"} & vars(module).keys() for module in model.modules())


def test_a_record_is_confirmed_tensor_by_tensor() -> None:
    x, one = torch.rand(4, 2), torch.rand(2)
    record = ModuleCall(nn.Identity(), 0, output={"x": x, "one": one, "name": "relu"})
    again = {"x": x[[2, 2, 0]], "one": one.clone(), "name": "relu"}
    assert confirmed(record, again, 4, [2, 2, 0]) == {"x": [Rows(4, 0)], "one": [Rows(4)]}
    assert confirmed(record, again | {"name": "gelu"}, 4, [2, 2, 0]) is None
    assert confirmed(record, again | {"more": one}, 4, [2, 2, 0]) is None
    assert confirmed(record, again | {"one": one + 1}, 4, [2, 2, 0]) is None
    assert confirmed(record, again | {"one": one + 1}, 4, [2, 2, 0], but="one") == {"x": [Rows(4, 0)]}
    record.rows = {"x": [Rows(4, 1)]}  # where an earlier pass found them
    assert confirmed(record, again, 4, [2, 2, 0]) is None


def test_scores_are_equal_up_to_a_tolerance_that_is_a_number() -> None:
    x = torch.tensor([1.0, torch.nan])
    assert within(x, x + 0.1, 0.2)
    assert not within(x, x + 0.3, 0.2)
    assert not within(x, x + 0.1, float("inf")) and not within(x, x + 0.1, float("nan"))
    assert within(x, x.clone(), float("nan"))


def test_masks_filled_with_the_lowest_number_do_not_hide_a_difference() -> None:
    lowest = torch.finfo(torch.float32).min
    x, y = torch.tensor([0.0, 1.0, lowest]), torch.tensor([0.0, 1.1, lowest])
    assert alike(x, x.clone())
    assert not alike(x, y)
    assert alike(torch.tensor([1.0, torch.inf, torch.nan]), torch.tensor([1.0 + 1e-6, torch.inf, torch.nan]))
    assert not alike(torch.tensor([1, 2]), torch.tensor([1, 3]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_what_differs_by_more_than_rounding_is_not_alike(dtype: torch.dtype) -> None:
    x = torch.ones(3, dtype=dtype)
    eps = torch.finfo(dtype).eps
    assert rounding(x) == pytest.approx(eps ** (2 / 3))
    assert alike(x + 2 * eps, x) and not alike(x + 4 * eps ** (2 / 3), x)
    assert rounding(x.long()) == 0
