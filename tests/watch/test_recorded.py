"""What a record keeps of a pass, with which colours, and what another pass confirms of it."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from multicam import Inputs, contribution
from multicam.watch.module_calls import ModuleCall, Rows, confirmed
from multicam.watch.recorded import Confirming, Recording
from multicam.watch.trace import Trace
from multicam.watch.undisturbed import undisturbed
from tests.helpers import counting


class Pair(nn.Module):
    """An encoder for each input, the second of them two layers deep, and a head for what they found."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 4)
        self.b = nn.Sequential(nn.Linear(2, 4), nn.Tanh())
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(self.a(x) * self.b(y))


def pair(b: int = 3) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(b)
    return torch.rand(b, 3, generator=g), torch.rand(b, 2, generator=g)


def record(model: nn.Module, x: Tensor, y: Tensor, most: int = 1, both: bool = True) -> Recording:
    recording = Recording(model, most)
    with undisturbed(model, graph=False, call=Inputs(x, y)) as memory:
        recording.taint.mark(x, colours=1)
        recording.taint.mark(y, colours=2) if both else recording.taint.know([y])
        with recording.watch(memory):
            memory.call.run(model)
    return recording


def named(model: nn.Module, calls: Any) -> dict[tuple[str, int], Any]:
    paths = {id(module): path for path, module in model.named_modules()}
    return {(paths[module], index): value for (module, index), value in calls.items()}


@pytest.mark.parametrize(
    ("most", "both", "kept"),
    [
        (0, False, {("b", 0): 0}),
        (0, True, {}),
        (1, True, {("a", 0): 1, ("b", 0): 2}),
        (2, True, {("", 0): 3}),
    ],
    ids=["none marked", "all marked", "one each", "any"],
)
def test_the_outermost_calls_that_depend_on_few_enough_are_kept(
    most: int, both: bool, kept: dict[tuple[str, int], int]
) -> None:
    model = Pair()
    recording = record(model, *pair(), most, both)
    assert set(named(model, recording.calls)) == set(kept)
    colours = named(model, recording.colours)
    assert {name: colours[name] for name in kept} == kept


def test_a_kept_call_holds_what_it_returned_and_how_much_ran_in_it() -> None:
    model, (x, y) = Pair(), pair()
    call = named(model, record(model, x, y).calls)["b", 0]
    assert torch.equal(call.output, model.b(y))
    assert call.inside == {id(module): 1 for module in model.b.modules()}


def test_a_record_is_no_memory_of_the_models() -> None:
    class Overwriting(Pair):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            a = self.a(x)
            return self.head(a.mul_(0) + self.b(y))

    model, (x, y) = Overwriting(), pair()
    call = named(model, record(model, x, y).calls)["a", 0]
    assert torch.equal(call.output, model.a(x))


def test_the_calls_of_a_shared_module_are_told_apart() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enc = nn.Linear(3, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.enc(x) - self.enc(y)

    model, (x, _) = Shared(), pair()
    y = x + 1
    recording = record(model, x, y)
    assert named(model, recording.colours) == {("enc", 0): 1, ("enc", 1): 2}
    calls = named(model, recording.calls)
    assert torch.equal(calls["enc", 1].output, model.enc(y))


def test_what_is_touched_inside_a_call_colours_it_though_its_output_does_not_show_it() -> None:
    class Noting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen = torch.zeros(())

        def forward(self, y: Tensor) -> Tensor:
            self.seen.sum()
            return y + 1

    class Model(Pair):
        def __init__(self) -> None:
            super().__init__()
            self.noting = Noting()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            self.noting.seen = x
            return self.head(self.a(x) * self.b(self.noting(y)))

    model = Model()
    recording = record(model, *pair(), most=2)
    assert named(model, recording.colours)["noting", 0] == 3


class Leaving(nn.Linear):
    def forward(self, y: Tensor) -> Tensor:
        self.left = y.mean()
        return super().forward(y)


@pytest.mark.parametrize("inside", [False, True])
def test_a_call_that_leaves_something_behind_or_in_a_part_of_it_runs_again(inside: bool) -> None:
    model = Pair()
    model.b = nn.Sequential(Leaving(2, 4)) if inside else Leaving(2, 4)
    assert set(named(model, record(model, *pair()).calls)) == {("a", 0)}


@pytest.mark.parametrize("inside", [False, True])
def test_a_call_whose_parts_tell_somebody_else_runs_again_but_for_the_parts(inside: bool) -> None:
    model = Pair()
    (model.b[0] if inside else model.b).register_forward_hook(lambda module, args, output: None)
    kept = {("a", 0), ("b.0", 0), ("b.1", 0)} if inside else {("a", 0), ("b", 0)}
    assert set(named(model, record(model, *pair()).calls)) == kept


def test_lists_and_tensors_that_are_written_into_later_are_recorded_as_they_were() -> None:
    class Listing(nn.Module):
        def forward(self, y: Tensor) -> list[Tensor]:
            return [y + 1, y[:, :1]]

    class Model(Pair):
        def __init__(self) -> None:
            super().__init__()
            self.listing = Listing()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            found = self.listing(y)
            found[0].zero_()
            y.fill_(7)  # the second is a view of it
            found[1] = found[0]
            return self.head(self.a(x) * self.b(found[0]))

    model, (x, y) = Model(), pair()
    expected = [y + 1, y[:, :1].clone()]
    recorded = named(model, record(model, x, y).calls)["listing", 0].output
    assert all(map(torch.equal, recorded, expected)) and len(recorded) == 2


def test_a_call_that_returns_no_tensor_runs_again() -> None:
    class Model(Pair):
        def __init__(self) -> None:
            super().__init__()
            self.size = Size()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.head(self.a(x) * self.b(y)) / self.size(y)

    class Size(nn.Module):
        def forward(self, y: Tensor) -> int:
            return len(y)

    model = Model()
    assert set(named(model, record(model, *pair()).calls)) == {("a", 0), ("b", 0)}


class Tapped(nn.Module):
    """Gives the tap what it is about to return, and says which module does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 4)
        self.tap: Any = None
        self.names: nn.Module = self.inner

    def forward(self, y: Tensor) -> Tensor:
        found = self.inner(y)
        self.tap(found, self.names)
        return found


def run(model: nn.Module, recording: Recording) -> Tensor:
    with undisturbed(model, graph=False, call=Inputs(pair()[1])) as memory:
        recording.taint.know(memory.call.args)
        with recording.watch(memory):
            return memory.call.run(model)


def tapped(names_itself: bool) -> tuple[nn.Module, Recording, Tensor, list[ModuleCall | None]]:
    model = nn.Sequential(Tapped(), nn.Linear(4, 2))
    recording, started = Recording(model, most=0), []
    model[0].tap = lambda x, module: started.append(recording.start_at(x, module))
    vars(model[0])["names"] = model[0] if names_itself else model[0].inner
    return model, recording, run(model, recording), started


@pytest.mark.parametrize("kept", ["tapped", "tapped.inner"])
def test_a_call_in_which_the_marks_begin_is_not_kept_though_it_returns_something_else(kept: str) -> None:
    class Ignoring(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tapped = Tapped()

        def forward(self, y: Tensor) -> Tensor:
            self.tapped(y)
            return y + 1

    model = Ignoring()
    recording = Recording(model, most=0)
    model.tapped.tap, vars(model.tapped)["names"] = recording.start_at, model.get_submodule(kept)
    run(model, recording)
    assert set(named(model, recording.calls)) == {(kept, 0)}


def test_the_call_whose_output_is_marked_is_kept_and_what_follows_depends_on_it() -> None:
    model, recording, out, started = tapped(names_itself=True)
    calls = named(model, recording.calls)
    assert set(calls) == {("0", 0)}
    assert started == [calls["0", 0]]
    assert torch.equal(calls["0", 0].output, model[0].inner(pair()[1]))
    assert recording.taint.colours(out) == 1


def test_a_call_inside_that_returned_the_tensor_leaves_none_to_keep_around_it() -> None:
    model, recording, out, started = tapped(names_itself=False)
    assert started == [None]
    assert set(named(model, recording.calls)) == {("0.inner", 0)}  # it ended before the mark
    assert recording.taint.colours(out) == 1


def compare(record: ModuleCall, again: Any) -> dict[str, list[Rows]] | None:
    return confirmed(record, again, 3, [2])


def test_what_returns_the_same_again_is_confirmed_with_its_rows() -> None:
    model, (x, y) = Pair(), pair()
    recording = record(model, x, y)
    confirming = Confirming(model, recording.calls, compare)
    with torch.no_grad(), confirming.watch():
        model(x[2:], y[2:])
    assert {name: call.rows for name, call in named(model, confirming.calls).items()} == {
        ("a", 0): {"": [Rows(3, 0)]},
        ("b", 0): {"": [Rows(3, 0)]},
    }


def test_what_returns_something_else_or_does_not_run_is_not_confirmed() -> None:
    model, (x, y) = Pair(), pair()
    recording = record(model, x, y)
    confirming = Confirming(model, recording.calls, compare)
    with torch.no_grad(), confirming.watch():
        model(x[2:] + 1, y[2:])
    assert set(named(model, confirming.calls)) == {("b", 0)}
    with torch.no_grad(), (alone := Confirming(model, recording.calls, compare)).watch():
        model.a(x[2:])
    assert set(named(model, alone.calls)) == {("a", 0)}


@pytest.mark.parametrize("inside", [torch.float32, torch.bfloat16])
def test_the_coarsest_numbers_of_a_pass_say_what_rounding_is(inside: torch.dtype) -> None:
    class Coarse(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.to(inside)

    model = nn.Sequential(nn.Linear(2, 2), Coarse())
    confirming = Confirming(model, {}, compare)
    with torch.no_grad(), confirming.watch():
        model(torch.rand(1, 2))
    assert confirming.rounding == pytest.approx(torch.finfo(inside).eps ** (2 / 3))


KEPT: list[Tensor] = []


class LeavingOutside(nn.Linear):
    """Leaves what it returned where a model's own attributes are not, and somebody reads it there."""

    def __init__(self, where: str) -> None:
        super().__init__(4, 3)
        self.where = where

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if self.where == "global":
            KEPT[:] = [out]
        else:
            counting.kept = out  # type: ignore[attr-defined]
        return out


class ReadingOutside(nn.Module):
    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.a, self.b = where, LeavingOutside(where), nn.Linear(4, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a = self.a(x)
        kept = KEPT[0] if self.where == "global" else counting.kept  # type: ignore[attr-defined]
        return (a + kept.tanh()) * self.b(y)


@pytest.mark.filterwarnings("ignore:running (the fusion|a part) of ReadingOutside")
@pytest.mark.parametrize("where", ["global", "another module of Python"])
@pytest.mark.parametrize("b", [1, 2, 3])
def test_what_is_left_outside_of_the_model_is_never_another_samples(where: str, b: int) -> None:
    torch.manual_seed(0)
    model = ReadingOutside(where).eval()
    inputs = {name: torch.rand(b, 4) for name in "xy"}
    with torch.no_grad():
        v = {c: model(inputs["x"] * c[0], inputs["y"] * c[1])[:, 1] for c in product([0, 1], repeat=2)}
    sides = [v[1, 0] - v[0, 0] + v[1, 1] - v[0, 1], v[0, 1] - v[0, 0] + v[1, 1] - v[1, 0]]
    found = contribution(model, inputs, 1, players=["x", "y"])
    torch.testing.assert_close(found.shapley, torch.stack(sides, 1) / 2)
    trace = Trace(model, inputs, {}, 1)
    for sample in (*range(b), *range(b)):
        rows = torch.rand(6, 4)
        with torch.no_grad():
            model(torch.rand(2, 4), torch.rand(2, 4))  # somebody else's
            expected = model(inputs["x"][sample].expand(6, -1), rows)[:, 1]
            model(torch.rand(1, 4), torch.rand(1, 4))
        torch.testing.assert_close(trace.rescore({"y": rows}, sample), expected)
