"""A model that returns no tensor is refused with a way out, and the way out works."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import multicam as mc
from multicam import Inputs, MulticamError
from multicam.call.outputs import WRITES, has_tensor, unpicked
from tests.helpers.numbered import numbered

Returning: Any = None
exec(WRITES[WRITES.index("class Returning") : WRITES.index("Its layers")])


class Matcher(nn.Module):
    """Compares two pictures and puts what it finds into `data`, or into `kept`."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.encoder, self.head = way, nn.Conv2d(1, 4, 3, 2, 1), nn.Linear(4, 3)
        self.kept: Any = None

    def found(self, first: Tensor, second: Tensor) -> Tensor:
        out: Tensor = self.head((self.encoder(first).relu() * self.encoder(second)).mean((2, 3)))
        return out

    def forward(self, data: Any) -> Any:
        match self.way:
            case "dict":
                data["match"] = self.found(data["image0"], data["image1"])
            case "list":
                data.append(self.found(data[0], data[1]))
            case "object":
                data.match = self.found(data.image0, data.image1)
            case "attribute":
                self.kept = self.found(data["image0"], data["image1"])
            case "generator":
                return (self.found(x, y) for x, y in [(data["image0"], data["image1"])])
        return None


def made(way: str) -> tuple[Matcher, Inputs, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    x, y = torch.rand(4, 1, 16, 16), torch.rand(4, 1, 16, 16)
    given: Any = {"list": [x, y], "object": SimpleNamespace(image0=x, image1=y)}.get(way, {"image0": x, "image1": y})
    return Matcher(way).eval(), Inputs(given), (x, y)


WAYS: dict[str, Callable[[Any], Tensor]] = {
    "dict": lambda out: out["match"][:, 2],
    "list": lambda out: out[2][:, 2],
    "object": lambda out: out.match[:, 2],
    "attribute": lambda out: out[:, 2],
    "generator": lambda out: out[0][:, 2],
}


class Kept(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Any) -> Any:
        self.model(batch)
        return self.model.kept


class Read(Kept):
    def forward(self, batch: Any) -> Any:
        return list(self.model(batch))


@pytest.mark.parametrize("way", WAYS)
def test_the_refusal_names_a_wrapper(way: str) -> None:
    model, inputs, _ = made(way)
    words = (
        "computes when it is read.*return list" if way == "generator" else r"Returning\(model\)(.|\n)*self.model.result"
    )
    for target, output in ((WAYS[way], None), (2, None), (None, None), (2, "match"), (2, lambda out: out["match"])):
        if way == "attribute" and callable(target):
            continue
        with pytest.raises(MulticamError, match=words):
            mc.gradient(model, inputs, target, output=output)
    with pytest.raises(MulticamError, match=words):
        mc.contribution(model, inputs, 2)


@pytest.mark.parametrize("way", WAYS)
def test_the_wrapper_works(way: str) -> None:
    model, inputs, (x, y) = made(way)
    wrapped = {"attribute": Kept, "generator": Read}.get(way, Returning)(model)
    target = WAYS[way]
    first, second = (name for name in inputs.bind(wrapped).images)
    x, y = x.requires_grad_(), y.requires_grad_()
    scores = model.found(x, y)[:, 2]
    by_hand = torch.autograd.grad(scores.sum(), (x, y), retain_graph=True)
    found = mc.gradient(wrapped, inputs, target)
    for name, expected in zip((first, second), by_hand, strict=True):
        torch.testing.assert_close(found[name], expected)
    acts = model.encoder(x)
    grads = torch.autograd.grad(model.head((acts.relu() * model.encoder(y)).mean((2, 3)))[:, 2].sum(), acts)[0]
    maps = mc.HiResCAM(wrapped, {first: "model.encoder#0"})(inputs, target, signed=True)
    torch.testing.assert_close(maps[first].mean((1, 2)), (grads * acts).sum((1, 2, 3)), rtol=0.02, atol=1e-5)
    nothing = torch.zeros_like(x)
    game = [model.found(a, b)[:, 2] for a, b in ((x, y), (x, nothing), (nothing, y), (nothing, nothing))]
    shapley = ((game[1] - game[3]) + (game[0] - game[2])) / 2
    torch.testing.assert_close(mc.contribution(wrapped, inputs, target).shapley[:, 0], shapley.detach())
    change = mc.occlusion(wrapped, inputs, target, patch=16)[second]
    torch.testing.assert_close(change[:, 0, 0, 0], (game[0] - game[1]).detach())


def test_results_that_are_read_by_the_target_need_no_wrapper() -> None:
    model, inputs, (x, y) = made("attribute")
    found = mc.occlusion(model, inputs, lambda out: model.kept[:, 2], patch=16)
    expected = model.found(x, y)[:, 2] - model.found(x * 0, y)[:, 2]
    torch.testing.assert_close(found["data.image0"][:, 0, 0, 0], expected.detach())


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("a cat", "returns a str, in which there is no tensor"),
        (0.5, "returns a float, in which"),
        (np.ones((2, 3)), "returns a ndarray, in which"),
        (["a cat", 0.5], "returns a list of float, str, in which"),
        ({}, "returns a dict of nothing"),
        ((None, None), "returns a tuple of NoneType"),
        (iter([1]), "returns a list_iterator, which computes when it is read"),
        ({"boxes": torch.ones(2, 4)}, r"so say what to explain with output=…, one of: 'boxes' \(2, 4\)"),
    ],
    ids=numbered(),
)
def test_every_output_that_is_no_tensor_is_named(output: Any, message: str) -> None:
    assert has_tensor(output) == ("output=" in message)
    with pytest.raises(MulticamError, match=message):
        raise MulticamError(unpicked(output))


def test_what_fails_on_a_tensor_fails_as_it_is() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    with pytest.raises(ZeroDivisionError) as raised:
        mc.gradient(model, torch.rand(1, 1, 2, 2), lambda out: out[:, 0] / (1 // 0))
    assert not getattr(raised.value, "__notes__", [])
