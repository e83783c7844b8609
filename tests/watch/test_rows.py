"""Which lists, tuples and arrays have one item for each sample: found by passes, whatever the shapes suggest."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from multicam.call.inputs import Inputs
from multicam.call.targets.scores import ClassScore
from multicam.errors import MulticamError
from multicam.watch.rows import any_reading, settled

WORDS = {"a cat": 1.0, "a dog": 2.0, "no": 3.0}


class Told(nn.Module):
    """Features of an image, and what `read(image, features, x)` makes of them."""

    def __init__(self, read: Callable[[Tensor, Tensor, Any], Any]) -> None:
        super().__init__()
        self.encoder, self.read, self.passes = nn.Conv2d(3, 4, 3, padding=1), read, count()

    def forward(self, image: Tensor, x: Any) -> Any:
        next(self.passes)
        return self.read(image, self.encoder(image).tanh().mean((2, 3)), x)


@dataclass
class Meta:
    lengths: list[int]


def cut(image: Tensor, features: Tensor, lengths: Any) -> Tensor:
    return torch.stack([row[: int(n)].sum() * row for row, n in zip(features, lengths, strict=True)])


def scaled(image: Tensor, features: Tensor, by: Any) -> Tensor:
    return features * torch.as_tensor(np.array([float(x) for x in by]), dtype=features.dtype).view(-1, 1)


def written(image: Tensor, features: Tensor, texts: Any) -> Tensor:
    return scaled(image, features, [WORDS[text] for text in texts])


def flagged(image: Tensor, features: Tensor, flags: Any) -> Tensor:
    features = features.clone()
    for i, flag in enumerate(flags):  # shorter lists do not raise
        features[i] *= 1 if flag else -2
    return features


def pooled(image: Tensor, features: Tensor, size: Any) -> Tensor:
    return F.adaptive_avg_pool2d(image, tuple(size)).flatten(1)[:, :3] * features[:, :3]


def padded(image: Tensor, features: Tensor, padding: Any) -> Tensor:
    return F.conv2d(image, torch.ones(2, 3, 3, 3).to(image), padding=padding).mean((2, 3))


def summed(image: Tensor, features: Tensor, parts: Any) -> Tensor:
    return features + sum(part.sum(1, keepdim=True) * k for k, part in enumerate(parts, 1))


def of_each(image: Tensor, features: Tensor, series: Any) -> Tensor:
    return torch.stack([row * x.sum() for row, x in zip(features, series, strict=True)])


def boxed(image: Tensor, features: Tensor, targets: Any) -> Tensor:
    return of_each(image, features, [target["boxes"] * len(target["labels"]) for target in targets])


def cross(image: Tensor, features: Tensor, prompts: Any) -> Tensor:
    return features @ torch.stack([prompt.mean(0) for prompt in prompts]).T


def ignored(image: Tensor, features: Tensor, x: Any) -> Tensor:
    return features


def packed(image: Tensor, features: Tensor, x: Any) -> Tensor:
    padded_, lengths = torch.nn.utils.rnn.pad_packed_sequence(x, batch_first=True)
    return features * (padded_.sum(1) / lengths[:, None])


def nested(image: Tensor, features: Tensor, batch: Any) -> Tensor:
    return pooled(image, cut(image, features, batch["lengths"]), batch["size"])


def pairs(image: Tensor, features: Tensor, x: Any) -> Tensor:
    lengths, weights = x
    return cut(image, features, lengths) * weights[0]


def of_dataclass(image: Tensor, features: Tensor, meta: Any) -> Tensor:
    return cut(image, features, meta.lengths)


Case = tuple[
    Callable[..., Any], list[Any], dict[str, bool]
]  # what reads it; its values at batch 1, 2, 3; whether each has rows

SERIES = [torch.rand(n, 3) + 1 for n in (2, 4, 3)]
TARGETS = [{"boxes": torch.rand(n, 4), "labels": ["x"] * n} for n in (3, 1, 2)]
CASES: dict[str, Case] = {
    "lengths": (cut, [[2], [3, 1], [1, 3, 2]], {"x": True}),
    "tuple of lengths": (cut, [(2,), (3, 1), (1, 3, 2)], {"x": True}),
    "captions": (written, [["a dog"], ["a cat", "no"], ["no", "a cat", "a dog"]], {"x": True}),
    "flags": (flagged, [[False], [True, False], [False, True, True]], {"x": True}),
    "array": (scaled, [np.array([2]), np.array([2, 3]), np.array([4, 3, 2])], {"x": True}),
    "array of rows": (
        lambda image, features, x: scaled(image, features, x.sum(1)),
        [np.arange(5 * b).reshape(b, 5) for b in (1, 2, 3)],
        {"x": True},
    ),
    "array of flags": (flagged, [np.array([False]), np.array([True, False]), np.array([False, True, True])], {"x": True}),
    "tensors of different sizes": (of_each, [SERIES[:1], SERIES[:2], SERIES], {"x": True}),
    "dicts of each sample": (boxed, [TARGETS[:1], TARGETS[:2], TARGETS], {"x": True}),
    "packed sequence": (packed, [pack_sequence([torch.rand(n + 1, 4) for n in range(b, 0, -1)]) for b in (1, 2, 3)], {"x": True}),
    "ignored": (ignored, [[7], [7, 8], [7, 8, 9]], {"x": True}),
    "dataclass": (of_dataclass, [Meta([2]), Meta([3, 1]), Meta([1, 3, 2])], {"x.lengths": True}),
    "dict": (
        nested,
        [{"lengths": [2], "size": (4, 2)}, {"lengths": [3, 1], "size": (4, 2)}, {"lengths": [1, 3, 2], "size": (4, 2)}],
        {"x.lengths": True, "x.size": False},
    ),
    "size": (pooled, [(4, 2)] * 3, {"x": False}),
    "equal sides": (pooled, [[4, 4]] * 3, {"x": False}),
    "array of a size": (pooled, [np.array([4, 2])] * 3, {"x": False}),
    "padding": (padded, [(1,), (1, 1), (1, 1)], {"x": False}),
    "camera": (
        lambda image, features, x: features[:, :3] @ torch.as_tensor(x, dtype=features.dtype),
        [np.arange(9.0).reshape(3, 3)] * 3,
        {"x": False},
    ),
    "inputs of the batch": (
        summed,
        [[torch.rand(1, 5)], [torch.rand(2, 5), torch.rand(2, 5)], [torch.rand(3, 2), torch.rand(3, 5), torch.rand(3, 4)]],
        {"x": False},
    ),
    "samples of the batch's size": (of_each, [[torch.rand(1, 5)], [torch.rand(2, 5) for _ in range(2)], [torch.rand(3, 5) for _ in range(3)]], {"x": True}),
    "prompts": (cross, [[torch.rand(5, 4)], [torch.rand(5, 4) for _ in range(2)], [torch.rand(3, 4) for _ in range(3)]], {"x": False}),
    "two lists in one": (pairs, [([2], [3.0]), ([3, 1], [2.0, 5.0]), ([1, 3, 2], [2.0, 4.0])], {"x.0": True, "x.1": False}),
}  # fmt: skip


class Opaque:
    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths


def flat(image: Tensor, features: Tensor, pairs: Any) -> Tensor:
    return scaled(image, features, [a * b for a, b in zip(pairs[::2], pairs[1::2], strict=True)])


@pytest.mark.parametrize("value", [[1, 2, 3, 4], np.array([2, 1, 3, 1])], ids=str)
def test_several_for_each_sample_are_the_same_for_all_or_refused(value: Any) -> None:
    call = Inputs(torch.rand(2, 3, 8, 8), value)
    model = Told(lambda image, features, box: features[:, :3] * sum(float(x) for x in box))
    assert not settled(model, call.bind(model)).undecided
    model = Told(flat)
    found = settled(model, call.bind(model))
    with pytest.raises(MulticamError, match=r"in input 'x' = .*or give a list with one item for each sample by itself"):
        found.take([1])


def test_an_object_that_hides_a_list_is_the_same_for_all_or_refused() -> None:
    call = Inputs(torch.rand(2, 3, 8, 8), Opaque([3, 1]))
    model = Told(lambda image, features, x: features * x.lengths[0])
    assert not settled(model, call.bind(model)).undecided
    model = Told(lambda image, features, x: cut(image, features, x.lengths))
    assert list(settled(model, call.bind(model)).undecided) == ["x"]


def test_very_many_lists_are_settled_at_once() -> None:
    call = Inputs(torch.rand(2, 3, 8, 8), [[1.0, 2.0, 3.0, 4.0] for _ in range(99)])
    model = Told(lambda image, features, x: features * len(x))
    assert not settled(model, call.bind(model)).undecided
    assert next(model.passes) == 4 + 2  # the counter is a state that is not put back, which takes two passes to doubt


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    return


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("kind", CASES)
def test_rows_and_constants_are_found(kind: str, batch: int) -> None:
    read, values, rows = CASES[kind]
    model = Told(read).double().eval()
    call = Inputs(torch.rand(batch, 3, 8, 8).double(), values[batch - 1])
    call = call.map(lambda _, x: x.double() if isinstance(x, Tensor) else x).bind(model)
    output = model(*call.args).detach()
    found = settled(model, call)
    assert not found.undecided
    for name, wanted in rows.items():
        # Where one item is read as any number of them would be, both are true.
        if batch > 1 and (name in call.undecided or any(path.startswith(name) for path in call.undecided)):
            assert (name in found.listed) is wanted, name
    for samples in ([batch - 1], [0] * 4, [*range(batch)][::-1], [0, *range(batch), 0, batch - 1]):
        again = found.take(samples).run(model)
        torch.testing.assert_close(again, output[samples])


def test_no_pass_is_made_where_nothing_is_undecided() -> None:
    model = Told(ignored)
    for call in (
        Inputs(torch.rand(2, 3, 8, 8), torch.rand(2, 5)),
        Inputs(torch.rand(2, 3, 8, 8), (1, 2, 3)),
        Inputs(torch.rand(2, 3, 8, 8), [1, 2]).rows("1"),
        Inputs(torch.rand(2, 3, 8, 8), [1, 2]).constant("1"),
        Inputs(torch.rand(2, 3, 8, 8), [torch.rand(2, 3, 8, 8)] * 2),
    ):
        bound = call.bind(model)
        assert settled(model, bound) is bound
    assert next(model.passes) == 0


def test_likely_readings_take_few_passes() -> None:
    model = Told(cut)
    settled(model, Inputs(torch.rand(2, 3, 8, 8), [3, 1]).bind(model))
    assert next(model.passes) == 1 + 3 + 2  # the last for its counter, a state that is not put back


@pytest.mark.parametrize("batch", [2, 3])
@pytest.mark.parametrize(
    "company",
    [lambda x: x - x.mean(0), lambda x: x / x.abs().amax(0), lambda x: x - x[:1], lambda x: x / x.std(0, correction=0)],
    ids=["mean", "maximum", "first", "deviation"],
)
@pytest.mark.parametrize("lengths", [[1, 3, 2], [2, 2, 2]], ids=str)
def test_scores_that_depend_on_company_do_not_hide_rows(
    batch: int, company: Callable[[Tensor], Tensor], lengths: list[int]
) -> None:
    model = Told(lambda image, features, x: company(cut(image, features, x))).double()
    call = Inputs(torch.rand(batch, 3, 8, 8).double(), lengths[:batch]).bind(model)
    assert list(settled(model, call).listed) == ["x"]


def test_a_model_of_a_fixed_number_of_rows_tells_by_their_order() -> None:
    def three(image: Tensor, features: Tensor, x: Any) -> Tensor:
        return cut(image, features.view(3, 4), x)

    model = Told(three)
    assert list(settled(model, Inputs(torch.rand(3, 3, 8, 8), [1, 3, 2]).bind(model)).listed) == ["x"]
    assert list(settled(model, Inputs(torch.rand(3, 3, 8, 8), [2, 2, 2]).bind(model)).listed) == ["x"]


def test_a_model_of_two_rows_or_more_tells() -> None:
    def several(image: Tensor, features: Tensor, x: Any) -> Tensor:
        if len(features) < 2:
            raise ValueError("expected more than one row")
        return cut(image, features, x)

    model = Told(several)
    assert list(settled(model, Inputs(torch.rand(2, 3, 8, 8), [2, 2]).bind(model)).listed) == ["x"]


def test_one_sample_that_cannot_be_run_twice_needs_no_reading() -> None:
    def bag(image: Tensor, features: Tensor, x: Any) -> Tensor:
        return cut(image, features.view(1, 4), x)

    model = Told(bag)
    found = settled(model, Inputs(torch.rand(1, 3, 8, 8), [2]).bind(model))
    assert list(found.listed) == ["x"]


def test_a_model_that_does_not_run_the_samples_together_is_told_by_marks() -> None:
    def single(image: Tensor, features: Tensor, x: Any) -> Tensor:
        return cut(image, features.view(1, 4), x)

    model = Told(single)
    call = Inputs(torch.rand(2, 3, 8, 8), [2, 3]).bind(model)
    with pytest.raises(
        MulticamError, match=r"Told does not run these samples together \(shape .*of 'x' with .*rows\('x'\)"
    ):
        settled(model, call)
    assert settled(model, call.rows("x")).take([1]).args[1] == [3]


def test_the_target_tells_where_outputs_do_not_compare() -> None:
    def table(image: Tensor, features: Tensor, x: Any) -> Tensor:
        rows = cut(image, features, x)
        return torch.stack([rows, rows], 1).flatten()  # no row for each sample

    model = Told(table).double()
    call = Inputs(torch.rand(2, 3, 8, 8).double(), [3, 1]).bind(model)
    assert settled(model, call).undecided
    found = settled(model, call, target=lambda output: output.view(-1, 2, 4)[:, 1, 2])
    assert list(found.listed) == ["x"]


@pytest.mark.parametrize("kind", [list, tuple])
def test_detections_are_compared_sample_by_sample(kind: Any) -> None:
    def detect(image: Tensor, features: Tensor, x: Any) -> Any:
        return kind({"boxes": row[: int(n)], "n": n} for row, n in zip(features, x, strict=False))

    model = Told(detect)
    found = settled(model, Inputs(torch.rand(3, 3, 8, 8), [1, 3, 2]).bind(model))
    assert list(found.listed) == ["x"]


def test_a_part_of_the_output_is_chosen() -> None:
    def several(image: Tensor, features: Tensor, x: Any) -> Any:
        return {"logits": cut(image, features, x), "loss": features.sum(), "company": features / features.sum()}

    model = Told(several)
    call = Inputs(torch.rand(2, 3, 8, 8), [3, 1]).bind(model)
    assert list(settled(model, call, "logits", ClassScore(1)).listed) == ["x"]
    assert list(settled(model, call, None, lambda output: output["logits"][:, 1]).listed) == ["x"]


def test_what_no_reading_explains_stays_undecided_and_is_refused() -> None:
    def strange(image: Tensor, features: Tensor, x: Any) -> Tensor:
        return features * len(x) * torch.arange(1, len(features) + 1)[:, None] + x[0]  # another score at every place

    model = Told(strange)
    call = Inputs(torch.rand(2, 3, 8, 8), [3, 1]).bind(model)
    found = settled(model, call, target=ClassScore(0))
    assert list(found.undecided) == ["x"]
    with pytest.raises(MulticamError, match=r"in input 'x' = \[3, 1\]: say it with .*rows\('x'\) or .*constant\('x'\)"):
        found.take([1])


def test_out_of_memory_is_not_taken_for_a_false_reading() -> None:
    def huge(image: Tensor, features: Tensor, x: Any) -> Tensor:
        if len(features) != 2:
            raise torch.OutOfMemoryError("out of memory")
        return features

    model = Told(huge)
    with pytest.raises(torch.OutOfMemoryError):
        settled(model, Inputs(torch.rand(2, 3, 8, 8), [3, 1]).bind(model))


def test_many_lists_are_settled_together() -> None:
    def many(image: Tensor, features: Tensor, x: Any) -> Tensor:
        *lists, size = x
        for values in lists:
            features = scaled(image, features, values)
        return pooled(image, features, size)

    model = Told(many).double()
    lists = [[i + 1.0, i + 2.5] for i in range(6)]
    call = Inputs(torch.rand(2, 3, 8, 8).double(), [*lists, (4, 2)]).bind(model)
    assert len(call.undecided) == 7
    assert list(settled(model, call).listed) == [f"x.{i}" for i in range(6)]


class Contrasting(nn.Module):
    """Compares every row with the first, and pools to a size that is the same for all."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        pooled = F.adaptive_avg_pool2d(x, (size[0], size[1])).flatten(1)
        return pooled * (pooled @ pooled.mT)[:, :1]


@pytest.mark.parametrize("size", [(2, 2), (2, 3), (3, 1)])
def test_a_size_is_no_list_of_samples_where_rows_are_compared(size: tuple[int, int]) -> None:
    model, x = Contrasting().eval(), torch.rand(2, 1, 6, 6)
    call = settled(model, Inputs(x, size).bind(model))
    assert call.take([1]).args[1] == size


def test_filling_that_is_no_number_compares_as_what_it_is() -> None:
    def filled(image: Tensor, features: Tensor, lengths: Any) -> Tensor:
        absent = torch.arange(4) >= torch.tensor([int(n) for n in lengths])[:, None]
        return features.masked_fill(absent, torch.nan)

    model = Told(filled)
    assert list(settled(model, Inputs(torch.rand(2, 3, 8, 8), [3, 1]).bind(model)).listed) == ["x"]


def test_of_one_sample_alone_all_readings_are_the_same() -> None:
    call = Inputs(torch.rand(1, 2), [3], (True,))
    assert call.undecided and not any_reading(call).undecided
    assert any_reading(call).take([0]).args[1:] == ([3], (True,))
    several = Inputs(torch.rand(2, 2), [3, 4])
    assert any_reading(several).undecided
