"""Any tool that knows one input tensor, on a model with several inputs."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from multicam.errors import MulticamError
from multicam.inputs import Inputs
from multicam.layers import Layer, LayerLike, Tap, Taps, undisturbed, unwrapped
from multicam.packing import Spec
from multicam.reshape import as_it_is, positions
from multicam.targets import OutputLike, select_output


class PackedModel(nn.Module):
    """A proxy that takes one packed tensor, unpacks it, and calls the untouched model.

    pytorch-grad-cam, captum, torchcam and whatever else drives a model with one input tensor work on it unchanged: give
    them the proxy as the model, `packed.pack(inputs)` as the input and entries of `packed.target_layers` as layers. Each
    of these taps is a module of the proxy through which the activation of one of `layers` passes as float32
    `(b c *grid)`: the right call of a shared module, one tensor of a tuple, tokens as a grid, safe from operations in
    place behind it. The graph starts at the first tap, so that a tool pays about one forward pass, and never reaches a
    parameter. Without `layers` it starts at the packed tensor, and the model's own modules can be hooked.

    Args:
        model: Any module; it is not changed. It runs in evaluation mode.
        example_inputs: What it takes, see `Inputs.of`. They fix the layout, and what is held beside the packed tensor.
        layers: The layers to tap, see `multicam.trace.Layer`.
        output: Which part of the model's output the proxy returns.

    Attributes:
        spec: The layout of the packed tensor.
        target_layers: The taps, in the order of `layers`.

    Raises:
        MulticamError: If the inputs cannot be packed or a layer does not exist.

    Example:
        >>> class TwoBranch(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.rgb, self.depth = nn.Conv2d(3, 4, 3), nn.Conv2d(1, 4, 3)
        ...     def forward(self, rgb, depth):
        ...         return (self.rgb(rgb) + self.depth(depth)).mean((2, 3))
        >>> inputs = {"rgb": torch.rand(2, 3, 8, 8), "depth": torch.rand(2, 1, 8, 8)}
        >>> packed = PackedModel(TwoBranch(), inputs, layers=["rgb", "depth"])
        >>> packed(packed.pack(inputs)).shape
        torch.Size([2, 4])
        >>> packed.target_layers
        [Identity(), Identity()]
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        layers: LayerLike | Sequence[LayerLike] | None = None,
        output: OutputLike = None,
    ) -> None:
        super().__init__()
        self.model = unwrapped(model)
        self.inputs = Inputs.of(example_inputs).bind(self.model)
        self.spec = Spec.of(self.inputs)
        several = [] if layers is None else [layers] if isinstance(layers, str | nn.Module | Layer) else list(layers)
        self.output = output
        self.taps = nn.ModuleList(nn.Identity() for _ in several)
        self._taps = Taps(self.model, several)

    @property
    def target_layers(self) -> list[nn.Module]:
        """The taps, in the order of `layers`."""
        return list(self.taps)

    def pack(self, inputs: Any) -> Float[Tensor, "b c h w"]:
        """The packed tensor of `inputs`; their held leaves (token ids, masks …) are used from now on."""
        bound = Inputs.of(inputs).bind(self.model)
        packed = self.spec.pack(bound)
        self.inputs = bound
        return packed

    def unpack(self, packed: Float[Tensor, "b c h w"]) -> Inputs:
        """The call of the model that a packed tensor stands for, held leaves included.

        Raises:
            MulticamError: If the batch is not the one that was packed and held leaves differ between samples, so that
                nobody can tell which belongs to which row.
        """
        held = self.inputs
        images = {slot.name for slot in self.spec.slots}
        rows = packed.shape[0]
        if rows != held.batch:
            if not held.alike(*images):
                raise MulticamError(
                    f"the tool called the model with a batch of {rows}, but {held.batch} samples were packed and their "
                    f"other inputs differ, so no one can tell which row is which sample: {held!r}; explain one sample "
                    "at a time"
                )
            held = held.take([0] * rows)

        def own(name: str, leaf: Any) -> Any:
            """A copy, because the model may write into what it is given, and held leaves are the user's."""
            return leaf.clone() if isinstance(leaf, Tensor) and name not in images else leaf

        return self.spec.unpack(packed, held.map(own))

    def maps(self, canvas_map: Any) -> dict[str, Tensor]:
        """A tool's map on the canvas `(b h w)`, at each input's own size: name -> `(b h w)`."""
        return self.spec.maps(canvas_map)

    def forward(self, packed: Float[Tensor, "b c h w"]) -> Any:
        """What the model returns for the packed inputs, bit for bit (the part that `output` names)."""
        if not isinstance(packed, Tensor):
            raise MulticamError(f"a PackedModel takes packed.pack(inputs), one tensor, not a {type(packed).__name__}")
        if not self.taps and torch.is_grad_enabled() and not packed.requires_grad:
            packed = packed.detach().requires_grad_()
        call = self.unpack(packed)
        with undisturbed(self.model), self._taps.observe(packed.shape[0], self._through_tap):
            returned = call.run(self.model)
        return returned if self.output is None else select_output(returned, self.output)

    def train(self, mode: bool = True) -> "PackedModel":
        """Sets the proxy's own flag; the model's are the user's."""
        self.training = mode
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: no gradient ever reaches a parameter, and those that are there are the user's."""

    def _through_tap(self, i: int, tap: Tap, x: Tensor) -> Tensor:
        assert tap.reshape is not None
        source = x.clone()
        if torch.is_grad_enabled() and not source.requires_grad:
            source = source.detach().requires_grad_()
        seen = tap.reshape(source)
        # Looked up anew on every pass, because AblationCAM exchanges the module in the list.
        passed = self.taps[i](seen if seen.dtype == torch.float64 else seen.float())
        onward: Tensor = passed.to(x.dtype).clone()
        if tap.reshape is as_it_is:
            return onward
        where = positions(tap.reshape, x)
        return source.flatten().scatter(0, where.flatten(), onward.flatten()).reshape(x.shape)
