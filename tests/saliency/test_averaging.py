from typing import Any

import pytest
import torch
from captum.attr import GradientShap, IntegratedGradients, NoiseTunnel, Saliency
from torch import Tensor, nn

from multicam import Inputs, MulticamError, demo
from multicam.chance import normal
from multicam.saliency.averaging import expected_gradients, integrated_gradients, smoothgrad, vargrad
from multicam.saliency.gradients import gradient, input_x_gradient
from tests.helpers.models import Captioned, Fusion, fusion_inputs, seeded


def close(x: Tensor, y: Tensor, share: float = 1e-5) -> bool:
    y = y.detach()
    return x.shape == y.shape and torch.allclose(x, y.to(x), rtol=share, atol=share * float(y.abs().max()))


def cnn() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.Softplus(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)
        ).eval()  # fmt: skip


def photo(b: int = 2) -> Tensor:
    return torch.rand(b, 3, 10, 10, generator=torch.Generator().manual_seed(b))


def apart() -> nn.Module:
    """Fusion with nothing in place, where captum is right."""
    model = seeded(Fusion)
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return model


class Polynomial(nn.Module):
    """`x^3 y + 2 y`, place by place: a score whose path integral anyone can write down."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (x**3 * y + 2 * y).flatten(1).sum(1, keepdim=True)


def two(b: int = 2) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(4)
    return {name: torch.rand(b, 1, 3, 4, generator=g, dtype=torch.float64) + 0.5 for name in "xy"}


# SmoothGrad and VarGrad.


def test_no_noise_is_the_gradient() -> None:
    inputs = fusion_inputs()
    found, plain = smoothgrad(seeded(Fusion), inputs, 1, std=0.0, samples=3), gradient(seeded(Fusion), inputs, 1)
    assert all(close(found[name], plain[name]) for name in inputs)
    variance = vargrad(seeded(Fusion), inputs, 1, std=0.0, samples=3)
    assert all(variance[name].max() < 1e-10 * plain[name].square().max() for name in inputs)


def test_a_linear_model_has_no_variance() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(300, 5))
    assert vargrad(model, photo(), 3)["input"].abs().max() < 1e-12
    assert close(smoothgrad(model, photo(), 3)["input"], model[1].weight[3].view(1, 3, 10, 10).expand(2, 3, 10, 10))


@pytest.mark.parametrize(("method", "kind"), [(smoothgrad, "smoothgrad"), (vargrad, "vargrad")])
def test_captums_noise_tunnel_with_the_same_noise(method: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, samples, b = fusion_inputs(), 5, 2
    leaves = list(inputs.values())
    # Captum knows one deviation for each input; ours is a share of the range of each sample's values.
    ranged = {}
    for name, x in inputs.items():
        low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
        ranged[name] = (x - low) / (high - low)
    turn = iter(range(len(leaves)))

    def ours(mean: float, std: Tensor) -> Tensor:
        i = next(turn)
        noise = torch.stack([normal(std.shape[1:], (7, draw, i)) for draw in range(samples)])
        return noise.repeat(b, 1, 1, 1) * std

    monkeypatch.setattr(torch, "normal", ours)
    expected = NoiseTunnel(Saliency(apart())).attribute(
        tuple(ranged.values()), nt_type=kind, nt_samples=samples, stdevs=0.2, target=1, abs=False
    )
    found = method(seeded(Fusion), ranged, 1, std=0.2, samples=samples, seed=7)
    for x, y in zip(found.values(), expected, strict=True):
        assert y.abs().max() > 0
        assert close(x, y, 1e-4)


def test_the_noise_is_a_share_of_each_samples_range() -> None:
    square = nn.Sequential(nn.Flatten(), Square())  # its gradient 2 x shows the noise
    x = photo() * torch.tensor([1.0, 10.0])[:, None, None, None]
    found = vargrad(square, x, 0, samples=400, std=0.1)["input"].sqrt() / 2
    spread = x.flatten(1).amax(1) - x.flatten(1).amin(1)
    assert torch.allclose(found.mean((1, 2, 3)), 0.1 * spread, rtol=0.02)


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.square().sum(1, keepdim=True)


@pytest.mark.parametrize("method", [smoothgrad, vargrad])
def test_neither_the_size_of_passes_nor_other_samples_nor_the_seed_of_others_matter(method: Any) -> None:
    x = photo(3)
    found = method(cnn(), x, [1, 2, 3], samples=7)["input"]
    for size in (1, 2, 5, 100):
        assert torch.allclose(method(cnn(), x, [1, 2, 3], samples=7, batch_size=size)["input"], found, atol=1e-6)
    for i in range(3):
        assert torch.allclose(method(cnn(), x[i : i + 1], i + 1, samples=7)["input"], found[i : i + 1], atol=1e-6)
    state = torch.get_rng_state()
    assert torch.equal(method(cnn(), x, [1, 2, 3], samples=7)["input"], found)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.allclose(method(cnn(), x, [1, 2, 3], samples=7, seed=1)["input"], found, rtol=1e-3)


def test_one_noisy_input_among_others_held() -> None:
    inputs = two()
    found = smoothgrad(Polynomial(), inputs, 0, wrt="x", samples=4, std=0.3)
    assert list(found) == ["x"]
    mean = torch.zeros_like(inputs["x"])
    for draw in range(4):
        spread = inputs["x"].flatten(1).amax(1) - inputs["x"].flatten(1).amin(1)
        noise = 0.3 * spread.view(-1, 1, 1, 1) * normal((1, 3, 4), (0, draw, 0))
        mean += 3 * (inputs["x"] + noise) ** 2 * inputs["y"] / 4
    assert close(found["x"], mean)


def test_the_top_class_is_that_of_the_inputs_without_noise() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(300, 2))
    x = photo(1)
    with torch.no_grad():  # so close that noise decides
        model[1].bias.copy_(torch.tensor([0.0, float((model(x)[0, 0] - model(x)[0, 1]) - 1e-4)]) + model[1].bias)
    tops = {int(model(x + 0.15 * normal((3, 10, 10), (0, draw, 0))).argmax()) for draw in range(25)}
    assert tops == {0, 1}
    top = int(model(x).argmax())
    assert close(smoothgrad(model, x)["input"], model[1].weight[top].view(1, 3, 10, 10))
    assert close(integrated_gradients(model, x)["input"], x * model[1].weight[top].view(1, 3, 10, 10))


# Integrated gradients.


@pytest.mark.parametrize(
    "baseline",
    [0.0, {"rgb": 0.3, "texture": "mean"}, "blur", {"depth": torch.rand(1, 16, 32)}, {"rgb": torch.rand(2, 3, 32, 32)}],
    ids=["zero", "by name", "blur", "one tensor", "tensors"],
)
@pytest.mark.filterwarnings("ignore:integrated gradients miss:UserWarning")
def test_captums_integrated_gradients(baseline: Any) -> None:
    from multicam.call.baselines import baselines

    inputs = fusion_inputs()
    start = baselines(Inputs.of(inputs), list(inputs), baseline)
    peer = IntegratedGradients(apart())
    expected, delta = peer.attribute(
        tuple(inputs.values()),
        tuple(start.values()),
        target=[3, 1],
        n_steps=100,
        method="riemann_middle",
        return_convergence_delta=True,
    )
    found = integrated_gradients(seeded(Fusion), inputs, [3, 1], baseline=baseline)
    for x, y in zip(found.values(), expected, strict=True):
        assert close(x, y)
    change = seeded(Fusion)(**inputs) - seeded(Fusion)(**start)
    assert torch.allclose(found.change, change[[0, 1], [3, 1]], atol=1e-6)
    assert torch.allclose(found.error, (delta / change[[0, 1], [3, 1]]).abs().float(), atol=1e-3)


def test_a_closed_form() -> None:
    inputs = two()
    x, y = inputs["x"], inputs["y"]
    found = integrated_gradients(Polynomial(), inputs, 0, steps=200)
    # From zero: x 3 a^3 x^2 y and y (a^3 x^3 + 2), integrated over a.
    assert torch.allclose(found["x"], 3 / 4 * x**3 * y, rtol=1e-4)
    assert torch.allclose(found["y"], x**3 * y / 4 + 2 * y, rtol=1e-4)
    assert found.error.max() < 1e-4
    assert torch.allclose(found.change, (x**3 * y + 2 * y).sum((1, 2, 3)))
    fixed = integrated_gradients(Polynomial(), inputs, 0, wrt="x", baseline=0.25)
    assert list(fixed) == ["x"]
    assert torch.allclose(fixed["x"], (x**3 - 0.25**3) * y, rtol=1e-3)
    assert fixed.error.max() < 1e-3


@pytest.mark.parametrize("baseline", [0.0, "mean", "blur"])
@pytest.mark.parametrize("photo", ["chelsea", "china", "rocket", "camera"])
def test_the_demo_model_is_complete_to_a_hundredth(photo: str, baseline: Any) -> None:
    inputs = {key: x.repeat(3, 1, 1, 1) for key, x in demo.inputs_of(demo.sample(photo).image).items()}
    found = integrated_gradients(demo.load(), inputs, [0, 1, 2], baseline=baseline)
    assert found.error.max() < 0.01
    total = sum(found.evidence.values())
    assert torch.allclose(total, found.change, rtol=0.01)


def test_what_is_missing_is_said() -> None:
    class Step(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sigmoid(200 * (x.mean((1, 2, 3)) - 0.123))[:, None]

    with pytest.warns(
        UserWarning, match=r"integrated gradients miss up to \d+% of the change .* 2 of 2 samples: take more"
    ):
        found = integrated_gradients(Step(), photo(), 0, steps=3)
    assert found.error.min() > 0.05
    assert integrated_gradients(Step(), photo(), 0, steps=300).error.max() < 0.05


def test_nothing_changes_between_equals() -> None:
    found = integrated_gradients(cnn(), photo(), 1, baseline=photo())
    assert not found["input"].any()
    assert found.error.tolist() == [0, 0]


@pytest.mark.filterwarnings("ignore:integrated gradients miss:UserWarning")
def test_batch_size_and_other_samples_do_not_matter_to_integrated_and_expected_gradients() -> None:
    x = photo(3)
    for method in (
        lambda x, k, **o: integrated_gradients(cnn(), x, k, steps=9, **o)["input"],
        lambda x, k, **o: expected_gradients(cnn(), x, photo(4), k, samples=9, **o)["input"],
    ):
        found = method(x, [1, 2, 3])
        assert all(torch.allclose(method(x, [1, 2, 3], batch_size=n), found, atol=1e-6) for n in (1, 4, 100))
        assert all(torch.allclose(method(x[i : i + 1], i + 1)[0], found[i], atol=1e-6) for i in range(3))


@pytest.mark.filterwarnings("ignore:integrated gradients miss:UserWarning")
def test_a_model_that_writes_into_its_inputs() -> None:
    class Overwriting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = cnn()

        def forward(self, input: Tensor) -> Tensor:
            return self.net(input.mul_(2))

    class Careful(Overwriting):
        def forward(self, input: Tensor) -> Tensor:
            return self.net(input * 2)

    x, kept = photo(), photo()
    for baseline in (0.0, "mean", "blur", torch.rand(3, 10, 10)):
        found = integrated_gradients(Overwriting(), x, 1, baseline=baseline)
        assert close(found["input"], integrated_gradients(Careful(), x, 1, baseline=baseline)["input"])
    assert close(smoothgrad(Overwriting(), x, 1)["input"], smoothgrad(Careful(), x, 1)["input"])
    assert torch.equal(x, kept)


# Expected gradients.


def test_expected_gradients_of_a_linear_model() -> None:
    model, references = nn.Sequential(nn.Flatten(), nn.Linear(300, 5)), photo(8)
    found = expected_gradients(model, photo(), references, 3, samples=16)
    weight = model[1].weight[3].view(1, 3, 10, 10)
    assert close(found["input"], (photo() - references.mean(0)) * weight)
    baselines, x = references, photo().requires_grad_()
    peer = GradientShap(model).attribute(x, baselines, n_samples=800, stdevs=0.0, target=3)
    assert torch.allclose(found["input"], peer.float(), atol=0.01)  # theirs draws references at random


def test_expected_gradients_are_complete_in_expectation() -> None:
    inputs, references = fusion_inputs(), fusion_inputs(6)
    found = expected_gradients(seeded(Fusion), inputs, references, 1, samples=600, batch_size=64)
    change = found.scores - seeded(Fusion)(**references)[:, 1].mean()
    total = sum(found.evidence.values())
    assert torch.allclose(total, change.detach(), rtol=0.05, atol=0.01)
    few = expected_gradients(seeded(Fusion), inputs, references, 1, samples=6)
    assert (total - change).abs().mean() < (sum(few.evidence.values()) - change).abs().mean()


def test_one_reference_is_integrated_gradients() -> None:
    reference = photo(1).flip(-1)
    found = expected_gradients(cnn(), photo(), reference, 1, samples=2000, batch_size=500)
    assert close(found["input"], integrated_gradients(cnn(), photo(), 1, baseline=reference)["input"], 0.03)


def test_references_by_position_and_those_that_are_not_read() -> None:
    inputs = {"image": torch.rand(2, 3, 8, 8), "ids": torch.arange(10).view(2, 5)}
    model, references = seeded(Captioned), torch.rand(4, 3, 8, 8)
    found = expected_gradients(model, inputs, (references, None), 1, output="logits", samples=8)
    assert list(found) == ["image"]
    named = expected_gradients(model, inputs, {"image": references, "ids": "unread"}, 1, output="logits", samples=8)
    assert torch.equal(named["image"], found["image"])


@pytest.mark.parametrize(
    ("references", "message"),
    [
        ((torch.rand(4, 3, 9, 8), None), r"the references of input 'image' must be \(n, 3, 8, 8\), not \(4, 3, 9, 8\)"),
        ((torch.rand(3, 8, 8), None), r"must be \(n, 3, 8, 8\), not \(3, 8, 8\)"),
        ((torch.rand(0, 3, 8, 8), None), r"must be \(n, 3, 8, 8\), not \(0, 3, 8, 8\)"),
        ((None, None), r"must be \(n, 3, 8, 8\), not None"),
        ({"imag": torch.rand(4, 3, 8, 8)}, "no argument 'imag'; did you mean 'image'"),
        (
            (torch.rand(4, 3, 8, 8), None, torch.rand(3, 5)),
            "the references must be equally many of every input, not {'image': 4, 'mask': 3}",
        ),
    ],
    ids=["size", "batch", "none of them", "None", "name", "numbers"],
)
def test_references_that_do_not_fit(references: Any, message: str) -> None:
    inputs = {"image": torch.rand(2, 3, 8, 8), "ids": torch.arange(10).view(2, 5), "mask": torch.rand(2, 5)}
    wrt = ["image", "mask"] if "equally" in message else None
    with pytest.raises(MulticamError, match=message):
        expected_gradients(seeded(Captioned), inputs, references, 1, output="logits", wrt=wrt)


@pytest.mark.parametrize("method", [smoothgrad, vargrad])
def test_numbers_that_do_not_fit(method: Any) -> None:
    with pytest.raises(MulticamError, match="samples must be a whole number of at least 1, not 0"):
        method(cnn(), photo(), 1, samples=0)
    for size in (0, -1):
        with pytest.raises(MulticamError, match=f"batch_size must be a whole number of at least 1, not {size}"):
            method(cnn(), photo(), 1, batch_size=size)
    with pytest.raises(MulticamError, match="steps must be a whole number of at least 1, not 0"):
        integrated_gradients(cnn(), photo(), 1, steps=0)
    with pytest.raises(MulticamError, match="samples must be a whole number of at least 1, not 0"):
        expected_gradients(cnn(), photo(), photo(), 1, samples=0)


def test_a_target_that_cannot_tell_its_samples() -> None:
    def apart(out: Tensor) -> Tensor:
        return out[:, 0] * torch.tensor([1.0, 5.0])

    for method in (smoothgrad, integrated_gradients):
        with pytest.raises(MulticamError, match="treats each sample differently"):
            method(cnn(), photo(), apart)


def test_input_x_gradient_is_integrated_gradients_without_biases() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5, bias=False))
    found = integrated_gradients(model, photo(), 1)
    assert close(input_x_gradient(model, photo(), 1)["input"], found["input"], 1e-4)
    assert found.error.max() < 1e-3
