"""What in a call has a row or an item for each sample, and follows when the samples are taken in another order and number."""

from collections import deque
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from multicam.call.inputs import Inputs
from multicam.call.samples import is_image
from multicam.errors import MulticamError
from tests.helpers.numbered import numbered

IMAGE = torch.rand(2, 3, 8, 8)
SAMPLES = st.lists(st.integers(0, 2), min_size=1, max_size=6)


@dataclass
class Meta:
    lengths: list[int]
    name: str = "one"


class Model(nn.Module):
    def forward(self, image: Tensor, batch: Any = None, size: Any = None) -> Any:
        return image, batch, size


@settings(deadline=None)
@given(SAMPLES)
def test_what_is_marked_moves_as_a_tensor_does(samples: list[int]) -> None:
    rows = torch.rand(3, 3, 4, 4)
    texts, sizes, flags = ["a", "bc", "d"], np.arange(6).reshape(3, 2), (True, False, False)
    series = [torch.rand(n, 2) for n in (4, 2, 3)]
    call = Inputs(
        rows, {"texts": texts, "sizes": sizes}, deque(flags), Meta([1, 2, 3]), series=series, kernel=(3, 3, 3)
    )
    call = call.rows("texts", "sizes", "2", "3.lengths", "series").constant("kernel")
    found = call.take(samples)
    moved, batch, marks, meta = found.args
    assert torch.equal(moved, rows[samples])
    assert batch["texts"] == [texts[i] for i in samples]
    np.testing.assert_array_equal(batch["sizes"], sizes[samples])
    assert list(marks) == [flags[i] for i in samples]
    assert meta == Meta([1 + i for i in samples])
    assert all(torch.equal(x, series[i]) for x, i in zip(found.kwargs["series"], samples, strict=True))
    assert found.kwargs["kernel"] == (3, 3, 3)
    assert found.batch == len(samples)
    # Whatever now happens to have as many items: nothing more is undecided.
    assert not found.undecided
    again = found.take([0] * 3)
    assert again.args[1]["texts"] == [texts[samples[0]]] * 3
    assert again.kwargs["kernel"] == (3, 3, 3)


@given(st.integers(1, 4))
@settings(deadline=None)
def test_copies_lie_side_by_side(n: int) -> None:
    grown = Inputs(IMAGE, lengths=[12, 9]).rows("lengths").repeat(n)
    assert grown.kwargs["lengths"] == [12] * n + [9] * n


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ([12, 9], ["x"]),
        ((12, 9), ["x"]),
        (["a cat", "a dog"], ["x"]),
        (np.array([12, 9]), ["x"]),
        (np.zeros((2, 5)), ["x"]),
        (deque([1, 2]), ["x"]),
        (range(2), ["x"]),
        ([None, None], ["x"]),
        ([{"boxes": torch.rand(5, 4)}, {"boxes": torch.rand(3, 4)}], ["x"]),
        ([torch.rand(4), torch.rand(7)], ["x"]),
        ([torch.rand(2, 5), torch.rand(2, 5)], ["x"]),
        ({"lengths": [12, 9], "size": (8, 8, 8)}, ["x.lengths"]),
        ([[12, 9], [3, 4], [5, 6]], ["x.0", "x.1", "x.2"]),
        (Meta([12, 9]), ["x.lengths"]),
        (SimpleNamespace(flags=np.array([True, False])), ["x.flags"]),
        ([IMAGE, [12, 9]], ["x.1"]),  # images are inputs, so the list around them is one of inputs
        ([IMAGE, IMAGE], []),
        ((3, 3, 3), []),
        (np.eye(3), []),
        ("ab", []),
        ({"a": 1, "b": 2}, []),
        (torch.rand(2, 5), []),
        (torch.Size([8, 8]), []),
        (None, []),
    ],
    ids=numbered(),
)
def test_what_is_undecided(value: Any, names: list[str]) -> None:
    call = Inputs(image=IMAGE, x=value)
    assert list(call.undecided) == names
    assert not call.only_marked().undecided
    assert not call.constant("x").undecided
    for mark in (call.rows, call.constant):
        assert not mark(*names).undecided
    if names:
        with pytest.raises(
            MulticamError, match=rf"in input '{names[0]}'.*rows\('{names[0]}'\) or Inputs\(…\)\.constant"
        ):
            call.take([1])
    call.take([0, 1])  # the samples as they are


def test_the_refusal_shows_what_is_undecided() -> None:
    with pytest.raises(
        MulticamError, match=r"each of the 2 samples, .* in input 'flags' = \[True, False\] and 'n' = \(3, 4\)"
    ):
        Inputs(IMAGE, flags=[True, False], n=(3, 4)).repeat(2)


class Opaque:
    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths


@pytest.mark.parametrize(
    "value",
    [[1, 2, 3, 4], np.arange(6), ("a",) * 4, Opaque([12, 9]), [[1, 2, 3, 4]] * 3],
    ids=numbered(),
)
def test_what_may_have_several_for_each_or_hide_it_is_refused_too(value: Any) -> None:
    call = Inputs(IMAGE, x=value)
    with pytest.raises(
        MulticamError, match=r"say it with Inputs\(…\)\.constant\('x.*'\), or give a list with one item for each"
    ):
        call.take([0])
    assert call.constant("x").take([0]).kwargs["x"] is not None
    assert Inputs(IMAGE[:1], x=value).undecided.keys() <= {"x.0"}  # one sample has what there is


def test_many_that_are_undecided_are_counted() -> None:
    with pytest.raises(
        MulticamError, match=r"'x\.0' = \[1, 2\] and 'x\.1' = \[1, 2\] and 'x\.2' = \[1, 2\] and 4 more: "
    ):
        Inputs(IMAGE, x=[[1, 2]] * 7).take([0])


def test_tensors_marked_in_a_list_are_inputs_of_their_own() -> None:
    call = Inputs(IMAGE, parts=[torch.rand(2, 5), torch.rand(2, 7)]).rows("parts.0", "parts.1")
    assert not call.undecided
    assert [tuple(x.shape) for x in call.take([1, 1, 0]).kwargs["parts"]] == [(3, 5), (3, 7)]
    assert list(call.batched) == ["0", "parts.0", "parts.1"]


def test_what_one_sample_has_in_a_list_is_no_input() -> None:
    call = Inputs(IMAGE, crops=[torch.rand(1, 3, 4, 4), torch.rand(1, 3, 5, 5)])
    with pytest.raises(MulticamError, match=r"differ in batch size.*which list has one item for each sample"):
        _ = call.batch
    marked = call.rows("crops")
    assert list(marked.images) == list(marked.batched) == ["0"]
    with pytest.raises(MulticamError, match=r"'crops\.0' is one sample's own.*rows\('crops\.0', …\)"):
        marked.replace({"crops.0": torch.rand(2, 3, 4, 4)})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 2, 3], r"rows\('batch'\) says .* it has 3, and there are 2 samples: \[1, 2, 3\]"),
        ("ab", r"it has no items: 'ab'"),
        (None, r"it has no items: None"),
        ({"a": 1}, r"it has no items"),
        (torch.rand(3), r"it has 3, and there are 2 samples"),
    ],
)
def test_a_mark_of_what_has_not_one_item_for_each_is_refused(value: Any, message: str) -> None:
    with pytest.raises(MulticamError, match=message):
        Inputs(IMAGE, value).rows("1").bind(Model())


def test_marks_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(
        MulticamError, match=r"'batch\.0' is marked, and so is 'batch', in which it is one sample's own"
    ):
        Inputs(IMAGE, [1, 2]).rows("1").constant("1.0").bind(Model())
    with pytest.raises(MulticamError, match="no input 'length'"):
        Inputs(IMAGE).rows("length").bind(Model())


def test_marks_by_position_follow_the_names_of_the_signature() -> None:
    bound = Inputs(IMAGE, [12, 9], (8, 8)).rows("1").constant("2").bind(Model())
    assert list(bound.listed) == ["batch"]
    assert bound.take([1]).args[1:] == ([9], (8, 8))


@pytest.mark.parametrize(
    ("inputs", "batch"),
    [
        (Inputs([torch.rand(12, 6), torch.rand(9, 6)], torch.rand(2, 4)), 2),  # a list may be of one sample each
        (Inputs([torch.rand(12, 6), torch.rand(9, 6)]).rows("0"), 2),
        (Inputs([torch.rand(3, 6), torch.rand(3, 6)]), 3),
        (Inputs(IMAGE, [1, 2, 3]), 2),
    ],
)
def test_how_many_samples_there_are(inputs: Inputs, batch: int) -> None:
    assert inputs.batch == batch


def test_samples_are_alike_if_their_items_are() -> None:
    same = IMAGE[:1].expand(2, -1, -1, -1)
    assert Inputs(same, x=[1, 1]).alike()
    assert not Inputs(same, x=[1, 2]).alike()
    assert not Inputs(same, x=[1, 2]).rows("x").alike()
    assert Inputs(same, x=[1, 2]).constant("x").alike()
    assert Inputs(same, x=[1, 2, 3]).alike()
    assert not Inputs(same, x=np.array(["a", "b"])).rows("x").alike()
    assert Inputs(IMAGE, x=["a", "a"]).alike("0")


def test_a_model_writes_into_copies_of_arrays_and_lists() -> None:
    class Writing(nn.Module):
        def forward(self, array: np.ndarray, values: list[int]) -> None:
            array[0] = values[0] = 7

    array, values = np.zeros(2), [0, 0]
    call = Inputs(array, values)
    call.run(Writing())
    assert not array.any()
    assert values == [0, 0]
    kept = call.own()
    array[0] = 5
    assert not kept.args[0].any()


@pytest.mark.parametrize(("leaf", "image"), [(IMAGE, True), (IMAGE[0], False), (IMAGE.long(), False), (None, False)])
def test_what_can_carry_a_map(leaf: Any, image: bool) -> None:
    assert is_image(leaf) is image
