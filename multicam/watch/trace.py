"""One observed forward pass: activations at layers, scores, and gradients on demand."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import CheckpointError

from multicam.call.inputs import Inputs
from multicam.call.scorer import OutputLike, Scorer, TargetLike, select_output, turned
from multicam.call.targets.scores import Target
from multicam.call.tree import rebuild
from multicam.errors import MulticamError, out_of_memory
from multicam.watch.backward import gradients
from multicam.watch.finite import CHANGED, Asked, Change, How, check_gradient, check_layer
from multicam.watch.layers import Layer, LayerLike, Tap, Taps
from multicam.watch.missing import at_layer, refuse_detached, with_another
from multicam.watch.placing import Placed
from multicam.watch.replay import Replay
from multicam.watch.reshape import Tokens, positions
from multicam.watch.rows import any_reading, settled
from multicam.watch.saved import overwrites, retried
from multicam.watch.survey import Survey, located
from multicam.watch.undisturbed import undisturbed, unwrapped


@dataclass(frozen=True)
class Site:
    """What one layer did in one trace.

    Attributes:
        name: The name that the caller gave to the layer.
        layer: Its address.
        acts: The activations `(b c *grid)`, float32 (float64 where the layer's are).
        scores: The scores of the trace `(b,)`.
        trace: Where it comes from.
    """

    name: str
    layer: Layer
    acts: Float[Tensor, "b c *grid"]
    scores: Float[Tensor, " b"]
    trace: "Trace" = field(repr=False)

    @cached_property
    def grads(self) -> Float[Tensor, "b c *grid"]:
        """The gradient of each score by the activations `(b c *grid)`; the first use runs the one backward pass of the trace.

        Raises:
            MulticamError: If the layer has no gradient; the message says why.
        """
        return self.trace.grads[self.name]

    @property
    def curvature(self) -> Float[Tensor, "b c *grid"]:
        """`H A (b c *grid)`: the Hessian of each score by the activations, times the activations.

        Takes another forward pass and two backward passes on every use.
        """
        return self.trace.curvature(self.name)

    def rescore(self, acts: Float[Tensor, "n c *grid"], sample: int = 0) -> Float[Tensor, " n"]:
        """The scores of `n` what-ifs of one sample, in which the layer's activations are exchanged.

        Only what depends on the layer runs again, see `multicam.watch.replay`; entries of its output that are not on the grid
        (class tokens) stay as they are.

        Raises:
            MulticamError: If the activations or the sample do not fit, or a score is not finite.
        """
        return check_layer(self.trace._replay(self.name)(acts, sample), self.trace.paths[self.name], sample)


class Trace:
    """One observed forward pass of a model.

    The model runs in evaluation mode and its parameters get no gradient: the graph starts at the first observed layer.
    Each layer's output is recorded and a copy goes on through the model, so that operations in place cannot reach the
    record. Afterwards everything is as it was: hooks, training flags, `requires_grad`, `.grad`, inputs, RNG.

    Args:
        model: Any module.
        inputs: What it takes, see `Inputs.of`.
        layers: Name -> layer.
        target: See `multicam.call.scorer.as_target`.
        output: Which part of the model's output the target sees, see `multicam.call.scorer.select_output`.
        wrt: The inputs that the scores are differentiated by, see `input_grads`.
        change: How the inputs stem from those of another trace, see `again`.

    Raises:
        MulticamError: For inputs, layers, outputs or targets that do not fit, or scores that are not finite.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5))
        >>> trace = Trace(model, torch.rand(2, 3, 8, 8), {"conv": "0"}, target=3)
        >>> trace.sites["conv"].grads.shape, trace.scores.shape
        (torch.Size([2, 4, 6, 6]), torch.Size([2]))
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        layers: Mapping[str, LayerLike],
        target: TargetLike = None,
        output: OutputLike = None,
        wrt: Sequence[str] = (),
        change: Change | None = None,
    ) -> None:
        self.model = unwrapped(model)
        self.inputs = Inputs.of(inputs).bind(self.model)
        self.wrt = tuple(map(self._differentiable, wrt))
        self._layers = dict(layers)
        located_layers = located(self.model, self.inputs, layers)
        self._replays: dict[str | tuple[str, ...], Replay] = {}
        taps = Taps(self.model, list(located_layers.values()))
        batch = self.inputs.batch
        records: dict[int, Tensor] = {}
        self._leaves: dict[str, Tensor] = {}

        def with_gradient(name: str, leaf: Any) -> Any:
            if name not in self.wrt:
                return leaf
            self._leaves[name] = leaf.requires_grad_()
            return leaf.clone()  # a model may write into its inputs

        def record(i: int, tap: Tap, x: Tensor) -> Tensor:
            # Whoever holds x may still write into it, before or after; the record belongs to nobody else.
            records[i] = x.clone() if x.requires_grad else x.detach().clone().requires_grad_()
            return records[i].clone()

        def observed() -> list[Tap]:
            start = ("trace", *taps.names, self.wrt)
            with undisturbed(self.model, graph=True, call=self.inputs, part=start) as memory, memory.saving():
                with taps.observe(record) as seen:
                    returned = memory.call.map(with_gradient).run(self.model)
                output_tensor = select_output(returned, output)
                self.scorer = Scorer(target, output).pinned(output_tensor)
                self._scores = self.scorer.of_picked(output_tensor, batch)
                self.output = rebuild(output_tensor, lambda _, leaf: memory.apart(leaf))
            taps.check_parted(seen, self.inputs, self.output, partial(select_output, path=output))
            self._memory = memory
            return seen

        seen = retried(observed)
        # The caller may write into them afterwards. Only now, because in the pass copies would add to its memory.
        self._lent, self.inputs = self.inputs, self.inputs.own()
        self._records = {name: records[i] for i, name in enumerate(layers)}
        self._taps = dict(zip(layers, seen, strict=True))
        self.scores: Float[Tensor, " b"] = self._scores.detach()
        self._asked, self._change = Asked(self.model, self.inputs, self.scorer), change
        _ = change.check(self.scores, self.inputs) if change else self._asked.check(self.scores)
        self.shared = {name for name, tap in self._taps.items() if tap.calls > 1}
        self.paths = {name: tap.label for name, tap in self._taps.items()}
        self._acts = {name: self._gridded(name, record) for name, record in self._records.items()}

    @property
    def target(self) -> Target:
        """What was explained, with everything decided that the target chose from the output."""
        return self.scorer.target

    @property
    def decides(self) -> bool:
        """Whether a number of a tensor decides what runs, as far as it was seen."""
        return self._memory.decides

    @property
    def sites(self) -> dict[str, "Site"]:
        """What each layer did, by the caller's name for it."""
        # Made on request: sites that the trace itself kept would hold its graph in memory by a reference cycle.
        return {name: Site(name, tap.layer, self._acts[name], self.scores, self) for name, tap in self._taps.items()}

    def __repr__(self) -> str:
        layers = ", ".join(f"{name}={tuple(acts.shape)}" for name, acts in self._acts.items())
        return f"Trace({type(self.model).__name__}, {self.inputs!r}, {layers})"

    def again(
        self, inputs: Any, samples: Sequence[int] | None = None, wrt: Sequence[str] | None = None, how: How = CHANGED
    ) -> "Trace":
        """The same layers, output and target for other inputs: a noisy, mirrored or cropped version of these.

        A target that chose its class from the output (`target=None`) keeps the class that it chose here.

        Args:
            inputs: As for `Trace`.
            samples: Which sample of this trace each sample of the new one stems from; None: the same in the same order.
            wrt: As for `Trace`; None: the same as here.
            how: What was done to the inputs, to be told where a score is not finite.
        """
        if samples is not None:
            self.refuse_target_without_samples()
        scorer = self.scorer if samples is None else self.scorer.take(samples)
        wrt, change = self.wrt if wrt is None else wrt, Change(self._asked, samples, how)
        return Trace(self.model, inputs, self._layers, scorer.target, scorer.output, wrt, change)

    def rescore(self, values: Mapping[str, Tensor], sample: int = 0, how: How = CHANGED) -> Float[Tensor, " n"]:
        """The scores of `n` what-ifs of one sample, in which the named inputs are exchanged and all others stay.

        Only what depends on these inputs runs again, see `multicam.watch.replay`.

        Args:
            values: The changed inputs by name, each `(n …)` with the shape of one sample behind `n`.
            sample: The sample that is changed.
            how: What was done to the inputs, to be told where a score is not finite.

        Raises:
            MulticamError: If names, shapes or the sample do not fit, or a score is not finite.
        """
        full = {self.inputs.name(name): rows for name, rows in values.items()}
        wrong = [name for name in full if name not in self.settled.batched]
        if wrong or not full:
            known = ", ".join(map(repr, self.settled.batched))
            raise MulticamError(f"give the inputs to change, of {known}" + (f", not {wrong[0]!r}" if wrong else ""))
        scores = self._replay(tuple(sorted(full)))(full, sample)
        return self._asked.check_changed(scores, full, [sample] * len(scores), how)

    def take(self, samples: Sequence[int]) -> Inputs:
        """The inputs for these samples, which may come several times; lists and arrays follow, see `multicam.watch.rows`.

        Args:
            samples: The samples of this trace.

        Raises:
            MulticamError: If nobody can tell what has one item for each sample.
        """
        if [*samples] == [*range(self.inputs.batch)]:
            return self.inputs.take(samples)
        self.refuse_target_without_samples()
        return self.settled.take(samples)

    @cached_property
    def settled(self) -> Inputs:
        """The inputs, with it known what has one item for each sample."""
        return settled(self.model, self.inputs, self.scorer.output, self.target)

    def scores_of(self, returned: Any, samples: Sequence[int]) -> Float[Tensor, " n"]:
        """The scores of what the model returned for other inputs `(n)`.

        Args:
            returned: The model's whole output.
            samples: Which sample of this trace each row stems from.
        """
        self.refuse_target_without_samples()
        return self.scorer.read(returned, samples)

    def _replay(self, source: str | tuple[str, ...]) -> Replay:
        """The replay of a change of the layer of one site, or of the inputs of these names."""
        if source not in self._replays:
            self.refuse_target_without_samples()
            changes = self._unplaced(source) if isinstance(source, str) else source
            # The scorer's own method: a reference to the trace would be a cycle.
            self._replays[source] = Replay(
                self.model, any_reading(self.settled), changes, self.scorer.read, self.scores
            )
        return self._replays[source]

    def _unplaced(self, name: str) -> Layer:
        """The layer of a site, whose places another pass tells, as those of this one may be those of its number of samples."""
        layer, found = Layer.of(self._layers[name]), self._taps[name].layer.reshape
        return replace(layer, onto=found.onto) if isinstance(found, Placed) else replace(layer, reshape=found)

    def refuse_target_without_samples(self) -> None:
        """Refuse a target that holds values for each sample and cannot tell those of a part of them."""
        if self.inputs.batch == 1 or hasattr(self.target, "take"):
            return
        try:
            found = self.scorer.of_picked(turned(self.output, self.inputs.batch), self.inputs.batch)
        except (RuntimeError, ValueError, TypeError, LookupError) as error:
            if out_of_memory(error):
                raise
            return  # it knows its samples by something else
        if not torch.allclose(found.flip(0), self.scores, 1e-3, 1e-3 * float(self.scores.abs().max()), equal_nan=True):
            raise MulticamError(
                f"the target {self.target!r} treats each sample differently, so it must say what belongs to which: give it a method "
                "take(samples) that returns the target for these samples, or explain one sample at a time"
            )

    def sees(self, name: str, input: str) -> bool:
        """Whether a layer's output changes with an input; where values of the input decide what runs, the model runs once more to tell."""
        survey, tap = Survey.of(self.model, self.inputs), self._taps[name]
        known = survey.sees(tap.path, tap.layer)
        if input in known or input not in survey.left:
            return input in known
        return not torch.equal(with_another(self.model, self.inputs, tap.layer, input), self._records[name])

    @cached_property
    def grads(self) -> dict[str, Float[Tensor, "b c *grid"]]:
        """The gradient of the scores by each site's activations, from one backward pass that never reaches a parameter.

        Raises:
            MulticamError: If a layer has no gradient, or one that is not finite; the message says why.
        """
        found = dict(zip(self._records, self._backward, strict=False))
        for name, gradient in found.items():
            if gradient is None:
                raise at_layer(self.model, self.inputs, self._taps[name], self.scorer, self.scores)
        return {name: self._checked(name, gradient) for name, gradient in found.items() if gradient is not None}

    @cached_property
    def input_grads(self) -> dict[str, Tensor]:
        """The gradient of the scores by each input of `wrt`, of its shape; from the same backward pass as `grads`.

        It is zero for an input that the scores do not depend on, which takes one more forward pass to be sure.

        Raises:
            MulticamError: If the scores depend on an input, but not by a gradient, or if the gradient is not finite.
        """
        found = dict(zip(self._leaves, self._backward[len(self._records) :], strict=True))
        for name in [name for name, gradient in found.items() if gradient is None]:
            refuse_detached(self.model, self.inputs, name, self.scorer, self.scores)
        return {
            name: torch.zeros_like(leaf).detach()
            if (gradient := found[name]) is None
            else check_gradient(gradient, f"input {name!r}", self._change)
            for name, leaf in self._leaves.items()
        }

    @cached_property
    def _backward(self) -> tuple[Tensor | None, ...]:
        """The gradients by the records, then by the leaves."""
        wanted = [*self._records.values(), *self._leaves.values()]
        if not self._scores.requires_grad:
            return (None,) * len(wanted)
        if not _equal(self._lent, self.inputs):
            # The graph stands on the caller's tensors, which were written into meanwhile.
            return self._anew()._backward
        # Undisturbed, because checkpointed parts of a model run once more during the backward pass.
        with undisturbed(self.model, graph=True, part="backward"):
            try:
                found = gradients(self._scores.sum(), wanted)
            except (CheckpointError, RuntimeError) as error:
                if overwrites(error) and not self._memory.watched:
                    self._memory.forget()  # the model overwrites what its gradient needs, unlike in its first pass
                    return self._anew()._backward
                if "checkpoint" not in str(error).lower():
                    raise
                raise MulticamError(
                    "the model recomputes parts of itself (torch.utils.checkpoint), which cannot be done for a layer inside "
                    "such a part; turn it off while explaining, as with model.gradient_checkpointing_disable()"
                ) from error
        self._scores = self.scores  # the graph is used up
        return found

    def _anew(self) -> "Trace":
        rest = (self.target, self.scorer.output, self.wrt, self._change)
        return Trace(self.model, self.inputs, self._layers, *rest)

    def curvature(self, name: str) -> Float[Tensor, "b c *grid"]:
        """What `Site.curvature` is, for the site of that name."""
        # The fused kernels of attention have no second derivative, nor may a checkpointed part take them when it runs again.
        with sdpa_kernel(SDPBackend.MATH):
            again = self.again(self.inputs)
            record = again._records[name]
            with undisturbed(self.model, graph=True, part="backward"):
                gradient = product = None
                if again._scores.requires_grad:
                    (gradient,) = gradients(again._scores.sum(), [record], create_graph=True)
                if gradient is not None and gradient.requires_grad:
                    (product,) = gradients(gradient, [record], record.detach())
        if gradient is None:
            raise at_layer(self.model, self.inputs, self._taps[name], self.scorer, self.scores)
        return self._checked(name, torch.zeros_like(record) if product is None else product)

    def _differentiable(self, name: str) -> str:
        """The full name of an input that has a gradient."""
        full = self.inputs.name(name)
        leaf = self.inputs.leaves[full]
        if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
            return full
        kind = str(leaf.dtype).removeprefix("torch.") if isinstance(leaf, Tensor) else type(leaf).__name__
        raise MulticamError(
            f"input {full!r} is {kind}, which has no gradient: give it as a floating-point tensor, name other inputs with "
            "wrt=…, or take a method that needs no gradients, such as occlusion"
        )

    def _gridded(self, name: str, x: Tensor) -> Tensor:
        tap = self._taps[name]
        if not isinstance(tap.layer.reshape, Tokens | Placed):
            assert tap.layer.reshape is not None
            positions(tap.layer.reshape, x.detach())  # refuses one that computes
        return tap.grid(x.detach(), self.inputs.batch)

    def _checked(self, name: str, gradient: Tensor) -> Tensor:
        return check_gradient(self._gridded(name, gradient), f"layer {self.paths[name]!r}", self._change)


def _equal(first: Inputs, second: Inputs) -> bool:
    """Whether all tensors of a call have the same values as in another, NaN being itself."""
    others = second.leaves
    each = ((leaf.detach(), others[name]) for name, leaf in first.leaves.items() if isinstance(leaf, Tensor))
    return all(torch.equal(x, y) or bool(((x == y) | ((x != x) & (y != y))).all()) for x, y in each)
