"""Any tool that knows one input tensor, on a model with several inputs."""

import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from multicam.call.inputs import Inputs
from multicam.call.packing import Spec
from multicam.call.scorer import OutputLike, select_output
from multicam.errors import MulticamError
from multicam.watch.checkpoints import Recomputed, running
from multicam.watch.layers import Layer, LayerLike, Tap, Taps
from multicam.watch.reshape import put_back
from multicam.watch.rows import settled
from multicam.watch.saved import overwritten, retried
from multicam.watch.survey import located_for_any_number
from multicam.watch.undisturbed import module_by_module, undisturbed, unwrapped

FLAT = 4  # axes of what a tool with a canvas of rows and columns can lay on it: samples, channels, rows and columns
TURN_OFF = "turn it off, as with model.gradient_checkpointing_disable() or model.set_grad_checkpointing(False)"
FUSED = (nn.TransformerEncoder, nn.TransformerEncoderLayer)  # without a graph they call none of their parts


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
        layers: The layers to tap, see `multicam.watch.layers.Layer`.
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
        layers: LayerLike | Iterable[LayerLike] | None = None,
        output: OutputLike = None,
    ) -> None:
        super().__init__()
        self.model = unwrapped(model)
        self.inputs = Inputs.of(example_inputs).bind(self.model)
        self.spec = Spec.of(self.inputs)
        self._packed = self.spec.pack(self.inputs)
        several = [] if layers is None else [layers] if isinstance(layers, str | nn.Module | Layer) else list(layers)
        self.output = output
        self.taps = nn.ModuleList(nn.Identity() for _ in several)
        located = [located_for_any_number(self.model, self.inputs, {"": layer})[""] for layer in several]
        self._taps = Taps(self.model, located)
        # Now, because a tool may hang hooks on the model afterwards.
        self.inputs = settled(self.model, self.inputs, output)
        fused = (module for module in self.model.modules() if isinstance(module, FUSED))
        inside = {part for module in fused for part in module.modules() if part is not module}
        self._inside_fused = any(self._taps.paths[name] in inside for name in self._taps.names)

    @property
    def target_layers(self) -> list[nn.Module]:
        """The taps, in the order of `layers`."""
        return list(self.taps)

    def pack(self, inputs: Any) -> Float[Tensor, "b c h w"]:
        """The packed tensor of `inputs`; their held leaves (token ids, masks …) are used from now on."""
        bound = Inputs.of(inputs).bind(self.model)
        packed = self.spec.pack(bound)
        self.inputs = settled(self.model, bound, self.output)
        self._packed = packed
        return packed

    def unpack(self, packed: Float[Tensor, "b c h w"]) -> Inputs:
        """The call of the model that a packed tensor stands for, held leaves included.

        Tools repeat samples as they like. Where held leaves or items of lists differ between samples, each row must therefore
        be one of the rows that were packed, unchanged, to tell whose leaves belong to it.

        Raises:
            MulticamError: If that cannot be told.
        """
        here, home = packed.device, self._packed.device
        held = self.inputs.map(
            lambda _, leaf: leaf.to(here) if isinstance(leaf, Tensor) and leaf.device == home else leaf
        )
        images = {slot.name for slot in self.spec.slots}
        if not held.alike(*images):
            held = held.take(self._samples(packed))
        elif packed.shape[0] != held.batch:
            held = held.take([0] * packed.shape[0])
        # Copies, because the model may write into what it is given, and held leaves are the user's.
        return self.spec.unpack(packed, held.own())

    def _samples(self, packed: Tensor) -> list[int]:
        """Which packed sample each row is."""
        known = self._packed.to(packed.device)
        if known.shape == packed.shape and torch.equal(known, packed):
            return list(range(len(known)))
        found = [torch.nonzero((known == row).flatten(1).all(1)).flatten().tolist() for row in packed.detach()]
        if any(len(samples) != 1 for samples in found):
            raise MulticamError(
                f"the tool called the model with {len(packed)} changed rows, but the other inputs of the {len(known)} "
                f"packed samples differ, so no one can tell which belong to which row: {self.inputs!r}; explain one "
                "sample at a time"
            )
        return [samples[0] for samples in found]

    def maps(self, canvas_map: Any) -> dict[str, Tensor]:
        """A tool's map on the canvas `(b h w)`, at each input's own size: name -> `(b h w)`."""
        return self.spec.maps(canvas_map)

    def forward(self, packed: Float[Tensor, "b c h w"]) -> Any:
        """What the model returns for the packed inputs in evaluation mode (the part that `output` names).

        Without a graph (`torch.no_grad()`, `torch.inference_mode()`) it is the model's own output, bit for bit; only a tap inside of an
        `nn.TransformerEncoder` keeps it from its fused path, which calls none of its layers. With a graph no parameter requires a
        gradient, for which PyTorch may multiply by other kernels: then it is the output of the model after
        `model.requires_grad_(False)`, bit for bit but for fused paths, and that of a trainable model up to rounding.

        Raises:
            MulticamError: If a tap or the packed tensor does not fit the model or the tool.
        """
        if not isinstance(packed, Tensor):
            raise MulticamError(f"a PackedModel takes packed.pack(inputs), one tensor, not a {type(packed).__name__}")
        if not self.taps and torch.is_grad_enabled() and not packed.requires_grad:
            packed = packed.detach().requires_grad_()
        if packed.requires_grad:
            whole = [
                slot.name for slot in self.spec.slots if not (slot.dtype.is_floating_point or slot.dtype.is_complex)
            ]
            if whole:
                warnings.warn(
                    f"input {whole[0]!r} holds whole numbers, through which no gradient flows: its part of a gradient on "
                    "the packed tensor is zero, whatever the model makes of it",
                    stacklevel=2,
                )
        return select_output(retried(lambda: self._run(packed)), self.output)

    def train(self, mode: bool = True) -> "PackedModel":
        """Sets the proxy's own flag; the model's are the user's."""
        self.training = mode
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: no gradient ever reaches a parameter, and those that are there are the user's."""

    def _run(self, packed: Tensor) -> Any:
        call = self.unpack(packed)
        graph, training = torch.is_grad_enabled(), any(module.training for module in self.model.modules())
        # What a backward pass needs depends on where the graph starts.
        taps = zip(self._taps.names, self._taps.layers, strict=True)
        start = tuple((name, layer.call, layer.pick) for name, layer in taps), packed.requires_grad
        with (
            undisturbed(self.model, graph=None, part=("packed", start, graph, training, repr(call))) as memory,
            memory.saving(),
            module_by_module() if self._inside_fused else nullcontext(),
            self._taps.observe(partial(self._through_tap, graph)) as seen,
            Recomputed() if graph and memory.watched else nullcontext() as recomputed,
        ):
            returned = call.run(self.model)
        self._taps.check_parted(seen, self.unpack(packed), returned, lambda output: output)
        if recomputed and recomputed.found:
            memory.forget()
            self._refuse_changes(recomputed, training)
        if graph and not memory.watched and overwritten(returned):
            memory.forget()  # unlike its first pass, this one overwrites what its gradients need
            return self._run(packed)
        return returned

    def _refuse_changes(self, recomputed: Recomputed, training: bool) -> None:
        """Refuse a model that a tool's backward pass would run once more, where that changes it or is in training mode."""
        if recomputed.reentrant or training:
            raise MulticamError(
                f"parts of {type(self.model).__name__} run once more during the backward pass (torch.utils.checkpoint), which a tool "
                f"runs by itself: {'in training mode' if training else 'their parameters would get gradients'}; {TURN_OFF}"
            )

    def _through_tap(self, graph: bool, i: int, tap: Tap, x: Tensor) -> Tensor:
        reshape = tap.layer.reshape
        assert reshape is not None
        if graph and running():
            raise MulticamError(
                f"layer {tap.label!r} is in a part of the model that runs once more during the backward pass (torch.utils.checkpoint), "
                f"without the tap; {TURN_OFF}"
            )
        source = x if x.requires_grad or not torch.is_grad_enabled() else x.detach().requires_grad_()
        seen = reshape(source)
        # Looked up anew on every pass, because AblationCAM exchanges the module in the list.
        module = self.taps[i]
        if seen.ndim != FLAT and any(_is_of_pytorch_grad_cam(hook) for hook in module._forward_hooks.values()):
            raise MulticamError(
                f"pytorch-grad-cam lays maps of rows and columns on the packed tensor, but the grid of layer {tap.label!r} is "
                f"{' x '.join(map(str, seen.shape[2:]))}: take the methods of multicam, or of multicam.compat by the same names, on the model "
                "itself; captum's LayerGradCam or torchcam's GradCAM, whose maps stay on the grid; or one slice of it, as in "
                f"Layer({tap.label!r}, reshape=lambda x: x[:, :, 0])"
            )
        # Copies, forward and backward: tools detach in place what they see here, which views cannot be.
        passed = module((seen * 1).to(torch.promote_types(seen.dtype, torch.float32)))
        onward: Tensor = passed.to(x.dtype) * 1
        return put_back(reshape, source, onward)


def _is_of_pytorch_grad_cam(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).partition(".")[0] == "pytorch_grad_cam"
