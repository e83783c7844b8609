"""RISE: the score with a pixel, less the score without."""

from collections.abc import Sequence
from math import ceil, prod

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from multicam.call.inputs import Inputs
from multicam.call.scorer import OutputLike, TargetLike
from multicam.cam.base import InputCAM, N
from multicam.cam.masking import MASKED, times_masks
from multicam.errors import MulticamError, at_least_one
from multicam.printing import progress
from multicam.watch.trace import Trace


class RISE(InputCAM[N]):
    """RISE: how the score follows random masks, pixel by pixel; nothing of the model but its output is looked at.

    Coarse random grids, each cell kept with probability `keep`, are enlarged smoothly, shifted and multiplied with the
    input: `saliency = cov(y, m) / (keep (1 - keep))`, the score with a pixel less the score without. Petsiuk et al.
    2018, arXiv:1806.07421, eq. 6 and section 3.2; the paper's map is `mean(y | kept)`, this one without the part that is the
    same for all pixels, which leaves an input that the model ignores at zero. As a density the mean of the signed map is
    an estimate of the score less the score of an input of zeros, for a model that is linear in its input: unbiased where
    the evidence is even, near otherwise. The error falls with the root of the number of masks. Each input is masked alone, with all others as they are; what only depends on these is
    not run again.

    Args:
        model, inputs, output: As for `InputCAM`.
        masks: How many masks are scored for each input.
        cells: The rows and columns of the coarse grids.
        keep: The share of an input that a mask keeps.
        batch_size: How many masked inputs are scored in one pass. It bounds the memory and does not change the map.
        seed: Of the masks; the global random state is not used.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
        >>> RISE(model, masks=50)(torch.rand(2, 3, 16, 16), target=3, signed=True).shape
        torch.Size([2, 16, 16])
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: N | None = None,
        *,
        output: OutputLike = None,
        masks: int = 4000,
        cells: int = 7,
        keep: float = 0.5,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__(model, inputs, output=output)
        if not isinstance(keep, float) or not 0 < keep < 1:
            raise MulticamError(f"keep is a share between 0 and 1, not {keep!r}")
        self.masks, self.cells = at_least_one("masks", masks), at_least_one("cells", cells)
        self.keep, self.seed = keep, seed
        self.batch_size = at_least_one("batch_size", batch_size)

    def evidence(self, call: Inputs, names: Sequence[str], target: TargetLike) -> dict[str, Tensor]:
        """The density of each input `(b h w)`; of clips and volumes, the masks are the same for every frame."""
        trace = Trace(self.model, call, {}, target, self.output)
        return {name: self._density(trace, name) for name in names}

    def _density(self, trace: Trace, name: str) -> Float[Tensor, "b h w"]:
        leaf = trace.inputs.leaves[name]
        size = leaf.shape[-2:]
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.masks, 1, self.cells + 1, self.cells + 1)
        grids = (torch.rand(shape, generator=generator, device="cpu") < self.keep).float()
        cell = [ceil(side / self.cells) for side in size]
        shifts = (
            torch.rand(self.masks, 2, generator=generator, device="cpu") * torch.tensor(cell, device="cpu")
        ).long()

        def mask(k: int) -> Tensor:
            large = F.interpolate(grids[k : k + 1], [(self.cells + 1) * side for side in cell], mode="bilinear")
            top, left = shifts[k].tolist()
            return large[:, :, top : top + size[0], left : left + size[1]]

        batch = len(leaf)
        means = torch.zeros(size), torch.zeros(batch), torch.zeros(batch, *size)
        mean_mask, mean_score, mean_product = (x.to(leaf.device, torch.float64) for x in means)
        starts = range(0, self.masks, self.batch_size)
        for start in progress(starts, len(starts), f"{type(self).__name__} {name}"):
            part = range(start, min(start + self.batch_size, self.masks))
            masks = torch.cat([mask(k) for k in part]).to(leaf.device, torch.float64)
            mean_mask += masks.sum((0, 1)) / self.masks
            for sample in range(batch):
                rows = times_masks(leaf[sample : sample + 1], masks, tokens=False)
                scores = trace.rescore({name: rows}, sample, MASKED).double()
                mean_score[sample] += scores.sum() / self.masks
                mean_product[sample] += torch.einsum("n, n h w -> h w", scores, masks[:, 0]) / self.masks
        covariance = mean_product - mean_score[:, None, None] * mean_mask
        # What a mask's cell spreads beyond the border is lost; there the rest stands for it.
        rows, columns = (_reach(self.cells, *sides).to(covariance) for sides in zip(cell, size, strict=True))
        density: Tensor = covariance / (self.keep * (1 - self.keep) * rows[:, None] * columns) * prod(size)
        return density.to(trace.scores.dtype)


def _reach(cells: int, cell: int, side: int) -> Float[Tensor, " side"]:
    """For each pixel along one axis, the sum of its covariances with all others, in units of a cell's variance."""
    spread = F.interpolate(torch.eye(cells + 1, device="cpu")[None], (cells + 1) * cell, mode="linear")[0]
    parts = [spread[:, shift : shift + side] for shift in range(cell)]
    return torch.stack([part.sum(1) @ part for part in parts]).mean(0)
