"""A recording: attentions found by name and by the inputs between which they run, their gradients, and their memory."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, library, nn

from multicam import MulticamError
from multicam.attending.attend import record_attention
from tests.helpers.recorded_net import Cross, Own, Scripted, net, own_attention, pair


def test_a_shared_module_and_several_passes_are_counted() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = Cross(True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attn(self.attn(x, x), x)

    model = Shared()
    with record_attention(model) as att:
        model(torch.randn(1, 3, 8))
        model(torch.randn(2, 4, 8))
    assert [(call.name, call.forward.index, call.shape) for call in att] == [
        ("attn#0", 0, (1, 2, 3, 3)), ("attn#1", 0, (1, 2, 3, 3)), ("attn#0", 1, (2, 2, 4, 4)), ("attn#1", 1, (2, 2, 4, 4)),
    ]  # fmt: skip
    assert [forward.batch for forward in att.forwards] == [1, 2]
    assert len(att.find("attn#1")) == len(att[:2]) == 2
    with pytest.raises(
        MulticamError, match=r"4 attentions are called 'attn': attn#0 of pass 0, attn#1 of pass 0.*\.find\('attn'\)"
    ):
        att["attn"]
    with pytest.raises(MulticamError, match=r"2 attentions are called 'attn#1'.*of pass 1"):
        att["attn#1"]
    with pytest.raises(MulticamError, match=r"no attention 'atn'; did you mean 'attn'\?"):
        att["atn"]


@library.custom_op("example::attention", mutates_args=())
def custom_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


def test_custom_kernels_are_blind_spots() -> None:
    class Model(nn.Module):
        def __init__(self, alone: bool) -> None:
            super().__init__()
            self.part = Scripted(Own())
            self.alone = alone

        def forward(self, x: Tensor) -> Tensor:
            y = custom_attention(x, x, x)
            return y if self.alone else self.part(y)

    with record_attention(Model(False)) as att:
        att.model(torch.randn(2, 5, 4))
    assert [(unseen.path, unseen.what) for unseen in att.blind_spots] == [
        ("", "the kernel example::attention, whose inside cannot be seen")
    ]
    with (
        pytest.raises(
            MulticamError, match=r"no attention that could be seen; what looked like it:\n  .*example::attention"
        ),
        record_attention(model := Model(True)),
    ):
        model(torch.randn(2, 5, 4))


@pytest.mark.parametrize("keep", ["lazy", "probs"])
def test_memory_is_given_back_with_the_record(keep: Any) -> None:
    model, inputs = net(), pair()
    with record_attention(model, keep=keep) as att:
        out = model(*inputs)
    att.gradients(out.sum())
    held = [weakref.ref(att[i].differentiated) for i in range(3)] + [weakref.ref(call) for call in att]
    del att, out
    gc.collect()
    assert [ref() for ref in held] == [None] * 6


def test_attention_between_inputs_that_do_not_meet() -> None:
    class Apart(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return own_attention(x).sum() + own_attention(y).sum()

    with record_attention(Apart()) as att:
        att.model(torch.randn(2, 5, 4), torch.randn(2, 3, 4))
    assert len(att.between("x", "x")) == 1
    with pytest.raises(MulticamError, match=r"no attention of 'x' to 'y' was seen:\nattention +source.*\n#0 +softmax"):
        att.between("x", "y")
    with pytest.raises(MulticamError, match=r"no input 'z'"):
        att.between("x", "z")
