"""One attention: what attended to what, how much, and as a map on an input."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from multicam.attending.passes import Dense, Forward, Query, checked_query, inputs_among, without_blind
from multicam.errors import MulticamError, unknown
from multicam.watch.finite import check_gradient
from multicam.watch.reshape import Tokens
from multicam.watch.tokens.fused import Scores

Value = Literal["weights", "probs", "grad*weights"]
VALUES = ("weights", "probs", "grad*weights")


class AttentionCall:
    """One call of attention in one forward pass.

    The batch axis `b` counts windows, too, where a model folds them into it: `rows` says whose tokens they are.

    Attributes:
        path: The module that ran it.
        index: Which of the attentions that this module ran in the pass.
        forward: The pass.
        source: "fused" for a kernel that returns no probabilities, "softmax" for attention that is written out, "product" for
            such without a softmax whose weights sum to one all the same, "flex" for flex_attention.
        softmax_over: "keys", or "queries" as in slot attention.
        rows: The ids of the queries `(b q)`, see `multicam.watch.tokens.places`.
        columns: The ids of the keys `(b k)`.
        values: What is attended to `(b kv_heads k e)`.
        has_keys: Whether the scores were products of queries and keys.
        mask: What a kernel was told to hide, in words: "none", "causal", the shape of a mask such as "(2, 1, 5, 7)", "a function"
            (flex_attention), or several of these; "unknown" where attention is written out and a mask is an operation like others.
        dropout: The share of probabilities that a kernel dropped.
    """

    def __init__(
        self,
        path: str,
        index: int,
        forward: Forward,
        *,
        source: str,
        softmax_over: str,
        rows: Int[Tensor, "b q"],
        columns: Int[Tensor, "b k"],
        values: Tensor,
        heads: int,
        has_keys: bool,
        matrices: Scores | tuple[Tensor, Tensor],
        differentiated: tuple[Tensor, Callable[[Tensor, Tensor], Tensor]] | str,
    ) -> None:
        self.path, self.index, self.forward = path, index, forward
        self.source, self.softmax_over, self.has_keys = source, softmax_over, has_keys
        self.rows, self.columns, self.values = rows, columns, values
        self.heads = heads
        self.mask = matrices.hidden if isinstance(matrices, Scores) else "unknown"
        self.dropout = matrices.dropout if isinstance(matrices, Scores) else 0.0
        self._matrices: Scores | tuple[Tensor, Tensor] | None = matrices
        self._differentiated = differentiated
        self._gradient: Tensor | None = None

    @property
    def name(self) -> str:
        """The path and, behind a `#`, the index."""
        return f"{self.path}#{self.index}"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`(b heads q k)`."""
        return (len(self.rows), self.heads, self.rows.shape[1], self.columns.shape[1])

    @property
    def nbytes(self) -> int:
        """How much memory it holds: values, and queries and keys of a fused kernel or probabilities."""
        return sum({x.data_ptr(): x.nbytes for x in ([] if self._matrices is None else self.kept())}.values())

    @property
    def weights(self) -> Float[Tensor, "b heads q k"]:
        """What the values were multiplied by: the probabilities, or what the model made of them (talking heads, dropout)."""
        return self._seen(1)

    @property
    def probs(self) -> Float[Tensor, "b heads q k"]:
        """What the softmax returned; of a fused kernel, computed from its queries and keys on every use.

        Queries that see no key, of which a softmax is NaN, are zero.

        Raises:
            MulticamError: If others are NaN or infinite, or no query of a sample sees any key.
        """
        return self._seen(0)

    @property
    def grad(self) -> Float[Tensor, "b heads q k"]:
        """The gradient of the target by `probs`, once `Attention.gradients` has run.

        Of a fused kernel `dP = dO V^T`, because `O = P V`.

        Raises:
            MulticamError: If it has not run, or there is none.
        """
        if isinstance(self._differentiated, str) or not self.differentiable:
            raise MulticamError(f"attention {self.name!r} has no gradient: {self.reason}")
        if self._gradient is None:
            raise MulticamError(
                f"no gradient of attention {self.name!r} yet: call .gradients(score) of the recording, or give attention(…) a target"
            )
        found = self._differentiated[1](self._gradient, self.values)
        if torch.isfinite(found).all():
            return found
        found = found.masked_fill(
            ~(self._read(0) > 0).any(self._axis, keepdim=True), 0
        )  # a query that sees no key has none
        return check_gradient(found, f"the probabilities of attention {self.name!r}")

    @property
    def differentiable(self) -> bool:
        """Whether it can have a gradient."""
        return not isinstance(self._differentiated, str) and self._differentiated[0].requires_grad

    @property
    def reason(self) -> str:
        """Why it has no gradient."""
        if isinstance(self._differentiated, str):
            return self._differentiated
        return "nothing in front of it requires a gradient: record_attention(model, gradients=True)"

    def dense(self, matrix: Float[Tensor, "b heads q k"], sample: int = 0) -> Dense:
        """A matrix over all tokens of one sample: windows put together, padding left out, queries that come several times averaged.

        Raises:
            MulticamError: If there is no such sample, its tokens could not be followed, or several samples share a row.
        """
        samples = self.samples()
        of = (samples == sample).any(1)
        if not of.any():
            raise MulticamError(
                f"attention {self.name!r} has no row of sample {sample}: its samples are {sorted(set(samples.flatten().tolist()) - {-1})}"
            )
        rows, columns, part = self.rows[of], self.columns[of], matrix[of]
        if (rows < 0).any() or (columns < 0).any():
            raise MulticamError(
                f"attention {self.name!r}: it could not be followed which tokens its "
                f"{'queries' if (rows < 0).any() else 'keys'} are ({self.describe()}); say it with layouts=…"
            )
        of_ids = self.forward.places.sample.to(rows.device)
        if any(((of_ids[ids.clamp(min=0)] != sample) & (ids > 0)).any() for ids in (rows, columns)):
            raise MulticamError(
                f"attention {self.name!r} has tokens of several samples in one row: explain one sample at a time"
            )
        queries, at_row = _numbered(rows)
        keys, at_column = _numbered(columns)
        full = part.new_zeros(part.shape[1], len(queries) + 1, len(keys) + 1)
        times = part.new_zeros(len(queries) + 1)  # queries may come several times, for each head or hypothesis
        for window in range(len(part)):
            on_keys = part.new_zeros(*part.shape[1:3], len(keys) + 1)
            full.index_add_(1, at_row[window], on_keys.index_add_(2, at_column[window], part[window]))
            times.index_add_(0, at_row[window], torch.ones_like(times[at_row[window]]))
        full = full[:, :-1, :-1] / times[:-1, None]
        return Dense(
            f"attention {self.name!r}", self.forward, queries, keys, full, at_row.flatten(), at_column.flatten()
        )

    def samples(self) -> Int[Tensor, "b q"]:
        """The sample of each query; -1 for padding."""
        known = self.forward.places.sample.to(self.rows.device)[self.rows.clamp(min=0)]
        if (known >= 0).any():
            return known
        each = max(len(self.rows) // max(self.forward.batch, 1), 1)
        return (torch.arange(len(self.rows), device=self.rows.device) // each)[:, None].expand_as(self.rows)

    def describe(self) -> str:
        """Queries and keys in words: `rgb 14 x 14 -> 1 own + frequency 14 x 14`."""
        places = self.forward.places
        return f"{places.describe(self.rows[0])} -> {places.describe(self.columns[0])}"

    def inputs(self) -> tuple[frozenset[str], frozenset[str]]:
        """The inputs that its queries, and its keys, stand for."""
        return inputs_among(self.forward.places, self.rows), inputs_among(self.forward.places, self.columns)

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.shape))
        return f"AttentionCall({self.name}, {self.source}, b heads q k = {shape}, {self.describe()})"

    def heatmap(
        self,
        onto: str | None = None,
        query: Query = "mean",
        *,
        of: str | None = None,
        heads: int | Sequence[int] | Literal["mean"] = "mean",
        value: Value = "weights",
    ) -> Float[Tensor, "b *size"]:
        """Where on an input these queries look: attention as a density, laid on the input.

        The mean of a map is the share of the queries' attention that goes to this input; what goes to class tokens and to
        other inputs is missing from it, and nothing is scaled up in its place.

        Args:
            onto: The input; None where the keys stand for one input only.
            query: "mean" over all queries, "cls" for the model's first own token, a number counted as the module has them, or
                `(y, x)`, a pixel of the queries' input.
            of: The input whose queries count, where the queries stand for several.
            heads: "mean", or which.
            value: "weights", "probs", or "grad*weights": gradient times weights, negative entries cut, in units of the target.

        Raises:
            MulticamError: For inputs or queries that there are none of, and for keys whose places could not be followed.

        Example:
            >>> import multicam as mc
            >>> from multicam.demo.detector import EditDetector
            >>> inputs = {"rgb": torch.rand(1, 3, 64, 64), "frequency": torch.rand(1, 64, 16, 16), "texture": torch.rand(1, 3, 32, 32)}
            >>> with torch.no_grad(), mc.record_attention(EditDetector().eval()) as att:
            ...     _ = att.model(**inputs)
            >>> att["frequency_attention"].heatmap("frequency", query=(10, 20)).shape
            torch.Size([1, 16, 16])
        """
        onto = self._onto(onto)
        matrix = self._headed(self._value(value), heads)
        return torch.cat([self._sample_map(matrix, sample, onto, query, of) for sample in range(self._batch())])

    def footprint(
        self,
        key: Query,
        of: str | None = None,
        *,
        heads: int | Sequence[int] | Literal["mean"] = "mean",
        value: Value = "weights",
    ) -> Float[Tensor, "b *size"]:
        """From where one key is looked at: `heatmap` transposed, such as the place of a prompt's word in a picture that is being made.

        The value at a place is the share of the attention of the query there that goes to this key, so that the maps of all
        keys add up to one.

        Args:
            key: What `heatmap` takes for a query: a number counted as the module has them, a pixel of the keys' input, "cls", "mean".
            of: The input whose queries look; None where they stand for one only.
            heads, value: As for `heatmap`.

        Raises:
            MulticamError: For inputs or keys that there are none of, and for queries whose places could not be followed.

        Example:
            >>> from multicam.attending.attend import attention
            >>> from multicam.demo.detector import EditDetector, inputs_of
            >>> call = attention(EditDetector(), inputs_of(torch.zeros(128, 128, 3, dtype=torch.uint8).numpy()))[0]
            >>> call.footprint((3, 5)).shape
            torch.Size([1, 64, 64])
        """
        known = sorted(self.inputs()[0])
        if of is None and len(known) == 1:
            of = known[0]
        if of not in known:
            raise MulticamError(
                f"the queries of attention {self.name!r} stand for {known}: say which with of=…, not {of!r}"
            )
        matrix = self._headed(self._value(value), heads)
        return torch.cat(
            [self.dense(matrix, sample).transposed().footprint(key, of) for sample in range(self._batch())]
        )

    def patch(self, query: Query, of: str | None = None, sample: int = 0) -> tuple[str, tuple[float, ...]] | None:
        """The input that a number or a pixel for `heatmap` means, and its token's part of it, `(z0 y0 x0 z1 y1 x1)` in fractions.

        None for the model's own tokens.

        Raises:
            MulticamError: If there is no such query.
        """
        dense, places = self.dense(self.weights, sample), self.forward.places
        token = int(dense.queries[dense.at(query, of)])
        names = places.inputs_of(token)
        return (of or names[0], tuple(places.boxes[token].tolist())) if names else None

    def _batch(self) -> int:
        return self.forward.batch or int(self.samples().max()) + 1

    def _onto(self, onto: str | None) -> str:
        known = sorted(self.inputs()[1])
        if onto is None:
            if len(known) != 1:
                raise MulticamError(
                    f"the keys of attention {self.name!r} stand for {known or 'no input'}: say which with onto=…"
                )
            return known[0]
        if onto in known or (onto in self.forward.layouts and (self.columns < 0).any()):
            return onto
        if onto not in self.forward.places.names:
            raise unknown("input", onto, self.forward.places.names)
        raise MulticamError(
            f"no key of attention {self.name!r} stands for input {onto!r}: {self.describe()}. Attention onto it is found by "
            f"att.between(queries, {onto!r}); where the model's code tells that these keys do, say it with layouts={{{onto!r}: tokens(…)}}"
        )

    def _value(self, value: str) -> Float[Tensor, "b heads q k"]:
        if value not in VALUES:
            raise unknown("value", value, VALUES)
        if value == "grad*weights":
            return (self.grad * self.probs).clamp(min=0)
        return self.weights if value == "weights" else self.probs

    def _headed(self, matrix: Tensor, heads: int | Sequence[int] | str) -> Tensor:
        if heads == "mean":
            return matrix.mean(1, keepdim=True)
        index = [heads] if isinstance(heads, int) else heads
        if (
            isinstance(index, str)
            or not isinstance(index, Sequence)
            or not len(index)
            or not all(isinstance(i, int) and 0 <= i < matrix.shape[1] for i in index)
        ):
            raise MulticamError(f'heads is "mean", or of 0 to {matrix.shape[1] - 1}, not {heads!r}')
        return matrix[:, list(index)].mean(1, keepdim=True)

    def _sample_map(self, matrix: Tensor, sample: int, onto: str, query: Query, of: str | None) -> Tensor:
        if (self.columns < 0).any() and onto in self.forward.layouts:
            return self._said_map(matrix, sample, onto, query, self.forward.layouts[onto])
        dense = self.dense(matrix, sample)
        return self.forward.on_input(dense.keys, dense.line(query, of), onto)

    def _said_map(self, matrix: Tensor, sample: int, onto: str, query: Query, said: Tokens) -> Tensor:
        if not isinstance(query, int) and query != "mean":
            raise MulticamError(f'with layouts= a query is a number or "mean", not {query!r}')
        rows = matrix[sample, 0]
        line = rows.mean(0) if query == "mean" else rows[checked_query(query, len(rows), f"attention {self.name!r}")]
        return self.forward.density(said(line.view(1, -1, 1))[:, 0], onto)

    _forgotten = "only what keep=… returned was kept, in Attention.kept"

    def _seen(self, which: int) -> Float[Tensor, "b heads q k"]:
        axis = None if isinstance(self._matrices, Scores) else self._axis  # where kernels saw no key they say so
        return without_blind(self._read(which), axis, self.samples, f"attention {self.name!r}")

    @property
    def _axis(self) -> int:
        """The axis of the softmax."""
        return -2 if self.softmax_over == "queries" else -1

    def _read(self, which: int) -> Float[Tensor, "b heads q k"]:
        if self._matrices is None:
            raise MulticamError(f"the matrices of attention {self.name!r} are gone: {self._forgotten}")
        return self._matrices.probs() if isinstance(self._matrices, Scores) else self._matrices[which]

    # What follows is for `multicam.attending.assembling`.

    @property
    def differentiated(self) -> Tensor:
        """The tensor whose gradient `receive` takes."""
        assert not isinstance(self._differentiated, str)
        return self._differentiated[0]

    def receive(self, gradient: Tensor | None) -> None:
        """Take the gradient of `differentiated`; None: the score does not depend on it."""
        source = self.differentiated
        self._gradient = torch.zeros_like(source) if gradient is None else gradient.detach()

    def kept(self) -> list[Tensor]:
        """The tensors of the model's that are kept."""
        assert self._matrices is not None
        of = self._matrices
        return [self.values, *([of.q, of.k] if isinstance(of, Scores) else of)] + (
            [of.mask] if isinstance(of, Scores) and of.mask is not None else []
        )

    def keep_probs(self) -> None:
        """Keep probabilities, and no queries and keys."""
        probs, weights = self._read(0), self._read(1)
        copy = probs.clone()
        self._matrices = (copy, copy if weights is probs or isinstance(self._matrices, Scores) else weights.clone())

    def keep_copies(self) -> None:
        """Keep nothing that the model can write into."""
        self.keep_probs()
        self.values = self.values.clone()

    def forget(self) -> None:
        """Keep no matrices, values and history."""
        self._matrices = None
        self.values = self.values.new_empty(0, *self.values.shape[1:])  # no view: that would keep all of it
        self._differentiated = self._forgotten


def _numbered(ids: Int[Tensor, "b n"]) -> tuple[Tensor, Tensor]:
    """The ids above 0 in the order in which they come, and for each entry which of them it is; the last plus one for others."""
    known: dict[int, int] = {}
    for token in ids.flatten().tolist():
        if token > 0:
            known.setdefault(token, len(known))
    index = [known.get(token, len(known)) for token in ids.flatten().tolist()]
    return torch.tensor(list(known), device=ids.device, dtype=torch.int64), torch.tensor(index, device=ids.device).view(
        ids.shape
    )
