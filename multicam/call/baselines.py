"""What stands for "nothing to see" in an input: the reference that its evidence is measured against."""

from collections.abc import Mapping, Sequence
from math import ceil
from numbers import Real
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Shaped
from torch import Tensor, nn

from multicam.call.inputs import Inputs
from multicam.call.refusals import refuse_unreadable
from multicam.errors import MulticamError, unknown

Word = Literal["mean", "blur"]
Baseline = int | float | Word | Tensor
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
    if isinstance(baseline, Mapping):
        given = {inputs.name(name): value for name, value in baseline.items()}
    else:
        given = dict.fromkeys(names, baseline)
    for name in given:
        if name not in names:
            raise unknown("explained input", name, names)
    found = {name: _of(name, inputs.leaves[name], given.get(name, 0.0)) for name in names}
    _refuse_not_finite({f"the baseline of input {name!r}": (x, inputs.leaves[name]) for name, x in found.items()})
    return found


def references_of(
    model: nn.Module, call: Inputs, references: Any, names: Sequence[str]
) -> dict[str, Shaped[Tensor, "n ..."]]:
    """The references of each named input `(n …)`, in its dtype.

    Args:
        model: The model that the call is bound to.
        call: The call.
        references: Inputs as the model takes them, with any number of samples; those without a name here may be anything.
        names: The inputs, by their full names.

    Raises:
        MulticamError: If one has another shape than its input, or there are not equally many.

    Example:
        >>> references = references_of(nn.Flatten(), Inputs(torch.rand(1, 3, 8, 8)).bind(nn.Flatten()), torch.rand(5, 3, 8, 8), ["input"])
        >>> references["input"].shape
        torch.Size([5, 3, 8, 8])
    """
    leaves = Inputs.of(references).bind(model).leaves
    known = {}
    for name in names:
        shape = call.leaves[name].shape[1:]
        given = leaves.get(name)
        if not isinstance(given, Tensor) or given.shape[1:] != shape or not len(given):
            found = tuple(given.shape) if isinstance(given, Tensor) else given
            raise MulticamError(
                f"the references of input {name!r} must be (n, {', '.join(map(str, shape))}), not {found}"
            )
        known[name] = given.detach().to(call.leaves[name])
    _refuse_not_finite({f"a reference of input {name!r}": (x, call.leaves[name]) for name, x in known.items()})
    counts = {name: len(given) for name, given in known.items()}
    if len(set(counts.values())) > 1:
        raise MulticamError(f"the references must be equally many of every input, not {counts}")
    return known


def _of(name: str, leaf: Tensor, baseline: Baseline) -> Tensor:
    if isinstance(baseline, str):
        if baseline not in get_args(Word):
            raise unknown("baseline", baseline, get_args(Word))
        if leaf.ndim < 3 or not leaf.is_floating_point():
            raise MulticamError(
                f"the baseline {baseline!r} of input {name!r} needs a floating-point image, not {leaf.dtype} {tuple(leaf.shape)}"
            )
        found = _blurred(leaf) if baseline == "blur" else _mean(leaf)
        if not torch.isfinite(found).all():
            raise MulticamError(
                f"the baseline {baseline!r} of input {name!r} is not finite, because the input holds NaN or infinite values: give a number or "
                "a tensor"
            )
        return found
    is_number = isinstance(baseline, Real) and not isinstance(baseline, bool)
    if not isinstance(baseline, Tensor) and not is_number:
        raise MulticamError(
            f"the baseline of input {name!r} is a number, {', '.join(map(repr, get_args(Word)))} or a tensor, not {baseline!r}"
        )
    refuse_unreadable(f"the baseline of input {name!r}", baseline)
    given = baseline.detach() if isinstance(baseline, Tensor) else torch.tensor(float(baseline), dtype=torch.float64)
    if given.shape not in ((), leaf.shape, leaf.shape[1:], (1, *leaf.shape[1:])):
        raise MulticamError(
            f"the baseline {tuple(given.shape)} of input {name!r} does not fit it: it is {tuple(leaf.shape)}"
        )
    held = given.to(leaf.dtype)
    if not (leaf.is_floating_point() or leaf.is_complex() or torch.equal(held.to(given.dtype), given)):
        shown = "that was given" if given.ndim else given.item()
        raise MulticamError(f"input {name!r} is {leaf.dtype}, which cannot hold the baseline {shown}")
    return held.to(leaf.device).expand(leaf.shape).contiguous()  # a model may write into it


def _refuse_not_finite(given: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Refuse values that are not finite for inputs that are; one that holds such itself may be missing so.

    Args:
        given: The values and the input that they are for, by what they are.
    """
    bad = [
        f"{what} holds NaN or infinite values in {str(leaf.dtype).removeprefix('torch.')}, and the input none"
        for what, (values, leaf) in given.items()
        if not torch.isfinite(values).all() and torch.isfinite(leaf).all()
    ]
    if bad:
        raise MulticamError("; ".join(bad))


def _mean(image: Tensor) -> Tensor:
    axes = (-1,) if image.ndim == 3 else (-2, -1)
    return image.mean(axes, keepdim=True).expand(image.shape).contiguous()


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
