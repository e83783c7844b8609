"""Image leaves side by side on the channel axis of one tensor, and back, bit for bit."""

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from multicam.call.inputs import Inputs
from multicam.errors import MulticamError
from multicam.maps import resized

WIDE = (torch.float64, torch.complex128)


@dataclass(frozen=True)
class Slot:
    """Where one image leaf lies on the canvas, and what it must look like again afterwards."""

    name: str
    shape: tuple[int, ...]  # without the batch axis
    dtype: torch.dtype
    order: tuple[int, ...]  # axes from the largest stride to the smallest: tells channels_last from contiguous
    start: int
    channels: int
    device: torch.device | None  # None: the canvas's own

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.shape[-2], self.shape[-1]


@dataclass(frozen=True)
class Spec:
    """The layout of the packed tensor: which channels and which corner belong to which image leaf.

    Leaves of the same height and width are concatenated on the channel axis. Smaller ones lie in the top left corner of
    the canvas, zeros around them. Axes between batch and space (time, views, channels) are folded into channels, complex
    numbers become two channels. The canvas is float32, or float64 as soon as one leaf needs it, and `unpack(pack(x))`
    is `x` bit for bit: values, dtype, shape, order of strides and containers.

    Example:
        >>> import torch
        >>> inputs = Inputs(rgb=torch.rand(2, 3, 8, 8), depth=torch.rand(2, 1, 4, 4), ids=torch.arange(2))
        >>> spec = Spec.of(inputs)
        >>> spec
        Spec(canvas (b 4 8 8) float32: rgb 0:3, depth 3:4 at 4x4)
        >>> packed = spec.pack(inputs)
        >>> spec.unpack(packed, inputs)
        Inputs(rgb=float32 (2, 3, 8, 8), depth=float32 (2, 1, 4, 4), ids=int64 (2,))
    """

    slots: tuple[Slot, ...]
    height: int
    width: int
    dtype: torch.dtype

    @classmethod
    def of(cls, inputs: Inputs) -> "Spec":
        """The layout for these inputs.

        Raises:
            MulticamError: If there is no image leaf, or image leaves differ in batch size.
        """
        images = inputs.images
        if not images:
            raise MulticamError(
                f"nothing to pack in {inputs!r}: an image input is a float, bool or 8/16-bit integer tensor (b c h w) or "
                "(b … h w); an unbatched image needs image[None], a list of (c h w) images torch.stack(images)"
            )
        _ = inputs.batch  # refuses image leaves that disagree
        home = next(iter(images.values())).device
        slots, start = [], 0
        for name, leaf in images.items():
            channels = prod(leaf.shape[1:-2]) * (2 if leaf.is_complex() else 1)
            device = None if leaf.device == home else leaf.device
            slots.append(Slot(name, tuple(leaf.shape[1:]), leaf.dtype, _order(leaf), start, channels, device))
            start += channels
        return cls(
            tuple(slots),
            height=max(slot.size[0] for slot in slots),
            width=max(slot.size[1] for slot in slots),
            dtype=torch.float64 if any(slot.dtype in WIDE for slot in slots) else torch.float32,
        )

    @property
    def channels(self) -> int:
        """Channels of the canvas."""
        return sum(slot.channels for slot in self.slots)

    def pack(self, inputs: Inputs) -> Float[Tensor, "b c h w"]:
        """The packed tensor of `inputs`, a new leaf tensor without gradient.

        Raises:
            MulticamError: If an image leaf is missing or differs from the layout in more than the batch size.
        """
        images = inputs.images
        for slot in self.slots:
            leaf = images.get(slot.name)
            if leaf is None or tuple(leaf.shape[1:]) != slot.shape or leaf.dtype != slot.dtype:
                given = "missing" if leaf is None else f"{leaf.dtype} {tuple(leaf.shape)}"
                raise MulticamError(
                    f"input {slot.name!r} is {given}, but the layout was made for {slot.dtype} (b, "
                    f"{', '.join(map(str, slot.shape))}); make a new one from these inputs"
                )
        surplus = [name for name in images if name not in {slot.name for slot in self.slots}]
        if surplus:
            raise MulticamError(f"the layout has no place for input {surplus[0]!r}; make a new one from these inputs")
        home = images[self.slots[0].name].device
        canvas = torch.zeros(inputs.batch, self.channels, self.height, self.width, dtype=self.dtype, device=home)
        for slot in self.slots:
            leaf = images[slot.name].detach()
            if leaf.is_complex():
                leaf = torch.view_as_real(leaf.resolve_conj()).movedim(-1, 1)
            height, width = slot.size
            canvas[:, slot.start : slot.start + slot.channels, :height, :width] = leaf.flatten(1, -3)
        return canvas

    def unpack(self, packed: Float[Tensor, "b c h w"], inputs: Inputs) -> Inputs:
        """`inputs` with every image leaf read from the packed tensor; gradients flow to `packed`.

        Each leaf is a copy of its own, so that a model may write into it.

        Raises:
            MulticamError: If `packed` is not of this layout.
        """
        expected = (self.channels, self.height, self.width)
        if packed.ndim != 4 or tuple(packed.shape[1:]) != expected:
            raise MulticamError(
                f"the packed tensor has shape {tuple(packed.shape)}, but its layout is (b, {', '.join(map(str, expected))})"
            )
        return inputs.replace({slot.name: self._leaf(slot, packed) for slot in self.slots})

    def maps(self, canvas_map: Any) -> dict[str, Tensor]:
        """A map that an engine laid on the canvas `(b h w)`, at each input's own size: name -> `(b h w)`.

        The engine stretched the map over the whole canvas, whatever part of it an input fills, so each input gets the
        whole map resized, never a crop of it.
        """
        laid = torch.as_tensor(canvas_map).detach().float()
        if laid.ndim != 3 or tuple(laid.shape[1:]) != (self.height, self.width):
            raise MulticamError(
                f"a map on the canvas has shape (b, {self.height}, {self.width}), given is {tuple(laid.shape)}; one on the grid of a layer is "
                "resized to its input by torch.nn.functional.interpolate(map[:, None], size, mode='bilinear'), or mode='trilinear'"
            )
        return {slot.name: resized(laid, slot.size) for slot in self.slots}

    def __repr__(self) -> str:
        full = (self.height, self.width)
        places = ", ".join(
            f"{s.name} {s.start}:{s.start + s.channels}" + ("" if s.size == full else f" at {s.size[0]}x{s.size[1]}")
            for s in self.slots
        )
        dtype = str(self.dtype).removeprefix("torch.")
        return f"Spec(canvas (b {self.channels} {self.height} {self.width}) {dtype}: {places})"

    def _leaf(self, slot: Slot, packed: Tensor) -> Tensor:
        height, width = slot.size
        channels = packed[:, slot.start : slot.start + slot.channels, :height, :width]
        if slot.dtype.is_complex:
            pairs = rearrange(channels, "b (part c) h w -> b c h w part", part=2).contiguous()
            leaf = torch.view_as_complex(pairs)
        else:
            leaf = channels
        leaf = leaf.to(device=slot.device, dtype=slot.dtype).reshape(-1, *slot.shape)
        inverse = [slot.order.index(axis) for axis in range(leaf.ndim)]
        return leaf.permute(slot.order).clone(memory_format=torch.contiguous_format).permute(inverse)


def _order(leaf: Tensor) -> tuple[int, ...]:
    """The axes by falling stride, if the leaf lies densely in memory that way; else the plain order."""
    plain = tuple(range(leaf.ndim))
    strides = leaf.stride()
    order = tuple(sorted(plain, key=lambda axis: -strides[axis]))
    return order if leaf.permute(order).is_contiguous() else plain
