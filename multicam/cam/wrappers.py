"""Refinements of any method's maps: each takes a CAM and is one itself, so that they nest."""

from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import isabstract
from math import isfinite
from typing import Any, cast

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from multicam.call.inputs import Inputs, as_names
from multicam.call.samples import is_image
from multicam.call.scorer import Scorer, TargetLike, as_target
from multicam.call.targets.scores import ClassScore, TopClass
from multicam.cam.base import CAM, L
from multicam.cam.components import first_component
from multicam.cam.laying import ONLY, input_of
from multicam.cam.weighted import WeightedCAM
from multicam.errors import MulticamError, number
from multicam.maps import Maps
from multicam.watch.finite import AUGMENTED
from multicam.watch.trace import Site, Trace


class Wrapper(CAM[L], ABC):
    """A CAM made of another one: same model, layers and output, and whatever the wrapper does not change.

    Args:
        cam: The CAM to refine; it may be a wrapper itself.
    """

    def __init__(self, cam: CAM[L]) -> None:
        if not isinstance(cam, CAM):  # callers without a type checker
            raise MulticamError(f"{type(self).__name__} refines a CAM, such as GradCAM(model, layers), not {cam!r}")
        layers = cast(L, cam.layers if cam.named else cam.layers[ONLY])  # one or a mapping, as it was given
        super().__init__(cam.model, layers, output=cam.output)
        self.cam = cam
        self.comparable = cam.comparable

    def saliency(self, site: Site) -> Float[Tensor, "b *grid"]:
        """The inner CAM's."""
        return self.cam.saliency(site)

    def trace(self, inputs: Any, target: TargetLike = None) -> Trace:
        """The inner CAM's."""
        return self.cam.trace(inputs, target)

    def sources(self, trace: Trace) -> dict[str, list[Site]]:
        """The sites that each map is made of, by the name of the map."""
        return _sources(self.cam, trace)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.cam!r})"


def _sources(cam: CAM, trace: Trace) -> dict[str, list[Site]]:
    if isinstance(cam, Wrapper):
        return cam.sources(trace)
    return {name: [site] for name, site in trace.sites.items()}


class EigenSmoothed(Wrapper[L]):
    """The first principal component of the weighted activations, instead of their sum over channels.

    `saliency = (W - mean_ij W) v_1` with `W` the method's `weighted` activations, which drops what few channels say
    against many; pytorch-grad-cam's `eigen_smooth`. A component has no sign of its own; it is given the one that
    agrees with the sum. Its scale means nothing. Takes no further pass.

    Args:
        cam: A method that weighs channels (`GradCAM`, `LayerCAM` …), or `FinerCAM` of one.

    Raises:
        MulticamError: If the method has no weighted channels.

    Example:
        >>> from torch import nn
        >>> from multicam import GradCAM
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
        >>> EigenSmoothed(GradCAM(model, "1"))(torch.rand(2, 3, 16, 16), target=3, signed=True).shape
        torch.Size([2, 16, 16])
    """

    def __init__(self, cam: CAM[L]) -> None:
        super().__init__(cam)
        method = cam
        while isinstance(method, FinerCAM):  # changes the score only
            method = method.cam
        if not isinstance(method, WeightedCAM):
            outside = isinstance(method, Wrapper) and not isinstance(method, EigenSmoothed)
            advice = f"; smooth inside of it: {type(method).__name__}(EigenSmoothed(…))" if outside else ""
            raise MulticamError(
                f"EigenSmoothed needs a method with weighted channels, which {type(method).__name__} has not{advice}. "
                f"Those that have: {', '.join(sorted(_concrete(WeightedCAM)))}"
            )
        self.method = method
        self.comparable = False

    def saliency(self, site: Site) -> Float[Tensor, "b *grid"]:
        """The projection of the weighted activations on their first principal component."""
        return first_component(self.method.weighted(site))


def _concrete(method: type) -> set[str]:
    below: list[type] = method.__subclasses__()
    return {m.__name__ for m in below if not isabstract(m)}.union(*map(_concrete, below))


class Moving(Wrapper[L], ABC):
    """A wrapper that mirrors, scales or cuts some of the inputs, together, and undoes it on their maps.

    Args:
        cam: The CAM to refine.
        inputs: The image inputs that are pictures of one scene. A spectrum is not one: its left and right are not the
            scene's. Needed where there are several image inputs.
    """

    def __init__(self, cam: CAM[L], inputs: str | Sequence[str] | None = None) -> None:
        super().__init__(cam)
        self.inputs = as_names(inputs)

    def pictures(self, inputs: Inputs) -> dict[str, Tensor]:
        """The inputs to change, by full name.

        Raises:
            MulticamError: If there is no such image input, or it was not said which of several.
        """
        images = inputs.images
        listed = ", ".join(map(repr, images)) or "none"
        if self.inputs is None and len(images) != 1:
            raise MulticamError(
                f"{type(self).__name__} changes pictures of the scene together; say which inputs are some with inputs=…; "
                f"the image inputs are: {listed}"
            )
        names = list(images) if self.inputs is None else [inputs.name(name) for name in self.inputs]
        wrong = [name for name in names if not is_image(inputs.leaves[name])]
        if wrong or not names:
            raise MulticamError(
                f"{wrong[0] if wrong else 'nothing'!r} is no image input; the image inputs are: {listed}"
            )
        return {name: inputs.leaves[name].detach() for name in names}

    def follows(self, trace: Trace) -> dict[str, bool]:
        """Whether each map moves with the pictures, by the input it lies on, else by the inputs that its layer sees.

        Raises:
            MulticamError: If a layer on whose grid a map stays sees pictures and other images.
        """
        pictures = self.pictures(trace.inputs)
        return {name: self._follows(name, sites[0], pictures) for name, sites in self.sources(trace).items()}

    def _follows(self, name: str, site: Site, pictures: Mapping[str, Tensor]) -> bool:
        inputs = site.trace.inputs
        on, _ = input_of(site, inputs)
        seen = [image for image in inputs.images if site.trace.sees(site.name, image)] if on is None else [on]
        moved = [image for image in seen if image in pictures]
        shown = site.trace.paths[site.name] if name == ONLY else name
        if moved and len(moved) < len(seen):
            rest = ", ".join(repr(image) for image in seen if image not in pictures)
            raise MulticamError(
                f"the map of {shown!r} lies on no input, and its layer sees both {', '.join(map(repr, moved))}, which "
                f"{type(self).__name__} changes, and {rest}, which it does not; say on which input the map lies with "
                "Layer(…, onto=…)"
            )
        if moved and site.acts.ndim < 4:
            raise MulticamError(
                f"the map of {shown!r} has the grid {tuple(site.acts.shape[2:])}, on which {type(self).__name__} cannot "
                "follow a picture; give the layer a grid of two axes with Layer(…, reshape=…)"
            )
        return bool(moved)


class Augmented(Moving[L]):
    """Test-time augmentation: the mean of the maps for the inputs as they are and mirrored, each made darker and brighter.

    `map = mean over f, s of f^-1(CAM(s f(x)))`, f the identity or the mirror, s the factors; pytorch-grad-cam's
    `aug_smooth`. The class is the one chosen for the inputs as they are. Takes `2 len(factors)` passes instead of one.

    Args:
        cam: The CAM to refine.
        inputs: The image inputs that are pictures of one scene, and mirrored and multiplied together; all else stays
            as it is. Needed where there are several image inputs.
        flip: Whether to mirror left to right.
        factors: What the pictures are multiplied by. A picture of integers takes `(1.0,)` only.

    Example:
        >>> from torch import nn
        >>> from multicam import GradCAM
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
        >>> Augmented(GradCAM(model, "1"))(torch.rand(2, 3, 16, 16), target=3, signed=True).shape
        torch.Size([2, 16, 16])
    """

    def __init__(
        self,
        cam: CAM[L],
        inputs: str | Sequence[str] | None = None,
        *,
        flip: bool = True,
        factors: Sequence[float] = (0.9, 1.0, 1.1),
    ) -> None:
        super().__init__(cam, inputs)
        numbers = factors if isinstance(factors, Sequence) else []
        if not numbers or not all(isfinite(number("a factor", factor)) and factor for factor in numbers):
            raise MulticamError(f"factors are numbers other than 0, as in (0.9, 1.0, 1.1), not {factors!r}")
        self.flip = flip
        self.factors = tuple(factors)

    def maps(self, trace: Trace, *, signed: bool = False) -> Maps:
        """The mean of the inner maps over the augmentations; the trace itself is the pass of the unchanged inputs."""
        pictures = self.pictures(trace.inputs)
        integers = [name for name, leaf in pictures.items() if not (leaf.is_floating_point() or leaf.is_complex())]
        if integers and set(self.factors) != {1.0}:
            raise MulticamError(
                f"input {integers[0]!r} is {pictures[integers[0]].dtype}, which cannot be multiplied by {self.factors}; "
                "give floating-point values, or Augmented(…, factors=(1.0,))"
            )
        follows = self.follows(trace) if self.flip else {}
        found: dict[str, list[Tensor]] = {}
        for mirror in (False, True) if self.flip else (False,):
            for factor in self.factors:
                changed = {name: _varied(leaf, mirror, factor) for name, leaf in pictures.items()}
                same = factor == 1 and not mirror
                varied = trace if same else trace.again(trace.inputs.replace(changed), how=AUGMENTED)
                for name, m in self.cam.maps(varied, signed=signed).items():
                    found.setdefault(name, []).append(m.flip(-1) if mirror and follows[name] else m)
        return Maps({name: torch.stack(maps).mean(0) for name, maps in found.items()}, self.comparable)


def _varied(leaf: Tensor, mirror: bool, factor: float) -> Tensor:
    leaf = leaf.flip(-1) if mirror else leaf
    return leaf if factor == 1 else leaf * factor


class FinerCAM(Wrapper[L]):
    """Finer-CAM: what tells a class from those most similar to it.

    `score = y_c - alpha sum_k(w_k y_k)`, k the classes whose scores are nearest to `y_c` and `w` the softmax over their
    scores. Zhang et al. 2025, arXiv:2501.11309, with the weights of pytorch-grad-cam. The similar classes are chosen
    in the pass that is explained, so that it takes no further one.

    Args:
        cam: The CAM to refine.
        alpha: How much the similar classes count; 0 leaves the CAM as it is.
        similar: Which classes, as ranks by closeness of their scores: 1 is the nearest.

    Raises:
        MulticamError: When called with a target that is not a class, or a model with fewer classes than ranks.

    Example:
        >>> from torch import nn
        >>> from multicam import GradCAM
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
        >>> FinerCAM(GradCAM(model, "1"))(torch.rand(2, 3, 16, 16), target=3, signed=True).shape
        torch.Size([2, 16, 16])
    """

    def __init__(self, cam: CAM[L], alpha: float = 1.0, similar: Sequence[int] = (1, 2, 3)) -> None:
        super().__init__(cam)
        ranks = similar if isinstance(similar, Sequence) else []
        if not ranks or not all(isinstance(rank, int) and rank >= 1 for rank in ranks):
            raise MulticamError(f"similar classes are ranks from 1, the nearest, as in (1, 2, 3), not {similar!r}")
        self.alpha = alpha
        self.similar = tuple(similar)

    def trace(self, inputs: Any, target: TargetLike = None) -> Trace:
        """The inner CAM's, of the difference between the class and those similar to it."""
        main = as_target(target)
        if not isinstance(main, ClassScore | TopClass):
            raise MulticamError(
                f"FinerCAM compares classes: its target is None, a class or one per sample, not {target!r}"
            )
        return self.cam.trace(inputs, FinerScore(main, self.alpha, self.similar))

    def maps(self, trace: Trace, *, signed: bool = False) -> Maps:
        """The inner CAM's."""
        return self.cam.maps(trace, signed=signed)


@dataclass(frozen=True)
class FinerScore:
    """The score of a class less that of the classes nearest to it, which it chooses from the output; see `FinerCAM`."""

    main: ClassScore | TopClass
    alpha: float
    similar: tuple[int, ...]

    def __call__(self, output: Any) -> Float[Tensor, " b"]:
        """The scores `(b,)`."""
        return self.pin(output)(output)

    def pin(self, output: Any) -> "FinerContrast":
        """The score with the classes chosen."""
        main = Scorer(self.main).pinned(output).target
        assert isinstance(main, ClassScore)
        scores = main(output)  # refuses classes and outputs that do not fit
        batch, classes = output.shape
        if max(self.similar) >= classes:
            raise MulticamError(
                f"similar={self.similar} needs {max(self.similar)} classes besides the target, but the output has "
                f"{classes} in all" + (f"; FinerCAM(…, similar={tuple(range(1, classes))})" if classes > 1 else "")
            )
        index = (main.index,) * batch if isinstance(main.index, int) else main.index
        own = torch.tensor(index, device=output.device) % classes
        distance = (output - scores[:, None]).detach().abs()
        distance[torch.arange(batch, device=output.device), own] = -1  # in front of classes with the very same score
        nearest = distance.argsort(dim=1, stable=True)[:, list(self.similar)]
        return FinerContrast(tuple(own.tolist()), tuple(map(tuple, nearest.tolist())), self.alpha)


@dataclass(frozen=True)
class FinerContrast:
    """The score of one class per sample less the weighted mean score of the others chosen for it; see `FinerCAM`."""

    index: tuple[int, ...]
    others: tuple[tuple[int, ...], ...]
    alpha: float

    def __call__(self, output: Any) -> Float[Tensor, " b"]:
        """The scores `(b,)`."""
        own = ClassScore(self.index)(output)
        others: Tensor = output.gather(1, torch.tensor(self.others, device=output.device))
        # A class that the model masks out has no weight, and no part in the sum; -inf times 0 would be NaN.
        return own - self.alpha * (others.softmax(1) * others.masked_fill(others == -torch.inf, 0)).sum(1)

    def take(self, samples: Sequence[int]) -> "FinerContrast":
        """The classes of these samples."""
        return FinerContrast(tuple(self.index[i] for i in samples), tuple(self.others[i] for i in samples), self.alpha)


class RefineCAM(Wrapper[L]):
    """RefineCAM: the product of several layers' maps of the same input, sharp like early layers and sure like late ones.

    `map = prod_l(m_l / max |m_l|)`, arXiv:2605.14641; pytorch-grad-cam's method, from one pass for all layers.
    Signed, what all layers find against the score is subtracted: `prod relu(m) - prod relu(-m)`. Each map is between -1 and
    1, and its scale means nothing.

    Of a CAM with a mapping of layers, the result is `Maps` with one map for each input that layers lie on, by its full
    name. `Layer(onto=…)` says on which input a layer lies, as elsewhere.

    Args:
        cam: The CAM of the layers to fuse.

    Raises:
        MulticamError: When called, if a layer lies on no input, or maps of one input differ in their axes.

    Example:
        >>> from torch import nn
        >>> from multicam import GradCAMPlusPlus
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, 2), nn.Flatten(), nn.Linear(144, 5))
        >>> cam = RefineCAM(GradCAMPlusPlus(model, {"early": "1", "late": "2"}))
        >>> cam(torch.rand(2, 3, 16, 16), signed=True)["input"].shape
        torch.Size([2, 16, 16])
    """

    def __init__(self, cam: CAM[L]) -> None:
        super().__init__(cam)
        self.comparable = False

    def maps(self, trace: Trace, *, signed: bool = False) -> Maps:
        """The fused map of each input."""
        found = self.cam.maps(trace, signed=signed)
        return Maps(
            {name: self._fused(name, [found[m] for m in maps]) for name, maps in self._groups(trace).items()}, False
        )

    def sources(self, trace: Trace) -> dict[str, list[Site]]:
        """The sites of the layers that are fused, by input."""
        inner = super().sources(trace)
        return {name: [site for m in maps for site in inner[m]] for name, maps in self._groups(trace).items()}

    def _groups(self, trace: Trace) -> dict[str, list[str]]:
        """The names of the inner maps, by the input that they lie on."""
        groups: dict[str, list[str]] = {}
        for name, sites in super().sources(trace).items():
            on = input_of(sites[0], trace.inputs)[0] if self.named else ONLY
            if on is None:
                raise MulticamError(
                    f"RefineCAM fuses the maps of one input, but the map of {name!r} lies on none; say on which with "
                    f"Layer(…, onto=…): {', '.join(map(repr, trace.inputs.images))}"
                )
            groups.setdefault(on, []).append(name)
        return groups

    def _fused(self, name: str, maps: Sequence[Tensor]) -> Tensor:
        shapes = {tuple(m.shape[1:]) for m in maps}
        if len(shapes) > 1:
            raise MulticamError(f"the maps of input {name!r} have the sizes {sorted(shapes)}, which cannot be fused")
        scaled = torch.stack([at_most_one(m) for m in maps])
        return scaled.relu().prod(0) - (-scaled).relu().prod(0)


def at_most_one(maps: Float[Tensor, "b *grid"]) -> Float[Tensor, "b *grid"]:
    """Each map divided by its largest absolute value; an empty one as it is."""
    peak = maps.flatten(1).abs().amax(1)
    return maps / rearrange(peak.where(peak > 0, 1), f"b -> b {'1 ' * (maps.ndim - 1)}")
