"""Scores that compare each row of a batch with the others: a what-if is the score of its sample and nobody else's.

Where rows of what-ifs ran together, the logits of CLIP compared a photo with the captions of other what-ifs, and shares were false.
"""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import multicam as mc
from tests.helpers.attention_models import enliven

TEXT: dict[str, Any] = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                        "max_position_embeddings": 8}  # fmt: skip
IMAGE: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                         "image_size": 16, "patch_size": 8}  # fmt: skip
COMPANY = "ignore:.*(in the batch|does not give)"


def clip() -> nn.Module:
    text = {**TEXT, "eos_token_id": 59, "bos_token_id": 58, "pad_token_id": 0}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=IMAGE, projection_dim=12))


def siglip() -> nn.Module:
    return hf.SiglipModel(hf.SiglipConfig(text_config={**TEXT, "projection_size": 16}, vision_config=IMAGE))


class Shared(nn.Module):
    """Both sides by small encoders; what is made of their matrix of similarities is said by the kind."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.words = nn.Conv2d(3, 12, 8, 8), nn.Embedding(60, 12)

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Any:
        a = nn.functional.normalize(self.image(pixel_values).tanh().mean((2, 3)), dim=1)
        b = nn.functional.normalize(self.words(input_ids).mean(1), dim=1)
        return self.compared(10 * a @ b.T, a, b)

    def compared(self, logits: Tensor, a: Tensor, b: Tensor) -> Any:
        raise NotImplementedError


class InfoNce(Shared):
    """The loss of each pair among all of the batch, both ways."""

    def compared(self, logits: Tensor, a: Tensor, b: Tensor) -> Any:
        rows = logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal()
        return torch.stack([rows, logits.diagonal()], 1).sum(1, keepdim=True)


class Retrieved(Shared):
    """What is nearest to a photo among the captions of the batch decides its class."""

    def compared(self, logits: Tensor, a: Tensor, b: Tensor) -> Any:
        return a * b[logits.argmax(1)] * logits.amax(1, keepdim=True)


class Centred(Shared):
    """Features less their mean of the batch, as Barlow Twins and linear CKA have them, in the company of what is always there."""

    def compared(self, logits: Tensor, a: Tensor, b: Tensor) -> Any:
        a, b = (torch.cat([x, torch.eye(12)[:2]]) for x in (a, b))
        a, b = a - a.mean(0), b - b.mean(0)
        return (a * b)[:-2] @ torch.eye(12)[:, :4]


def first(output: Any) -> Tensor:
    """The first caption, or number, for each photo."""
    scores: Tensor = output["logits_per_image"] if isinstance(output, dict) else output
    return scores[:, 0]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "clip": clip, "siglip": siglip, "infonce": InfoNce, "retrieved": Retrieved, "centred": Centred,
}  # fmt: skip
every = pytest.mark.parametrize("name", MODELS)


def made(name: str, samples: int = 1) -> tuple[nn.Module, dict[str, Tensor], Callable[..., Tensor]]:
    """A model, its call, and the score of a plain pass of the only sample with some inputs changed."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = MODELS[name]().eval()
        enliven(model)
        ids = torch.randint(1, 58, (samples, 6))
        ids[:, -1] = 59
        x = {"input_ids": ids, "pixel_values": torch.rand(samples, 3, 16, 16)}
    return model, x, lambda **changed: first(model(**{**x, **changed}))[0].detach()


@every
@pytest.mark.parametrize("batch_size", [2, 32])
@pytest.mark.filterwarnings(COMPANY)
def test_shares_are_those_of_plain_passes(name: str, batch_size: int) -> None:
    model, x, score = made(name)
    nothing = {"input_ids": torch.full_like(x["input_ids"], 59), "pixel_values": x["pixel_values"] * 0}
    v = {
        kept: score(**{each: nothing[each] for each, is_kept in zip(x, kept, strict=True) if not is_kept})
        for kept in product((0, 1), repeat=2)
    }
    expected = torch.stack([v[1, 0] - v[0, 0] + v[1, 1] - v[0, 1], v[0, 1] - v[0, 0] + v[1, 1] - v[1, 0]]) / 2
    assert expected.abs().min() > 1e-4
    for _ in range(2):
        found = mc.contribution(model, x, first, players=[*x], baseline={"input_ids": 59}, batch_size=batch_size)
        torch.testing.assert_close(found.shapley[0], expected, rtol=1e-4, atol=1e-5)


@every
@pytest.mark.parametrize("batch_size", [2, 32])
@pytest.mark.filterwarnings(COMPANY)
def test_what_is_covered_is_covered_in_a_plain_pass(name: str, batch_size: int) -> None:
    model, x, score = made(name)
    corners = [(..., slice(top, top + 4), slice(left, left + 4)) for top, left in product(range(0, 16, 4), repeat=2)]
    drops = []
    for corner in corners:
        hidden = x["pixel_values"].clone()
        hidden[corner] = 0
        drops.append(score() - score(pixel_values=hidden))
    found = mc.occlusion(model, x, first, patch=4, wrt=["pixel_values"], batch_size=batch_size)["pixel_values"]
    torch.testing.assert_close(found[0, 0, ::4, ::4].flatten(), torch.stack(drops), rtol=1e-4, atol=1e-5)


@every
@pytest.mark.filterwarnings(COMPANY, "ignore:integrated gradients miss")
def test_gradients_on_a_way_are_those_of_plain_passes(name: str) -> None:
    model, x, _ = made(name)
    ways = []
    for step in range(4):
        leaf = (x["pixel_values"] * (2 * step + 1) / 8).requires_grad_()
        ways += torch.autograd.grad(first(model(**{**x, "pixel_values": leaf}))[0], leaf)
    found = mc.integrated_gradients(model, x, first, wrt=["pixel_values"], steps=4)["pixel_values"]
    torch.testing.assert_close(found, x["pixel_values"] * torch.stack(ways).mean(0), rtol=1e-4, atol=1e-5)


@every
@pytest.mark.filterwarnings("ignore:integrated gradients miss")
def test_samples_of_a_batch_are_explained_alone_and_a_warning_says_so(name: str) -> None:
    model, x, _ = made(name, 3)
    each = [{key: value[i : i + 1] for key, value in x.items()} for i in range(3)]
    with pytest.warns(UserWarning, match="depend on what else is in the batch"):
        shares = mc.contribution(model, x, first, players=[*x], baseline={"input_ids": 59}).shapley
    alone = [mc.contribution(model, one, first, players=[*x], baseline={"input_ids": 59}).shapley for one in each]
    torch.testing.assert_close(shares, torch.cat(alone), rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="depend on what else is in the batch"):
        covered = mc.occlusion(model, x, first, patch=8, wrt=["pixel_values"])["pixel_values"]
    alone = [mc.occlusion(model, one, first, patch=8, wrt=["pixel_values"])["pixel_values"] for one in each]
    torch.testing.assert_close(covered, torch.cat(alone), rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="depend on what else is in the batch"):
        ways = mc.integrated_gradients(model, x, first, steps=4, wrt=["pixel_values"])["pixel_values"]
    alone = [mc.integrated_gradients(model, one, first, steps=4, wrt=["pixel_values"])["pixel_values"] for one in each]
    torch.testing.assert_close(ways, torch.cat(alone), rtol=1e-4, atol=1e-5)
