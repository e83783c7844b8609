"""The module that the tests of the command hand to it: models, factories that fail, and functions of inputs and outputs."""

import torch
from torch import nn


class Branch(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(channels, 8, 3, 2, 1), nn.ReLU(inplace=True))
        self.layer2 = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(inplace=True))

    def forward(self, x):
        return self.layer2(self.layer1(x))


class TwoBranch(nn.Module):
    def __init__(self):
        super().__init__()
        self.rgb, self.depth = Branch(3), Branch(1)
        self.head = nn.Linear(32, 5)

    def forward(self, rgb, depth, weight=1.0):
        a, b = self.rgb(rgb), self.depth(depth)
        logits = self.head(torch.cat([a.mean((2, 3)), weight * b.mean((2, 3))], 1))
        return {"logits": logits, "area": a.mean((1, 2, 3))}


class Patches(nn.Module):
    """Tokens of rgb behind a class token, and behind them those of a signal."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(12, 8)
        self.tune = nn.Conv1d(1, 8, 4, 4)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, rgb, audio):
        patches = nn.functional.pixel_unshuffle(rgb, 2).flatten(2).mT
        sound = self.tune(audio)
        tokens = torch.cat([torch.zeros(len(rgb), 1, 8), self.project(patches), sound.mT], 1)
        return self.head(self.mix(tokens).relu().mean(1))


def seeded(factory):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return factory()


def build():
    return seeded(TwoBranch)


def patches():
    return seeded(Patches)


def single():
    return seeded(lambda: nn.Sequential(Branch(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)))


def dark():
    model = single()
    model[3].weight.data.abs_().neg_()
    return model


def broken():
    raise FileNotFoundError("no backbone here")


def centred(given):
    return given | {"rgb": given["rgb"] - 0.5}


def failing(given):
    return given["rbg"]


def both(logits):
    return logits[:, 0] + logits[:, 1]
