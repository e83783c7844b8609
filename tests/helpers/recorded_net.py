"""A model with attention of every kind, and small parts to record."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Cross(nn.Module):
    """Attention of x to y: by the kernel, or written out."""

    def __init__(self, fused: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.fused, self.dropout, self.heads = fused, dropout, 2
        self.to_q, self.to_kv = nn.Linear(8, 8), nn.Linear(8, 16)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = (z.unflatten(-1, (2, 4)).transpose(1, 2) for z in (self.to_q(x), *self.to_kv(y).chunk(2, -1)))
        rate = self.dropout if self.training else 0.0
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=rate)
        else:
            out = F.dropout((q @ k.mT / 2).softmax(-1), rate, self.training) @ v
        return out.transpose(1, 2).flatten(2)


class Net(nn.Module):
    """A kernel, attention that is written out, and nn.MultiheadAttention."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.x, self.y = nn.Linear(4, 8), nn.Linear(3, 8)
        self.fused, self.written = Cross(True, dropout), Cross(False, dropout)
        self.mha = nn.MultiheadAttention(8, 2, dropout, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = self.x(x), self.y(y)
        x = x + self.fused(x, y)
        x = x + self.written(x, y)
        x = x + self.mha(x, x, x, need_weights=False)[0]
        return self.head(x.mean(1))


NAMES = ["fused#0", "written#0", "mha#0"]


def net(cls: type[nn.Module] = Net, **options: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return cls(**options).eval()


def pair(b: int = 2) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(b)
    return torch.randn(b, 5, 4, generator=g), torch.randn(b, 6, 3, generator=g)


class Scripted(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x)


def own_attention(x: Tensor) -> Tensor:
    return torch.softmax(x @ x.transpose(-2, -1), -1) @ x


class Own(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return own_attention(x)
