"""What the attentions of a whole pass, taken together, say about the inputs."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from multicam.attending.attention_call import AttentionCall
from multicam.attending.between import Between, between, of_pass, samples
from multicam.attending.passes import Dense, Forward, Query
from multicam.errors import MulticamError, number, unknown
from multicam.maps import Maps

HEADS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda p: p.mean(1, keepdim=True),
    "max": lambda p: p.amax(1, keepdim=True),
    "min": lambda p: p.amin(1, keepdim=True),
}
RULES = ("block", "chefer")


class Flow:
    """How much of every token is in every other one after all attentions: one matrix over all tokens of a sample.

    A token is what it stands for: two encoders that lay the same grid on the same input have the same tokens.

    Attributes:
        name: Which method found it.
        forward: The pass.
        tokens: For each sample the ids of all tokens that took part, see `multicam.watch.tokens.places`; those that are queries first.
    """

    def __init__(self, name: str, forward: Forward, states: "Sequence[_State]", start_is_evidence: bool) -> None:
        self.name, self.forward = name, forward
        self.tokens = [state.tokens for state in states]
        self._states = states
        self._start_is_evidence = start_is_evidence

    def matrix(self, sample: int = 0) -> Float[Tensor, "tokens tokens"]:
        """How much of each token (column) is in each (row), in the order of `tokens[sample]`.

        Raises:
            MulticamError: If there is no such sample.
        """
        if not isinstance(sample, int) or not 0 <= sample < len(self._states):
            raise MulticamError(f"the {self.name} has samples 0 to {len(self._states) - 1}, not {sample!r}")
        state = self._states[sample]
        return state.rows(torch.arange(len(state.tokens), device=state.tokens.device))

    def map(self, onto: str, query: Query = "cls", of: str | None = None) -> Float[Tensor, "b *size"]:
        """Where on an input the queries come from, as a density: its mean is the sum over the input's tokens.

        What goes to class tokens and to other inputs is missing from it. Tokens on several grids of the input (pyramids,
        CrossViT) are laid on it grid by grid, and added up. With relevance, the 1 that every token starts with at its own
        place is left out: it is no evidence.

        Args:
            onto: The input.
            query: "cls" for the model's first own token among the queries of the last attention (all of them, where none is
                its own), "mean" over these queries, a number counted among them, or `(y, x)`, a pixel of their input.
            of: An input: the last attention that has queries of it counts, and numbers count its tokens only.

        Raises:
            MulticamError: For inputs or queries that there are none of.
        """
        if onto not in self.forward.places.names:
            raise unknown("input", onto, self.forward.places.names)
        return self._on_input(list(self._lines(query, of)), onto)

    def maps(self, query: Query = "cls", of: str | None = None) -> Maps:
        """`map` for every input whose tokens have places on it; with relevance, for those that something attends to.

        Raises:
            MulticamError: For queries that there are none of, and if no input has tokens with places.
        """
        lines = list(self._lines(query, of))
        tokens = [state.tokens if self._start_is_evidence else state.keys for state in self._states]
        return Maps({name: self._on_input(lines, name) for name in _placed(self.forward, tokens)})

    def between(self) -> Between:
        """Which part of what each stream's tokens are made of comes from each stream.

        The 1 that every token starts with counts as in `map`.
        """
        tables = [[(s.tokens[None, : s.asked], s.tokens[None], self._evidence(s)[None])] for s in self._states]
        return between(self.forward.places, (self.name,), tables)

    def __repr__(self) -> str:
        tokens = self.forward.places.describe(self.tokens[0])
        return f"Flow({self.name}, {len(self._states)} samples, {len(self.tokens[0])} tokens: {tokens})"

    def _evidence(self, state: "_State") -> Float[Tensor, "queries tokens"]:
        matrix = state.matrix
        return matrix if self._start_is_evidence else matrix - torch.eye(*matrix.shape).to(matrix)

    def _on_input(self, lines: Sequence[tuple[Tensor, Tensor]], onto: str) -> Tensor:
        found = torch.cat([self.forward.on_input(tokens, line, onto) for tokens, line in lines])
        if not found.any():
            warnings.warn(
                f"the {self.name} onto {onto!r} is zero: no attention leads these queries there, or the score does not depend on any that "
                f"does. Say which queries with query=… and of=…; what reaches the score around attention is not seen",
                stacklevel=3,
            )
        return found

    def _lines(self, query: Query, of: str | None) -> Iterator[tuple[Tensor, Tensor]]:
        """For each sample its tokens, and what the queries that the caller means have of them."""
        places = self.forward.places
        if of is not None and of not in places.names:
            raise unknown("input", of, places.names)
        for state in self._states:
            means = query
            of_calls = [dense.queries for dense in state.denses.values()]
            last = next((ids for ids in reversed(of_calls) if of is None or places.select(ids, of).any()), None)
            if last is None:
                raise MulticamError(f"no query of the {self.name} stands for input {of!r}: {self!r}")
            if of is not None and isinstance(query, int):
                last = last[places.select(last, of)]
            if query == "cls" and all(places.inputs_of(token) for token in last.tolist()):
                means = "mean"
            rows = self._evidence(state)[state.at(last)]
            dense = Dense(f"the {self.name}", self.forward, last, state.tokens, rows[None])
            yield state.tokens, dense.line(means, of)


def rollout(
    att: Sequence[AttentionCall],
    *,
    residual: float = 0.5,
    heads: Literal["mean", "max", "min"] = "mean",
    forward: int | None = None,
) -> Flow:
    """Attention rollout: what every token is mixed from, if attention and the residual around it were all that mixes.

    `R[q] = residual R[q] + (1 - residual) A R[k]` for one attention of queries q to keys k after the other, in the order in which they
    ran, from `R = I` (Abnar & Zuidema 2020, arXiv:2005.00928, equation 1). The rows of A, what the softmax returned, are scaled to sum to 1
    where padding took part of them or the heads are not averaged; rows of queries that saw no key leave R as it is. Tokens
    that come from merging others (pyramids) begin anew.

    Args:
        att: The attentions of a recording, all or some of them, as `att.find("encoder")`.
        residual: The part of a token that goes around the attention.
        heads: What becomes of the heads.
        forward: The number of the pass, where there are several.

    Raises:
        MulticamError: If tokens of an attention could not be followed; leave it out then.

    Example:
        >>> from multicam.demo.detector import EditDetector
        >>> from multicam.attending.attend import attention
        >>> inputs = {"rgb": torch.rand(1, 3, 64, 64), "frequency": torch.rand(1, 64, 16, 16), "texture": torch.rand(1, 3, 32, 32)}
        >>> flow = rollout(attention(EditDetector(), inputs))
        >>> flow.between()
        attention  queries  rgb   frequency  texture
        rollout    rgb      0.25  0.25       0.5
    """
    number("residual", residual)
    if not 0 <= residual <= 1:
        raise MulticamError(f"residual is a part from 0 to 1, not {residual}")
    if heads not in HEADS:
        raise unknown("heads", heads, HEADS)
    calls = _usable(att, forward)
    states = [_State(denses) for denses in _per_sample(calls, [HEADS[heads](call.probs) for call in calls])]
    for state in states:
        for dense in state.denses.values():
            at = state.at(dense.queries)
            before, total = state.matrix[at], dense.matrix[0].sum(1, keepdim=True)
            mixed = state.mixed(dense.matrix[0] / total.where(total > 0, 1), dense.keys)
            state.matrix[at] = torch.lerp(mixed, before, residual).where(total > 0, before)
    return Flow("rollout", calls[0].forward, states, start_is_evidence=True)


def relevance(
    att: Sequence[AttentionCall], rule: Literal["block", "chefer"] = "block", *, forward: int | None = None
) -> Flow:
    """Gradient-weighted attention, propagated from the inputs to the score: how relevant each token is for each other.

    From `R = I`, with `A` the mean over heads of `(dP * P)+` of queries q to keys k (Chefer et al. 2021, arXiv:2103.15679, equation 5):

    - "block": `R[q] += A R[k]` (equations 6, 7 and 11) on one matrix over all tokens, whatever attends to whatever: any number of inputs,
      concatenated tokens, class tokens that cross, encoders and decoders. It is theirs but for rule 10, and the same where
      there is one stream.
    - "chefer": their rules for two streams. In a stream as above (6, 7). From a stream s to another one t also `R[s, s] += A R[t, s]`
      (11), but `R[s, t] += N[s]^T A N[t]` (10), where `N = I + (R - I) / row sums of (R - I)` (8, 9), rows of zeros staying
      zero. What s knows of a third stream u through t, `R[s, u] += A R[t, u]`, is our extension. Tokens that attend to
      each other, or to which the same tokens attend, are one stream.

    Attentions run one after the other, but those of a run of which none depends on another, such as two streams that
    attend to each other, see the same R. Tokens that come from merging others (pyramids) begin anew.

    Args:
        att: The attentions of a recording with gradients, all or some of them.
        rule: "block" or "chefer".
        forward: The number of the pass, where there are several.

    Raises:
        MulticamError: If there are no gradients, or tokens of an attention could not be followed; leave it out then.

    Example:
        >>> from multicam.call.targets import TopClass
        >>> from multicam.demo.detector import EditDetector
        >>> from multicam.attending.attend import attention
        >>> inputs = {"rgb": torch.rand(1, 3, 64, 64), "frequency": torch.rand(1, 64, 16, 16), "texture": torch.rand(1, 3, 32, 32)}
        >>> relevance(attention(EditDetector(), inputs, TopClass())).map("texture").shape
        torch.Size([1, 32, 32])
    """
    if rule not in RULES:
        raise unknown("rule", rule, RULES)
    calls = _usable(att, forward)
    matrices = [(call.grad * call.probs).clamp(min=0).mean(1, keepdim=True) for call in calls]
    states = [_State(_as_one(denses), whole=rule == "chefer") for denses in _per_sample(calls, matrices)]
    runs = _independent(calls)
    for state in states:
        streams = state.streams() if rule == "chefer" else None
        for run in runs:
            added = [state.added(state.denses[i], streams) for i in run if i in state.denses]
            for rows, addition in added:
                state.matrix.index_add_(0, rows, addition)
    return Flow("relevance", calls[0].forward, states, start_is_evidence=False)


def legrad(att: Sequence[AttentionCall], *, forward: int | None = None) -> Maps:
    """How sensitive the score is to more attention on each part of each input: gradients alone, all layers added up.

    `E = sum over attentions of mean over heads and queries of (dP)+`, onto every input that has keys with places
    (Bousselham et al. 2024, arXiv:2404.03214, there with a mean over layers, normalised afterwards). They read
    a score off each layer's own tokens; here all layers have the gradient of the score that the recording has, which is
    the same for the last. The mean over queries hides how many they are, so maps of different inputs do not compare.

    Args:
        att, forward: As for `relevance`.

    Raises:
        MulticamError: As for `relevance`.

    Example:
        >>> from multicam.call.targets import TopClass
        >>> from multicam.demo.detector import EditDetector
        >>> from multicam.attending.attend import attention
        >>> inputs = {"rgb": torch.rand(1, 3, 64, 64), "frequency": torch.rand(1, 64, 16, 16), "texture": torch.rand(1, 3, 32, 32)}
        >>> {name: m.shape for name, m in legrad(attention(EditDetector(), inputs, TopClass())).items()}
        {'frequency': torch.Size([1, 16, 16]), 'texture': torch.Size([1, 32, 32])}
    """
    calls = _usable(att, forward)
    found = []
    for denses in _per_sample(calls, [call.grad.clamp(min=0).mean(1, keepdim=True) for call in calls]):
        tokens, at = torch.unique(torch.cat([dense.keys for dense in denses.values()]), return_inverse=True)
        means = torch.cat([dense.matrix[0].mean(0) for dense in denses.values()])
        found.append((tokens, means.new_zeros(len(tokens)).index_add_(0, at.to(means.device), means)))
    names = _placed(calls[0].forward, [tokens for tokens, _ in found])
    return Maps(
        {n: torch.cat([calls[0].forward.on_input(*line, n) for line in found]) for n in names}, comparable=False
    )


class _State:
    """What is in the tokens of one sample.

    Attributes:
        denses: Its attentions, by their numbers.
        keys: The ids of those that something attends to.
        tokens: All ids; those that are queries first.
        asked: How many tokens have a row in the matrix; the others are themselves only.
        matrix: Rows of the identity, to begin with.

    Args:
        denses: Its attentions.
        whole: Whether tokens that are no queries have a row, too.
    """

    def __init__(self, denses: dict[int, Dense], whole: bool = False) -> None:
        self.denses = denses
        a = next(iter(denses.values())).matrix
        queries = torch.unique(torch.cat([dense.queries for dense in denses.values()])).to(a.device)
        self.keys = torch.unique(torch.cat([dense.keys for dense in denses.values()])).to(a.device)
        self.tokens = torch.cat([queries, self.keys[~torch.isin(self.keys, queries)]])
        self.asked = len(self.tokens) if whole else len(queries)
        self.matrix = torch.eye(self.asked, len(self.tokens), dtype=a.dtype, device=a.device)
        self._sorted, self._order = self.tokens.sort()

    def at(self, ids: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """Where these tokens are among `tokens`."""
        return self._order[torch.searchsorted(self._sorted, ids.to(self.tokens.device))]

    def rows(self, at: Int[Tensor, " n"]) -> Float[Tensor, "n tokens"]:
        """The rows of these tokens."""
        rows = self.matrix.new_zeros(len(at), len(self.tokens))
        rows[torch.arange(len(at), device=at.device), at] = 1
        rows[at < self.asked] = self.matrix[at[at < self.asked]]
        return rows

    def mixed(self, a: Float[Tensor, "q k"], keys: Int[Tensor, " k"]) -> Float[Tensor, "q tokens"]:
        """`A R[k]`."""
        # Tokens that are no queries never change: their rows of R are those of the identity, of which A I[k] is A's own column. So R has rows
        # for queries only, and a model's thousand keys cost one addition.
        at = self.at(keys)
        asked = at < self.asked
        return (a[:, asked] @ self.matrix[at[asked]]).index_add_(1, at[~asked], a[:, ~asked])

    def streams(self) -> list[Tensor]:
        """The streams as positions: the queries of an attention are of one stream, and so are its keys."""
        stream = torch.arange(len(self.tokens), device=self.tokens.device)
        for dense in self.denses.values():
            for ids in (dense.queries, dense.keys):
                joined = stream[self.at(ids)]
                stream[torch.isin(stream, joined)] = joined.min()
        return [torch.nonzero(stream == i)[:, 0] for i in torch.unique(stream)]

    def added(self, dense: Dense, streams: list[Tensor] | None) -> tuple[Int[Tensor, " n"], Float[Tensor, "n tokens"]]:
        """The rows that an attention adds to, and what; by rule 10 between two streams, where there are streams."""
        a, queries, keys = dense.matrix[0], self.at(dense.queries), self.at(dense.keys)
        added = self.mixed(a, dense.keys)
        if streams is None:
            return queries, added
        s, t = (next(stream for stream in streams if at[0] in stream) for at in (queries, keys))
        if s is t:
            return queries, added
        of_s, of_t = self._normalised(s), self._normalised(t)
        # From stream s to stream t: R[s, :] += A R[t, :] on the queries' rows (6, 11), but for the columns of t, where
        # R[s, t] += N[s]^T A N[t] (10): what the queries have become of all tokens of s passes on what they read to those.
        whole = added.new_zeros(len(s), len(self.tokens))
        whole[torch.searchsorted(s, queries)] = added
        whole[:, t] = of_s[torch.searchsorted(s, queries)].T @ a @ of_t[torch.searchsorted(t, keys)]
        return s, whole

    def _normalised(self, stream: Tensor) -> Tensor:
        # Equations 8 and 9: a token is itself (I) and what it has taken in since (R - I), scaled to 1 so that both count alike.
        start = torch.eye(len(stream)).to(self.matrix)
        gained = self.rows(stream)[:, stream] - start
        total = gained.sum(1, keepdim=True)
        return gained / total.where(total > 0, 1) + start


def _usable(att: Sequence[AttentionCall], forward: int | None) -> list[AttentionCall]:
    """Those whose matrices say how much of each key is in each query."""
    calls = of_pass(att, forward)
    kept = []
    for call in calls:
        reason = "its softmax runs over the queries" if call.softmax_over == "queries" else "it multiplies no keys"
        if call.softmax_over == "queries" or not call.has_keys:
            warnings.warn(f"attention {call.name!r} is left out: {reason}", stacklevel=3)
            continue
        if (call.rows < 0).any() or (call.columns < 0).any():
            raise MulticamError(
                f"attention {call.name!r} is among tokens that could not be followed ({call.describe()}); leave it out: "
                f"give [call for call in att if call.path != {call.path!r}], or a part such as att[2:] or att.find(…)"
            )
        kept.append(call)
    if not kept:
        raise MulticamError(
            "none of the attentions can be taken together with others; read them one by one, by heatmap(…)"
        )
    return kept


def _per_sample(calls: Sequence[AttentionCall], matrices: Sequence[Tensor]) -> list[dict[int, Dense]]:
    """For each sample the attentions that have queries of it, by their numbers, from matrices `(b 1 q k)`."""
    wide = [m.to(torch.promote_types(m.dtype, torch.float32)) for m in matrices]
    return [
        {i: call.dense(wide[i], sample) for i, call in enumerate(calls) if (call.samples() == sample).any()}
        for sample in range(samples(calls))
    ]


def _as_one(denses: dict[int, Dense]) -> dict[int, Dense]:
    """The same with own tokens that became one as one, unless they stand side by side in an attention, too."""
    same = {
        i: replace(d, queries=d.forward.places.one(d.queries), keys=d.forward.places.one(d.keys))
        for i, d in denses.items()
    }
    apart = all(len(torch.unique(ids)) == len(ids) for dense in same.values() for ids in (dense.queries, dense.keys))
    return same if apart else denses


def _independent(calls: Sequence[AttentionCall]) -> list[list[int]]:
    """Runs of attentions, by their numbers, of which none was computed from another of the same run."""
    runs: list[list[int]] = []
    for i, call in enumerate(calls):
        if runs and not _computed_from(call, [calls[j] for j in runs[-1]]):
            runs[-1].append(i)
        else:
            runs.append([i])
    return runs


def _computed_from(call: AttentionCall, others: Sequence[AttentionCall]) -> bool:
    sought = {other.differentiated.grad_fn for other in others}
    todo, seen = [call.differentiated.grad_fn], set()
    while todo:
        node = todo.pop()
        if node in sought:
            return True
        if node is not None and node not in seen:
            seen.add(node)
            todo += [before for before, _ in node.next_functions]
    return False


def _placed(forward: Forward, tokens: Sequence[Tensor]) -> list[str]:
    names = forward.placed(torch.cat(list(tokens)))
    if not names:
        raise MulticamError(f"no input has tokens with places on it: {forward.places.describe(tokens[0])}")
    return names
