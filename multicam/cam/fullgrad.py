"""Full-gradients: a score taken apart into the input and the bias of every spatial layer."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import allow_mutation_on_saved_tensors

from multicam.call.inputs import Inputs, frames_second, wide
from multicam.call.scorer import OutputLike, Scorer, TargetLike, select_output
from multicam.cam.base import InputCAM, N
from multicam.errors import MulticamError
from multicam.maps import resized
from multicam.watch.backward import gradients
from multicam.watch.finite import Asked, check_gradient
from multicam.watch.layer_table import list_layers
from multicam.watch.layers import Layer, Tap, Taps
from multicam.watch.reshape import Reshape
from multicam.watch.undisturbed import undisturbed, unwrapped

BIASED = nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.Linear


class FullGrad(InputCAM[N]):
    """FullGrad: the strength of the input-gradient and of every bias-gradient, each rescaled, added up.

    `saliency = sum_c psi(x G_x) + sum_l sum_c psi(b_l G_l)` with `psi = upsample(rescale to 0..1(abs(·)))` for each
    channel. Srinivas and Fleuret 2019, arXiv:1905.00780, section 4. Rescaling takes the units away, so the scale means
    nothing, and nothing is negative: it says where, not how much or for what. `CompleteFullGrad` leaves out `psi`.

    The layers are the convolutions, normalisations and cell-wise linear layers whose output has a grid like the
    input's, each call of a shared one a term of its own. With several inputs, a layer's bias belongs to an input if
    the layer sees that one alone. The bias of a layer that sees several belongs to none of them and is left out, so an
    input that is fused with another from the first layer on has its input-gradient only. There `PackedModel` helps: it
    makes inputs of one size a single one, which has all biases in one map.

    Takes one forward pass for each floating-point input, to see what each layer sees, then one forward and one backward
    pass.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
        >>> FullGrad(model)(torch.rand(2, 3, 16, 16), target=3, signed=True).shape
        torch.Size([2, 16, 16])
    """

    comparable = False

    def evidence(self, call: Inputs, names: Sequence[str], target: TargetLike) -> dict[str, Tensor]:
        """The paper's post-processed map of each named input."""

        def drawn(term: Tensor, size: Sequence[int]) -> Tensor:
            strength = term.abs().flatten(2)
            strength = strength - strength.amin(2, keepdim=True)
            top = strength.amax(2, keepdim=True)
            # The channels are added before they are resized, which is linear.
            on_grid = reduce(strength / top.where(top > 0, 1), "b c n -> b n", "sum")
            return resized(on_grid.view_as(term[:, 0]), size)

        terms = full_gradients(self.model, call, names, target, self.output)
        return {name: _added(parts, drawn) for name, parts in terms.items()}


class CompleteFullGrad(InputCAM[N]):
    """FullGrad without post-processing: the evidence of the input and of every bias, with its sign, added up.

    `saliency = sum_c x G_x + sum_l sum_c b_l G_l`. In a network of ReLUs, linear layers and batch normalisation this is
    the whole score: the means of the signed maps and `b G` of the biases that belong to no place of one input (of the
    head, of layers that see several inputs) add up to it. Srinivas and Fleuret 2019, arXiv:1905.00780, section 3. Other
    activations, normalisation by the sample's own statistics and products of features break the sum.

    Layers and cost are those of `FullGrad`.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
        >>> x = torch.rand(2, 3, 16, 16)
        >>> evidence = CompleteFullGrad(model)(x, target=3, signed=True).mean((1, 2))
        >>> torch.allclose(evidence + model[4].bias[3], model(x)[:, 3], atol=1e-5)
        True
    """

    def evidence(self, call: Inputs, names: Sequence[str], target: TargetLike) -> dict[str, Tensor]:
        """The signed density of each named input."""

        def density(term: Tensor, size: Sequence[int]) -> Tensor:
            on_grid = reduce(term, "b c ... -> b ...", "sum") * term[0, 0].numel()
            laid = resized(on_grid, size)
            # Interpolation keeps the mean only nearly, and there may be a hundred terms.
            lost = on_grid.flatten(1).mean(1) - laid.flatten(1).mean(1)
            return laid + lost.view(-1, *[1] * len(size))

        terms = full_gradients(self.model, call, names, target, self.output)
        return {name: _added(parts, density) for name, parts in terms.items()}


def full_gradients(
    model: nn.Module, inputs: Any, names: Sequence[str], target: TargetLike = None, output: OutputLike = None
) -> dict[str, list[Float[Tensor, "b c *_"]]]:
    """The terms of each named image input: the input times its gradient, then each bias times its layer's gradient.

    The sum of a term is its part of the score; `FullGrad` says which layers have one.

    Args:
        model: Any module; it is not changed.
        inputs: What it takes, see `Inputs.of`.
        names: The image inputs.
        target: As for the call of a `CAM`.
        output: As for `CAM`.

    Raises:
        MulticamError: If an input has no gradient.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.AdaptiveMaxPool2d(1), nn.Flatten())
        >>> x = torch.rand(2, 3, 16, 16)
        >>> terms = full_gradients(model, x, ["input"], target=3)["input"]
        >>> [tuple(term.shape) for term in terms]
        [(2, 3, 16, 16), (2, 4, 14, 14), (2, 5, 12, 12)]
        >>> torch.allclose(sum(term.sum((1, 2, 3)) for term in terms), model(x)[:, 3], atol=1e-5)
        True
    """
    model = unwrapped(model)
    call = Inputs.of(inputs).bind(model)
    names = [call.name(name) for name in names]
    for name in names:
        if not call.leaves[name].is_floating_point():
            raise MulticamError(f"input {name!r} is {call.leaves[name].dtype}, which has no gradient: give it as float")
    biased = _biased_calls(model, call, names)
    taps = Taps(model, [layer for layer, _, _ in biased])
    images: dict[str, Tensor] = {}
    records: dict[int, Tensor] = {}

    def with_gradient(name: str, leaf: Any) -> Any:
        if name not in names:
            return leaf
        images[name] = leaf.requires_grad_()
        return leaf.clone()  # a model may write into its inputs

    def record(i: int, tap: Tap, x: Tensor) -> Tensor:
        records[i] = x
        return x.clone()  # and into what its layers return

    # The last of these is for models that cannot be trained as they are: they write into what backward will need.
    part = ("full gradients", *taps.names, *names)
    with undisturbed(model, graph=True, call=call, part=part) as memory, allow_mutation_on_saved_tensors():
        with taps.observe(record) as seen:
            returned = memory.call.map(with_gradient).run(model)
        scorer = Scorer(target, output)
        picked = select_output(returned, output)
        pinned = scorer.pinned(picked)
        scores = pinned.of_picked(picked, call.batch)
        Asked(model, call, pinned).check(scores)
        if not scores.requires_grad:
            raise _unreached(names[0])
        wanted = [*images.values(), *(records[i] for i in range(len(biased)))]
        reached = [x for x in wanted if x.requires_grad]
        gradient_of = dict(zip(map(id, reached), gradients(scores.sum(), reached), strict=True))
        found = [gradient_of.get(id(x)) for x in wanted]
    terms: dict[str, list[Tensor]] = {name: [] for name in names}
    for (_, owner, bias), tap, gradient in zip(biased, seen, found[len(images) :], strict=True):
        assert tap.layer.reshape is not None
        if gradient is not None:  # else the layer leads to another output
            check_gradient(gradient, f"layer {tap.label!r}")
            terms[owner].append(_product(bias, wide(gradient), tap.layer.reshape))
    for (name, image), gradient in zip(images.items(), found, strict=False):
        if gradient is None:
            raise _unreached(name)
        check_gradient(gradient, f"input {name!r}")
        terms[name].insert(0, _as_image(wide(image.detach()) * wide(gradient), terms[name]))
    return terms


def _biased_calls(model: nn.Module, call: Inputs, names: Sequence[str]) -> list[tuple[Layer, str, Tensor]]:
    """Each call of a layer with a bias that sees one of these inputs alone, that input, and the bias."""
    modules = dict(model.named_modules())
    for path, module in modules.items():
        if isinstance(getattr(module, "bias", None), Tensor) and _is_out_of_sight(module):
            raise MulticamError(
                f"FullGrad adds up what every bias brings, and TorchScript or torch.export runs layer {path!r} out of sight: explain the "
                "module that it was made of"
            )
    found = []
    for info in list_layers(model, call):
        path, _, number = info.path.partition("#")
        parent, _, last = path.rpartition(".")
        module = modules[path]
        if last == "drop" and isinstance(modules[parent], BIASED):
            bias = _bias(modules[parent])  # timm's normalisations activate too: their own output is behind the bias
        else:
            bias = None if isinstance(getattr(module, "drop", None), nn.Module) else _bias(module)
        if bias is not None and info.transformed:
            raise MulticamError(
                f"FullGrad adds up what every bias brings, and layer {info.path!r} runs inside of a transform of torch.func of the model's "
                "own: take another method"
            )
        if bias is None or info.grid is None or len(info.sees) != 1 or info.sees[0] not in names:
            continue
        if len(info.grid) == _axes(call.leaves[info.sees[0]]):
            found.append((Layer(module, call=int(number or 0), reshape=info.reshape), info.sees[0], bias))
    return found


def _is_out_of_sight(module: nn.Module) -> bool:
    """Whether a module with parameters never runs by being called: it is TorchScript, or nothing but a place for them."""
    return isinstance(module, torch.jit.ScriptModule) or type(module).forward is nn.Module.forward


def _bias(module: nn.Module) -> Tensor | None:
    """What an affine layer adds to each channel; None for all other modules."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
    if isinstance(mean, Tensor) and isinstance(variance, Tensor):
        # Batch normalisation: torch's classes, and those of others, such as the frozen ones of detectors.
        shift = -mean * (variance + getattr(module, "eps", 1e-5)).rsqrt()
        shift = shift if weight is None else shift * weight
        bias = shift if bias is None else shift + bias
    elif not isinstance(module, BIASED):
        return None
    return wide(bias.detach()) if isinstance(bias, Tensor) else None


def _product(bias: Tensor, gradient: Tensor, reshape: Reshape) -> Float[Tensor, "b c *grid"]:
    on_grid = reshape(gradient)
    if bias.shape == on_grid.shape[1:2]:
        return on_grid * bias.view(-1, *[1] * (on_grid.ndim - 2))
    return reshape(gradient * bias)  # a layer along other axes than the channels


def _axes(image: Tensor) -> int:
    return 3 if image.ndim == 5 else 2


def _as_image(x: Tensor, others: Sequence[Tensor]) -> Float[Tensor, "b c *_"]:
    """An image, clip or volume with its channels on the second axis; other axes count as channels."""
    if x.ndim == 5:
        return frames_second(x, others[0].shape[2] if others else None)
    return rearrange(x, "b ... h w -> b (...) h w")


def _added(terms: Sequence[Tensor], draw: Callable[[Tensor, Sequence[int]], Tensor]) -> Tensor:
    size = terms[0].shape[2:]
    total = draw(terms[0], size)
    for term in terms[1:]:
        total = total + draw(term, size)
    return total


def _unreached(name: str) -> MulticamError:
    return MulticamError(
        f"no gradient of the target reaches input {name!r}: the model ignores it, or detaches what it makes of it; name the "
        "other inputs (inputs=…), or take a method that needs no gradients, such as RISE"
    )
