"""Principal components of activations: the eigen methods."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from multicam.call.scorer import OutputLike
from multicam.cam.base import CAM, L
from multicam.errors import MulticamError, number, unknown
from multicam.watch.trace import Site


class EigenCAM(CAM[L]):
    """Eigen-CAM: the activations projected on their first principal component over the grid.

    `saliency = (A - mean_ij A) v_1`. Muhammad and Yeasin 2020, arXiv:2008.00299, with the centring that
    pytorch-grad-cam adds. A component has no sign of its own; it is given the one that agrees with the activations
    summed over channels. It does not depend on the target, and its scale means nothing.
    """

    comparable = False

    def saliency(self, site: Site) -> Float[Tensor, "b *grid"]:
        """The projection of A on its first principal component."""
        return first_component(site.acts)


class EigenGradCAM(CAM[L]):
    """Eigen-CAM of gradient times activation: class-specific, smoother than HiResCAM.

    `saliency = (G A - mean_ij G A) v_1`, with the sign that agrees with HiResCAM; pytorch-grad-cam's method. Its scale
    means nothing.
    """

    comparable = False

    def saliency(self, site: Site) -> Float[Tensor, "b *grid"]:
        """The projection of G A on its first principal component."""
        return first_component(site.grads * site.acts)


class SegEigenCAM(CAM[L]):
    """Seg-Eigen-CAM: Eigen-CAM of the activations, weighted by the size of their gradients.

    `saliency = (X - mean_ij X) v_1` with `X = |G| A`, with the sign that makes its largest number positive. Chung and Ying
    2025, doi:10.3390/app15137562, eq. 10 to 13; the sign of Eigen-CAM where the largest and the smallest number are as large. Made for segmentation, where gradients of both signs mark what a mask
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
        # Of two cells it is zero, up to a rounding that would decide the sign.
        rounding = torch.finfo(flat.dtype).eps ** 0.5 * flat.abs().amax(1, keepdim=True)
        return torch.where(middle < -rounding, -flat, flat).reshape(component.shape)


KERNELS: dict[str, Callable[[Float[Tensor, "n c"], float], Float[Tensor, "n n"]]] = {
    "linear": lambda x, gamma: x @ x.mT,
    "poly": lambda x, gamma: (gamma * x @ x.mT + 1) ** 3,
    "rbf": lambda x, gamma: torch.exp(-gamma * torch.cdist(x, x).square()),
    "sigmoid": lambda x, gamma: torch.tanh(gamma * x @ x.mT + 1),
    "cosine": lambda x, gamma: F.normalize(x) @ F.normalize(x).mT,
}


class KPCACAM(CAM[L]):
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
        layers: L,
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
