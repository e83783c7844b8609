"""Recording under every mode that a model runs in; nothing of the user's changed, and clear words where nothing can be seen."""

import copy
import gc
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from multicam import MulticamError
from multicam.attending.attend import attention, record_attention
from multicam.attending.attention_call import AttentionCall
from multicam.watch.tokens.fused import Scores
from tests.helpers.hygiene import Stop, assert_unchanged, raising, state


class Cross(nn.Module):
    """Attention of x to y: by the kernel, or written out."""

    def __init__(self, fused: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.fused, self.dropout, self.heads = fused, dropout, 2
        self.to_q, self.to_kv = nn.Linear(8, 8), nn.Linear(8, 16)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = (z.unflatten(-1, (2, 4)).transpose(1, 2) for z in (self.to_q(x), *self.to_kv(y).chunk(2, -1)))
        rate = self.dropout if self.training else 0.0
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=rate)
        else:
            out = F.dropout((q @ k.mT / 2).softmax(-1), rate, self.training) @ v
        return out.transpose(1, 2).flatten(2)


class Net(nn.Module):
    """A kernel, attention that is written out, and nn.MultiheadAttention."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.x, self.y = nn.Linear(4, 8), nn.Linear(3, 8)
        self.fused, self.written = Cross(True, dropout), Cross(False, dropout)
        self.mha = nn.MultiheadAttention(8, 2, dropout, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = self.x(x), self.y(y)
        x = x + self.fused(x, y)
        x = x + self.written(x, y)
        x = x + self.mha(x, x, x, need_weights=False)[0]
        return self.head(x.mean(1))


NAMES = ["fused#0", "written#0", "mha#0"]


def net(cls: type[nn.Module] = Net, **options: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return cls(**options).eval()


def pair(b: int = 2) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(b)
    return torch.randn(b, 5, 4, generator=g), torch.randn(b, 6, 3, generator=g)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "plain": nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic": lambda: torch.random.fork_rng(),
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_the_mode_that_the_caller_is_in(mode: str, inside: bool) -> None:
    model, inputs = net(), pair()
    with MODES[mode]():
        expected = model(*inputs)
    outer, inner = (nullcontext, MODES[mode]) if inside else (MODES[mode], nullcontext)
    with outer(), record_attention(model) as att, inner():
        out = model(*inputs)
    if (
        mode == "inference_mode"
    ):  # under any dispatch mode torch multiplies a matrix that is not contiguous by another kernel
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
    else:
        assert torch.equal(out, expected)
    assert [call.name for call in att] == NAMES
    exact = att if mode != "autocast" else []
    with record_attention(model) as plain:
        model(*inputs)
    for call, other in zip(att, plain, strict=True):
        torch.testing.assert_close(call.probs, other.probs, rtol=0, atol=1e-6 if exact else 2e-2, check_dtype=False)
        assert call.inputs() == other.inputs()
    if mode in ("no_grad", "inference_mode"):
        with pytest.raises(MulticamError, match=r"the score carries no gradient: run the model without torch.no_grad"):
            att.gradients(out.sum())
        with pytest.raises(MulticamError, match=r"'fused#0' has no gradient: it ran under no_grad: the caller's"):
            _ = att[0].grad
    else:
        att.gradients(out.float().square().sum())
        assert all(call.grad.isfinite().all() and call.grad.any() for call in att)


def test_training_with_dropout_is_the_same_run_and_says_why_there_is_no_gradient() -> None:
    model, inputs = net(dropout=0.5).train(), pair()
    torch.manual_seed(1)
    expected = model(*inputs)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    with record_attention(model) as att:
        out = model(*inputs)
    assert torch.equal(out, expected)
    assert torch.equal(torch.get_rng_state(), after)
    assert model.training
    att.gradients(out.sum())
    for call in att:
        torch.testing.assert_close(call.probs.sum(-1), torch.ones(2, 2, 5))
        assert not torch.equal(call.probs, call.weights), "the weights are what dropout left of the probabilities"
        assert call.grad.any()


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize(
    "compiled", [partial(torch.compile, backend="eager"), compiled_in_place], ids=["function", "in place"]
)
def test_compiled_models_run_eagerly(compiled: Callable[[nn.Module], Any]) -> None:
    model = net()
    expected = model(*pair())
    fast = compiled(model)
    torch.testing.assert_close(fast(*pair()), expected)
    with record_attention(fast) as att:
        out = fast(*pair())
    assert torch.equal(out, expected)
    assert [call.name for call in att] == NAMES
    att.gradients(out.sum())
    assert all(call.grad.any() for call in att)
    torch.testing.assert_close(fast(*pair()), expected)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool = False) -> None:
        super().__init__()
        self.net, self.reentrant = Net(), reentrant

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return checkpoint(self.net, x, y, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_parts(reentrant: bool) -> None:
    model = net(Checkpointed, reentrant=reentrant)
    x, y = (z.requires_grad_() for z in pair())
    with record_attention(model.net) as plain:
        plain.gradients(model.net(x, y).sum())
    with record_attention(model) as att:
        out = model(x, y)
    assert [call.name for call in att] == ["net." + name for name in NAMES]
    for call, other in zip(att, plain, strict=True):
        assert torch.equal(call.probs, other.probs)
    if reentrant:
        with pytest.raises(
            MulticamError, match=r"no recorded attention has a gradient: it ran under no_grad.*reentrant checkpoint"
        ):
            att.gradients(out.sum())
    else:
        att.gradients(out.sum())
        for call, other in zip(att, plain, strict=True):
            torch.testing.assert_close(call.grad, other.grad)
    with record_attention(model) as att:
        model(x, y).sum().backward()
    assert len(att) == 3, "a backward pass runs the part again, and that is no attention of the model's"


def test_a_shared_module_and_several_passes_are_counted() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = Cross(True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attn(self.attn(x, x), x)

    model = Shared()
    with record_attention(model) as att:
        model(torch.randn(1, 3, 8))
        model(torch.randn(2, 4, 8))
    assert [(call.name, call.forward.index, call.shape) for call in att] == [
        ("attn#0", 0, (1, 2, 3, 3)), ("attn#1", 0, (1, 2, 3, 3)), ("attn#0", 1, (2, 2, 4, 4)), ("attn#1", 1, (2, 2, 4, 4)),
    ]  # fmt: skip
    assert [forward.batch for forward in att.forwards] == [1, 2]
    assert len(att.find("attn#1")) == len(att[:2]) == 2
    with pytest.raises(
        MulticamError, match=r"4 attentions are called 'attn': attn#0 of pass 0, attn#1 of pass 0.*\.find\('attn'\)"
    ):
        att["attn"]
    with pytest.raises(MulticamError, match=r"2 attentions are called 'attn#1'.*of pass 1"):
        att["attn#1"]
    with pytest.raises(MulticamError, match=r"no attention 'atn'; did you mean 'attn'\?"):
        att["atn"]


def test_a_part_that_is_called_directly() -> None:
    model = net()
    with record_attention(model) as att:
        model.fused(torch.randn(2, 5, 8), torch.randn(2, 6, 8))
    assert [call.name for call in att] == ["fused#0"]
    assert att[0].inputs() == ({"x"}, {"y"})


def test_recordings_inside_of_recordings() -> None:
    model, other = net(), net(Cross, fused=True)
    z = torch.randn(2, 5, 8)
    with record_attention(model) as outer:
        with record_attention(model.fused) as inner:
            out = model(*pair())
        model(*pair())
        with record_attention(other) as beside:
            other(z, z)
    assert [call.name for call in outer] == NAMES * 2
    assert [call.name for call in inner] == ["#0"]
    assert len(beside) == 1
    assert torch.equal(inner[0].probs, outer[0].probs)
    outer.gradients(out.sum())
    inner.gradients(out.sum())
    assert torch.equal(inner[0].grad, outer[0].grad)


def test_what_the_user_hooked_stays_and_runs() -> None:
    model, seen = net(), []
    model.fused.register_forward_hook(lambda m, args, out: seen.append("hook") or out * 2)
    model.fused.register_forward_pre_hook(lambda m, args: (args[0] + 1, args[1]))
    expected = model(*pair())
    seen.clear()
    with record_attention(model) as att:
        out = model(*pair())
    assert seen == ["hook"]
    assert torch.equal(out, expected)
    q, k = model.fused.to_q(model.x(pair()[0]) + 1), model.fused.to_kv(model.y(pair()[1]))[..., :8]
    q, k = (z.unflatten(-1, (2, 4)).transpose(1, 2) for z in (q, k))
    torch.testing.assert_close(att["fused"].probs, (q @ k.mT / 2).softmax(-1))


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("when", ["normal", "model raises", "interrupted", "block raises", "target raises"])
def test_everything_is_left_as_it_was(when: str, gradients: bool) -> None:
    model = net(dropout=0.3).train()
    model.fused.eval()
    for parameter in model.y.parameters():
        parameter.requires_grad_(False)
    x, y = pair()
    model.written.register_forward_hook(lambda m, i, o: None)
    model(x, y).sum().backward()
    stops = {"model raises": Stop, "interrupted": KeyboardInterrupt}
    if when in stops:
        model.mha.register_forward_hook(raising(stops[when]))
    torch.set_num_threads(1)
    fast = torch.backends.mha.get_fastpath_enabled()
    before = state(model, {"x": x, "y": y})

    def run() -> None:
        if when == "target raises":
            attention(model, (x, y), raising(Stop))
        with torch.random.fork_rng(), record_attention(model, gradients=gradients):
            model(x, y)
            if when == "block raises":
                raise Stop

    if when == "normal":
        run()
    else:
        with pytest.raises(stops.get(when, Stop)):
            run()
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    assert_unchanged(before, state(model, {"x": x, "y": y}))
    if when in ("normal", "block raises", "target raises"):
        with record_attention(model) as att:
            model(x, y)
        assert [call.name for call in att] == NAMES


def test_an_exception_in_one_pass_does_not_spoil_the_next() -> None:
    model = net()
    with record_attention(model) as att:
        with pytest.raises(RuntimeError):
            model(pair()[0], torch.randn(2, 6, 5))
        model(*pair())
    assert [call.name for call in att] == NAMES
    assert [call.forward.index for call in att] == [1] * 3


def test_a_pass_in_another_thread_is_not_seen_and_one_beside_does_not_disturb() -> None:
    model, other = net(), net()

    def in_thread(run: Callable[[], Any]) -> None:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    with (
        pytest.raises(MulticamError, match=r"no forward pass of Net ran inside the block in this thread"),
        record_attention(model),
    ):
        in_thread(lambda: model(*pair()))
    with record_attention(model) as att:
        in_thread(lambda: other(*pair()))
        model(*pair())
    assert [call.name for call in att] == NAMES


def test_no_pass_at_all() -> None:
    with (
        pytest.raises(MulticamError, match=r"no forward pass of Net ran inside the block.*call the model inside of it"),
        record_attention(net()),
    ):
        pass


def test_data_parallel_models_on_the_cpu_run_in_this_thread() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.DataParallel(net())
    with record_attention(model) as att:
        model(*pair())
    assert [call.name for call in att] == NAMES


class Scripted(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x)


def own_attention(x: Tensor) -> Tensor:
    return torch.softmax(x @ x.transpose(-2, -1), -1) @ x


class Own(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return own_attention(x)


@pytest.mark.parametrize("how", ["script", "trace", "script function", "trace function"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_torchscript_is_seen(how: str) -> None:
    x = torch.randn(2, 5, 4)
    compile_ = torch.jit.script if how.startswith("script") else lambda f: torch.jit.trace(f, (x,))
    part = compile_(own_attention if how.endswith("function") else Own())
    model = Scripted(part) if isinstance(part, nn.Module) else Scripted(nn.Identity())
    if not isinstance(part, nn.Module):
        model.forward = lambda x: part(x)
    expected = model(x)
    with record_attention(model) as att:
        out = model(x)
    assert torch.equal(out, expected)
    assert att[0].shape == (2, 1, 5, 5)
    torch.testing.assert_close(att[0].probs[:, 0], (x @ x.mT).softmax(-1))


def test_exported_and_traced_graphs_are_seen() -> None:
    model = net()
    exported = torch.export.export(model, pair()).module()
    symbolic = torch.fx.symbolic_trace(Own())
    with record_attention(exported) as att:
        exported(*pair())
    with record_attention(model) as plain:
        model(*pair())
    for call, other in zip(att, plain, strict=True):
        torch.testing.assert_close(call.probs, other.probs)
    with record_attention(symbolic) as att:
        symbolic(torch.randn(2, 5, 4))
    assert att[0].source == "softmax"


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def test_an_autograd_function_is_seen_and_has_no_gradient() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Straight.apply(x)

    with record_attention(Model()) as att:
        out = att.model(torch.randn(2, 1, 5, 4, requires_grad=True))
    assert att[0].source == "fused"
    with pytest.raises(MulticamError, match=r"no recorded attention has a gradient: .*an autograd.Function's"):
        att.gradients(out.sum())


@library.custom_op("example::attention", mutates_args=())
def custom_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


def test_custom_kernels_are_blind_spots() -> None:
    class Model(nn.Module):
        def __init__(self, alone: bool) -> None:
            super().__init__()
            self.part = Scripted(Own())
            self.alone = alone

        def forward(self, x: Tensor) -> Tensor:
            y = custom_attention(x, x, x)
            return y if self.alone else self.part(y)

    with record_attention(Model(False)) as att:
        att.model(torch.randn(2, 5, 4))
    assert [(unseen.path, unseen.what) for unseen in att.blind_spots] == [
        ("", "the kernel example::attention, whose inside cannot be seen")
    ]
    with (
        pytest.raises(
            MulticamError, match=r"no attention that could be seen; what looked like it:\n  .*example::attention"
        ),
        record_attention(model := Model(True)),
    ):
        model(torch.randn(2, 5, 4))


def test_transforms_are_refused() -> None:
    model = net()
    x, y = pair()
    message = r"Net runs inside of a transform of torch\.func \(vmap, grad.*: call the model itself"
    with pytest.raises(MulticamError, match=message), record_attention(model):
        torch.func.vmap(model)(x[:, None], y[:, None])
    with pytest.raises(MulticamError, match=message), record_attention(model):
        torch.func.grad(lambda x: model(x, y).sum())(x)


def test_nested_tensors_are_refused() -> None:
    model = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    for layout in (torch.strided, torch.jagged):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            x = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)], layout=layout)
        with (
            pytest.raises(MulticamError, match=r"is given a nested tensor.*or padded samples with a mask"),
            torch.no_grad(),
            record_attention(model),
        ):
            model(x, x, x, need_weights=False)


class Flex(nn.Module):
    def __init__(self, score_mod: Any = None, block_mask: Any = None, **options: Any) -> None:
        super().__init__()
        self.score_mod, self.block_mask, self.options = score_mod, block_mask, options

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Any:
        q, k, v = (t.unflatten(-1, (-1, 16)).transpose(1, 2) for t in (x, y, z))
        return flex_attention(q, k, v, self.score_mod, self.block_mask, **self.options)


SLOPES = torch.tensor([0.5, 0.1, -0.3, 1.0])


def sloped(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return score + SLOPES[h] * (q - k) + 0.1 * b


def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


def none_at_first(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q > 1) & (k < 4)


@pytest.mark.parametrize(
    ("mod", "mask", "groups", "keep"),
    [
        (None, None, 2, "lazy"),
        (sloped, causal, 1, "lazy"),
        (sloped, none_at_first, 2, "probs"),
        (None, causal, 1, "probs"),
    ],
    ids=["plain", "changed", "dead rows", "causal"],
)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_seen(mod: Any, mask: Any, groups: int, keep: Any) -> None:
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, n, 16 * heads, generator=g) for heads, n in ((4, 5), (4 // groups, 7), (4 // groups, 7))]
    block_mask = None if mask is None else create_block_mask(mask, None, None, 5, 7, device="cpu")
    model = Flex(mod, block_mask, enable_gqa=groups > 1, scale=0.3)
    expected = model(*inputs)
    with record_attention(model, keep=keep) as att:
        out = model(*inputs)
    assert torch.equal(out, expected)
    (call,) = att
    assert (call.source, call.shape, call.mask, att.blind_spots) == ("flex", (2, 4, 5, 7), "a function", [])
    assert call.inputs() == ({"x"}, {"y"})
    torch.testing.assert_close(call.probs @ call.values.repeat_interleave(groups, 1), out, rtol=0, atol=1e-6)
    if mask is none_at_first:
        assert (call.probs[:, :, :2] == 0).all() and (call.probs[..., 4:] == 0).all()


def test_other_operators_of_higher_order_are_blind_spots() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, own_attention, torch.sin, (x,))

    with (
        torch.no_grad(),
        pytest.raises(MulticamError, match="the operator cond, whose inside cannot be seen"),
        record_attention(model := Model()),
    ):
        model(torch.rand(2, 5, 4))


def test_a_model_goes_on_as_before() -> None:
    model, inputs = net(), pair()
    with record_attention(model) as att:
        out = model(*inputs)
    assert set(vars(inputs[0])) == set(vars(out)) == set()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(*inputs), out)
    assert len(att) == 3


@pytest.mark.parametrize("keep", ["lazy", "probs"])
def test_memory_is_given_back_with_the_record(keep: Any) -> None:
    model, inputs = net(), pair()
    with record_attention(model, keep=keep) as att:
        out = model(*inputs)
    att.gradients(out.sum())
    held = [weakref.ref(att[i].differentiated) for i in range(3)] + [weakref.ref(call) for call in att]
    del att, out
    gc.collect()
    assert [ref() for ref in held] == [None] * 6


def test_a_function_keeps_what_it_returns_and_nothing_else() -> None:
    model, refs = net(), []

    def reduce(call: AttentionCall) -> tuple[str, Tensor]:
        assert all(ref() is None for ref in refs[:-3]), "what earlier passes made is gone"
        refs.append(weakref.ref(call.values))
        return call.name, call.probs.mean(1)

    with torch.no_grad(), record_attention(model, keep=reduce) as att:
        for _ in range(4):
            model(*pair())
    assert [name for name, _ in att.kept] == NAMES * 4
    assert all(mean.shape[:2] == (2, 5) for _, mean in att.kept)
    with pytest.raises(
        MulticamError,
        match=r"matrices of attention 'fused#0' are gone: only what keep=… returned was kept, in Attention.kept",
    ):
        _ = att[0].probs
    with pytest.raises(MulticamError, match=r"has no gradient: only what keep=… returned was kept"):
        _ = att[0].grad
    gc.collect()
    assert [ref() for ref in refs] == [None] * 12


def test_a_function_that_raises_is_heard() -> None:
    with pytest.raises(Stop), record_attention(model := net(), keep=raising(Stop)):
        model(*pair())


class Overwriting(nn.Module):
    """Writes into what attention is made of, once it has run."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = ((x * scale).unflatten(-1, (2, 4)).transpose(1, 2) for scale in (1, 2, 3))
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            p = (q @ k.mT / 2).softmax(-1)
            out = p @ v
            p[..., 0] = 0
        q[:, 0] += 1
        k.view(k.shape).zero_()
        v.copy_(torch.ones_like(v))
        return out


@pytest.mark.parametrize("keep", ["lazy", "probs"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_model_that_writes_into_what_was_kept(fused: bool, keep: Any, mode: Any) -> None:
    x = torch.randn(2, 3, 8)
    model = Overwriting(fused)
    with mode(), record_attention(model, keep=keep) as att:
        for _ in range(2):
            model(x)
    heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
    for call in att:
        torch.testing.assert_close(call.probs, (heads @ heads.mT).softmax(-1))
        torch.testing.assert_close(call.weights, call.probs)
        assert torch.equal(call.values, heads * 3)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_fast_path_of_transformers_is_off_only_in_the_block(mode: Any) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 5, 8)
    with mode(), record_attention(model) as att:
        out = model(x)
    assert [call.name for call in att] == ["layers.0.self_attn#0", "layers.1.self_attn#0"]
    assert att.blind_spots == []
    with mode():
        torch.testing.assert_close(out, model(x), rtol=0, atol=1e-6)
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_native_kernel_is_a_blind_spot() -> None:
    class Native(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            own, out = self.mha, self.mha.out_proj
            given = own.in_proj_weight, own.in_proj_bias, out.weight, out.bias
            return own_attention(torch._native_multi_head_attention(x, x, x, 8, 2, *given)[0])

    with torch.no_grad(), record_attention(Native().eval()) as att:
        att.model(torch.randn(2, 5, 8))
    assert len(att) == 1
    assert [unseen.what for unseen in att.blind_spots] == [
        "the kernel aten::_native_multi_head_attention, whose inside cannot be seen"
    ]


def test_a_kernel_that_drops_has_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of CUDA do; on the CPU none does."""
    of = Scores.of
    monkeypatch.setattr(Scores, "of", lambda *args: replace(of(*args), dropout=0.5))
    with record_attention(net(Cross, fused=True)) as att:
        out = att.model(torch.randn(2, 5, 8), torch.randn(2, 6, 8))
    with pytest.raises(MulticamError, match=r"has a gradient: the kernel dropped.*\(dropout\); call model\.eval\(\)"):
        att.gradients(out.sum())


def test_attention_between_inputs_that_do_not_meet() -> None:
    class Apart(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return own_attention(x).sum() + own_attention(y).sum()

    with record_attention(Apart()) as att:
        att.model(torch.randn(2, 5, 4), torch.randn(2, 3, 4))
    assert len(att.between("x", "x")) == 1
    with pytest.raises(MulticamError, match=r"no attention of 'x' to 'y' was seen:\nattention +source.*\n#0 +softmax"):
        att.between("x", "y")
    with pytest.raises(MulticamError, match=r"no input 'z'"):
        att.between("x", "z")


def test_attention_under_an_inner_transform_is_seen() -> None:
    class Ensemble(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return own_attention(torch.vmap(own_attention)(x))

    x = torch.randn(2, 5, 4)
    with record_attention(Ensemble()) as att:
        out = att.model(x)
    assert torch.equal(out, att.model(x))
    assert [call.shape for call in att] == [(2, 1, 5, 5)] * 2
    torch.testing.assert_close(att[0].probs[:, 0], (x @ x.mT).softmax(-1))


def test_a_model_whose_layers_are_made_in_its_first_pass() -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LazyLinear(4)

        def forward(self, x: Tensor) -> Tensor:
            return own_attention(self.layer(x))

    with record_attention(Lazy()) as att:
        att.model(torch.randn(2, 5, 8))
    assert att[0].shape == (2, 1, 5, 5)


def test_a_record_of_one_pass_with_a_target() -> None:
    model, inputs = net(), pair()
    frozen = copy.deepcopy(model).requires_grad_(False).train()
    found = attention(model, inputs, 1)
    other = attention(frozen, inputs, 1)
    assert frozen.training
    torch.testing.assert_close(found.output, model(*inputs), rtol=0, atol=1e-6)
    with record_attention(model) as att:
        out = model(*inputs)
    att.gradients(out[:, 1])
    for a, b, c in zip(found, other, att, strict=True):
        torch.testing.assert_close(a.grad, c.grad)
        torch.testing.assert_close(b.grad, c.grad)
    with torch.inference_mode():
        assert attention(model, inputs, 1)[0].grad.any()
    with pytest.raises(MulticamError, match=r"'fused#0' has no gradient: .* that of attention.…. without a target"):
        _ = attention(model, inputs)[0].grad


def test_a_layer_that_takes_the_sequence_first_has_no_places() -> None:
    """Its first axis would pass for samples."""
    with torch.no_grad(), record_attention(nn.MultiheadAttention(8, 2)) as att:
        att.model(*[torch.rand(5, 3, 8)] * 3, need_weights=False)
    (call,) = att
    assert call.shape == (3, 2, 5, 5)
    with pytest.raises(MulticamError, match="could not be followed which tokens its queries are"):
        call.dense(call.probs)
