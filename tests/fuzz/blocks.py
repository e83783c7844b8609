"""What random models are made of: modules that keep a layout, and wrappers around a chain of them.

There are three layouts, each with WIDTH channels: "image" `(b c h w)`, "words" `(b n c)` and "vector" `(b c)`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH = 4


class Do(nn.Module):
    """An operation as a module, as people write small ones."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        return OPERATIONS[self.what](x)

    def extra_repr(self) -> str:
        return self.what


def _add_in_place(x: Tensor) -> Tensor:
    x += 0.3
    return x


def _slice_in_place(x: Tensor) -> Tensor:
    x[..., :1] *= 2
    return x


def _rows_in_place(x: Tensor) -> Tensor:
    for row in x:
        row -= 0.2
    return x


def _filled(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    out[..., :1] = x[..., :1].tanh()
    out[..., 1:] = x[..., 1:] * 1.5
    return out


def _gate(x: Tensor) -> Tensor:
    with torch.no_grad():
        gate = x.mean(tuple(range(1, x.ndim)), keepdim=True).sigmoid()
    return x * gate


def _strongest(x: Tensor) -> Tensor:
    chosen = x.flatten(1).argmax(1)
    return x * (1 + 0.2 * chosen.view(-1, *[1] * (x.ndim - 1)))


def _each_its_way(x: Tensor) -> Tensor:
    return torch.stack([row * 2 if row.mean() > 0 else row - 1 for row in x])


def _each_its_number(x: Tensor) -> Tensor:
    return torch.stack([row * (1 + row.amax().item()) for row in x])


def _once_more_if_small(x: Tensor) -> Tensor:
    """Rows do not depend on each other, but how often the loop runs does."""
    for _ in range(3):
        small = x.flatten(1).abs().mean(1) < 0.5
        if not small.any():
            break
        x = torch.where(small.view(-1, *[1] * (x.ndim - 1)), 1.5 * x + 0.1, x)
    return x


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "relu_": lambda x: x.relu_(),
    "tanh_": lambda x: x.tanh_(),
    "add_": _add_in_place,
    "slice_": _slice_in_place,
    "rows_": _rows_in_place,
    "filled": _filled,
    "gate": _gate,
    "half_detached": lambda x: x + 0.5 * x.detach(),
    "detached": lambda x: x.detach(),
    "strongest": _strongest,
    "sorted": lambda x: x.sort(dim=-1).values,
    "rounded": lambda x: x + 0.1 * (3 * x).round(),
    "each_its_way": _each_its_way,
    "each_its_number": _each_its_number,
    "once_more_if_small": _once_more_if_small,
    "data": lambda x: x.data * 0.5 + x,
}


class Written(nn.Module):
    """Attention of tokens `(b n c)` to each other: written out, fused, or in PyTorch's module."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if kind in ("mha", "mha_second"):
            self.mha = nn.MultiheadAttention(WIDTH, 2, batch_first=kind == "mha")
        elif kind == "encoder":
            layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, batch_first=True, dropout=0.2)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        else:
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "mha":
            return x + self.mha(x, x, x, need_weights=False)[0]
        if self.kind == "mha_second":
            turned = x.transpose(0, 1)
            return x + self.mha(turned, turned, turned)[0].transpose(0, 1)
        if self.kind == "encoder":
            return self.encoder(x)
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.kind == "sdpa":
            return x + F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + (q @ k.mT / WIDTH**0.5).softmax(-1) @ v


class OnTokens(nn.Module):
    """What takes tokens, for images and vectors."""

    def __init__(self, inner: nn.Module, layout: str) -> None:
        super().__init__()
        self.inner, self.layout = inner, layout

    def forward(self, x: Tensor) -> Tensor:
        if self.layout == "image":
            return self.inner(x.flatten(2).mT).mT.reshape(x.shape)
        return self.inner(x[:, None])[:, 0]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x)[0]


class Around(nn.Module):
    """A chain of blocks called in one way or another that does not change what a row gives."""

    def __init__(self, kind: str, inner: nn.Module) -> None:
        super().__init__()
        self.kind, self.inner = kind, inner

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "residual":
            return x + self.inner(x)
        if self.kind == "twice":
            return self.inner(x) - 0.5 * self.inner(x.flip(-1))
        if self.kind == "checkpoint":
            return checkpoint(self.inner, x, use_reentrant=False)
        if self.kind == "plain":
            return self.inner(x)
        if self.kind == "folded":  # two versions of each sample, whole batches behind each other
            first, second = self.inner(torch.cat([x, -x])).chunk(2)
            return first * second.tanh()
        if self.kind == "folded_inside":  # both versions of a sample side by side
            both = self.inner(torch.stack([x, -x], 1).flatten(0, 1)).unflatten(0, (-1, 2))
            return both[:, 0] - both[:, 1].tanh()
        if self.kind == "by_size":  # samples in another order, and back
            order = x.flatten(1).sum(1).argsort()
            return self.inner(x[order])[order.argsort()]
        assert self.kind == "no_grad"
        with torch.no_grad():
            return self.inner(x) + 0.0


AROUND = ("residual", "twice", "checkpoint", "folded", "folded_inside", "by_size", "no_grad")


class Hooked(nn.Module):
    """A chain with somebody's hook on it, which is a closure as most are."""

    def __init__(self, kind: str, inner: nn.Module) -> None:
        super().__init__()
        self.kind, self.inner, self.seen = kind, inner, {}
        if kind == "kept":
            inner.register_forward_hook(lambda m, i, o: self.seen.__setitem__("out", o))
        elif kind == "kept_input":
            inner.register_forward_pre_hook(lambda m, i: self.seen.__setitem__("in", i[0]))
        elif kind == "changed":
            inner.register_forward_hook(lambda m, i, o: 1.5 * o + 0.1)
        elif kind == "changed_":
            inner.register_forward_hook(_scaled)
        else:
            assert kind == "changed_input"
            inner.register_forward_pre_hook(lambda m, i: (0.7 * i[0],))

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        if self.kind == "kept":
            return 0.5 * out + self.seen["out"].tanh()
        return out + 0.5 * self.seen["in"] if self.kind == "kept_input" else out


def _scaled(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    output *= 1.5


HOOKED = ("kept", "kept_input", "changed", "changed_", "changed_input")


def mix(layout: str) -> nn.Module:
    return nn.Conv2d(WIDTH, WIDTH, 3, padding=1) if layout == "image" else nn.Linear(WIDTH, WIDTH)


def norm(layout: str) -> nn.Module:
    return nn.LayerNorm(WIDTH) if layout == "words" else nn.GroupNorm(2, WIDTH)


def batch_norm(layout: str) -> nn.Module:
    if layout == "words":
        return nn.LayerNorm(WIDTH)
    found = nn.BatchNorm2d(WIDTH) if layout == "image" else nn.BatchNorm1d(WIDTH)
    nn.init.uniform_(found.running_var, 0.5, 1.5)
    nn.init.normal_(found.running_mean, std=0.3)
    return found


def on_tokens(make: Callable[[], nn.Module], layout: str) -> nn.Module:
    return make() if layout == "words" else OnTokens(make(), layout)


MODULES: dict[str, Callable[[str], nn.Module]] = {
    "mix": mix,
    "norm": norm,
    "batch_norm": batch_norm,
    "dropout": lambda layout: nn.Dropout(0.3),
    "relu_module_": lambda layout: nn.ReLU(inplace=True),
    "down": lambda layout: nn.AvgPool2d(2, ceil_mode=True) if layout == "image" else nn.Identity(),
    "mha": lambda layout: on_tokens(lambda: Written("mha"), layout),
    "mha_second": lambda layout: on_tokens(lambda: Written("mha_second"), layout),
    "sdpa": lambda layout: on_tokens(lambda: Written("sdpa"), layout),
    "written": lambda layout: on_tokens(lambda: Written("written"), layout),
    "encoder": lambda layout: on_tokens(lambda: Written("encoder"), layout),
    "gru": lambda layout: on_tokens(Recurrent, layout),
}
