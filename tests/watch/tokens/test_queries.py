"""What comes out of an attention are the tokens of its queries, fused or written out, and own ones where those are the model's."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multicam.watch.tokens.follow import Follower
from multicam.watch.tokens.places import LOST
from multicam.watch.tokens.queries import Queries


class Attending(nn.Module):
    """Patches of one picture, or learned queries, attend to those of another."""

    def __init__(self, how: str, learned: bool = False, heads: int = 2) -> None:
        super().__init__()
        self.how, self.heads = how, heads
        self.left, self.right = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(3, 8, 2, 2)
        self.queries = nn.Parameter(torch.rand(1, 5, 8)) if learned else None
        self.kept: list[Tensor] = []

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        q, k = (conv(x).flatten(2).mT for conv, x in ((self.left, left), (self.right, right)))
        q = q if self.queries is None else self.queries.expand(len(k), -1, -1)
        q, k = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in (q, k))
        fused = self.how == "fused"
        found = F.scaled_dot_product_attention(q, k, k) if fused else (q @ k.mT).softmax(-1) @ k
        self.kept.append(found.transpose(1, 2).flatten(2))
        return self.kept[-1].mean((1, 2))


def followed(model: Any, *given: Tensor) -> Queries:
    listener = Queries()
    with torch.no_grad(), Follower(model, listener).watch():
        model(*given)
    return listener


@pytest.mark.parametrize("how", ["fused", "written out"])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_tokens_of_queries_go_on(how: str, batch: int) -> None:
    model = Attending(how).eval()
    origins = followed(model, torch.rand(batch, 3, 8, 12), torch.rand(batch, 3, 8, 8)).origins
    ids = origins.ids(model.kept[0], 2)
    assert [origins.places.describe(row) for row in ids] == ["left 2 x 3"] * batch
    assert origins.places.samples(ids.numpy()).tolist() == [[sample] * 6 for sample in range(batch)]


@pytest.mark.parametrize("how", ["fused", "written out"])
def test_what_learned_queries_ask_are_tokens_of_the_models_own(how: str) -> None:
    model = Attending(how, learned=True).eval()
    origins = followed(model, torch.rand(2, 3, 8, 12), torch.rand(2, 3, 8, 8)).origins
    ids = origins.ids(model.kept[0], 2)
    assert (ids > LOST).all() and origins.places.describe(ids[1]) == "5 own"
    assert origins.places.samples(ids.numpy()).tolist() == [[0] * 5, [1] * 5]
