"""Does attention point at the evidence? A model of three inputs, trained until a class is written in one cell of one input.

The inputs are noise of 6 x 6 cells. In one cell of one input, drawn at random, stands one of four patterns: the class. A class token
and the tokens of `rgb` read `freq` and `tex` by cross-attention. Where the evidence is, is therefore known; what is counted is how
often a reading of the attention has its maximum there, in the three maps on their common scale.

    python -m benchmarks.planted_cells --seeds 5 --write docs/explanation/attention-is-evidence.md
"""

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Generator, Tensor, nn

from benchmarks.command import mark, publish
from benchmarks.tables import table
from multicam import HiResCAM, Maps, attention, legrad, relevance, rollout
from multicam.attending.attention_call import AttentionCall
from multicam.attending.attentions import Attention

INPUTS = ("rgb", "freq", "tex")
SIDE, PATCH, CLASSES = 6, 4, 4
MARK = mark("benchmarks.planted_cells")
Inputs = dict[str, Tensor]


class Block(nn.Module):
    """Self-attention of the first stream, and its cross-attention to the two others."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.own = nn.MultiheadAttention(width, heads, batch_first=True)
        self.freq = nn.MultiheadAttention(width, heads, batch_first=True)
        self.tex = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, freq: Tensor, tex: Tensor) -> Tensor:
        """The tokens of the first stream `(b n c)`."""
        own, to_freq, to_tex, mixed = self.norms
        y = own(x)
        x = x + self.own(y, y, y, need_weights=False)[0]
        x = x + self.freq(to_freq(x), freq, freq, need_weights=False)[0]
        x = x + self.tex(to_tex(x), tex, tex, need_weights=False)[0]
        out: Tensor = x + self.mlp(mixed(x))
        return out


class Reader(nn.Module):
    """Class scores `(b 4)` from three images of 24 px."""

    def __init__(self, width: int = 48, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.ModuleDict({name: nn.Conv2d(1, width, PATCH, PATCH) for name in INPUTS})
        self.deepen = nn.ModuleDict(
            {
                name: nn.Sequential(
                    nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
                )
                for name in INPUTS
            }
        )
        self.position = nn.Parameter(0.02 * torch.randn(1, SIDE * SIDE, width))
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, rgb: Tensor, freq: Tensor, tex: Tensor) -> Tensor:
        """The scores."""
        tokens = {}
        for name, image in zip(INPUTS, (rgb, freq, tex), strict=True):
            x = rearrange(self.embed[name](image), "b c h w -> b (h w) c") + self.position
            tokens[name] = x + self.deepen[name](x)
        x = torch.cat([self.cls_token.expand(len(rgb), -1, -1), tokens["rgb"]], dim=1)
        for block in self.blocks:
            x = block(x, tokens["freq"], tokens["tex"])
        scores: Tensor = self.head(self.norm(x)[:, 0])
        return scores


def patterns() -> Tensor:
    """The four patterns `(class 4 4)`: rows of a Hadamard matrix, so none is brighter than another."""
    hadamard = torch.tensor([[1.0]])
    for _ in range(4):
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    return hadamard[[5, 6, 9, 10]].view(CLASSES, PATCH, PATCH)


def draw(n: int, generator: Generator) -> tuple[Inputs, Tensor, Tensor, Tensor]:
    """Inputs, classes, the input that each class is written in, and the cell."""
    inputs = {name: torch.randn(n, 1, SIDE * PATCH, SIDE * PATCH, generator=generator) for name in INPUTS}
    label = torch.randint(CLASSES, (n,), generator=generator)
    where = torch.randint(len(INPUTS), (n,), generator=generator)
    cell = torch.randint(SIDE * SIDE, (n,), generator=generator)
    written = patterns()
    for i in range(n):
        row, column = divmod(int(cell[i]), SIDE)
        part = inputs[INPUTS[int(where[i])]][i, 0]
        part[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] += 2 * written[label[i]]
    return inputs, label, where, cell


def trained(seed: int, steps: int) -> tuple[nn.Module, float]:
    """A model, and its accuracy on samples that it has not seen."""
    torch.manual_seed(seed)
    generator = Generator().manual_seed(1000 + seed)
    model = Reader()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        inputs, label, _, _ = draw(128, generator)
        loss = F.cross_entropy(model(**inputs), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    inputs, label, _, _ = draw(512, Generator().manual_seed(99))
    with torch.no_grad():
        accuracy = (model(**inputs).argmax(1) == label).float().mean()
    return model, float(accuracy)


def readings(model: nn.Module, inputs: Inputs, label: Tensor) -> dict[str, dict[str, Tensor]]:
    """Maps of the three inputs `(b 24 24)` by the way to read attention."""
    g = Generator().manual_seed(0)
    return {
        "random": {name: torch.rand(len(label), SIDE, SIDE, generator=g) for name in INPUTS},
        **of_attention(attention(model, inputs, label.tolist()), INPUTS),
        "HiResCAM of the embeddings (no attention)": _cam(model, inputs, label),
    }


def of_attention(att: Attention, inputs: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """Maps of inputs that are all keys, by the way to read their attention and its gradients."""

    def averaged(read: Callable[[AttentionCall, str], Tensor]) -> dict[str, Tensor]:
        return {
            name: torch.stack([read(call, name) for call in att if name in call.inputs()[1]]).mean(0) for name in inputs
        }

    def last(read: Callable[[AttentionCall, str], Tensor]) -> dict[str, Tensor]:
        return {name: read([call for call in att if name in call.inputs()[1]][-1], name) for name in inputs}

    return {
        "attention of all queries, last layer": last(lambda call, name: call.heatmap(name)),
        "attention of all queries, mean over layers": averaged(lambda call, name: call.heatmap(name)),
        "attention of the class token, last layer": last(lambda call, name: call.heatmap(name, "cls")),
        "attention of the class token, mean over layers": averaged(lambda call, name: call.heatmap(name, "cls")),
        "gradient x attention, all queries": averaged(lambda call, name: call.heatmap(name, value="grad*weights")),
        "gradient x attention, class token": averaged(
            lambda call, name: call.heatmap(name, "cls", value="grad*weights")
        ),
        "rollout": rollout(att).maps(query="cls"),
        "relevance, one matrix": relevance(att, "block").maps(query="cls"),
        "relevance, Chefer's rules": relevance(att, "chefer").maps(query="cls"),
        "LeGrad": legrad(att),
    }


def _cam(model: nn.Module, inputs: Inputs, label: Tensor) -> Maps:
    maps = HiResCAM(model, {name: f"embed.{name}" for name in INPUTS})(inputs, label.tolist())
    assert isinstance(maps, Maps)
    return maps


def hits(maps: dict[str, Tensor], where: Tensor, cell: Tensor) -> tuple[float, float, float]:
    """How often the maximum lies in the cell: of the right input's map; of all three; and how often the right input has most."""
    grids = torch.stack([F.adaptive_avg_pool2d(maps[name][:, None], SIDE)[:, 0].flatten(1) for name in INPUTS], 1)
    rows = torch.arange(len(where))
    within = (grids[rows, where].argmax(1) == cell).float().mean()
    overall = (grids.flatten(1).argmax(1) == where * SIDE * SIDE + cell).float().mean()
    named = (grids.clamp(min=0).sum(2).argmax(1) == where).float().mean()
    return float(within), float(overall), float(named)


def report(seeds: int, steps: int, samples: int) -> str:
    """The table, with means and standard deviations over the seeds."""
    began = time.perf_counter()
    found: dict[str, list[tuple[float, float, float]]] = {}
    accuracies = []
    for seed in range(seeds):
        model, accuracy = trained(seed, steps)
        accuracies.append(accuracy)
        inputs, label, where, cell = draw(samples, Generator().manual_seed(7 + seed))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name, maps in readings(model, inputs, label).items():
                found.setdefault(name, []).append(hits(maps, where, cell))
    rows = []
    for name, values in found.items():
        mean, spread = np.mean(values, 0), np.std(values, 0)
        rows.append([name, *(f"{m:.2f} ± {s:.2f}" for m, s in zip(mean, spread, strict=True))])
    chance = 1 / (SIDE * SIDE)
    rows.append(["uniform (by chance)", f"{chance:.2f}", f"{chance / 3:.2f}", "0.33"])
    head = [
        "reading",
        "peak in the cell, on the right input",
        "peak in the cell, of all inputs",
        "most on the right input",
    ]
    where_from = (
        f"{seeds} seeds, {samples} held-out samples each; accuracy of the models {min(accuracies):.3f} to {max(accuracies):.3f} "
        f"(chance {1 / CLASSES:.2f}); ± is the standard deviation over seeds; {(time.perf_counter() - began) / 60:.1f} minutes."
    )
    return f"{where_from}\n\n{table(head, rows)}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, or write it into a page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.planted_cells", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--samples", type=int, default=200, help="held-out samples of each seed")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="a page whose results to replace")
    given = parser.parse_args(arguments)
    publish(report(given.seeds, given.steps, given.samples), given.write, MARK)


if __name__ == "__main__":
    main()
