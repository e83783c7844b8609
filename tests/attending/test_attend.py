"""Recording under every mode that a model runs in, with nothing of the user's changed; and one pass with a target."""

import copy
import pickle
import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from multicam import MulticamError, rollout, tokens
from multicam.attending.attend import attention, record_attention
from tests.helpers.hygiene import Stop, assert_unchanged, raising, state
from tests.helpers.recorded_net import NAMES, Cross, Net, net, own_attention, pair

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
    # Under any dispatch mode torch multiplies a matrix that is not contiguous by another kernel where no graph is made.
    if mode in ("inference_mode", "no_grad"):
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


def test_a_model_goes_on_as_before() -> None:
    model, inputs = net(), pair()
    with record_attention(model) as att:
        out = model(*inputs)
    assert set(vars(inputs[0])) == set(vars(out)) == set()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(*inputs), out)
    assert len(att) == 3


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


class Scrambling(nn.Module):
    """Tokens of freq lose their places on the way to the keys; two layers read them."""

    def __init__(self) -> None:
        super().__init__()
        self.rgb, self.freq = nn.Conv2d(3, 8, 8, 8), nn.Conv2d(1, 8, 4, 4)
        self.first = nn.MultiheadAttention(8, 2, batch_first=True)
        self.second = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, rgb: Tensor, freq: Tensor) -> Tensor:
        x = self.rgb(rgb).flatten(2).mT
        keys = torch.fft.fft(self.freq(freq).flatten(2).mT).real
        keys = torch.cat([torch.zeros_like(keys[:, :1]), keys], 1)
        x = x + self.first(x, keys, keys)[0]
        return x + self.second(x, keys, keys)[0]


def test_streams_say_what_could_not_be_followed() -> None:
    inputs = {"rgb": torch.rand(2, 3, 32, 32), "freq": torch.rand(2, 1, 12, 20)}
    model = Scrambling()
    att = attention(model, inputs)
    with pytest.raises(MulticamError, match="no key of attention 'first#0' stands for input 'freq'"):
        att[0].heatmap("freq", query=(9, 9))
    streams: dict[str, tuple[str | None, str | None]] = dict.fromkeys(("first", "second"), (None, "freq"))
    said = attention(model, inputs, layouts={"freq": tokens(3, 5, prefix=1)}, streams=streams)
    assert said[0].describe() == "rgb 4 x 4 -> 1 own + freq 3 x 5"
    assert torch.equal(said[0].columns, said[1].columns)  # the same tokens
    assert len(said.between("rgb", "freq")) == 2
    grids = said[0].weights.mean(1)[:, 5, 1:].reshape(2, 1, 3, 5) * 15  # the token in row 1, column 1
    expected = F.interpolate(grids, (12, 20), mode="bilinear")[:, 0]
    assert torch.allclose(said[0].heatmap("freq", query=(9, 9)), expected, atol=1e-6)
    assert rollout(said).map("freq", query=5).shape == (2, 12, 20)


@pytest.mark.parametrize(
    ("streams", "layouts", "message"),
    [
        ({"frist": (None, "freq")}, {}, "no module in streams 'frist'; did you mean 'first'"),
        ({"first": (None, "freqs")}, {}, "no input in streams 'freqs'; did you mean 'freq'"),
        ({"first": (None, "freq")}, {}, r"whose layout is needed, too: layouts=\{'freq': tokens"),
        ({"first": (None, "freq")}, {"freq": tokens(3, 5)}, "takes 16 of them for a grid of 3 x 5"),
    ],
    ids=["module", "input", "no layout", "prefix"],
)
def test_streams_that_do_not_fit_are_refused(streams: Any, layouts: Any, message: str) -> None:
    inputs = {"rgb": torch.rand(2, 3, 32, 32), "freq": torch.rand(2, 1, 12, 20)}
    with pytest.raises(MulticamError, match=message):
        attention(Scrambling(), inputs, layouts=layouts, streams=streams)


@pytest.mark.parametrize("passes", [0, 1])
def test_blocks_that_end_out_of_order_are_refused_and_everything_is_as_before(passes: int) -> None:
    model = nn.TransformerEncoderLayer(8, 2, batch_first=True).eval()
    before = torch.backends.mha.get_fastpath_enabled(), len(model._forward_hooks)
    outer, inner = record_attention(model), record_attention(model)
    first, second = outer.__enter__(), inner.__enter__()
    for _ in range(passes):
        model(torch.rand(1, 5, 8))
    for block in (outer, inner):
        with pytest.raises(MulticamError, match="end in the reverse order of their beginnings"):
            block.__exit__(None, None, None)
    assert len(first) == len(second) == passes
    assert before == (torch.backends.mha.get_fastpath_enabled(), len(model._forward_hooks))
    with record_attention(model) as after:
        model(torch.rand(1, 5, 8))
    assert len(after) == 1


def test_an_error_in_a_block_is_told_and_not_the_order() -> None:
    model = nn.TransformerEncoderLayer(8, 2, batch_first=True).eval()
    outer, inner = record_attention(model), record_attention(model)
    outer.__enter__()
    inner.__enter__()
    assert not outer.__exit__(KeyError, KeyError("mine"), None)
    with record_attention(model):
        model(torch.rand(1, 5, 8))


def test_blocks_one_in_another_both_record() -> None:
    model = nn.TransformerEncoderLayer(8, 2, batch_first=True).eval()
    with record_attention(model) as outer:
        with record_attention(model) as inner:
            model(torch.rand(1, 5, 8))
        model(torch.rand(1, 5, 8))
    assert (len(outer), len(inner)) == (2, 1)
