"""What a recording of attention holds: the attentions, found by name or by the inputs between which they run."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, SupportsIndex, overload

import torch
from jaxtyping import Float
from torch import Tensor, nn

from multicam.attending.attention_call import AttentionCall
from multicam.attending.passes import Forward
from multicam.errors import MulticamError, unknown
from multicam.printing import aligned
from multicam.watch.backward import gradients
from multicam.watch.finite import first, shown


@dataclass(frozen=True)
class Unseen:
    """Something that looked like attention and is not in the record.

    Attributes:
        path: The module.
        what: What was seen of it, and why it was not taken for attention.
    """

    path: str
    what: str


class Calls(list[AttentionCall]):
    """Attentions in the order in which they ran; prints as a table."""

    @overload
    def __getitem__(self, key: SupportsIndex | str) -> AttentionCall: ...

    @overload
    def __getitem__(self, key: slice) -> "Calls": ...

    def __getitem__(self, key: SupportsIndex | str | slice) -> "AttentionCall | Calls":
        """By number; or the only one of a module path (`"fusion.attn"`), a call (`"fusion.attn#1"`) or a pattern (`"*.cross"`).

        Raises:
            MulticamError: If there is none, or more than one.
        """
        if not isinstance(key, str):
            return Calls(super().__getitem__(key)) if isinstance(key, slice) else super().__getitem__(key)
        matching = self.find(key)
        if not matching:
            raise unknown("attention", key, dict.fromkeys(call.path for call in self))
        if len(matching) > 1:
            names = ", ".join(f"{call.name} of pass {call.forward.index}" for call in matching[:6])
            raise MulticamError(
                f"{len(matching)} attentions are called {key!r}: {names}; take one by number, or loop over .find({key!r})"
            )
        return matching[0]

    def find(self, name: str) -> "Calls":
        """The attentions of a module path or of the modules inside of it, of a call `"path#1"`, or of a pattern with `*`."""
        if not isinstance(name, str):
            raise MulticamError(f"attentions are found by a module path or a pattern with *, not by {name!r}")
        return Calls(
            call
            for call in self
            if name in (call.path, call.name) or call.path.startswith(name + ".") or fnmatchcase(call.path, name)
        )

    def between(self, queries: str, keys: str) -> "Calls":
        """The attentions of tokens of one input to tokens of another (or the same) input.

        Raises:
            MulticamError: If there is none; the message lists what attends to what.
        """
        known = dict.fromkeys(name for call in self for name in call.forward.places.names)
        for name in (queries, keys):
            if name not in known:
                raise unknown("input", name, known)
        found = Calls(call for call in self if queries in call.inputs()[0] and keys in call.inputs()[1])
        if not found:
            raise MulticamError(f"no attention of {queries!r} to {keys!r} was seen:\n{self!r}")
        return found

    def __repr__(self) -> str:
        rows = [("attention", "source", "b heads q k", "queries -> keys")]
        rows += [(c.name, c.source, " x ".join(map(str, c.shape)), c.describe()) for c in self]
        return aligned(rows)


class Attention(Calls):
    """The attentions of the forward passes of one recording.

    Attributes:
        model: The model.
        output: What the last pass returned, where `attention(…)` ran it.
        kept: What `keep` returned for each attention, where it is a function.
        skipped: Softmaxes and products that turned out not to be attention.
        blind_spots: Kernels whose inside cannot be seen, and that may hold attention.
        forwards: The passes.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.output: Any = None
        self.kept: list[Any] = []
        self.skipped: list[Unseen] = []
        self.blind_spots: list[Unseen] = []
        self.forwards: list[Forward] = []

    def gradients(self, score: Float[Tensor, "..."]) -> None:
        """Fill `call.grad` of every attention with the gradients of a score, from one backward pass that reaches no parameter.

        Args:
            score: A number, or one for each sample, computed from the outputs of the recorded passes.

        Raises:
            MulticamError: If the score does not depend on anything that was recorded, or is NaN or infinite.
        """
        if not isinstance(score, Tensor) or not score.requires_grad:
            raise MulticamError(
                "the score carries no gradient: run the model without torch.no_grad(), and where its parameters are frozen, "
                "record with record_attention(model, gradients=True)"
            )
        if not torch.isfinite(score).all():
            raise MulticamError(
                f"the score is {shown(score.flatten()[first(score.flatten())])}, so nothing tells what it depends on"
            )
        open_calls = [call for call in self if call.differentiable]
        sources = [call.differentiated for call in open_calls]
        if not sources:
            reasons = "; ".join(dict.fromkeys(call.reason for call in self))
            raise MulticamError(f"no recorded attention has a gradient: {reasons}")
        found = gradients(score.sum(), sources, retain_graph=True)
        for call, gradient in zip(open_calls, found, strict=True):
            call.receive(gradient)
