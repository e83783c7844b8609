"""Small models with several inputs, written as people write them."""

import torch
from torch import Tensor, nn


class Branch(nn.Module):
    """A convolutional encoder with in-place activations: `(b c h w)` -> `(b width h/4 w/4)`."""

    def __init__(self, channels: int, width: int = 16) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(channels, 8, 3, 2, 1),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, width, 3, 2, 1),
        )
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.net(x))


class Fusion(nn.Module):
    """RGB tokens query the tokens of depth and texture; the attention returns a tuple."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.rgb, self.depth, self.texture = Branch(3), Branch(1), Branch(2)
        self.attn = nn.MultiheadAttention(16, 4, batch_first=batch_first)
        self.head = nn.Linear(16, 5)

    def forward(self, rgb: Tensor, depth: Tensor, texture: Tensor) -> Tensor:
        q, k, t = (branch(x).flatten(2).mT for branch, x in zip(self.branches, (rgb, depth, texture), strict=True))
        keys = torch.cat([k, t], 1)
        if self.attn.batch_first:
            mixed, _ = self.attn(q, keys, keys)
        else:
            mixed = self.attn(q.transpose(0, 1), keys.transpose(0, 1), keys.transpose(0, 1))[0].transpose(0, 1)
        return self.head((q + mixed).mean(1))

    @property
    def branches(self) -> tuple[nn.Module, ...]:
        return self.rgb, self.depth, self.texture


class Siamese(nn.Module):
    """One encoder for both dates, in-place arithmetic behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Branch(3)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        a, b = self.encoder(before), self.encoder(after)
        b -= a
        b *= 2.0
        return self.head(b)


class Captioned(nn.Module):
    """An image with token ids and a mask, a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.image = Branch(3)
        self.words = nn.Embedding(50, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, image: Tensor, ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        words = self.words(ids)
        words = words.mean(1) if mask is None else (words * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        features = self.image(image)
        return {"logits": self.head(features.mean((2, 3)) * words), "features": features}


class Overwriting(nn.Module):
    """Writes into its inputs, and into the list that they come in."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = Branch(3)

    def forward(self, views: list[Tensor], mask: Tensor) -> Tensor:
        views[0].mul_(2)
        views[1] = views[0] + 1
        mask[:] = 0
        return self.branch(views[1]).mean((2, 3))


def fusion_inputs(b: int = 2, size: int = 32) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(b * 1000 + size)
    shapes = {"rgb": (b, 3, size, size), "depth": (b, 1, size // 2, size), "texture": (b, 2, size, size // 2)}
    return {name: torch.rand(shape, generator=g) for name, shape in shapes.items()}


def seeded(factory: type[nn.Module], seed: int = 0, **options: bool) -> nn.Module:
    """A model with random weights and batch-norm statistics, in evaluation mode; the global RNG stays as it is."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = factory(**options)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_var, 0.5, 1.5)
                nn.init.normal_(module.running_mean, std=0.3)
    return model.eval()
