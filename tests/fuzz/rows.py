"""Blocks in which rows meet, or may not; threads; and blocks that keep a state."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _contrast(x: Tensor) -> Tensor:
    flat = F.normalize(x.flatten(1), dim=1)
    return x * (1 + (flat @ flat.mT)[:, 0].view(-1, *[1] * (x.ndim - 1)))


# What a row gives here depends on the others in its batch.
COMPANY: dict[str, Callable[[Tensor], Tensor]] = {
    "batch_max": lambda x: x / x.abs().amax().clamp(min=1e-6),
    "batch_mean": lambda x: x - 0.5 * x.mean(0, keepdim=True),
    "batch_softmax": lambda x: x * x.softmax(0),
    "batch_statistics": lambda x: (x - 0.3 * x.mean()) / (1 + x.var(correction=0)),
    "first_row": lambda x: x - 0.5 * x[:1],
    "last_row": lambda x: x * x[-1:].sigmoid(),
    "row_sum": lambda x: x + 0.2 * x.sum(0, keepdim=True),
    "next_row": lambda x: x + 0.4 * x.roll(1, 0),
    "contrast": _contrast,
    "if_mean": lambda x: 2 * x if x.mean() > 0 else x - 1,
    "item": lambda x: x * (1 + x.amax().item()),
}


class Together(nn.Module):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        return COMPANY[self.what](x)

    def extra_repr(self) -> str:
        return self.what


class Rows(nn.Module):
    """A chain that runs for one sample after the other, or takes exactly one, or no fewer than two."""

    def __init__(self, kind: str, inner: nn.Module) -> None:
        super().__init__()
        self.kind, self.inner = kind, inner

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "each":
            return torch.cat([self.inner(row[None]) for row in x])
        if self.kind == "each_written":
            found = [self.inner(x[i : i + 1].clone()) for i in range(len(x))]
            out = torch.zeros(len(x), *found[0].shape[1:], dtype=x.dtype)
            for i, row in enumerate(found):
                out[i] = row[0]
            return out
        if self.kind == "backwards":
            return torch.cat([self.inner(x[i : i + 1]) for i in reversed(range(len(x)))]).flip(0)
        if self.kind == "one":
            return self.inner(x.squeeze(0)[None])
        assert self.kind == "two"
        if len(x) < 2:
            raise ValueError("expected more than one row")
        return self.inner(x)


ROWS = ("each", "each_written", "backwards", "one", "two")


class Threaded(nn.Module):
    """A chain that runs in a thread: of a pool that is made for the call, or once with the model."""

    def __init__(self, kind: str, inner: nn.Module) -> None:
        super().__init__()
        self.kind, self.inner = kind, inner
        self.pool = ThreadPoolExecutor(1) if kind == "pool_kept" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            return self.pool.submit(self.run, x, torch.is_grad_enabled()).result()
        with ThreadPoolExecutor(2) as pool:
            if self.kind == "pool":
                return pool.submit(self.run, x, torch.is_grad_enabled()).result()
            # A thread of its own for each sample.
            asked = [pool.submit(self.run, row[None], torch.is_grad_enabled()) for row in x]
            return torch.cat([each.result() for each in asked])

    def run(self, x: Tensor, graph: bool) -> Tensor:
        with torch.set_grad_enabled(graph):
            return self.inner(x)


THREADED = ("pool", "pool_each", "pool_kept")


class State(nn.Module):
    """What is written into buffers and parameters in forward."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("kept", torch.ones(()))
        self.code = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        before = self.kept.clone()
        if self.kind == "count":
            self.kept += 1
            return 1.0 * x
        if self.kind == "decay":
            self.kept.data *= 0.5
            return x * before
        if self.kind == "renewed":
            self.kept.data = 0.5 * self.kept.data
            return x * before
        if self.kind == "replaced":
            self.kept = 0.5 * self.kept
            return x * before
        if self.kind == "code":
            before = self.code.detach().clone()
            self.code.data.mul_(0.5)
            return x * before
        assert self.kind == "total"  # of all that came by, with what comes now
        self.kept += x.detach().mean()
        return x + 0.2 * self.kept.clone()


STATE = ("count", "decay", "renewed", "replaced", "code", "total")
# A row's own result depends on what came before it, where a state is read again in the same pass.
MEMORY = ("decay", "renewed", "replaced", "code", "total")
