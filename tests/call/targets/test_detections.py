"""Detections as targets: one box, followed, and the surest."""

from typing import Any

import pytest
import torch

from multicam import MulticamError
from multicam.call.scorer import Scorer
from multicam.call.targets.detections import BoxScore, TopBox


def found(*detections: tuple[list[float], int, float]) -> dict[str, torch.Tensor]:
    boxes, labels, scores = ([each[i] for each in detections] for i in range(3))
    return {
        "boxes": torch.tensor(boxes).view(-1, 4),
        "labels": torch.tensor(labels).int(),
        "scores": torch.tensor(scores),
    }


BOX = [0.0, 0.0, 4.0, 4.0]
DETECTIONS = [
    found(
        (BOX, 2, 0.9), ([0.0, 0.0, 4.0, 3.0], 1, 0.5), ([0.0, 0.0, 4.0, 2.5], 1, 0.7), ([6.0, 6.0, 8.0, 8.0], 2, 0.2)
    ),
    found((BOX, 1, 0.3)),
]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        pytest.param(BoxScore(torch.tensor([BOX]), [1]), [0.5, 0.3], id="the nearest of its label, not the highest"),
        pytest.param(BoxScore(torch.tensor([BOX]), [1], iou=0.8), [0.0, 0.3], id="not near enough"),
        pytest.param(BoxScore(torch.tensor([BOX, BOX]), [1, 2]), [1.4, 0.3], id="the sum over boxes"),
        pytest.param(
            BoxScore([torch.tensor([[6.0, 6, 8, 8]]), torch.tensor([BOX])], [[2], [1]]), [0.2, 0.3], id="own boxes"
        ),
        pytest.param(TopBox(), [0.9, 0.3], id="top"),
        pytest.param(TopBox(label=1), [0.7, 0.3], id="top of a label"),
    ],
)
def test_box_scores_by_value(target: Any, expected: list[float]) -> None:
    assert Scorer(target).of_picked(DETECTIONS, 2).tolist() == pytest.approx(expected)


def test_pinned_boxes_may_vanish_and_others_are_refused() -> None:
    fixed = Scorer(BoxScore(torch.tensor([BOX]), [1])).pinned(DETECTIONS).target
    nothing = [found(), found((BOX, 2, 0.9))]
    assert Scorer(fixed).pinned(nothing).target(nothing).tolist() == [0.0, 0.0]
    with pytest.raises(MulticamError, match=r"in sample 0 the model finds none.*labels found: \[\]"):
        Scorer(BoxScore(torch.tensor([BOX]), [1])).pinned(nothing)
    top = Scorer(TopBox()).pinned(DETECTIONS).target
    assert Scorer(top).take([1, 0, 0]).target([DETECTIONS[i] for i in (1, 0, 0)]).tolist() == pytest.approx(
        [0.3, 0.9, 0.9]
    )
    shared = Scorer(BoxScore(torch.tensor([BOX]), [1])).pinned(DETECTIONS).target
    assert Scorer(shared).take([1, 1, 0]).target([DETECTIONS[i] for i in (1, 1, 0)]).tolist() == pytest.approx(
        [0.3, 0.3, 0.5]
    )
    with pytest.raises(MulticamError, match="in sample 0 the model does not find anything"):
        Scorer(TopBox()).pinned(nothing)


def test_box_scores_carry_the_gradient_of_the_scores() -> None:
    scores = torch.tensor([0.2, 0.8], requires_grad=True)
    boxes = torch.tensor([BOX, [9.0, 9.0, 11.0, 11.0]], requires_grad=True)
    output = [{"boxes": boxes, "labels": torch.tensor([1, 1]), "scores": scores}]
    gradients = torch.autograd.grad(
        BoxScore(torch.tensor([BOX]), [1])(output).sum(), [scores, boxes], allow_unused=True
    )
    assert gradients[0].tolist() == [1, 0]
    assert gradients[1] is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BoxScore(torch.ones(4), [1]), r"takes boxes \(n 4\), labels \(n\).*not \(4,\) and \(1,\)"),
        (lambda: BoxScore(torch.ones(2, 4), [1]), r"not \(2, 4\) and \(1,\)"),
        (lambda: BoxScore(torch.ones(1, 4), [1], iou=0.0), "not iou=0.0"),
        (lambda: BoxScore([torch.ones(1, 4)], [[1], [2]]), "boxes for 1 samples, but labels for 2"),
        (lambda: BoxScore([torch.ones(1, 4)], [[1]])(DETECTIONS), "boxes for 1 samples, but there are 2"),
        (lambda: TopBox()(torch.zeros(2, 3)), r"need the whole output of a detector.*a tensor \(2, 3\)"),
        (lambda: TopBox()([torch.zeros(2, 3)]), "need the whole output of a detector.*a list"),
        (lambda: TopBox()([{"boxes": torch.ones(1, 4), "labels": torch.ones(1)}]), "need the whole output.*a list"),
    ],
)
def test_dense_targets_that_do_not_fit_say_what_would(make: Any, message: str) -> None:
    with pytest.raises(MulticamError, match=message):
        make()
