"""What a listener is told of a pass, in order; what it raises; and what it is not told."""

import warnings
from collections.abc import Callable, Mapping
from threading import Thread
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library, nn
from torch.utils.checkpoint import checkpoint

from multicam import MulticamError
from multicam.watch.tokens.follow import Follower, Listener, Place
from multicam.watch.tokens.fused import Scores
from multicam.watch.tokens.origins import Origins
from multicam.watch.tokens.written_out import Attended


class Heard:
    """Notes all that it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, ...]] = []
        self.given: list[Any] = []
        self.written: list[tuple[int, Tensor]] = []  # the address, and a copy of what was there

    def begin(self, module: nn.Module, given: Mapping[str, Tensor], batch: int, origins: Origins) -> None:
        self.told.append(("begin", type(module).__name__, *given, str(batch)))

    def writes(self, x: Tensor) -> None:
        self.written.append((x.data_ptr(), x.clone()))

    def fused(self, place: Place, scores: Scores, v: Tensor, output: Tensor, source: str) -> str:
        self.told.append(("fused", place.path, source))
        self.given.append((list(place.modules), scores, v, output))
        return f"a kernel's in {place.path}"

    def written_out(self, place: Place, found: Attended) -> str:
        self.told.append(("written_out", place.path))
        self.given.append((list(place.modules), found))
        return f"a product's in {place.path}"

    def add(self, made: str) -> None:
        self.told.append(("add", made))

    def no_attention(self, path: str, what: str) -> None:
        self.told.append(("no_attention", path, what))

    def hidden(self, path: str, what: str) -> None:
        self.told.append(("hidden", path, what))


class Kernel(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x[:, None], y[:, None], y[:, None])[:, 0]


class Product(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.mT / 2).softmax(-1) @ y


class Net(nn.Module):
    """x reads y by a kernel, then itself by written-out attention."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.product = Kernel(), Product()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = x + self.kernel(x, y)
        return x + self.product(x, x)


def pair(b: int = 2) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.rand(b, 5, 4, generator=g), torch.rand(b, 3, 4, generator=g)


def heard(
    model: nn.Module, *inputs: Tensor, listener: Heard | None = None, graph: bool = False
) -> tuple[Heard, Tensor]:
    listener = listener or Heard()
    with Follower(model, listener, graph).watch():
        out = model(*inputs)
    return listener, out


NET = [
    ("begin", "Net", "x", "y", "2"),
    ("fused", "kernel", "fused"),
    ("add", "a kernel's in kernel"),
    ("written_out", "product"),
    ("add", "a product's in product"),
]


def test_what_is_told_and_when() -> None:
    model = Net()
    assert isinstance(Heard(), Listener)
    listener, out = heard(model, *pair())
    assert listener.told == NET
    assert torch.equal(out, model(*pair()))
    with Follower(model, listener).watch():
        model(*pair(1))
        model.product(*pair())
    assert listener.told[5:] == [
        ("begin", "Net", "x", "y", "1"), *NET[1:], ("begin", "Product", "x", "y", "2"), *NET[3:]
    ]  # fmt: skip


def test_what_attended_is_told_with_its_numbers() -> None:
    model, (x, y) = Net(), pair()
    listener, _ = heard(model, x, y)
    (around, scores, v, output), (within, found) = listener.given
    assert around == [model, model.kernel] and within == [model, model.product]
    assert torch.equal(scores.q[:, 0], x) and torch.equal(scores.k[:, 0], y) and torch.equal(v[:, 0], y)
    assert torch.equal(output[:, 0], model.kernel(x, y))
    z = x + output[:, 0]
    torch.testing.assert_close(found.probs, (z @ z.mT / 2).softmax(-1))
    assert torch.equal(found.output.tensor, model.product(z, z))


def test_of_a_tensor_that_is_written_into_is_told_before_it_is() -> None:
    class Writing(Net):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            self.at = (z := x + 1).data_ptr()
            z.mul_(3)
            return super().forward(z, y)

    x, y = pair()
    model = Writing()
    listener, _ = heard(model, x, y)
    address, before = listener.written[0]
    assert address == model.at
    assert torch.equal(before, x + 1)


def test_what_nobody_watches_behind_the_pass_is_told_at_its_end() -> None:
    model, (x, y) = Net(), pair()
    model.register_buffer("cache", torch.ones(2))
    listener, _ = heard(model, x, y)
    assert [address for address, _ in listener.written] == [model.cache.data_ptr(), x.data_ptr(), y.data_ptr()]


class Softmax(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.softmax(-1) + 1


def test_a_softmax_that_multiplies_nothing_is_no_attention() -> None:
    listener, _ = heard(Softmax(), pair()[0])
    assert listener.told[1:] == [("no_attention", "", "softmax (2, 5, 4) whose result multiplies no values")]


@library.custom_op("example::following", mutates_args=())
def kernel_of_ones_own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


def test_a_kernel_that_takes_three_sequences_hides_what_it_does() -> None:
    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return kernel_of_ones_own(x, x, x)

    listener, _ = heard(Own(), pair()[0])
    assert listener.told[1:] == [("hidden", "", "the kernel example::following, whose inside cannot be seen")]


def raising(error: Exception, name: str) -> Heard:
    def raises(*args: Any) -> Any:
        raise error

    listener = Heard()
    setattr(listener, name, raises)
    return listener


def test_an_error_of_what_is_done_with_an_attention_is_heard() -> None:
    with pytest.raises(ZeroDivisionError):
        heard(Net(), *pair(), listener=raising(ZeroDivisionError(), "add"))


@pytest.mark.parametrize(("name", "path"), [("fused", "kernel"), ("written_out", "product")])
def test_an_error_of_following_stops_no_pass(name: str, path: str) -> None:
    listener = raising(RuntimeError("out of luck"), name)
    listener, out = heard(Net(), *pair(), listener=listener)
    assert torch.equal(out, Net()(*pair()))
    [(_, where, what)] = [told for told in listener.told if told[0] == "no_attention"]
    assert where == path
    assert what.endswith("on what may be attention, which could not be followed: out of luck")


@pytest.mark.parametrize("name", ["begin", "fused", "written_out"])
def test_what_the_user_said_wrongly_is_heard(name: str) -> None:
    with pytest.raises(MulticamError, match="does not fit"):
        heard(Net(), *pair(), listener=raising(MulticamError("does not fit"), name))


def test_a_pass_in_another_thread_is_not_seen() -> None:
    model, listener = Net(), Heard()
    outs: list[Tensor] = []
    with Follower(model, listener).watch():
        thread = Thread(target=lambda: outs.append(model(*pair())))
        thread.start()
        thread.join()
        assert listener.told == []
        model(*pair())
    assert listener.told == NET
    assert torch.equal(outs[0], model(*pair()))


def test_a_pass_that_raises_does_not_spoil_the_next() -> None:
    model, listener = Net(), Heard()
    with Follower(model, listener).watch():
        with pytest.raises(RuntimeError):
            model(pair()[0], torch.rand(2, 3, 7))
        listener.told.clear()
        model(*pair())
    assert listener.told == NET


@pytest.mark.parametrize("graph", [False, True])
def test_a_graph_begins_at_the_inputs_where_it_is_wanted(graph: bool) -> None:
    x, y = pair()
    listener, out = heard(Net(), x, y, graph=graph)
    assert out.requires_grad is graph
    assert not x.requires_grad and torch.equal(x, pair()[0])
    assert listener.told == NET


def test_nothing_is_told_behind_the_block_and_no_hook_stays() -> None:
    model, listener = Net(), Heard()
    with Follower(model, listener).watch():
        pass
    model(*pair())
    assert listener.told == []
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def in_vmap(model: nn.Module) -> None:
    torch.vmap(model)(*(x[:, None] for x in pair()))


def nested(model: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nested tensors are a prototype, once in a process
        x = torch.nested.nested_tensor([torch.rand(3, 4), torch.rand(5, 4)])
    model(x, x)


@pytest.mark.parametrize(
    ("run", "message"),
    [(in_vmap, r"Net runs inside of a transform of torch\.func"), (nested, "Net is given a nested tensor")],
)
def test_what_hides_the_tensors_of_a_pass_is_refused(run: Callable[[nn.Module], None], message: str) -> None:
    model = Net()
    with pytest.raises(MulticamError, match=message), Follower(model, Heard()).watch():
        run(model)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_torchscript_is_put_into_a_module_to_be_followed() -> None:
    model = torch.jit.script(nn.Linear(4, 4))
    with (
        pytest.raises(MulticamError, match=r"TorchScript.* torch.nn.Sequential\(model\)"),
        Follower(model, Heard()).watch(),
    ):
        pass
    with Follower(nn.Sequential(model), Heard()).watch():
        assert model(torch.rand(2, 4)).shape == (2, 4)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_is_told_and_another_operator_of_higher_order_hides_what_it_does() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    class Higher(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            q, k = (z[:, None].repeat(1, 1, 1, 4) for z in (x, y))
            out = flex_attention(q, k, k)[:, 0]
            return torch.cond(torch.tensor(True), torch.sin, torch.cos, (out,))

    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        listener, _ = heard(Higher(), *pair())
    assert listener.told[1:] == [
        ("fused", "", "flex"),
        ("add", "a kernel's in "),
        ("hidden", "", "the operator cond, whose inside cannot be seen"),
    ]


def test_what_runs_again_in_a_backward_pass_is_not_told() -> None:
    class Backward(Net):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            with torch.enable_grad():
                z = x.detach().requires_grad_()
                out = checkpoint(super().forward, z, y, use_reentrant=False)
                return torch.autograd.grad(out.sum(), z)[0]

    x, y = pair()
    listener, out = heard(Backward(), x, y)
    assert listener.told[1:] == NET[1:]
    assert torch.equal(out, Backward()(x, y))
