"""What a method of many passes takes from its engine."""

import pytest
import torch
from torch import nn

from multicam import compat
from multicam.errors import MulticamError
from tests.helpers.models import Branch, seeded


class Net(nn.Module):
    """A convolution whose channels are switched off, and what follows it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = Branch(3, 12), nn.Linear(12, 4)
        self.sizes: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.encoder(x).mean((2, 3))
        self.sizes.append(len(features))
        return self.head(features)


@pytest.mark.parametrize("name", ["ScoreCAM", "AblationCAM"])
def test_the_size_of_a_batch_may_change_between_calls(name: str) -> None:
    model, x = seeded(Net), torch.rand(1, 3, 16, 16)
    cam = getattr(compat, name)(model, [model.encoder])
    for size, largest in ((32, 12), (5, 5)):
        cam.batch_size = size
        model.sizes.clear()
        cam(x)
        assert max(model.sizes) == largest and cam.batch_size == size
    with pytest.raises(MulticamError, match="batch_size must be a whole number of at least 1, not 0"):
        cam.batch_size = 0
