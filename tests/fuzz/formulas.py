"""The formulas of maps, as they stand in their papers, for one sample: activations, gradients and saliency."""

from collections.abc import Callable

import torch
from torch import Tensor

from tests.fuzz.layers import Place, activations, layer_gradients
from tests.fuzz.naive import Case

Formula = Callable[[Tensor, Tensor], Tensor]  # of activations and gradients `(c *grid)`


def over_grid(x: Tensor) -> Tensor:
    """The sum of each channel, on axes that broadcast."""
    return x.flatten(1).sum(1).view(-1, *[1] * (x.ndim - 1))


def plus_plus(a: Tensor, g: Tensor) -> Tensor:
    alpha = g**2 / (2 * g**2 + over_grid(a) * g**3)
    return over_grid(alpha.where(g != 0, 0) * g.relu()) * a


def component(x: Tensor) -> Tensor:
    """The cells on their first principal component, with the sign of their sums; NaN where these say nothing."""
    cells = x.flatten(1).mT
    centred = cells - cells.mean(0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    return signed(centred @ directions[0], centred).view(x.shape[1:])


def signed(found: Tensor, centred: Tensor) -> Tensor:
    if centred.sum(1).abs().max() <= 1e-4 * centred.abs().sum(1).max():
        return found * (0 if len(found) == 1 else torch.nan)
    return found * (found @ centred.sum(1)).sign()


def kernel_component(x: Tensor) -> Tensor:
    cells = x.flatten(1).mT
    centred = cells - cells.mean(0)
    middle = torch.eye(len(cells), dtype=x.dtype) - 1 / len(cells)
    values, vectors = torch.linalg.eigh(middle @ (centred @ centred.mT / len(x) + 1).tanh() @ middle)
    if values[-1] < 1e-8:  # of numbers around one: rounding counts
        return torch.full(x.shape[1:], torch.nan, dtype=x.dtype)
    return signed(vectors[:, -1] * values[-1].clamp(min=0).sqrt(), centred).view(x.shape[1:])


def extreme_positive(found: Tensor) -> Tensor:
    return -found if found.max() + found.min() < -1e-8 * found.abs().max() else found


def standing_out(a: Tensor) -> Tensor:
    limit = (over_grid(a) / a[0].numel()) + 2 * a.flatten(1).std(1, correction=0).view(-1, *[1] * (a.ndim - 1))
    return (over_grid((a > limit).to(a)) / a[0].numel() * a).sum(0)


def at_random(a: Tensor) -> Tensor:
    weights = 2 * torch.rand(len(a), generator=torch.Generator().manual_seed(0)) - 1
    return torch.einsum("c, c... -> ...", weights.to(a), a)


# From one forward and one backward pass.
ONE_PASS: dict[str, Formula] = {
    "GradCAM": lambda a, g: (over_grid(g) / g[0].numel() * a).sum(0),
    "HiResCAM": lambda a, g: (g * a).sum(0),
    "GradCAMElementWise": lambda a, g: (g * a).relu().sum(0),
    "LayerCAM": lambda a, g: (g.relu() * a).sum(0),
    "XGradCAM": lambda a, g: (over_grid(g * a) / over_grid(a) * a).sum(0),
    "GradCAMPlusPlus": lambda a, g: plus_plus(a, g).sum(0),
    "EigenGradCAM": lambda a, g: component(g * a),
    "SegEigenCAM": lambda a, g: extreme_positive(component(g.abs() * a)),
}
# From the forward pass alone.
NO_GRADIENT: dict[str, Callable[[Tensor], Tensor]] = {
    "EigenCAM": component,
    "KPCACAM": kernel_component,
    "FEM": standing_out,
    "RandomCAM": at_random,
}


def saliency(case: Case, place: Place, method: str) -> Tensor:
    """The saliency of all samples `(b *grid)`."""
    found = []
    for row in range(case.spec.batch):
        a = activations(case, place, row)
        if method in NO_GRADIENT:
            found.append(NO_GRADIENT[method](a))
        elif method == "ShapleyCAM":
            slope = layer_gradients(case, place, row) - layer_gradients(case, place, row, curved=True) / 2
            found.append(ONE_PASS["GradCAM"](a, slope))
        else:
            found.append(ONE_PASS[method](a, layer_gradients(case, place, row)))
    return torch.stack(found)
