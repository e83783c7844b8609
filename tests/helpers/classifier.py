"""A small classifier of photos, photos for it, and pytorch-grad-cam's words for what is asked of it."""

import numpy as np
import torch
import torch.nn.functional as F
from pytorch_grad_cam.utils.image import scale_cam_image
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn

EARLY, LATE = "2", "5"  # layers behind a ReLU


def net(classes: int = 6) -> nn.Sequential:
    """A classifier of photos; its head is large, so that the epsilons of others do not matter."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trunk = [nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8)]
        model = nn.Sequential(*trunk, nn.ReLU(), nn.AdaptiveAvgPool2d((2, 3)), nn.Flatten(), nn.Linear(48, classes))
        with torch.no_grad():
            model[-1].weight *= 5
        return model.eval()


def photos(b: int = 2, size: tuple[int, ...] = (24, 32), c: int = 3) -> Tensor:
    """Blobs: smooth enough that maps have a structure of their own."""
    g = torch.Generator().manual_seed(b)
    x = F.interpolate(torch.randn(b, c, 6, 8, generator=g), size[-2:], mode="bilinear")
    return x if len(size) == 2 else torch.stack([x * (1 + i / 3) for i in range(size[0])], 2)


def minmax(maps: Tensor) -> np.ndarray:
    return scale_cam_image(maps.numpy())


def theirs(x: Tensor, c: int = 1) -> list[ClassifierOutputTarget]:
    return [ClassifierOutputTarget(c)] * len(x)
