"""Parts that run once more during the backward pass of a tool, when the model is the user's again."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from multicam import MulticamError, PackedModel
from multicam.watch.checkpoints import Recomputed, running

# PyTorch says it of every reentrant part without a graph.
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")


class Saving(nn.Module):
    """Two inputs, and a part that is run again rather than kept."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.rgb, self.ir, self.norm = nn.Conv2d(3, 4, 3), nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.part = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Conv2d(4, 4, 1))
        self.last, self.head = nn.Conv2d(4, 4, 1), nn.Linear(4, 3)
        self.reentrant = reentrant

    def forward(self, rgb: Tensor, ir: Tensor) -> Tensor:
        x = self.norm(self.rgb(rgb) + self.ir(ir))
        x = self.part(x) if self.reentrant is None else checkpoint(self.part, x, use_reentrant=self.reentrant)
        return self.head(self.last(x).mean((2, 3)))


INPUTS = {"rgb": torch.rand(2, 3, 8, 8), "ir": torch.rand(2, 1, 8, 8)}
WAYS = {"reentrant": True, "not reentrant": False}
every_way = pytest.mark.parametrize("reentrant", WAYS.values(), ids=list(WAYS))


def made(reentrant: bool | None) -> Saving:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Saving(reentrant).eval()


def gradient_at(packed: PackedModel) -> Tensor:
    """What a tool that calls `backward` finds at the first tap."""
    kept: list[Tensor] = []
    packed.target_layers[0].register_forward_hook(lambda module, args, output: kept.append(output))
    scores = packed(packed.pack(INPUTS))
    kept[0].retain_grad()
    scores[:, 1].sum().backward()
    assert kept[0].grad is not None
    return kept[0].grad


@pytest.mark.parametrize(
    ("reentrant", "layer", "training"),
    [
        pytest.param(False, "norm", False, id="not reentrant"),
        pytest.param(False, "last", True, id="behind it, in training"),
        pytest.param(True, "last", False, id="behind it, reentrant"),
    ],
)
def test_the_gradients_are_those_of_a_model_that_keeps_everything(reentrant: bool, layer: str, training: bool) -> None:
    expected = gradient_at(PackedModel(made(None), INPUTS, layer))
    model = made(reentrant).train(training)
    state = {name: x.clone() for name, x in model.state_dict().items()}
    packed = PackedModel(model, INPUTS, layer)
    for _ in range(2):
        assert torch.equal(gradient_at(packed), expected)
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("reentrant", "training", "why"),
    [
        pytest.param(True, False, "their parameters would get gradients", id="reentrant"),
        pytest.param(True, True, "in training mode", id="reentrant, in training"),
        pytest.param(False, True, "in training mode", id="not reentrant, in training"),
    ],
)
def test_what_would_change_the_model_is_refused(reentrant: bool, training: bool, why: str) -> None:
    model = made(reentrant).train(training)
    packed = PackedModel(model, INPUTS, "norm")
    for _ in range(2):
        with pytest.raises(MulticamError, match=rf"parts of Saving run once more.*{why}; turn it off"):
            packed(packed.pack(INPUTS))
    with torch.no_grad():
        assert torch.equal(packed(packed.pack(INPUTS)), made(None)(**INPUTS))  # nothing runs again
    model.reentrant = None
    assert torch.equal(gradient_at(packed), gradient_at(PackedModel(made(None), INPUTS, "norm")))


def test_a_model_that_goes_into_training_is_refused_from_then_on() -> None:
    model = made(False)
    packed = PackedModel(model, INPUTS, "norm")
    gradient_at(packed)
    model.part[3].train()
    with pytest.raises(MulticamError, match="in training mode"):
        packed(packed.pack(INPUTS))


def test_nothing_runs_once_more_before_the_backward_pass() -> None:
    """Whoever looks at what such a part saved makes it run."""
    model = made(False)
    packed = PackedModel(model, INPUTS, "norm")
    runs: list[int] = []
    model.part[0].register_forward_hook(lambda module, args, output: runs.append(1))
    for count in (1, 2, 3):
        packed(packed.pack(INPUTS))
        assert len(runs) == count


@every_way
def test_a_tap_in_such_a_part_is_refused(reentrant: bool) -> None:
    packed = PackedModel(made(reentrant), INPUTS, "part.0")
    with pytest.raises(MulticamError, match=r"layer 'part.0' is in a part of the model that runs once more"):
        packed(packed.pack(INPUTS))
    with torch.no_grad():
        packed(packed.pack(INPUTS))


@every_way
def test_the_code_of_such_a_part_knows_it(reentrant: bool) -> None:
    told: list[bool] = []

    def part(x: Tensor) -> Tensor:
        told.append(running())
        return x.exp()

    checkpoint(part, torch.rand(2, requires_grad=True), use_reentrant=reentrant)
    part(torch.rand(2))
    assert told == [True, False]


PARTS: dict[str, tuple[Callable[[Tensor], Tensor], bool, bool]] = {
    "none": (lambda x: x.exp(), False, False),
    "reentrant": (lambda x: checkpoint(torch.exp, x, use_reentrant=True), True, True),
    "not reentrant": (lambda x: checkpoint(torch.exp, x, use_reentrant=False), True, False),
    "without gradient": (lambda x: x + checkpoint(torch.exp, x.detach(), use_reentrant=False), False, False),
    "both": (
        lambda x: checkpoint(torch.exp, checkpoint(torch.exp, x, use_reentrant=True), use_reentrant=False),
        True,
        True,
    ),
}


@pytest.mark.parametrize("name", PARTS)
def test_what_a_gradient_comes_through_is_seen(name: str) -> None:
    run, found, reentrant = PARTS[name]
    with Recomputed() as recomputed:
        run(torch.rand(2, 3, requires_grad=True))
    assert (recomputed.found, recomputed.reentrant) == (found, reentrant)
