"""A listener that tells nobody: what comes out of an attention are the tokens of its queries."""

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from multicam.watch.tokens.follow import Place
from multicam.watch.tokens.fused import Scores
from multicam.watch.tokens.origins import Origins
from multicam.watch.tokens.written_out import Attended, Operand


class Queries:
    """Listens to a `Follower` so that tokens are followed through attention.

    Attributes:
        origins: Those of the pass that runs, or of the last one.
    """

    origins: Origins

    def begin(self, module: nn.Module, given: Mapping[str, Tensor], batch: int, origins: Origins) -> None:
        """See `Listener`."""
        self.origins, origins.by_axes = origins, True

    def fused(self, place: Place, scores: Scores, v: Tensor, output: Tensor, source: str) -> None:
        """See `Listener`."""
        rows, columns = self.origins.ids(scores.q, 3), self.origins.ids(scores.k, 3)
        groups = rows.shape[1] // columns.shape[1]
        self.origins.give(output, self._owned(rows, columns.repeat_interleave(groups, 1)), 3)

    def written_out(self, place: Place, found: Attended) -> None:
        """See `Listener`."""
        rows = self._owned(rows_of(self.origins, found), columns_of(self.origins, found))
        hand_on(self.origins, found, rows)

    def _owned(self, rows: Int[Tensor, "*n q"], columns: Int[Tensor, "*n k"]) -> Int[Tensor, "*n q"]:
        """The ids of queries; fresh ones where they are the model's own, of the sample that they attend to, the same in all heads."""
        if rows.any():
            return rows
        samples = self.origins.places.samples(columns.numpy())
        each, of = np.unique(np.where(samples.max(-1) == samples.min(-1), samples.max(-1), -1), return_inverse=True)
        ids = self.origins.places.fresh(np.repeat(each[:, None], rows.shape[-1], axis=1))
        return torch.from_numpy(ids[of.reshape(rows.shape[:-1])])

    def writes(self, x: Tensor) -> None:
        """See `Listener`; nothing is kept that anybody could write into."""

    def add(self, made: None) -> None:
        """See `Listener`."""

    def no_attention(self, path: str, what: str) -> None:
        """See `Listener`."""

    def hidden(self, path: str, what: str) -> None:
        """See `Listener`; what comes out of such a kernel is lost."""


def rows_of(origins: Origins, found: Attended) -> Int[Tensor, "n q"]:
    """The ids of the queries of each matrix of an attention; 0 for those of the model's own."""
    return _ids(origins, found.q, found.matrices, found.queries)


def columns_of(origins: Origins, found: Attended) -> Int[Tensor, "n k"]:
    """The same for its keys, by the values where the keys say nothing."""
    values = origins.ids(found.v.tensor, found.v.features).expand(len(found.weights), -1)
    values = values if found.order is None else values[found.order.cpu()]
    columns = _ids(origins, found.k, found.matrices, found.keys)
    return columns.where(found.keys.cpu() >= 0, values) if columns.any() else values


def hand_on(origins: Origins, found: Attended, rows: Int[Tensor, "n q"]) -> None:
    """Give what came out of an attention the ids of its queries."""
    rows = rows if found.order is None else rows[found.order.cpu().argsort()]
    output = found.output
    origins.give(output.tensor, rows if output.tensor.ndim == 3 else rows[0], output.features)
    across = origins.ids(found.v.tensor, found.v.axis)
    if (across >= 0).all() and (across != across[..., :1]).any():  # channels attend to channels; the tokens stay
        origins.give(output.tensor, across, output.axis)


def _ids(origins: Origins, operand: Operand | None, matrices: Tensor | None, tokens: Tensor) -> Tensor:
    """The ids of some tokens `(n t)` of some matrices of an operand; 0 for tokens below zero."""
    if operand is None:
        return torch.zeros(tokens.shape, dtype=torch.int64)
    ids = origins.ids(operand.tensor, operand.features)
    ids = ids if ids.ndim == 2 else ids[None]
    if matrices is None and len(ids) not in (1, len(tokens)):
        return torch.full(tokens.shape, -1)
    of = torch.arange(len(tokens)) % len(ids) if matrices is None else matrices.cpu()
    at = tokens.cpu()
    return ids[of[:, None], at.clamp(min=0)].where(at >= 0, 0)
