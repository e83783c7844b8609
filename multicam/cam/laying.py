"""From saliency on a layer's grid to a map on an input."""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from multicam.call.inputs import Inputs, frames_second
from multicam.errors import MulticamError
from multicam.maps import resized
from multicam.watch.placing import Placed
from multicam.watch.reshape import Tokens
from multicam.watch.survey import named_input
from multicam.watch.trace import Site

ONLY = ""  # the name inside of a single, unnamed layer, which no input can have


def laid(grid_map: Float[Tensor, "b *grid"], site: Site) -> Tensor:
    """The map on the input it belongs to, at that input's size; on its own grid where it belongs to none."""
    inputs, reshape = site.trace.inputs, site.layer.reshape
    name, said = input_of(site, inputs)
    if name is None:
        return grid_map
    if isinstance(reshape, Placed) and reshape.onto == name and grid_map.shape[1:] == reshape.grid:
        return reshape.laid(grid_map)
    size = spatial_size(inputs.leaves[name], tuple(grid_map.shape[1:]), isinstance(site.layer.reshape, Tokens))
    if size is None:
        if not said:
            return grid_map
        leaf = inputs.leaves[name]
        given = tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
        raise MulticamError(
            f"the map of layer {shown(site)!r} has the grid {tuple(grid_map.shape[1:])}, which cannot be laid on input "
            f"{name!r} ({given}); name the input it belongs to with Layer(…, onto=…), or name the map otherwise to keep "
            "it on its grid"
        )
    return resized(grid_map, size)


def refuse_unseen(site: Site) -> None:
    """Refuse to lay a map on an input that its layer does not see.

    A layer whose grid a pass showed is refused before; here are those whose grid the caller says, where nobody named the input, and calls of a
    shared module, whose numbers do not tell what they see.
    """
    inputs = site.trace.inputs
    name, said = input_of(site, inputs)
    doubtful = site.name in site.trace.shared or not said
    if name is None or len(inputs.leaves) == 1 or not doubtful or site.trace.sees(site.name, name):
        return
    seen = [other for other in inputs.images if other != name and site.trace.sees(site.name, other)]
    raise MulticamError(
        f"layer {site.trace.paths[site.name]!r} does not see input {name!r}, on which its map would be laid"
        + (f"; it sees {', '.join(map(repr, seen))}" if seen else "")
        + "; list_layers(model, inputs) shows what each call sees"
    )


def input_of(site: Site, inputs: Inputs) -> tuple[str | None, bool]:
    """The input that a map is laid on, and whether the caller said so."""
    said = named_input(site.name, site.layer, inputs)
    if said is not None:
        return said, True
    tensors = list(inputs.images) or [name for name, leaf in inputs.leaves.items() if isinstance(leaf, Tensor)]
    return (tensors[0], False) if len(tensors) == 1 else (None, False)


def spatial_size(leaf: Any, grid: tuple[int, ...], tokens: bool) -> tuple[int, ...] | None:
    """The size of an input along the axes of a map with this grid."""
    axes = len(grid)
    if not isinstance(leaf, Tensor) or not 1 <= axes <= 3 or leaf.ndim < axes + 1:
        return None
    shape = tuple(leaf.shape)
    if axes == 2:
        return shape[-2:]
    if axes == 3 and leaf.ndim == 5:
        return tuple(frames_second(leaf, grid[0]).shape[2:])
    if tokens and leaf.ndim == 3 and grid == shape[1:2]:
        return shape[1:2]  # features (b n c), one cell for each
    return shape[-axes:] if leaf.ndim <= axes + 2 else None


def shown(site: Site) -> str:
    """What the caller called the layer."""
    return site.trace.paths[site.name] if site.name == ONLY else site.name
