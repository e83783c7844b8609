"""A target and the part of the output that it sees, as one object."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from multicam.call.outputs import by_sample, has_tensor, unpicked
from multicam.call.targets.scores import ClassScore, Target, TopClass
from multicam.call.tree import leaves, rebuild, resolve
from multicam.errors import MulticamError, out_of_memory

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


def select_output(output: Any, path: OutputLike) -> Any:
    """The part of a model's output that the target sees.

    Args:
        output: What the model returned.
        path: None for all of it, a path such as `"logits"`, `1`, `-1`, `"heads.0"`, or a callable.

    Raises:
        MulticamError: If the path does not exist, or there is no tensor in the output.
    """
    if path is None:
        return output
    if callable(path):
        with _said_of(output):
            return path(output)
    if not has_tensor(output):
        raise MulticamError(unpicked(output))
    if isinstance(path, int) and isinstance(output, list | tuple) and -len(output) <= path < len(output):
        return output[path]
    tensors = {name: leaf for name, leaf in leaves(output).items() if isinstance(leaf, Tensor)}
    if str(path) not in tensors and isinstance(output, Tensor):
        raise MulticamError(f"the model returns one tensor, so output={path!r} names nothing; leave it out")
    return tensors[resolve("output", str(path), tensors)]


@contextmanager
def _said_of(output: Any) -> Iterator[None]:
    """What a function of the user's fails with says what the output is, where it is no tensor.

    Raises:
        MulticamError: If it fails and there is no tensor in the output.
    """
    try:
        yield
    except MulticamError:
        raise
    except Exception as error:
        if not has_tensor(output) and not out_of_memory(error):
            raise MulticamError(unpicked(output)) from error
        if not isinstance(output, Tensor):
            error.add_note(unpicked(output))
        raise


def turned(output: Any, batch: int) -> Any:
    """An output with its samples in reverse order.

    Example:
        >>> turned({"logits": torch.tensor([1, 2]), "scale": 3}, 2)
        {'logits': tensor([2, 1]), 'scale': 3}
    """
    if by_sample(output, batch):
        return output[::-1]
    return rebuild(
        output,
        lambda _, leaf: leaf.flip(0) if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == batch else leaf,
    )


class Scorer:
    """What turns a model's output into one score for each sample: a target, and the part of the output that it sees.

    Args:
        target: See `as_target`.
        output: See `select_output`.

    Example:
        >>> scorer = Scorer(1, "logits")
        >>> scorer.of({"logits": torch.tensor([[0.5, 2.0], [1.5, 3.0]])}, 2)
        tensor([2., 3.])
    """

    def __init__(self, target: TargetLike, output: OutputLike = None) -> None:
        self.target, self.output = as_target(target), output

    def __repr__(self) -> str:
        return f"Scorer({self.target!r}, {self.output!r})"

    def of(self, returned: Any, batch: int) -> Float[Tensor, " b"]:
        """The scores of what the model returned.

        Raises:
            MulticamError: If the output has no such part, or the target returns anything but one number for each sample.
        """
        return self.of_picked(select_output(returned, self.output), batch)

    def of_picked(self, picked: Any, batch: int) -> Float[Tensor, " b"]:
        """One float32 (or wider) score for each sample, from the part of the output that the target sees."""
        with _said_of(picked):
            scores = self.target(picked)
        if not isinstance(scores, Tensor) or tuple(scores.shape) != (batch,) or not scores.is_floating_point():
            given = f"{scores.dtype} {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
            raise MulticamError(
                f"the target {self.target!r} returned {given}; it must return one floating-point score per sample: ({batch},)"
            )
        return scores if scores.dtype == torch.float64 else scores.float()

    def pinned(self, picked: Any) -> "Scorer":
        """With everything decided that the target reads from this part of the output of the unchanged inputs.

        A target that chooses (the top class, the pixels that are called sky) has a method `pin(output)` that returns the
        target as chosen, so that it stays the same when inputs or activations are changed to see what the score does.
        """
        return Scorer(self.target.pin(picked), self.output) if hasattr(self.target, "pin") else self

    def take(self, samples: Sequence[int]) -> "Scorer":
        """For these samples, which may come several times.

        A target that holds one value for each sample has a method `take(samples)`; others serve any batch as they are.
        """
        return Scorer(self.target.take(samples), self.output) if hasattr(self.target, "take") else self

    def read(self, returned: Any, samples: Sequence[int]) -> Float[Tensor, " n"]:
        """The scores of an output whose rows stem from these samples."""
        return self.take(samples).of(returned, len(samples))
