"""Random specs, and the smallest one that still fails."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from tests.fuzz.blocks import AROUND, HOOKED, MODULES, OPERATIONS
from tests.fuzz.models import CALLS, FUSES, SIDES, Block, Spec, Stream
from tests.fuzz.rows import COMPANY, ROWS, STATE, THREADED

NAMES = ("rgb", "depth", "words", "table")


def random_spec(seed: int) -> Spec:
    """The spec of a seed: every part of the grammar may meet every other."""
    draw = random.Random(seed)
    batch = draw.choice([1, 1, 2, 2, 3])
    kinds = [draw.choice(["image", "image", "photo", "signal", "ids", "table"]) for _ in range(draw.randint(1, 3))]
    if batch == 1 and draw.random() < 0.1:
        kinds[0] = "bag"
    # Most models have one peculiarity; where several meet, only the first that fails is seen.
    odd = draw.choice([0.05, 0.15, 0.4])
    streams = tuple(
        Stream(name, kind, _blocks(draw, draw.randint(0, 3), odd), writes=kind != "ids" and draw.random() < odd / 3)
        for name, kind in zip(NAMES, kinds, strict=False)
    )
    return Spec(
        seed=seed,
        batch=batch,
        streams=streams,
        fuse=draw.choice(FUSES[:-1]) if draw.random() < 0.97 else FUSES[-1],
        head=_blocks(draw, draw.randint(0, 2), odd),
        sides=tuple(draw.sample(SIDES, draw.choice([0, 0, 1, 1, 2, 3]))),
        runs=draw.choice(["each", "threads", "threads_kept"]) if draw.random() < odd else "",
        late=draw.random() < odd,
        call=draw.choice(CALLS),
        returns=draw.choice(["tensor", "tensor", "dict", "tuple"]),
        target=draw.choice(["class", "class", "classes", "top", "function"]),
        batch_size=draw.choice([1, 2, 32, 32]),
        again=draw.random() < 0.3,
        no_grad=draw.random() < 0.1,
    )


def _blocks(draw: random.Random, count: int, odd: float, depth: int = 0) -> tuple[Block, ...]:
    return tuple(_block(draw, odd, depth) for _ in range(count))


def _block(draw: random.Random, odd: float, depth: int) -> Block:
    if draw.random() > odd:
        return draw.choice(["mix", "relu", "tanh", "relu_", "gelu", *MODULES, "mix", "shared"])
    kinds: list[Sequence[str]] = [[*OPERATIONS], [*COMPANY], STATE]
    if depth < 2:
        kinds += [AROUND, HOOKED, ROWS, THREADED, HOOKED, ROWS]
    kind = draw.choice(kinds)
    name = draw.choice(kind)
    if any(kind is leafs for leafs in kinds[:3]):
        return name
    # What is kept by one thread would be read by another, as it happens.
    return (name, *_blocks(draw, draw.randint(1, 2), 0 if name == "pool_each" else odd, depth + 1))


def smallest(spec: Spec, fails: Callable[[Spec], bool]) -> Spec:
    """A spec that fails, and from which no part can be dropped."""
    for smaller in _smaller(spec):
        if fails(smaller):
            return smallest(smaller, fails)
    return spec


def _smaller(spec: Spec) -> Iterator[Spec]:
    for i in range(len(spec.streams)):
        if len(spec.streams) > 1:
            yield replace(spec, streams=spec.streams[:i] + spec.streams[i + 1 :])
    for side in spec.sides:
        yield replace(spec, sides=tuple(each for each in spec.sides if each != side))
    if spec.batch > 1:
        yield replace(spec, batch=spec.batch - 1)
    plain = Spec(spec.seed, spec.batch, spec.streams)
    for name in ("fuse", "runs", "late", "call", "returns", "target", "batch_size", "again", "no_grad"):
        if getattr(spec, name) != getattr(plain, name):
            yield replace(spec, **{name: getattr(plain, name)})
    for head in _fewer(spec.head):
        yield replace(spec, head=head)
    for i, stream in enumerate(spec.streams):
        others = [replace(stream, blocks=blocks) for blocks in _fewer(stream.blocks)]
        if stream.writes:
            others.append(replace(stream, writes=False))
        for other in others:
            yield replace(spec, streams=(*spec.streams[:i], other, *spec.streams[i + 1 :]))


def _fewer(blocks: Sequence[Block]) -> Iterator[tuple[Block, ...]]:
    """The chain without one of its blocks, with what is in a wrapper instead of it, or with fewer in it."""
    for i, each in enumerate(blocks):
        before, behind = tuple(blocks[:i]), tuple(blocks[i + 1 :])
        yield before + behind
        if isinstance(each, tuple):
            yield before + each[1:] + behind
            for inner in _fewer(each[1:]):
                yield (*before, (each[0], *inner), *behind)
