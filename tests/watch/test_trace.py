"""One observed forward pass: right whatever the model does, and nothing left behind."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from multicam import GradCAM, HiResCAM, Inputs, MulticamError, Trace
from tests.helpers.models import Captioned, Fusion, Siamese, fusion_inputs, seeded

X = torch.rand(2, 3, 16, 16)


def autograd_truth(model: nn.Module, layer: nn.Module, call: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """Activation and gradient of a layer of an out-of-place model, by a hook and autograd alone."""
    kept = []
    handle = layer.register_forward_hook(lambda m, i, o: kept.append(o))
    scores = call()
    handle.remove()
    return kept[0].detach(), torch.autograd.grad(scores.sum(), kept[0])[0]


def without_in_place(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return model


def test_activations_gradients_and_scores_are_autograds_own() -> None:
    model, inputs = seeded(Fusion), fusion_inputs()
    trace = Trace(model, inputs, {"rgb": "rgb.net.3", "depth": "depth.net.1"}, 2)
    # As in a trace, no parameter requires a gradient: PyTorch multiplies tokens with a weight by another kernel where one does.
    plain = without_in_place(seeded(Fusion)).requires_grad_(False)
    followed = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    for name, layer in {"rgb": plain.rgb.net[3], "depth": plain.depth.net[1]}.items():
        acts, grads = autograd_truth(plain, layer, lambda: plain(**followed)[:, 2])
        assert torch.equal(trace.sites[name].acts, acts)
        assert torch.allclose(trace.sites[name].grads, grads, rtol=1e-5, atol=1e-8)
    assert torch.equal(trace.scores, plain(**inputs)[:, 2])
    assert torch.equal(trace.output, model.requires_grad_(False)(**inputs))


def test_an_operation_in_place_behind_the_layer_cannot_reach_the_record() -> None:
    """A plain hook sees what the in-place ReLU made of the batch norm's output."""
    model = seeded(Fusion)
    site = Trace(model, fusion_inputs(), {"rgb": "rgb.net.1"}, 0).sites["rgb"]
    assert site.acts.min() < 0
    assert (site.grads[site.acts < 0] == 0).all()


def test_in_place_arithmetic_between_two_calls_of_one_module() -> None:
    model = seeded(Siamese)
    inputs = {"before": X, "after": X.flip(-1)}
    sites = Trace(model, inputs, {"0": "encoder#0", "1": "encoder#1"}, 1).sites
    assert torch.equal(sites["0"].acts, model.encoder(X))
    assert torch.equal(sites["1"].acts, model.encoder(X.flip(-1)))
    # The head is linear and sees 2 (after - before).
    assert torch.allclose(sites["0"].grads, -sites["1"].grads)


def test_gradients_are_lazy_and_the_sites_of_a_trace_share_them() -> None:
    calls = []

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            calls.append(1)
            return g

    trace = Trace(
        seeded(Fusion), fusion_inputs(), {"rgb": "rgb", "depth": "depth"}, lambda out: Counted.apply(out)[:, 0]
    )
    assert not calls
    first = trace.sites["rgb"].grads
    assert trace.sites["rgb"].grads is first
    assert trace.sites["depth"].grads.any()
    assert len(calls) == 1


def test_no_graph_before_the_first_layer_and_none_to_parameters() -> None:
    seen: list[bool] = []
    model = seeded(Fusion)
    model.rgb.net[0].register_forward_hook(lambda m, i, o: seen.append(o.requires_grad))
    model.head.register_forward_hook(lambda m, i, o: seen.append(o.requires_grad))
    trace = Trace(model, fusion_inputs(), {"attn": "attn"}, 0)
    assert seen[-2:] == [False, True] and not any(seen[:-2])  # the pass that tells the places has none at all
    trace.sites["attn"].grads.sum()
    assert all(p.grad is None for p in model.parameters())


def test_a_trace_frees_its_graph_without_waiting_for_the_collector() -> None:
    import gc
    import weakref

    gc.disable()
    try:
        trace = Trace(seeded(Fusion), fusion_inputs(), {"rgb": "rgb"}, 0)
        alive = weakref.ref(trace._records["rgb"])
        _ = trace.sites["rgb"].acts
        del trace
        assert alive() is None
    finally:
        gc.enable()


@contextmanager
def autocast() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16):
        yield


@pytest.mark.parametrize("around", [nullcontext, torch.no_grad, torch.inference_mode], ids=lambda c: c.__name__)
@pytest.mark.parametrize("frozen", ["nothing", "rgb", "everything"])
def test_frozen_models_and_the_callers_no_grad(around: Callable[[], AbstractContextManager[Any]], frozen: str) -> None:
    model = seeded(Fusion)
    expected = HiResCAM(model, {"rgb": "rgb", "attn": "attn"})(fusion_inputs(), 1, signed=True)
    for parameter in {"nothing": [], "rgb": model.rgb.parameters(), "everything": model.parameters()}[frozen]:
        parameter.requires_grad_(False)
    with around():
        inputs = {name: x.clone() for name, x in fusion_inputs().items()}
        maps = HiResCAM(model, {"rgb": "rgb", "attn": "attn"})(inputs, 1, signed=True)
    for name, reference in expected.items():
        assert torch.equal(maps[name], reference)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_precisions_give_float_maps_close_to_float32(dtype: torch.dtype) -> None:
    model, inputs = seeded(Fusion), fusion_inputs()
    expected = HiResCAM(model, {"rgb": "rgb"})(inputs, 1, signed=True)["rgb"]
    cast = {name: x.to(dtype) for name, x in inputs.items()}
    found = HiResCAM(model.to(dtype), {"rgb": "rgb"})(cast, 1, signed=True)["rgb"]
    assert found.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    assert torch.corrcoef(torch.stack([found.float().flatten(), expected.flatten()]))[0, 1] > 0.999


def test_autocast() -> None:
    model, inputs = seeded(Fusion), fusion_inputs()
    expected = HiResCAM(model, {"rgb": "rgb"})(inputs, 1, signed=True)["rgb"]
    with autocast():
        found = HiResCAM(model, {"rgb": "rgb"})(inputs, 1, signed=True)["rgb"]
    assert found.dtype == torch.float32
    assert torch.corrcoef(torch.stack([found.flatten(), expected.flatten()]))[0, 1] > 0.999


def test_training_mode_and_batch_statistics_stay_the_users() -> None:
    model = seeded(Fusion).train()
    model.rgb.eval()
    flags = [module.training for module in model.modules()]
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    maps = GradCAM(model, {"rgb": "rgb.net.3"})(fusion_inputs(), 1, signed=True)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in model.named_buffers())
    assert torch.equal(maps["rgb"], GradCAM(model.eval(), {"rgb": "rgb.net.3"})(fusion_inputs(), 1, signed=True)["rgb"])


def test_a_compiled_model_runs_eagerly_and_stays_compiled() -> None:
    model, inputs = seeded(Fusion), fusion_inputs()
    expected = HiResCAM(model, {"rgb": "rgb.net.3"})(inputs, 1, signed=True)["rgb"]
    compiled = torch.compile(model, backend="eager")
    compiled(**inputs)
    assert torch.equal(HiResCAM(compiled, {"rgb": "rgb.net.3"})(inputs, 1, signed=True)["rgb"], expected)
    assert torch.allclose(compiled(**inputs), model(**inputs))
    part = seeded(Fusion)
    part.rgb = torch.compile(part.rgb, backend="eager")
    part(**inputs)
    assert torch.equal(HiResCAM(part, {"rgb": "rgb.net.3"})(inputs, 1, signed=True)["rgb"], expected)
    in_place = seeded(Fusion)
    in_place.rgb.compile(backend="eager")
    in_place(**inputs)
    assert torch.equal(HiResCAM(in_place, {"rgb": "rgb.net.3"})(inputs, 1, signed=True)["rgb"], expected)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:.*jit.*:FutureWarning")
def test_torchscript_inside_says_so() -> None:
    model = nn.Sequential(
        torch.jit.trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), X), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    with pytest.raises(MulticamError, match=r"layer '0\.0' .* was never called.*TorchScript runs it out of sight"):
        GradCAM(model, "0.0")(X)


def test_outputs_and_held_leaves_of_a_model_with_text() -> None:
    model = seeded(Captioned)
    ids, mask = torch.randint(0, 50, (2, 7)), torch.ones(2, 7, dtype=torch.int64)
    cam = HiResCAM(model, {"image": "image"}, output="logits")
    maps = cam({"image": X, "ids": ids, "mask": mask}, 1, signed=True)
    assert maps["image"].shape == (2, 16, 16)
    assert torch.equal(maps["image"], cam(Inputs(X, ids), 1, signed=True)["image"])
    with pytest.raises(MulticamError, match=r"'logits' \(2, 3\), 'features' \(2, 16, 4, 4\)"):
        HiResCAM(model, "image")({"image": X, "ids": ids}, 1)


class Cut(nn.Module):
    """A convolution whose way to the output is cut in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.conv, self.other = how, nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "no_grad":
            with torch.no_grad():
                y = self.conv(x)
        else:
            y = self.conv(x)
        y = {"detached": y.detach(), "argmax": y.argmax(1, True).float(), "unused": 0 * y.detach()}.get(self.how, y)
        return y.mean((2, 3)) + self.other(x).mean((2, 3))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no_grad", "runs under the model's own torch.no_grad"),
        ("detached", "depends on layer 'conv', but not by a gradient.*detached"),
        ("argmax", "depends on layer 'conv', but not by a gradient"),
        ("unused", "does not depend on layer 'conv'"),
    ],
)
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "beside a sound layer"])
def test_a_missing_gradient_is_explained(how: str, message: str, alone: bool) -> None:
    model = Cut(how).eval()
    layers = {"conv": "conv"} if alone else {"other": "other", "conv": "conv"}
    with pytest.raises(MulticamError, match=message):
        _ = Trace(model, X, layers, 0).sites["conv"].grads
    assert Trace(model, X, layers, 0).sites["conv"].acts.any()
    if not alone:
        with pytest.raises(MulticamError, match=message):
            HiResCAM(model, layers)(X, 0)


class Halver(nn.Module):
    """Drops half of the samples while training, as stochastic depth does."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (2.0 * (torch.rand(len(x), 1, 1, 1) > 0.5)) if self.training else x


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), Halver(), nn.ReLU())
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.block, self.conv(x), use_reentrant=False).mean((2, 3)))


def test_a_part_that_is_computed_again_is_computed_the_same() -> None:
    model = seeded(Checkpointed).train()
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    grads = Trace(model, X, {"conv": "conv"}, 1).sites["conv"].grads
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in model.named_buffers())
    truth = autograd_truth(model.eval(), model.conv, lambda: model(X)[:, 1])[1]
    assert torch.allclose(grads, truth, atol=1e-7)
    with pytest.raises(MulticamError, match="gradient_checkpointing_disable"):
        _ = Trace(model, X, {"inside": "block.0"}, 1).sites["inside"].grads


def test_layers_inside_a_fused_transformer_encoder() -> None:
    """The fast path calls none of them and turns padded batches into nested tensors."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 16, 4, 4)
            layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True), nn.Linear(16, 5)

        def forward(self, image: Tensor, mask: Tensor) -> Tensor:
            tokens = self.patches(image).flatten(2).mT
            return self.head(self.encoder(tokens, src_key_padding_mask=mask)[:, 0])

    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[1, 12:] = True
    model = seeded(Encoder)
    fast = torch.backends.mha.get_fastpath_enabled()
    for layer in ("encoder.layers.0", "encoder.layers.1.norm1"):
        acts, grads = autograd_truth(model, model.get_submodule(layer), lambda: model(X, mask)[:, 1])
        expected = (grads * acts).sum(2).view(2, 1, 4, 4) * 16
        found = HiResCAM(model, {"image": layer})((X, mask), 1, signed=True)["image"]
        expected = torch.nn.functional.interpolate(expected, (16, 16), mode="bilinear", align_corners=False)[:, 0]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert torch.backends.mha.get_fastpath_enabled() is fast


def test_buffers_that_a_model_writes_to_are_put_back() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.register_buffer("seen", torch.zeros(()))
            self.register_buffer("last", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            out = self.conv(x).mean((2, 3))
            self.last = out[0].detach()
            return out

    model = seeded(Counting)
    last = model.last
    HiResCAM(model, "conv")(X, 1, signed=True)
    assert model.seen == 0
    assert model.last is last
    assert not last.any()


def test_parameters_that_cannot_be_used_are_named_and_flags_survive() -> None:
    lazy = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(2)).train()
    with pytest.raises(MulticamError, match=r"parameter 2\.weight has no values yet \(run the model once\)"):
        GradCAM(lazy, "0")(X, 1)
    with torch.inference_mode():
        frozen = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).train()
    with pytest.raises(MulticamError, match=r"parameter 0\.weight was made under torch\.inference_mode"):
        GradCAM(frozen, "0")(X, 1)
    assert lazy.training
    assert frozen.training


def test_threads_do_not_disturb_each_other() -> None:
    model = seeded(Siamese).train()
    inputs = {"before": X, "after": X.flip(-1)}
    cam = HiResCAM(model, {"before": "encoder#0"})
    expected = cam(inputs, 1, signed=True)["before"]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: cam(inputs, 1, signed=True)["before"], range(24)))
    assert all(torch.equal(maps, expected) for maps in found)
    assert all(module.training for module in model.modules())


def test_again_is_by_the_same_inputs_unless_told_otherwise() -> None:
    model, inputs = seeded(Fusion), fusion_inputs()
    trace = Trace(model, inputs, {"rgb": "rgb"}, 1, wrt=["rgb"])
    for again, names in ((trace.again(inputs), ["rgb"]), (trace.again(inputs, wrt=["depth"]), ["depth"])):
        leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        expected = torch.autograd.grad(model(**leaves)[:, 1].sum(), [leaves[name] for name in names])
        assert list(again.input_grads) == names
        for name, gradient in zip(names, expected, strict=True):
            torch.testing.assert_close(again.input_grads[name], gradient, rtol=1e-4, atol=1e-6)


def test_scores_of_changed_inputs_and_activations_are_those_of_plain_passes() -> None:
    model, inputs = seeded(Siamese), {"before": X, "after": X.flip(-1)}
    trace = Trace(model, inputs, {"1": "encoder#1"}, 1)
    rows = torch.rand(2, 3, 16, 16)
    expected = model(rows, inputs["after"][[1, 1]])[:, 1].detach()
    for _ in range(2):
        torch.testing.assert_close(trace.rescore({"before": rows}, 1), expected, rtol=1e-4, atol=1e-5)
    found = trace.sites["1"].rescore(trace.sites["1"].acts[1:], 1)
    torch.testing.assert_close(found, trace.scores[1:], rtol=1e-4, atol=1e-5)


def test_curvature_is_the_hessian_times_the_activations() -> None:
    class Powers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).pow(torch.arange(1, 5).view(-1, 1, 1)).sum((2, 3))

    for k in range(4):
        site = Trace(seeded(Powers), X, {"conv": "conv"}, k).sites["conv"]
        acts = site.acts[:, k]
        expected = torch.zeros_like(site.acts)
        expected[:, k] = (k + 1) * k * acts ** max(k, 1) if k else 0
        torch.testing.assert_close(site.curvature, expected)


def test_which_inputs_a_layer_sees_is_asked_without_a_graph() -> None:
    model = seeded(Fusion)
    trace = Trace(model, fusion_inputs(), {"rgb": "rgb", "attn": "attn"}, 1)
    graphs: list[bool] = []
    model.head.register_forward_hook(lambda m, i, o: graphs.append(torch.is_grad_enabled()))
    seen = {(name, input): trace.sees(name, input) for name in ("rgb", "attn") for input in ("rgb", "depth")}
    assert seen == {("rgb", "rgb"): True, ("rgb", "depth"): False, ("attn", "rgb"): True, ("attn", "depth"): True}
    assert graphs == [False]


def test_inputs_with_nan_that_nobody_wrote_into_take_no_other_pass_for_their_gradient() -> None:
    class Missing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x.nan_to_num()).square().mean((2, 3))

    x = X.clone()
    x[:, 0, 3] = torch.nan
    model = seeded(Missing)
    runs: list[int] = []
    model.conv.register_forward_hook(lambda m, i, o: runs.append(1))
    for written, passes in ((False, 1), (True, 2)):
        runs.clear()
        given = x.clone()
        Trace(model, given, {"conv": "conv"}, 1)
        runs.clear()
        trace = Trace(model, given, {"conv": "conv"}, 1)
        if written:
            given.zero_()
        acts, grads = trace.sites["conv"].acts, trace.sites["conv"].grads
        torch.testing.assert_close(grads[:, 1], 2 * acts[:, 1] / acts[0, 0].numel())
        assert len(runs) == passes
