import sys
from typing import Any

import captum.attr as ca
import pytest
import torch
from torch import Tensor, nn

from multicam import Inputs, MulticamError
from multicam.call.targets import Probability
from multicam.saliency.attributions import Attributions
from multicam.saliency.captum_bridge import captum_attribution
from multicam.saliency.gradients import gradient
from tests.helpers.models import Captioned, Fusion, fusion_inputs, seeded

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting (forward, )?backward hooks:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting forward, backward hooks and attributes:UserWarning"),
    pytest.mark.filterwarnings("ignore:You are providing multiple inputs for:UserWarning"),
]


def close(x: Tensor, y: Tensor, share: float = 1e-5) -> bool:
    y = y.detach()
    return x.shape == y.shape and torch.allclose(x, y.to(x), rtol=share, atol=share * float(y.abs().max()))


class Joined(nn.Module):
    """Two images and a table by position, a ReLU for each use, as captum wants them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(1, 4, 3)
        self.relus = nn.ModuleList([nn.ReLU(), nn.ReLU()])
        self.head = nn.Linear(8, 5)

    def forward(self, rgb: Tensor, depth: Tensor, gain: Tensor) -> Tensor:
        x, y = self.relus[0](self.a(rgb)), self.relus[1](self.b(depth))
        return self.head(torch.cat([x.mean((2, 3)), y.mean((2, 3))], 1) * gain)


def inputs(b: int = 2) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(b)
    return {"rgb": torch.rand(b, 3, 8, 8, generator=g), "depth": torch.rand(b, 1, 6, 8, generator=g), "gain": torch.rand(b, 1, generator=g)}  # fmt: skip


def joined() -> nn.Module:
    return seeded(Joined)


START = {"rgb": 0.25, "depth": 0.5}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("IntegratedGradients", {"baselines": START, "n_steps": 20}),
        ("DeepLift", {"baselines": {name: torch.full_like(inputs()[name], x) for name, x in START.items()}}),
        ("InputXGradient", {}),
        ("GuidedBackprop", {}),
        ("FeatureAblation", {"baselines": START, "perturbations_per_eval": 64}),
        ("FeatureAblation", {"feature_mask": {n: torch.arange(8).expand(1, *inputs()[n].shape[1:]) + 8 * i for i, n in enumerate(START)}}),
        ("Occlusion", {"sliding_window_shapes": {"rgb": (3, 4, 4), "depth": (1, 3, 4)}, "strides": {"rgb": (3, 4, 4), "depth": (1, 3, 4)}}),
    ],
    ids=["IntegratedGradients", "DeepLift", "InputXGradient", "GuidedBackprop", "FeatureAblation", "masks", "Occlusion"],
)  # fmt: skip
def test_it_is_what_captum_finds_for_tensors_by_position(name: str, options: dict[str, Any]) -> None:
    x = inputs()
    found = captum_attribution(name, joined(), x, [3, 1], **options)
    by_position = {k: tuple(v.values()) if isinstance(v, dict) else v for k, v in options.items()}
    expected = getattr(ca, name)(joined()).attribute(
        (x["rgb"].requires_grad_(), x["depth"].requires_grad_()), target=[3, 1], additional_forward_args=(x["gain"],),
        **by_position,
    )  # fmt: skip
    assert isinstance(found, Attributions)
    assert list(found) == ["rgb", "depth"]
    assert not found.comparable
    for a, b in zip(found.values(), expected, strict=True):
        assert b.abs().max() > 0
        assert close(a, b)
    assert torch.allclose(found.scores, joined()(**x)[[0, 1], [3, 1]], atol=1e-6)


def masks(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.full((1, *tensor.shape[1:]), i) for i, (name, tensor) in enumerate(x.items())}


def test_shapley_values_of_whole_inputs() -> None:
    x = inputs()
    found = captum_attribution("ShapleyValues", joined(), x, 1, wrt=list(x), feature_mask=masks(x))

    def value(*present: str) -> Tensor:
        return joined()(*(tensor * (name in present) for name, tensor in x.items()))[:, 1].detach()

    rgb = (
        2 * (value("rgb") - value()) + (value("rgb", "depth") - value("depth"))
        + (value("rgb", "gain") - value("gain")) + 2 * (value(*x) - value("depth", "gain"))
    ) / 6  # fmt: skip
    assert torch.allclose(found["rgb"], rgb.view(2, 1, 1, 1).expand(2, 3, 8, 8), atol=1e-6)
    total = sum(tensor.flatten(1)[:, 0] for tensor in found.values())
    assert torch.allclose(total, value(*x) - value(), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options"), [("ShapleyValueSampling", {"n_samples": 3}), ("KernelShap", {"n_samples": 12})]
)
def test_sampled_values(name: str, options: dict[str, int]) -> None:
    x, every = inputs(), masks(inputs())
    found = captum_attribution(name, joined(), x, 1, wrt=list(x), feature_mask=every, **options)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    found = captum_attribution(name, joined(), x, 1, wrt=list(x), feature_mask=every, **options)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(0)
    expected = getattr(ca, name)(joined()).attribute(
        tuple(x.values()), target=1, feature_mask=tuple(every.values()), **options
    )
    for a, b in zip(found.values(), expected, strict=True):
        assert close(a, b, 1e-4)


def test_a_function_from_a_model_to_an_algorithm() -> None:
    x = inputs()
    torch.manual_seed(0)
    found = captum_attribution(
        lambda model: ca.NoiseTunnel(ca.Saliency(model)), joined(), x, 1, nt_samples=4, stdevs={"rgb": 0.1, "depth": 0.2}, abs=False
    )  # fmt: skip
    torch.manual_seed(0)
    expected = ca.NoiseTunnel(ca.Saliency(joined())).attribute(
        (x["rgb"], x["depth"]),
        target=1,
        additional_forward_args=(x["gain"],),
        nt_samples=4,
        stdevs=(0.1, 0.2),
        abs=False,
    )
    assert all(close(a, b) for a, b in zip(found.values(), expected, strict=True))


def test_a_layers_attribution_is_returned_as_it_is() -> None:
    x = inputs()
    model = joined()
    expected = ca.LayerGradCam(model, model.a).attribute(
        (x["rgb"], x["depth"]), target=1, additional_forward_args=(x["gain"],)
    )
    by_function = captum_attribution(lambda m: ca.LayerGradCam(m, model.a), model, x, 1)
    by_path = captum_attribution("LayerGradCam", joined(), x, 1, layer="a")
    by_module = captum_attribution("LayerGradCam", model, x, 1, layer=model.a)
    for found in (by_function, by_path, by_module):
        assert isinstance(found, Tensor)
        assert close(found, expected)
    with pytest.raises(MulticamError, match=r"no layer in Joined 'heed'; did you mean 'head'"):
        captum_attribution("LayerGradCam", joined(), x, 1, layer="heed")


def test_more_than_attributions() -> None:
    x = inputs()
    found, delta = captum_attribution("IntegratedGradients", joined(), x, 1, n_steps=30, return_convergence_delta=True)
    assert isinstance(found, Attributions)
    total = sum(tensor.flatten(1).sum(1) for tensor in found.values())
    change = found.scores - joined()(x["rgb"] * 0, x["depth"] * 0, x["gain"])[:, 1]
    assert torch.allclose(total - change, delta.float(), atol=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
def test_deeplift_of_one_input_among_others_held(frozen: bool) -> None:
    x, model = inputs(), joined().requires_grad_(not frozen)
    found, delta = captum_attribution("DeepLift", model, x, 1, wrt="rgb", return_convergence_delta=True)
    assert list(found) == ["rgb"]
    assert delta.abs().max() < 1e-5
    change = joined()(**x) - joined()(x["rgb"] * 0, x["depth"], x["gain"])
    assert torch.allclose(found["rgb"].sum((1, 2, 3)), change[:, 1].detach(), atol=1e-5)
    assert all(p.requires_grad is not frozen and p.grad is None for p in model.parameters())


CAPTIONED = {"image": torch.rand(3, 3, 8, 8), "ids": torch.tensor([[1, 4], [9, 30], [22, 7]]), "mask": torch.rand(3, 2)}


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("IntegratedGradients", {"n_steps": 7}),  # expands step by step
        ("IntegratedGradients", {"n_steps": 7, "internal_batch_size": 4}),
        (lambda m: ca.NoiseTunnel(ca.Saliency(m)), {"nt_samples": 4, "stdevs": 1e-9}),  # expands sample by sample
        ("GradientShap", {"n_samples": 4, "baselines": torch.zeros(1, 3, 8, 8), "stdevs": 1e-9}),
        ("FeatureAblation", {"feature_mask": torch.arange(4).repeat_interleave(48).view(1, 3, 8, 8), "perturbations_per_eval": 3}),
        ("DeepLift", {}),
        ("Occlusion", {"sliding_window_shapes": (3, 4, 4), "strides": (3, 4, 4), "perturbations_per_eval": 2}),
    ],
    ids=["steps", "parts of steps", "noise", "shap", "ablation", "deeplift", "occlusion"],
)  # fmt: skip
def test_held_text_follows_the_rows_that_captum_makes(algorithm: Any, options: dict[str, Any]) -> None:
    class OneReluEach(Captioned):  # DeepLift's rule
        def __init__(self) -> None:
            super().__init__()
            self.image = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU())

    model = seeded(OneReluEach)
    targets = [1, 0, 2]
    torch.manual_seed(1)
    found = captum_attribution(algorithm, model, CAPTIONED, targets, output="logits", **options)
    alone = []
    for i, k in enumerate(targets):
        torch.manual_seed(1)
        one = {name: x[i : i + 1] for name, x in CAPTIONED.items()}
        alone.append(captum_attribution(algorithm, model, one, k, output="logits", **options)["image"])
    assert list(found) == ["image"]
    if algorithm == "GradientShap":  # whose points on the way are random
        assert found["image"].shape == (3, 3, 8, 8)
        cosine = torch.nn.functional.cosine_similarity(found["image"].flatten(1), torch.cat(alone).flatten(1))
        assert cosine.min() > 0.8
    else:
        assert close(found["image"], torch.cat(alone), 1e-4)


def test_words_can_be_ablated_themselves() -> None:
    found = captum_attribution("FeatureAblation", seeded(Captioned), CAPTIONED, 1, wrt="ids", output="logits")["ids"]
    model = seeded(Captioned)
    for word in range(2):
        hidden = CAPTIONED["ids"].clone()
        hidden[:, word] = 0
        change = model(**CAPTIONED)["logits"] - model(CAPTIONED["image"], hidden, CAPTIONED["mask"])["logits"]
        assert torch.allclose(found[:, word], change[:, 1].detach(), atol=1e-6)


def test_nested_inputs_and_lists() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = joined()

        def forward(self, batch: dict[str, Any]) -> Tensor:
            rgb, depth = batch["images"]
            return self.net(rgb, depth, batch["gain"])

    x = inputs()
    batch = {"images": [x["rgb"], x["depth"]], "gain": x["gain"], "note": None}
    found = captum_attribution("IntegratedGradients", Nested(), Inputs(batch), 1, n_steps=9)
    flat = captum_attribution("IntegratedGradients", joined(), x, 1, n_steps=9)
    assert list(found) == ["batch.images.0", "batch.images.1"]
    assert all(close(a, b) for a, b in zip(found.values(), flat.values(), strict=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("name", ["Saliency", "IntegratedGradients", "FeatureAblation"])
def test_the_callers_grad_mode_does_not_matter(name: str, mode: Any) -> None:
    model = joined()
    options = {"Saliency": {"abs": False}, "FeatureAblation": {"perturbations_per_eval": 64}}.get(name, {})
    outside = captum_attribution(name, model, inputs(), 1, **options)
    with mode():
        inside = captum_attribution(name, model, {k: x * 1 for k, x in inputs().items()}, 1, **options)
    assert all(torch.allclose(inside[key], outside[key], atol=1e-6) for key in outside)


def test_models_that_write_in_place_and_their_targets() -> None:
    found = captum_attribution("Saliency", seeded(Fusion), fusion_inputs(), Probability([1, 2]), abs=False)
    plain = gradient(seeded(Fusion), fusion_inputs(), Probability([1, 2]))
    assert all(close(found[name], plain[name]) for name in plain)
    top = captum_attribution("Saliency", seeded(Fusion), fusion_inputs(), abs=False)
    assert all(close(top[name], x) for name, x in gradient(seeded(Fusion), fusion_inputs()).items())

    class Overwriting(Joined):
        def forward(self, rgb: Tensor, depth: Tensor, gain: Tensor) -> Tensor:
            return super().forward(rgb.mul_(2), depth, gain)

    x = inputs()
    kept = x["rgb"].clone()
    found = captum_attribution("IntegratedGradients", seeded(Overwriting), x, 1, n_steps=5)
    scaled = captum_attribution("IntegratedGradients", joined(), {**x, "rgb": x["rgb"] * 2}, 1, n_steps=5)
    assert all(close(found[name], scaled[name]) for name in found)
    assert torch.equal(x["rgb"], kept)


@pytest.mark.parametrize("name", ["FeatureAblation", "Occlusion"])
def test_integer_images_where_the_algorithm_can(name: str) -> None:
    class Bytes(nn.Module):
        def forward(self, photo: Tensor) -> Tensor:
            assert photo.dtype == torch.uint8
            return (photo / 255).flatten(1)[:, :3]

    photo = (torch.rand(2, 1, 2, 2) * 255).byte()
    options = {"sliding_window_shapes": (1, 1, 1)} if name == "Occlusion" else {}
    found = captum_attribution(name, Bytes(), photo, 1, **options)["photo"]
    assert torch.allclose(found[:, 0, 0, 1], photo[:, 0, 0, 1] / 255)
    assert not found[:, 0, 1].any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"algorithm": "IntegratedGradient"}, "no algorithm in captum.attr 'IntegratedGradient'; did you mean 'IntegratedGradients'"),
        ({"algorithm": "NoSuch"}, "no algorithm in captum.attr 'NoSuch'"),
        ({"wrt": "rbg"}, "no input 'rbg'; did you mean 'rgb'"),
        ({"baselines": {"rgb": 0.0}}, "baselines by name needs one for each explained input: 'depth' has none"),
        ({"baselines": {"rbg": 0.0}}, "no input 'rbg'; did you mean 'rgb'"),
        ({"baselines": {"rgb": 0.0, "depth": 0.0, "gain": 0.0}}, "no explained input 'gain'. There are: 'rgb', 'depth'"),
        ({"n_step": 3}, "no option of IntegratedGradients 'n_step'; did you mean 'n_steps'"),
        ({"additional_forward_args": 3}, "no option of IntegratedGradients 'additional_forward_args'"),
        ({"forward_func": len}, "no option of IntegratedGradients 'forward_func'"),
        ({"target": 9}, "target class 9 does not exist"),
        ({"algorithm": "NoiseTunnel"}, "'NoiseTunnel' is made of another algorithm, not of a model: give a function"),
        ({"algorithm": "LayerGradCam"}, "LayerGradCam takes.*missing a required argument: 'layer'"),
        ({"algorithm": "Occlusion"}, "Occlusion.attribute takes.*missing a required argument: 'sliding_window_shapes'"),
        ({"algorithm": lambda model: 3}, "the function of an algorithm returns one of captum's, not 3"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_what_does_not_fit(call: dict[str, Any], message: str) -> None:
    call = {"algorithm": "IntegratedGradients", "target": 1} | call
    with pytest.raises(MulticamError, match=message):
        captum_attribution(call.pop("algorithm"), joined(), inputs(), call.pop("target"), **call)


@pytest.mark.parametrize("how", ["ignored", "detached"])
@pytest.mark.parametrize("name", ["Saliency", "IntegratedGradients"])
def test_an_input_without_a_gradient(name: str, how: str) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, rgb: Tensor, gate: Tensor) -> Tensor:
            x = self.conv(rgb).mean((2, 3))
            return x if how == "ignored" else x * gate.detach().mean((1, 2, 3))[:, None]

    x = (torch.rand(2, 3, 8, 8), torch.rand(2, 1, 8, 8))
    with pytest.raises(
        MulticamError, match=r"a gradient by every explained input, and one of 'rgb', 'gate' has none: .*wrt="
    ):
        captum_attribution(name, Gated(), x, 1)
    assert captum_attribution(name, Gated(), x, 1, wrt="rgb")["rgb"].any()


def test_without_captum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(MulticamError, match="the algorithms of captum need it: pip install captum"):
        captum_attribution("Saliency", joined(), inputs(), 1)
