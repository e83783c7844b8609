"""Replayed scores are those of full forwards, and what does not depend on the change does not run."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from multicam import Inputs, Layer, MulticamError, Trace, stacked, tokens
from multicam.watch.layers import Taps
from multicam.watch.replay import FEW
from multicam.watch.reshape import positions
from multicam.watch.undisturbed import module_by_module
from tests.helpers.architectures import ARCHITECTURES
from tests.helpers.counting import counted
from tests.helpers.models import Branch, Captioned, Fusion, Siamese, fusion_inputs, seeded

MANY = FEW + 1  # what-ifs that may run together


def rows_of(trace: Trace, sample: int, n: int, values: Mapping[str, Tensor]) -> Inputs:
    """The call of `n` what-ifs written out, with no memory shared."""
    return trace.inputs.take([sample] * n).replace(values)


def full_scores(trace: Trace, call: Inputs, sample: int, name: str | None = None, acts: Tensor | None = None) -> Tensor:
    """The scores of plain forward passes, one for each row of a call, which is alone in it.

    A hook exchanges the activations of a layer, each row's by its own.
    """
    layers = [] if name is None else [trace._taps[name].layer]
    found = []
    for i in range(call.batch):

        def write(_: int, tap: Any, x: Tensor, i: int = i) -> Tensor:
            index = positions(tap.layer.reshape, x).flatten()
            there = index >= 0
            return x.flatten().index_copy(0, index[there], acts[i].to(x).flatten()[there]).view(x.shape)

        with torch.no_grad(), module_by_module(), Taps(trace.model, layers).observe(write):
            output = call.take([i]).own().run(trace.model)
        found.append(trace.scorer.read(output, [sample]))
    return torch.cat(found)


def what_ifs(acts: Tensor, n: int = MANY) -> Tensor:
    """`n` changed versions of activations `(c *grid)`."""
    g = torch.Generator().manual_seed(7)
    keep = torch.rand(n, len(acts), *[1] * (acts.ndim - 1), generator=g) < 0.5
    return acts * keep + 0.1 * torch.randn(n, *acts.shape, generator=g).to(acts)


def assert_scores(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


# Real architectures

# Scores that compare each sample with the texts of all others.
COMPARING = {"clip", "altclip", "siglip", "xclip", "owlvit"}
COMPANY = r"sample \d has the score .* alone and .* in its batch"


@contextmanager
def traced(name: str) -> Iterator[Trace]:
    """An architecture's trace, with random numbers of its own."""
    case = ARCHITECTURES[name]()
    with torch.random.fork_rng():
        torch.manual_seed(7)
        yield Trace(case.model, case.inputs, case.layers, case.target, case.output)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_changed_activations_of_real_architectures(name: str) -> None:
    with traced(name) as trace:
        for key, site in trace.sites.items():
            acts = what_ifs(site.acts[1])
            with pytest.warns(UserWarning, match=COMPANY) if name in COMPARING else nullcontext():
                found = site.rescore(acts, 1)
            assert_scores(found, full_scores(trace, rows_of(trace, 1, MANY, {}), 1, key, acts))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_changed_inputs_of_real_architectures(name: str) -> None:
    with traced(name) as trace:
        for key, image in trace.inputs.images.items():
            rows = (
                what_ifs(image[0]).to(image.dtype)
                if image.is_floating_point()
                else image[:1].expand(MANY, *image.shape[1:]).roll(1, -1)
            )
            found = trace.rescore({key: rows}, 0)
            assert_scores(found, full_scores(trace, rows_of(trace, 0, MANY, {key: rows}), 0))


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
    assert set(counts.values()) == {2}  # all together, and the most unlike of them alone


def test_of_a_changed_input_only_its_branch_and_the_fusion_run() -> None:
    trace = Trace(seeded(Fusion), fusion_inputs(2), {}, 1)
    rows = what_ifs(trace.inputs.leaves["texture"][1])
    counts = runs(trace, lambda: trace.rescore({"texture": rows}, 1))
    assert not any(path.startswith(("rgb", "depth")) for path in counts)
    assert counts["texture"] == counts["head"] == 2


def test_two_inputs_may_change_together() -> None:
    trace = Trace(seeded(Fusion), fusion_inputs(2), {}, 1)
    rows = {name: what_ifs(trace.inputs.leaves[name][1]) for name in ("texture", "rgb")}
    counts = runs(trace, lambda: trace.rescore(rows, 1))
    assert "depth" not in counts
    assert_scores(trace.rescore(rows, 1), full_scores(trace, rows_of(trace, 1, MANY, rows), 1))


@pytest.mark.parametrize("call", [0, 1])
def test_one_call_of_a_shared_encoder(call: int) -> None:
    inputs = {name: fusion_inputs(2)["rgb"] + i for i, name in enumerate(("before", "after"))}
    trace = Trace(seeded(Siamese), inputs, {"it": f"encoder.net.1#{call}"}, 1)
    site = trace.sites["it"]
    acts = what_ifs(site.acts[1])
    counts = runs(trace, lambda: site.rescore(acts, 1))
    assert counts["encoder"] == counts["head"] == 2  # of each pass one; the other call comes from the record
    assert "encoder.net.0" not in counts
    assert_scores(site.rescore(acts, 1), full_scores(trace, rows_of(trace, 1, MANY, {}), 1, "it", acts))


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
    assert_scores(site.rescore(acts, 0), full_scores(trace, rows_of(trace, 0, MANY, {}), 0, "it", acts))


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
                b = self.b(y + a.mean().item())
            case "shape":
                b = self.b(y * len(a.flatten().nonzero()))
            case "buffer":
                buffer = torch.empty_like(y)
                buffer.copy_(y)
                buffer[:, :1] *= a.mean((1, 2, 3)).view(-1, 1, 1, 1)
                b = self.b(buffer)
            case "numpy":
                b = self.b(y * torch.from_numpy(a.detach().numpy().mean((1, 2, 3))).view(-1, 1, 1, 1))
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
IN_COMPANY = {"item", "shape"}  # one number for all samples
DEPENDENT = {"detach", "argmax", "item", "shape", "buffer", "numpy"}


def hard(how: str, b: int = 2) -> tuple[nn.Module, dict[str, Tensor]]:
    g = torch.Generator().manual_seed(1)
    inputs = {name: torch.rand(b, 3, 16, 16, generator=g) for name in "xy"}
    inputs["x"] *= torch.arange(1.0, b + 1).view(-1, 1, 1, 1)  # so that it matters where samples are put together
    return two_streams(how), inputs


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
    trace = Trace(model, inputs, {"a": "a.net"}, 1)
    site = trace.sites["a"]
    acts, rows = what_ifs(site.acts[b - 1]), what_ifs(inputs["x"][b - 1])

    def company() -> AbstractContextManager[object]:
        return pytest.warns(UserWarning, match=COMPANY) if how in IN_COMPANY and b > 1 else nullcontext()

    with company():
        found = site.rescore(acts, b - 1)
    assert_scores(found, full_scores(trace, rows_of(trace, b - 1, MANY, {}), b - 1, "a", acts))
    assert ("b" in runs(trace, lambda: site.rescore(acts, b - 1))) == (how in DEPENDENT)
    with company():
        found = trace.rescore({"x": rows}, b - 1)
    assert_scores(found, full_scores(trace, rows_of(trace, b - 1, MANY, {"x": rows}), b - 1))


class Keeping(nn.Module):
    """Reads what a module returned where a hook of its own kept it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.kept: list[Tensor] = []
        self.b.register_forward_hook(lambda module, args, output: self.kept.append(output))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.b(y)
        return (self.a(x) * self.kept[-1]).mean((2, 3))


def keeping(kind: type[nn.Module], b: int) -> Trace:
    g = torch.Generator().manual_seed(b)
    return Trace(seeded(kind), {name: torch.rand(b, 3, 8, 8, generator=g) for name in "xy"}, {"a": "a"}, 1)


@pytest.mark.parametrize("b", [1, 2, 3])
def test_hooks_of_a_module_that_does_not_run_are_told_what_it_returned(b: int) -> None:
    trace = keeping(Keeping, b)
    site, rows = trace.sites["a"], what_ifs(trace.inputs.leaves["y"][b - 1])
    acts = what_ifs(site.acts[b - 1])
    counts = runs(trace, lambda: site.rescore(acts, b - 1))
    assert set(counts) == {""}
    assert_scores(site.rescore(acts, b - 1), full_scores(trace, rows_of(trace, b - 1, MANY, {}), b - 1, "a", acts))
    expected = full_scores(trace, rows_of(trace, b - 1, MANY, {"y": rows}), b - 1)
    assert_scores(trace.rescore({"y": rows}, b - 1), expected)


class Behind(Keeping):
    """The same, but the module itself leaves it behind, in one that is inside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Sequential(Leaving(), nn.Conv2d(3, 4, 3))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.a(x) * self.b(y)).mean((2, 3)) * self.b[0].left


class Leaving(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = torch.ones(())

    def forward(self, y: Tensor) -> Tensor:
        self.left = y.mean((1, 2, 3))[:, None]
        return y + 1


@pytest.mark.parametrize("b", [1, 2, 3])
def test_a_module_that_leaves_something_behind_runs_again(b: int) -> None:
    trace = keeping(Behind, b)
    site = trace.sites["a"]
    acts = what_ifs(site.acts[b - 1])
    counts = runs(trace, lambda: site.rescore(acts, b - 1))
    assert set(counts) == {"", "b", "b.0"}
    assert_scores(site.rescore(acts, b - 1), full_scores(trace, rows_of(trace, b - 1, MANY, {}), b - 1, "a", acts))


class Hidden(Keeping):
    """The same in a container, which is the same object as before."""

    def __init__(self) -> None:
        super().__init__()
        self.b = Writing()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.a(x) * self.b(y)).mean((2, 3)) * self.b.left["mean"]


class Writing(nn.Conv2d):
    def __init__(self) -> None:
        super().__init__(3, 4, 3)
        self.left: dict[str, Tensor] = {}

    def forward(self, y: Tensor) -> Tensor:
        self.left["mean"] = y.mean((1, 2, 3))[:, None]
        return super().forward(y)


@pytest.mark.parametrize("b", [1, 2, 3])
def test_what_is_left_behind_unseen_is_noticed_and_all_is_run_with_a_warning(b: int) -> None:
    trace = keeping(Hidden, b)
    site = trace.sites["a"]
    acts = what_ifs(site.acts[b - 1])
    with pytest.warns(UserWarning, match="all of it is run for every change"):
        found = site.rescore(acts, b - 1)
    expected = full_scores(trace, rows_of(trace, b - 1, MANY, {}), b - 1, "a", acts)
    assert_scores(found, expected)
    assert_scores(site.rescore(acts, b - 1), expected)  # without another warning


def test_scores_that_depend_on_the_rest_of_the_batch_are_told() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    trace = Trace(model, torch.rand(2, 3, 8, 8), {"it": "0"}, 1)
    site = trace.sites["it"]
    acts = what_ifs(site.acts[0])
    with pytest.warns(UserWarning, match="depend on what else is in the batch"):
        found = site.rescore(acts, 0)
    assert_scores(found, full_scores(trace, rows_of(trace, 0, MANY, {}), 0, "it", acts))


# Every sample is proved by itself


class Missing(nn.Module):
    """One encoder for two inputs, of which the second may be missing: the calls of a sample depend on it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = Branch(3), nn.Linear(16, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        other = self.encoder(y) if bool(y.any()) else torch.zeros(1)
        return self.head((self.encoder(x) + other).mean((2, 3)))


class Sorted(nn.Module):
    """Runs its samples in the order of their brightness."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.other, self.head = Branch(3), Branch(3), nn.Linear(16, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        order = y.mean((1, 2, 3)).argsort(descending=True)
        a = self.encoder(y[order])[order.argsort()]
        return self.head((a * self.other(x)).mean((2, 3)))


class Ambiguous(nn.Module):
    """Two inputs stacked on the batch axis; where both are alike, either order of the rows fits."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.other, self.head = Branch(3), Branch(3), nn.Linear(16, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        first, second = self.encoder(torch.cat([0 * y, y])).chunk(2)
        return self.head(((first - 2 * second) * self.other(x)).mean((2, 3)))


@pytest.mark.parametrize("kind", [Missing, Sorted, Ambiguous], ids=lambda kind: kind.__name__)
def test_a_record_that_fits_one_sample_need_not_fit_another(kind: type[nn.Module]) -> None:
    g = torch.Generator().manual_seed(1)
    inputs = {name: torch.rand(3, 3, 16, 16, generator=g) for name in "xy"}
    empty = {Missing: slice(1, 3), Sorted: slice(1, 1), Ambiguous: slice(0, 1)}[kind]
    inputs["y"][empty] = 0
    inputs["y"][0] *= 2 if kind is Sorted else 1
    trace = Trace(seeded(kind), inputs, {}, 1)
    for turn, b in enumerate((0, 1, 2, 0)):
        rows = what_ifs(inputs["x"][b])
        # Alone, a sample whose `y` is missing is not encoded with that of the others.
        told = pytest.warns(UserWarning, match=COMPANY) if kind is Missing and turn in (1, 2) else nullcontext()
        with told:
            found = trace.rescore({"x": rows}, b)
        assert_scores(found, full_scores(trace, rows_of(trace, b, MANY, {"x": rows}), b))


# Values that leave PyTorch, or stand still where others would change


@pytest.mark.parametrize("way", ["tolist", "numpy", "sparse", "repr", "dataclass"])
def test_a_gate_out_of_sight_of_the_dispatcher(way: str) -> None:
    """The gate is far from its threshold, so a small random change does not show that the branch depends on it."""

    @dataclass
    class Batch:
        x: Tensor

    class Passing(nn.Module):
        def forward(self, batch: Batch) -> Tensor:
            return batch.x

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch, self.other, self.passing = Branch(3), Branch(3), Passing()
            self.head = nn.Linear(16, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            bright = x.mean((1, 2, 3))
            self.last = bright
            match way:
                case "tolist":
                    gate = torch.tensor([float(value > 0.3) for value in bright.tolist()])
                case "numpy":
                    gate = torch.from_numpy((bright.numpy() > 0.3).astype("float32"))
                case "repr":
                    gate = torch.tensor([float(repr(value)[7:-1]) > 0.3 for value in bright]).float()
                case "sparse":
                    gate = (bright[:, None].to_sparse().to_dense()[:, 0] > 0.3).float()
                case _:
                    gate = (self.passing(Batch(bright)) > 0.3).float()
            return self.head((self.branch(y * gate.view(-1, 1, 1, 1)) + 0.01 * self.other(x)).mean((2, 3)))

    g = torch.Generator().manual_seed(1)
    inputs = {name: torch.rand(2, 3, 16, 16, generator=g) for name in "xy"}
    trace = Trace(seeded(Gated), inputs, {}, 1)
    rows = torch.stack([factor * inputs["x"][0] for factor in (1, 0.1, 0.9, 0.2, 0.95)])
    found = trace.rescore({"x": rows}, 0)
    assert_scores(found, full_scores(trace, rows_of(trace, 0, MANY, {"x": rows}), 0))
    assert abs(found[0] - found[1]) > 1e-3


def test_a_condition_that_writes_into_shared_memory() -> None:
    class Blanking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch, self.head = Branch(3), nn.Linear(16, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            features = self.branch(y)
            features[x.mean((1, 2, 3)) < 0.01] = 0
            return self.head(features.mean((2, 3)))

    g = torch.Generator().manual_seed(1)
    inputs = {name: torch.rand(2, 3, 16, 16, generator=g) for name in "xy"}
    trace = Trace(seeded(Blanking), inputs, {}, 1)
    rows = torch.stack([factor * inputs["x"][0] for factor in (1, 0.5, 0.001, 0.7, 0.002)])
    assert_scores(trace.rescore({"x": rows}, 0), full_scores(trace, rows_of(trace, 0, MANY, {"x": rows}), 0))


@pytest.mark.parametrize("kind", ["ones", "zeros", "flags", "labels"])
def test_inputs_that_are_the_same_everywhere(kind: str) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch, self.head = Branch(3), nn.Linear(16, 4)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.head(self.branch(x * mask.view(len(mask), -1, 1, 1).float()[:, :1]).mean((2, 3)))

    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    mask = {
        "ones": torch.ones(2, 4, dtype=torch.long),
        "zeros": torch.zeros(2, 4),
        "flags": torch.ones(2, 4, dtype=torch.bool),
        "labels": torch.ones(2, dtype=torch.long),
    }[kind]
    trace = Trace(seeded(Masked), {"x": x, "mask": mask}, {}, 1)
    rows = torch.stack([mask[0], 1 - mask[0].long()]).to(mask.dtype)
    found = trace.rescore({"mask": rows}, 0)
    assert_scores(found, full_scores(trace, rows_of(trace, 0, 2, {"mask": rows}), 0))
    assert found[0] != found[1]


def test_an_input_of_integers_is_rounded_and_cut_to_its_range() -> None:
    class Bytes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = Branch(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.branch(x.float() / 255).mean((2, 3))

    x = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    trace = Trace(seeded(Bytes), x, {}, 1)
    rows = torch.stack([1.7 * x[0], x[0] - 300.0, 0.5 * x[0]])
    expected = trace.model(rows.round().clamp(0, 255))[:, 1].detach()
    assert_scores(trace.rescore({"x": rows}, 0), expected)


def test_packed_sequences_and_function_transforms_run_again() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch, self.words = Branch(3), nn.LSTM(4, 16, batch_first=True)
            self.scale, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor, words: Tensor) -> Tensor:
            lengths = torch.full((len(words),), words.shape[1])
            packed = nn.utils.rnn.pack_padded_sequence(words, lengths, batch_first=True)
            _, (hidden, _) = self.words(packed)
            return self.head(self.branch(x).mean((2, 3)) * torch.vmap(self.scale)(hidden[-1]))

    g = torch.Generator().manual_seed(1)
    inputs = {"x": torch.rand(3, 3, 16, 16, generator=g), "words": torch.rand(3, 5, 4, generator=g)}
    trace = Trace(seeded(Words), inputs, {}, 1)
    for name in inputs:
        rows = what_ifs(inputs[name][1])
        assert_scores(trace.rescore({name: rows}, 1), full_scores(trace, rows_of(trace, 1, MANY, {name: rows}), 1))


def test_inputs_that_are_overwritten_after_the_pass_do_not_reach_it() -> None:
    trace = Trace(seeded(Fusion), inputs := fusion_inputs(2), {"depth": "depth"}, 1)
    site = trace.sites["depth"]
    inputs["rgb"].zero_()
    assert_scores(site.rescore(site.acts[1:], 1), trace.scores[1:])


def test_a_layer_whose_rows_are_stacked_inputs() -> None:
    model, inputs = hard("stacked", 3)
    layers = {"first": Layer("b.net", reshape=stacked(0, 2)), "second": Layer("b.net", reshape=stacked(1, 2))}
    trace = Trace(model, inputs, layers, 1)
    found = {}
    for name, site in trace.sites.items():
        acts = what_ifs(site.acts[2])
        found[name] = site.rescore(acts, 2)
        assert_scores(found[name], full_scores(trace, rows_of(trace, 2, MANY, {}), 2, name, acts))
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


def test_a_target_with_values_for_each_sample_must_tell_them_apart() -> None:
    model, inputs = hard("first", 3)
    weights = torch.rand(3, 4)
    trace = Trace(model, inputs, {"a": "a"}, lambda output: (output * weights).sum(1))
    site = trace.sites["a"]
    with pytest.raises(MulticamError, match=r"treats each sample differently.*take\(samples\)"):
        site.rescore(site.acts[:3], 0)
    with pytest.raises(MulticamError, match=r"take\(samples\)"):
        trace.again(inputs, [2, 1, 0])

    class Weighed:
        def __init__(self, weights: Tensor) -> None:
            self.weights = weights

        def __call__(self, output: Tensor) -> Tensor:
            return (output * self.weights).sum(1)

        def take(self, samples: list[int]) -> "Weighed":
            return Weighed(self.weights[samples])

    told = Trace(model, inputs, {"a": "a"}, Weighed(weights)).sites["a"]
    assert_scores(told.rescore(told.acts[2:], 2), told.scores[2:])


def test_words_and_masks_follow_their_sample() -> None:
    g = torch.Generator().manual_seed(0)
    inputs = {"image": torch.rand(2, 3, 16, 16, generator=g), "ids": torch.tensor([[1, 2, 3], [4, 5, 6]])}
    trace = Trace(seeded(Captioned), inputs, {}, 1, "logits")
    rows = what_ifs(inputs["image"][1])
    assert_scores(trace.rescore({"image": rows}, 1), full_scores(trace, rows_of(trace, 1, MANY, {"image": rows}), 1))
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
    expected = full_scores(trace, rows_of(trace, 1, MANY, {}), 1, "a", acts)
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
    assert_scores(site.rescore(what_ifs(site.acts[0]), 0), trace.scores[:1].expand(MANY))


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


def test_a_model_that_needs_two_rows_and_writes_into_them() -> None:
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(2, 3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            if len(x) < 2:
                raise ValueError("expected more than one row")
            x += 1
            return self.head(self.conv(x).relu().mean((2, 3)))

    torch.manual_seed(0)
    model, x = Pairs().eval(), torch.rand(2, 2, 6, 6)
    rows = torch.rand(6, 2, 6, 6)
    expected = model(rows.clone())[:, 1].detach()
    torch.testing.assert_close(Trace(model, x, {}, 1).rescore({"x": rows}, 1), expected)


def test_a_model_that_takes_no_values_of_ours_is_proved_by_those_that_are_asked_for() -> None:
    class Simplex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.other = nn.Linear(3, 2), nn.Linear(4, 2)

        def forward(self, p: Tensor, y: Tensor) -> Tensor:
            if not torch.allclose(p.sum(1), torch.ones(len(p))):
                raise ValueError("no probabilities")
            return self.head(p) * self.other(y)

    model = seeded(Simplex)
    p, y = torch.rand(2, 3).softmax(1), torch.rand(2, 4)
    rows = torch.rand(MANY, 3).softmax(1)
    trace = Trace(model, {"p": p, "y": y}, {}, 1)
    for n in (1, MANY):
        expected = model(rows[:n], y[1:].expand(n, -1))[:, 1].detach()
        assert_scores(trace.rescore({"p": rows[:n]}, 1), expected)


def test_a_branch_that_one_row_of_many_takes_alone() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) * (2 if x.mean() > 0 else -1)

    model, rows = Branching().eval(), torch.ones(9, 1, 2, 2)
    rows[4] = -1  # neither first nor last, and among others it has no extreme score
    rows[4, 0, 0, 1] = 1
    expected = torch.cat([model(row[None])[:, 1] for row in rows])
    torch.testing.assert_close(Trace(model, torch.ones(1, 1, 2, 2), {}, 1).rescore({"x": rows}), expected)
