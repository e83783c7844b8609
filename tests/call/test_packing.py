"""The canvas: what is packed comes back bit for bit."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from multicam import Inputs, MulticamError, Spec

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128]
INTEGERS = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16]
SPECIAL = torch.tensor([0.0, -0.0, 1e-45, float("inf"), -float("inf"), float("nan"), 65504.0, -1.0])


def image(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Random values with the dtype's extremes among them."""
    g = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.rand(shape, generator=g) > 0.5
    if not (dtype.is_floating_point or dtype.is_complex):
        info = torch.iinfo(dtype)
        values = torch.randint(info.min, info.max + 1, shape, generator=g).to(dtype)
        values.view(-1)[:2] = torch.tensor([info.min, info.max]).to(dtype)[: values.numel()]
        return values
    values = torch.randn(shape, generator=g, dtype=torch.float64)
    values.view(-1)[: len(SPECIAL)] = SPECIAL.double()[: values.numel()]
    if dtype.is_complex:
        return torch.complex(values, values.flip(-1)).to(dtype)
    return values.to(dtype)


def bits(x: Tensor) -> Tensor:
    x = torch.view_as_real(x) if x.is_complex() else x
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.contiguous().view(words[x.element_size()])


def assert_same(a: Any, b: Any) -> None:
    """Equal bits, dtype, shape, strides class, containers."""
    if not isinstance(a, Tensor):
        assert type(a) is type(b)
        assert a == b
        return
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    nan = a != a  # NaN has many encodings, and only that it is NaN survives a cast
    assert torch.equal(nan, b != b)
    assert torch.equal(bits(torch.where(nan, 0, a)), bits(torch.where(nan, 0, b)))
    for layout in (torch.contiguous_format, torch.channels_last, torch.channels_last_3d):
        if {torch.channels_last: 4, torch.channels_last_3d: 5}.get(layout, a.ndim) == a.ndim:
            assert b.is_contiguous(memory_format=layout) or not a.is_contiguous(memory_format=layout)


@st.composite
def leaf(draw: st.DrawFn, batch: int) -> Tensor:
    middle = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    shape = (batch, *middle, draw(st.integers(1, 7)), draw(st.integers(1, 7)))
    x = image(shape, draw(st.sampled_from(FLOATS + INTEGERS)), draw(st.integers(0, 99)))
    layout = draw(st.sampled_from(["plain", "channels_last", "transposed", "strided", "expanded"]))
    if layout == "channels_last" and x.ndim in (4, 5):
        return x.to(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
    if layout == "transposed":
        return x.transpose(-1, -2)
    if layout == "strided":
        return torch.cat([x, x], -1)[..., ::2]
    if layout == "expanded":
        return x[:, :1].expand(-1, 2, *(-1,) * (x.ndim - 2))
    return x


@given(st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_unpack_of_pack_is_the_same_bits(data: st.DataObject) -> None:
    batch = data.draw(st.integers(1, 3))
    images = data.draw(st.lists(leaf(batch), min_size=1, max_size=4))
    held = {"ids": torch.arange(batch) + 2**40, "none": None, "word": "x", "n": 3}
    inputs = Inputs(images[0], [images[1:], held])
    spec = Spec.of(inputs)
    packed = spec.pack(inputs)
    assert packed.shape == (batch, spec.channels, spec.height, spec.width)
    back = spec.unpack(packed, inputs)
    assert list(back.leaves) == list(inputs.leaves)
    for name, value in inputs.leaves.items():
        assert_same(value, back.leaves[name])


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS, ids=str)
def test_every_dtype_survives_whole(dtype: torch.dtype) -> None:
    everything = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = everything.view(dtype) if dtype.itemsize == 2 else image((1, 1, 64, 128), dtype, 0).flatten()
    x = x.reshape(1, 1, 64, -1)
    inputs = Inputs(x)
    assert_same(x, Spec.of(inputs).unpack(Spec.of(inputs).pack(inputs), inputs).args[0])


def test_the_canvas_is_what_it_says() -> None:
    rgb, depth, clip = torch.rand(2, 3, 6, 4), torch.rand(2, 1, 3, 8), torch.rand(2, 2, 5, 2, 2)
    inputs = Inputs(rgb=rgb, depth=depth, clip=clip)
    spec = Spec.of(inputs)
    packed = spec.pack(inputs)
    assert packed.shape == (2, 14, 6, 8)
    assert torch.equal(packed[:, :3, :, :4], rgb)
    assert torch.equal(packed[:, 3:4, :3], depth)
    assert torch.equal(packed[:, 4:, :2, :2], clip.flatten(1, 2))
    assert not packed[:, :3, :, 4:].any()
    assert not packed[:, 3:4, 3:].any()
    assert repr(spec) == "Spec(canvas (b 14 6 8) float32: rgb 0:3 at 6x4, depth 3:4 at 3x8, clip 4:14 at 2x2)"


def test_wide_inputs_make_a_wide_canvas() -> None:
    assert Spec.of(Inputs(torch.rand(1, 1, 2, 2), torch.rand(1, 1, 2, 2).double())).dtype == torch.float64
    assert Spec.of(Inputs(torch.rand(1, 1, 2, 2).half())).dtype == torch.float32


@pytest.mark.parametrize("b", [1, 2])
def test_the_model_may_write_into_what_it_gets(b: int) -> None:
    inputs = Inputs(torch.rand(b, 3, 4, 4), torch.rand(b, 1, 4, 4))
    packed = Spec.of(inputs).pack(inputs).requires_grad_()
    leaf = Spec.of(inputs).unpack(packed, inputs).args[0]
    leaf.mul_(2)  # neither a view error nor a change of the canvas
    leaf.sum().backward()
    assert torch.equal(packed.detach(), Spec.of(inputs).pack(inputs))
    assert torch.equal(packed.grad, torch.cat([torch.full((b, 3, 4, 4), 2.0), torch.zeros(b, 1, 4, 4)], 1))


def test_gradients_flow_to_the_canvas_through_every_differentiable_kind() -> None:
    inputs = Inputs(
        torch.rand(2, 3, 4, 4).half(), torch.rand(2, 2, 3, 3, dtype=torch.complex64), torch.rand(2, 1, 2, 2).mT
    )
    packed = Spec.of(inputs).pack(inputs).requires_grad_()
    half, spectrum, small = Spec.of(inputs).unpack(packed, inputs).args
    (half.float().sum() + torch.view_as_real(spectrum).sum() + small.sum()).backward()
    filled = torch.zeros_like(packed)
    filled[:, :3], filled[:, 3:7, :3, :3], filled[:, 7:, :2, :2] = 1, 1, 1
    assert torch.equal(packed.grad, filled)


def test_a_map_of_the_canvas_is_resized_and_not_cropped() -> None:
    """The engine stretched the layer's grid over the canvas, so a peak at (27, 27) of 32 is one at (13, 13) of 16."""
    inputs = Inputs(big=torch.rand(1, 3, 32, 32), small=torch.rand(1, 3, 16, 16))
    canvas = torch.zeros(1, 32, 32)
    canvas[0, 26:28, 26:28] = 1
    maps = Spec.of(inputs).maps(canvas.numpy())
    assert torch.equal(maps["big"], canvas)
    assert maps["small"].shape == (1, 16, 16)
    assert divmod(int(maps["small"].argmax()), 16) == (13, 13)
    assert torch.allclose(maps["small"], F.interpolate(canvas[None], 16, mode="bilinear", align_corners=False)[0])
    with pytest.raises(MulticamError, match=r"shape \(b, 32, 32\), given is \(1, 16, 16\)"):
        Spec.of(inputs).maps(torch.zeros(1, 16, 16))


def test_refusals_say_what_to_do() -> None:
    rgb = torch.rand(2, 3, 4, 4)
    with pytest.raises(MulticamError, match=r"nothing to pack.*image\[None\].*torch.stack"):
        Spec.of(Inputs([torch.rand(3, 4, 4), torch.rand(3, 5, 5)]))
    with pytest.raises(MulticamError, match="differ in batch size"):
        Spec.of(Inputs(rgb, torch.rand(3, 1, 4, 4)))
    spec = Spec.of(Inputs(rgb=rgb))
    with pytest.raises(MulticamError, match=r"input 'rgb' is missing"):
        spec.pack(Inputs(depth=rgb))
    with pytest.raises(MulticamError, match=r"'rgb' is torch.float32 \(2, 3, 4, 5\), but the layout was made for"):
        spec.pack(Inputs(rgb=torch.rand(2, 3, 4, 5)))
    with pytest.raises(MulticamError, match=r"'rgb' is torch.float64"):
        spec.pack(Inputs(rgb=rgb.double()))
    with pytest.raises(MulticamError, match="no place for input 'depth'"):
        spec.pack(Inputs(rgb=rgb, depth=rgb))
    with pytest.raises(MulticamError, match=r"has shape \(2, 4, 4, 4\), but its layout is \(b, 3, 4, 4\)"):
        spec.unpack(torch.rand(2, 4, 4, 4), Inputs(rgb=rgb))


def test_a_missing_modality_stays_missing() -> None:
    inputs = Inputs(rgb=torch.rand(1, 3, 4, 4), depth=None)
    back = Spec.of(inputs).unpack(Spec.of(inputs).pack(inputs), inputs)
    assert back.kwargs["depth"] is None


def test_a_conjugated_image_is_packed_by_its_values() -> None:
    """A conjugate is a flag on the memory of the other, which a view of real numbers does not see."""
    spectrum = torch.fft.fft2(torch.rand(2, 1, 4, 6))
    inputs = Inputs(spectrum=spectrum.conj())
    packed = Spec.of(inputs).pack(inputs)
    assert torch.equal(packed, torch.cat([spectrum.real, -spectrum.imag], 1))
    assert torch.equal(Spec.of(inputs).unpack(packed, inputs).kwargs["spectrum"], spectrum.conj())
