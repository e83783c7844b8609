"""What attentions say together: against the published formulas written out, on models small enough to follow by hand."""

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchcam.methods as torchcam
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from multicam import Inputs, MulticamError
from multicam.attending.attend import attention, record_attention
from multicam.attending.attention_call import AttentionCall
from multicam.attending.attentions import Attention
from multicam.attending.between import flow_matrix
from multicam.attending.flow import Flow, legrad, relevance, rollout
from multicam.call.targets import ClassScore
from multicam.demo.detector import EditDetector
from tests.helpers.attention_models import ATTENDING, enliven

WIDTH = 8


class Attend(nn.Module):
    """Attention as everybody writes it, and a residual around it; keeps the probabilities, with their history."""

    def __init__(self, residual: bool = True) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.residual = residual
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = (z.unflatten(2, (2, -1)).transpose(1, 2) for z in (self.q(x), self.k(y), self.v(y)))
        p = (q @ k.mT).softmax(-1)
        self.kept.append(p)
        attended = (p @ v).transpose(1, 2).flatten(2)
        return x + attended if self.residual else attended


class Toy(nn.Module):
    """Streams of features `(b n c)` that attend to each other as a schedule of pairs says: "ab" is stream a looking at stream b.

    Pairs joined by "+" read the same state. The score of a class is read off one stream.
    """

    def __init__(self, schedule: str, read: str = "a") -> None:
        super().__init__()
        self.steps = [step.split("+") for step in schedule.split()]
        self.read = read
        self.attends = nn.ModuleList(Attend() for step in self.steps for _ in step)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        streams = {"a": a, "b": b, "c": c}
        attends = iter(self.attends)
        for step in self.steps:
            streams |= {s: next(attends)(streams[s], streams[t]) for s, t in step}
        return self.head(streams[self.read].tanh().mean(1))


def toy(schedule: str, read: str = "a", samples: int = 2) -> tuple[Toy, tuple[Tensor, ...]]:
    with torch.random.fork_rng():
        torch.manual_seed(len(schedule))
        model = Toy(schedule, read).double()
        enliven(model)
        return model.eval(), tuple(torch.randn(samples, n, WIDTH, dtype=torch.float64) for n in (4, 5, 3))


def truth(model: Toy, inputs: Sequence[Tensor]) -> list[np.ndarray]:
    """`mean over heads of (dP * P)+` of every attention `(b q k)`, by autograd on the probabilities themselves."""
    kept = [attend.kept for attend in model.attends if isinstance(attend, Attend)]
    for several in kept:
        several.clear()
    score = model(*inputs)[:, 1].sum()
    matrices = [several[0] for several in kept]
    gradients = torch.autograd.grad(score, matrices, allow_unused=True)
    return [
        np.zeros(p.mean(1).shape) if g is None else (g * p).clamp(min=0).mean(1).detach().numpy()
        for p, g in zip(matrices, gradients, strict=True)
    ]


def part(flow: Flow, rows: Tensor, columns: Tensor, sample: int = 0) -> np.ndarray:
    """The entries of a flow for these ids."""
    tokens = flow.tokens[sample].tolist()
    index = [[tokens.index(i) for i in ids.tolist()] for ids in (rows, columns)]
    return flow.matrix(sample)[index[0]][:, index[1]].numpy()


def ids(att: Sequence[AttentionCall], schedule: str) -> dict[str, Tensor]:
    """The ids `(b n)` of each stream of a toy."""
    found = {}
    for call, pair in zip(att, schedule.replace("+", " ").split(), strict=True):
        found |= {pair[0]: call.rows, pair[1]: call.columns}
    return found


def normalised(r: np.ndarray) -> np.ndarray:
    """Equations 8 and 9; rows of zeros stay zero."""
    gained = r - np.eye(len(r))
    total = gained.sum(1, keepdims=True)
    return gained / np.where(total == 0, 1, total) + np.eye(len(r))


def published(schedule: str, matrices: Sequence[np.ndarray], sizes: dict[str, int], rule: str) -> dict[str, np.ndarray]:
    """Equations 6 to 11 stream by stream, and `A R` for what a third stream is owed."""
    r = {s + t: np.eye(n, m) if s == t else np.zeros((n, m)) for s, n in sizes.items() for t, m in sizes.items()}
    a = iter(matrices)
    for step in schedule.split():
        added = {}
        for s, t in step.split("+"):
            matrix = next(a)
            for u in sizes:
                added[s + u] = matrix @ r[t + u]
            if s != t and rule == "chefer":
                added[s + t] = normalised(r[s + s]).T @ matrix @ normalised(r[t + t])
        r = {pair: value + added.get(pair, 0) for pair, value in r.items()}
    return r


SCHEDULES = {
    "one stream": "aa aa",
    "co-attention": "aa bb ab+ba aa bb",
    "co-attention, two layers": "aa bb ab+ba aa bb ab+ba aa",
    "one after the other": "aa bb ab ba aa",
    "co-attention before anything else": "ab+ba ab",
    "encoder and decoder": "bb bb aa ab aa ab",
    "three streams": "bb ab cb+bc ca ac aa",
    "two at once": "bb cc ab ac aa ba ab",
}


@pytest.mark.parametrize("rule", ["block", "chefer"])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_relevance_is_the_published_rules_entry_by_entry(schedule: str, rule: str) -> None:
    model, inputs = toy(schedule)
    att = attention(model, inputs, ClassScore(1))
    flow = relevance(att, rule)
    matrices = truth(model, inputs)
    streams = ids(att, schedule)
    for sample in range(2):
        sizes = {name: of.shape[1] for name, of in streams.items()}
        expected = published(schedule, [m[sample] for m in matrices], sizes, rule)
        for (s, t), value in expected.items():
            found = part(flow, streams[s][sample], streams[t][sample], sample)
            np.testing.assert_allclose(found, value, rtol=1e-9, atol=1e-15, err_msg=f"R_{s}{t}")
        assert len(flow.tokens[sample]) == sum(sizes.values())


def test_the_rules_differ_where_the_paper_says_so() -> None:
    model, inputs = toy("aa bb ab aa")
    att = attention(model, inputs, ClassScore(1))
    block, chefer = (relevance(att, rule) for rule in ("block", "chefer"))
    a, b = (ids(att, "aa bb ab aa")[s][0] for s in "ab")
    np.testing.assert_allclose(part(block, a, a), part(chefer, a, a))
    assert not np.allclose(part(block, a, b), part(chefer, a, b), rtol=1e-3)


def test_what_runs_one_after_the_other_does_not_read_the_same_state() -> None:
    """The schedules differ in what the second reads and in nothing else; the matrices tell which it was."""
    for schedule in ("ab+ba aa", "ab ba aa"):
        model, inputs = toy(schedule)
        att = attention(model, inputs, ClassScore(1))
        a, b = (ids(att, schedule)[s][0] for s in "ab")
        knows = part(relevance(att), b, b) - np.eye(5)
        assert (np.abs(knows).max() > 0) == (schedule == "ab ba aa" and truth(model, inputs)[1].any())
        assert part(relevance(att), a, b).any()


@pytest.mark.parametrize("rule", ["block", "chefer"])
def test_fused_kernels_tell_what_they_read_as_well(monkeypatch: pytest.MonkeyPatch, rule: str) -> None:
    def fused(self: Attend, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = (z.unflatten(2, (2, -1)).transpose(1, 2) for z in (self.q(x), self.k(y), self.v(y)))
        return x + F.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2).flatten(2)

    model, inputs = toy("aa bb ab+ba aa bb ab ba")
    expected = relevance(attention(model, inputs, ClassScore(1)), rule)
    monkeypatch.setattr(Attend, "forward", fused)
    att = attention(model, inputs, ClassScore(1))
    assert {call.source for call in att} == {"fused"}
    torch.testing.assert_close(relevance(att, rule).matrix(1), expected.matrix(1))


@pytest.mark.parametrize("residual", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("heads", ["mean", "max", "min"])
def test_rollout_is_its_formula(heads: str, residual: float) -> None:
    schedule = "aa bb ab ba aa"
    model, inputs = toy(schedule)
    att = attention(model, inputs)
    with torch.no_grad():
        Inputs.of(inputs).run(model)  # an explanation puts back what the model keeps
    flow = rollout(att, residual=residual, heads=heads)
    streams = {name: of[1].tolist() for name, of in ids(att, schedule).items()}
    everything = streams["a"] + streams["b"]
    expected = np.eye(9)
    over = {"mean": np.mean, "max": np.max, "min": np.min}[heads]
    for attend, (s, t) in zip(model.attends, schedule.split(), strict=True):
        assert isinstance(attend, Attend)
        a = over(attend.kept[0][1].detach().numpy(), axis=0)
        full = np.zeros((9, 9))
        rows, columns = ([everything.index(i) for i in streams[name]] for name in (s, t))
        full[np.ix_(rows, columns)] = a / a.sum(1, keepdims=True)
        others = [i for i in range(9) if i not in rows]
        full[others, others] = 1
        mixing = residual * np.eye(9) + (1 - residual) * full
        expected = mixing @ expected
    index = torch.tensor(everything)
    np.testing.assert_allclose(part(flow, index, index, 1), expected, rtol=1e-9, atol=1e-15)


@settings(deadline=None, max_examples=10)
@given(
    st.lists(st.sampled_from(["aa", "bb", "cc", "ab", "ba", "bc", "ca"]), min_size=1, max_size=5), st.floats(0, 1),
    st.sampled_from(["mean", "max", "min"]),
)  # fmt: skip
def test_rollout_loses_nothing(schedule: list[str], residual: float, heads: str) -> None:
    model, inputs = toy(" ".join(schedule))
    with torch.no_grad(), record_attention(model) as att:
        model(*inputs)
    flow = rollout(att, residual=residual, heads=heads)
    for sample in range(2):
        matrix = flow.matrix(sample)
        torch.testing.assert_close(matrix.sum(1), torch.ones(len(matrix), dtype=matrix.dtype))
        assert matrix.min() >= 0
    shares = flow.between().shares
    torch.testing.assert_close(shares.sum(-1), torch.ones_like(shares[..., 0]))


def unfused(name: str) -> Iterator[tuple[Attention, Tensor, list[Tensor]]]:
    """The recording of a timm ViT as it is, and of the same without fused kernels every matrix and its gradient."""
    case = ATTENDING[name]()
    att = attention(case.model, case.inputs, ClassScore(1))
    matrices: list[Tensor] = []
    modules = [m for m in case.model.modules() if hasattr(m, "fused_attn")]
    hooks = [m.attn_drop.register_forward_hook(lambda module, args, out: matrices.append(out)) for m in modules]
    for m in modules:
        m.fused_attn = False
    x = next(iter(case.inputs.bind(case.model).leaves.values()))
    score = case.model(x.clone().requires_grad_())[:, 1].sum()
    for m, hook in zip(modules, hooks, strict=True):
        m.fused_attn = True
        hook.remove()
    gradients = torch.autograd.grad(score, matrices)
    return att, [p.detach() for p in matrices], list(gradients)


@pytest.mark.parametrize("name", ["timm_vit", "timm_vit_registers"])
def test_a_fused_vit_has_the_relevance_and_rollout_of_the_unfused_one(name: str) -> None:
    att, matrices, gradients = unfused(name)
    assert {call.source for call in att} == {"fused"}
    for sample in range(2):
        n = matrices[0].shape[-1]
        r, mixed = torch.eye(n), torch.eye(n)
        for p, g in zip(matrices, gradients, strict=True):
            r = r + (g * p).clamp(min=0).mean(1)[sample] @ r
            mixed = (0.5 * torch.eye(n) + 0.5 * p[sample].mean(0)) @ mixed
        tokens = att[0].rows[sample]
        for flow, expected in ((relevance(att), r), (relevance(att, "chefer"), r), (rollout(att), mixed)):
            np.testing.assert_allclose(part(flow, tokens, tokens, sample), expected, atol=1e-6 * float(expected.max()))
    prefix = n - 16
    grid = r[0, prefix:].view(1, 1, 4, 4) * 16
    expected = F.interpolate(grid, (32, 32), mode="bilinear", align_corners=False)[0, 0]
    np.testing.assert_allclose(relevance(att).map("x")[1], expected, atol=1e-6 * float(r.max()))


def test_lxmert_has_the_relevance_that_its_authors_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules in the order of their code: language, vision, then the crossings; each pair of co-attentions reads the same R."""
    case = ATTENDING["hf_lxmert"]()
    model, inputs = case.model, case.inputs
    answer = ClassScore(1)
    att = attention(model, inputs, answer, output="question_answering_score")
    matrices: list[Tensor] = []
    softmax = F.softmax

    def kept(*args: object, **kwargs: object) -> Tensor:
        matrices.append(softmax(*args, **kwargs))
        return matrices[-1]

    leaves = dict(inputs.bind(model).leaves)
    leaves["visual_feats"] = leaves["visual_feats"].clone().requires_grad_()
    words = model.lxmert.embeddings.word_embeddings.weight
    words.requires_grad_(True)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "softmax", kept)
        score = model(**leaves).question_answering_score[:, 1].sum()
    words.requires_grad_(False)
    found = torch.autograd.grad(score, matrices, allow_unused=True)
    grads = [torch.zeros_like(p) if g is None else g for p, g in zip(matrices, found, strict=True)]
    assert len(matrices) == len(att) == 12
    text, image = att[4].rows, att[4].columns
    flow = relevance(att, "chefer")
    for sample in range(2):
        cams = [
            (g * p).clamp(min=0).mean(1)[sample].detach().double().numpy() for p, g in zip(matrices, grads, strict=True)
        ]
        tt, ii, ti, it = np.eye(6), np.eye(5), np.zeros((6, 5)), np.zeros((5, 6))
        for cam in cams[:2]:
            tt, ti = tt + cam @ tt, ti + cam @ ti
        for cam in cams[2:4]:
            ii, it = ii + cam @ ii, it + cam @ it
        for layer in (cams[4:8], cams[8:12]):
            to_image, to_text, language, vision = layer
            nt, ni = normalised(tt), normalised(ii)
            ti, tt, it, ii = (
                ti + nt.T @ to_image @ ni, tt + to_image @ it, it + ni.T @ to_text @ nt, ii + to_text @ ti,
            )  # fmt: skip
            tt, ti = tt + language @ tt, ti + language @ ti
            ii, it = ii + vision @ ii, it + vision @ it
        for rows, columns, expected in ((text, text, tt), (text, image, ti), (image, text, it), (image, image, ii)):
            np.testing.assert_allclose(
                part(flow, rows[sample], columns[sample], sample), expected, rtol=1e-4, atol=1e-6
            )
    torch.testing.assert_close(
        flow.map("visual_feats", query=0, of="input_ids")[1],
        torch.tensor(ti[0] * 5).float(),
        rtol=1e-4,
        atol=1e-6,
    )


def naive(att: Sequence[AttentionCall], sample: int) -> dict[tuple[int, int], float]:
    """`R[q] += A R[k]`, token by token and window by window."""
    r: dict[int, dict[int, float]] = {}
    for call in att:
        a = (call.grad * call.probs).clamp(min=0).mean(1)
        before = {token: dict(row) for token, row in r.items()}
        for window in range(len(a)):
            if (call.samples()[window] != sample).all():
                continue
            for i, row in enumerate(call.rows[window].tolist()):
                for j, column in enumerate(call.columns[window].tolist()):
                    if row > 0 and column > 0:
                        for source, amount in before.get(column, {column: 1.0}).items():
                            to = r.setdefault(row, {row: 1.0})
                            to[source] = to.get(source, 0.0) + float(a[window, i, j]) * amount
    return {(row, column): amount for row, entries in r.items() for column, amount in entries.items()}


@pytest.mark.parametrize("name", ["timm_crossvit", "torchvision_swin", "hf_blip", "hf_t5", "timm_siglip", "hf_sam"])
def test_any_architecture_is_followed_token_by_token(name: str) -> None:
    """Class tokens that cross, windows with shifts and padding, encoders and decoders, learned queries."""
    case = ATTENDING[name]()

    def first(output: object) -> Tensor:
        tensors = output if isinstance(output, Tensor) else next(iter(output.values()))  # type: ignore[attr-defined]
        return tensors.flatten(1)[:, ::2].sum(1)

    att = attention(case.model, case.inputs, first, output=lambda output: output)
    flow = relevance(att)
    expected = naive(att, 1)
    tokens = flow.tokens[1].tolist()
    full = np.eye(len(tokens))
    for (row, column), amount in expected.items():
        full[tokens.index(row), tokens.index(column)] = amount
    np.testing.assert_allclose(flow.matrix(1), full, rtol=1e-4, atol=1e-7)


def test_crossvit_adds_up_its_two_grids() -> None:
    case = ATTENDING["timm_crossvit"]()
    att = attention(case.model, case.inputs, ClassScore(1))
    flow = relevance(att)
    cls = att[-1].rows[0, 0]
    places = att[0].forward.places
    tokens = flow.tokens[0]
    line = torch.from_numpy(part(flow, cls[None], tokens))[0]
    expected = torch.zeros(24, 24)
    for n in (6, 2):
        local = [
            i
            for i, t in enumerate(tokens.tolist())
            if abs(float(places.boxes[t][4] - places.boxes[t][1]) - 1 / n) < 1e-6
        ]
        assert len(local) == n * n
        order = sorted(local, key=lambda i: places.boxes[tokens[i]][1:3].tolist())
        grid = line[order].view(1, 1, n, n) * n * n
        expected += F.interpolate(grid, (24, 24), mode="bilinear", align_corners=False)[0, 0]
    torch.testing.assert_close(flow.map("x")[0], expected)


class Joint(nn.Module):
    """A class token and the patches of two images, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.rgb, self.depth = nn.Conv2d(3, WIDTH, 4, 4), nn.Conv2d(1, WIDTH, 8, 8)
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        patches = [self.rgb(rgb).flatten(2).mT, self.depth(depth).flatten(2).mT]
        x = self.encoder(torch.cat([self.cls.expand(len(rgb), -1, -1), *patches], 1))
        return self.head(x[:, 0])


def joint(samples: int = 2) -> tuple[Joint, Inputs]:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = Joint()
        enliven(model)
        return model.eval(), Inputs(rgb=torch.rand(samples, 3, 16, 16), depth=torch.rand(samples, 1, 16, 24))


def test_concatenated_inputs_share_what_the_class_token_knows() -> None:
    model, inputs = joint()
    att = attention(model, inputs, ClassScore(1))
    flow = rollout(att)
    p = [call.probs.mean(1) for call in att]
    mixed = torch.eye(23)
    for layer in p:
        mixed = (0.5 * torch.eye(23) + 0.5 * layer) @ mixed
    maps = flow.maps()
    assert list(maps) == ["rgb", "depth"] and maps.comparable
    assert maps["rgb"].shape == (2, 16, 16) and maps["depth"].shape == (2, 16, 24)
    grids = {"rgb": mixed[:, 0, 1:17].view(2, 1, 4, 4), "depth": mixed[:, 0, 17:].view(2, 1, 2, 3)}
    for name, grid in grids.items():
        expected = F.interpolate(grid * grid[0].numel(), maps[name].shape[1:], mode="bilinear", align_corners=False)
        torch.testing.assert_close(maps[name], expected[:, 0])
    between = flow.between()
    assert between.queries == between.keys == ("rgb", "depth", "own")
    torch.testing.assert_close(
        between.shares[:, 0, 2], torch.stack([*(g.flatten(1).sum(1) for g in grids.values()), mixed[:, 0, 0]], 1)
    )
    torch.testing.assert_close(between.shares[:, 0, 0, 1], mixed[:, 1:17, 17:].sum(2).mean(1))
    table = flow_matrix(att)
    assert table.calls == tuple(call.name for call in att)
    torch.testing.assert_close(table.shares[:, 1, 1, 0], p[1][:, 17:, 1:17].sum(2).mean(1))
    torch.testing.assert_close(table.shares.sum(-1), torch.ones(2, 2, 3))


def test_the_demo_says_where_the_photo_looked() -> None:
    model, inputs = EditDetector().eval(), demo()
    att = attention(model, inputs, ClassScore(1))
    once = relevance(att)
    for name in ("frequency", "texture"):
        looked = att[f"{name}_attention"].heatmap(name, value="grad*weights")
        for rule in ("block", "chefer"):
            torch.testing.assert_close(relevance(att, rule).map(name), looked)
        pixel = att[f"{name}_attention"].heatmap(name, query=(20, 50), value="grad*weights")
        torch.testing.assert_close(once.map(name, query=(20, 50)), pixel)
        torch.testing.assert_close(
            once.map(name, query=3, of="rgb"), att[f"{name}_attention"].heatmap(name, query=3, value="grad*weights")
        )
    assert list(once.maps()) == ["frequency", "texture"]
    mixed = rollout(att)
    torch.testing.assert_close(mixed.between().shares[:, 0, 0], torch.tensor([[0.25, 0.25, 0.5]]).expand(2, 3))
    own_place = mixed.map("rgb", query=(0, 0))
    assert own_place[0].argmax() == 0 and float(own_place[0, -8:].abs().max()) == 0
    assert "rollout    rgb      0.25  0.25       0.5" in repr(mixed.between())


def demo(samples: int = 2) -> Inputs:
    g = torch.Generator().manual_seed(0)
    shapes = {"rgb": (3, 64, 64), "frequency": (64, 16, 16), "texture": (3, 32, 32)}
    return Inputs(**{name: torch.rand(samples, *shape, generator=g) for name, shape in shapes.items()})


@pytest.mark.parametrize("how", [rollout, relevance, lambda att: relevance(att, "chefer"), legrad], ids=["rollout", "block", "chefer", "legrad"])  # fmt: skip
def test_a_batch_is_its_samples(how: Callable[[Attention], Flow | dict[str, Tensor]]) -> None:
    model, inputs = joint(3)

    def maps(call: Inputs) -> dict[str, Tensor]:
        found = how(attention(model, call, ClassScore(1)))
        return found.maps() if isinstance(found, Flow) else found

    together = maps(inputs)
    for i in range(3):
        alone = maps(Inputs(**{name: x[i : i + 1] for name, x in inputs.leaves.items()}))
        for name, expected in together.items():
            torch.testing.assert_close(alone[name][0], expected[i], rtol=1e-4, atol=1e-6)


def test_legrad_is_its_formula_onto_every_input() -> None:
    model, inputs = joint()
    att = attention(model, inputs, ClassScore(1))
    line = sum(call.grad.clamp(min=0).mean((1, 2)) for call in att)
    maps = legrad(att)
    assert not maps.comparable and list(maps) == ["rgb", "depth"]
    expected = F.interpolate(
        line[:, None, 17:].unflatten(2, (2, 3)) * 6, (16, 24), mode="bilinear", align_corners=False
    )
    torch.testing.assert_close(maps["depth"], expected[:, 0])


def test_legrad_of_the_last_layer_is_that_of_torch_cam() -> None:
    case = ATTENDING["torchvision_vit"]()
    model = case.model
    x = next(iter(case.inputs.bind(model).leaves.values()))
    att = attention(model, x, ClassScore(1))
    last = model.encoder.layers[-1]
    projection = lambda tokens: model.heads(model.encoder.ln(tokens)[:, 0])  # noqa: E731
    with torchcam.LeGrad(model, last, score_projection=projection) as extractor:
        model(x.clone().requires_grad_())
        theirs = extractor(1, normalized=False)[0]
    found = legrad(att[-1:])["x"]
    expected = F.interpolate(theirs[:, None] * 16, (32, 32), mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_attention_to_padding_is_shared_out_among_the_others() -> None:
    """The last windows of this Swin have a column of padding; the model does not mask it."""
    case = ATTENDING["torchvision_swin"]()
    att = attention(case.model, case.inputs)[-1:]
    call = att[0]
    inside = call.columns[:, None, None] > 0
    assert not inside.all()
    p = (call.probs * inside).mean(1)
    p = 0.5 * p / p.sum(2, keepdim=True)
    flow = rollout(att)
    for window in range(len(p)):
        sample = int(call.samples()[window].max())
        rows, columns = call.rows[window] > 0, call.columns[window] > 0
        found = part(flow, call.rows[window][rows], call.columns[window][columns], sample)
        expected = p[window][rows][:, columns] + 0.5 * torch.eye(int(rows.sum()))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_queries_that_see_nothing_stay_what_they_are() -> None:
    model = nn.MultiheadAttention(WIDTH, 2, batch_first=True).eval()
    x = torch.randn(2, 4, WIDTH)
    mask = torch.tensor([[False] * 4, [True] * 4])
    with torch.no_grad(), record_attention(model) as att:
        model(x, x, x, key_padding_mask=mask, need_weights=False)
    assert not att[0].probs[1].any()
    flow = rollout(att)
    np.testing.assert_array_equal(flow.matrix(1), np.eye(4))
    np.testing.assert_allclose(flow.matrix(0).sum(1), np.ones(4), rtol=1e-6)
    assert flow_matrix(att).shares.isnan().tolist() == [[[[False]]], [[[True]]]]


class Slots(nn.Module):
    """Attention that competes over the queries, then some that does not."""

    def __init__(self, both: bool) -> None:
        super().__init__()
        self.attend = Attend() if both else None

    def forward(self, x: Tensor, slots: Tensor) -> Tensor:
        y = (slots @ x.mT).softmax(1) @ x
        return y if self.attend is None else self.attend(y, x)


def test_attention_over_the_queries_is_left_out_with_a_warning() -> None:
    inputs = (torch.rand(2, 5, WIDTH), torch.rand(2, 3, WIDTH))
    with torch.no_grad(), record_attention(Slots(both=True)) as att:
        att.model(*inputs)
    with pytest.warns(UserWarning, match="attention '#0' is left out: its softmax runs over the queries"):
        flow = rollout(att)
    torch.testing.assert_close(flow.matrix(), rollout(att[1:]).matrix())
    with torch.no_grad(), record_attention(Slots(both=False)) as att:
        att.model(*inputs)
    with warnings.catch_warnings(), pytest.raises(MulticamError, match="none of the attentions can be taken together"):
        warnings.simplefilter("ignore")
        rollout(att)
    table = flow_matrix(att)
    assert table.queries == ("slots",) and table.keys == ("x",)
    torch.testing.assert_close(table.shares, torch.ones(2, 1, 1, 1))


def test_two_towers_are_asked_one_by_one() -> None:
    case = ATTENDING["hf_clip"]()
    with torch.no_grad(), record_attention(case.model) as att:
        case.inputs.bind(case.model).run(case.model)
    flow = rollout(att)
    with pytest.warns(UserWarning, match="the rollout onto 'pixel_values' is zero"):
        flow.map("pixel_values")
    vision = rollout(att.find("vision_model"))
    torch.testing.assert_close(flow.map("pixel_values", of="pixel_values"), vision.map("pixel_values"))
    assert list(vision.maps()) == ["pixel_values"]


def test_passes_are_told_apart() -> None:
    model, inputs = joint()
    with torch.no_grad(), record_attention(model) as att:
        inputs.run(model)
        Inputs(rgb=inputs.leaves["rgb"].flip(3), depth=inputs.leaves["depth"]).run(model)
    for how in (rollout, flow_matrix):
        with pytest.raises(MulticamError, match=r"of the passes 0, 1: say which with forward="):
            how(att)
        with pytest.raises(MulticamError, match=r"no attention is of pass 2; there are passes 0, 1"):
            how(att, forward=2)
    first, second = (rollout(att, forward=i).map("rgb") for i in (0, 1))
    assert not torch.equal(first, second)
    torch.testing.assert_close(first, rollout(att[:2]).map("rgb"))


def test_what_cannot_be_done_is_said() -> None:
    model, inputs = joint()
    with torch.no_grad(), record_attention(model) as att:
        inputs.run(model)
    flow = rollout(att)
    for wrong, message in (
        (lambda: rollout([]), r"give attentions of a recording, such as att, att\[-2:\]"),
        (lambda: rollout(att, residual=1.5), "residual is a part from 0 to 1, not 1.5"),
        (lambda: relevance(att), "has no gradient"),
        (lambda: legrad(att), "has no gradient"),
        (lambda: flow.map("rbg"), "no input 'rbg'; did you mean 'rgb'"),
        (lambda: flow.map("rgb", of="rbg"), "no input 'rbg'; did you mean 'rgb'"),
        (lambda: flow.map("rgb", query=23), "the rollout has queries 0 to 22, not 23"),
        (lambda: flow.map("rgb", query=16, of="rgb"), "the rollout has queries 0 to 15, not 16"),
        (lambda: flow.map("rgb", query=(3, 99), of="rgb"), r"pixel \(3, 99\) lies outside of input 'rgb' of 16 x 16"),
        (lambda: flow.map("rgb", query=(3, 3)), r"stand for \['depth', 'rgb'\]: say whose pixel"),
        (lambda: flow.matrix(2), "the rollout has samples 0 to 1, not 2"),
    ):  # fmt: skip
        with pytest.raises(MulticamError, match=message):
            wrong()
    with torch.no_grad(), record_attention(EditDetector().eval()) as att:
        demo().run(att.model)
    with pytest.raises(MulticamError, match="no query of the rollout stands for input 'frequency'"):
        rollout(att).map("texture", of="frequency")
    with torch.no_grad(), record_attention(ATTENDING["timm_xcit"]().model) as att:
        ATTENDING["timm_xcit"]().inputs.run(att.model)
    with pytest.raises(
        MulticamError, match=r"could not be followed .* leave it out: give \[call for call in att if call.path != "
    ):
        rollout(att)
    assert "unknown" in flow_matrix(att).keys


WRONG = """
import torch
from torch import nn
from multicam import MulticamError
from multicam.attending.flow import relevance, rollout
from multicam.attending.attend import attention
att = attention(nn.TransformerEncoderLayer(8, 2, batch_first=True), torch.rand(1, 5, 8))
for wrong in (
    lambda: rollout(att, heads="means"), lambda: relevance(att, "chef"), lambda: rollout(att, residual="half"),
    lambda: rollout(att[0]), lambda: rollout([1]), lambda: rollout(att).map("src", query=None),
):
    try:
        wrong()
    except MulticamError as error:
        print(error)
"""


def test_wrong_types_are_said() -> None:
    """In a Python of its own, where annotations are not checked at run time."""
    said = subprocess.run([sys.executable, "-c", WRONG], capture_output=True, text=True, check=True).stdout.splitlines()
    expected = [
        "no heads 'means'; did you mean 'mean'? There are: 'mean', 'max', 'min'",
        "no rule 'chef'; did you mean 'chefer'? There are: 'block', 'chefer'",
        "residual is a number, not 'half'",
        "give attentions of a recording, such as att, att[-2:] or att.find(…), not AttentionCall(self_attn#0",
        "give attentions of a recording, such as att, att[-2:] or att.find(…), not [1]",
        'a query is "mean", "cls", a number or a pixel (y, x), not None',
    ]
    assert len(said) == len(expected)
    for line, start in zip(said, expected, strict=True):
        assert line.startswith(start)


def test_the_order_of_time_is_the_order_of_calls() -> None:
    model, inputs = joint()
    att = attention(model, inputs)
    assert all(first.forward is second.forward for first, second in pairwise(att))
    backwards = rollout(att[::-1]).matrix()
    assert not torch.allclose(backwards, rollout(att).matrix())


class Latents(nn.Module):
    """Learned queries that read two inputs by an attention each, and attend to each other."""

    def __init__(self, fused: str) -> None:
        super().__init__()
        self.fused = fused
        self.queries = nn.Parameter(torch.randn(1, 3, 8))
        self.rgb, self.freq = (nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2))
        self.patches = nn.ModuleList([nn.Conv2d(3, 8, 4, 4), nn.Conv2d(1, 8, 4, 4)])
        self.both, self.own = nn.Linear(16, 8), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, rgb: Tensor, freq: Tensor) -> Tensor:
        tokens = [patch(x).flatten(2).mT for patch, x in zip(self.patches, (rgb, freq), strict=True)]
        queries = self.queries.expand(len(rgb), -1, -1)
        read = [
            attn(queries, x, x, need_weights=False)[0] for attn, x in zip((self.rgb, self.freq), tokens, strict=True)
        ]
        x = read[0] + read[1] if self.fused == "added" else self.both(torch.cat(read, -1))
        return (x + self.own(x, x, x, need_weights=False)[0]).mean(1)


@pytest.mark.parametrize("fused", ["added", "mixed"])
def test_learned_queries_that_read_several_inputs_are_one_token_that_read_all(fused: str) -> None:
    torch.manual_seed(0)
    inputs = {"rgb": torch.rand(2, 3, 12, 16), "freq": torch.rand(2, 1, 12, 16)}
    att = attention(Latents(fused), inputs, 1)
    together = relevance(att).maps(query="mean")
    for name, reads in (("rgb", att[0]), ("freq", att[1])):
        alone = relevance([reads, att[2]]).maps(query="mean")[name]
        assert alone.mean() > 0
        torch.testing.assert_close(together[name], alone)
