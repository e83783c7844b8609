"""From outputs to scores."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.modeling_outputs import ImageClassifierOutput

from multicam import Binary, Contrast, MulticamError, Probability, Regression, Similarity, TopClass
from multicam.targets import as_target, score, select_output

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
    ids=repr,
)
def test_targets_by_value(target: Any, expected: list[float]) -> None:
    assert score(as_target(target), LOGITS, 2).tolist() == pytest.approx(expected)


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


def test_scores_keep_their_gradient_and_are_at_least_float32() -> None:
    half = LOGITS.half().requires_grad_()
    scores = score(as_target(1), half, 2)
    assert scores.dtype == torch.float32
    scores.sum().backward()
    assert half.grad.tolist() == [[0, 1, 0], [0, 1, 0]]
    assert score(as_target(1), LOGITS.double(), 2).dtype == torch.float64


@pytest.mark.parametrize(
    ("target", "output", "message"),
    [
        (5, LOGITS, "target class 5 does not exist: the output has classes 0 to 2"),
        (-4, LOGITS, "target class -4 does not exist"),
        ([0, 1, 2], LOGITS, "3 target classes for 2 samples"),
        (None, LOGITS[:, 0], r"TopClass\(\) needs an output \(b classes\).*shape \(2,\).*Binary\(\) or Regression\(\)"),
        (3, torch.rand(2, 5, 4, 4), r"out\[:, c\]\.mean"),
        (Binary(), LOGITS, r"needs an output \(b,\) or \(b 1\)"),
        (lambda out: out, LOGITS, r"returned torch.float32 \(2, 3\).*one floating-point score per sample: \(2,\)"),
        (lambda out: out.argmax(1), LOGITS, r"returned torch.int64 \(2,\)"),
        (lambda out: 3.0, LOGITS, "returned float"),
    ],
)
def test_wrong_targets_say_what_would_fit(target: Any, output: torch.Tensor, message: str) -> None:
    with pytest.raises(MulticamError, match=message):
        score(as_target(target), output, 2)


def test_contrast_needs_something_to_contrast_with() -> None:
    with pytest.raises(MulticamError, match=r"as in Contrast\(3, 5\)"):
        Contrast(3)


@pytest.mark.parametrize(
    ("output", "path"),
    [
        (LOGITS, None),
        ((torch.zeros(1), LOGITS), 1),
        ([torch.zeros(1), LOGITS], -1),
        ((torch.zeros(1), [LOGITS]), "1.0"),
        ({"logits": LOGITS, "loss": None}, "logits"),
        ({"heads": {"label": LOGITS}}, "label"),
        ({"features:": LOGITS}, "features:"),
        (ImageClassifierOutput(logits=LOGITS), "logits"),
        (SimpleNamespace(logits=LOGITS), "logits"),
        ((torch.zeros(1), LOGITS), lambda out: out[1]),
    ],
)
def test_outputs_are_selected_by_path(output: Any, path: Any) -> None:
    assert select_output(output, path) is LOGITS


@pytest.mark.parametrize(
    ("output", "path", "message"),
    [
        ((LOGITS, LOGITS), None, r"returns a tuple.*output=….*'0' \(2, 3\), '1' \(2, 3\)"),
        (ImageClassifierOutput(logits=LOGITS), None, r"ImageClassifierOutput.*'logits' \(2, 3\)"),
        ({"logits": LOGITS}, "logit", "no output 'logit'; did you mean 'logits'"),
        ((LOGITS,), 3, "no output '3'"),
        (LOGITS, "logits", "returns one tensor, so output='logits' names nothing"),
    ],
)
def test_outputs_that_cannot_be_selected_list_the_choices(output: Any, path: Any, message: str) -> None:
    with pytest.raises(MulticamError, match=message):
        select_output(output, path)
