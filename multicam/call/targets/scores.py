"""From a model's output to one score per sample."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from multicam.call.outputs import unpicked
from multicam.errors import MulticamError

Target = Callable[[Any], Tensor]


@dataclass(frozen=True)
class ClassScore:
    """The score of one class, or of one class per sample.

    Args:
        index: The class, counted from 0 (negative: from the end), or one for each sample `(b,)`.

    Example:
        >>> ClassScore([2, 0])(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
        tensor([3., 4.])
    """

    index: int | tuple[int, ...]

    def __init__(self, index: int | Sequence[int] | Tensor) -> None:
        object.__setattr__(self, "index", _indices(index))

    def __call__(self, output: Any) -> Float[Tensor, " b"]:
        """The scores `(b,)`."""
        return _of_class(_class_scores(output, self), self.index)

    def take(self, samples: Sequence[int]) -> "ClassScore":
        """The classes of these samples."""
        return ClassScore(_of_samples(self.index, samples))


@dataclass(frozen=True)
class TopClass:
    """The score of each sample's highest-scoring class."""

    def __call__(self, output: Any) -> Float[Tensor, " b"]:
        """The scores `(b,)`."""
        return _class_scores(output, self).amax(1)

    def pin(self, output: Any) -> ClassScore:
        """The classes that are highest in this output."""
        return ClassScore(_class_scores(output, self).argmax(1))


@dataclass(frozen=True)
class Probability:
    """The softmax probability of one class, or of one class per sample.

    Its gradient also carries what speaks for the other classes, with a minus; it vanishes where the model is sure.

    Args:
        index: As in `ClassScore`.
    """

    index: int | tuple[int, ...]

    def __init__(self, index: int | Sequence[int] | Tensor) -> None:
        object.__setattr__(self, "index", _indices(index))

    def __call__(self, output: Any) -> Float[Tensor, " b"]:
        """The scores `(b,)`."""
        return ClassScore(self.index)(_class_scores(output, self).softmax(1))

    def take(self, samples: Sequence[int]) -> "Probability":
        """The classes of these samples."""
        return Probability(_of_samples(self.index, samples))


@dataclass(frozen=True)
class Binary:
    """The only logit of a binary classifier `(b,)` or `(b 1)`; for the other class, its negative.

    Args:
        positive: Whether the class that a high logit stands for is explained.
    """

    positive: bool = True

    def __call__(self, output: Any) -> Float[Tensor, " b"]:
        """The scores `(b,)`."""
        logit = _single(output, self)
        return logit if self.positive else -logit


@dataclass(frozen=True)
class Regression:
    """One predicted quantity: the only one `(b,)` or `(b 1)`, or that at `index` of `(b quantities)`."""

    index: int | None = None

    def __call__(self, output: Any) -> Float[Tensor, " b"]:
        """The scores `(b,)`."""
        return _single(output, self) if self.index is None else ClassScore(self.index)(output)


@dataclass(frozen=True, eq=False)
class Similarity:
    """The cosine similarity of an embedding output `(b c)` to a given embedding.

    Args:
        embedding: `(c)`, or one for each sample `(b c)`.
    """

    embedding: Float[Tensor, "c"] | Float[Tensor, "b c"]

    def __post_init__(self) -> None:
        if not isinstance(self.embedding, Tensor):  # callers without a type checker
            raise MulticamError(f"the embedding to compare with is a tensor (c) or (b c), not {self.embedding!r}")

    def __call__(self, output: Any) -> Float[Tensor, " b"]:
        """The scores `(b,)`."""
        vectors = _class_scores(output, self)
        wanted = self.embedding.to(vectors)
        if wanted.shape[-1] != vectors.shape[1] or (wanted.ndim == 2 and wanted.shape[0] not in (1, len(vectors))):
            raise MulticamError(
                f"the embedding to compare with has shape {tuple(wanted.shape)}, the output {tuple(vectors.shape)}"
            )
        return F.cosine_similarity(vectors, wanted.expand_as(vectors), dim=1)

    def take(self, samples: Sequence[int]) -> "Similarity":
        """The embeddings of these samples."""
        single = self.embedding.ndim == 1 or len(self.embedding) == 1
        return self if single else Similarity(self.embedding[list(samples)])


@dataclass(frozen=True)
class Contrast:
    """Why one class rather than others: its score minus the mean score of the others.

    Args:
        index: The class, or one for each sample.
        others: The classes it is set against.
    """

    index: int | tuple[int, ...]
    others: tuple[int, ...]

    def __init__(self, index: int | Sequence[int] | Tensor, *others: int) -> None:
        if not others:
            raise MulticamError("Contrast needs at least one other class, as in Contrast(3, 5)")
        object.__setattr__(self, "index", _indices(index))
        object.__setattr__(self, "others", others)

    def __call__(self, output: Any) -> Float[Tensor, " b"]:
        """The scores `(b,)`."""
        others = torch.stack([ClassScore(other)(output) for other in self.others])
        return ClassScore(self.index)(output) - others.mean(0)

    def take(self, samples: Sequence[int]) -> "Contrast":
        """The classes of these samples."""
        return Contrast(_of_samples(self.index, samples), *self.others)


@dataclass(frozen=True, eq=False)
class SegmentationScore:
    """The mean score of one class over a region of a segmentation `(b classes *grid)`.

    Args:
        index: The class, or one for each sample.
        mask: The region on the grid of the output, `(*grid)` for all samples or `(b *grid)`: booleans, or weights from
            0 up. None: the cells that the model itself calls this class (where there is only one class: those with a
            positive score) for the unchanged inputs.

    Example:
        >>> output = torch.tensor([[[[3.0, 2.0, 3.0]], [[0.0, 5.0, 7.0]]]])  # classes 0 and 1 of a row of three cells
        >>> SegmentationScore(1)(output), SegmentationScore(1, torch.tensor([[True, True, False]]))(output)
        (tensor([6.]), tensor([2.5000]))
    """

    index: int | tuple[int, ...]
    mask: Tensor | None
    rows: tuple[int, ...] | None = None  # of the mask, if it turns out to have one for each sample; None: all

    def __init__(self, index: int | Sequence[int] | Tensor, mask: Any = None) -> None:
        object.__setattr__(self, "index", _indices(index))
        object.__setattr__(self, "mask", None if mask is None else torch.as_tensor(mask))

    def __call__(self, output: Any) -> Float[Tensor, " b"]:
        """The scores `(b,)`."""
        scores = _of_class(_dense(output, self, "classes *grid"), self.index)
        # The number of pixels overflows float16.
        weights = self._region(output).to(torch.promote_types(scores.dtype, torch.float32))
        return (scores * weights).flatten(1).sum(1) / weights.flatten(1).sum(1)

    def pin(self, output: Any) -> "SegmentationScore":
        """The target with the region of each sample `(b *grid)` as it is in this output."""
        return SegmentationScore(self.index, self._region(output))

    def take(self, samples: Sequence[int]) -> "SegmentationScore":
        """The classes and regions of these samples; the regions of a target that is not pinned are still to be chosen."""
        taken = SegmentationScore(_of_samples(self.index, samples), self.mask)
        # Only an output tells whether the mask's first axis is one of samples.
        object.__setattr__(taken, "rows", tuple(samples if self.rows is None else (self.rows[i] for i in samples)))
        return taken

    def _region(self, output: Any) -> Shaped[Tensor, "b *grid"]:
        logits = _dense(output, self, "classes *grid").detach()
        batch, grid = logits.shape[0], tuple(logits.shape[2:])
        if self.mask is None:
            scores = _of_class(logits, self.index)
            region = scores > 0 if logits.shape[1] == 1 else scores == logits.amax(1)
        else:
            region = self.mask.detach().to(logits.device)
            region = region[list(self.rows)] if self.rows is not None and region.ndim > len(grid) else region
        if tuple(region.shape) not in (grid, (batch, *grid)):
            raise MulticamError(
                f"the mask is {tuple(region.shape)}, but the output has the grid {grid} for {batch} samples; resize the "
                "mask to it (a network often segments at a part of its input's resolution)"
            )
        region = region.expand(batch, *grid)
        empty = (~(region >= 0).flatten(1).all(1) | (region == 0).flatten(1).all(1)).nonzero().flatten().tolist()
        if empty:
            why = "the model calls nothing this class" if self.mask is None else "it has no cell, or negative weights"
            why = "the model's output is NaN; look for NaN in the inputs" if logits[empty[0]].isnan().any() else why
            raise MulticamError(f"no region to explain for class {self.index} in sample {empty[0]}: {why}")
        return region

    def __repr__(self) -> str:
        return f"SegmentationScore({self.index}{'' if self.mask is None else f', mask {tuple(self.mask.shape)}'})"


@dataclass(frozen=True)
class QueryScore:
    """The score of one class at one query of an output `(b queries classes)`: a DETR's logits, a decoder's tokens.

    Args:
        index: The class, or one for each sample.
        query: The query, or one for each sample. None: the one whose score for the class is highest for the unchanged
            inputs.

    Example:
        >>> output = torch.tensor([[[1.0, 2.0], [0.0, 5.0]]])
        >>> QueryScore(1)(output), QueryScore(1, query=0)(output), QueryScore(1).pin(output)
        (tensor([5.]), tensor([2.]), QueryScore(index=1, query=(1,)))
    """

    index: int | tuple[int, ...]
    query: int | tuple[int, ...] | None

    def __init__(self, index: int | Sequence[int] | Tensor, query: int | Sequence[int] | Tensor | None = None) -> None:
        object.__setattr__(self, "index", _indices(index))
        object.__setattr__(self, "query", None if query is None else _indices(query))

    def __call__(self, output: Any) -> Float[Tensor, " b"]:
        """The scores `(b,)`."""
        scores = self._of_queries(output)
        return scores.amax(1) if self.query is None else _of_class(scores, self.query, "query")

    def pin(self, output: Any) -> "QueryScore":
        """The target with the query of each sample as it is in this output."""
        return QueryScore(self.index, self._of_queries(output).argmax(1)) if self.query is None else self

    def take(self, samples: Sequence[int]) -> "QueryScore":
        """The classes and queries of these samples."""
        query = None if self.query is None else _of_samples(self.query, samples)
        return QueryScore(_of_samples(self.index, samples), query)

    def _of_queries(self, output: Any) -> Float[Tensor, "b queries"]:
        logits = _dense(output, self, "queries classes")
        if logits.ndim != 3:
            raise MulticamError(f"{self!r} needs an output (b queries classes), but it is {tuple(logits.shape)}")
        return _of_class(logits.mT, self.index)


def _indices(index: int | Sequence[int] | Tensor) -> int | tuple[int, ...]:
    if hasattr(index, "tolist"):  # a tensor or an array
        index = index.tolist()
    values = index if isinstance(index, Sequence) and not isinstance(index, str) else (index,)
    if not all(hasattr(value, "__index__") and not isinstance(value, bool) for value in values):
        raise MulticamError(f"a target class is an int, or one int per sample, not {index!r}")
    return tuple(int(value) for value in values) if isinstance(index, Sequence) else int(index)


def _of_samples(index: int | tuple[int, ...], samples: Sequence[int]) -> int | tuple[int, ...]:
    return index if isinstance(index, int) else tuple(index[sample] for sample in samples)


def _of_class(
    scores: Shaped[Tensor, "b classes *grid"], index: int | tuple[int, ...], axis: str = "class"
) -> Shaped[Tensor, "b *grid"]:
    """The scores of one class, or of one class per sample."""
    batch, classes = scores.shape[:2]
    chosen = (index,) * batch if isinstance(index, int) else index
    names = {"class": "classes", "query": "queries"}[axis]
    if len(chosen) != batch:
        raise MulticamError(f"{len(chosen)} target {names} for {batch} samples; give one {axis}, or one per sample")
    wrong = [i for i in chosen if not -classes <= i < classes]
    if wrong:
        raise MulticamError(f"target {axis} {wrong[0]} does not exist: the output has {names} 0 to {classes - 1}")
    return scores[torch.arange(batch, device=scores.device), torch.tensor(chosen, device=scores.device)]


def _class_scores(output: Any, target: Target) -> Tensor:
    tensor = _tensor(output)
    if tensor.ndim == 2:
        return tensor
    raise MulticamError(
        f"{target!r} needs an output (b classes), but the output is of shape {tuple(tensor.shape)}; pick another with "
        "output=…, or take another target: Binary() or Regression() for (b,), SegmentationScore(class) for (b classes h "
        "w), QueryScore(class) for (b queries classes), or any callable that returns one score per sample"
    )


def _dense(output: Any, target: Target, axes: str) -> Tensor:
    tensor = _tensor(output)
    if tensor.ndim < 3:
        raise MulticamError(f"{target!r} needs an output (b {axes}), but the output is of shape {tuple(tensor.shape)}")
    return tensor


def _single(output: Any, target: Target) -> Tensor:
    tensor = _tensor(output)
    if tensor.ndim == 1 or (tensor.ndim == 2 and tensor.shape[1] == 1):
        return tensor.reshape(-1)
    raise MulticamError(
        f"{target!r} needs an output (b,) or (b 1), but the output is of shape {tuple(tensor.shape)}; name one of its columns"
    )


def _tensor(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    raise MulticamError(unpicked(output))
