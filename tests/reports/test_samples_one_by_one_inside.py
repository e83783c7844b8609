"""Models that run their encoders sample by sample, or a few at a time, inside of one call: shares are exact Shapley values by plain passes.

What an encoder returned in such a call belongs to one sample and not to the batch; taken for the batch's, shares were false by up to 80 %.
"""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

import multicam as mc


class Fused(nn.Module):
    """A photo and a depth image; how their encoders run is said by the kind."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(1, 4, 3), nn.Linear(8, 3)

    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        raise NotImplementedError

    def joined(self, a: Tensor, b: Tensor) -> Tensor:
        out: Tensor = self.head(torch.cat([a.relu().mean((-2, -1)), b.relu().mean((-2, -1))], -1)).tanh()
        return out


class Loop(Fused):
    """Each sample by itself, both inputs of it and the head."""

    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        return torch.cat([self.joined(self.a(r[None]), self.b(d[None])) for r, d in zip(rgb, depth, strict=True)])


class Unbatched(Fused):
    """Photos without an axis of the batch, as detectors take them, and the depth images backwards."""

    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        a = [self.a(r) for r in rgb]
        b = [self.b(d) for d in reversed(depth.unbind())][::-1]
        return torch.stack([self.joined(x, y) for x, y in zip(a, b, strict=True)])


class Mapped(Fused):
    """By `torch.vmap`, which gives an encoder one sample that is all of them."""

    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        return torch.vmap(lambda r, d: self.joined(self.a(r[None]), self.b(d[None]))[0])(rgb, depth)


class Chunks(Fused):
    """Photos two at a time, to save memory, and depth images all at once."""

    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        return self.joined(torch.cat([self.a(part) for part in rgb.split(2)]), self.b(depth))


class Sizes(Fused):
    """Each sample is resized by torchvision's own transform for detectors, which takes a list, and padded to the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.resize = GeneralizedRCNNTransform(12, 16, [0.0] * 3, [1.0] * 3, size_divisible=4)

    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        images, _ = self.resize(list(rgb))
        return self.joined(torch.stack([self.a(x) for x in images.tensors]), self.b(depth))


class Early(Fused):
    """Samples leave when they are sure, as of early exits: the second encoder runs on some of them only, one by one."""

    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        rows = []
        for r, d in zip(rgb, depth, strict=True):
            a = self.a(r[None])
            sure = bool(a.mean() > 0.02)
            rows.append(self.joined(a, self.a(r[None]) * 0 if sure else self.b(d[None])))
        return torch.cat(rows)


class Shared(Fused):
    """One encoder takes turns: a sample's photo, then its depth image, of all samples in a row."""

    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        seen = [self.a(x[None].expand(1, 3, -1, -1)) for pair in zip(rgb, depth, strict=True) for x in pair]
        return self.joined(torch.cat(seen[::2]), torch.cat(seen[1::2]) * 0.5)


KINDS = [Loop, Unbatched, Mapped, Chunks, Sizes, Early, Shared]


def made(kind: type[nn.Module], batch: int) -> tuple[nn.Module, dict[str, Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(batch)
        return kind().eval(), {"rgb": torch.rand(batch, 3, 8, 8), "depth": torch.rand(batch, 1, 8, 8)}


def score(model: nn.Module, x: dict[str, Tensor]) -> Tensor:
    """Of each sample, in a plain pass of it alone."""
    rows = [model(*(each[i : i + 1] for each in x.values()))[0, 1] for i in range(len(x["rgb"]))]
    return torch.stack(rows).detach()


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_shares_are_exact(kind: type[nn.Module], batch: int) -> None:
    model, x = made(kind, batch)
    v = {(a, b): score(model, {"rgb": x["rgb"] * a, "depth": x["depth"] * b}) for a, b in product((0, 1), repeat=2)}
    expected = torch.stack([v[1, 0] - v[0, 0] + v[1, 1] - v[0, 1], v[0, 1] - v[0, 0] + v[1, 1] - v[1, 0]], 1) / 2
    for size in (32, 32, 1):
        torch.testing.assert_close(mc.contribution(model, x, 1, batch_size=size).shapley, expected)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_what_is_covered_is_covered_in_a_plain_pass(kind: type[nn.Module], batch: int) -> None:
    model, x = made(kind, batch)
    options: dict[str, Any] = {"patch": 4, "wrt": ["depth"]}
    found = mc.occlusion(model, x, 1, **options)["depth"]
    for top, left in product((0, 4), repeat=2):
        hidden = x["depth"].clone()
        hidden[..., top : top + 4, left : left + 4] = 0
        drop = score(model, x) - score(model, {**x, "depth": hidden})
        torch.testing.assert_close(found[:, 0, top, left], drop)
