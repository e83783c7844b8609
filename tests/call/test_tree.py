"""Containers of every kind: named, and built anew with the same types."""

import copy
from collections import OrderedDict, UserDict, defaultdict, deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers.feature_extraction_utils import BatchFeature
from transformers.modeling_outputs import BaseModelOutput
from transformers.tokenization_utils_base import BatchEncoding

from multicam.call.tree import leaves, nodes, rebuild, resolve
from multicam.errors import MulticamError


class Pair(NamedTuple):
    image: Any
    mask: Any


class Batch(dict):
    note = "kept"


class Clips(list):
    pass


@dataclass(frozen=True)
class Sample:
    image: Tensor
    label: int = 3
    more: list[Tensor] = field(default_factory=list)


@dataclass(slots=True)
class Slotted:
    image: Tensor
    label: int = 3


class NestedTensor:
    """As DETR writes it."""

    def __init__(self, tensors: Tensor, mask: Tensor) -> None:
        self.tensors, self.mask = tensors, mask


A, B = torch.rand(2, 3), torch.arange(2)
CONTAINERS = {
    "list": ([A, B], ["0", "1"]),
    "tuple": ((A, B), ["0", "1"]),
    "list subclass": (Clips([A, B]), ["0", "1"]),
    "named tuple": (Pair(A, B), ["image", "mask"]),
    "deque": (deque([A, B]), ["0", "1"]),
    "structseq": (torch.max(A, dim=1), ["0", "1"]),
    "dict": ({"x": A, "y": B}, ["x", "y"]),
    "int keys": ({0: A, 1: B}, ["0", "1"]),
    "ordered dict": (OrderedDict(y=A, x=B), ["y", "x"]),
    "default dict": (defaultdict(list, x=A, y=B), ["x", "y"]),
    "dict subclass": (Batch(x=A, y=B), ["x", "y"]),
    "user dict": (UserDict(x=A, y=B), ["x", "y"]),
    "batch encoding": (BatchEncoding({"x": A, "y": B}), ["x", "y"]),
    "batch feature": (BatchFeature({"x": A, "y": B}), ["x", "y"]),
    "model output": (BaseModelOutput(last_hidden_state=A, hidden_states=(B,)), ["last_hidden_state", "hidden_states.0"]),
    "frozen dataclass": (Sample(A, more=[B]), ["image", "label", "more.0"]),
    "slots": (Slotted(A), ["image", "label"]),
    "namespace": (SimpleNamespace(image=A, mask=B), ["image", "mask"]),
    "nested tensor": (NestedTensor(A, B), ["tensors", "mask"]),
    "nested": ({"views": [Pair(A, None), Pair(B, 1)], "n": "two"},
               ["views.0.image", "views.0.mask", "views.1.image", "views.1.mask", "n"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONTAINERS)
def test_containers_are_named_and_rebuilt_with_their_types(kind: str) -> None:
    value, names = CONTAINERS[kind]
    assert list(leaves(value)) == names
    before = {path: id(leaf) for path, leaf in leaves(value).items()}
    fresh = rebuild(value, lambda path, leaf: leaf + 1 if isinstance(leaf, Tensor) else leaf)
    assert type(fresh) is type(value)
    assert fresh is not value
    for path, leaf in leaves(value).items():
        assert id(leaf) == before[path]
        expected = leaf + 1 if isinstance(leaf, Tensor) else leaf
        assert torch.equal(leaves(fresh)[path], expected) if isinstance(leaf, Tensor) else leaves(fresh)[path] == leaf


def test_attributes_of_container_subclasses_survive() -> None:
    batch = Batch(x=A)
    batch.note = "changed"
    assert rebuild(batch, lambda _, leaf: leaf).note == "changed"
    features = defaultdict(list, x=A)
    assert rebuild(features, lambda _, leaf: leaf)["missing"] == []
    output = rebuild(BaseModelOutput(last_hidden_state=A), lambda _, leaf: leaf * 0)
    assert not output.last_hidden_state.any()
    assert not output["last_hidden_state"].any()


@pytest.mark.parametrize(
    "leaf",
    [
        None, 3, "text", b"raw", torch.Size([1, 2]), A, nn.Linear(1, 1), len, range(3), SimpleNamespace(n=3),
        torch.nn.utils.rnn.pack_sequence([A]), copy,
    ],
    ids=lambda leaf: type(leaf).__name__,
)  # fmt: skip
def test_what_holds_no_tensor_is_one_leaf_and_stays_itself(leaf: Any) -> None:
    assert leaves({"x": leaf}) == {"x": leaf}
    assert rebuild([leaf], lambda _, value: value)[0] is leaf


def test_an_object_that_holds_itself_ends() -> None:
    knot = SimpleNamespace(image=A)
    knot.me = knot
    assert list(leaves(knot)) == ["image", "me"]


def test_two_leaves_of_one_name_are_refused() -> None:
    with pytest.raises(MulticamError, match=r"two leaves are both called 'a\.b'"):
        leaves({"a": {"b": 1}, "a.b": 2})


def test_a_short_tail_is_enough_where_it_is_clear() -> None:
    names = ["batch.image", "other.image", "batch.depth"]
    assert resolve("input", "depth", names) == "batch.depth"
    with pytest.raises(MulticamError, match=r"ambiguous: it could be 'batch\.image', 'other\.image'"):
        resolve("input", "image", names)
    with pytest.raises(MulticamError, match=r"no input 'batch\.dpth'; did you mean 'batch\.depth'"):
        resolve("input", "batch.dpth", names)


@dataclass
class Meta:
    lengths: Any


@pytest.mark.parametrize("value", [[3, 5], (3, 5), [A], [Meta([3, 5])]], ids=["list", "tuple", "tensors", "objects"])
@pytest.mark.parametrize("kind", [Meta, lambda x: SimpleNamespace(lengths=x)], ids=["dataclass", "namespace"])
def test_what_only_carries_lists_is_a_container(kind: Any, value: Any) -> None:
    record = kind(value)
    assert all(name.startswith("lengths.") for name in leaves(record))
    fresh = rebuild(record, lambda _, leaf: leaf)
    assert fresh is not record
    assert fresh.lengths is not record.lengths
    assert leaves(Meta(3)).keys() == {""}


def test_all_that_is_inside_has_a_path() -> None:
    value = {"x": [1, (2, 3)], "y": None}
    assert nodes(value) == {"x": [1, (2, 3)], "x.0": 1, "x.1": (2, 3), "x.1.0": 2, "x.1.1": 3, "y": None}


def test_what_is_called_whole_is_not_taken_apart() -> None:
    value = {"x": [1, (2, 3)], "y": [4]}

    def whole(path: str, inner: Any) -> bool:
        return path == "x.1" or inner == [4]

    assert leaves(value, whole) == {"x.0": 1, "x.1": (2, 3), "y": [4]}
    found = rebuild(value, lambda path, leaf: path, whole)
    assert found == {"x": ["x.0", "x.1"], "y": "y"}
