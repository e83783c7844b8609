"""Targets for detectors: from a list of boxes, labels and scores per sample to one score per sample."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from multicam.errors import MulticamError


@dataclass(frozen=True, eq=False)
class BoxScore:
    """The scores of the detections that are the given boxes, from the output of a detector.

    Each box takes the detection of its own label that overlaps it most; its score counts where that overlap
    (intersection over union) is at least `iou`, and 0 where there is none. The scores of a sample's boxes are summed.
    The output is a list with one dict of `boxes (n 4)`, `labels (n)` and `scores (n)` per sample, as torchvision's
    detectors return it; the target sees all of it, so leave `output` out.

    Args:
        boxes: `(n 4)` for all samples, or one such tensor per sample, as x1, y1, x2, y2 in the model's own units.
        labels: `(n)` for all samples, or one such tensor per sample.
        iou: The least overlap.

    Example:
        >>> found = [{"boxes": torch.tensor([[0.0, 0, 4, 4]]), "labels": torch.tensor([1]), "scores": torch.tensor([0.9])}]
        >>> BoxScore(torch.tensor([[0.0, 0, 4, 3]]), [1])(found), BoxScore(torch.tensor([[0.0, 0, 4, 3]]), [2])(found)
        (tensor([0.9000]), tensor([0.]))
    """

    boxes: Tensor | tuple[Tensor, ...]
    labels: Tensor | tuple[Tensor, ...]
    iou: float

    def __init__(self, boxes: Tensor | Sequence[Tensor], labels: Any, iou: float = 0.5) -> None:
        shared = not isinstance(boxes, Sequence)
        if not shared and len(boxes) != len(labels):
            raise MulticamError(f"boxes for {len(boxes)} samples, but labels for {len(labels)}")
        pairs = zip(boxes, labels, strict=True) if isinstance(boxes, Sequence) else [(boxes, labels)]
        each = [(torch.as_tensor(found).detach(), torch.as_tensor(label)) for found, label in pairs]
        wrong = [
            pair for pair in each if pair[0].ndim != 2 or pair[0].shape[1] != 4 or pair[1].shape != pair[0].shape[:1]
        ]
        if wrong or not 0 < iou <= 1:
            given = f"{tuple(wrong[0][0].shape)} and {tuple(wrong[0][1].shape)}" if wrong else f"iou={iou}"
            raise MulticamError(f"BoxScore takes boxes (n 4), labels (n) and an iou above 0 and up to 1, not {given}")
        object.__setattr__(self, "boxes", each[0][0] if shared else tuple(pair[0] for pair in each))
        object.__setattr__(self, "labels", each[0][1] if shared else tuple(pair[1] for pair in each))
        object.__setattr__(self, "iou", iou)

    def __call__(self, output: Any) -> Float[Tensor, " b"]:
        """The scores `(b,)`."""
        return torch.stack([scores.sum() for scores in self._matched(output)])

    def pin(self, output: Any) -> "BoxScore":
        """The target itself; refuses a sample of which this output has none of the boxes."""
        for sample, scores in enumerate(self._matched(output)):
            if not (scores > 0).any():
                labels = sorted(set(_detections(output)[sample]["labels"].tolist()))
                raise MulticamError(
                    f"in sample {sample} the model finds none of the boxes of {self!r}: no detection has the label and "
                    f"overlaps by {self.iou} (labels found: {labels}); boxes are x1, y1, x2, y2 in the units of its output"
                )
        return _FoundBoxScore(self.boxes, self.labels, self.iou)

    def take(self, samples: Sequence[int]) -> "BoxScore":
        """The boxes of these samples."""
        if isinstance(self.boxes, Tensor):
            return self
        return type(self)([self.boxes[i] for i in samples], [self.labels[i] for i in samples], self.iou)

    def _matched(self, output: Any) -> list[Float[Tensor, "n"]]:
        """For each of a sample's boxes, the score of its detection or 0."""
        detections = _detections(output)
        samples = len(detections)
        boxes = [self.boxes] * samples if isinstance(self.boxes, Tensor) else self.boxes
        labels = [self.labels] * samples if isinstance(self.labels, Tensor) else self.labels
        if len(boxes) != samples:
            raise MulticamError(
                f"boxes for {len(boxes)} samples, but there are {samples}; give (n 4), or one per sample"
            )
        matched = []
        for found, wanted, label in zip(detections, boxes, labels, strict=True):
            overlap = _iou(wanted.to(found["boxes"]), found["boxes"].detach())
            fits = (overlap >= self.iou) & (label.to(found["labels"])[:, None] == found["labels"])
            # A column in front stands for "no detection": the first of equal maxima is taken.
            best = F.pad(overlap * fits, (1, 0)).argmax(1)
            matched.append(F.pad(found["scores"], (1, 0))[best])
        return matched

    def __repr__(self) -> str:
        labels = [self.labels] if isinstance(self.labels, Tensor) else self.labels
        return f"BoxScore(labels {[label.tolist() for label in labels]}, iou={self.iou})"


class _FoundBoxScore(BoxScore):
    """A `BoxScore` whose boxes the model found: in what-ifs it may lose them."""

    def pin(self, output: Any) -> BoxScore:
        return self


@dataclass(frozen=True)
class TopBox:
    """The score of each sample's best detection, from the output of a detector; see `BoxScore`.

    Args:
        label: The label that it must have; None: any.
        iou: How much a detection must overlap it to be the same box when inputs or activations are changed.

    Example:
        >>> boxes, labels = torch.tensor([[0.0, 0, 4, 4], [2, 2, 9, 9]]), torch.tensor([1, 2])
        >>> found = [{"boxes": boxes, "labels": labels, "scores": torch.tensor([0.9, 0.4])}]
        >>> TopBox()(found), TopBox(label=2)(found)
        (tensor([0.9000]), tensor([0.4000]))
    """

    label: int | None = None
    iou: float = 0.5

    def __call__(self, output: Any) -> Float[Tensor, " b"]:
        """The scores `(b,)`."""
        return self.pin(output)(output)

    def pin(self, output: Any) -> BoxScore:
        """The boxes that are best in this output."""
        boxes, labels = [], []
        for sample, found in enumerate(_detections(output)):
            fits = torch.ones_like(found["labels"]).bool() if self.label is None else found["labels"] == self.label
            if not fits.any():
                what = "anything" if self.label is None else f"a box of label {self.label}"
                raise MulticamError(
                    f"in sample {sample} the model does not find {what} (labels found: "
                    f"{sorted(set(found['labels'].tolist()))}); leave the sample out, or lower the model's own threshold"
                )
            best = found["scores"].where(fits, -1).argmax(0, keepdim=True)
            boxes.append(found["boxes"][best])
            labels.append(found["labels"][best])
        return _FoundBoxScore(boxes, labels, self.iou)


def _detections(output: Any) -> list[Mapping[str, Tensor]]:
    keys = {"boxes", "labels", "scores"}
    if isinstance(output, list | tuple) and all(
        isinstance(found, Mapping) and keys <= found.keys() for found in output
    ):
        return list(output)
    given = f"a tensor {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
    raise MulticamError(
        "BoxScore and TopBox need the whole output of a detector, a list with one dict of boxes, labels and scores per "
        f"sample, but it is {given}; leave output= out, or make such a list with output=your function"
    )


def _iou(a: Float[Tensor, "n 4"], b: Float[Tensor, "m 4"]) -> Float[Tensor, "n m"]:
    """Intersection over union of every two boxes."""
    sides = (torch.minimum(a[:, None, 2:], b[:, 2:]) - torch.maximum(a[:, None, :2], b[:, :2])).clamp(min=0)
    area_a, area_b = ((boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (a, b))
    shared = sides.prod(2)
    return shared / (area_a[:, None] + area_b - shared).clamp(min=torch.finfo(a.dtype).tiny)
