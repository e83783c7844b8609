"""Grids that are proved: which reshape a model's own modules show a layer's output to have."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from multicam.errors import MulticamError
from multicam.watch.hooks import after
from multicam.watch.reshape import Grid, Reshape, as_it_is, channels_last, tokens

# Parameters that hold tokens put in front of the patch tokens, and those that hold learned queries, as timm, torchvision
# and transformers name them.
TOKEN_PARAMETERS = ("cls_token", "class_token", "class_embedding", "dist_token", "distillation_token", "reg_token",
                    "register_token", "cls_embedding")  # fmt: skip
QUERY_PARAMETERS = ("query", "queries", "latent", "prompt", "slot")
# Attributes that say how many channels a module returns: on the second axis, and on the last.
WIDTHS = {"channel": ("out_channels", "num_features", "num_channels"), "feature": ("out_features", "embed_dim")}
GRID_MODULES = (
    nn.modules.conv._ConvNd, nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd,
)  # fmt: skip
T = TypeVar("T", int, Grid)


@dataclass(frozen=True)
class Scope:
    """What a module and all inside it prove about the outputs of its parts.

    Attributes:
        channels: The channel counts of its convolutions and batch norms, whose outputs are `(b c *grid)`.
        features: The channel counts of its linear layers and layer norms, whose outputs are `(… c)`.
        grids: The grids that its convolutions and poolings returned so far.
        extras: How many tokens its class and register parameters may put in front of a grid.
        queries: How many learned queries it may hold, which are no grid whatever their number.
    """

    channels: frozenset[int]
    features: frozenset[int]
    grids: frozenset[Grid]
    extras: frozenset[int]
    queries: frozenset[int]


@dataclass(frozen=True)
class Evidence:
    """What one forward pass and the modules themselves prove about a layer's output.

    Attributes:
        layer: The layer's path.
        batch: How many samples the model was given.
        sequence_first: Whether the layer says that it returns `(n b c)`; None if it says nothing.
        scopes: The layer itself and the modules around it, from the inside out.
    """

    layer: str
    batch: int
    sequence_first: bool | None
    scopes: tuple[Scope, ...]


class Grids:
    """What the modules of a model prove about the grids of its layers' outputs, in any number of passes.

    Args:
        paths: The modules by path.
    """

    def __init__(self, paths: Mapping[str, nn.Module]) -> None:
        self._paths = paths

    @contextmanager
    def watch(self) -> Iterator[list[tuple[str, Grid]]]:
        """The grid that each convolution and pooling returns during the block, by its path."""
        grids: list[tuple[str, Grid]] = []

        def returned(path: str) -> Callable[[nn.Module, Any, Any], None]:
            def note(module: nn.Module, _: Any, output: Any) -> None:
                if isinstance(output, Tensor):
                    grids.append((path, tuple(output.shape[2:])))

            return note

        with ExitStack() as hooks:
            for path, module in self._paths.items():
                if isinstance(module, GRID_MODULES):
                    hooks.enter_context(after(module, returned(path)))
            yield grids

    def reshape(
        self,
        x: Float[Tensor, "..."],
        label: str,
        path: str,
        module: nn.Module,
        batch: int,
        seen: Sequence[tuple[str, Grid]],
    ) -> Reshape:
        """The reshape that is proved for a layer's output.

        Args:
            x: The output.
            label: The layer as a reader writes it.
            path: Its module's path.
            module: Its module.
            batch: How many samples the model was given.
            seen: The grids that were returned before it, see `watch`.

        Raises:
            MulticamError: If nothing is proved; the message says what to pass.
        """
        if torch._C._functorch.is_batchedtensor(x):
            raise MulticamError(
                f"layer {label!r} runs inside of a torch.vmap of the model's own, which shows it one sample at a time: take a layer "
                "outside of it"
            )
        parts = path.split(".") if path else []
        around = [".".join(parts[:depth]) for depth in range(len(parts), -1, -1)]
        said = [m.batch_first for m in module.modules() if isinstance(m, nn.MultiheadAttention | nn.RNNBase)]
        sequence_first = not said[0] if said else None
        scopes = tuple(self._scope(each, seen) for each in around)
        return find_reshape(x, Evidence(label, batch, sequence_first, scopes))

    def _scope(self, scope: str, seen: Sequence[tuple[str, Grid]]) -> Scope:
        def inside(facts: Iterable[tuple[str, T]]) -> frozenset[T]:
            return frozenset(fact for path, fact in facts if not scope or path == scope or path.startswith(scope + "."))

        extras = [rows for path, rows in self._facts["token"] if inside([(path, rows)])]
        return Scope(
            inside(self._facts["channel"]),
            inside(self._facts["feature"]),
            inside(seen),
            frozenset({0, sum(extras), *extras}),
            inside(self._facts["query"]),
        )

    @cached_property
    def _facts(self) -> dict[str, list[tuple[str, int]]]:
        """The widths, class tokens and learned queries of all modules, each with the module's path."""
        facts: dict[str, list[tuple[str, int]]] = {"channel": [], "feature": [], "token": [], "query": []}
        for path, module in self._paths.items():
            for kind, names in WIDTHS.items():
                facts[kind] += [(path, w) for name in names if isinstance(w := getattr(module, name, None), int)]
            if isinstance(module, nn.LayerNorm):
                facts["feature"].append((path, module.normalized_shape[-1]))
            parameters = {name: p for name, p in module.named_parameters(recurse=False) if p.ndim}
            if isinstance(module, nn.Embedding):  # called by what it embeds
                parameters = {path.rpartition(".")[2]: p for p in parameters.values()}
            for name, parameter in parameters.items():
                rows = parameter.numel() // parameter.shape[-1] if parameter.numel() else 0
                if name.startswith(TOKEN_PARAMETERS):
                    facts["token"].append((path, rows))
                if any(word in name for word in QUERY_PARAMETERS):
                    facts["query"].append((path, rows))
        return facts


def find_reshape(x: Float[Tensor, "..."], evidence: Evidence) -> Reshape:
    """The reshape that the evidence proves for a layer's output.

    The widths of the nearest modules tell `(b c *grid)` from channels-last, and a token sequence gets the only grid that
    a convolution or pooling of the same branch proves.

    Raises:
        MulticamError: If nothing is proved; the message says what to pass.
    """
    shape = tuple(x.shape)
    layer, batch = evidence.layer, evidence.batch
    if len(shape) <= 2:
        raise MulticamError(
            f"layer {layer!r} returns {shape}: it has no spatial axes left to lay a map on; take an earlier layer"
        )
    if len(shape) == 3 and shape[0] == shape[1] == batch and evidence.sequence_first is None:
        raise MulticamError(
            f"layer {layer!r} returns {shape} for {batch} samples: nothing tells which of the first two axes is the batch; "
            f"give another number of samples, or {_say(False)}"
        )
    turned = len(shape) == 3 and (bool(evidence.sequence_first) or (shape[0] != batch and shape[1] == batch))
    if shape[1 if turned else 0] != batch:
        raise MulticamError(
            f"layer {layer!r} returns {shape} for {batch} samples: it folds something into the batch axis, or the "
            "input has none (use x[None]). If inputs or "
            "frames are stacked there, say which with reshape=stacked(index, of=count); if windows are, take a layer "
            "outside the windows, or pass a reshape of your own"
        )
    last = _channels_are_last(shape, evidence.scopes)
    grids = frozenset[Grid]().union(*(scope.grids for scope in evidence.scopes))
    if len(shape) == 3:
        signal = last is False and not turned and any(_is_halving(shape[2:], grid) for grid in grids)
        return as_it_is if signal else _find_token_grid(shape, turned, evidence)
    if last is None and (shape[1] == shape[-1] or not any(_is_halving(shape[2:], grid) for grid in grids)):
        raise MulticamError(
            f"layer {layer!r} returns {shape}, and nothing tells whether its channels are the second axis or the last; "
            "say so with Layer(…, reshape=as_it_is) or Layer(…, reshape=channels_last)"
        )
    if not last:
        return as_it_is
    if not any(_is_halving(shape[1:-1], grid) for grid in grids):
        raise MulticamError(
            f"layer {layer!r} returns {shape} with its channels last, but nothing proves that {shape[1:-1]} is a grid "
            f"(grids seen in the model: {_listed((grid, 0) for grid in grids)}); if it is, say so with "
            "Layer(…, reshape=channels_last)"
        )
    return channels_last


def _channels_are_last(shape: tuple[int, ...], scopes: tuple[Scope, ...]) -> bool | None:
    """Whether the last axis holds the channels, by the nearest module whose widths fit one axis only; None: unknown."""
    for scope in scopes:
        first, last = shape[1] in scope.channels, shape[-1] in scope.features
        if first == last:
            both = scope.channels | scope.features
            first, last = shape[1] in both, shape[-1] in both
        if first != last:
            return last
    return None


def _find_token_grid(shape: tuple[int, ...], turned: bool, evidence: Evidence) -> Reshape:
    count = shape[0] if turned else shape[1]
    returned = f"layer {evidence.layer!r} returns {shape}"
    if any(count in scope.queries for scope in evidence.scopes):
        raise MulticamError(f"{returned}: {count} tokens may be the model's {count} learned queries; {_say(turned)}")
    for scope in evidence.scopes:
        fitting = {(grid, count - prod(grid)) for grid in scope.grids if count - prod(grid) in scope.extras}
        if len(fitting) == 1:
            grid, prefix = fitting.pop()
            return tokens(*grid, prefix=prefix, sequence_first=turned)
        if fitting:
            raise MulticamError(f"{returned}: {count} tokens, which fit {_listed(fitting)}; {_say(turned)}")
    known = {(grid, 0) for scope in evidence.scopes for grid in scope.grids}
    raise MulticamError(
        f"{returned}: {count} tokens whose grid nothing proves (grids seen in the model: {_listed(known)}); {_say(turned)}"
    )


def _is_halving(grid: Grid, of: Grid) -> bool:
    """Whether `grid` is `of`, or what is left of it after merging neighbours in pairs some times."""
    while len(of) == len(grid) and max(of) > max(grid):
        of = tuple(-(-side // 2) for side in of)
    return grid == of


def _say(turned: bool) -> str:
    more = ", sequence_first=True" if turned else ""
    return (
        f"say it with Layer(…, reshape=tokens(rows, columns, prefix=class and register tokens{more})), or with "
        "reshape=as_it_is for a signal (b c l)"
    )


def _listed(fitting: Iterable[tuple[Grid, int]]) -> str:
    shown = [" x ".join(map(str, grid)) + (f" + {n}" if n else "") for grid, n in sorted(fitting)]
    return ", ".join(shown) or "none"
