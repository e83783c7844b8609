"""Models that take one sample at a time, or no fewer than two rows: what-ifs run as often as it takes, and never more at once than fit.

Bags of slides, graphs and scenes are squeezed inside of the model (CLAM #120, pytorch-grad-cam #567, captum #840); a batch of what-ifs ended in an
error of somebody else's.
"""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import multicam as mc


class Bag(nn.Module):
    """Patches of one slide, squeezed out of a batch of one, and numbers of the patient."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.clinical, self.head = nn.Conv2d(1, 6, 5, 2), nn.Linear(2, 6), nn.Linear(6, 2)

    def forward(self, bag: Tensor, clinical: Tensor) -> Tensor:
        h = self.encoder(bag.squeeze(0)).relu().mean((2, 3))
        out: Tensor = self.head(h.amax(0, keepdim=True) + self.clinical(clinical))
        return out


class Gated(nn.Module):
    """Gated attention over the patches of a slide, as in CLAM, whose weights are a matrix without a batch; it says so."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.a, self.b = nn.Conv2d(1, 6, 5, 2), nn.Linear(6, 4), nn.Linear(6, 4)
        self.weigh, self.head = nn.Linear(4, 1), nn.Linear(8, 2)

    def forward(self, bag: Tensor, clinical: Tensor) -> dict[str, Tensor]:
        if bag.shape[0] != 1:
            raise ValueError(f"expects one bag, got {bag.shape[0]}")
        h = self.encoder(bag[0]).relu().mean((2, 3))
        weights = self.weigh(self.a(h).tanh() * self.b(h).sigmoid()).mT.softmax(1)
        return {"logits": self.head(torch.cat([weights @ h, clinical], 1)), "weights": weights}


class Graph(nn.Module):
    """Patches are the nodes of one graph, whose neighbours exchange features; a node's number is its place in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.own, self.other = nn.Conv2d(1, 6, 5, 2), nn.Linear(6, 6), nn.Linear(6, 6)
        self.head = nn.Linear(8, 2)

    def forward(self, bag: Tensor, clinical: Tensor) -> Tensor:
        h = self.encoder(bag.view(-1, 1, 28, 28)).relu().mean((2, 3))
        source, end = torch.tensor([[0, 1, 2, 3, 4], [1, 2, 3, 4, 0]])
        messages = torch.zeros(5, 6).index_add_(0, end, self.other(h)[source])
        if len(h) != 5:
            raise IndexError("nodes of another graph")
        nodes = (self.own(h) + messages).tanh()
        out: Tensor = self.head(torch.cat([nodes.sum(0), clinical.view(2)]))[None]
        return out


class Recurrent(nn.Module):
    """Patches in the order of a scan, read with a state that was made for one sample."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.read, self.head = nn.Conv2d(1, 6, 5, 2), nn.GRU(6, 6), nn.Linear(8, 2)
        self.register_buffer("start", torch.rand(1, 1, 6))

    def forward(self, bag: Tensor, clinical: Tensor) -> Tensor:
        h = self.encoder(bag.flatten(0, 1)).relu().mean((2, 3))[:, None]
        _, state = self.read(h, self.start)
        out: Tensor = self.head(torch.cat([state[0], clinical], 1))
        return out


KINDS = pytest.mark.parametrize("kind", [Bag, Gated, Graph, Recurrent], ids=lambda kind: kind.__name__)
SIZES = pytest.mark.parametrize("batch_size", [1, 16])
HALVES = torch.arange(2).repeat_interleave(14)[:, None].expand(28, 28)


def of_class(output: Any) -> Tensor:
    logits: Tensor = output["logits"] if isinstance(output, dict) else output
    return logits[:, 1]


def made(kind: type[nn.Module]) -> tuple[nn.Module, dict[str, Tensor], Callable[..., Tensor]]:
    """A model, its call, and the score of a plain pass with some inputs changed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = kind().eval(), {"bag": torch.rand(1, 5, 1, 28, 28), "clinical": torch.rand(1, 2)}
    return model, x, lambda **changed: of_class(model(**{**x, **changed}))[0].detach()


def covered(bag: Tensor, *rows: int) -> Tensor:
    """The bag without the upper or the lower half of each patch."""
    return bag * (1 - sum(((row == HALVES).float() for row in rows), torch.zeros(28, 28)))


@KINDS
@SIZES
def test_shares_are_those_of_plain_passes(kind: type[nn.Module], batch_size: int) -> None:
    model, x, score = made(kind)
    v = {(a, b): score(bag=x["bag"] * a, clinical=x["clinical"] * b) for a, b in product((0, 1), repeat=2)}
    expected = torch.stack([v[1, 0] - v[0, 0] + v[1, 1] - v[0, 1], v[0, 1] - v[0, 0] + v[1, 1] - v[1, 0]]) / 2
    found = mc.contribution(model, x, of_class, players=[*x], batch_size=batch_size)
    torch.testing.assert_close(found.shapley[0], expected)
    upper, lower, none = (score(bag=covered(x["bag"], *rows)) for rows in ((1,), (0,), (0, 1)))
    of_halves = torch.stack([upper - none + score() - lower, lower - none + score() - upper]) / 2
    cut = mc.region_contribution(model, x, of_class, regions={"bag": HALVES}, batch_size=batch_size)
    torch.testing.assert_close(cut.contribution.shapley[0], of_halves)


@KINDS
@SIZES
def test_what_is_covered_is_covered_in_a_plain_pass(kind: type[nn.Module], batch_size: int) -> None:
    model, x, score = made(kind)
    drops = [score() - score(bag=covered(x["bag"], row)) for row in (0, 1)]
    found = mc.occlusion(model, x, of_class, patch=(14, 28), wrt=["bag"], batch_size=batch_size)["bag"]
    torch.testing.assert_close(found[0, 0, 0, ::14, 0], torch.stack(drops))


@KINDS
@SIZES
@pytest.mark.filterwarnings("ignore:integrated gradients miss")
def test_gradients_on_a_way_are_those_of_plain_passes(kind: type[nn.Module], batch_size: int) -> None:
    model, x, _ = made(kind)
    on_the_way = []
    for step in range(4):
        leaf = (x["bag"] * (2 * step + 1) / 8).requires_grad_()
        on_the_way += torch.autograd.grad(of_class(model(leaf, x["clinical"]))[0], leaf)
    found = mc.integrated_gradients(model, x, of_class, wrt=["bag"], steps=4, batch_size=batch_size)
    torch.testing.assert_close(found["bag"], x["bag"] * torch.stack(on_the_way).mean(0))


@KINDS
@SIZES
def test_a_channel_of_all_patches_is_taken_away_in_a_plain_pass(kind: type[nn.Module], batch_size: int) -> None:
    model, x, score = made(kind)
    layer = mc.Layer("encoder", reshape=lambda z: z.movedim(0, 1)[None], onto="bag")
    cam = mc.AblationCAM(model, layer, batch_size=batch_size)
    (site,) = cam.trace(x, of_class).sites.values()
    drops = []
    for channel in range(6):
        handle = model.get_submodule("encoder").register_forward_hook(
            lambda module, args, output, channel=channel: output.index_fill(1, torch.tensor([channel]), 0.0)
        )
        drops.append(-score())
        handle.remove()
    torch.testing.assert_close(cam.weights(site)[0], score() + torch.stack(drops), atol=1e-5, rtol=1e-4)


class Contrast(nn.Module):
    """Trained by comparing a batch; its normalisation, kept in training, needs more than one row but compares within a row."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.table, self.head = nn.Conv2d(3, 4, 3), nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, image: Tensor, table: Tensor) -> Tensor:
        if len(image) < 2:
            raise ValueError("Expected more than 1 value per channel when training")
        h = self.image(image).relu().mean((2, 3)) * self.table(table).tanh()
        out: Tensor = self.head(nn.functional.layer_norm(h, (4,)))
        return out


class Pairs(Contrast):
    """Rows come as pairs, an anchor and its partner, and each is scored for itself."""

    def forward(self, image: Tensor, table: Tensor) -> Tensor:
        h = self.image(image).relu().mean((2, 3))
        first, second = (h * self.table(table)).unflatten(0, (-1, 2)).unbind(1)
        out: Tensor = self.head(torch.stack([first, second], 1).flatten(0, 1).tanh())
        return out


class Squeezed(Contrast):
    """A batch of one loses its axis where the pooled map is squeezed."""

    def forward(self, image: Tensor, table: Tensor) -> Tensor:
        pooled = nn.functional.adaptive_avg_pool2d(self.image(image).relu(), 1).squeeze()
        out: Tensor = self.head((pooled * self.table(table).squeeze()).tanh())
        return out


@pytest.mark.filterwarnings("ignore:integrated gradients miss")
@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("kind", [Contrast, Pairs, Squeezed], ids=lambda kind: kind.__name__)
def test_a_model_of_two_rows_or_more_is_never_given_fewer(kind: type[nn.Module], batch_size: int) -> None:
    torch.manual_seed(0)
    model, x = kind().eval(), {"image": torch.rand(2, 3, 8, 8), "table": torch.rand(2, 5)}

    def score(**changed: Tensor) -> Tensor:
        call = {**x, **changed}
        # A row in the company of its like.
        return torch.stack([model(*(each[[i, i]] for each in call.values()))[0, 1] for i in range(2)]).detach()

    v = {(a, b): score(image=x["image"] * a, table=x["table"] * b) for a, b in product((0, 1), repeat=2)}
    expected = torch.stack([v[1, 0] - v[0, 0] + v[1, 1] - v[0, 1], v[0, 1] - v[0, 0] + v[1, 1] - v[1, 0]], 1) / 2
    found = mc.contribution(model, x, 1, players=[*x], batch_size=batch_size)
    torch.testing.assert_close(found.shapley, expected)
    hidden = x["image"].clone()
    hidden[..., 4:, :4] = 0
    patches = mc.occlusion(model, x, 1, patch=4, wrt=["image"], batch_size=batch_size)["image"]
    torch.testing.assert_close(patches[:, 0, 4, 0], score() - score(image=hidden))
    smooth = mc.integrated_gradients(model, x, 1, wrt=["image"], steps=3, batch_size=batch_size)["image"]
    ways = []
    for step in range(3):
        leaf = (x["image"] * (2 * step + 1) / 6).requires_grad_()
        ways += torch.autograd.grad(model(leaf, x["table"])[:, 1].sum(), leaf)
    torch.testing.assert_close(smooth, x["image"] * torch.stack(ways).mean(0))
