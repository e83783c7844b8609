"""What the tests of the drop-in give to it and to pytorch-grad-cam alike."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


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
