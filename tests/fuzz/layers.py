"""The truth about layers by brute force: what they return, the score's gradient by it, and maps made of both."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.fuzz.models import WIDTH, build
from tests.fuzz.naive import Case, NoAnswerError, clone


@dataclass(frozen=True)
class Place:
    """A layer: which of its calls, and the grid of what it returns, an image `(b c *grid)` or tokens `(b n c)`."""

    path: str
    call: int
    calls: int
    grid: tuple[int, ...]
    tokens: bool
    pick: int | None = None
    onto: str | None = None
    size: tuple[int, ...] = ()


def places(case: Case) -> list[Place]:
    """The layers that return an image or tokens for the batch."""
    model = build(case.spec).eval()
    seen: dict[str, list[Any]] = {}
    for path, module in model.named_modules():
        module.register_forward_hook(lambda m, i, o, path=path: seen.setdefault(path, []).append(clone(main(o))))
    with torch.no_grad():
        case.logits(case.values, model)
    other = build(case.spec).eval()
    calls: dict[str, int] = {}
    for path, module in other.named_modules():
        module.register_forward_hook(lambda m, i, o, path=path: calls.update({path: calls.get(path, 0) + 1}))
    case.logits(case.row(0), other)
    found = []
    for path, outputs in seen.items():
        if isinstance(module := model.get_submodule(path), nn.MultiheadAttention) and not module.batch_first:
            continue
        if len(outputs) > 1 and case.spec.runs.startswith("threads"):  # which call is which, is decided by chance
            continue
        for call, x in enumerate(outputs):
            if not isinstance(x, Tensor) or x.ndim not in (3, 4) or len(x) != case.spec.batch or not path:
                continue
            if calls.get(path) != len(outputs) or x.shape[1 if x.ndim == 4 else 2] != WIDTH:
                continue
            grid = tuple(x.shape[2:]) if x.ndim == 4 else (x.shape[1],)
            # A recurrent layer returns its last state beside its outputs.
            pick = 0 if isinstance(model.get_submodule(path), nn.GRU) else None
            place = Place(path, call, len(outputs), grid, x.ndim == 3, pick, None, grid)
            alone = torch.stack([activations(case, place, sample) for sample in range(len(x))])
            if torch.allclose(alone, channels_second(x, place), 1e-9, 1e-9) and _is_apart(
                case, place
            ):  # else a row has two truths
                found += _laid(case, place)
    return found


def _is_apart(case: Case, place: Place) -> bool:
    """Whether the model returns the same with a copy of the layer's output in between: else its output is another tensor, too."""
    model = case.model()
    with tapped(model, place, torch.clone), torch.no_grad():
        return abs(float(case.score(0, None, model)) - case.value(0)) <= 1e-9 * case.size


def _laid(case: Case, place: Place) -> Iterator[Place]:
    """The layer with an input that it sees and that its map can lie on; without one, where the map stays on its grid."""
    for stream in case.spec.streams:
        x = case.values[stream.name]
        fits = x.ndim < 4 and x.shape[1:2] == place.grid if place.tokens else x.ndim == 4
        if fits and not torch.equal(activations(case, place, 0), activations(case, place, 0, stream.name)):
            yield replace(place, onto=stream.name, size=place.grid if place.tokens else tuple(x.shape[2:]))
            return
    tensors = [x for x in case.values.values() if isinstance(x, Tensor)]
    if len([x for x in tensors if x.ndim > 3] or tensors) > 1:
        yield place


def main(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def tapped(model: nn.Module, place: Place, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """With the output of a layer's call changed, for the model and for all other hooks."""
    calls = iter(range(100))

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if next(calls) != place.call:
            return None
        changed = change(main(output))
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = model.get_submodule(place.path).register_forward_hook(hook, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def channels_second(x: Tensor, place: Place) -> Tensor:
    return x.mT if place.tokens else x


@lru_cache(maxsize=32)
def activations(case: Case, place: Place, sample: int, other: str | None = None) -> Tensor:
    """What the layer returns for a sample alone `(c *grid)`, with its own inputs or with another value in one."""
    model, kept = case.model(), []
    change = {} if other is None else {other: another(case.sample(other, sample))}

    def keep(x: Tensor) -> Tensor:
        kept.append(x.detach().clone())
        return x.clone()

    with tapped(model, place, keep), torch.no_grad():
        case.logits(case.row(sample, change), model)
    return channels_second(kept[0], place)[0]


def another(x: Tensor) -> Tensor:
    return 0.5 - 1.7 * x if x.is_floating_point() else 7 - x


@lru_cache(maxsize=32)
def layer_gradients(case: Case, place: Place, sample: int, curved: bool = False) -> Tensor:
    """The gradient of a sample's score by what the layer returns `(c *grid)`: what something added to it does.

    Or the Hessian times what it returns.
    """
    model, kept = case.model(), []

    def plus(x: Tensor) -> Tensor:
        kept.append(torch.zeros_like(x, requires_grad=True))
        kept.append(x.detach().clone())
        return x + kept[0]

    with tapped(model, place, plus), sdpa_kernel(SDPBackend.MATH):
        score = case.score(sample, None, model)
    if not score.requires_grad:
        raise NoAnswerError("there is no graph")
    try:
        (found,) = torch.autograd.grad(score, kept[0], allow_unused=True, create_graph=curved)
        if curved and found is not None and found.requires_grad:
            (found,) = torch.autograd.grad(found, kept[0], kept[1], materialize_grads=True)
        elif curved and found is not None:
            found = torch.zeros_like(found)
    except RuntimeError as error:
        raise NoAnswerError(f"no gradient: {error}") from error
    if found is None:
        raise NoAnswerError("no gradient arrives at the layer")
    return channels_second(found, place)[0]


def without_channel(case: Case, place: Place, sample: int, channel: int) -> float:
    """The score of a sample with a channel of the layer at zero."""
    model = case.model()

    def zero(x: Tensor) -> Tensor:
        x = x.clone()
        channels_second(x, place)[:, channel] = 0
        return x

    with tapped(model, place, zero), torch.no_grad():
        return float(case.score(sample, None, model))


def density(saliency: Tensor, size: Sequence[int]) -> Tensor:
    """A saliency `(b *grid)` as a map of this size."""
    found = saliency * saliency[0].numel()
    if tuple(size) == tuple(saliency.shape[1:]):
        return found
    mode = "linear" if len(size) == 1 else "bilinear"
    return F.interpolate(found[:, None], tuple(size), mode=mode, align_corners=False)[:, 0]


def ablation(case: Case, place: Place) -> Tensor:
    maps = []
    for sample in range(case.spec.batch):
        acts, score = activations(case, place, sample), case.value(sample)
        drops = [score - without_channel(case, place, sample, channel) for channel in range(len(acts))]
        maps.append(sum(drop * channel for drop, channel in zip(drops, acts, strict=True)))
    return torch.stack(maps)


def masking(
    case: Case, place: Place, masked: Sequence[str], changes: Sequence[Callable[[Tensor, int], Tensor]]
) -> Tensor:
    """Channels weighted by the softmax of the mean scores of inputs that are seen through them."""
    maps = []
    for sample in range(case.spec.batch):
        acts, scores = activations(case, place, sample), []
        for i, channel in enumerate(acts):
            found = 0.0
            for change in changes:
                changed = {}
                for name in masked:
                    x = case.sample(name, sample)
                    mask = F.interpolate(channel[None, None], x.shape[2:], mode="bilinear", align_corners=False)
                    spread = mask.max() - mask.min()
                    changed[name] = x * change(
                        (mask - mask.min()) / (spread if channel.max() > channel.min() else 1), i
                    )
                found += case.value(sample, changed) / len(changes)
            scores.append(found)
        weights = torch.tensor(scores, dtype=torch.float64).softmax(0)
        maps.append(sum(weight * channel for weight, channel in zip(weights, acts, strict=True)))
    return torch.stack(maps)
