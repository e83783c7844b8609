"""Models that keep averages, ranges and books while they run, past every version counter, are as before an explanation.

People's models in quantisation-aware training had other scales after one map, as fused observers write through memory (torchattacks #150).
"""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.ao.quantization as quantization
from torch import Tensor, nn

import multicam as mc
from tests.helpers.insides import changes, insides

pytestmark = pytest.mark.filterwarnings("ignore:.*(deprecated|reduce_range|observer)")


class Small(nn.Module):
    """Quantised in all its ways below."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = quantization.QuantStub(), quantization.DeQuantStub()
        self.conv, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dequant(self.head(self.conv(self.quant(x)).relu().mean((2, 3))))
        return out


def in_training() -> nn.Module:
    """Fused observers, whose kernels write ranges and scales."""
    model = Small().train()
    model.qconfig = quantization.get_default_qat_qconfig("x86")
    model = quantization.prepare_qat(model)
    model(torch.rand(4, 3, 16, 16))
    return model


def calibrated() -> nn.Module:
    """Histograms, which are other tensors whenever their range grows."""
    model = Small().eval()
    model.qconfig = quantization.get_default_qconfig("x86")
    model = quantization.prepare(model)
    model(torch.rand(4, 3, 16, 16))
    return model


class Codebook(nn.Module):
    """The nearest of its codes goes on, straight through; the codes are parameters that follow what they stand for by `.data`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, 3)
        self.codes = nn.Parameter(torch.randn(600, 8))
        self.register_buffer("used", torch.zeros(600))

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv(x).movedim(1, -1)
        nearest = torch.cdist(z.detach().flatten(0, -2), self.codes).argmin(1)
        self.used.data.mul_(0.9).index_add_(0, nearest, torch.full(nearest.shape, 0.1))
        self.codes.data[nearest] = self.codes.data[nearest] * 0.5 + z.detach().flatten(0, -2) * 0.5
        q = self.codes[nearest].view_as(z)
        out: Tensor = self.head((z + (q - z).detach()).mean((1, 2)).tanh())
        return out


class Teacher(nn.Module):
    """A student beside the running average of its weights, which is updated in the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, 3)
        self.teacher = copy.deepcopy(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        for mine, of in zip(self.teacher.parameters(), self.conv.parameters(), strict=True):
            mine.data.lerp_(of.data.tanh(), 0.1)
        a, b = self.conv(x).mean((2, 3)), self.teacher(x).mean((2, 3))
        out: Tensor = self.head(a * b.detach())
        return out


class Queue(nn.Module):
    """A memory of earlier samples, as in MoCo, in memory that NumPy writes, and a pointer into it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.at = nn.Conv2d(3, 8, 3, 2, 1), 0
        self.register_buffer("queue", nn.functional.normalize(torch.randn(3, 8), dim=1))

    def forward(self, x: Tensor) -> Tensor:
        z = nn.functional.normalize(self.conv(x).mean((2, 3)), dim=1)
        logits = z @ self.queue.clone().T
        self.queue.numpy()[self.at] = z[0].detach().numpy()
        self.at = (self.at + 1) % 3
        return logits


class Balanced(nn.Module):
    """Experts with a bias for those that were chosen seldom, moved by what a batch chooses, as in DeepSeek-V3."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.route = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Linear(8, 3) for _ in range(4))
        self.bias = nn.Parameter(torch.zeros(4), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x).mean((2, 3))
        weights = self.route(h).softmax(1)
        chosen = (weights + self.bias).topk(2, dim=1).indices
        load = torch.bincount(chosen.flatten(), minlength=4).float()
        self.bias.data += 0.5 * (load.mean() - load).sign()
        each = torch.stack([expert(h) for expert in self.experts], 1)
        return (each * (weights.scatter(1, chosen, 0) - weights)[..., None]).sum(1)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "quantisation-aware": in_training, "calibrated": calibrated, "codebook": Codebook, "teacher": Teacher, "queue": Queue,
    "balanced": Balanced,
}  # fmt: skip
EXPLAIN: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "HiResCAM": lambda model, x: mc.HiResCAM(model, "conv")(x, 1, signed=True),
    "AblationCAM": lambda model, x: mc.AblationCAM(model, "conv")(x, 1, signed=True),
    "gradient": lambda model, x: mc.gradient(model, x, 1, wrt="x")["x"],
    "occlusion": lambda model, x: mc.occlusion(model, x, 1, patch=8)["x"],
    "contribution": lambda model, x: mc.contribution(model, x, 1).shapley,
    "list_layers": lambda model, x: torch.tensor(len(list(mc.list_layers(model, x)))),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[name]().eval()
        return model, 3 * torch.rand(1, 3, 16, 16) - 1


@pytest.mark.parametrize("explain", EXPLAIN)
@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_as_before_and_so_is_the_next_explanation(name: str, explain: str) -> None:
    model, x = made(name)
    before = insides(model, x)
    first = EXPLAIN[explain](model, x)
    assert changes(before, insides(model, x)) == []
    torch.testing.assert_close(EXPLAIN[explain](model, x), first)


@pytest.mark.parametrize("name", MODELS)
def test_numbers_are_those_of_the_state_that_was_there(name: str) -> None:
    model, x = made(name)

    def alone(x: Tensor) -> Tensor:
        return copy.deepcopy(model)(x)[:, 1]

    leaf = x.clone().requires_grad_()
    (by_hand,) = torch.autograd.grad(alone(leaf).sum(), leaf)
    torch.testing.assert_close(mc.gradient(model, x, 1, wrt="x")["x"], by_hand)
    torch.testing.assert_close(mc.contribution(model, x, 1).shapley[:, 0], (alone(x) - alone(x * 0)).detach())
    occluded = x.clone()
    occluded[..., :8, 8:] = 0
    torch.testing.assert_close(
        mc.occlusion(model, x, 1, patch=8)["x"][0, :, 0, 15].sum() / 3, (alone(x) - alone(occluded)).detach()[0]
    )
