"""Is a map faithful: what becomes of the score when the input is changed where the map says."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from multicam.call.scorer import OutputLike, TargetLike
from multicam.errors import MulticamError
from multicam.watch.trace import Trace

# What each of the eight neighbours of a pixel weighs: rows down, columns right, weight.
NEIGHBOURS = [(y, x, 1 / 12 if y and x else 1 / 6) for y in (-1, 0, 1) for x in (-1, 0, 1) if y or x]


def score_change(
    model: nn.Module, inputs: Any, changed: Any, target: TargetLike = None, *, output: OutputLike = None
) -> Float[Tensor, " b"]:
    """By how much each sample's score is higher for the changed inputs.

    A target that chooses, as None does, keeps what it chose for the unchanged inputs.

    Args:
        model: Any module; it is not changed.
        inputs: What it takes, see `Inputs.of`.
        changed: The same call with other values.
        target: As for the call of a `CAM`.
        output: As for `CAM`.

    Example:
        >>> model, x = nn.Sequential(nn.Flatten(), nn.Linear(12, 5, bias=False)), torch.rand(2, 3, 2, 2)
        >>> torch.allclose(score_change(model, x, 2 * x, target=3), model(x)[:, 3])
        True
    """
    trace = Trace(model, inputs, {}, target, output)
    return trace.again(changed).scores - trace.scores


def impute(
    images: Float[Tensor, "b c h w"], known: Bool[Tensor, "b h w"], *, noise: float = 0.01, seed: int = 0
) -> Float[Tensor, "b c h w"]:
    """The images with every pixel that is not known replaced by the weighted mean of its neighbours.

    The unknown pixels depend on each other, so `sum_j w_ij (x_j - x_i) = 0` is solved for all of them, with weights of
    1/6 for the four nearest neighbours and 1/12 for the diagonal ones; then noise is added, so that the model cannot
    tell them by their smoothness. Rong et al. 2022, arXiv:2202.00449, section 5. An image of which nothing is known
    becomes its mean colour.

    Args:
        images: The images.
        known: Which pixels stay.
        noise: The standard deviation of the noise.
        seed: Of the noise; the global random state is not used.

    Example:
        >>> image, known = torch.arange(9.0).view(1, 1, 3, 3), torch.ones(1, 3, 3, dtype=torch.bool)
        >>> known[0, 1, 1] = False
        >>> impute(image, known, noise=0.0).flatten()[4]
        tensor(4.)
    """
    generator = torch.Generator().manual_seed(seed)
    filled = images.clone()
    for image, keep in zip(filled, known, strict=True):
        values = torch.from_numpy(_solved(image.detach().double().cpu().numpy(), keep.cpu().numpy()))
        values = values + noise * torch.randn(values.shape, generator=generator, device="cpu")
        image[:, ~keep] = (values if image.is_floating_point() else values.round()).to(image)
    return filled


def _solved(image: Float[np.ndarray, "c h w"], known: Bool[np.ndarray, "h w"]) -> Float[np.ndarray, "c n"]:
    """The values of the `n` unknown pixels."""
    try:
        from scipy.sparse import coo_matrix  # type: ignore[import-untyped]
        from scipy.sparse.linalg import spsolve  # type: ignore[import-untyped]
    except ImportError as error:
        raise MulticamError("imputing pixels needs SciPy: pip install scipy") from error
    rows, columns = np.nonzero(~known)
    n = len(rows)
    if not known.any():
        return np.repeat(image.mean((1, 2))[:, None], n, 1)
    number = np.zeros(known.shape, np.intp)
    number[rows, columns] = np.arange(n)
    weight_sum, given = np.zeros(n), np.zeros((n, len(image)))
    entries: list[tuple[Any, Any, Any]] = []
    for down, right, weight in NEIGHBOURS:
        y, x = rows + down, columns + right
        inside = np.flatnonzero((y >= 0) & (y < known.shape[0]) & (x >= 0) & (x < known.shape[1]))
        weight_sum[inside] += weight
        there = known[y[inside], x[inside]]
        sure, unsure = inside[there], inside[~there]
        given[sure] += weight * image[:, y[sure], x[sure]].T
        entries.append((unsure, number[y[unsure], x[unsure]], np.full(len(unsure), -weight)))
    entries.append((np.arange(n), np.arange(n), weight_sum))
    at, of, value = (np.concatenate(parts) for parts in zip(*entries, strict=True))
    return np.asarray(spsolve(coo_matrix((value, (at, of)), shape=(n, n)).tocsc(), given)).reshape(n, -1).T
