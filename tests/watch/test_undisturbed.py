"""The quiet pass restores what it changes, whatever happens in it, and modules are found by the paths that people read."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor, nn

from multicam.call.inputs import Inputs
from multicam.errors import MulticamError
from multicam.watch.undisturbed import alone, find_module, module_paths, undisturbed, unwrapped
from tests.helpers.insides import changes, insides


class Stop(Exception):
    pass


@contextmanager
def ended(raises: bool) -> Iterator[None]:
    """A block that an error may end."""
    if raises:
        with pytest.raises(Stop):
            yield
    else:
        yield


def half_frozen() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    model[0].requires_grad_(False)
    model[1].eval()
    return model


def flags(model: nn.Module) -> tuple[list[bool], list[bool]]:
    return [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("graph", [True, False, None])
def test_flags_are_set_in_it_and_restored_one_by_one(graph: bool | None, raises: bool) -> None:
    model = half_frozen()
    before = flags(model)
    with ended(raises), undisturbed(model, graph):
        assert flags(model) == ([False] * 4, [False] * 4)
        if raises:
            raise Stop
    assert flags(model) == before


@pytest.mark.parametrize("raises", [False, True])
def test_buffers_are_the_same_objects_with_the_same_values(raises: bool) -> None:
    model = nn.BatchNorm2d(4)
    mean, var = model.running_mean, model.running_var
    with ended(raises), undisturbed(model, graph=False):
        model.running_mean.add_(1)
        model.running_var = torch.zeros(4)
        if raises:
            raise Stop
    assert model.running_mean is mean and model.running_var is var
    assert torch.equal(mean, torch.zeros(4)) and torch.equal(var, torch.ones(4))


@pytest.mark.parametrize("caller", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("graph", [True, False])
def test_its_modes_are_its_own(caller: type, graph: bool) -> None:
    with caller():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        with undisturbed(nn.ReLU(), graph):
            assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == (graph, False)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before


@pytest.mark.parametrize("caller", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_proxy_keeps_the_modes_of_its_caller_and_the_fast_path(caller: type) -> None:
    with caller():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        with undisturbed(nn.ReLU(), graph=None):
            assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
            assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("on", [True, False])
def test_the_fast_path_is_off_in_it_and_as_before_behind_it(on: bool) -> None:
    torch.backends.mha.set_fastpath_enabled(on)
    try:
        with undisturbed(nn.ReLU(), graph=False):
            assert not torch.backends.mha.get_fastpath_enabled()
        assert torch.backends.mha.get_fastpath_enabled() == on
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_another_thread_waits() -> None:
    order: list[str] = []

    def other() -> None:
        with alone():
            order.append("other")

    thread = threading.Thread(target=other)
    with undisturbed(nn.ReLU(), graph=False), alone():  # the same thread may enter again
        thread.start()
        thread.join(0.2)
        order.append("this")
    thread.join()
    assert order == ["this", "other"]


def test_a_compiled_model_runs_eagerly() -> None:
    import torch._dynamo  # what torch.compile has imported

    calls: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> object:
        calls.append(1)
        return graph

    compiled = torch.compile(nn.ReLU(), backend=backend)
    with undisturbed(unwrapped(compiled), graph=False):
        compiled(torch.rand(2))
    assert calls == []
    compiled(torch.rand(2))
    assert calls == [1]
    torch._dynamo.reset()


def test_parameters_that_can_have_no_gradient_are_refused_by_name() -> None:
    with (
        pytest.raises(MulticamError, match=r"0\.weight has no values yet"),
        undisturbed(nn.Sequential(nn.LazyLinear(3)), True),
    ):
        pass
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(2, 3))
    with (
        pytest.raises(MulticamError, match=r"0\.weight was made under torch.inference_mode"),
        undisturbed(model, False),
    ):
        pass


def test_wrappers_are_taken_off_and_their_marks_out_of_the_paths() -> None:
    inner = nn.Sequential(nn.ReLU())
    assert unwrapped(torch.compile(nn.DataParallel(inner))) is inner
    part = nn.Sequential(torch.compile(inner))
    assert list(module_paths(part)) == ["", "0", "0.0"]
    assert find_module(part, "0.0") is inner[0]
    with pytest.raises(MulticamError, match=r"no layer in Sequential '0\.1'; did you mean '0\.0'"):
        find_module(part, "0.1")


def test_gradients_are_the_same_objects_with_the_same_values() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(90, 90), nn.Linear(2, 2))
    for layer in list(model)[:2]:
        layer(torch.rand(2, layer.in_features)).sum().backward()
    before = insides(model, *(p.grad for p in model.parameters()))
    for _ in range(2):
        with undisturbed(model, graph=True):
            model.zero_grad()
            model[1].weight.grad = None
            model[2].weight.grad = torch.ones(2, 2)
    with undisturbed(model, graph=True, part="zero"):
        for p in model.parameters():
            if p.grad is not None:
                p.grad.zero_()
    assert changes(before, insides(model, *(p.grad for p in model.parameters()))) == []


def test_an_error_while_one_thing_is_put_back_keeps_nothing_else_from_it() -> None:
    model = nn.Sequential(nn.Linear(3, 2), Unyielding())
    state = torch.get_rng_state()
    with pytest.raises(Stop, match="no way back"), undisturbed(model, graph=False):
        torch.rand(3)
        model.train()
        model[1].kept.closed = True
    assert flags(model) == ([True] * 3, [True] * 2) and torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled() and torch.backends.mha.get_fastpath_enabled()


class Unyielding(nn.Module):
    """Holds a container that is not filled again."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = Unreadable([1])


class Unreadable(list[int]):
    closed = False

    def __len__(self) -> int:
        if self.closed:
            raise Stop("no way back")
        return super().__len__()


def test_what_could_not_be_put_back_is_told_with_the_error() -> None:
    model = nn.Sequential(nn.Linear(90, 90))
    with undisturbed(model, graph=False):
        pass
    with pytest.raises(Stop) as error, undisturbed(model, graph=False):
        model[0].weight.data.zero_()
        raise Stop
    assert "Sequential wrote into 0.weight where it was not seen" in error.value.__notes__[0]
    with pytest.warns(UserWarning, match=r"wrote into 0\.bias, gradient 0\.weight where"):
        second = nn.Sequential(nn.Linear(90, 5000))
        second(torch.rand(2, 90)).sum().backward()
        with undisturbed(second, graph=False):
            pass
        with undisturbed(second, graph=False):
            second[0].bias.data.zero_()
            second[0].weight.grad.data.zero_()


STEPS = {"n": 0}


class Outside(nn.Module):
    """Counts its passes where nobody puts it back, and may or may not use that."""

    def __init__(self, uses: bool) -> None:
        super().__init__()
        self.uses, self.head, self.passes = uses, nn.Linear(3, 2), 0

    def forward(self, x: Tensor) -> Tensor:
        STEPS["n"] += 1
        self.passes += 1
        out: Tensor = self.head(x) * (1 + self.uses * STEPS["n"])
        return out


@pytest.mark.parametrize("graph", [True, False])
def test_two_passes_that_differ_are_told_with_the_name_of_what_they_differ_by(graph: bool) -> None:
    model, x = Outside(uses=True), torch.rand(1, 3)

    def run() -> None:
        with undisturbed(model, graph, call=Inputs(x)) as memory:
            memory.call.run(model)

    STEPS["n"] = 0
    with pytest.warns(
        UserWarning, match="two passes of Outside with the same inputs differ.* its forward changes STEPS,"
    ):
        run()
    assert (STEPS["n"], model.passes) == (3, 0)
    # Each map carries its doubt; what-ifs are many.
    with pytest.warns(UserWarning, match="two passes of Outside") if graph else nullcontext():
        run()
    assert STEPS["n"] == 4


def test_a_count_outside_that_changes_no_score_is_no_doubt() -> None:
    model, x = Outside(uses=False), torch.rand(1, 3)
    STEPS["n"] = 0
    for _ in range(3):
        with undisturbed(model, True, call=Inputs(x)) as memory:
            memory.call.run(model)
    assert STEPS["n"] == 5


def test_layers_run_as_their_gradients_need_it_also_once_states_are_rewound() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.GRU(3, 3))
    before = [len(module._forward_pre_hooks) for module in model]
    with undisturbed(model, graph=True) as memory:
        during = [len(module._forward_pre_hooks) for module in model]
        memory.rewind()
        assert [len(module._forward_pre_hooks) for module in model] == during != before
    assert [len(module._forward_pre_hooks) for module in model] == before
