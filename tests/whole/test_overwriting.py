"""Models that overwrite what their gradients need: the right gradients, for whoever asks, and the state as it was."""

import copy
from collections.abc import Callable

import captum.attr as captum
import pytest
import pytorch_grad_cam as pgc
import torch
import torchcam.methods as torchcam
from torch import Tensor, nn

from multicam import HiResCAM, MulticamError, PackedModel, Trace
from tests.helpers.engines import assert_close, pgc_raw

CLASS = 1
Write = Callable[[Tensor], object]


class Overwriting(nn.Module):
    """Two branches, a way to join them, and a head; `written(x, write)` is `x` after `write(x)`, in place or in a copy."""

    def __init__(self, join: Callable[["Overwriting", Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.rgb, self.ir = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(1, 8, 3, 1, 1)
        self.mixed, self.head = nn.Conv2d(8, 8, 3, 1, 1), nn.Linear(8, 5)
        self.join, self.in_place = join, True
        for name, count in (("state", 1), ("large", 1100)):  # one that is always copied, and one that is watched
            self.register_buffer(name, torch.full((8, count, 1), 0.5))

    def written(self, x: Tensor, write: Write) -> Tensor:
        written = x if self.in_place else x.clone()
        write(written)
        return written

    def forward(self, rgb: Tensor, ir: Tensor) -> Tensor:
        joined = self.join(self, self.rgb(rgb), self.ir(ir))
        return self.head(joined.mean((2, 3)))


class Square(torch.autograd.Function):
    """A function of the model's own that saves its input."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return 2 * x * gradient


def boxes(model: Overwriting, a: Tensor, b: Tensor) -> Tensor:
    """As heads of detectors decode."""
    y = model.mixed(a + b).sigmoid()
    y = model.written(y, lambda y: y[:, :2].mul_(2).sub_(0.5))
    return model.written(y, lambda y: y[:, 2:4].mul_(2).pow_(2))


def rectified(model: Overwriting, a: Tensor, b: Tensor) -> Tensor:
    return model.written((a + b).tanh(), torch.relu_)


def factors(model: Overwriting, a: Tensor, b: Tensor) -> Tensor:
    product = a * b
    return product + model.written(a, lambda x: x.add_(1)) * model.written(b, lambda x: x.copy_(x.flip(1)))


def squared_before(model: Overwriting, a: Tensor, b: Tensor) -> Tensor:
    squares = a**2
    return model.written(a, lambda x: x.mul_(3)) + squares + b


def behind_the_back(model: Overwriting, a: Tensor, b: Tensor) -> Tensor:
    """By `.data`, of which PyTorch counts no version."""
    y = (a + b).exp()
    squares = y * y
    model.written(y, lambda y: y.data.mul_(0.5))
    return squares


def several_at_once(model: Overwriting, a: Tensor, b: Tensor) -> Tensor:
    a, b = a.exp(), b.exp()
    return a * b + model.written(a, lambda x: torch._foreach_mul_([x], 2.0)) + model.written(b, lambda x: x.zero_())


def weights_of_attention(model: Overwriting, a: Tensor, b: Tensor) -> Tensor:
    queries, keys = a.flatten(2).mT, b.flatten(2).mT
    weights = (queries @ keys.mT).softmax(-1)
    first = weights @ keys
    masked = model.written(weights, lambda w: w[..., 0].zero_())
    return (first + masked @ keys).mT.unflatten(2, a.shape[2:])


def own_function(model: Overwriting, a: Tensor, b: Tensor) -> Tensor:
    joined = a + b
    squares = Square.apply(joined)
    return squares + model.written(joined, lambda x: x.clamp_(min=0))


def state_before(model: Overwriting, a: Tensor, b: Tensor) -> Tensor:
    """Written and then multiplied with, and put back before anybody asks for a gradient."""
    state = model.written(model.state, lambda s: s.mul_(0.5).add_(1))
    return (a + b) * state * model.written(model.large, lambda s: s.mul_(3))[:, :1]


def state_after(model: Overwriting, a: Tensor, b: Tensor) -> Tensor:
    product = (a + b) * model.state * model.large[:, :1]
    model.written(model.state, lambda s: s.mul_(0.5).add_(1))
    model.written(model.large, lambda s: s.data.mul_(3))
    return product


def weight_before(model: Overwriting, a: Tensor, b: Tensor) -> Tensor:
    """As weights are normalised in the forward pass."""
    weight = model.written(model.mixed.weight.detach(), lambda w: w.div_(w.norm()))
    return nn.functional.conv2d(a + b, weight, padding=1)


def gradient_inside(model: Overwriting, a: Tensor, b: Tensor) -> Tensor:
    """By `torch.func`, which runs under no hooks of saved tensors; nothing is overwritten."""
    return torch.func.grad(lambda x: (x**3).sum())(a + b)


JOINS = [boxes, rectified, factors, squared_before, behind_the_back, several_at_once, weights_of_attention, own_function,
         state_before, state_after, weight_before, gradient_inside]  # fmt: skip
every_join = pytest.mark.parametrize("join", JOINS, ids=lambda join: join.__name__)


def made(join: Callable[[Overwriting, Tensor, Tensor], Tensor]) -> tuple[Overwriting, dict[str, Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Overwriting(join).eval(), {"rgb": torch.rand(2, 3, 6, 6), "ir": torch.rand(2, 1, 6, 6)}


def by_hand(model: nn.Module, inputs: dict[str, Tensor], layer: str) -> tuple[Tensor, Tensor]:
    """Activations and gradients of a layer in a copy of the model that writes into copies."""
    twin = copy.deepcopy(model)
    twin.in_place = False
    kept: list[Tensor] = []
    twin.get_submodule(layer).register_forward_hook(lambda module, args, output: kept.append(output))
    (gradient,) = torch.autograd.grad(twin(**inputs)[:, CLASS].sum(), kept)
    return kept[0].detach(), gradient


def tapped(packed: PackedModel, x: Tensor) -> tuple[Tensor, Tensor]:
    """What a tool's hook on the first tap sees, long after the forward pass."""
    kept: list[Tensor] = []
    handle = packed.target_layers[0].register_forward_hook(lambda module, args, output: kept.append(output))
    scores = packed(x)
    handle.remove()
    (gradient,) = torch.autograd.grad(scores[:, CLASS].sum(), kept[-1])
    return kept[-1].detach(), gradient


@every_join
@pytest.mark.parametrize("layer", ["rgb", "ir"])
def test_everybody_gets_the_gradients_of_a_model_that_writes_into_copies(
    join: Callable[[Overwriting, Tensor, Tensor], Tensor], layer: str
) -> None:
    model, inputs = made(join)
    state = {name: x.clone() for name, x in model.state_dict().items()}
    acts, gradient = by_hand(model, inputs, layer)
    packed = PackedModel(model, inputs, layer)
    x = packed.pack(inputs)
    for _ in range(3):  # the first pass of a kind, and the others
        found = tapped(packed, x)
        torch.testing.assert_close(found, (acts, gradient))
        torch.testing.assert_close(Trace(model, inputs, {"it": layer}, CLASS).sites["it"].grads, gradient)
    for name, x in model.state_dict().items():
        assert torch.equal(x, state[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())


@every_join
def test_the_tools_agree_with_the_methods_of_multicam(join: Callable[[Overwriting, Tensor, Tensor], Tensor]) -> None:
    model, inputs = made(join)
    acts, gradient = by_hand(model, inputs, "ir")
    expected = (acts * gradient).sum(1)
    assert_close(HiResCAM(model, "ir").saliency(Trace(model, inputs, {"it": "ir"}, CLASS).sites["it"]), expected)
    packed = PackedModel(model, inputs, "ir")
    x, (tap,) = packed.pack(inputs), packed.target_layers
    assert_close(pgc_raw(pgc.HiResCAM, packed, tap, x), expected)
    products = captum.LayerGradientXActivation(packed, tap).attribute(x, CLASS)
    assert_close(products.sum(1).detach(), expected)
    with torchcam.LayerCAM(packed, tap) as extract:
        (found,) = extract(CLASS, packed(x), normalized=False)
    assert_close(found, (acts * gradient.relu()).sum(1).relu())


@every_join
def test_the_packed_tensor_has_the_gradients_of_its_inputs(
    join: Callable[[Overwriting, Tensor, Tensor], Tensor],
) -> None:
    model, inputs = made(join)
    twin = copy.deepcopy(model)
    twin.in_place = False
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    expected = torch.autograd.grad(twin(**leaves)[:, CLASS].sum(), list(leaves.values()))
    packed = PackedModel(model, inputs)
    x = packed.pack(inputs).requires_grad_()
    for _ in range(2):
        (found,) = torch.autograd.grad(packed(x)[:, CLASS].sum(), x)
        torch.testing.assert_close(found, torch.cat(expected, 1))


def test_a_second_derivative_goes_through_what_was_kept() -> None:
    model, inputs = made(boxes)
    twin = copy.deepcopy(model)
    twin.in_place = False
    kept: list[Tensor] = []
    twin.ir.register_forward_hook(lambda module, args, output: kept.append(output))
    packed = PackedModel(model, inputs, "ir")
    packed.target_layers[0].register_forward_hook(lambda module, args, output: kept.append(output))
    products = []
    for run in (lambda: twin(**inputs), lambda: packed(packed.pack(inputs))):
        (first,) = torch.autograd.grad(run()[:, CLASS].exp().sum(), kept[-1], create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), kept[-1])
        products.append(second)
    torch.testing.assert_close(products[1], products[0])


def test_only_a_model_that_overwrites_something_is_watched_in_every_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []
    enter = torch.autograd.graph.saved_tensors_hooks.__enter__
    monkeypatch.setattr(
        "torch.autograd.graph.saved_tensors_hooks.__enter__", lambda self: (begun.append("hooks"), enter(self))[1]
    )
    for join, passes in ((factors, 3), (state_before, 3), (lambda model, a, b: a + b, 1)):
        begun.clear()
        model, inputs = made(join)
        packed = PackedModel(model, inputs, "rgb")
        for _ in range(3):
            tapped(packed, packed.pack(inputs))
        assert len(begun) == passes


def test_what_is_overwritten_after_the_pass_is_refused() -> None:
    model, inputs = made(factors)
    packed = PackedModel(model, inputs, "rgb")
    scores = packed(packed.pack(inputs))
    with torch.no_grad():
        model.head.weight.mul_(2)
    with pytest.raises(
        MulticamError, match=r"shape \(8, 5\) that the gradient needs was written into after the forward"
    ):
        scores[:, CLASS].sum().backward()


def test_a_pass_without_a_graph_does_not_stand_for_one_with_a_graph() -> None:
    """As tools do that first ask for scores."""
    model, inputs = made(boxes)
    packed = PackedModel(model, inputs, "rgb")
    with torch.no_grad():
        packed(packed.pack(inputs))
    torch.testing.assert_close(tapped(packed, packed.pack(inputs)), by_hand(model, inputs, "rgb"))


def test_a_tap_further_on_does_not_stand_for_one_further_back() -> None:
    model, inputs = made(squared_before)
    late = PackedModel(model, inputs, "ir")  # what is overwritten does not depend on it
    tapped(late, late.pack(inputs))
    early = PackedModel(model, inputs, "rgb")
    acts, gradient = by_hand(model, inputs, "rgb")
    torch.testing.assert_close(tapped(early, early.pack(inputs)), (acts, gradient))
    x = late.pack(inputs).requires_grad_()  # now it starts at the packed tensor
    (found,) = torch.autograd.grad(late(x)[:, CLASS].sum(), x)
    expected = nn.functional.conv_transpose2d(gradient, model.rgb.weight, padding=1)
    torch.testing.assert_close(found[:, :3], expected)


class Masking(nn.Module):
    """What is masked, and overwritten for it, depends on the photo."""

    def __init__(self, in_place: bool = True) -> None:
        super().__init__()
        self.rgb, self.ir, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(1, 4, 3), nn.Linear(4, 3)
        self.register_buffer("count", torch.ones(4, 1, 1))
        self.in_place = in_place

    def forward(self, rgb: Tensor, ir: Tensor) -> Tensor:
        x, count = (self.rgb(rgb) + self.ir(ir)).exp(), self.count
        y = x * x
        if (rgb < 0.5).any():
            x = x.mul_(2) if self.in_place else x * 2
            count = count.add_(2) if self.in_place else count + 2
        return self.head((x * count + y).mean((2, 3)))


def test_a_pass_that_overwrites_what_the_first_did_not_is_run_again_and_all_later_ones_are_watched() -> None:
    model = Masking()
    twin = copy.deepcopy(model)
    twin.in_place = False
    ir = torch.rand(1, 1, 6, 6)
    packed = PackedModel(model, {"rgb": torch.ones(1, 3, 6, 6), "ir": ir}, "ir")
    for rgb in (torch.ones(1, 3, 6, 6), torch.zeros(1, 3, 6, 6), torch.ones(1, 3, 6, 6), torch.zeros(1, 3, 6, 6)):
        inputs = {"rgb": rgb, "ir": ir}
        acts, gradient = by_hand(twin, inputs, "ir")
        torch.testing.assert_close(tapped(packed, packed.pack(inputs)), (acts, gradient))
        torch.testing.assert_close(Trace(model, inputs, {"it": "ir"}, CLASS).sites["it"].grads, gradient)
        assert torch.equal(model.count, torch.ones(4, 1, 1))
