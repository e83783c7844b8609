from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from pytorch_grad_cam import FullGrad as PeerFullGrad
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from multicam import PackedModel
from multicam.cam.base import InputCAM
from multicam.cam.fullgrad import CompleteFullGrad, FullGrad, full_gradients
from multicam.errors import MulticamError
from tests.helpers.hygiene import Stop, assert_unchanged, dirty, raising, state
from tests.helpers.models import Branch, Fusion, Siamese, fusion_inputs, seeded


class Net(nn.Module):
    """A ReLU network whose layers are defined in another order than they are called, in place wherever possible."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.unused = nn.Conv2d(7, 7, 3)
        self.head = nn.Linear(10, classes)
        self.norm = nn.BatchNorm2d(10, affine=True)
        self.second = nn.Conv2d(8, 10, 3, stride=2, bias=False)
        self.first = Branch(3, width=8)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.act(self.norm(self.second(x)))
        x += 0.5 * x
        return self.head(x.amax(3).mean(2))


class Ordered(nn.Sequential):
    """Defined in the order of its calls, nothing in place, every layer used once: what other libraries get right."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 8, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 4),
        )


def image(b: int = 2, size: int = 16) -> Tensor:
    return torch.randn(b, 3, size, size, generator=torch.Generator().manual_seed(size))


def means(maps: Tensor) -> Tensor:
    return maps.flatten(1).mean(1)


# completeness: the signed evidence is the whole score


@pytest.mark.parametrize("size", [32, 37])
def test_evidence_and_the_biases_of_the_head_are_the_score(size: int) -> None:
    model, x = seeded(Net).double(), image(3, size).double()
    found = CompleteFullGrad(model)(x, [3, 0, 1], signed=True)
    assert found.shape == (3, size, size)
    expected = model(x)[range(3), [3, 0, 1]] - model.head.bias[[3, 0, 1]]
    assert torch.allclose(means(found), expected, rtol=0, atol=1e-9)


def test_each_call_of_a_shared_encoder_is_a_term_of_its_own_input() -> None:
    model = seeded(Siamese).double()
    dates = {"before": image(2, 32).double(), "after": image(2, 32).double().flip(0)}
    found = CompleteFullGrad(model)(dates, 2, signed=True)
    assert list(found) == ["before", "after"] and found.comparable
    total = means(found["before"]) + means(found["after"])
    assert torch.allclose(total + model.head[2].bias[2], model(**dates)[:, 2], rtol=0, atol=1e-9)
    # The head is linear in the difference, so what one date contributes does not depend on the other.
    changed = CompleteFullGrad(model)({**dates, "after": dates["after"] + 1}, 2, signed=True)
    assert torch.allclose(changed["before"], found["before"], rtol=0, atol=1e-12)
    assert not torch.allclose(changed["after"], found["after"])


def test_a_clip_has_the_size_of_its_frames_and_is_complete() -> None:
    net = nn.Sequential(
        nn.Conv3d(3, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten()
    )
    model, clip = net.double().eval(), torch.randn(2, 3, 4, 8, 8).double()
    found = CompleteFullGrad(model)(clip, 1, signed=True)
    assert found.shape == (2, 4, 8, 8)
    assert torch.allclose(means(found), model(clip)[:, 1], rtol=0, atol=1e-9)


def test_several_clips_of_a_sample_are_an_image_of_all_their_frames_and_complete() -> None:
    class Frames(nn.Module):
        """Every frame of every clip as channels of one image."""

        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(2 * 3 * 4, 4, 3), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten())

        def forward(self, clips: Tensor) -> Tensor:
            return self.net(clips.flatten(1, 3))

    model, clips = seeded(Frames).double(), image(2 * 8, 8).view(2, 2, 3, 4, 8, 8).double()
    found = CompleteFullGrad(model)(clips, 1, signed=True)
    assert found.shape == (2, 8, 8)
    assert torch.allclose(means(found), model(clips)[:, 1], rtol=0, atol=1e-9)


def test_the_bias_of_a_layer_that_sees_several_inputs_belongs_to_none_of_them() -> None:
    class Early(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rgb, self.depth = nn.Conv2d(3, 4, 3), nn.Conv2d(1, 4, 3, bias=False)
            self.both = nn.Conv2d(8, 4, 1)

        def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
            return self.both(torch.cat([self.rgb(rgb), self.depth(depth)], 1).relu()).sum((2, 3))

    model = seeded(Early).double()
    inputs = {"rgb": image(2, 8).double(), "depth": image(2, 8).double()[:, :1]}
    terms = full_gradients(model, inputs, ["rgb", "depth"], 1)
    assert {name: len(found) for name, found in terms.items()} == {"rgb": 2, "depth": 1}
    total = sum(term.sum((1, 2, 3)) for found in terms.values() for term in found)
    assert torch.allclose(total + 36 * model.both.bias[1], model(**inputs)[:, 1], rtol=0, atol=1e-9)
    packed = PackedModel(model, inputs)
    assert torch.allclose(
        means(CompleteFullGrad(packed)(packed.pack(inputs), 1, signed=True)), model(**inputs)[:, 1], rtol=0, atol=1e-9
    )
    alone = CompleteFullGrad(model, "rgb")(inputs, 1, signed=True)
    assert torch.equal(alone, CompleteFullGrad(model)(inputs, 1, signed=True)["rgb"])


def test_a_module_called_often_has_a_term_for_each_call_and_one_that_leads_elsewhere_has_none() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.step, self.aside = (nn.Conv2d(c, 4, 3, padding=1) for c in (3, 4, 4))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.stem(x)
            for _ in range(3):
                x = self.step(x.relu())
            return x.amax((2, 3)), self.aside(x)

    model, x = seeded(Recurrent).double(), image(2, 8).double()
    terms = full_gradients(model, x, ["x"], 1, output=0)["x"]
    assert [tuple(term.shape[1:]) for term in terms] == [(3, 8, 8)] + 4 * [(4, 8, 8)]
    assert torch.allclose(sum(term.sum((1, 2, 3)) for term in terms), model(x)[0][:, 1], rtol=0, atol=1e-9)


def normalise_at_random(model: nn.Module, std: float) -> None:
    """Give batch norms means and biases that count."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=std)
            nn.init.normal_(module.bias, std=std)


def test_a_real_network_is_complete() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # In training mode it has further heads, which evaluation never calls.
        model = torchvision.models.googlenet(num_classes=3, init_weights=False).double()
        normalise_at_random(model, 0.1)
    x = image(1, 32).double()
    found = CompleteFullGrad(model)(x, 1, signed=True)
    assert torch.allclose(means(found) + model.fc.bias[1], model.eval()(x)[0, 1], rtol=1e-6, atol=1e-6)


def test_normalisations_that_activate_have_their_bias_in_front_of_the_activation() -> None:
    timm = pytest.importorskip("timm")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("densenet121", num_classes=3, growth_rate=8, block_config=(2, 2)).double().eval()
        normalise_at_random(model, 0.3)
    x = image(2, 32).double()
    found = CompleteFullGrad(model)(x, 1, signed=True)
    assert torch.allclose(means(found) + model.classifier.bias[1], model(x)[:, 1], rtol=0, atol=1e-6)


def test_frozen_normalisations_of_detectors_count() -> None:
    frozen = torchvision.ops.FrozenBatchNorm2d(4)
    for buffer in frozen.buffers():
        buffer.uniform_(0.5, 1.5)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), frozen, nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten()).double()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    x = image(2, 8).double()
    with torch.inference_mode():
        found = CompleteFullGrad(model)(x, 2, signed=True)
    assert torch.allclose(means(found), model(x)[:, 2], rtol=0, atol=1e-9)


@pytest.mark.parametrize("kept", ["running_mean", "running_var"])
def test_a_layer_that_keeps_a_mean_or_a_variance_alone_is_no_normalisation(kept: str) -> None:
    conv = nn.Conv2d(3, 4, 3)
    conv.register_buffer(kept, torch.rand(4))
    model, x = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten()).double(), image(2, 8).double()
    assert torch.allclose(means(CompleteFullGrad(model)(x, 2, signed=True)), model(x)[:, 2], rtol=0, atol=1e-9)


def test_cellwise_linear_layers_are_convolutions() -> None:
    class Last(nn.Module):
        """Channels last, as in ConvNeXt; its layer normalisation breaks the sum, but has a bias like any other."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.wide, self.norm = nn.Conv2d(3, 8, 3), nn.Linear(8, 16), nn.LayerNorm(16)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.wide(self.conv(x).permute(0, 2, 3, 1)).relu()).mean((1, 2))

    model = seeded(Last).double()
    nn.init.normal_(model.norm.bias)
    terms = full_gradients(model, image(2, 8).double(), ["x"], 5)["x"]
    assert [tuple(term.shape[1:]) for term in terms] == [(3, 8, 8), (8, 6, 6), (16, 6, 6), (16, 6, 6)]
    assert torch.allclose(terms[3].sum((1, 2, 3)), model.norm.bias[5])


# the paper's map


def test_the_map_is_the_papers_formula() -> None:
    model, x = seeded(Ordered).double(), image(2, 16).double()

    def psi(term: Tensor) -> Tensor:
        low, high = (extreme(term.abs(), (2, 3), keepdim=True) for extreme in (torch.amin, torch.amax))
        unit = (term.abs() - low) / (high - low)
        return nn.functional.interpolate(unit, (16, 16), mode="bilinear").sum(1)

    expected = sum(psi(term) for term in full_gradients(model, x, ["input"], 2)["input"])
    found = FullGrad(model)(x, 2)
    assert torch.allclose(found, expected, rtol=0, atol=1e-9)
    assert torch.equal(found, FullGrad(model)(x, 2, signed=True)) and not FullGrad.comparable


def peer(model: nn.Module, x: Tensor, target: int) -> np.ndarray:
    with PeerFullGrad(model, []) as cam:
        return np.asarray(cam(x.clone(), [ClassifierOutputTarget(target)] * len(x)))


def test_it_agrees_with_pytorch_grad_cam_where_that_is_right() -> None:
    model, x = seeded(Ordered), image(2, 16)
    with torch.no_grad():
        model[8].weight *= 1e4  # its epsilon of 1e-7 would otherwise be seen
    found = FullGrad(model)(x, 2)
    low, high = found.amin((1, 2), keepdim=True), found.amax((1, 2), keepdim=True)
    assert np.allclose(((found - low) / (high - low)).numpy(), peer(model, x, 2), atol=1e-4)


class Reversed(nn.Module):
    """`Ordered` with its layers defined from the last to the first."""

    def __init__(self) -> None:
        super().__init__()
        for i, module in reversed([*enumerate(seeded(Ordered))]):
            self.add_module(f"layer{i}", module)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(9):
            x = getattr(self, f"layer{i}")(x)
        return x


@pytest.mark.parametrize("method", [FullGrad, CompleteFullGrad])
def test_the_order_of_definition_and_unused_layers_change_nothing(method: type[InputCAM]) -> None:
    ordered, x = seeded(Ordered), image(2, 16)
    reverse = Reversed().eval()
    reverse.unused = nn.Conv2d(3, 3, 1)
    assert torch.allclose(method(reverse)(x, 2), method(ordered)(x, 2), atol=1e-6)


def test_where_pytorch_grad_cam_is_wrong() -> None:
    reverse, x = Reversed().eval(), image(2, 16)
    try:
        moved = np.abs(peer(reverse, x, 2) - peer(seeded(Ordered), x, 2)).max()
    except ValueError:  # biases of eight channels on gradients of six
        moved = 1.0
    assert moved > 0.01
    reverse.unused = nn.Conv2d(3, 3, 1)
    with pytest.raises(AssertionError):
        peer(reverse, x, 2)


@pytest.mark.parametrize("method", [FullGrad, CompleteFullGrad])
def test_operations_in_place_change_nothing(method: type[InputCAM]) -> None:
    model, x = seeded(Net), image(2, 32)
    expected = method(model)(x, 1, signed=True)
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    assert torch.allclose(method(model)(x, 1, signed=True), expected, atol=1e-6)


# what it is given


def test_a_tuple_output_and_the_top_class() -> None:
    class Two(Net):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            logits = super().forward(x)
            return logits, logits.flip(1)

    two, net, x = seeded(Two), seeded(Net), image(2, 32)
    two.load_state_dict(net.state_dict())
    assert torch.equal(FullGrad(two, output=0)(x), FullGrad(net)(x, net(x).argmax(1)))
    assert torch.equal(FullGrad(two, output=1)(x, 0), FullGrad(net)(x, 3))


def test_checkpointed_parts_are_explained() -> None:
    class Checkpointed(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = checkpoint(self.first, x, use_reentrant=False)
            return self.head(self.act(self.norm(self.second(x))).mean((2, 3)))

    class Plain(Checkpointed):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.act(self.norm(self.second(self.first(x)))).mean((2, 3)))

    x = image(2, 32)
    found = CompleteFullGrad(seeded(Checkpointed))(x, 1)
    assert torch.allclose(found, CompleteFullGrad(seeded(Plain))(x, 1), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_explained_in_single(dtype: torch.dtype) -> None:
    model, x = seeded(Net), image(2, 32)
    expected = CompleteFullGrad(model)(x, 1, signed=True)
    found = CompleteFullGrad(seeded(Net).to(dtype))(x.to(dtype), 1, signed=True)
    assert found.dtype == torch.float32
    assert torch.corrcoef(torch.stack([found.flatten(), expected.flatten()]))[0, 1] > 0.99


def test_inputs_without_a_gradient_are_refused() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.conv(a).mean((2, 3)) + self.conv(b.detach()).mean((2, 3))

    model, x = Detached(), image(2, 8)
    with pytest.raises(MulticamError, match="no gradient of the target reaches input 'b'"):
        FullGrad(model)((x, x), 0)
    with pytest.raises(MulticamError, match="no gradient of the target reaches input 'b'"):
        FullGrad(model, ["b"])((x, x), 0)
    assert FullGrad(model, "a")((x, x), 0).shape == (2, 8, 8)
    with pytest.raises(MulticamError, match=r"input 'x' is torch\.uint8, which has no gradient"):
        FullGrad(seeded(Net))(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), 0)


# hygiene


def broken(when: str) -> tuple[nn.Module, Callable[..., Any] | int]:
    model = dirty()
    stops = {"model raises": Stop, "interrupted": KeyboardInterrupt}
    if when in stops:
        model.head.register_forward_hook(raising(stops[when]))
    return model, raising(Stop) if when == "target raises" else 1


@pytest.mark.parametrize("when", ["normal", "target raises", "model raises", "interrupted"])
@pytest.mark.parametrize("method", [FullGrad, CompleteFullGrad])
def test_everything_is_left_as_it_was(method: type[InputCAM], when: str) -> None:
    model, target = broken(when)
    inputs = {name: x.requires_grad_() for name, x in fusion_inputs().items()}
    before = state(model, inputs)
    if when == "normal":
        maps = method(model)(inputs, target)
        assert {name: tuple(m.shape) for name, m in maps.items()} == {
            "rgb": (2, 32, 32), "depth": (2, 16, 32), "texture": (2, 32, 16)
        }  # fmt: skip
    else:
        with pytest.raises((Stop, KeyboardInterrupt)):
            method(model)(inputs, target)
    assert_unchanged(before, state(model, inputs))


def test_the_cost_is_a_pass_after_one_that_tells_the_layers() -> None:
    model, passes = seeded(Fusion), []
    model.register_forward_hook(lambda *_: passes.append(1))
    FullGrad(model)(fusion_inputs(), 1)
    assert len(passes) == 1 + 1
    FullGrad(model)(fusion_inputs(), 1)
    assert len(passes) == 1 + 1 + 1


class Hidden(nn.Module):
    """A convolution whose bias nobody sees."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.conv = how, nn.Conv2d(3, 4, 3)
        self.kept = nn.ParameterDict({"weight": torch.rand(4, 3, 1, 1), "bias": torch.rand(4)} if how == "kept" else {})

    def forward(self, x: Tensor) -> Tensor:
        match self.how:
            case "vmap":
                return torch.vmap(self.conv)(x[:, None])[:, 0].mean((2, 3))
            case "jvp":
                return torch.func.jvp(self.conv, (x,), (x,))[0].mean((2, 3))
            case "kept":
                return nn.functional.conv2d(x, self.kept["weight"], self.kept["bias"]).mean((2, 3))
        raise AssertionError(self.how)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")  # jvp's own
@pytest.mark.parametrize("how", ["kept", "vmap", "jvp"])
def test_biases_that_nobody_sees_are_not_left_out(how: str) -> None:
    message = "runs layer 'kept' out of sight" if how == "kept" else "layer 'conv' runs inside of a transform"
    for method in (FullGrad, CompleteFullGrad):
        with pytest.raises(MulticamError, match=rf"FullGrad adds up what every bias brings, and .*{message}"):
            method(Hidden(how))(torch.rand(2, 3, 8, 8), 1)
