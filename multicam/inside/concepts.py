"""Deep feature factorisation: the few concepts that the activations of a layer are mixed from."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, overload

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from multicam.call.inputs import Inputs
from multicam.cam.base import LayersLike
from multicam.cam.laying import ONLY, laid, refuse_unseen
from multicam.errors import MulticamError
from multicam.watch.finite import first
from multicam.watch.layers import LayerLike
from multicam.watch.trace import Site, Trace
from multicam.watch.undisturbed import undisturbed, unwrapped

NEGLIGIBLE = 0.01  # the share of the activations' energy that may be negative without a word


@dataclass(frozen=True, eq=False)
class Concepts:
    """The concepts of one layer, the one with the most energy first.

    Attributes:
        maps: How strong each concept is in each place `(b k h w)`, 0..1 with 1 in the cell where it is strongest among
            all samples; laid on the input as the map of a `CAM` would be.
        vectors: The activations that each concept stands for where it is strongest `(k c)`.
        error: The share of the activations' energy that the concepts leave unexplained, 0..1.
        scores: What the head makes of each concept's vector `(k classes)`; None without a head.
    """

    maps: Float[Tensor, "b k *_"]
    vectors: Float[Tensor, "k c"]
    error: float
    scores: Float[Tensor, "k classes"] | None = None


@overload
def factorize(
    model: nn.Module,
    inputs: Any,
    layers: LayerLike,
    concepts: int = 5,
    *,
    head: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
) -> Concepts: ...


@overload
def factorize(
    model: nn.Module,
    inputs: Any,
    layers: Mapping[str, LayerLike],
    concepts: int = 5,
    *,
    head: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
) -> dict[str, Concepts]: ...


def factorize(
    model: nn.Module,
    inputs: Any,
    layers: LayersLike,
    concepts: int = 5,
    *,
    head: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
) -> Concepts | dict[str, Concepts]:
    """The concepts of a layer, or of each named layer, found in all samples together.

    `A ≈ S V` with `S, V >= 0`, where each row of A `(b cells, c)` is the activation of one cell of one sample, S says how
    much of each concept is in it, and V holds the concepts. Collins, Achanta and Süsstrunk 2018, arXiv:1806.10206, section 3.
    Concepts depend on no class and need no gradient. What several samples share is found if they are given together.

    The method is for activations that are not negative, as behind a ReLU. Negative ones are cut at zero; they count
    as unexplained, and a warning says so where they matter.

    Args:
        model: Any module; it is not changed.
        inputs: What it takes, see `Inputs.of`.
        layers: One layer or a mapping name -> layer, as for `CAM`.
        concepts: How many.
        head: What the model does behind the layer, from `(k c)` to scores `(k classes)`: for a pooled linear head that
            head. It says which classes each concept speaks for.
        seed: For the factorisation's start.

    Raises:
        MulticamError: If scikit-learn is missing, inputs or layers do not fit the model, or there are too many concepts.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
        >>> found = factorize(model, torch.rand(2, 3, 16, 16), "1", 3, head=model[4])
        >>> found.maps.shape, found.vectors.shape, found.scores.shape
        (torch.Size([2, 3, 16, 16]), torch.Size([3, 4]), torch.Size([3, 5]))
    """
    model = unwrapped(model)
    call = Inputs.of(inputs).bind(model)
    named = dict(layers) if isinstance(layers, Mapping) else {ONLY: layers}
    if not named:
        raise MulticamError("no layer to factorize; list_layers(model, inputs) shows those there are")
    nothing = torch.zeros(call.batch)
    trace = Trace(model, call, named, target=lambda _: nothing, output=lambda output: output)
    found = {name: _concepts(site, concepts, head, seed) for name, site in trace.sites.items()}
    return found if isinstance(layers, Mapping) else found[ONLY]


def _concepts(site: Site, k: int, head: Callable[[Tensor], Tensor] | None, seed: int) -> Concepts:
    refuse_unseen(site)
    label = site.trace.paths[site.name]
    cells = rearrange(site.acts, "b c ... -> (b ...) c")
    if not isinstance(k, int) or not 1 <= k <= min(cells.shape):
        raise MulticamError(
            f"layer {label!r} has {cells.shape[1]} channels in {cells.shape[0]} cells: it can have 1 to {min(cells.shape)} "
            f"concepts, not {k!r}"
        )
    energy = cells.square().sum()
    if not 0 < energy < torch.inf:
        raise MulticamError(
            f"the activations of layer {label!r} are {'zero everywhere' if energy == 0 else 'not finite'}"
        )
    negative = float(cells.clamp(max=0).square().sum() / energy)
    if negative > NEGLIGIBLE:
        warnings.warn(
            f"{100 * negative:.0f} % of the energy of layer {label!r} is negative, which concepts cannot explain and was cut: "
            "take a layer behind a ReLU if there is one",
            stacklevel=3,
        )
    strengths, vectors = _factors(cells.relu(), k, seed)
    error = float((cells - strengths @ vectors).square().sum() / energy)
    # A factorisation leaves the scale of a concept open: 1 is the strongest cell, so its vector is an activation there.
    top = strengths.amax(0)
    strengths, vectors = strengths / top.where(top > 0, 1), vectors * top[:, None]
    order = (strengths.square().sum(0) * vectors.square().sum(1)).argsort(descending=True)
    strengths, vectors = strengths[:, order], vectors[order]
    on_grid = strengths.T.reshape(len(order), len(site.acts), *site.acts.shape[2:])
    maps = torch.stack([laid(one, site) for one in on_grid], 1)
    return Concepts(maps, vectors, error, None if head is None else _scored(head, vectors))


def _factors(cells: Float[Tensor, "n c"], k: int, seed: int) -> tuple[Float[Tensor, "n k"], Float[Tensor, "k c"]]:
    """Non-negative S and V with S V as close to the cells as descent brings them."""
    try:
        from sklearn.decomposition import NMF  # type: ignore[import-untyped]
        from sklearn.exceptions import ConvergenceWarning  # type: ignore[import-untyped]
    except ImportError as error:
        raise MulticamError("concepts need scikit-learn: pip install scikit-learn") from error
    size = cells.square().mean().sqrt()  # the solver has absolute tolerances
    solver = NMF(k, init="nndsvda", random_state=seed, max_iter=500)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # how good it is, the error says
        strengths = solver.fit_transform((cells / size).cpu().numpy())
    return torch.from_numpy(strengths).to(cells), torch.from_numpy(solver.components_).to(cells) * size


def _scored(head: Callable[[Tensor], Tensor], vectors: Float[Tensor, "k c"]) -> Float[Tensor, "k classes"]:
    with undisturbed(head, graph=False) if isinstance(head, nn.Module) else torch.no_grad():
        scores = head(vectors)
    if not isinstance(scores, Tensor) or scores.ndim != 2 or len(scores) != len(vectors):
        given = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise MulticamError(f"the head returned {given} for {len(vectors)} concepts; it must return (k classes)")
    if not torch.isfinite(scores).all():
        raise MulticamError(f"the head's scores of concept {first(scores)} are NaN or infinite")
    return scores
