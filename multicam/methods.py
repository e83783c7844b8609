"""The methods that read one layer's activations and gradients, one formula each."""

from abc import abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn

from multicam.cam import CAM, LayersLike
from multicam.errors import MulticamError, number, unknown
from multicam.targets import ClassScore, OutputLike
from multicam.trace import Site


class WeightedCAM(CAM):
    """A method whose saliency is a sum over channels of weighted activations.

    Keeping the channels apart until the end lets `multicam.wrappers` smooth any of these methods.
    """

    @abstractmethod
    def weighted(self, site: Site) -> Float[Tensor, "b c *grid"]:
        """The method's formula before its sum over channels."""

    def saliency(self, site: Site) -> Float[Tensor, "b *grid"]:
        """The sum over channels of `weighted`."""
        return reduce(self.weighted(site), "b c ... -> b ...", "sum")


def per_channel(weights: Float[Tensor, "b c"], x: Float[Tensor, "b c *grid"]) -> Float[Tensor, "b c *grid"]:
    """Each channel of `x` times its weight."""
    return einsum(weights, x, "b c, b c ... -> b c ...")


class GradCAM(WeightedCAM):
    """Grad-CAM: channels weighted by their spatially averaged gradient.

    `saliency = sum_c mean_ij(G_c) A_c`. Selvaraju et al. 2017, arXiv:1610.02391, eq. 1 and 2.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
        >>> GradCAM(model, "1")(torch.rand(2, 3, 16, 16), target=3, signed=True).shape
        torch.Size([2, 16, 16])
    """

    def weighted(self, site: Site) -> Float[Tensor, "b c *grid"]:
        """`mean_ij(G_c) A_c`."""
        return per_channel(reduce(site.grads, "b c ... -> b c", "mean"), site.acts)


class HiResCAM(WeightedCAM):
    """HiResCAM: gradient times activation, cell by cell.

    `saliency = sum_c G_c A_c`; the mean of the signed map is exactly the sum of `G A`, which for a pooled linear head is
    the logit without its bias. Draelos and Carin 2020, arXiv:2011.08891, eq. 4.
    """

    def weighted(self, site: Site) -> Float[Tensor, "b c *grid"]:
        """`G_c A_c`."""
        return site.grads * site.acts


class GradCAMElementWise(WeightedCAM):
    """Element-wise Grad-CAM: HiResCAM of which each channel contributes its positive evidence only.

    `saliency = sum_c relu(G_c A_c)`; pytorch-grad-cam's variant of arXiv:2011.08891.
    """

    def weighted(self, site: Site) -> Float[Tensor, "b c *grid"]:
        """`relu(G_c A_c)`."""
        return (site.grads * site.acts).relu()


class GradCAMPlusPlus(WeightedCAM):
    """Grad-CAM++: channels weighted by their positive gradients, each cell's by its share in the score's growth.

    `alpha = G^2 / (2 G^2 + sum_ij(A) G^3)`, `saliency = sum_c sum_ij(alpha_c relu(G_c)) A_c`. Chattopadhyay et al. 2018,
    arXiv:1710.11063, eq. 5 and 19. The ratio is taken as the paper writes it, with no epsilon that would decide the
    result where gradients are small; cells with a zero denominator weigh nothing. With the paper's score `exp(S)` the
    weights of a sample share the factor `exp(S)`, which is left out, so the scale means nothing.
    """

    comparable = False

    def weighted(self, site: Site) -> Float[Tensor, "b c *grid"]:
        """`sum_ij(alpha_c relu(G_c)) A_c`."""
        G, A = site.grads, site.acts
        total = rearrange(A.flatten(2).sum(2), f"b c -> b c {'1 ' * (A.ndim - 2)}")
        # G^2 cancels from eq. 19; dividing it out keeps tiny gradients from underflowing to 0 / 0.
        denominator = 2 + total * G
        alpha = torch.where((denominator != 0) & (G != 0), 1 / denominator, 0)
        return per_channel(reduce(alpha * G.relu(), "b c ... -> b c", "sum"), A)


class XGradCAM(WeightedCAM):
    """XGrad-CAM: channels weighted by their gradients, each cell's by its share of the channel's activation.

    `w_c = sum_ij(G_c A_c) / sum_ij(A_c)`, `saliency = sum_c w_c A_c`. Fu et al. 2020, arXiv:2008.02312, eq. 8. A channel
    whose activations sum to zero weighs nothing.
    """

    def weighted(self, site: Site) -> Float[Tensor, "b c *grid"]:
        """`(sum_ij(G_c A_c) / sum_ij(A_c)) A_c`."""
        total = reduce(site.acts, "b c ... -> b c", "sum")
        weights = reduce(site.grads * site.acts, "b c ... -> b c", "sum") / total
        return per_channel(torch.where(total != 0, weights, 0), site.acts)


class LayerCAM(WeightedCAM):
    """Layer-CAM: each cell of each channel weighted by its own positive gradient.

    `saliency = sum_c relu(G_c) A_c`. Jiang et al. 2021, doi:10.1109/TIP.2021.3089943, eq. 6 and 7.
    """

    def weighted(self, site: Site) -> Float[Tensor, "b c *grid"]:
        """`relu(G_c) A_c`."""
        return site.grads.relu() * site.acts


class ShapleyCAM(WeightedCAM):
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

    def weighted(self, site: Site) -> Float[Tensor, "b c *grid"]:
        """`mean_ij(G_c - (H A)_c / 2) A_c`."""
        return per_channel(reduce(site.grads - site.curvature / 2, "b c ... -> b c", "mean"), site.acts)


class OriginalCAM(WeightedCAM):
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

    def weighted(self, site: Site) -> Float[Tensor, "b c *grid"]:
        """`w_c A_c / n`."""
        return per_channel(head_weights(site) / site.acts[0, 0].numel(), site.acts)


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


class FEM(WeightedCAM):
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

    def __init__(self, model: nn.Module, layers: LayersLike, *, output: OutputLike = None, k: float = 2.0) -> None:
        super().__init__(model, layers, output=output)
        self.k = number("k", k)

    def weighted(self, site: Site) -> Float[Tensor, "b c *grid"]:
        """`mean_ij(A_c > mean_ij(A_c) + k std_ij(A_c)) A_c`."""
        cells = rearrange(site.acts, "b c ... -> b c (...)")
        threshold = cells.mean(2, keepdim=True) + self.k * cells.std(2, correction=0, keepdim=True)
        return per_channel((cells > threshold).to(cells).mean(2), site.acts)


class RandomCAM(WeightedCAM):
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

    def __init__(self, model: nn.Module, layers: LayersLike, *, output: OutputLike = None, seed: int = 0) -> None:
        super().__init__(model, layers, output=output)
        self.seed = seed

    def weighted(self, site: Site) -> Float[Tensor, "b c *grid"]:
        """`w_c A_c`."""
        batch, channels = site.acts.shape[:2]
        generator = torch.Generator().manual_seed(self.seed)
        weights = 2 * torch.rand(channels, generator=generator, device="cpu") - 1
        return per_channel(weights.to(site.acts).expand(batch, channels), site.acts)


class EigenCAM(CAM):
    """Eigen-CAM: the activations projected on their first principal component over the grid.

    `saliency = (A - mean_ij A) v_1`. Muhammad and Yeasin 2020, arXiv:2008.00299, with the centring that
    pytorch-grad-cam adds. A component has no sign of its own; it is given the one that agrees with the activations
    summed over channels. It does not depend on the target, and its scale means nothing.
    """

    comparable = False

    def saliency(self, site: Site) -> Float[Tensor, "b *grid"]:
        """The projection of A on its first principal component."""
        return first_component(site.acts)


class EigenGradCAM(CAM):
    """Eigen-CAM of gradient times activation: class-specific, smoother than HiResCAM.

    `saliency = (G A - mean_ij G A) v_1`, with the sign that agrees with HiResCAM; pytorch-grad-cam's method. Its scale
    means nothing.
    """

    comparable = False

    def saliency(self, site: Site) -> Float[Tensor, "b *grid"]:
        """The projection of G A on its first principal component."""
        return first_component(site.grads * site.acts)


class SegEigenCAM(CAM):
    """Seg-Eigen-CAM: Eigen-CAM of the activations, weighted by the size of their gradients.

    `saliency = (X - mean_ij X) v_1` with `X = |G| A`, with the sign that makes its largest number positive. Chung and Ying
    2025, doi:10.3390/app15137562, eq. 10 to 13. Made for segmentation, where gradients of both signs mark what a mask
    depends on. Its scale means nothing.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 1))
        >>> SegEigenCAM(model, "1")(torch.rand(2, 3, 8, 8), lambda masks: masks[:, 3].mean((1, 2))).shape
        torch.Size([2, 8, 8])
    """

    comparable = False

    def saliency(self, site: Site) -> Float[Tensor, "b *grid"]:
        """The projection of `|G| A` on its first principal component, its extreme positive."""
        component = first_component(site.grads.abs() * site.acts)
        flat = component.flatten(1)
        middle = flat.amax(1, keepdim=True) + flat.amin(1, keepdim=True)
        return torch.where(middle < 0, -flat, flat).reshape(component.shape)


KERNELS: dict[str, Callable[[Float[Tensor, "n c"], float], Float[Tensor, "n n"]]] = {
    "linear": lambda x, gamma: x @ x.mT,
    "poly": lambda x, gamma: (gamma * x @ x.mT + 1) ** 3,
    "rbf": lambda x, gamma: torch.exp(-gamma * torch.cdist(x, x).square()),
    "sigmoid": lambda x, gamma: torch.tanh(gamma * x @ x.mT + 1),
    "cosine": lambda x, gamma: F.normalize(x) @ F.normalize(x).mT,
}


class KPCACAM(CAM):
    """KPCA-CAM: Eigen-CAM with a kernel, which finds components that are no straight lines.

    `saliency = sqrt(l_1) u_1` with the largest eigenvalue and its eigenvector of the centred kernel `K(x_i, x_j)` of the
    cells, where `x_i` are the activations in a cell less their mean over the grid. Karmani et al. 2024, arXiv:2410.00267.
    The sign is that of `EigenCAM`, which this is with the linear kernel. It does not depend on the target, and its scale
    means nothing.

    A kernel has a number for each pair of cells: for one sample of 56 x 56 cells 75 MB, and seconds to decompose.

    Args:
        model, layers, output: As for `CAM`.
        kernel: `"linear"` x y, `"poly"` (gamma x y + 1)^3, `"rbf"` exp(-gamma |x - y|^2), `"sigmoid"` tanh(gamma x y + 1)
            or `"cosine"`, the cosine of their angle.
        gamma: None: one over the number of channels.

    Raises:
        MulticamError: If there is no such kernel, or gamma is not positive.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
        >>> KPCACAM(model, "1", kernel="rbf")(torch.rand(2, 3, 8, 8)).shape
        torch.Size([2, 8, 8])
    """

    comparable = False

    def __init__(
        self,
        model: nn.Module,
        layers: LayersLike,
        *,
        output: OutputLike = None,
        kernel: str = "sigmoid",
        gamma: float | None = None,
    ) -> None:
        super().__init__(model, layers, output=output)
        if kernel not in KERNELS:
            raise unknown("kernel", kernel, KERNELS)
        if gamma is not None and not number("gamma", gamma) > 0:
            raise MulticamError(
                f"gamma is a positive number, or None for one over the number of channels, not {gamma!r}"
            )
        self.kernel = kernel
        self.gamma = gamma

    def saliency(self, site: Site) -> Float[Tensor, "b *grid"]:
        """The first kernel principal component of the cells."""
        cells = rearrange(site.acts.double(), "b c ... -> b (...) c")
        centred = cells - cells.mean(1, keepdim=True)
        gamma = 1 / cells.shape[2] if self.gamma is None else self.gamma
        # One sample at a time, because a kernel is large.
        component = torch.stack([_leading(KERNELS[self.kernel](x, gamma)) for x in centred])
        return _signed(component, centred).to(site.acts).reshape(site.acts[:, 0].shape)


def _leading(kernel: Float[Tensor, "n n"]) -> Float[Tensor, " n"]:
    """The coordinates of all cells along the first principal component in the kernel's space."""
    mean = kernel.mean(0)
    values, vectors = torch.linalg.eigh(kernel - mean - mean[:, None] + mean.mean())
    # Where all cells are alike, centring leaves rounding, whose root would look like a map.
    value = torch.where(values[-1] > 1e-13 * len(kernel) * kernel.abs().amax(), values[-1], 0)
    component: Tensor = vectors[:, -1] * value.sqrt()
    return component


def _signed(component: Float[Tensor, "b n"], cells: Float[Tensor, "b n c"]) -> Float[Tensor, "b n"]:
    """Each component with the sign that agrees with the sum of the centred cells over channels."""
    total, size = cells.sum(2), cells.abs().sum(2).amax(1, keepdim=True)
    # Behind a normalisation the sum is rounding; then what stands out, the longer tail, is positive.
    sums = total.abs().amax(1, keepdim=True) > 1e-5 * size
    agreement = (component * torch.where(sums, total, component.square())).sum(1, keepdim=True)
    return torch.where(agreement < 0, -component, component)


def first_component(x: Float[Tensor, "b c *grid"]) -> Float[Tensor, "b *grid"]:
    """Each cell's coordinate along the first principal component of the cells, signed like the sum over channels."""
    cells = rearrange(x, "b c ... -> b (...) c")
    centred = cells - cells.mean(1, keepdim=True)
    # The smaller of the two Gram matrices has the same leading component and is far cheaper than an SVD.
    if centred.shape[1] <= centred.shape[2]:
        values, vectors = torch.linalg.eigh(centred @ centred.mT)
        projection = vectors[..., -1] * values[:, -1:].clamp(min=0).sqrt()
    else:
        projection = (centred @ torch.linalg.eigh(centred.mT @ centred)[1][..., -1:]).squeeze(-1)
    return _signed(projection, centred).reshape(x.shape[0], *x.shape[2:])
