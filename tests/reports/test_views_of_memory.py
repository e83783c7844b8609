"""Views that somebody else holds of inputs, buffers and weights, by NumPy, DLPack or the operating system, stay views of them.

Memory that is shared lazily leaves such a view on freed memory once either side is written, and it shows the numbers of other tensors.
"""

import gc
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import multicam as mc


class Streams(nn.Module):
    """A frame and what a robot feels, normalised by running numbers that it writes; the frame is normalised in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.touch, self.head = nn.Conv2d(3, 4, 3), nn.Linear(6, 4), nn.Linear(4, 3)
        self.register_buffer("seen", torch.zeros(2**16))

    def forward(self, frame: Tensor, touch: Tensor) -> Tensor:
        frame.sub_(0.5).div_(0.25)
        self.seen += 1
        self.seen[:6] += touch.mean(0)
        out: Tensor = self.head(self.conv(frame).relu().mean((2, 3)) * self.touch(touch))
        return out


EXPLAIN: dict[str, Callable[[nn.Module, dict[str, Tensor]], Any]] = {
    "GradCAM": lambda model, x: mc.GradCAM(model, {"frame": "conv"})(x, 1, signed=True),
    "contribution": lambda model, x: mc.contribution(model, x, 1),
    "occlusion": lambda model, x: mc.occlusion(model, x, 1, patch=16),
    "proxy": lambda model, x: (packed := mc.PackedModel(model, x, layers=["conv"]))(packed.pack(x)),
}


def of_numpy(model: nn.Module, folder: Path) -> tuple[Tensor, Callable[[], np.ndarray]]:
    """A frame grabber's array, of which the tensor is the view."""
    array = np.full((1, 3, 32, 32), 0.25, np.float32)
    return torch.from_numpy(array), lambda: array


def of_a_file(model: nn.Module, folder: Path) -> tuple[Tensor, Callable[[], np.ndarray]]:
    """Rows of a data set that the operating system maps."""
    array = np.memmap(folder / "frames", np.float32, "w+", shape=(1, 3, 32, 32))
    array[:] = 0.25
    return torch.from_numpy(array), lambda: array


def of_bytes(model: nn.Module, folder: Path) -> tuple[Tensor, Callable[[], np.ndarray]]:
    """A ring buffer between processes."""
    ring = mmap.mmap(-1, 4 * 3 * 32 * 32)
    x = torch.frombuffer(ring, dtype=torch.float32).view(1, 3, 32, 32)
    x.fill_(0.25)
    return x, lambda: np.frombuffer(ring, np.float32).reshape(1, 3, 32, 32)


def of_dlpack(model: nn.Module, folder: Path) -> tuple[Tensor, Callable[[], np.ndarray]]:
    """A view that another library made of the tensor."""
    x = torch.full((1, 3, 32, 32), 0.25)
    view = np.from_dlpack(x)
    return x, lambda: view


def of_a_window(model: nn.Module, folder: Path) -> tuple[Tensor, Callable[[], np.ndarray]]:
    """The newest frame of a recording, of which all of it is held."""
    recording = torch.full((4, 3, 32, 32), 0.25)
    view = recording.numpy()
    return recording[3:], lambda: view[3:]


HELD = {held.__name__: held for held in (of_numpy, of_a_file, of_bytes, of_dlpack, of_a_window)}


@pytest.mark.parametrize("explain", EXPLAIN)
@pytest.mark.parametrize("held", HELD)
def test_a_view_of_an_input_stays_one(held: str, explain: str, tmp_path: Path) -> None:
    model = Streams().eval()
    frame, view = HELD[held](model, tmp_path)
    for _ in range(2):
        EXPLAIN[explain](model, {"frame": frame, "touch": torch.rand(1, 6)})
    gc.collect()
    _junk = [torch.full((1, 3, 32, 32), 5.0) for _ in range(50)]  # takes what was freed
    assert (view() == 0.25).all()
    frame.fill_(7)
    assert (view() == 7).all()
    if (theirs := view()).flags.writeable:
        theirs[:] = 9
        assert (frame == 9).all()


@pytest.mark.parametrize("explain", EXPLAIN)
def test_views_of_buffers_and_weights_stay_views(explain: str) -> None:
    model = Streams().eval()
    tensors = {"seen": model.seen, "weight": model.conv.weight.detach()}
    views = {name: (x.numpy(), torch.utils.dlpack.from_dlpack(x), x.clone()) for name, x in tensors.items()}
    for _ in range(2):
        EXPLAIN[explain](model, {"frame": torch.rand(1, 3, 32, 32), "touch": torch.rand(1, 6)})
    gc.collect()
    _junk = [torch.full((2**16,), 5.0) for _ in range(20)]
    for array, lent, values in views.values():
        assert (array == values.numpy()).all() and torch.equal(lent, values)
    with torch.no_grad():
        model.seen.fill_(3)
        model.conv.weight.fill_(3)
    for array, lent, _ in views.values():
        assert (array == 3).all() and (lent == 3).all()


def test_what_is_kept_of_a_pass_is_not_what_somebody_writes_later(tmp_path: Path) -> None:
    model = Streams().eval()
    for held in HELD.values():
        frame, view = held(model, tmp_path)
        trace = mc.Trace(model, {"frame": frame, "touch": torch.rand(1, 6)}, {"it": "conv"}, 1)
        acts = trace.sites["it"].acts.clone()
        frame.fill_(9)
        assert (trace.inputs.leaves["frame"] == 0.25).all()
        torch.testing.assert_close(trace.sites["it"].acts, acts)
        assert (view() == 9).all()
