"""pytorch-grad-cam's metrics, by their names there."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import cv2
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from multicam.call.inputs import Inputs
from multicam.compat.older import spoken
from multicam.compat.targets import Targets, per_image
from multicam.metrics.imputing import impute
from multicam.watch.trace import Trace

Maps = Float[np.ndarray, "b h w"]
Scores = Float[np.ndarray, "b"]
PERCENTILES = (10, 20, 30, 40, 50, 60, 70, 80, 90)


class PerturbationConfidenceMetric:
    """How the score changes when each image is changed as its map says.

    Args:
        perturbation: From an image `(c h w)` and its map `(h w)` to the changed image.
    """

    def __init__(self, perturbation: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.perturbation = perturbation

    def __call__(
        self,
        input_tensor: Float[Tensor, "b c h w"],
        cams: Maps,
        targets: Targets,
        model: nn.Module,
        return_visualization: bool = False,
        return_diff: bool = True,
    ) -> Any:
        """For each image, the score of the changed one less that of the image.

        Args:
            input_tensor: The images.
            cams: Their maps.
            targets: One for each image, as for a call of `BaseCAM`.
            model: The model.
            return_visualization: Return the changed images too.
            return_diff: Else the score of the changed image alone.
        """
        maps = torch.as_tensor(np.asarray(cams))
        changed = torch.stack([self.perturbation(x, m) for x, m in zip(input_tensor.detach().cpu(), maps, strict=True)])
        changed = changed.to(input_tensor)
        trace = Trace(model, Inputs(input_tensor), {}, per_image(targets, len(input_tensor)))
        scores = trace.again(Inputs(changed)).scores
        result = (scores - trace.scores if return_diff else scores).float().cpu().numpy()
        return (result, changed) if return_visualization else result


class CamMultImageConfidenceChange(PerturbationConfidenceMetric):
    """How the score changes when each image is multiplied by its map."""

    def __init__(self) -> None:
        super().__init__(lambda image, cam: image * cam)


class DropInConfidence(CamMultImageConfidenceChange):
    """By how much the score falls when each image is multiplied by its map; 0 where it rises."""

    def __call__(self, *args: Any, **kwargs: Any) -> Scores:
        """The drop `(b)`; the arguments are those of `PerturbationConfidenceMetric`."""
        return np.asarray(np.maximum(-super().__call__(*args, **kwargs), 0))


class IncreaseInConfidence(CamMultImageConfidenceChange):
    """Whether the score rises when each image is multiplied by its map."""

    def __call__(self, *args: Any, **kwargs: Any) -> Scores:
        """1 or 0 for each image; the arguments are those of `PerturbationConfidenceMetric`."""
        return np.asarray(super().__call__(*args, **kwargs) > 0, dtype=np.float32)


class NoisyLinearImputer:
    """Pixels replaced by the weighted mean of their neighbours, see `multicam.metrics.imputing.impute`.

    Args:
        noise: The standard deviation of the noise.
        seed: Of the noise.
    """

    @spoken
    def __init__(self, noise: float = 0.01, *, seed: int = 0) -> None:
        self.noise = noise
        self.seed = seed

    def __call__(self, img: Float[Tensor, "c h w"], mask: Float[Tensor, "h w"]) -> Float[Tensor, "c h w"]:
        """The image with the pixels where the mask is 0 replaced."""
        return impute(img[None], (mask > 0.5)[None], noise=self.noise, seed=self.seed)[0]


class RemoveMostRelevantFirst:
    """An image without the pixels whose value in the map is at or above a percentile.

    Args:
        percentile: Of the map's values; `"auto"`: Otsu's threshold.
        imputer: What replaces them.
    """

    def __init__(self, percentile: float | Literal["auto"], imputer: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.percentile = percentile
        self.imputer = imputer

    def __call__(self, input_tensor: Float[Tensor, "c h w"], mask: Float[Tensor, "h w"]) -> Float[Tensor, "c h w"]:
        """The changed image."""
        values = mask.cpu().numpy()
        if self.percentile == "auto":
            flag, eight = cv2.THRESH_BINARY_INV + cv2.THRESH_OTSU, (values * 255).astype(np.uint8)
            keep = cv2.threshold(eight, 0, 1, flag)[1]
        else:
            keep = values < np.percentile(values, self.percentile)
        return self.imputer(input_tensor, torch.from_numpy(keep.astype(np.float32)))


class RemoveLeastRelevantFirst(RemoveMostRelevantFirst):
    """As `RemoveMostRelevantFirst`, for one less the map."""

    def __call__(self, input_tensor: Float[Tensor, "c h w"], mask: Float[Tensor, "h w"]) -> Float[Tensor, "c h w"]:
        """The changed image."""
        return super().__call__(input_tensor, 1 - mask)


class ROADMostRelevantFirst(PerturbationConfidenceMetric):
    """How the score changes when the most relevant pixels are replaced by their neighbours; arXiv:2202.00449."""

    def __init__(self, percentile: float | Literal["auto"] = 80) -> None:
        super().__init__(RemoveMostRelevantFirst(percentile, NoisyLinearImputer()))


class ROADLeastRelevantFirst(PerturbationConfidenceMetric):
    """How the score changes when the least relevant pixels are replaced by their neighbours."""

    def __init__(self, percentile: float | Literal["auto"] = 20) -> None:
        super().__init__(RemoveLeastRelevantFirst(percentile, NoisyLinearImputer()))


class AveragerAcrossThresholds:
    """The mean of a metric over percentiles.

    Args:
        imputer: From a percentile to the metric.
        percentiles: Which.
    """

    def __init__(
        self, imputer: Callable[[float], PerturbationConfidenceMetric], percentiles: Sequence[float] = PERCENTILES
    ) -> None:
        self.imputer = imputer
        self.percentiles = percentiles

    def __call__(
        self, input_tensor: Float[Tensor, "b c h w"], cams: Maps, targets: Targets, model: nn.Module
    ) -> Scores:
        """The mean `(b)`; the arguments are those of `PerturbationConfidenceMetric`."""
        found = [self.imputer(percentile)(input_tensor, cams, targets, model) for percentile in self.percentiles]
        return np.asarray(np.mean(found, axis=0))


class ROADMostRelevantFirstAverage(AveragerAcrossThresholds):
    """The mean of `ROADMostRelevantFirst` over percentiles."""

    def __init__(self, percentiles: Sequence[float] = PERCENTILES) -> None:
        super().__init__(ROADMostRelevantFirst, percentiles)


class ROADLeastRelevantFirstAverage(AveragerAcrossThresholds):
    """The mean of `ROADLeastRelevantFirst` over percentiles."""

    def __init__(self, percentiles: Sequence[float] = PERCENTILES) -> None:
        super().__init__(ROADLeastRelevantFirst, percentiles)


class ROADCombined:
    """Half the difference of the two averages: high for maps that order the pixels well."""

    def __init__(self, percentiles: Sequence[float] = PERCENTILES) -> None:
        self.least = ROADLeastRelevantFirstAverage(percentiles)
        self.most = ROADMostRelevantFirstAverage(percentiles)

    def __call__(
        self, input_tensor: Float[Tensor, "b c h w"], cams: Maps, targets: Targets, model: nn.Module
    ) -> Scores:
        """The score `(b)`; the arguments are those of `PerturbationConfidenceMetric`."""
        call = input_tensor, cams, targets, model
        return np.asarray((self.least(*call) - self.most(*call)) / 2)


class Complexity:
    """The mean of each map's absolute values."""

    def __call__(self, grayscale_cams: Maps) -> Scores:
        """The complexity `(b)`."""
        return np.asarray(np.abs(grayscale_cams).mean((1, 2)))


class Coherency:
    """The correlation, as 0..1, of each map with that of the image multiplied by it; arXiv:2104.10252."""

    def __call__(
        self,
        input_tensor: Float[Tensor, "b c h w"],
        grayscale_cams: Maps,
        targets: Targets,
        model: nn.Module,
        base_method: Callable[..., Maps],
    ) -> Scores:
        """The coherency `(b)`."""
        masked = input_tensor * torch.from_numpy(grayscale_cams)[:, None].to(input_tensor)
        again = base_method(input_tensor=masked, targets=targets)
        a, b = (m.reshape(len(m), -1) - m.mean((1, 2))[:, None] for m in (again, grayscale_cams))
        correlation = (a * b).sum(1) / (np.sqrt((a**2).sum(1) * (b**2).sum(1)) + 1e-8)
        return np.asarray((correlation + 1) / 2)


class ARCC:
    """The harmonic mean of coherency, one less complexity, and twice `ROADCombined` cut to 0..1; arXiv:2605.14641.

    Args:
        base_method: What made the maps.
        road_percentiles: As for `ROADCombined`.
    """

    def __init__(self, base_method: Callable[..., Maps], road_percentiles: Sequence[float] = (20, 40, 60, 80)) -> None:
        self.base_method = base_method
        self.road = ROADCombined(road_percentiles)

    def __call__(
        self, input_tensor: Float[Tensor, "b c h w"], grayscale_cams: Maps, targets: Targets, model: nn.Module
    ) -> Scores:
        """The score `(b)`."""
        parts = (
            Coherency()(input_tensor, grayscale_cams, targets, model, self.base_method),
            1 - Complexity()(grayscale_cams),
            (2 * self.road(input_tensor, grayscale_cams, targets, model)).clip(0, 1),
        )
        return np.asarray(3 / sum(1 / (part + 1e-8) for part in parts))
