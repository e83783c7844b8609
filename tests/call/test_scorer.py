"""From what a model returns to one score for each sample: the part that is seen, and the target as one object."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.modeling_outputs import ImageClassifierOutput

from multicam import MulticamError
from multicam.call.scorer import Scorer, as_target, select_output, turned
from multicam.call.targets.scores import ClassScore, TopClass

LOGITS = torch.tensor([[1.0, 4.0, 2.0], [3.0, 0.5, 2.5]])


@pytest.mark.parametrize(("given", "target"), [(None, TopClass()), (2, ClassScore(2)), ([0, 2], ClassScore([0, 2]))])
def test_none_and_numbers_mean_classes(given: Any, target: Any) -> None:
    assert as_target(given) == target
    assert as_target(target) is target


def test_a_class_is_no_target_until_it_is_made() -> None:
    with pytest.raises(MulticamError, match=r"a target is made before it is used: TopClass\(…\)"):
        as_target(TopClass)


def test_a_scorer_picks_then_scores() -> None:
    scorer = Scorer(1, "logits")
    assert scorer.of({"loss": torch.zeros(()), "logits": LOGITS}, 2).tolist() == [4.0, 0.5]
    assert repr(scorer) == "Scorer(ClassScore(index=1), 'logits')"


def test_samples_are_turned_in_every_head_also_where_there_are_as_many_heads_as_samples() -> None:
    heads, found = [LOGITS, -LOGITS], [{"boxes": LOGITS}, {"boxes": -LOGITS}]
    assert all(torch.equal(a, b) for a, b in zip(turned(heads, 2), [LOGITS.flip(0), -LOGITS.flip(0)], strict=True))
    assert turned(found, 2) == found[::-1]


def test_what_a_target_chose_stays_chosen_and_follows_its_sample() -> None:
    chosen = Scorer(None, 0).pinned(LOGITS)
    assert chosen.of((-LOGITS,), 2).tolist() == [-4.0, -3.0]
    assert chosen.read((-LOGITS[[1, 0, 1]],), [1, 0, 1]).tolist() == [-3.0, -4.0, -3.0]


def test_a_function_chooses_nothing_and_serves_any_samples() -> None:
    scorer = Scorer(lambda out: out.sum(1), 0)
    assert scorer.pinned(LOGITS) is scorer
    assert scorer.take([1, 1]) is scorer
    assert scorer.read((LOGITS[[1, 1, 0]],), [1, 1, 0]).tolist() == [6.0, 6.0, 7.0]


def test_scores_keep_their_gradient_and_are_at_least_float32() -> None:
    half = LOGITS.half().requires_grad_()
    scores = Scorer(1).of_picked(half, 2)
    assert scores.dtype == torch.float32
    scores.sum().backward()
    assert half.grad.tolist() == [[0, 1, 0], [0, 1, 0]]
    assert Scorer(1).of_picked(LOGITS.double(), 2).dtype == torch.float64


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
        ({"logits": LOGITS}, "logit", "no output 'logit'; did you mean 'logits'"),
        ((LOGITS,), 3, "no output '3'"),
        (LOGITS, "logits", "returns one tensor, so output='logits' names nothing"),
    ],
)
def test_outputs_that_cannot_be_selected_list_the_choices(output: Any, path: Any, message: str) -> None:
    with pytest.raises(MulticamError, match=message):
        select_output(output, path)


def test_without_a_path_the_target_sees_the_whole_output() -> None:
    output = {"heads": [LOGITS, -LOGITS]}
    assert select_output(output, None) is output
    assert Scorer(lambda out: (out["heads"][0] + 2 * out["heads"][1])[:, 0]).of_picked(output, 2).tolist() == [
        -1.0,
        -3.0,
    ]
    with pytest.raises(TypeError) as raised:
        Scorer(lambda out: out[:, 0]).of_picked(output, 2)
    assert raised.value.__notes__ == [
        "the model returns a dict, so say what to explain with output=…, one of: 'heads.0' (2, 3), 'heads.1' (2, 3)"
    ]


def test_samples_are_turned_wherever_there_is_one_of_each() -> None:
    detections = [{"boxes": LOGITS, "labels": [1]}, {"boxes": -LOGITS, "labels": [2]}]
    first, second = turned(detections, 2)
    assert [first["labels"], second["labels"]] == [[2], [1]]
    assert torch.equal(first["boxes"], -LOGITS)
    heads = turned([LOGITS, LOGITS.T, torch.tensor(5.0)], 2)
    assert torch.equal(heads[0], LOGITS[[1, 0]])
    assert torch.equal(heads[1], LOGITS.T)
    assert heads[2].item() == 5
    nested = turned({"maps": (LOGITS, "text"), "scale": 3}, 2)
    assert torch.equal(nested["maps"][0], LOGITS[[1, 0]])
    assert (nested["maps"][1], nested["scale"]) == ("text", 3)
