"""A model and its inputs from a spec, which is a literal."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from inspect import Parameter, Signature
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from multicam import Inputs
from tests.fuzz.blocks import AROUND, HOOKED, MODULES, WIDTH, Around, Do, Hooked
from tests.fuzz.rows import COMPANY, ROWS, STATE, THREADED, Rows, State, Threaded, Together

CLASSES = 3
Block = str | tuple[Any, ...]  # the name of one, or a wrapper's name and the blocks in it


class Literal:
    """What is shown as it is written: without what is as usual."""

    def __repr__(self) -> str:
        said = [each for each in fields(self) if getattr(self, each.name) != each.default]  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(f'{each.name}={getattr(self, each.name)!r}' for each in said)})"


@dataclass(frozen=True, repr=False)
class Stream(Literal):
    """An input with its encoder.

    Attributes:
        name: The input's.
        kind: "image", "photo" (smaller, one channel), "signal" (as words), "ids", "table", or "bag" (instances, one sample).
        blocks: Of its encoder.
        writes: Whether the model writes into the input.
    """

    name: str
    kind: str
    blocks: tuple[Block, ...] = ()
    writes: bool = False


@dataclass(frozen=True, repr=False)
class Spec(Literal):
    """All that makes a case.

    Attributes:
        seed: Of weights and inputs.
        batch: How many samples.
        streams: Its inputs with encoders.
        fuse: How they meet.
        head: Blocks on the vector that they become.
        sides: Inputs without an encoder, see `SIDES`.
        runs: How the streams run: "" one after the other, "each" (all of it sample by sample), "threads".
        late: Whether the head reads what hooks on the encoders kept.
        call: How it is called: "positional", "keyword", "dict", "list", "tuple", "nested", "mixed".
        returns: "tensor", "dict" or "tuple".
        target: "class", "classes", "top" or "function".
        batch_size: Of the what-ifs.
        again: Whether the same was asked about other inputs before.
        no_grad: Whether the caller is under `torch.no_grad()`.
    """

    seed: int
    batch: int
    streams: tuple[Stream, ...]
    fuse: str = "sum"
    head: tuple[Block, ...] = ()
    sides: tuple[str, ...] = ()
    runs: str = ""
    late: bool = False
    call: str = "keyword"
    returns: str = "tensor"
    target: str = "class"
    batch_size: int = 32
    again: bool = False
    no_grad: bool = False


LAYOUTS = {"image": "image", "photo": "image", "signal": "words", "ids": "words", "table": "vector", "bag": "image"}
SHAPES = {"image": (3, 6, 5), "photo": (1, 4, 6), "signal": (4, 5), "ids": (4,), "table": (6,), "bag": (3, 2, 4, 4)}
FUSES = ("sum", "cat", "mul", "cross", "cross_written", "stack", "difference_", "gated", "contrast")
CALLS = ("positional", "keyword", "dict", "list", "tuple", "nested", "mixed")
# What stands beside the streams; those of SAME are the same for all samples.
SIDES = ("lengths", "flags", "weights", "rows", "captions", "bags", "mask", "names", "scale", "size", "nothing", "prompts",
         "ignored", "unread")  # fmt: skip
SAME = ("scale", "size", "nothing", "prompts")


def chain(blocks: Sequence[Block], layout: str, shared: dict[str, nn.Module]) -> nn.Sequential:
    return nn.Sequential(*(block(each, layout, shared) for each in blocks))


def block(what: Block, layout: str, shared: dict[str, nn.Module]) -> nn.Module:
    """A block by its name; "shared" is one module for all streams of a layout."""
    if isinstance(what, tuple):
        kind, inner = what[0], chain(what[1:], layout, shared)
        for kinds, wrapper in ((AROUND, Around), (HOOKED, Hooked), (ROWS, Rows), (THREADED, Threaded)):
            if kind in kinds:
                return wrapper(kind, inner)
        raise KeyError(kind)
    if what == "shared":
        if layout not in shared:
            shared[layout] = nn.Sequential(MODULES["mix"](layout), nn.Tanh())
        return shared[layout]
    if what in MODULES:
        return MODULES[what](layout)
    if what in STATE:
        return State(what)
    return Together(what) if what in COMPANY else Do(what)


def stem(kind: str) -> nn.Module:
    channels = SHAPES[kind][0] if LAYOUTS[kind] == "image" else SHAPES[kind][-1]
    if kind == "ids":
        return nn.Embedding(8, WIDTH)
    if kind == "bag":
        return nn.Conv2d(2, WIDTH, 3, padding=1)
    return nn.Conv2d(channels, WIDTH, 3, padding=1) if LAYOUTS[kind] == "image" else nn.Linear(channels, WIDTH)


class Encoder(nn.Module):
    def __init__(self, stream: Stream, shared: dict[str, nn.Module]) -> None:
        super().__init__()
        self.kind, self.writes = stream.kind, stream.writes
        self.stem = stem(stream.kind)
        self.blocks = chain(stream.blocks, LAYOUTS[stream.kind], shared)

    def forward(self, x: Tensor) -> Tensor:
        if self.writes:
            x[..., 0] = x[..., 0] * 2
        if self.kind == "bag":
            return self.blocks(self.stem(x.squeeze(0))).amax(0, keepdim=True)
        return self.blocks(self.stem(x))


class Net(nn.Module):
    """The model of a spec; its `forward` gets its signature in `build`."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec, self.seen = spec, {}
        shared: dict[str, nn.Module] = {}
        self.encoders = nn.ModuleDict({stream.name: Encoder(stream, shared) for stream in spec.streams})
        self.cross = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.join = nn.Linear(WIDTH * len(spec.streams), WIDTH)
        self.head = chain(spec.head, "vector", shared)
        self.out = nn.Linear(WIDTH, CLASSES)
        self.pool = ThreadPoolExecutor(2) if spec.runs == "threads_kept" else None
        if spec.late:
            for name, encoder in self.encoders.items():
                encoder.stem.register_forward_hook(lambda m, i, o, name=name: self.seen.__setitem__(name, o))

    def compute(self, values: Mapping[str, Any]) -> Any:
        if self.spec.runs == "each":
            count = len(values[self.spec.streams[0].name])
            found = torch.cat([self.logits(taken(values, [i])) for i in range(count)])
        else:
            found = self.logits(values)
        return {"tensor": found, "dict": {"logits": found, "half": found[:, :1] / 2}, "tuple": (found * 2, found)}[
            self.spec.returns
        ]

    def logits(self, values: Mapping[str, Any]) -> Tensor:
        features = self.encoded([(encoder, values[name]) for name, encoder in self.encoders.items()])
        x = self.head(beside(self.fused(features), values))
        if self.spec.late:
            x = x + sum(pooled(seen).tanh() for seen in self.seen.values())
        return self.out(x) if "prompts" not in values else self.out(x) + x @ values["prompts"].mT

    def encoded(self, jobs: Sequence[tuple[nn.Module, Any]]) -> list[Tensor]:
        if not self.spec.runs.startswith("threads"):
            return [encoder(x) for encoder, x in jobs]
        graph = torch.is_grad_enabled()

        def run(job: tuple[nn.Module, Any]) -> Tensor:
            with torch.set_grad_enabled(graph):
                return job[0](job[1])

        if self.pool is not None:
            return list(self.pool.map(run, jobs))
        with ThreadPoolExecutor(len(jobs)) as pool:
            return list(pool.map(run, jobs))

    def fused(self, features: Sequence[Tensor]) -> Tensor:
        vectors = [pooled(x) for x in features]
        first, *rest = vectors
        match self.spec.fuse:
            case "cat":
                return self.join(torch.cat(vectors, 1))
            case "mul":
                return torch.stack(vectors).prod(0) + first
            case "cross":
                others = torch.cat([tokens(x) for x in features[1:] or features], 1)
                return first + self.cross(tokens(features[0]), others, others)[0].mean(1)
            case "cross_written":
                others = torch.cat([tokens(x) for x in features[1:] or features], 1)
                query = tokens(features[0])
                return first + ((query @ others.mT).softmax(-1) @ others).mean(1)
            case "stack":
                together = torch.stack(vectors, 1)
                return self.cross(together, together, together)[0].mean(1)
            case "difference_":
                for other in rest:
                    first -= other
                return first
            case "gated":
                return first * sum(rest, torch.zeros_like(first)).sigmoid()
            case "contrast":
                a, b = first, sum(rest, torch.zeros_like(first))
                return first * (a @ b.mT)[:, :1].tanh()
        return torch.stack(vectors).sum(0)


def pooled(x: Tensor) -> Tensor:
    return x.mean((2, 3)) if x.ndim == 4 else x.mean(1) if x.ndim == 3 else 1.0 * x


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).mT if x.ndim == 4 else x if x.ndim == 3 else x[:, None]


def beside(x: Tensor, values: Mapping[str, Any]) -> Tensor:
    """The fused vector with what stands beside the streams, sample by sample as such code is written."""
    x = x.clone()
    for i, n in enumerate(values.get("lengths", ())):
        x[i, int(n) :] = 0.1
    for i, flag in enumerate(values.get("flags", ())):
        if flag:
            x[i] *= 2
    for i, bag in enumerate(values.get("bags", ())):
        x[i] += bag.mean(0)
    if "captions" in values:
        x = x + x.new_tensor([len(caption) / 10 for caption in values["captions"]])[:, None]
    if "weights" in values:
        x = x * torch.from_numpy(values["weights"])[:, None]
    if "rows" in values:
        x = x + torch.from_numpy(values["rows"])
    if "mask" in values:
        x = x.masked_fill(values["mask"], 0.2)
    if "scale" in values:
        x = x * values["scale"]
    return x * values["size"][0] / values["size"][1] if "size" in values else x


def side(name: str, batch: int, g: torch.Generator) -> Any:
    some = torch.randint(1, WIDTH + 1, (batch,), generator=g).tolist()
    match name:
        case "lengths":
            return some
        case "flags":
            return [n > 2 for n in some]
        case "weights":
            return np.array(some) / 2
        case "rows":
            return torch.randn(batch, WIDTH, generator=g, dtype=torch.float64).numpy()
        case "captions" | "names":
            return ["a" * n for n in some]
        case "bags":
            return [torch.randn(n, WIDTH, generator=g, dtype=torch.float64) for n in some]
        case "mask":
            return torch.rand(batch, WIDTH, generator=g) > 0.6
        case "scale":
            return 1.5
        case "size":
            return (3, 2)
        case "nothing":
            return None
        case "prompts":
            return torch.randn(CLASSES, WIDTH, generator=g, dtype=torch.float64)
    shape = (2, 4, 4) if name == "ignored" else (3,)
    return torch.randn(batch, *shape, generator=g, dtype=torch.float64)


def inputs(spec: Spec) -> dict[str, Any]:
    """The value of each input by name, in the order of the call."""
    g = torch.Generator().manual_seed(spec.seed)
    found: dict[str, Any] = {}
    for stream in spec.streams:
        shape = (spec.batch, *SHAPES[stream.kind])
        if stream.kind == "ids":
            found[stream.name] = torch.randint(1, 8, shape, generator=g)
        else:
            found[stream.name] = torch.randn(shape, generator=g, dtype=torch.float64)
    found |= {name: side(name, spec.batch, g) for name in spec.sides}
    return found


def taken(values: Mapping[str, Any], samples: Sequence[int]) -> dict[str, Any]:
    """The inputs of some samples."""
    found = {}
    for name, x in values.items():
        if name in SAME:
            found[name] = x
        elif isinstance(x, list):
            found[name] = [x[i] for i in samples]
        else:
            found[name] = x[list(samples)]
    return found


def packed(spec: Spec, values: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the model's call."""
    names = list(values)
    match spec.call:
        case "positional":
            return tuple(values.values()), {}
        case "dict":
            return (dict(values),), {}
        case "list" | "tuple":
            several = [values[name] for name in names]
            return (several if spec.call == "list" else tuple(several),), {}
        case "nested":
            return ({"first": values[names[0]], "rest": {name: values[name] for name in names[1:]}},), {}
        case "mixed":
            return (values[names[0]],), {name: values[name] for name in names[1:]}
    return (), dict(values)


def call_of(spec: Spec, values: Mapping[str, Any]) -> Any:
    """The call as a user gives it to the package."""
    args, kwargs = packed(spec, values)
    if "prompts" in values:
        return Inputs(*args, **kwargs).constant(leaf(spec, "prompts"))
    if spec.call in ("dict", "tuple", "nested", "mixed"):
        return Inputs(*args, **kwargs)
    return args[0] if spec.call == "list" else kwargs or args


def leaf(spec: Spec, name: str) -> str:
    """What the package calls an input."""
    names = [*(stream.name for stream in spec.streams), *spec.sides]
    if spec.call in ("list", "tuple"):
        return f"batch.{names.index(name)}"
    if spec.call == "nested":
        return "batch.first" if name == names[0] else f"batch.rest.{name}"
    return f"batch.{name}" if spec.call == "dict" else name


def build(spec: Spec) -> nn.Module:
    """The model of a spec, always the same, somewhere in the middle of its training."""
    names = [*(stream.name for stream in spec.streams), *spec.sides]
    wrapped = spec.call not in ("positional", "keyword", "mixed")

    def forward(self: Net, *args: Any, **kwargs: Any) -> Any:
        if not wrapped:
            return self.compute(dict(zip(names, args, strict=False)) | kwargs)
        (batch,) = args
        if spec.call in ("list", "tuple"):
            return self.compute(dict(zip(names, batch, strict=True)))
        return self.compute({names[0]: batch.pop("first"), **batch["rest"]} if spec.call == "nested" else batch)

    parameters = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in (["batch"] if wrapped else names)]
    forward.__signature__ = Signature([Parameter("self", Parameter.POSITIONAL_OR_KEYWORD), *parameters])  # type: ignore[attr-defined]
    with torch.random.fork_rng():
        torch.manual_seed(spec.seed)
        model = type("Net", (Net,), {"forward": forward})(spec).double()
    model.out.eval()
    model.join.requires_grad_(False)
    model.out.bias.grad = torch.ones_like(model.out.bias)
    return model


def blocks_of(spec: Spec) -> set[str]:
    """The names of all blocks of a model."""
    return names_in([*spec.head, *(each for stream in spec.streams for each in stream.blocks)])


def names_in(blocks: Sequence[Block]) -> set[str]:
    """The names of all blocks in a chain, those in wrappers too."""
    found: set[str] = set()
    for each in blocks:
        found |= {each[0], *names_in(each[1:])} if isinstance(each, tuple) else {each}
    return found
