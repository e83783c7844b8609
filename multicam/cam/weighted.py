"""The methods that read one layer's activations and gradients, one formula each."""

from abc import abstractmethod
from weakref import WeakKeyDictionary

import torch
from einops import einsum, rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn

from multicam.call.scorer import OutputLike
from multicam.call.targets.scores import ClassScore
from multicam.cam.base import CAM, L
from multicam.chance import normal
from multicam.errors import MulticamError, at_least_one, number
from multicam.printing import progress
from multicam.watch.finite import NOISY, value_ranges
from multicam.watch.trace import Site, Trace


class WeightedCAM(CAM[L]):
    """A method whose saliency is a sum over channels of weighted activations.

    Keeping the channels apart until the end lets `multicam.cam.wrappers` smooth any of these methods.
    """

    @abstractmethod
    def weighted(self, site: Site) -> Float[Tensor, "b c *grid"]:
        """The method's formula before its sum over channels."""

    def saliency(self, site: Site) -> Float[Tensor, "b *grid"]:
        """The sum over channels of `weighted`."""
        return reduce(self.weighted(site), "b c ... -> b ...", "sum")


class ChannelCAM(WeightedCAM[L]):
    """A method that gives each channel one weight for its whole grid."""

    @abstractmethod
    def weights(self, site: Site) -> Float[Tensor, "b c"]:
        """The weight of each channel."""

    def weighted(self, site: Site) -> Float[Tensor, "b c *grid"]:
        """Each channel times its weight."""
        return per_channel(self.weights(site), site.acts)


def per_channel(weights: Float[Tensor, "b c"], x: Float[Tensor, "b c *grid"]) -> Float[Tensor, "b c *grid"]:
    """Each channel of `x` times its weight."""
    return einsum(weights, x, "b c, b c ... -> b c ...")


class GradCAM(ChannelCAM[L]):
    """Grad-CAM: channels weighted by their spatially averaged gradient.

    `saliency = sum_c mean_ij(G_c) A_c`. Selvaraju et al. 2017, arXiv:1610.02391, eq. 1 and 2.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
        >>> GradCAM(model, "1")(torch.rand(2, 3, 16, 16), target=3, signed=True).shape
        torch.Size([2, 16, 16])
    """

    def weights(self, site: Site) -> Float[Tensor, "b c"]:
        """`mean_ij(G_c)`."""
        return reduce(site.grads, "b c ... -> b c", "mean")


class HiResCAM(WeightedCAM[L]):
    """HiResCAM: gradient times activation, cell by cell.

    `saliency = sum_c G_c A_c`; the mean of the signed map is exactly the sum of `G A`, which for a pooled linear head is
    the logit without its bias. Draelos and Carin 2020, arXiv:2011.08891, eq. 4.
    """

    def weighted(self, site: Site) -> Float[Tensor, "b c *grid"]:
        """`G_c A_c`."""
        return site.grads * site.acts


class GradCAMElementWise(WeightedCAM[L]):
    """Element-wise Grad-CAM: HiResCAM of which each channel contributes its positive evidence only.

    `saliency = sum_c relu(G_c A_c)`; pytorch-grad-cam's variant of arXiv:2011.08891.
    """

    def weighted(self, site: Site) -> Float[Tensor, "b c *grid"]:
        """`relu(G_c A_c)`."""
        return (site.grads * site.acts).relu()


class GradCAMPlusPlus(ChannelCAM[L]):
    """Grad-CAM++: channels weighted by their positive gradients, each cell's by its share in the score's growth.

    `alpha = G^2 / (2 G^2 + sum_ij(A) G^3)`, `saliency = sum_c sum_ij(alpha_c relu(G_c)) A_c`. Chattopadhyay et al. 2018,
    arXiv:1710.11063, eq. 5 and 19. The ratio is taken as the paper writes it, with no epsilon that would decide the
    result where gradients are small; cells with a zero denominator weigh nothing. With the paper's score `exp(S)` the
    weights of a sample share the factor `exp(S)`, which is left out, so the scale means nothing.
    """

    comparable = False

    def weights(self, site: Site) -> Float[Tensor, "b c"]:
        """`sum_ij(alpha_c relu(G_c))`."""
        G, A = site.grads, site.acts
        total = rearrange(A.flatten(2).sum(2), f"b c -> b c {'1 ' * (A.ndim - 2)}")
        # G^2 cancels from eq. 19; dividing it out keeps tiny gradients from underflowing to 0 / 0.
        denominator = 2 + total * G
        alpha = torch.where((denominator != 0) & (G != 0), 1 / denominator, 0)
        return reduce(alpha * G.relu(), "b c ... -> b c", "sum")


class XGradCAM(ChannelCAM[L]):
    """XGrad-CAM: channels weighted by their gradients, each cell's by its share of the channel's activation.

    `w_c = sum_ij(G_c A_c) / sum_ij(A_c)`, `saliency = sum_c w_c A_c`. Fu et al. 2020, arXiv:2008.02312, eq. 8. A channel
    whose activations sum to zero weighs nothing.
    """

    def weights(self, site: Site) -> Float[Tensor, "b c"]:
        """`sum_ij(G_c A_c) / sum_ij(A_c)`."""
        total = reduce(site.acts, "b c ... -> b c", "sum")
        weights = reduce(site.grads * site.acts, "b c ... -> b c", "sum") / total
        return torch.where(total != 0, weights, 0)


class LayerCAM(WeightedCAM[L]):
    """Layer-CAM: each cell of each channel weighted by its own positive gradient.

    `saliency = sum_c relu(G_c) A_c`. Jiang et al. 2021, doi:10.1109/TIP.2021.3089943, eq. 6 and 7.
    """

    def weighted(self, site: Site) -> Float[Tensor, "b c *grid"]:
        """`relu(G_c) A_c`."""
        return site.grads.relu() * site.acts


class ShapleyCAM(ChannelCAM[L]):
    """Shapley-CAM: Grad-CAM with the curvature of the score, which shares out what channels and cells do together.

    `saliency = sum_c mean_ij(G_c - (H A)_c / 2) A_c` with the Hessian `H` of the score by the activations. Cai 2025,
    arXiv:2501.06261: the Shapley value of the score's second-order expansion, averaged over the grid. Where the score is
    piecewise linear behind the layer (convolutions, ReLU, pooling, a linear head) `H` is zero and this is Grad-CAM;
    attention, SiLU, GELU, normalisation, or a softmax in the target as in `Probability` make the difference. Each layer
    takes a forward and two backward passes more.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(144, 5))
        >>> ShapleyCAM(model, "0")(torch.rand(2, 3, 8, 8), target=3, signed=True).shape
        torch.Size([2, 8, 8])
    """

    one_pass = False

    def weights(self, site: Site) -> Float[Tensor, "b c"]:
        """`mean_ij(G_c - (H A)_c / 2)`."""
        return reduce(site.grads - site.curvature / 2, "b c ... -> b c", "mean")


class OriginalCAM(ChannelCAM[L]):
    """CAM: channels weighted by what they weigh in the linear head behind a global average pooling.

    `saliency = sum_c w_c A_c / n` with the class's row `w` of the head and `n` cells. Zhou et al. 2016, arXiv:1512.04150,
    eq. 1 and 2; divided by `n`, as the pooling does, it is in units of the score and sums to the logit without its bias.
    Where several branches are concatenated in front of the head, each has its slice of the row.

    That the head reads the layer in this way is proved by the gradient, which must be `w / n` in every cell for an
    `nn.Linear` (or a 1 x 1 convolution) of the model. So the map is that of `GradCAM`, and any layer that has none here
    has one there.

    Raises:
        MulticamError: If something else than pooling lies between the layer and a linear head, or the target is not the
            score of a class.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
        >>> OriginalCAM(model, "1")(torch.rand(2, 3, 16, 16), target=3, signed=True).shape
        torch.Size([2, 16, 16])
    """

    one_pass = False

    def weights(self, site: Site) -> Float[Tensor, "b c"]:
        """`w_c / n`."""
        return head_weights(site) / site.acts[0, 0].numel()


def head_weights(site: Site) -> Float[Tensor, "b c"]:
    """What each channel of a layer weighs in the linear head that reads its average, for each sample's class.

    Raises:
        MulticamError: If there is no such head.
    """
    target, trace = site.trace.target, site.trace
    if not isinstance(target, ClassScore):
        raise MulticamError(
            f"OriginalCAM explains the score of a class (target=3, or None for the top class), not {target!r}; GradCAM, "
            "which generalises it, takes any target"
        )
    batch, classes = trace.output.shape
    slopes = rearrange(site.grads, "b c ... -> b c (...)") * site.acts[0, 0].numel()
    channels = slopes.shape[1]
    for head in trace.model.modules():
        if not isinstance(head, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            continue
        matrix = head.weight.detach().flatten(1).to(slopes)
        if matrix.shape[0] != classes or matrix.shape[1] < channels:
            continue
        rows = matrix[torch.tensor(target.index, device=matrix.device).expand(batch)]
        start = int((rows[0].unfold(0, channels, 1) - slopes[0, :, 0]).abs().amax(1).argmin())
        weights = rows[:, start : start + channels]
        # One percent is what half precision may lose on the way.
        error = (slopes - weights[..., None]).abs().flatten(1).amax(1)
        if (error <= 0.01 * weights.abs().amax(1)).all():
            return weights
    raise MulticamError(
        f"OriginalCAM: layer {trace.paths[site.name]!r} is not followed by global average pooling and one linear head "
        f"alone: the gradient of the score is no row of an nn.Linear with {classes} outputs, the same in every cell; "
        "GradCAM, which generalises it, takes any layer"
    )


class FEM(ChannelCAM[L]):
    """FEM, the Feature Explanation Method: channels weighted by the share of cells in which they stand out.

    `saliency = sum_c w_c A_c` with `w_c` the share of cells where `A_c > mean_ij(A_c) + k std_ij(A_c)`; pytorch-grad-cam's
    variant of Fuad et al. 2020, doi:10.1109/IPTA50016.2020.9286629, who sum these cells' masks, each weighted by the mean
    of its channel. It does not depend on the target, and its scale means nothing.

    Args:
        model, layers, output: As for `CAM`.
        k: How many standard deviations above its mean a channel stands out.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
        >>> FEM(model, "1", k=1.5)(torch.rand(2, 3, 8, 8)).shape
        torch.Size([2, 8, 8])
    """

    comparable = False

    def __init__(self, model: nn.Module, layers: L, *, output: OutputLike = None, k: float = 2.0) -> None:
        super().__init__(model, layers, output=output)
        self.k = number("k", k)

    def weights(self, site: Site) -> Float[Tensor, "b c"]:
        """`mean_ij(A_c > mean_ij(A_c) + k std_ij(A_c))`."""
        cells = rearrange(site.acts, "b c ... -> b c (...)")
        threshold = cells.mean(2, keepdim=True) + self.k * cells.std(2, correction=0, keepdim=True)
        return (cells > threshold).to(cells).mean(2)


class RandomCAM(ChannelCAM[L]):
    """Random-CAM: channels weighted at random, the baseline that a method has to beat.

    `saliency = sum_c w_c A_c` with `w_c` uniform in (-1, 1). The weights depend on the seed and the number of channels
    alone, so a sample's map does not depend on its batch. Its scale means nothing.

    Args:
        model, layers, output: As for `CAM`.
        seed: Which weights; several seeds show how much chance decides.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
        >>> RandomCAM(model, "1", seed=3)(torch.rand(2, 3, 8, 8), signed=True).shape
        torch.Size([2, 8, 8])
    """

    comparable = False

    def __init__(self, model: nn.Module, layers: L, *, output: OutputLike = None, seed: int = 0) -> None:
        super().__init__(model, layers, output=output)
        self.seed = seed

    def weights(self, site: Site) -> Float[Tensor, "b c"]:
        """`w_c`."""
        batch, channels = site.acts.shape[:2]
        generator = torch.Generator().manual_seed(self.seed)
        weights = 2 * torch.rand(channels, generator=generator, device="cpu") - 1
        return weights.to(site.acts).expand(batch, channels)


class SmoothGradCAMPlusPlus(ChannelCAM[L]):
    """Smooth Grad-CAM++: Grad-CAM++ with each power of the gradient averaged over noisy inputs.

    `alpha = D2 / (2 D2 + sum_ij(A) D3)`, `saliency = sum_c sum_ij(alpha_c relu(D1_c)) A_c`, where `Dp` is the mean of
    `G^p` over the noisy inputs. Omeiza et al. 2019, arXiv:1908.01224, with the numerator of Grad-CAM++, which the
    paper's eq. 8 prints as D1. As in `GradCAMPlusPlus` there is no epsilon, and the scale means nothing.

    Args:
        model, layers, output: As for `CAM`.
        samples: How many noisy versions of the inputs are run; each is one forward and one backward pass.
        std: The standard deviation of the noise on every floating-point image input, as a share of that input's range of
            values.
        seed: Of the noise, which is the same for every sample; the global random state is not used.
    """

    one_pass = False
    comparable = False

    def __init__(
        self,
        model: nn.Module,
        layers: L,
        *,
        output: OutputLike = None,
        samples: int = 4,
        std: float = 0.15,
        seed: int = 0,
    ) -> None:
        super().__init__(model, layers, output=output)
        self.samples, self.std, self.seed = at_least_one("samples", samples), number("std", std), seed
        self._moments: WeakKeyDictionary[Trace, dict[str, list[Tensor]]] = WeakKeyDictionary()

    def weights(self, site: Site) -> Float[Tensor, "b c"]:
        """`sum_ij(alpha_c relu(D1_c))`."""
        if site.trace not in self._moments:  # the noisy passes serve all sites of a trace
            self._moments[site.trace] = self._mean_powers(site.trace)
        first, second, third = self._moments[site.trace][site.name]
        total = rearrange(site.acts.flatten(2).sum(2), f"b c -> b c {'1 ' * (site.acts.ndim - 2)}")
        denominator = 2 * second + total * third
        alpha = torch.where(denominator != 0, second / denominator, 0)
        return reduce(alpha * first.relu(), "b c ... -> b c", "sum")

    def _mean_powers(self, trace: Trace) -> dict[str, list[Tensor]]:
        images = [name for name, leaf in trace.inputs.images.items() if leaf.is_floating_point()]
        if not images:
            raise MulticamError(
                f"{type(self).__name__} adds noise to images, but there is no floating-point image input"
            )
        ranges = value_ranges(trace.inputs, images)
        sums = {name: [torch.zeros_like(site.acts)] * 3 for name, site in trace.sites.items()}
        for i in progress(range(self.samples), self.samples, type(self).__name__):

            def noisy(name: str, leaf: Tensor, i: int = i) -> Tensor:
                if name not in images:
                    return leaf
                noise = normal(leaf.shape[1:], (self.seed, i, images.index(name))).to(leaf)
                return leaf + self.std * ranges[name] * noise

            for name, site in trace.again(trace.inputs.map(noisy), how=NOISY).sites.items():
                sums[name] = [total + site.grads**p / self.samples for p, total in enumerate(sums[name], 1)]
        return sums
