"""Replayed scores are those of full forwards, and what does not depend on the change does not run."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torchvision
from architectures import ARCHITECTURES
from models import Branch, Captioned, Fusion, Siamese, fusion_inputs, seeded
from torch import Tensor, nn

from multicam import Inputs, Layer, MulticamError, Trace, stacked, tokens
from multicam.layers import Taps, module_by_module
from multicam.replay import Rows
from multicam.reshape import positions
from multicam.targets import score, select_output, taken


def rows_of(trace: Trace, sample: int, n: int, values: Mapping[str, Tensor]) -> Inputs:
    """The call of `n` what-ifs written out, with no memory shared."""
    return trace.inputs.take([sample] * n).replace(values)


def full_scores(trace: Trace, call: Inputs, sample: int, name: str | None = None, acts: Tensor | None = None) -> Tensor:
    """The scores of a plain forward pass, with the activations of a layer exchanged by a hook."""
    n = call.batch

    def write(_: int, tap: Any, x: Tensor) -> Tensor:
        index = positions(tap.reshape, x)
        return x.flatten().index_copy(0, index.flatten(), acts.to(x).flatten()).view(x.shape)

    layers = [] if name is None else [trace._taps[name].layer]
    with torch.no_grad(), module_by_module(), Taps(trace.model, layers).observe(n, write):
        output = call.own().run(trace.model)
    return score(taken(trace.target, [sample] * n), select_output(output, trace._output_path), n)


def what_ifs(acts: Tensor, n: int = 3) -> Tensor:
    """`n` changed versions of activations `(c *grid)`."""
    g = torch.Generator().manual_seed(7)
    keep = torch.rand(n, len(acts), *[1] * (acts.ndim - 1), generator=g) < 0.5
    return acts * keep + 0.1 * torch.randn(n, *acts.shape, generator=g).to(acts)


@contextmanager
def counted(model: nn.Module) -> Iterator[dict[str, int]]:
    """How often each module runs for real."""
    counts: dict[str, int] = {}
    originals = {}
    for path, module in model.named_modules():

        def forward(*args: Any, path: str = path, of: Callable[..., Any] = module.forward, **kwargs: Any) -> Any:
            counts[path] = counts.get(path, 0) + 1
            return of(*args, **kwargs)

        originals[module] = module.__dict__.get("forward")
        module.forward = forward
    try:
        yield counts
    finally:
        for module, original in originals.items():
            del module.forward
            if original is not None:
                module.forward = original


def assert_scores(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


# Real architectures

# What cannot be run with another number of rows, and why.
REFUSED = {"owlvit": "copies of one"}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_changed_activations_of_real_architectures(name: str) -> None:
    case = ARCHITECTURES[name]()
    with torch.random.fork_rng():
        torch.manual_seed(7)
        trace = Trace(case.model, case.inputs, case.layers, case.target, case.output)
        for key, site in trace.sites.items():
            acts = what_ifs(site.acts[1])
            try:
                found = site.rescore(acts, 1)
            except MulticamError as error:
                assert name in REFUSED and REFUSED[name] in str(error), key
                continue
            assert_scores(found, full_scores(trace, rows_of(trace, 1, 3, {}), 1, key, acts))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_changed_inputs_of_real_architectures(name: str) -> None:
    case = ARCHITECTURES[name]()
    with torch.random.fork_rng():
        torch.manual_seed(7)
        trace = Trace(case.model, case.inputs, case.layers, case.target, case.output)
        for key, image in trace.inputs.images.items():
            rows = (
                what_ifs(image[0]).to(image.dtype)
                if image.is_floating_point()
                else image[:1].expand(3, *image.shape[1:]).roll(1, -1)
            )
            try:
                found = trace.rescore({key: rows}, 0)
            except MulticamError as error:
                assert name in REFUSED and REFUSED[name] in str(error), key
                continue
            assert_scores(found, full_scores(trace, rows_of(trace, 0, 3, {key: rows}), 0))


# What runs


def runs(trace: Trace, rescore: Callable[[], Tensor]) -> dict[str, int]:
    rescore()  # records and checks
    with counted(trace.model) as counts:
        rescore()
    return counts


def test_behind_a_branch_only_the_fusion_runs() -> None:
    trace = Trace(seeded(Fusion), fusion_inputs(2), {"depth": "depth.net"}, 1)
    site = trace.sites["depth"]
    counts = runs(trace, lambda: site.rescore(what_ifs(site.acts[0]), 0))
    own = {"", "depth", "depth.act", "attn", "head"}
    assert set(counts) - {"attn.out_proj"} == own  # also not `texture`, which runs after `depth`
    assert set(counts.values()) == {1}


def test_of_a_changed_input_only_its_branch_and_the_fusion_run() -> None:
    trace = Trace(seeded(Fusion), fusion_inputs(2), {}, 1)
    rows = what_ifs(trace.inputs.leaves["texture"][1])
    counts = runs(trace, lambda: trace.rescore({"texture": rows}, 1))
    assert not any(path.startswith(("rgb", "depth")) for path in counts)
    assert counts["texture"] == counts["head"] == 1


def test_two_inputs_may_change_together() -> None:
    trace = Trace(seeded(Fusion), fusion_inputs(2), {}, 1)
    rows = {name: what_ifs(trace.inputs.leaves[name][1]) for name in ("texture", "rgb")}
    counts = runs(trace, lambda: trace.rescore(rows, 1))
    assert "depth" not in counts
    assert_scores(trace.rescore(rows, 1), full_scores(trace, rows_of(trace, 1, 3, rows), 1))


@pytest.mark.parametrize("call", [0, 1])
def test_one_call_of_a_shared_encoder(call: int) -> None:
    inputs = {name: fusion_inputs(2)["rgb"] + i for i, name in enumerate(("before", "after"))}
    trace = Trace(seeded(Siamese), inputs, {"it": f"encoder.net.1#{call}"}, 1)
    site = trace.sites["it"]
    acts = what_ifs(site.acts[1])
    counts = runs(trace, lambda: site.rescore(acts, 1))
    assert counts["encoder"] == 1  # the other call comes from the record
    assert "encoder.net.0" not in counts
    assert_scores(site.rescore(acts, 1), full_scores(trace, rows_of(trace, 1, 3, {}), 1, "it", acts))


def test_a_resnet_skips_all_in_front_of_the_layer_also_inside_of_a_stage() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = torchvision.models.resnet18(num_classes=4).eval(), torch.rand(2, 3, 64, 64)
    trace = Trace(model, x, {"it": "layer3.1.conv1"}, 1)
    site = trace.sites["it"]
    acts = what_ifs(site.acts[0])
    counts = runs(trace, lambda: site.rescore(acts, 0))
    assert set(counts) & {"conv1", "bn1", "layer1", "layer2", "layer3.0", "layer3.1.conv1"} == set()
    assert {"layer3.1.bn1", "layer4", "fc"} <= set(counts)
    assert_scores(site.rescore(acts, 0), full_scores(trace, rows_of(trace, 0, 3, {}), 0, "it", acts))


# Models that make it hard


class TwoStreams(nn.Module):
    """A layer `a` and a module `b` that is reached by other means than tensors that need gradients."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a, self.b = Branch(3), Branch(3)
        self.norm = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a = self.a(x)
        match self.how:
            case "detach":
                b = self.b(y * a.detach().mean((1, 2, 3), keepdim=True))
            case "argmax":
                b = self.b(y + a.flatten(1).argmax(1).view(-1, 1, 1, 1))
            case "item":
                b = self.b(y * a.mean().item())
            case "shape":
                b = self.b(y * len(a.flatten().nonzero()))
            case "buffer":
                buffer = torch.empty_like(y)
                buffer.copy_(y)
                buffer[:, :1] *= a.mean((1, 2, 3)).view(-1, 1, 1, 1)
                b = self.b(buffer)
            case "numpy":
                b = self.b(y * torch.from_numpy(a.numpy().mean((1, 2, 3))).view(-1, 1, 1, 1))
            case "attribute":
                self.b.factor = a.mean((1, 2, 3)).view(-1, 1, 1, 1)
                b = self.b(y) * self.b.factor
            case "in place behind":
                b = self.b(y)
                b += a
            case "in place between":
                b = self.norm(self.b(y))
                before = b.mean((2, 3))
                b = self.relu(b)
                a = a + before[..., None, None]
            case "merged":
                b = self.b(y)
                b = b.view(b.shape[0] * b.shape[1], *b.shape[2:]).view(b.shape)
            case "stacked":
                both = self.b(torch.cat([y, y.flip(-1)]))
                b = both.chunk(2)[0] + 2 * both.chunk(2)[1]
            case "side by side":
                both = self.b(torch.stack([y, y.flip(-1)], 1).flatten(0, 1))
                b = both[0::2] + 2 * both[1::2]
            case "first":
                b = self.b(y).permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
        return self.head((a * b.sigmoid()).mean((2, 3)))


HARD = ["detach", "argmax", "item", "shape", "buffer", "numpy", "attribute", "in place behind", "in place between",
        "merged", "stacked", "side by side", "first"]  # fmt: skip
DEPENDENT = {"detach", "argmax", "item", "shape", "buffer", "numpy"}


def hard(how: str, b: int = 2) -> tuple[nn.Module, dict[str, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return two_streams(how), {name: torch.rand(b, 3, 16, 16, generator=g) for name in "xy"}


def two_streams(how: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TwoStreams(how).eval()
        nn.init.normal_(model.norm.running_mean)
        return model


@pytest.mark.parametrize("b", [1, 2, 3])
@pytest.mark.parametrize("how", HARD)
def test_models_whose_parts_depend_on_each_other_out_of_sight(how: str, b: int) -> None:
    model, inputs = hard(how, b)
    with torch.no_grad():
        trace = Trace(model, inputs, {"a": "a.net"}, 1) if how != "numpy" else NumpyTrace(model, inputs)
    site = trace.sites["a"]
    acts = what_ifs(site.acts[b - 1])
    counts = runs(trace, lambda: site.rescore(acts, b - 1))
    assert_scores(site.rescore(acts, b - 1), full_scores(trace, rows_of(trace, b - 1, 3, {}), b - 1, "a", acts))
    assert ("b" in counts) == (how in DEPENDENT)
    rows = what_ifs(inputs["x"][b - 1])
    assert_scores(trace.rescore({"x": rows}, b - 1), full_scores(trace, rows_of(trace, b - 1, 3, {"x": rows}), b - 1))


class NumpyTrace(Trace):
    """A trace of a model that leaves PyTorch, which no gradient survives."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        how, model.how = model.how, "first"
        super().__init__(model, inputs, {"a": "a.net"}, 1)
        model.how = how


def test_what_hides_from_marks_and_check_falls_back_to_full_passes_with_a_warning() -> None:
    class Counting(nn.Module):
        """Returns something else on every call."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return (self.a(x) * self.b(x)).mean((2, 3)) * self.calls

    trace = Trace(Counting(), torch.rand(2, 3, 8, 8), {"a": "a"}, 1)
    site = trace.sites["a"]
    with pytest.warns(UserWarning, match="all of it is run for every change"):
        first = site.rescore(site.acts[:1], 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        second = site.rescore(site.acts[:1], 0)
    assert second.abs() > first.abs()


def test_a_layer_whose_rows_are_stacked_inputs() -> None:
    model, inputs = hard("stacked", 3)
    layers = {"first": Layer("b.net", reshape=stacked(0, 2)), "second": Layer("b.net", reshape=stacked(1, 2))}
    trace = Trace(model, inputs, layers, 1)
    found = {}
    for name, site in trace.sites.items():
        acts = what_ifs(site.acts[2])
        found[name] = site.rescore(acts, 2)
        assert_scores(found[name], full_scores(trace, rows_of(trace, 2, 3, {}), 2, name, acts))
    assert not torch.allclose(found["first"], found["second"])


def test_tokens_off_the_grid_stay_as_they_are() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=4).eval()
        nn.init.normal_(model.heads.head.weight)
        x = torch.rand(2, 3, 32, 32)
    layer = Layer("encoder.layers.encoder_layer_0", reshape=tokens(4, 4, prefix=1))
    trace = Trace(model, x, {"it": layer}, 1)
    site = trace.sites["it"]
    assert_scores(site.rescore(site.acts[1:], 1), trace.scores[1:])
    silent = site.rescore(torch.zeros_like(site.acts[1:]), 1)
    assert silent.isfinite().all()
    assert not torch.allclose(silent, trace.scores[1:])


def test_the_target_keeps_the_class_it_chose_for_each_sample() -> None:
    model, inputs = hard("first", 3)
    trace = Trace(model, inputs, {"a": "a"})
    for b in range(3):
        assert_scores(trace.sites["a"].rescore(trace.sites["a"].acts[b : b + 1], b), trace.scores[b : b + 1])
    top = trace.output.argmax(1)
    silent = trace.sites["a"].rescore(torch.zeros_like(trace.sites["a"].acts[:1]), 0)
    assert_scores(silent, model.head(torch.zeros(1, 16))[:, top[0]].detach())


def test_words_and_masks_follow_their_sample() -> None:
    g = torch.Generator().manual_seed(0)
    inputs = {"image": torch.rand(2, 3, 16, 16, generator=g), "ids": torch.tensor([[1, 2, 3], [4, 5, 6]])}
    trace = Trace(seeded(Captioned), inputs, {}, 1, "logits")
    rows = what_ifs(inputs["image"][1])
    assert_scores(trace.rescore({"image": rows}, 1), full_scores(trace, rows_of(trace, 1, 3, {"image": rows}), 1))
    ids = torch.tensor([[7, 7, 7], [8, 8, 8]])
    assert_scores(trace.rescore({"ids": ids}, 1), full_scores(trace, rows_of(trace, 1, 2, {"ids": ids}), 1))


def test_a_users_hook_that_changes_an_output_is_not_applied_twice() -> None:
    model, inputs = hard("first", 2)
    model.b.register_forward_hook(lambda module, args, output: output * 3)
    trace = Trace(model, inputs, {"a": "a"}, 1)
    site = trace.sites["a"]
    assert_scores(site.rescore(site.acts[:1], 0), trace.scores[:1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype: torch.dtype) -> None:
    model, inputs = hard("first", 2)
    model = model.to(dtype)
    trace = Trace(model, {name: x.to(dtype) for name, x in inputs.items()}, {"a": "a.net"}, 1)
    acts = what_ifs(trace.sites["a"].acts[1])
    found = trace.sites["a"].rescore(acts, 1)
    expected = full_scores(trace, rows_of(trace, 1, 3, {}), 1, "a", acts)
    torch.testing.assert_close(found, expected, rtol=1e-10 if dtype == torch.float64 else 2e-2, atol=1e-10)


def test_a_layer_that_the_score_does_not_depend_on_leaves_it_as_it_is() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = Branch(3), Branch(3)

        def forward(self, x: Tensor) -> Tensor:
            self.unused(x)
            return self.used(x).mean((2, 3))

    trace = Trace(seeded(Unused), torch.rand(2, 3, 16, 16), {"it": "unused.net"}, 1)
    site = trace.sites["it"]
    assert_scores(site.rescore(what_ifs(site.acts[0]), 0), trace.scores[:1].expand(3))


# Errors


def test_what_does_not_fit_is_refused() -> None:
    trace = Trace(seeded(Fusion), fusion_inputs(2), {"depth": "depth"}, 1)
    site = trace.sites["depth"]
    with pytest.raises(MulticamError, match=r"sample 2 does not exist: the call has samples 0 to 1"):
        site.rescore(site.acts[:1], 2)
    with pytest.raises(MulticamError, match=r"do not fit layer 'depth'"):
        site.rescore(site.acts[:1, :3], 0)
    with pytest.raises(MulticamError, match=r"do not fit input 'rgb'"):
        trace.rescore({"rgb": torch.rand(2, 3, 5, 5)}, 0)
    with pytest.raises(MulticamError, match=r"no input 'rbg'; did you mean 'rgb'"):
        trace.rescore({"rbg": torch.rand(2, 3, 5, 5)}, 0)
    with pytest.raises(MulticamError, match="as many what-ifs each"):
        trace.rescore({"rgb": torch.rand(2, 3, 32, 32), "depth": torch.rand(3, 1, 16, 32)}, 0)
    with pytest.raises(MulticamError, match="give the inputs to change, of 'rgb', 'depth', 'texture'"):
        trace.rescore({}, 0)


@pytest.mark.parametrize(("each", "apart"), [(1, False), (3, False), (3, True)])
@pytest.mark.parametrize("axis", [0, 1])
def test_rows_of_one_sample_wherever_they_lie(axis: int, each: int, apart: bool) -> None:
    one = [torch.rand(each, 2) for _ in range(4)]
    together = torch.stack(one, 1 if apart else 0).flatten(0, 1)
    copies = torch.stack([one[2]] * 5, 1 if apart else 0).flatten(0, 1)
    found = Rows(4, axis, each, apart).spread(together.movedim(0, axis), 2, 5)
    assert torch.equal(found, copies.movedim(0, axis))
