"""The methods that read one layer's activations and gradients, one formula each."""

from abc import abstractmethod
from typing import ClassVar

import torch
from einops import einsum, rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from multicam.cam import CAM
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
        >>> GradCAM(model, "1")(torch.rand(2, 3, 16, 16), target=3).shape
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
    agreement = (projection * centred.sum(2)).sum(1, keepdim=True)
    signed = torch.where(agreement < 0, -projection, projection)
    return signed.reshape(x.shape[0], *x.shape[2:])
