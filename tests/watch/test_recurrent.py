"""Recurrent layers run without cuDNN where a gradient is wanted, and nothing else does."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from multicam import HiResCAM, gradient
from multicam.watch.undisturbed import undisturbed


class Refuses(torch.autograd.Function):
    """As cuDNN does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, training: bool) -> Tensor:
        ctx.fine = training or not torch.backends.cudnn.enabled
        return x * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        if not ctx.fine:
            raise RuntimeError("cudnn RNN backward can only be called in training mode")
        return gradients[0] * 2, None


class Recurrent(nn.RNNBase):
    """A layer that needs cuDNN off for its gradients; it raises what it is told to."""

    def __init__(self, raises: type[BaseException] | None = None) -> None:
        super().__init__("LSTM", 4, 4)
        self.raises, self.seen = raises, []

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        self.seen.append(torch.backends.cudnn.enabled)
        if self.raises:
            raise self.raises
        out: Tensor = Refuses.apply(x, self.training)
        return out


class Beside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(torch.backends.cudnn.enabled)
        return x


def net(recurrent: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), recurrent, nn.Linear(4, 2))


def test_gradients_are_those_of_the_layer_with_cudnn_off() -> None:
    model, x = net(Recurrent()), torch.rand(2, 3, 8, 8)
    plain = nn.Sequential(*[layer for layer in model if not isinstance(layer, Recurrent)])
    assert torch.equal(HiResCAM(model, "0")(x, 1, signed=True), 2 * HiResCAM(plain, "0")(x, 1, signed=True))
    torch.testing.assert_close(gradient(model, x, 1)["input"], 2 * gradient(plain, x, 1)["input"])
    assert torch.backends.cudnn.enabled


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("graph", [True, False])
def test_it_is_off_in_these_layers_only_and_with_a_graph_only(graph: bool, before: bool) -> None:
    seen: list[bool] = []
    recurrent = Recurrent()
    recurrent.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cudnn.enabled))
    beside = Beside()
    beside.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.enabled))
    torch._C._set_cudnn_enabled(before)
    try:
        with undisturbed(model := nn.Sequential(recurrent, beside, recurrent), graph):
            model(torch.rand(2, 4))
            assert (recurrent.seen, beside.seen) == ([before and not graph] * 2, [before])
            assert seen == [before and not graph, before, before and not graph]
        assert torch.backends.cudnn.enabled == before
    finally:
        torch._C._set_cudnn_enabled(True)
    assert len(recurrent._forward_pre_hooks) == 1 and not recurrent._forward_hooks and not recurrent.seen


@pytest.mark.parametrize("what", [ValueError, KeyboardInterrupt])
def test_it_is_on_again_where_the_layer_raises(what: type[BaseException]) -> None:
    model, inside = Recurrent(what), []
    with pytest.raises(what), undisturbed(model, graph=True):
        try:
            model(torch.rand(2, 4))
        finally:
            inside.append(torch.backends.cudnn.enabled)
    assert inside == [what is ValueError] and torch.backends.cudnn.enabled


@pytest.mark.parametrize("layer", [nn.RNN, nn.LSTM, nn.GRU])
def test_pytorchs_own_layers(layer: type[nn.RNNBase]) -> None:
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.read, self.head = nn.Conv1d(3, 4, 3), layer(4, 5, batch_first=True), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            states, _ = self.read(self.embed(x).mT)
            out: Tensor = self.head(states[:, -1])
            return out

    model, x = Reading(), torch.rand(2, 3, 9, requires_grad=True)
    expected = torch.autograd.grad(model(x)[:, 1].sum(), x)[0]
    torch.testing.assert_close(gradient(model, x, 1, wrt="x")["x"], expected)
