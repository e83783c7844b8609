"""A target and the part of the output that it sees, as one object."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from multicam.call.targets.scores import ClassScore, Target, TopClass, unpicked
from multicam.call.tree import leaves, resolve
from multicam.errors import MulticamError

TargetLike = Target | int | Sequence[int] | Tensor | None
OutputLike = str | int | Callable[[Any], Any] | None


def as_target(target: TargetLike) -> Target:
    """The target that `target` means: None is each sample's top class, an int or one int per sample a class score.

    Example:
        >>> as_target(3)
        ClassScore(index=3)
    """
    if target is None:
        return TopClass()
    if isinstance(target, type):
        raise MulticamError(f"a target is made before it is used: {target.__name__}(…)")
    return target if callable(target) else ClassScore(target)


def pinned(target: Target, output: Any) -> Target:
    """The target with everything decided that it reads from the output of the unchanged inputs.

    A target that chooses (the top class, the pixels that are called sky) has a method `pin(output)` that returns the
    target as chosen, so that it stays the same when inputs or activations are changed to see what the score does.
    """
    fixed: Target = target.pin(output) if hasattr(target, "pin") else target
    return fixed


def taken(target: Target, samples: Sequence[int]) -> Target:
    """The target for these samples, which may come several times.

    A target that holds one value for each sample has a method `take(samples)`; others serve any batch as they are.
    """
    chosen: Target = target.take(samples) if hasattr(target, "take") else target
    return chosen


def score(target: Target, output: Any, batch: int) -> Float[Tensor, " b"]:
    """One float32 (or wider) score per sample.

    Raises:
        MulticamError: If the target returns anything else.
    """
    try:
        scores = target(output)
    except Exception as error:
        if not isinstance(output, Tensor) and not isinstance(error, MulticamError):
            error.add_note(unpicked(output))
        raise
    if not isinstance(scores, Tensor) or tuple(scores.shape) != (batch,) or not scores.is_floating_point():
        given = f"{scores.dtype} {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise MulticamError(
            f"the target {target!r} returned {given}; it must return one floating-point score per sample: ({batch},)"
        )
    return scores if scores.dtype == torch.float64 else scores.float()


def select_output(output: Any, path: OutputLike) -> Any:
    """The part of a model's output that the target sees.

    Args:
        output: What the model returned.
        path: None for all of it, a path such as `"logits"`, `1`, `-1`, `"heads.0"`, or a callable.

    Raises:
        MulticamError: If the path does not exist.
    """
    if callable(path):
        return path(output)
    if path is None:
        return output
    if isinstance(path, int) and isinstance(output, list | tuple) and -len(output) <= path < len(output):
        return output[path]
    tensors = {name: leaf for name, leaf in leaves(output).items() if isinstance(leaf, Tensor)}
    if str(path) not in tensors and isinstance(output, Tensor):
        raise MulticamError(f"the model returns one tensor, so output={path!r} names nothing; leave it out")
    return tensors[resolve("output", str(path), tensors)]
