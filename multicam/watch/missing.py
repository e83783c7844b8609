"""Why no gradient arrives: a pass with something changed tells whether the scores depend on it all the same."""

from torch import Tensor, nn

from multicam.call.inputs import Inputs
from multicam.call.scorer import Scorer
from multicam.errors import MulticamError
from multicam.watch.layers import Layer, Tap, Taps
from multicam.watch.module_calls import alike
from multicam.watch.undisturbed import undisturbed


def at_layer(model: nn.Module, call: Inputs, tap: Tap, scorer: Scorer, scores: Tensor) -> MulticamError:
    """What to say of a layer without a gradient.

    Args:
        model, call: Whose pass it was.
        tap: The layer in it.
        scorer: From the model's output to scores, with everything decided.
        scores: Those of the pass.
    """
    if tap.under_no_grad:
        return MulticamError(
            f"layer {tap.label!r} runs under the model's own torch.no_grad(), so no gradient can reach it; "
            "take a layer outside of it, or a method that needs no gradients such as EigenCAM"
        )
    with undisturbed(model, graph=False, call=call) as memory:
        with Taps(model, [tap.layer]).observe(lambda i, t, x: x.std() + 1 - x):
            returned = memory.call.run(model)
        changed = scorer.of(returned, call.batch)
    if alike(changed, scores):
        return MulticamError(
            f"the target does not depend on layer {tap.label!r}: changing its output leaves every score as it is; "
            "take a layer on the way to this output, or another target or output"
        )
    return MulticamError(
        f"the target depends on layer {tap.label!r}, but not by a gradient: something behind it is detached "
        "(.detach(), no_grad, argmax, rounding); take a layer behind that, or a method that needs no gradients"
    )


def refuse_detached(model: nn.Module, call: Inputs, name: str, scorer: Scorer, scores: Tensor) -> None:
    """Refuse a gradient of zero for an input on which the scores depend in another way; the arguments as for `at_layer`."""
    with undisturbed(model, graph=False, call=another(call, name)) as memory:
        changed = scorer.of(memory.call.run(model), call.batch)
    if not alike(changed, scores):  # threads add up in any order
        raise MulticamError(
            f"the target depends on input {name!r}, but not by a gradient: something behind it is detached (.detach(), "
            "no_grad, argmax, rounding); name the other inputs with wrt=…, or take a method that needs no gradients, "
            "such as occlusion"
        )


def with_another(model: nn.Module, call: Inputs, layer: Layer, name: str) -> Tensor:
    """What a layer returns where one input has other values."""
    kept: list[Tensor] = []

    def keep(i: int, tap: Tap, x: Tensor) -> Tensor:
        kept.append(x.detach().clone())
        return x

    taps = Taps(model, [layer])
    with undisturbed(model, graph=False, call=another(call, name)) as memory, taps.observe(keep):
        memory.call.run(model)
    return kept[0]


def another(call: Inputs, name: str) -> Inputs:
    """The call with other values of one input."""
    leaf = call.leaves[name]
    return call.replace({name: 1 - 2 * leaf if leaf.is_floating_point() or leaf.is_complex() else leaf.flip(-1)})
