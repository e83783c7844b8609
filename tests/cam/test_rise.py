"""RISE: against its formula with the masks that it drew, closed forms of linear models, and inputs that nothing reads."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multicam.cam.rise import RISE
from tests.helpers.engines import assert_close
from tests.helpers.grids import same_size
from tests.helpers.models import Fusion, fusion_inputs, seeded


class Weighed(nn.Module):
    """The sum of an image's pixels, weighed, and a constant."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        return ((x * self.weights).sum((1, 2, 3)) + 7)[:, None]


def test_rise_of_a_linear_model_is_its_weights_times_the_input() -> None:
    """The evidence lies where the weights are."""
    weights = torch.zeros(24, 24)
    weights[4:10, 12:20] = 1.0
    weights[16:20, 2:6] = -0.5
    x = torch.rand(2, 1, 24, 24, generator=torch.Generator().manual_seed(0))
    found = RISE(Weighed(weights), masks=2000, cells=6)(x, 0, signed=True)
    smooth = F.avg_pool2d((x * weights), 5, 1, 2)[:, 0]
    for b in range(2):
        assert np.corrcoef(found[b].flatten(), smooth[b].flatten())[0, 1] > 0.85


@pytest.mark.parametrize(("where", "tolerance"), [("even", 0.02), ("centre", 0.08), ("corner", 0.15)])
def test_the_mean_of_rise_is_the_score_less_that_of_zeros(where: str, tolerance: float) -> None:
    """On average over seeds. Without regard to the border, the corner's came out as 0.57 of it."""
    weights = torch.zeros(28, 28)
    weights[{"even": slice(None), "centre": slice(10, 18), "corner": slice(0, 4)}[where]] = 1
    weights = weights * weights.mT
    x = torch.ones(1, 1, 28, 28)
    means = [RISE(Weighed(weights), masks=1000, seed=s)(x, 0, signed=True).mean() / weights.sum() for s in range(12)]
    assert torch.stack(means).mean().item() == pytest.approx(1, abs=tolerance)


def test_rise_is_the_papers_map_without_its_constant() -> None:
    model, x = same_size()
    seen: list[Tensor] = []
    rise = RISE(model, masks=64, cells=8, keep=0.4, batch_size=16)
    trace_of = x[:1]
    hook = model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    found = rise(trace_of, 2, signed=True)[0]
    hook.remove()
    rows = torch.cat([x for x in seen if len(x) == 16])
    masks = (rows / trace_of).mean(1)
    scores = model(rows)[:, 2].detach()
    paper = (scores[:, None, None] * masks).mean(0) / 0.4
    covariance = (paper - scores.mean() * masks.mean(0) / 0.4) / 0.6
    inside = slice(3, 7), slice(2, 6)  # further from the border than a cell reaches
    assert_close(found[inside], covariance[inside] * (80 / 2), 1e-3)


def test_rise_masks_each_input_alone_and_leaves_an_ignored_one_at_zero() -> None:
    class Ignoring(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fusion = seeded(Fusion)

        def forward(self, rgb: Tensor, depth: Tensor, texture: Tensor) -> Tensor:
            return self.fusion(rgb, depth, torch.ones_like(texture) + 0 * texture)

    maps = RISE(Ignoring(), masks=40)(fusion_inputs(2), 1, signed=True)
    assert maps.comparable
    assert maps["texture"].abs().max() < 1e-6 * maps["rgb"].abs().max()
    alone = RISE(Ignoring(), "depth", masks=40, batch_size=7)(fusion_inputs(2), 1, signed=True)
    assert_close(alone, maps["depth"], 1e-4)


def test_rise_chooses_the_class_once() -> None:
    model, x = same_size()
    top = model(x).argmax(1).tolist()
    assert_close(RISE(model, masks=32)(x), RISE(model, masks=32)(x, top))
