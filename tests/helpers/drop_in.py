"""What the tests of the drop-in give to it and to pytorch-grad-cam alike."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet18

from multicam import compat


class Net(nn.Module):
    """Nothing in place, so that pytorch-grad-cam sees what each layer returns."""

    def __init__(self, dims: int = 2, classes: int = 10) -> None:
        super().__init__()
        conv, norm = (nn.Conv2d, nn.BatchNorm2d) if dims == 2 else (nn.Conv3d, nn.BatchNorm3d)
        self.first = nn.Sequential(conv(3, 6, 3, 2, 1), norm(6), nn.ReLU())
        self.second = nn.Sequential(conv(6, 8, 3, 2, 1), norm(8), nn.ReLU())
        self.third = nn.Sequential(conv(8, 12, 3, 1, 1), nn.ReLU())
        self.head = nn.Linear(12, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.third(self.second(self.first(x))).flatten(2).mean(2))


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase):
                nn.init.uniform_(module.running_var, 0.5, 1.5)
                nn.init.normal_(module.running_mean, std=0.3)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
    return model.eval()


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


GRADIENT = ["GradCAM", "HiResCAM", "GradCAMElementWise", "GradCAMPlusPlus", "XGradCAM", "LayerCAM"]
EIGEN = ["EigenCAM", "EigenGradCAM", "SegEigenCAM", "KPCA_CAM"]
METHODS = [*GRADIENT, *EIGEN, "FEM", "ShapleyCAM", "ScoreCAM", "AblationCAM", "FullGrad"]


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 16))
        self.blocks = nn.Sequential(
            *(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True, norm_first=True) for _ in range(2))
        )
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).mT
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], 1)
        return self.head(self.blocks(tokens).mean(1))


class Large:
    """A class score so large that the epsilons of pytorch-grad-cam do not count."""

    def __init__(self, category: int) -> None:
        self.category = category

    def __call__(self, output: Tensor) -> Tensor:
        return 1000 * output[self.category] + 5000


def hires(model: nn.Module, *layers: Any, **options: Any) -> compat.HiResCAM:
    return compat.HiResCAM(model, list(layers), **options)


def resnet() -> nn.Module:
    return resnet18(num_classes=10)


class Soft(Large):
    """A probability, whose curvature makes Shapley-CAM differ from Grad-CAM."""

    def __call__(self, output: Tensor) -> Tensor:
        return 1000 * output.softmax(-1)[self.category]


def linear_zoom(x: np.ndarray, factors: list[float]) -> np.ndarray:
    """What enlarges volumes linearly between the centres of cells, in place of scipy's cubic zoom."""
    size = [round(side * factor) for side, factor in zip(x.shape, factors, strict=True)]
    return F.interpolate(torch.from_numpy(x)[None, None], size, mode="trilinear")[0, 0].numpy()
