"""What stands for "nothing to see" in an input: the reference that its evidence is measured against."""

from collections.abc import Mapping, Sequence
from math import ceil
from numbers import Real
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from multicam.errors import MulticamError, unknown
from multicam.inputs import Inputs

Word = Literal["mean", "blur"]
Baseline = float | Word | Tensor

BLUR = 1 / 16  # the standard deviation of "blur" as a share of the input's side: 14 px of 224


def baselines(
    inputs: Inputs, names: Sequence[str], baseline: Baseline | Mapping[str, Baseline] = 0.0
) -> dict[str, Tensor]:
    """The baseline of each named input, in its shape and dtype.

    Args:
        inputs: The call.
        names: The inputs, by their full names.
        baseline: A number for every entry; `"mean"`, each sample's and channel's own mean; `"blur"`, the input blurred
            with a Gaussian; a tensor that has the input's shape, or that of one sample; or one of these for each name
            (an input without one has a baseline of zeros).

    Raises:
        MulticamError: If a name does not exist or a baseline does not fit its input.

    Example:
        >>> inputs = Inputs(torch.rand(2, 3, 8, 8), depth=torch.rand(2, 1, 8, 8))
        >>> [tensor.std() > 0 for tensor in baselines(inputs, ["0", "depth"], {"0": "blur"}).values()]
        [tensor(True), tensor(False)]
    """
    if not isinstance(baseline, Mapping):
        return {name: _of(name, inputs.leaves[name], baseline) for name in names}
    given = {inputs.name(name): value for name, value in baseline.items()}
    for name in given:
        if name not in names:
            raise unknown("explained input", name, names)
    return {name: _of(name, inputs.leaves[name], given.get(name, 0.0)) for name in names}


def _of(name: str, leaf: Tensor, baseline: Baseline) -> Tensor:
    if isinstance(baseline, Real) and not isinstance(baseline, bool):
        return torch.full_like(leaf, baseline)
    if isinstance(baseline, str):
        if baseline not in get_args(Word):
            raise unknown("baseline", baseline, get_args(Word))
        if leaf.ndim < 3 or not leaf.is_floating_point():
            raise MulticamError(
                f"the baseline {baseline!r} of input {name!r} needs a floating-point image, not {leaf.dtype} {tuple(leaf.shape)}"
            )
        return _blurred(leaf) if baseline == "blur" else _mean(leaf)
    if not isinstance(baseline, Tensor):
        raise MulticamError(
            f"the baseline of input {name!r} is a number, {', '.join(map(repr, get_args(Word)))} or a tensor, not {baseline!r}"
        )
    if baseline.shape not in (leaf.shape, leaf.shape[1:], (1, *leaf.shape[1:])):
        raise MulticamError(
            f"the baseline {tuple(baseline.shape)} of input {name!r} does not fit it: it is {tuple(leaf.shape)}"
        )
    return baseline.detach().to(leaf).expand(leaf.shape)


def _mean(image: Tensor) -> Tensor:
    axes = (-1,) if image.ndim == 3 else (-2, -1)
    return image.mean(axes, keepdim=True).expand(image.shape)


def _blurred(image: Tensor) -> Tensor:
    """The image blurred along its last one or two axes; its border is repeated outside."""
    for axis in (-1,) if image.ndim == 3 else (-2, -1):
        side = image.shape[axis]
        sigma = BLUR * side
        reach = max(1, ceil(3 * sigma))
        at = torch.arange(-reach, reach + 1, device=image.device)
        bell = torch.exp(-((at / sigma) ** 2) / 2)
        rows = image.transpose(axis, -1)
        wide = F.pad(rows.reshape(-1, 1, side).float(), (reach, reach), mode="replicate")
        image = F.conv1d(wide, (bell / bell.sum())[None, None]).view(rows.shape).transpose(axis, -1).to(image)
    return image
