"""Seeing the attention of a model: around any code, or of one call."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from threading import local
from typing import Any

from torch import nn

from multicam.attending.assembling import Assembling, Keep, Stream
from multicam.attending.attentions import Attention
from multicam.call.inputs import Inputs
from multicam.call.scorer import OutputLike, Scorer, TargetLike, select_output
from multicam.errors import MulticamError, unknown
from multicam.watch.finite import Asked
from multicam.watch.reshape import Tokens
from multicam.watch.saved import retried
from multicam.watch.undisturbed import alone, module_by_module, module_paths, undisturbed, unwrapped


class _Open(local):
    """The blocks of a thread that have begun, in order: switches and modes are put back one in another."""

    def __init__(self) -> None:
        self.blocks: list[ExitStack] = []


_OPEN = _Open()


@contextmanager
def record_attention(
    model: nn.Module,
    *,
    keep: Keep = "lazy",
    gradients: bool = False,
    layouts: Mapping[str, Tokens] | None = None,
    streams: Mapping[str, Stream] | None = None,
) -> Iterator[Attention]:
    """Record every attention of the model's forward passes inside of the block.

    The model runs as it is, in the mode that it is in, and returns what it returns otherwise, bit for bit: fused kernels stay
    fused, and their probabilities are computed from queries and keys when somebody asks for them. Only the fast path of
    `nn.TransformerEncoder`, which calls none of its layers, is off meanwhile, and compiled models run eagerly.

    Args:
        model: Any module.
        keep: "lazy" keeps queries and keys of fused kernels; "probs" keeps probabilities; a function is given each
            `AttentionCall` as it happens, and only what it returns is kept, in `Attention.kept`, beside the ids of tokens, so
            that memory hardly grows over many passes.
        gradients: Make gradients possible for a model whose parameters are frozen.
        layouts: For an input how its tokens lie among queries or keys, where that could not be followed:
            `{"freq": tokens(14, 14, prefix=1)}`.
        streams: For a module of which input its queries and its keys are, where that could not be followed:
            `{"fusion.attn": ("rgb", "freq")}`; None for a side leaves it as it was found. An image needs its layout, too.

    Raises:
        MulticamError: At the end of the block, if no forward pass of the model ran in it, or no attention was seen; in a pass, if
            `layouts` or `streams` do not fit what runs.

    Example:
        >>> import torch
        >>> model = nn.TransformerEncoderLayer(8, 2, batch_first=True)
        >>> with record_attention(model) as att:
        ...     _ = model(torch.rand(1, 5, 8))
        >>> att["self_attn"].probs.shape
        torch.Size([1, 2, 5, 5])
    """
    inner = unwrapped(model)
    record, assembling = _assembled(inner, keep, layouts, streams)
    with ExitStack() as stack:
        stack.enter_context(alone())
        stack.enter_context(module_by_module())
        if gradients:
            stack.enter_context(_graph_from_the_start(inner))
        stack.enter_context(assembling.watch(gradients))
        _OPEN.blocks = [*_OPEN.blocks, stack]
        try:
            yield record
        finally:
            in_order = _end(stack)
    if not in_order:
        raise MulticamError(
            "blocks of record_attention end in the reverse order of their beginnings, the last one first; one that began before another ended "
            "before it, and both ended then: nest them with two with-statements"
        )
    _refuse_empty(record)


def _assembled(
    model: nn.Module, keep: Keep, layouts: Mapping[str, Tokens] | None, streams: Mapping[str, Stream] | None
) -> tuple[Attention, Assembling]:
    """An empty record of a model's attentions, and what will fill it."""
    if not callable(keep) and keep not in ("lazy", "probs"):
        raise unknown("keep", keep, ("lazy", "probs"))
    layouts = _mapping("layouts", layouts, '{"freq": tokens(14, 14)}')
    streams = _mapping("streams", streams, '{"fusion.attn": ("rgb", "freq")}')
    if not all(isinstance(layout, Tokens) for layout in layouts.values()):
        raise MulticamError(f"a layout is tokens(rows, columns, prefix=…), not in {layouts!r}")
    if not all(isinstance(stream, tuple) and len(stream) == 2 for stream in streams.values()):
        raise MulticamError(f"a stream is two inputs, that of the queries and that of the keys, not in {streams!r}")
    for path in streams:
        if path not in module_paths(model):
            raise unknown("module in streams", path, module_paths(model))
    record = Attention(model)
    return record, Assembling(record, keep, layouts, streams)


def _refuse_empty(record: Attention) -> None:
    name = type(record.model).__name__
    if not record.forwards:
        raise MulticamError(
            f"no forward pass of {name} ran inside the block in this thread; data-parallel models run in others: "
            "call the model inside of it"
        )
    if not record:
        seen = "\n".join(f"  {unseen.path}: {unseen.what}" for unseen in record.skipped + record.blind_spots)
        raise MulticamError(
            f"{name} ran no attention that could be seen" + (f"; what looked like it:\n{seen}" if seen else "")
        )


def attention(
    model: nn.Module,
    inputs: Any,
    target: TargetLike | None = None,
    *,
    output: OutputLike = None,
    keep: Keep = "lazy",
    layouts: Mapping[str, Tokens] | None = None,
    streams: Mapping[str, Stream] | None = None,
) -> Attention:
    """The attentions of one forward pass in evaluation mode, and with a target their gradients.

    Args:
        model: Any module; it is not changed.
        inputs: What it takes, see `Inputs.of`.
        target: What to differentiate, see `multicam.call.scorer.as_target`; `TopClass()` for each sample's top class. None: attention only,
            without a backward pass.
        output: Which part of the model's output the target sees.
        keep, layouts, streams: As for `record_attention`.

    Example:
        >>> import torch
        >>> from multicam.call.targets import TopClass
        >>> from multicam.demo.detector import EditDetector
        >>> inputs = {"rgb": torch.rand(1, 3, 64, 64), "frequency": torch.rand(1, 64, 16, 16), "texture": torch.rand(1, 3, 32, 32)}
        >>> attention(EditDetector(), inputs, TopClass())
        attention              source  b heads q k        queries -> keys
        frequency_attention#0  fused   1 x 2 x 256 x 256  rgb 16 x 16 -> frequency 16 x 16
        texture_attention#0    fused   1 x 2 x 256 x 256  rgb 16 x 16 -> texture 16 x 16
    """
    inner = unwrapped(model)
    bound = Inputs.of(inputs).bind(inner).own()
    graph = target is not None

    def recorded() -> Attention:
        record, assembling = _assembled(inner, keep, layouts, streams)
        with (
            undisturbed(inner, graph, bound, part="attention") as memory,
            memory.saving(),
            assembling.watch(graph),
        ):
            if graph:
                _require_gradients(_beginnings(inner), True)  # which is put back, as all is
            record.output = memory.call.run(inner)
        _refuse_empty(record)
        return record

    record = retried(recorded)
    if target is not None:
        with undisturbed(inner, graph=True):
            picked = select_output(record.output, output)
            scorer = Scorer(target).pinned(picked)
            scores = scorer.of_picked(picked, bound.batch)
            Asked(inner, bound, Scorer(scorer.target, output)).check(scores)
            record.gradients(scores)
    return record


def _end(block: ExitStack) -> bool:
    """End a block, and first all that began after it; whether there was none, and it was open."""
    if block not in _OPEN.blocks:
        return False
    later = _OPEN.blocks[_OPEN.blocks.index(block) + 1 :]
    for other in reversed(later):
        other.close()
    _OPEN.blocks = _OPEN.blocks[: _OPEN.blocks.index(block)]
    return not later


def _mapping(name: str, given: Any, example: str) -> dict[str, Any]:
    if given is not None and not isinstance(given, Mapping):
        raise MulticamError(f"{name} is a mapping such as {example}, not {given!r}")
    return dict(given or {})


@contextmanager
def _graph_from_the_start(model: nn.Module) -> Iterator[None]:
    """Let a graph begin wherever it can, see `_beginnings`."""
    frozen = _beginnings(model)
    try:
        try:
            _require_gradients(frozen, True)
            yield
        finally:
            _require_gradients(frozen, False)
    finally:
        _require_gradients(frozen, False)  # once more, for an interrupt that comes meanwhile


def _beginnings(model: nn.Module) -> list[nn.Parameter]:
    """Embeddings, tokens and biases that require no gradient, from which a graph begins; weights of layers need none for that."""
    weighted = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.MultiheadAttention, nn.RNNBase)
    return [
        parameter
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
        if parameter.is_floating_point()
        and not parameter.requires_grad
        and not (isinstance(module, weighted) and parameter.ndim > 1)
    ]


def _require_gradients(parameters: list[nn.Parameter], required: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(required)
