"""Which part of the attention of each input's tokens goes to each input."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from multicam.attending.attention_call import AttentionCall
from multicam.errors import MulticamError
from multicam.printing import aligned
from multicam.watch.tokens.places import Places

Table = tuple[Tensor, Tensor, Tensor]  # ids of queries (b q), ids of keys (b k), and (b q k)
OWN, UNKNOWN, PADDING = 0, -1, -2


@dataclass(frozen=True, eq=False)
class Between:
    """How much of the attention of each stream's tokens goes to each stream, attention by attention; prints as a table.

    A stream is what tokens stand for: an input, several (`"visual_feats and visual_pos"`), none ("own": class tokens, learned
    queries), or what could not be followed ("unknown").

    Attributes:
        calls: The attentions, or the name of the flow.
        queries: The streams that have queries.
        keys: The streams that have keys.
        shares: Of the queries of a stream, the part that goes to each; not a number where it has none in this attention.
    """

    calls: tuple[str, ...]
    queries: tuple[str, ...]
    keys: tuple[str, ...]
    shares: Float[Tensor, "b calls queries keys"]

    def __repr__(self) -> str:
        mean = self.shares.nanmean(0)
        lines = [("attention", "queries", *self.keys)]
        for call, of_call in zip(self.calls, mean, strict=True):
            for name, row in zip(self.queries, of_call.tolist(), strict=True):
                if row[0] == row[0]:
                    lines.append((call, name, *(f"{share:.3g}" for share in row)))
        return aligned(lines)


def flow_matrix(att: Sequence[AttentionCall], *, forward: int | None = None) -> Between:
    """Which part of each stream's attention goes to each stream, in every attention: means over heads and queries.

    Attention to padding counts for nobody; tokens that could not be followed are a stream of their own, "unknown".

    Args:
        att: The attentions of a recording, all or some of them.
        forward: The number of the pass, where there are several.

    Example:
        >>> from multicam.demo.detector import EditDetector
        >>> from multicam.attending.attend import attention
        >>> inputs = {"rgb": torch.rand(1, 3, 64, 64), "frequency": torch.rand(1, 64, 16, 16), "texture": torch.rand(1, 3, 32, 32)}
        >>> flow_matrix(attention(EditDetector(), inputs))
        attention              queries  frequency  texture
        frequency_attention#0  rgb      1          0
        texture_attention#0    rgb      0          1
    """
    calls = of_pass(att, forward)
    tables: list[list[Table]] = [[] for _ in range(samples(calls))]
    for call in calls:
        p, sample = call.probs.mean(1), call.samples().amax(1)
        for i, table in enumerate(tables):
            of = sample == i
            table.append((call.rows[of], call.columns[of], p[of]))
    return between(calls[0].forward.places, tuple(call.name for call in calls), tables)


def of_pass(att: Sequence[AttentionCall], forward: int | None) -> list[AttentionCall]:
    """Those of one pass; the number may be left away where there is one.

    Raises:
        MulticamError: If there are several passes, or there is no such pass.
    """
    if not isinstance(att, Sequence) or not att or not all(isinstance(call, AttentionCall) for call in att):
        raise MulticamError(f"give attentions of a recording, such as att, att[-2:] or att.find(…), not {att!r}")
    passes = sorted({call.forward.index for call in att})
    if forward is None and len(passes) > 1:
        raise MulticamError(f"the attentions are of the passes {', '.join(map(str, passes))}: say which with forward=…")
    if forward is not None and forward not in passes:
        raise MulticamError(f"no attention is of pass {forward!r}; there are passes {', '.join(map(str, passes))}")
    return [call for call in att if forward is None or call.forward.index == forward]


def samples(calls: Sequence[AttentionCall]) -> int:
    """How many samples they have queries of."""
    return int(max(call.samples().max() for call in calls)) + 1


def between(places: Places, calls: tuple[str, ...], tables: Sequence[Sequence[Table]]) -> Between:
    """The shares of the streams, from ids of queries, ids of keys and a matrix for each sample and attention."""
    flat = [table for of_sample in tables for table in of_sample]
    queries, keys = (_streams(places, torch.cat([table[side].flatten() for table in flat])) for side in (0, 1))
    shares = [[_shares(places, table, list(queries), list(keys)) for table in of_sample] for of_sample in tables]
    return Between(calls, tuple(queries.values()), tuple(keys.values()), torch.stack(list(map(torch.stack, shares))))


def _shares(places: Places, table: Table, queries: list[int], keys: list[int]) -> Float[Tensor, "queries keys"]:
    rows, columns, matrix = table
    q, k = (
        (_kinds(places, ids)[..., None] == torch.tensor(kinds, device=ids.device)).to(matrix)
        for ids, kinds in ((rows, queries), (columns, keys))
    )
    amounts = (q.mT @ matrix @ k).sum(0)
    return amounts / amounts.sum(1, keepdim=True)


def _streams(places: Places, ids: Tensor) -> dict[int, str]:
    """The names of the streams, by their kinds: inputs first, then the model's own, then those not followed."""
    kinds = set(torch.unique(_kinds(places, ids)).tolist()) - {PADDING}
    named = {OWN: "own", UNKNOWN: "unknown"}
    for kind in sorted(kinds - set(named)):
        named[kind] = " and ".join(name for i, name in enumerate(places.names) if kind >> i & 1)
    return {kind: named[kind] for kind in sorted(kinds, key=lambda kind: (kind <= 0, -kind if kind <= 0 else kind))}


def _kinds(places: Places, ids: Tensor) -> Tensor:
    """The inputs of each id as a bit mask; or which of those that have none."""
    kinds = places.inputs.to(ids.device)[ids.clamp(min=0)]
    return kinds.where(ids > 0, torch.where(ids < 0, UNKNOWN, PADDING))
