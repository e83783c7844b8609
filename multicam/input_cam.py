"""Methods whose maps are made on the inputs themselves: there is no layer to choose."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from multicam.errors import MulticamError
from multicam.inputs import Inputs, as_names
from multicam.layers import unwrapped
from multicam.maps import Maps
from multicam.targets import OutputLike, TargetLike


class InputCAM(ABC):
    """A method with one map for each image input, at the input's own size, as a density like those of `CAM`.

    Args:
        model: Any module; it is not changed.
        inputs: The image input to explain, or several of them; None: all there are.
        output: Which part of the model's output the target sees, as for `CAM`.
    """

    comparable: ClassVar[bool] = True

    def __init__(
        self, model: nn.Module, inputs: str | Sequence[str] | None = None, *, output: OutputLike = None
    ) -> None:
        self.model = unwrapped(model)
        self.single = isinstance(inputs, str)
        self.inputs = as_names(inputs)
        self.output = output

    @abstractmethod
    def evidence(self, call: Inputs, names: Sequence[str], target: TargetLike) -> dict[str, Tensor]:
        """The signed density of each named input, on its last axes: `(b h w)`, or `(b d h w)` for volumes."""

    def __call__(self, inputs: Any, target: TargetLike = None, *, signed: bool = False) -> Tensor | Maps:
        """The map of one input, or `Maps` by input where several are asked for or there are several.

        Args:
            inputs: What the model takes, see `Inputs.of`.
            target: As for the call of a `CAM`.
            signed: Keep negative evidence instead of cutting it at zero.

        Raises:
            MulticamError: If inputs, target or output do not fit the model; the message says what does.
        """
        call = Inputs.of(inputs).bind(self.model)
        images = list(call.images)
        asked = images if self.inputs is None else list(self.inputs)
        names = [call.name(name) for name in asked]
        wrong = [name for name in names if name not in images]
        if wrong or not names:
            raise MulticamError(
                f"{wrong[0] if wrong else 'nothing'!r} is no image input; the image inputs are: "
                + (", ".join(map(repr, images)) or "none")
            )
        found = self.evidence(call, names, target)
        maps = {short: found[name] if signed else found[name].relu() for short, name in zip(asked, names, strict=True)}
        only = self.single or (self.inputs is None and len(names) == 1)
        return maps[asked[0]] if only else Maps(maps, self.comparable)

    def __repr__(self) -> str:
        shown = "" if self.inputs is None else f", {self.inputs[0] if self.single else list(self.inputs)!r}"
        return f"{type(self).__name__}({type(self.model).__name__}{shown})"
