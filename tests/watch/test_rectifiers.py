from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captum.attr import Deconvolution, GuidedBackprop
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from multicam import Inputs, MulticamError
from multicam.saliency.gradients import deconvnet, gradient, guided_backprop
from multicam.watch.rectifiers import Rectifiers
from tests.helpers.models import Fusion, fusion_inputs, seeded

Activation = Callable[[Tensor], Tensor]
RULES = {"guided": guided_backprop, "deconvnet": deconvnet}


class Ruled(torch.autograd.Function):
    """The papers' formulas, written into the model as their authors had to."""

    rule = "guided"

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * (g > 0) * ((x > 0) | (Ruled.rule == "deconvnet"))


class Net(nn.Module):
    """Three activations; `one` of them for all, or one each."""

    def __init__(self, *acts: Activation) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(2, 6, 3), nn.Conv2d(6, 6, 3), nn.Conv2d(6, 4, 3)])
        self.modules_among_them = nn.ModuleList([act for act in acts if isinstance(act, nn.Module)])
        self.acts = acts * (3 // len(acts))
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        for conv, act in zip(self.convs, self.acts, strict=True):
            x = act(conv(x))
        return self.head(x.mean((2, 3)))


def net(*acts: Activation) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net(*acts)


def image(b: int = 2, channels: int = 2, side: int = 12) -> Tensor:
    return torch.rand(b, channels, side, side, generator=torch.Generator().manual_seed(5))


def of_oracle(rule: str, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    monkeypatch.setattr(Ruled, "rule", rule)
    x = image().requires_grad_()
    (expected,) = torch.autograd.grad(net(Ruled.apply)(x)[:, 3].sum(), x)
    return expected


WAYS: dict[str, Callable[[], tuple[Activation, ...]]] = {
    "function": lambda: (F.relu,),
    "function in place": lambda: (torch.relu_,),
    "method in place": lambda: (lambda x: x.relu_(),),
    "modules": lambda: (nn.ReLU(), nn.ReLU(), nn.ReLU()),
    "modules in place": lambda: (nn.ReLU(inplace=True), nn.ReLU(inplace=True), nn.ReLU(inplace=True)),
    "one module used three times": lambda: (nn.ReLU(),),
    "one module in place": lambda: (nn.ReLU(inplace=True),),
    "ReLU6": lambda: (nn.ReLU6(),),
    "ReLU6 in place": lambda: (nn.ReLU6(inplace=True),),
    "threshold": lambda: (nn.Threshold(0, 0),),
    "TorchScript": lambda: (torch.jit.script(nn.ReLU()),),
    "a class of one's own": lambda: (type("MyReLU", (nn.ReLU,), {})(),),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_however_a_relu_is_written_the_result_is_the_papers(
    way: str, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = of_oracle(rule, monkeypatch)
    model = net(*WAYS[way]())
    for _ in range(3):  # TorchScript changes what it runs after a few calls
        assert torch.allclose(RULES[rule](model, image(), 3)["x"], expected, atol=1e-7)
    assert not torch.allclose(gradient(model, image(), 3)["x"], expected, rtol=1e-2)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("how", ["scripted", "traced"])
@pytest.mark.parametrize("part", [False, True], ids=["all", "part"])
def test_torchscript_is_right_or_refused_once_it_is_compiled(how: str, part: bool) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 9), nn.ReLU(), nn.Linear(9, 5))
    expected = guided_backprop(model, image(), 3)["input"]
    inner = model[2:] if part else model
    x = model[:2](image()).detach() if part else image()
    script = torch.jit.script(inner) if how == "scripted" else torch.jit.trace(inner, x)
    scripted = nn.Sequential(*model[:2], script) if part else script
    results = []
    for _ in range(4):  # it compiles what it has seen in a few calls
        try:
            (found,) = guided_backprop(scripted, image(), 3).values()
        except MulticamError as error:
            assert "TorchScript compiled a part of this" in str(error)
            results.append("refused")
        else:
            assert torch.allclose(found, expected, atol=1e-7)
            results.append("right")
    assert results[-1] == "refused" or how == "traced"
    (plain,) = gradient(scripted, image(), 3).values()
    assert torch.allclose(plain, gradient(model, image(), 3)["input"], atol=1e-7)


@pytest.mark.parametrize("rule", RULES)
def test_captum_finds_the_same(rule: str) -> None:
    model = net(nn.ReLU(), nn.ReLU(), nn.ReLU())  # captum needs a module for each
    peer = {"guided": GuidedBackprop, "deconvnet": Deconvolution}[rule](model)
    with pytest.warns(UserWarning, match="Setting backward hooks"):
        expected = peer.attribute(image().requires_grad_(), target=3)
    assert torch.allclose(RULES[rule](model, image(), 3)["x"], expected, atol=1e-7)


class Apart(nn.Module):
    """Fusion without anything in place, for captum."""

    def __init__(self) -> None:
        super().__init__()
        self.model = seeded(Fusion)
        for module in self.model.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False

    def forward(self, rgb: Tensor, depth: Tensor, texture: Tensor) -> Tensor:
        return self.model(rgb, depth, texture)


@pytest.mark.parametrize("rule", RULES)
def test_captum_finds_the_same_for_several_inputs(rule: str) -> None:
    model, inputs = Apart().eval(), fusion_inputs()
    peer = {"guided": GuidedBackprop, "deconvnet": Deconvolution}[rule](model)
    with pytest.warns(UserWarning, match="Setting backward hooks"):
        expected = peer.attribute(tuple(x.requires_grad_() for x in inputs.values()), target=1)
    found = RULES[rule](seeded(Fusion), inputs, 1)
    for x, y in zip(found.values(), expected, strict=True):
        assert torch.allclose(x, y, rtol=1e-5, atol=1e-5 * float(y.abs().max()))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_parts(rule: str, reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net(nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.net, x, use_reentrant=reentrant)

    if reentrant:  # it knows .backward() only
        with pytest.raises(ValueError, match="checkpoint"):
            RULES[rule](Checkpointed(), image(), 3)
    else:
        expected = RULES[rule](net(nn.ReLU()), image(), 3)["x"]
        assert torch.allclose(RULES[rule](Checkpointed(), image(), 3)["x"], expected, atol=1e-7)


def test_flashtorch_5_guided_is_the_same_every_time_and_leaves_the_gradient_as_it_was() -> None:
    model = net(nn.ReLU())
    plain, guided = gradient(model, image(), 3)["x"], guided_backprop(model, image(), 3)["x"]
    for _ in range(3):
        assert torch.equal(guided_backprop(model, image(), 3)["x"], guided)
        assert torch.equal(gradient(model, image(), 3)["x"], plain)
    x = image().requires_grad_()
    assert torch.allclose(torch.autograd.grad(model(x)[:, 3].sum(), x)[0], plain, atol=1e-7)
    assert guided.abs().max() < 100 * plain.abs().max()  # FlashTorch's grew to 1e33 by multiplying with activations


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("act", [nn.GELU(), nn.SiLU(), nn.LeakyReLU(), nn.Hardtanh(), nn.ELU()], ids=repr)
def test_without_a_relu_it_is_the_gradient_and_says_so(rule: str, act: nn.Module) -> None:
    model = net(act)
    with pytest.warns(
        UserWarning, match=f"no gradient passed a ReLU of Net, so this is the plain gradient: the {rule}"
    ):
        found = RULES[rule](model, image(), 3)
    assert torch.equal(found["x"], gradient(model, image(), 3)["x"])


def test_the_upper_limit_of_relu6_stops_the_guided_gradient() -> None:
    x = torch.tensor([[-1.0, 2.0, 7.0, 3.0]])
    model = nn.Sequential(nn.ReLU6(), nn.Linear(4, 1, bias=False))
    nn.init.constant_(model[1].weight, 2.0)
    assert guided_backprop(model, x, 0, wrt="input")["input"].tolist() == [[0, 2, 0, 2]]
    assert deconvnet(model, x, 0, wrt="input")["input"].tolist() == [[2, 2, 2, 2]]


def test_a_shared_encoder_is_guided_for_each_of_its_calls() -> None:
    class Siamese(nn.Module):
        def __init__(self, act: Activation) -> None:
            super().__init__()
            self.encoder = net(act)

        def forward(self, before: Tensor, after: Tensor) -> Tensor:
            return self.encoder(after) - 2 * self.encoder(before)

    x, y = image().requires_grad_(), image().flip(-1).requires_grad_()
    expected = torch.autograd.grad(Siamese(Ruled.apply)(x, y)[:, 1].sum(), [x, y])
    found = guided_backprop(Siamese(nn.ReLU()), (x, y), 1)
    assert all(torch.allclose(found[n], g, atol=1e-7) for n, g in zip(("before", "after"), expected, strict=True))


def test_rules_apply_inside_their_block_only() -> None:
    x = torch.tensor([-1.0, 2.0], requires_grad=True)
    y = (x.relu() * torch.tensor([1.0, -1.0])).sum()
    with Rectifiers("guided") as rectifiers:
        torch.autograd.grad(y, x, retain_graph=True)
    assert rectifiers.met == 1
    assert torch.autograd.grad(y, x)[0].tolist() == [0, -1]
    assert rectifiers.met == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_precisions(dtype: torch.dtype) -> None:
    exact = guided_backprop(net(nn.ReLU()), image(), 3)["x"]
    found = guided_backprop(net(nn.ReLU()).to(dtype), Inputs(image().to(dtype)), 3)["x"]
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.nn.functional.cosine_similarity(found.double().flatten(), exact.double().flatten(), 0) > 0.99


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("rule", RULES)
def test_the_rules_reach_the_threads_of_a_gpu(rule: str) -> None:
    expected = RULES[rule](net(nn.ReLU()).double(), image().double(), 3)["x"]
    found = RULES[rule](net(nn.ReLU()).double().cuda(), image().double().cuda(), 3)["x"]
    assert torch.allclose(found.cpu(), expected, atol=1e-9)
