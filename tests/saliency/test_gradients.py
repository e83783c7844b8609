import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from captum.attr import GuidedGradCam, InputXGradient, Saliency
from torch import Tensor, nn

from multicam import GradCAM, HiResCAM, Inputs, Layer, MulticamError, tokens
from multicam.call.targets import Probability
from multicam.saliency.averaging import expected_gradients, integrated_gradients, smoothgrad, vargrad
from multicam.saliency.gradients import deconvnet, gradient, guided_backprop, guided_gradcam, input_x_gradient
from multicam.saliency.occluding import occlusion
from tests.helpers.models import Branch, Captioned, Fusion, Siamese, fusion_inputs, seeded


def smooth(x: Any, *args: Any, **options: Any) -> Any:
    return smoothgrad(x, *args, samples=3, **options)


def variance(x: Any, *args: Any, **options: Any) -> Any:
    return vargrad(x, *args, samples=3, **options)


def integrated(x: Any, *args: Any, **options: Any) -> Any:
    return integrated_gradients(x, *args, **options)


def occluded(x: Any, *args: Any, **options: Any) -> Any:
    return occlusion(x, *args, patch=8, **options)


def expected(x: Any, inputs: Any, *args: Any, **options: Any) -> Any:
    return expected_gradients(x, inputs, inputs, *args, samples=3, **options)


GRADIENTS = {
    "gradient": gradient,
    "input x gradient": input_x_gradient,
    "guided": guided_backprop,
    "deconvnet": deconvnet,
}
ALL: dict[str, Callable[..., Any]] = {
    **GRADIENTS, "smooth": smooth, "variance": variance, "integrated": integrated, "occlusion": occluded,
    "expected": expected,
}  # fmt: skip


def close(x: Tensor, y: Tensor, share: float = 1e-5) -> bool:
    y = y.detach()
    return x.shape == y.shape and torch.allclose(x, y.to(x), rtol=share, atol=share * float(y.abs().max()))


def apart(factory: type[nn.Module]) -> nn.Module:
    """The same model without anything in place, where captum is right."""
    model = seeded(factory)
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return model


def autograd(model: nn.Module, inputs: tuple[Tensor, ...], target: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    leaves = tuple(x.detach().clone().requires_grad_() for x in inputs)
    return torch.autograd.grad(target(model(*leaves)).sum(), leaves)


def test_captum_and_autograd_find_the_same_for_several_inputs() -> None:
    inputs = fusion_inputs()
    x = tuple(inputs.values())
    plain = gradient(seeded(Fusion), inputs, 3)
    by_input = input_x_gradient(seeded(Fusion), inputs, [3, 1])
    own = autograd(apart(Fusion), x, lambda out: out[:, 3])
    x = tuple(y.clone().requires_grad_() for y in x)
    peer = Saliency(apart(Fusion)).attribute(x, target=3, abs=False)
    other = InputXGradient(apart(Fusion)).attribute(x, target=[3, 1])
    for i, name in enumerate(inputs):
        assert close(plain[name], peer[i])
        assert close(plain[name], own[i])
        assert close(by_input[name], other[i])
        assert torch.allclose(by_input.evidence[name], other[i].detach().sum((1, 2, 3)), atol=1e-5)
    assert plain.keys() == inputs.keys()
    assert torch.allclose(plain.scores, seeded(Fusion)(**inputs)[:, 3], atol=1e-6)


def cnn(channels: int = 3, classes: int = 9) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return nn.Sequential(
            nn.Conv2d(channels, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes),
        ).eval()  # fmt: skip


def photo(b: int = 2, channels: int = 3, side: int = 16) -> Tensor:
    return torch.rand(b, channels, side, side, generator=torch.Generator().manual_seed(b + channels))


@pytest.mark.parametrize("layer", ["3", "4"])
@pytest.mark.filterwarnings("ignore:Setting backward hooks:UserWarning")
@pytest.mark.filterwarnings("ignore:the GradCAM map:UserWarning")
def test_guided_gradcam_is_captums_as_a_density(layer: str) -> None:
    model, x = cnn(), photo()
    peer = GuidedGradCam(model, model[int(layer)]).attribute(
        x.clone().requires_grad_(), target=1, interpolate_mode="bilinear"
    )
    found = guided_gradcam(model, x, layer, 1)["input"]
    cells = 5 * 5
    assert peer.abs().max() > 0
    assert close(found, peer.detach() * cells)
    maps, guided = GradCAM(model, layer)(x, 1), guided_backprop(model, x, 1)["input"]
    assert close(found, maps[:, None] * guided)


def test_guided_gradcam_multiplies_the_map_of_the_same_input() -> None:
    model, inputs = seeded(Fusion), fusion_inputs()
    layers = {"rgb": "rgb.net.0", "texture": "texture.net.0"}
    found = guided_gradcam(model, inputs, layers, 1, method=HiResCAM)
    maps, guided = HiResCAM(model, layers)(inputs, 1), guided_backprop(model, inputs, 1)
    assert list(found) == ["rgb", "texture"]
    for name in layers:
        assert close(found[name], maps[name][:, None] * guided[name])
    onto = guided_gradcam(model, inputs, Layer("rgb.net.0", onto="rgb"), 1, method=HiResCAM)
    assert torch.equal(onto["rgb"], found["rgb"])
    named = guided_gradcam(model, inputs, {"early": Layer("rgb.net.0", onto="rgb")}, 1, method=HiResCAM)
    assert torch.equal(named["early"], found["rgb"])


def test_guided_gradcam_needs_to_know_the_input() -> None:
    model, inputs = seeded(Fusion), fusion_inputs()
    with pytest.raises(
        MulticamError, match=r"say which input the layer 'rgb.net.0' belongs to, as in {'rgb': 'rgb.net.0'}"
    ):
        guided_gradcam(model, inputs, "rgb.net.0", 1)
    with pytest.raises(MulticamError, match="the image inputs are: 'rgb', 'depth', 'texture'"):
        guided_gradcam(model, inputs, {"x": "rgb.net.0"}, 1)
    with pytest.raises(MulticamError, match="input 'input' is uint8, which has no gradient"):
        guided_gradcam(nn.Sequential(Floating(), *cnn()), photo().to(torch.uint8), "1", 1)


class Floating(nn.Module):
    def forward(self, input: Tensor) -> Tensor:
        return input.float()


class Volumes(nn.Module):
    def __init__(self, frames_first: bool) -> None:
        super().__init__()
        self.frames_first = frames_first
        self.conv, self.head = nn.Conv3d(3, 4, 3, padding=1), nn.Linear(4, 2)

    def forward(self, clip: Tensor) -> Tensor:
        x = self.conv(clip.transpose(1, 2) if self.frames_first else clip).relu()
        return self.head(x.mean((2, 3, 4)))


@pytest.mark.parametrize("frames_first", [False, True])
def test_guided_gradcam_of_clips(frames_first: bool) -> None:
    model = Volumes(frames_first)
    clip = torch.rand(2, 5, 3, 8, 8) if frames_first else torch.rand(2, 3, 5, 8, 8)
    found = guided_gradcam(model, clip, "conv", 1, method=HiResCAM)["clip"]
    maps, guided = HiResCAM(model, "conv")(clip, 1), guided_backprop(model, clip, 1)["clip"]
    assert close(found, guided * (maps[:, :, None] if frames_first else maps[:, None]))


def positive(model: nn.Module) -> nn.Module:
    """With weights that leave evidence in favour only."""
    for parameter in model.parameters():
        parameter.data.abs_()
    return model


def test_guided_gradcam_of_a_signal() -> None:
    model = positive(nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(40, 3)))
    inputs, layers = {"input": torch.rand(2, 2, 10)}, {"input": "0"}
    found = guided_gradcam(model, inputs, layers, 1, method=HiResCAM)["input"]
    guided = guided_backprop(model, inputs, 1, wrt="input")["input"]
    assert close(found, HiResCAM(model, layers)(inputs, 1)["input"][:, None] * guided)


@pytest.mark.parametrize("n", [5, 6])
def test_guided_gradcam_of_features(n: int) -> None:
    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.head = nn.Linear(6, 4), nn.Linear(4, 3)

        def forward(self, words: Tensor) -> Tensor:
            return self.head(self.mix(words).relu().mean(1))

    model, inputs, layers = (
        positive(Features()),
        {"words": torch.rand(2, n, 6)},
        {"words": Layer("mix", reshape=tokens(n))},
    )
    found = guided_gradcam(model, inputs, layers, 1, method=HiResCAM)["words"]
    guided = guided_backprop(model, inputs, 1, wrt="words")["words"]
    assert close(found, HiResCAM(model, layers)(inputs, 1)["words"][:, :, None] * guided)


# The defects of earlier tools, each with the test that it fails.


@pytest.mark.parametrize("method", GRADIENTS)
def test_flashtorch_3_an_input_needs_no_requires_grad(method: str) -> None:
    x = photo()
    found = GRADIENTS[method](cnn(), x, 3)["input"]
    assert found.abs().max() > 0
    assert not found.requires_grad
    assert not x.requires_grad
    x.requires_grad_()
    assert torch.equal(GRADIENTS[method](cnn(), x, 3)["input"], found)
    assert x.grad is None


def test_flashtorch_4_the_target_class_is_honoured() -> None:
    x = photo()
    five, seven = (gradient(cnn(), x, k)["input"] for k in (5, 7))
    assert not torch.allclose(five, seven, rtol=1e-2)
    for k, found in ((5, five), (7, seven)):
        assert close(found, autograd(cnn(), (x,), lambda out, k=k: out[:, k])[0])


@pytest.mark.parametrize("channels", [1, 6])
@pytest.mark.parametrize("method", ALL)
def test_flashtorch_6_and_7_any_number_of_channels(method: str, channels: int) -> None:
    found = ALL[method](cnn(channels), photo(2, channels), 3)
    assert found["input"].shape == (2, channels, 16, 16)
    assert found["input"].abs().max() > 0
    assert found.maps()["input"].shape == (2, 16, 16)


@pytest.mark.parametrize("method", ALL)
def test_flashtorch_8_a_batch_is_its_samples(method: str) -> None:
    x = photo(3)
    together = ALL[method](cnn(), x, [3, 1, 2])["input"]
    references = {"inputs": x} if method == "expected" else {}
    for i, k in enumerate([3, 1, 2]):
        if references:
            alone = expected_gradients(cnn(), x[i : i + 1], x, k, samples=3)["input"]
        else:
            alone = ALL[method](cnn(), x[i : i + 1], k)["input"]
        assert torch.allclose(together[i], alone[0], atol=1e-6)


def test_flashtorch_9_a_shared_first_convolution() -> None:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = Branch(3), nn.Linear(16, 4)

        def forward(self, before: Tensor, after: Tensor) -> Tensor:
            return self.head((self.encoder(after) - 2 * self.encoder(before)).mean((2, 3)))

    model = seeded(Siamese)
    before, after = photo().requires_grad_(), photo().flip(-1).requires_grad_()
    found = gradient(model, (before, after), 1)
    model(before, after)[:, 1].sum().backward()
    assert close(found["before"], before.grad)
    assert close(found["after"], after.grad)
    same = gradient(model, (before, before), 1)  # one tensor given twice is two inputs
    assert not torch.allclose(same["before"], same["after"])


def test_flashtorch_10_a_vision_transformer() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=4).eval()
    x = photo(2, 3, 32).requires_grad_()
    found = gradient(model, x, 2)["x"]
    model(x)[:, 2].sum().backward()
    assert x.grad.abs().min() > 0
    assert close(found, x.grad, 1e-4)
    with pytest.warns(UserWarning, match="no gradient passed a ReLU of VisionTransformer"):
        assert close(guided_backprop(model, x, 2)["x"], x.grad, 1e-4)


def test_flashtorch_11_a_tuple_is_several_inputs() -> None:
    found = gradient(seeded(Fusion), tuple(fusion_inputs().values()), 1)
    assert list(found) == ["rgb", "depth", "texture"]
    assert all(
        torch.equal(a, b)
        for a, b in zip(found.values(), gradient(seeded(Fusion), fusion_inputs(), 1).values(), strict=True)
    )


# Inputs of every structure.


class Nested(nn.Module):
    """A dict of an image and token ids, None among them."""

    def __init__(self) -> None:
        super().__init__()
        self.model = seeded(Captioned)

    def forward(self, batch: dict[str, Any]) -> Tensor:
        return self.model(batch["image"], batch["ids"], batch["mask"])["logits"]


class Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch, self.head = Branch(3), nn.Linear(16, 4)

    def forward(self, views: list[Tensor], *, scale: float = 1.0) -> Tensor:
        return self.head(sum(self.branch(view) * (i + 1) for i, view in enumerate(views)).mean((2, 3)) * scale)


def ids(b: int = 2) -> Tensor:
    return torch.arange(5 * b).view(b, 5) * 7 % 50


@pytest.mark.parametrize("method", ALL)
def test_a_nested_dict_with_text_and_none(method: str) -> None:
    inputs = Inputs({"image": photo(), "ids": ids(), "mask": None})
    found = ALL[method](Nested(), inputs, 1)
    assert list(found) == ["batch.image"]
    mask = torch.ones(2, 5)
    flat = ALL[method](seeded(Captioned), {"image": photo(), "ids": ids(), "mask": mask}, 1, output="logits")
    assert close(found["batch.image"], flat["image"], 1e-4)
    named = ALL[method](Nested(), inputs, 1, wrt="image")
    assert list(named) == ["image"]
    assert torch.equal(named["image"], found["batch.image"])


@pytest.mark.parametrize("method", ALL)
def test_a_list_of_images_and_keywords(method: str) -> None:
    model = seeded(Views)
    views = [photo(), photo().flip(-1)]
    found = ALL[method](model, Inputs(views, scale=2.0), 1)
    assert list(found) == ["views.0", "views.1"]
    half = ALL[method](model, Inputs(views), 1)
    for name in found:
        assert found[name].abs().max() > 0
        assert close(found[name], half[name] * (4 if method == "variance" else 2), 1e-4)


def test_the_gradient_by_other_inputs_on_request() -> None:
    inputs = {"image": photo(), "ids": ids(), "mask": torch.rand(2, 5) + 0.5}
    assert list(gradient(seeded(Captioned), inputs, 1, output="logits")) == ["image"]
    found = gradient(seeded(Captioned), inputs, 1, output="logits", wrt=["mask", "image"])
    assert list(found) == ["mask", "image"]
    mask = inputs["mask"].clone().requires_grad_()
    (own,) = torch.autograd.grad(seeded(Captioned)(inputs["image"], inputs["ids"], mask)["logits"][:, 1].sum(), mask)
    assert close(found["mask"], own)


class Spectrum(nn.Module):
    """Takes the Fourier transform of an image, complex."""

    def __init__(self) -> None:
        super().__init__()
        self.net = cnn(2)

    def forward(self, spectrum: Tensor) -> Tensor:
        return self.net(torch.view_as_real(spectrum).movedim(-1, 2).flatten(1, 2))


class RealSpectrum(nn.Module):
    """The same for real and imaginary parts."""

    def __init__(self) -> None:
        super().__init__()
        self.net = cnn(2)

    def forward(self, parts: Tensor) -> Tensor:
        return self.net(parts)


def test_complex_inputs_are_their_real_and_imaginary_parts() -> None:
    spectrum = torch.fft.fft2(photo(2, 1), norm="ortho")
    parts = torch.cat([spectrum.real, spectrum.imag], 1)
    complex_, real = gradient(Spectrum(), spectrum, 1)["spectrum"], gradient(RealSpectrum(), parts, 1)["parts"]
    assert close(complex_.real, real[:, :1])
    assert close(complex_.imag, real[:, 1:])
    for method in (input_x_gradient, integrated_gradients, occluded):
        found, by_part = method(Spectrum(), spectrum, 1), method(RealSpectrum(), parts, 1)
        both = by_part["parts"].sum(1, keepdim=True) if method is not occluded else by_part["parts"][:, :1]
        assert not found["spectrum"].is_complex()
        assert close(found["spectrum"], both, 1e-4)
        assert torch.allclose(found.evidence["spectrum"], by_part.evidence["parts"], rtol=1e-3, atol=1e-4)
    many = expected_gradients(Spectrum(), spectrum, spectrum.flip(0), 1, samples=8)["spectrum"]
    by_part = expected_gradients(RealSpectrum(), parts, parts.flip(0), 1, samples=8)["parts"]
    assert close(many, by_part.sum(1, keepdim=True), 1e-4)
    assert smoothgrad(Spectrum(), spectrum, 1, std=0.0, samples=2)["spectrum"].is_complex()
    assert close(
        torch.view_as_real(smoothgrad(Spectrum(), spectrum, 1, std=0.0)["spectrum"]), torch.view_as_real(complex_)
    )
    assert not vargrad(Spectrum(), spectrum, 1)["spectrum"].is_complex()


# Precisions, modes and states.


@pytest.mark.parametrize("method", ALL)
@pytest.mark.filterwarnings("ignore:integrated gradients miss:UserWarning")
def test_double_precision_stays_and_half_becomes_single(method: str) -> None:
    exact = ALL[method](cnn().double(), photo().double(), 3)["input"]
    single = ALL[method](cnn(), photo(), 3)["input"]
    assert exact.dtype == torch.float64
    assert close(single, exact, 1e-3)
    half = ALL[method](cnn().bfloat16(), photo().bfloat16(), 3)["input"]
    assert half.dtype == torch.float32
    if method != "variance":  # which is smaller than what bfloat16 rounds
        assert F.cosine_similarity(half.flatten(), single.flatten(), 0) > 0.98


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("method", ALL)
def test_the_callers_grad_mode_does_not_matter(method: str, mode: Any) -> None:
    model = seeded(Fusion)
    outside = ALL[method](model, fusion_inputs(1), 1)
    with mode():
        inside = ALL[method](model, {name: x * 1 for name, x in fusion_inputs(1).items()}, 1)
    for name in outside:
        assert torch.allclose(inside[name], outside[name], atol=1e-6)


@pytest.mark.parametrize("method", ALL)
def test_frozen_models_and_models_in_training(method: str) -> None:
    model = seeded(Fusion)
    found = ALL[method](model, fusion_inputs(1), 1)
    frozen = ALL[method](seeded(Fusion).requires_grad_(False), fusion_inputs(1), 1)
    training = ALL[method](seeded(Fusion).train(), fusion_inputs(1), 1)
    for name in found:
        assert torch.equal(frozen[name], found[name])
        assert torch.equal(training[name], found[name])


@pytest.mark.parametrize("method", ["gradient", "guided", "integrated", "smooth"])
@pytest.mark.filterwarnings("ignore:integrated gradients miss:UserWarning")
def test_under_autocast(method: str) -> None:
    single = ALL[method](cnn(), photo(), 3)["input"]
    with torch.autocast("cpu", torch.bfloat16):
        found = ALL[method](cnn(), photo(), 3)["input"]
    assert found.dtype == torch.float32
    assert F.cosine_similarity(found.flatten(), single.flatten(), 0) > 0.98


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("method", ALL)
def test_a_gpu_finds_the_same(method: str) -> None:
    found = ALL[method](cnn().double().cuda(), photo().double().cuda(), 3)["input"]
    assert found.is_cuda
    assert close(found.cpu(), ALL[method](cnn().double(), photo().double(), 3)["input"])


@pytest.mark.parametrize("method", ALL)
def test_targets_of_each_kind(method: str) -> None:
    x = photo(3)
    one = ALL[method](cnn(), x, 2)["input"]
    assert torch.allclose(ALL[method](cnn(), x, lambda out: out[:, 2])["input"], one, atol=1e-6)
    assert torch.allclose(ALL[method](cnn(), x, torch.tensor([2, 2, 2]))["input"], one, atol=1e-6)
    top = cnn()(x).argmax(1).tolist()
    assert torch.allclose(ALL[method](cnn(), x)["input"], ALL[method](cnn(), x, top)["input"], atol=1e-7)
    assert ALL[method](cnn(), x, Probability([1, 2, 0]))["input"].abs().max() > 0


def test_the_gradient_of_a_probability() -> None:
    (own,) = autograd(cnn(), (photo(),), lambda out: out.softmax(1)[:, 2])
    assert close(gradient(cnn(), photo(), Probability(2))["input"], own)


# What no gradient reaches.


class Gated(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.net = how, cnn()

    def forward(self, rgb: Tensor, gate: Tensor) -> Tensor:
        x = self.net(rgb)
        if self.how == "ignored":
            return x
        if self.how == "detached":
            return x * gate.detach().mean((1, 2, 3))[:, None]
        return x * (1 + gate.flatten(1).argmax(1)[:, None])


@pytest.mark.parametrize("method", ALL)
def test_an_ignored_input_has_exactly_nothing(method: str) -> None:
    found = ALL[method](Gated("ignored"), {"rgb": photo(), "gate": photo(2, 1)}, 3)
    assert found["gate"].shape == (2, 1, 16, 16)
    assert not found["gate"].any()
    assert found["rgb"].any()


@pytest.mark.parametrize("how", ["detached", "argmax"])
@pytest.mark.parametrize("method", [name for name in ALL if name != "occlusion"])
def test_an_input_used_without_a_gradient_is_refused(method: str, how: str) -> None:
    inputs = {"rgb": photo(), "gate": photo(2, 1)}
    with pytest.raises(
        MulticamError, match=r"the target depends on input 'gate', but not by a gradient: .*wrt=.*occlusion"
    ):
        ALL[method](Gated(how), inputs, 3)
    assert ALL[method](Gated(how), inputs, 3, wrt="rgb")["rgb"].any()
    assert occlusion(Gated(how), inputs, 3, wrt="gate", patch=16)["gate"].any()


def test_a_model_whose_output_has_no_gradient_at_all() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = cnn()

        @torch.no_grad()
        def forward(self, input: Tensor) -> Tensor:
            return self.net(input)

    with pytest.raises(MulticamError, match="the target depends on input 'input', but not by a gradient"):
        gradient(Frozen(), photo(), 3)


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ({"image": photo(), "ids": ids()}, {"wrt": "imag"}, "no input 'imag'; did you mean 'image'"),
        (
            {"image": photo(), "ids": ids()},
            {"wrt": "image", "output": "logit"},
            "no output 'logit'; did you mean 'logits'",
        ),
        ({"image": photo(), "ids": ids()}, {"output": None}, "say what to explain with output="),
        ({"image": photo(), "ids": ids()}, {"target": 7}, "target class 7 does not exist"),
        ({"image": photo(), "idx": ids()}, {}, "no argument 'idx'; did you mean 'ids'"),
        (
            Inputs(photo(), ids()).hold("0"),
            {},
            "there is no .*image input to explain in .*; name other inputs with wrt=",
        ),
        (
            Inputs(photo(), ids(1)).constant("1"),
            {"wrt": "ids"},
            "no input with a value for each sample 'ids'. There are: 'image'",
        ),
    ],
    ids=["input", "output", "no output", "class", "argument", "held", "constant"],
)
def test_what_does_not_fit_is_refused(method: str, inputs: Any, options: dict[str, Any], message: str) -> None:
    options = {"output": "logits", "target": 1} | options
    error: type[Exception] = MulticamError if options["output"] else Exception
    with pytest.raises(error) as raised:
        ALL[method](seeded(Captioned), inputs, **options)
    text = " ".join([str(raised.value), *getattr(raised.value, "__notes__", [])])
    assert re.search(message, text), text


@pytest.mark.parametrize("method", [name for name in ALL if name != "occlusion"])
def test_integers_have_no_gradient(method: str) -> None:
    inputs = {"image": photo(), "ids": ids()}
    with pytest.raises(MulticamError, match="input 'ids' is int64, which has no gradient"):
        ALL[method](seeded(Captioned), inputs, 1, output="logits", wrt="ids")


@pytest.mark.parametrize("method", ALL)
def test_one_number_for_each_sample_is_an_input_too(method: str) -> None:
    class Aged(nn.Module):
        def forward(self, image: Tensor, age: Tensor) -> Tensor:
            return torch.stack([image.mean((1, 2, 3)).relu() * age**2, age], 1)

    inputs = {"image": photo(), "age": torch.tensor([2.0, 3.0])}
    found = (occlusion if method == "occlusion" else ALL[method])(Aged(), inputs, 0, wrt=["age", "image"])
    assert found["age"].shape == (2,)
    slope = 2 * inputs["age"] * inputs["image"].mean((1, 2, 3))
    if method in ("gradient", "smooth"):  # whose noise is a share of a range, here of none
        assert close(found["age"], slope, 0.2 if method == "smooth" else 1e-5)
    if method == "occlusion":
        assert close(found.evidence["age"], inputs["image"].mean((1, 2, 3)) * inputs["age"] ** 2)
    assert all(math.isfinite(x) for x in found["age"].tolist())


@pytest.mark.parametrize("function", [gradient, guided_backprop, input_x_gradient])
def test_a_model_that_overwrites_what_its_gradient_needs(function: Any) -> None:
    """`b -= a` behind a ReLU in place: plain autograd cannot differentiate it at all."""
    model, other = seeded(Siamese), seeded(Siamese)
    inputs = {"before": torch.rand(2, 3, 16, 16), "after": torch.rand(2, 3, 16, 16)}

    def apart(before: Tensor, after: Tensor) -> Tensor:
        a, b = other.encoder(before).clone(), other.encoder(after).clone()
        return other.head((b - a) * 2.0)

    found = function(model, inputs, 1)
    other.forward = apart
    expected = function(other, inputs, 1)
    for name in inputs:
        assert expected[name].abs().max() > 0
        torch.testing.assert_close(found[name], expected[name])


def test_no_input_is_not_all_inputs() -> None:
    with pytest.raises(MulticamError, match="there is no floating-point image input to explain"):
        gradient(seeded(Fusion), fusion_inputs(), 1, wrt=[])
