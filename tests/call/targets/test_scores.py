"""From outputs to scores."""

from typing import Any

import pytest
import torch
from transformers.modeling_outputs import ImageClassifierOutput

from multicam import MulticamError
from multicam.call.scorer import Scorer
from multicam.call.targets import Binary, Contrast, Probability, Regression, Similarity, TopClass
from multicam.call.targets.scores import QueryScore, SegmentationScore

LOGITS = torch.tensor([[1.0, 4.0, 2.0], [3.0, 0.5, 2.5]])


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (None, [4.0, 3.0]),
        (2, [2.0, 2.5]),
        (-1, [2.0, 2.5]),
        ([0, 2], [1.0, 2.5]),
        (torch.tensor([0, 2]), [1.0, 2.5]),
        (torch.tensor(1), [4.0, 0.5]),
        (TopClass(), [4.0, 3.0]),
        (Contrast(1, 0, 2), [2.5, -2.25]),
        (Regression(1), [4.0, 0.5]),
        (Probability(1), LOGITS.softmax(1)[:, 1].tolist()),
        (lambda out: out.sum(1), [7.0, 6.0]),
    ],
)
def test_targets_by_value(target: Any, expected: list[float]) -> None:
    assert Scorer(target).of_picked(LOGITS, 2).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("output", [torch.tensor([1.0, -2.0]), torch.tensor([[1.0], [-2.0]])], ids=["(b,)", "(b 1)"])
def test_single_outputs(output: torch.Tensor) -> None:
    assert Binary()(output).tolist() == [1.0, -2.0]
    assert Binary(False)(output).tolist() == [-1.0, 2.0]
    assert Regression()(output).tolist() == [1.0, -2.0]


def test_similarity_is_the_cosine() -> None:
    vectors, wanted = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([1.0, 0.0])
    assert Similarity(wanted)(vectors).tolist() == pytest.approx([0.6, 0.0])
    assert Similarity(vectors * 5)(vectors).tolist() == pytest.approx([1.0, 1.0])
    with pytest.raises(MulticamError, match=r"shape \(3,\), the output \(2, 2\)"):
        Similarity(torch.ones(3))(vectors)


@pytest.mark.parametrize(
    ("target", "output", "message"),
    [
        (5, LOGITS, "target class 5 does not exist: the output has classes 0 to 2"),
        (-4, LOGITS, "target class -4 does not exist"),
        ([0, 1, 2], LOGITS, "3 target classes for 2 samples"),
        (None, LOGITS[:, 0], r"TopClass\(\) needs an output \(b classes\).*shape \(2,\).*Binary\(\) or Regression\(\)"),
        (3, torch.rand(2, 5, 4, 4), r"SegmentationScore\(class\) for \(b classes h w\), QueryScore\(class\)"),
        (None, (LOGITS, LOGITS), r"returns a tuple.*output=….*'0' \(2, 3\), '1' \(2, 3\)"),
        (1, ImageClassifierOutput(logits=LOGITS), r"ImageClassifierOutput.*'logits' \(2, 3\)"),
        (Binary(), {"logits": LOGITS}, r"returns a dict.*'logits' \(2, 3\)"),
        (Binary(), LOGITS, r"needs an output \(b,\) or \(b 1\)"),
        (lambda out: out, LOGITS, r"returned torch.float32 \(2, 3\).*one floating-point score per sample: \(2,\)"),
        (lambda out: out.argmax(1), LOGITS, r"returned torch.int64 \(2,\)"),
        (lambda out: 3.0, LOGITS, "returned float"),
    ],
)
def test_wrong_targets_say_what_would_fit(target: Any, output: torch.Tensor, message: str) -> None:
    with pytest.raises(MulticamError, match=message):
        Scorer(target).of_picked(output, 2)


def test_contrast_needs_something_to_contrast_with() -> None:
    with pytest.raises(MulticamError, match=r"as in Contrast\(3, 5\)"):
        Contrast(3)


# Segmentation.

DENSE = torch.tensor(
    [[[[1.0, 4.0], [0.0, 2.0]], [[3.0, 5.0], [1.0, 1.0]]], [[[2.0, 2.0], [0.0, 0.0]], [[1.0, 3.0], [4.0, 5.0]]]]
)
CORNER = torch.tensor([[False, True], [False, True]])


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        pytest.param(SegmentationScore(1), [3.0, 4.0], id="what the model calls so"),
        pytest.param(SegmentationScore(-1), [3.0, 4.0], id="counted from the end"),
        pytest.param(SegmentationScore([0, 1]), [2.0, 4.0], id="a class for each sample"),
        pytest.param(SegmentationScore(0, CORNER), [3.0, 1.0], id="one region"),
        pytest.param(SegmentationScore(0, CORNER.numpy()), [3.0, 1.0], id="an array"),
        pytest.param(SegmentationScore(0, torch.stack([CORNER, ~CORNER])), [3.0, 1.0], id="a region for each sample"),
        pytest.param(SegmentationScore(0, 3 * CORNER + (~CORNER).int()), [19 / 8, 1.0], id="weights"),
    ],
)
def test_segmentation_scores_by_value(target: Any, expected: list[float]) -> None:
    assert Scorer(target).of_picked(DENSE, 2).tolist() == expected
    assert Scorer(target).pinned(DENSE).of_picked(DENSE, 2).tolist() == expected
    turned = Scorer(target).pinned(DENSE).take([1, 0, 1]).target
    assert Scorer(turned).of_picked(DENSE[[1, 0, 1]], 3).tolist() == [expected[1], expected[0], expected[1]]
    assert (
        Scorer(turned).pinned(DENSE[[1, 0, 1]]).target(DENSE[[1, 0, 1]]).tolist() == turned(DENSE[[1, 0, 1]]).tolist()
    )


def test_a_pinned_segmentation_keeps_its_region() -> None:
    fixed = Scorer(SegmentationScore(1)).pinned(DENSE).target
    assert fixed.mask.tolist() == [[[True, True], [True, False]], [[False, True], [True, True]]]
    assert fixed(-DENSE).tolist() == [-3.0, -4.0]


def test_a_segmentation_of_one_class_or_of_a_volume() -> None:
    assert SegmentationScore(0)(torch.tensor([[[[-1.0, 2.0], [4.0, -3.0]]]])).tolist() == [3.0]
    assert Scorer(SegmentationScore(0)).of_picked(torch.ones(1, 1, 300, 300).half(), 1).tolist() == [1.0]
    volume = torch.arange(16.0).view(1, 2, 2, 2, 2)
    assert SegmentationScore(0, torch.ones(2, 2, 2))(volume).tolist() == [3.5]


def test_queries_by_value() -> None:
    output = torch.tensor([[[1.0, 4.0], [3.0, 2.0]], [[0.0, 1.0], [2.0, 6.0]]])
    assert QueryScore(1)(output).tolist() == [4.0, 6.0]
    assert QueryScore([0, 1], query=[1, 0])(output).tolist() == [3.0, 1.0]
    assert QueryScore(0, query=-1)(output).tolist() == [3.0, 2.0]
    fixed = Scorer(QueryScore(1)).pinned(output).target
    assert fixed == QueryScore(1, [0, 1])
    assert Scorer(fixed).take([1, 1, 0]).target(-output[[1, 1, 0]]).tolist() == [-6.0, -6.0, -4.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SegmentationScore(2)(DENSE), "target class 2 does not exist: the output has classes 0 to 1"),
        (lambda: SegmentationScore(0)(LOGITS), r"needs an output \(b classes \*grid\), but.*\(2, 3\)"),
        (
            lambda: SegmentationScore(0, torch.ones(3, 3))(DENSE),
            r"the mask is \(3, 3\).*grid \(2, 2\) for 2 samples; resize",
        ),
        (lambda: SegmentationScore(0, torch.ones(3, 2, 2))(DENSE), r"the mask is \(3, 2, 2\)"),
        (lambda: SegmentationScore(0, CORNER & False)(DENSE), "no region.*class 0 in sample 0: it has no cell"),
        (lambda: SegmentationScore(0, CORNER.float() - 0.5)(DENSE), "negative weights"),
        (
            lambda: SegmentationScore(0)(DENSE * torch.tensor([0.0, 1.0]).view(1, 2, 1, 1)),
            "calls nothing this class",
        ),
        (
            lambda: SegmentationScore(0)(DENSE * torch.nan),
            "class 0 in sample 0: the model's output is NaN; look for NaN",
        ),
        (lambda: SegmentationScore(0)({"out": DENSE}), r"returns a dict.*'out' \(2, 2, 2, 2\)"),
        (lambda: QueryScore(0)(DENSE), r"needs an output \(b queries classes\), but it is \(2, 2, 2, 2\)"),
        (lambda: QueryScore(0, query=5)(DENSE[0]), "target query 5 does not exist: the output has queries 0 to 1"),
        (lambda: QueryScore(0, query=[1, 1, 1])(DENSE[0]), "3 target queries for 2 samples"),
    ],
)
def test_dense_targets_that_do_not_fit_say_what_would(make: Any, message: str) -> None:
    with pytest.raises(MulticamError, match=message):
        make()


def test_one_mask_for_all_samples_stays_one_whichever_are_taken() -> None:
    mask, output = torch.zeros(2, 3), torch.rand(4, 2, 2, 3)
    mask[0, 1] = mask[1, 2] = 1
    shared, own = SegmentationScore(1, mask), SegmentationScore(1, mask.expand(4, 2, 3))
    for samples in ([2, 0], [1, 1, 1], [3], [0, 1]):
        expected = own(output)[samples]
        torch.testing.assert_close(shared.take(samples)(output[samples]), expected)
        torch.testing.assert_close(own.take(samples)(output[samples]), expected)
        torch.testing.assert_close(shared.pin(output).take(samples)(output[samples]), expected)
        torch.testing.assert_close(
            own.take([3, 2, 1, 0]).take(samples)(output.flip(0)[samples]), own(output.flip(0))[samples]
        )
