"""The methods that change activations or inputs and look what becomes of the score; most of them need no gradients."""

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from multicam.call.inputs import as_names
from multicam.call.scorer import OutputLike
from multicam.cam.base import L
from multicam.cam.laying import input_of, spatial_size
from multicam.cam.weighted import ChannelCAM, per_channel
from multicam.chance import normal
from multicam.errors import MulticamError, at_least_one, number
from multicam.maps import resized
from multicam.printing import progress
from multicam.watch.finite import How
from multicam.watch.reshape import Tokens
from multicam.watch.trace import Site

MASKED = How(
    "seen through a mask",
    "the model is not defined there; mask other inputs (masked=…, inputs=…), or take a method that changes nothing, such as HiResCAM",
)


class AblationCAM(ChannelCAM[L]):
    """Ablation-CAM: channels weighted by how much the score drops without them.

    `saliency = sum_c (y - y_c) A_c`, where `y_c` is the score with channel c set to zero. Desai and Ramaswamy 2020,
    doi:10.1109/WACV45572.2020.9093360, eq. 4 and 5. The paper divides the drop by `y`: a factor that all channels of a
    sample share, but one that turns the map into its negative where the score is below zero (adding a constant to all
    logits is enough), so it is left out. The map is in units of the score times those of the activations: its scale
    means nothing between layers.

    Args:
        model, layers, output: As for `CAM`.
        batch_size: How many channels are ablated in one pass. It bounds the memory and does not change the map.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
        >>> AblationCAM(model, "1")(torch.rand(2, 3, 16, 16), target=3, signed=True).shape
        torch.Size([2, 16, 16])
    """

    one_pass = False
    comparable = False

    def __init__(self, model: nn.Module, layers: L, *, output: OutputLike = None, batch_size: int = 32) -> None:
        super().__init__(model, layers, output=output)
        self.batch_size = at_least_one("batch_size", batch_size)

    def weights(self, site: Site) -> Float[Tensor, "b c"]:
        """`y - y_c`."""
        channels = torch.arange(site.acts.shape[1], device=site.acts.device)

        def drops(sample: int, part: slice) -> Tensor:
            keep = channels[part, None] != channels
            acts = site.acts[sample].expand(len(keep), *site.acts.shape[1:])
            # The unchanged sample goes the same way as the others: in its batch, or in a pass of another size, it may have another score.
            scores = site.rescore(torch.cat([acts[:1], per_channel(keep.to(acts), acts)]), sample)
            return scores[0] - scores[1:]

        return _in_parts(self, drops, site.acts, max(1, self.batch_size - 1))


class MaskingCAM(ChannelCAM[L]):
    """A method whose channels are weighted by the score that is left when their activations mask an input.

    Each channel, enlarged to the input's size and scaled to 0 … 1, is a mask. The weights are a softmax over the
    channels, so the scale means nothing.

    Args:
        model, layers, output: As for `CAM`.
        masked: The input, or the inputs, that the masks are multiplied with; all others stay as they are, and what only
            depends on them is not run again. None: the input that the map is laid on, or every image input if it is
            laid on none.
        batch_size: How many masked inputs are scored in one pass. It bounds the memory and does not change the map.
    """

    one_pass = False
    comparable = False

    def __init__(
        self,
        model: nn.Module,
        layers: L,
        *,
        output: OutputLike = None,
        masked: str | Sequence[str] | None = None,
        batch_size: int = 32,
    ) -> None:
        super().__init__(model, layers, output=output)
        self.masked = as_names(masked)
        self.batch_size = at_least_one("batch_size", batch_size)

    @abstractmethod
    def variants(self) -> Sequence[Callable[[Tensor, int], Tensor]]:
        """What is done to masks `(n 1 *size)`, of which the first is that of the given channel, before they are scored.

        The scores of the variants are averaged.
        """

    def weights(self, site: Site) -> Float[Tensor, "b c"]:
        """`softmax_c(mean over variants of the score of the masked input)`."""
        inputs = site.trace.inputs
        names = self._names(site)
        variants = self.variants()
        tokens = isinstance(site.layer.reshape, Tokens)

        def masked(sample: int, part: slice) -> Tensor:
            channels = site.acts[sample, part, None]
            masks = {name: _masks(channels, name, inputs.leaves[name], tokens) for name in names}
            scores = []
            for change in variants:
                rows = {
                    name: times_masks(inputs.leaves[name][sample : sample + 1], change(mask, part.start), tokens)
                    for name, mask in masks.items()
                }
                scores.append(site.trace.rescore(rows, sample, MASKED))
            return torch.stack(scores).mean(0)

        scores = _in_parts(self, masked, site.acts, self.batch_size)
        return scores.softmax(1).to(site.acts)

    def _names(self, site: Site) -> list[str]:
        inputs = site.trace.inputs
        if self.masked is not None:
            return [inputs.name(name) for name in self.masked]
        name, _ = input_of(site, inputs)
        return list(inputs.images) if name is None else [name]


class ScoreCAM(MaskingCAM[L]):
    """Score-CAM: channels weighted by the score of the input seen through them.

    `saliency = sum_c softmax_c(y(x * m_c)) A_c`, where `m_c` is the channel enlarged to the input and scaled to 0 … 1.
    Wang et al. 2020, arXiv:1910.01279, eq. 5 to 8; the score of the baseline cancels from the softmax. A channel that
    is the same everywhere has a mask of zeros. The softmax depends on the scale of the score: `Probability(c)` as target
    weighs the channels more evenly than the class's logit.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
        >>> ScoreCAM(model, "1")(torch.rand(2, 3, 16, 16), target=3, signed=True).shape
        torch.Size([2, 16, 16])
    """

    def variants(self) -> Sequence[Callable[[Tensor, int], Tensor]]:
        """The masks as they are."""
        return [lambda masks, _: masks]


class SSCAM(MaskingCAM[L]):
    """SS-CAM: Score-CAM with the scores averaged over noisy masks.

    `saliency = sum_c softmax_c(mean_i y(x * (m_c + e_i))) A_c`, `e_i ~ N(0, std^2)` for every pixel. Wang et al. 2020,
    arXiv:2006.14255. The noise is the same for every sample and every size of a batch.

    Args:
        model, layers, output, masked, batch_size: As for `MaskingCAM`.
        samples: How many noisy versions of each mask are scored.
        std: The standard deviation of the noise, in units of the mask.
        seed: Of the noise; the global random state is not used.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: L,
        *,
        output: OutputLike = None,
        masked: str | Sequence[str] | None = None,
        batch_size: int = 32,
        samples: int = 35,
        std: float = 2.0,
        seed: int = 0,
    ) -> None:
        super().__init__(model, layers, output=output, masked=masked, batch_size=batch_size)
        self.samples, self.std, self.seed = at_least_one("samples", samples), number("std", std), seed

    def variants(self) -> Sequence[Callable[[Tensor, int], Tensor]]:
        """The masks with noise."""

        def noisy(i: int) -> Callable[[Tensor, int], Tensor]:
            def add(masks: Tensor, first: int) -> Tensor:
                # A generator for each channel: the noise must not depend on how the channels are parted.
                noise = [normal(masks.shape[1:], (self.seed, i, first + row)) for row in range(len(masks))]
                return masks + self.std * torch.stack(noise).to(masks)

            return add

        return [noisy(i) for i in range(self.samples)]


class ISCAM(MaskingCAM[L]):
    """IS-CAM: Score-CAM with the scores averaged over masks of growing strength.

    `saliency = sum_c softmax_c(mean_i y(x * m_c * s_i)) A_c` with the sums
    `s_i = sum_{j<=i} j / steps`, i from 1 to `steps`. Naidu et al. 2020, arXiv:2010.03023, with the sums as torchcam reads
    the paper.

    Args:
        model, layers, output, masked, batch_size: As for `MaskingCAM`.
        steps: How many strengths are scored.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: L,
        *,
        output: OutputLike = None,
        masked: str | Sequence[str] | None = None,
        batch_size: int = 32,
        steps: int = 10,
    ) -> None:
        super().__init__(model, layers, output=output, masked=masked, batch_size=batch_size)
        self.steps = at_least_one("steps", steps)

    def variants(self) -> Sequence[Callable[[Tensor, int], Tensor]]:
        """The masks times each strength."""

        def stronger(by: float) -> Callable[[Tensor, int], Tensor]:
            return lambda masks, _: masks * by

        return [stronger(i * (i + 1) / 2 / self.steps) for i in range(1, self.steps + 1)]


def _in_parts(
    cam: ChannelCAM, scores: Callable[[int, slice], Tensor], acts: Float[Tensor, "b c *grid"], size: int
) -> Float[Tensor, "b c"]:
    """The scores of all samples and channels, computed for `size` channels of one sample at a time."""
    batch, channels = acts.shape[:2]
    parts = [(b, slice(first, min(first + size, channels))) for b in range(batch) for first in range(0, channels, size)]
    found = [scores(b, part) for b, part in progress(parts, len(parts), type(cam).__name__)]
    return torch.cat(found).view(batch, channels)


def _masks(channels: Float[Tensor, "n 1 *grid"], name: str, leaf: Tensor, tokens: bool) -> Float[Tensor, "n 1 *size"]:
    """Channels enlarged to the size of an input, each scaled to 0 … 1."""
    grid = tuple(channels.shape[2:])
    size = spatial_size(leaf, grid, tokens)
    if size is None:
        raise MulticamError(
            f"channels with the grid {grid} cannot mask input {name!r} {tuple(leaf.shape)}; say which inputs they mask "
            "with masked=…"
        )
    large = resized(channels[:, 0], size)[:, None]
    flat, shape = large.flatten(1), (-1, *[1] * (large.ndim - 1))
    low, high = flat.amin(1), flat.amax(1)
    same = (
        (channels == channels[:, :, *[slice(0, 1)] * len(grid)]).flatten(1).all(1)
    )  # enlarged, it differs by rounding
    return (large - low.view(shape)) / (high - low).where(high > low, 1).view(shape) * ~same.view(shape)


def times_masks(leaf: Tensor, masks: Float[Tensor, "n 1 *size"], tokens: bool) -> Tensor:
    """One sample of an input `(1 …)` times each of the masks."""
    size = masks.shape[2:]
    if len(size) == 3 and leaf.shape[2:] != size:
        return (leaf.transpose(1, 2) * masks).transpose(1, 2)  # frames first
    if tokens and len(size) == 1 and leaf.shape[1:2] == size:
        return leaf * masks.mT  # features (b n c)
    return leaf * masks.reshape(len(masks), *[1] * (leaf.ndim - 1 - len(size)), *size)
