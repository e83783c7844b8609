"""Models that divide by, rank or choose by something of the whole batch: what-ifs have the scores of plain passes of each alone.

Divided by the largest value of its batch, a what-if had another score beside others than alone, and maps depended on `batch_size` without a word.
"""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor, nn

import multicam as mc

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*depend on what else is in the batch"),
    pytest.mark.filterwarnings("ignore:running .* does not give"),
]


class Net(nn.Module):
    """A depth map; what is made of its features says the kind."""

    def __init__(self) -> None:
        super().__init__()
        self.b, self.head = nn.Conv2d(1, 4, 3), nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, depth: Tensor) -> Tensor:
        out: Tensor = self.head(self.seen(self.b(depth)).mean((2, 3)))
        return out

    def seen(self, f: Tensor) -> Tensor:
        raise NotImplementedError


class Largest(Net):
    """Scaled by the largest value."""

    def seen(self, f: Tensor) -> Tensor:
        f = f.relu()
        return f / f.amax().clamp(min=1e-6)


class Normalised(Net):
    """Batch normalisation without running statistics, as in meta learning and style transfer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4, track_running_stats=False)

    def seen(self, f: Tensor) -> Tensor:
        out: Tensor = self.norm(f)
        return out.tanh()


class Pruned(Net):
    """The strongest third of the places of all rows, as token pruning with one threshold leaves them."""

    def seen(self, f: Tensor) -> Tensor:
        strength = f.abs().sum(1, keepdim=True)
        kept = strength.flatten().topk(strength.numel() // 3).values.min()
        return f * (strength >= kept)


class AcrossRows(Net):
    """Attention whose axes were swapped: rows of the batch attend to each other, place by place."""

    def seen(self, f: Tensor) -> Tensor:
        q = f.permute(2, 3, 0, 1)
        return ((q @ q.mT * 3).softmax(-1) @ q).permute(2, 3, 0, 1)


class Crowded(Net):
    """Experts with places for so many rows of the batch: who comes late is turned away, as with a capacity in switch transformers."""

    def seen(self, f: Tensor) -> Tensor:
        expert = (f.mean((1, 2, 3)) > 0).long()
        turn = nn.functional.one_hot(expert, 2).cumsum(0).gather(1, expert[:, None])[:, 0]
        return f.relu() * (turn <= 3).float().view(-1, 1, 1, 1) + f * 0.1


class Balanced(Net):
    """Sinkhorn's iterations between rows and prototypes, as in SwAV."""

    def seen(self, f: Tensor) -> Tensor:
        q = (f.mean((2, 3)) * 4).exp()
        for _ in range(3):
            q = q / q.sum(0, keepdim=True)
            q = q / q.sum(1, keepdim=True)
        return f * q[..., None, None] * 4


class Quantised(Net):
    """Rounded to 15 steps of the range of all, as in dynamic quantisation by tensor."""

    def seen(self, f: Tensor) -> Tensor:
        step = (f.amax() - f.amin()).clamp(min=1e-6) / 15
        return f + ((f / step).round() * step - f).detach()


class First(Net):
    """Compared with the first row, which was meant as the reference of a sequence."""

    def seen(self, f: Tensor) -> Tensor:
        return f * 2 - f[:1].mean((2, 3), keepdim=True).tanh()


KINDS = [Largest, Normalised, Pruned, AcrossRows, Crowded, Balanced, Quantised, First]
every = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
SEEDS = range(3)


def made(kind: type[Net], seed: int) -> tuple[Net, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind().eval(), torch.rand(1, 1, 8, 8)


def score(model: nn.Module, x: Tensor) -> Tensor:
    scores: Tensor = model(x)[0, 1].detach()
    return scores


def changed(model: Net, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """The score of a plain pass in which the encoder returns something else."""
    handle = model.b.register_forward_hook(lambda module, args, output: change(output))
    found = score(model, x)
    handle.remove()
    return found


@every
def test_covered_patches_are_those_of_plain_passes(kind: type[Net]) -> None:
    for seed in SEEDS:
        model, x = made(kind, seed)
        drops = []
        for top, left in product(range(0, 8, 2), repeat=2):
            hidden = x.clone()
            hidden[..., top : top + 2, left : left + 2] = 0
            drops.append(score(model, x) - score(model, hidden))
        for size in (32, 5):
            found = mc.occlusion(model, x, 1, patch=2, batch_size=size)["depth"]
            torch.testing.assert_close(found[0, 0, ::2, ::2].flatten(), torch.stack(drops))


@every
def test_channels_that_are_taken_away_are_those_of_plain_passes(kind: type[Net]) -> None:
    for seed in SEEDS:
        model, x = made(kind, seed)
        cam = mc.AblationCAM(model, "b")
        (site,) = cam.trace(x, 1).sites.values()
        drops = [
            score(model, x) - changed(model, x, lambda f, c=c: f.index_fill(1, torch.tensor([c]), 0.0))
            for c in range(4)
        ]
        torch.testing.assert_close(cam.weights(site)[0], torch.stack(drops), atol=1e-5, rtol=1e-4)
        many = torch.stack([site.acts[0] * k / 8 for k in range(12)])
        expected = [changed(model, x, lambda f, k=k: f * k / 8) for k in range(12)]
        torch.testing.assert_close(site.rescore(many), torch.stack(expected), atol=1e-5, rtol=1e-4)


@every
def test_shares_of_regions_are_those_of_plain_passes(kind: type[Net]) -> None:
    for seed in SEEDS:
        model, x = made(kind, seed)
        v = {}
        for kept in product((0.0, 1.0), repeat=4):
            mask = torch.tensor(kept).view(2, 2).repeat_interleave(4, 0).repeat_interleave(4, 1)
            v[kept] = score(model, x * mask)
        expected = []
        for i in range(4):
            share = torch.zeros(())
            for kept in v:
                if kept[i]:
                    others = int(sum(kept)) - 1
                    share += (v[kept] - v[(*kept[:i], 0.0, *kept[i + 1 :])]) / (4, 12, 12, 4)[others]
            expected.append(share)
        found = mc.region_contribution(model, x, 1, regions=2).contribution.shapley[0]
        torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-4)
