"""Recurrent layers whose kernels have no backward pass in evaluation mode: gradients are those of the layer on other kernels.

cuDNN refuses with "RNN backward can only be called in training mode" (captum #564, #1159; PyTorch #5878, #15788), and every explanation is made in
evaluation mode. Here a layer of PyTorch refuses as cuDNN does, on any machine.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import multicam as mc


class OnCudnn(torch.autograd.Function):
    """What a kernel returns that has a backward pass in training mode only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fine: bool) -> Tensor:
        ctx.fine = fine
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        if not ctx.fine:
            raise RuntimeError("cudnn RNN backward can only be called in training mode")
        return gradients[0], None


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """PyTorch's own layers, as they are on a GPU."""
    for kind in (nn.LSTM, nn.GRU, nn.RNN):
        plain = kind.forward

        def forward(self: nn.RNNBase, *args: Any, plain: Callable[..., Any] = plain) -> Any:
            out, states = plain(self, *args)
            fine = self.training or not torch.backends.cudnn.enabled
            if isinstance(out, PackedSequence):
                return out._replace(data=OnCudnn.apply(out.data, fine)), states
            return OnCudnn.apply(out, fine), states

        monkeypatch.setattr(kind, "forward", forward)
    yield


class Captioner(nn.Module):
    """A photo and the words so far, read one after the other by one LSTM, of which the photo is the first state."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.start = nn.Conv2d(3, 6, 3, 2, 1), nn.Linear(6, 12)
        self.words, self.read, self.head = nn.Embedding(20, 5), nn.LSTM(5, 6, batch_first=True), nn.Linear(6, 4)

    def forward(self, image: Tensor, ids: Tensor) -> Tensor:
        h, c = self.start(self.image(image).relu().mean((2, 3)))[None].tanh().chunk(2, -1)
        states, _ = self.read(self.words(ids), (h.contiguous(), c.contiguous()))
        out: Tensor = self.head(states[:, -1])
        return out


class Reader(nn.Module):
    """CRNN: the columns of a line of text, read from both sides by two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(3, 6, 3, 2, 1)
        self.read, self.head = nn.GRU(6, 4, 2, bidirectional=True), nn.Linear(8, 4)

    def forward(self, image: Tensor, ids: Tensor) -> Tensor:
        columns = self.image(image).relu().mean(2).permute(2, 0, 1)
        states, _ = self.read(columns)
        out: Tensor = self.head(states).max(0).values
        return out


class Clinical(nn.Module):
    """A photo beside a series whose samples end at different times, packed."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.words = nn.Conv2d(3, 6, 3, 2, 1), nn.Embedding(20, 6)
        self.read, self.head = nn.LSTM(6, 6, batch_first=True, bidirectional=True), nn.Linear(12, 4)

    def forward(self, image: Tensor, ids: Tensor) -> Tensor:
        h = self.image(image).relu().mean((2, 3))
        packed = pack_padded_sequence(self.words(ids) * h[:, None], [3, 5], batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self.read(packed)[0], batch_first=True)
        out: Tensor = self.head(states.sum(1))
        return out


class Translator(nn.Module):
    """An encoder and a decoder, which is called word by word and looks at what it said; a tanh network between the two."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.words = nn.Conv2d(3, 6, 3, 2, 1), nn.Embedding(20, 6)
        self.encode, self.between = nn.GRU(6, 6, batch_first=True), nn.RNN(6, 6, batch_first=True)
        self.decode, self.head = nn.GRU(6, 6, batch_first=True), nn.Linear(6, 4)

    def forward(self, image: Tensor, ids: Tensor) -> Tensor:
        places, state = self.encode(self.image(image).relu().flatten(2).mT)
        said = self.between(self.words(ids))[0][:, -1:]
        for _ in range(3):
            said, state = self.decode(said + places.mean(1, keepdim=True), state)
        out: Tensor = self.head(said[:, 0])
        return out


KINDS = pytest.mark.parametrize("kind", [Captioner, Reader, Clinical, Translator], ids=lambda kind: kind.__name__)


def made(kind: type[nn.Module]) -> tuple[nn.Module, dict[str, Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind().eval(), {"image": torch.rand(2, 3, 8, 8), "ids": torch.randint(0, 20, (2, 5))}


def by_hand(model: nn.Module, x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The gradient at the image, and the evidence of its encoder, on other kernels."""
    kept: list[Tensor] = []
    handle = model.get_submodule("image").register_forward_hook(lambda module, args, out: kept.append(out))
    leaf = x["image"].clone().requires_grad_()
    with torch.backends.cudnn.flags(enabled=False):
        gradients = torch.autograd.grad(model(leaf, x["ids"])[:, 1].sum(), (leaf, *kept))
    handle.remove()
    return gradients[0], (kept[0].detach() * gradients[1]).sum((1, 2, 3))


@KINDS
@pytest.mark.usefixtures("cudnn")
def test_the_model_refuses_as_it_does_on_a_gpu(kind: type[nn.Module]) -> None:
    model, x = made(kind)
    with pytest.raises(RuntimeError, match="cudnn RNN backward"):
        model(x["image"].requires_grad_(), x["ids"]).sum().backward()


@KINDS
@pytest.mark.usefixtures("cudnn")
def test_gradients_and_maps_are_those_of_other_kernels(kind: type[nn.Module]) -> None:
    model, x = made(kind)
    gradient, evidence = by_hand(model, x)
    for _ in range(2):
        torch.testing.assert_close(mc.gradient(model, x, 1, wrt="image")["image"], gradient)
        found = mc.HiResCAM(model, {"image": "image"})(x, 1, signed=True)["image"]
        torch.testing.assert_close(found.mean((1, 2)), evidence)
    packed = mc.PackedModel(model, x, layers=["image"])
    canvas = packed.pack(x).requires_grad_()
    (theirs,) = torch.autograd.grad(packed(canvas)[:, 1].sum(), canvas)
    torch.testing.assert_close(theirs, gradient)  # of one photo, the packed tensor is the photo
    assert torch.backends.cudnn.enabled


@pytest.mark.parametrize("kind", [Captioner, Clinical, Translator], ids=lambda kind: kind.__name__)
@pytest.mark.usefixtures("cudnn")
def test_words_have_gradients_too(kind: type[nn.Module]) -> None:
    model, x = made(kind)
    kept: list[Tensor] = []
    handle = model.get_submodule("words").register_forward_hook(lambda module, args, out: kept.append(out))
    with torch.backends.cudnn.flags(enabled=False):
        (gradient,) = torch.autograd.grad(model(**x)[:, 1].sum(), kept)
    handle.remove()
    found = mc.HiResCAM(model, mc.Layer("words", reshape=mc.tokens(5), onto="ids"))(x, 1, signed=True)
    torch.testing.assert_close(found, (gradient * kept[0].detach()).sum(2) * 5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@KINDS
def test_on_cudnn_itself(kind: type[nn.Module]) -> None:
    model, x = made(kind)
    gradient, _ = by_hand(model, x)
    found = mc.gradient(model.cuda(), {name: each.cuda() for name, each in x.items()}, 1, wrt="image")["image"]
    torch.testing.assert_close(found.cpu(), gradient, rtol=1e-3, atol=1e-5)
