"""The quiet pass restores what it changes, whatever happens in it, and modules are found by the paths that people read."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from multicam.errors import MulticamError
from multicam.watch.undisturbed import alone, find_module, module_paths, undisturbed, unwrapped


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
