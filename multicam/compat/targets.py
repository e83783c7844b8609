"""pytorch-grad-cam's targets and reshapes, by their names there, and what a list with one target for each image means."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from operator import index
from typing import Any, SupportsIndex

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from multicam.call.outputs import by_sample
from multicam.call.targets.scores import ClassScore, Target
from multicam.call.tree import rebuild
from multicam.errors import MulticamError
from multicam.watch.reshape import tokens

Targets = SupportsIndex | Iterable[Callable[[Any], Tensor] | SupportsIndex] | None


# Targets. Each is called with the output for one image, and also takes that of a batch.


class ClassifierOutputTarget:
    """The score of one class.

    Example:
        >>> ClassifierOutputTarget(2)(torch.tensor([1.0, 5.0, 3.0]))
        tensor(3.)
    """

    def __init__(self, category: int) -> None:
        self.category = category

    def __call__(self, model_output: Tensor) -> Tensor:
        """The score."""
        return model_output[..., self.category]


class ClassifierOutputSoftmaxTarget(ClassifierOutputTarget):
    """The softmax probability of one class."""

    def __call__(self, model_output: Tensor) -> Tensor:
        """The score."""
        return model_output.softmax(-1)[..., self.category]


class ClassifierOutputReST(ClassifierOutputTarget):
    """The score of one class plus the logarithm of its softmax probability; Cai 2025, arXiv:2501.06261."""

    def __call__(self, model_output: Tensor) -> Tensor:
        """The score."""
        return (model_output + model_output.log_softmax(-1))[..., self.category]


class BinaryClassifierOutputTarget:
    """The only logit of a binary classifier for category 1, its negative for category 0."""

    def __init__(self, category: int) -> None:
        self.category = category

    def __call__(self, model_output: Tensor) -> Tensor:
        """The score."""
        return model_output if self.category == 1 else -model_output


class SoftmaxOutputTarget:
    """The softmax of the output, for outputs that hold one number for each image otherwise."""

    def __call__(self, model_output: Tensor) -> Tensor:
        """The score."""
        return model_output.softmax(-1)


class RawScoresOutputTarget:
    """The output itself, of models with one number for each image."""

    def __call__(self, model_output: Tensor) -> Tensor:
        """The score."""
        return model_output


class SemanticSegmentationTarget:
    """The sum of one class's scores `(classes h w)` over a mask `(h w)`.

    Example:
        >>> mask = torch.tensor([[1.0, 0.0]])
        >>> SemanticSegmentationTarget(1, mask)(torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]]))
        tensor(3.)
    """

    def __init__(self, category: int, mask: Any) -> None:
        self.category = category
        self.mask = torch.as_tensor(mask)

    def __call__(self, model_output: Float[Tensor, "classes *grid"]) -> Tensor:
        """The score."""
        return (model_output[self.category] * self.mask.to(model_output)).sum()


class FasterRCNNBoxScoreTarget:
    """How well a detector's output matches given boxes.

    Each box takes the detection that overlaps it most; where that one has the box's label and overlaps by more than
    `iou_threshold`, overlap and detection score are added up.

    Args:
        labels: The label of each box.
        bounding_boxes: Each `(4)`: x1, y1, x2, y2.
        iou_threshold: The least overlap (intersection over union).
    """

    def __init__(self, labels: Sequence[Any], bounding_boxes: Sequence[Any], iou_threshold: float = 0.5) -> None:
        self.labels = labels
        self.bounding_boxes = bounding_boxes
        self.iou_threshold = iou_threshold

    def __call__(self, model_outputs: Mapping[str, Tensor]) -> Tensor:
        """The score `(1)` for one image's `boxes (n 4)`, `labels (n)` and `scores (n)`."""
        boxes = model_outputs["boxes"]
        total = boxes.new_zeros(1)
        if not len(boxes):
            return total
        for box, label in zip(self.bounding_boxes, self.labels, strict=True):
            overlaps = _iou(torch.as_tensor(box).to(boxes), boxes)
            best = overlaps.argmax()
            if overlaps[best] > self.iou_threshold and model_outputs["labels"][best] == label:
                total = total + overlaps[best] + model_outputs["scores"][best]
        return total


def _iou(box: Float[Tensor, "4"], boxes: Float[Tensor, "n 4"]) -> Float[Tensor, "n"]:
    sides = (torch.minimum(box[2:], boxes[:, 2:]) - torch.maximum(box[:2], boxes[:, :2])).clamp(min=0)
    shared = sides.prod(1)
    return shared / ((box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(1) - shared)


class FinerWeightedTarget:
    """The score of a class less `alpha` times the mean score of others, weighted by their probabilities."""

    def __init__(self, main_category: int, comparison_categories: Sequence[int], alpha: float) -> None:
        self.main_category = main_category
        self.comparison_categories = comparison_categories
        self.alpha = alpha

    def __call__(self, model_output: Tensor) -> Tensor:
        """The score."""
        others = model_output[..., list(self.comparison_categories)]
        return model_output[..., self.main_category] - self.alpha * (others.softmax(-1) * others).sum(-1)


def each_target(targets: Targets, batch: int) -> list[Callable[[Any], Tensor]] | None:
    """The target of each image; a class, for each image or for all, stands for its score.

    Raises:
        MulticamError: If there are more or fewer than images, or one is no target.
    """
    if targets is None:
        return None
    if isinstance(targets, SupportsIndex) and not isinstance(targets, bool) and not getattr(targets, "ndim", 0):
        return [_target(targets)] * batch
    if isinstance(targets, str | Mapping) or callable(targets) or not isinstance(targets, Iterable):
        raise MulticamError(f"targets is a list with one target for each image, not {targets!r}")
    each = [_target(target) for target in targets]
    if len(each) != batch:
        raise MulticamError(f"{len(each)} targets for {batch} images; give one for each image, in their order")
    return each


def _target(given: Any) -> Callable[[Any], Tensor]:
    if isinstance(given, SupportsIndex) and not isinstance(given, bool | type):
        with suppress(TypeError):  # a float in a tensor or an array
            return ClassifierOutputTarget(index(given))
    if isinstance(given, type) or not callable(given):
        raise MulticamError(f"a target is a callable such as ClassifierOutputTarget(281), or a class, not {given!r}")
    made: Callable[[Any], Tensor] = given
    return made


def per_image(targets: Targets, batch: int) -> Target | None:
    """The target that a list with one target for each image means.

    Raises:
        MulticamError: As `each_target`.
    """
    each = each_target(targets, batch)
    if each is None:
        return None
    classes = [target.category for target in each if type(target) is ClassifierOutputTarget]
    return ClassScore(classes) if len(classes) == batch else PerImage(tuple(each))


def chosen(target: Target, batch: int) -> list[Callable[[Any], Tensor]] | None:
    """The target of each image that a pass chose: its top class; None where it chose nothing of the kind."""
    if isinstance(target, ClassScore) and isinstance(target.index, tuple) and len(target.index) == batch:
        return [ClassifierOutputTarget(category) for category in target.index]
    return None


@dataclass(frozen=True)
class PerImage:
    """One target for each image of a batch, each called with the output for its image.

    The output for an image is its row of every tensor in the output, in the same containers. A list with one item
    for each image, as detectors return it, is one output for each image, see `by_sample`.
    """

    targets: tuple[Callable[[Any], Tensor], ...]

    def __call__(self, output: Any) -> Float[Tensor, " b"]:
        """The scores `(b,)`."""
        batch = len(self.targets)
        each = output if by_sample(output, batch) else [_row(output, i, batch) for i in range(batch)]
        return torch.stack([scalar(target, target(one)) for target, one in zip(self.targets, each, strict=True)])

    def take(self, samples: Sequence[int]) -> "PerImage":
        """The targets of these images."""
        return PerImage(tuple(self.targets[sample] for sample in samples))


def _row(output: Any, image: int, batch: int) -> Any:
    def row(_: str, leaf: Any) -> Any:
        return leaf[image] if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == batch else leaf

    return rebuild(output, row)


def scalar(target: Callable[[Any], Any], score: Any) -> Tensor:
    """What a target returned for one image, as a tensor without axes.

    Raises:
        MulticamError: If it is no single number.
    """
    if not isinstance(score, Tensor) or score.numel() != 1:
        given = f"shape {tuple(score.shape)}" if isinstance(score, Tensor) else type(score).__name__
        raise MulticamError(
            f"a target returns one number for each image, but {type(target).__name__} returned {given}; reduce it, as in "
            "output.mean()"
        )
    return score.reshape(())


@dataclass(frozen=True)
class Nothing:
    """Scores of zero, for methods that read none: any output will do."""

    batch: int

    def __call__(self, output: Any) -> Float[Tensor, " b"]:
        """The scores `(b,)`."""
        return torch.zeros(self.batch)


def vit_reshape_transform(tensor: Shaped[Tensor, "b n c"], height: int = 14, width: int = 14) -> Shaped[Tensor, "..."]:
    """Tokens behind one class token as a grid `(b c height width)`; `multicam.tokens` has more options.

    Example:
        >>> vit_reshape_transform(torch.rand(2, 5, 48), 2, 2).shape
        torch.Size([2, 48, 2, 2])
    """
    return tokens(height, width, prefix=1)(tensor)


def swinT_reshape_transform(  # noqa: N802
    tensor: Shaped[Tensor, "b n c"], height: int = 7, width: int = 7
) -> Shaped[Tensor, "..."]:
    """Tokens as a grid `(b c height width)`; for those that are `(b h w c)` already, `multicam.channels_last`."""
    return tokens(height, width)(tensor)


def fasterrcnn_reshape_transform(x: Mapping[str, Tensor]) -> Tensor:
    """The levels of a feature pyramid, made positive and resized to its smallest, side by side on the channel axis.

    It computes, so no method here takes it: name one level instead, `Layer("backbone", pick="pool")`.
    """
    size = x["pool"].shape[-2:]
    return torch.cat([F.interpolate(level.abs(), size, mode="bilinear") for level in x.values()], 1)
