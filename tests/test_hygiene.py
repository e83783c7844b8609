"""Nothing of the user's is changed: after success, and after whatever is raised halfway."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Branch, Fusion, fusion_inputs, seeded
from pytorch_grad_cam import GradCAM as PeerGradCAM
from torch import Tensor, nn

from multicam import CAM, HiResCAM, PackedModel, list_layers
from multicam.catalogue import ONE_PASS
from multicam.methods import OriginalCAM, ShapleyCAM

LAYERS = {"rgb": "rgb.net.1", "depth": "depth", "attn": "attn"}


class Stop(Exception):
    pass


def dirty() -> nn.Module:
    """A model in the state of somebody's training run: gradients, mixed modes, frozen parts, hooks."""
    model = seeded(Fusion).train()
    model.depth.eval()
    for parameter in model.texture.parameters():
        parameter.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model(**fusion_inputs()).sum().backward()
    model.rgb.register_forward_hook(lambda m, i, o: None)
    return model


def state(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Any]:
    tensors = {
        **{f"p {n}": p for n, p in model.named_parameters()},
        **{f"g {n}": p.grad for n, p in model.named_parameters() if p.grad is not None},
        **{f"b {n}": b for n, b in model.named_buffers()},
        **{f"x {n}": x for n, x in inputs.items()},
        "rng": torch.get_rng_state(),
    }
    return {
        "values": {name: t.detach().clone() for name, t in tensors.items()},
        "identity": {name: id(t) for name, t in tensors.items() if name != "rng"},
        "requires_grad": {name: t.requires_grad for name, t in tensors.items()},
        "versions": {name: t._version for name, t in tensors.items() if name[0] in "px"},
        "training": [m.training for m in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "attributes": [sorted(vars(m)) for m in model.modules()],
    }


def assert_unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    values, found = before.pop("values"), after.pop("values")
    assert before == after
    assert values.keys() == found.keys()
    assert [name for name in values if not torch.equal(values[name], found[name])] == []


def raising(what: type[BaseException]) -> Callable[..., Any]:
    def stop(*_: Any) -> Any:
        raise what

    return stop


@pytest.mark.parametrize("when", ["normal", "target raises", "model raises", "interrupted"])
@pytest.mark.parametrize("method", [*ONE_PASS, ShapleyCAM, OriginalCAM], ids=lambda m: m.__name__)
@pytest.mark.filterwarnings("ignore:the .* map of layer:UserWarning")
def test_every_method_leaves_everything_as_it_was(method: type[CAM], when: str) -> None:
    model = dirty()
    inputs = {name: x.requires_grad_() for name, x in fusion_inputs().items()}
    stops = {"model raises": Stop, "interrupted": KeyboardInterrupt}
    if when in stops:
        model.head.register_forward_hook(raising(stops[when]))
    target = raising(Stop) if when == "target raises" else 1
    before = state(model, inputs)
    cam = method(model, {"attn": "attn"} if method is OriginalCAM else LAYERS)
    if when == "normal":
        cam(inputs, target)
    else:
        with pytest.raises((Stop, KeyboardInterrupt)):
            cam(inputs, target)
    assert_unchanged(before, state(model, inputs))


def random_model() -> nn.Module:
    class Random(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return (self.conv(x) + torch.randn(1)).mean((2, 3))

    return Random()


def test_a_model_that_draws_random_numbers_does_not_move_the_rng() -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    HiResCAM(random_model_once, "conv")(torch.rand(1, 3, 8, 8, generator=torch.Generator()), 0, signed=True)
    assert torch.equal(torch.rand(3), expected)


with torch.random.fork_rng():
    random_model_once = random_model()


@pytest.mark.parametrize("raises", [False, True])
def test_the_proxy_leaves_everything_as_it_was(raises: bool) -> None:
    model, inputs = dirty(), fusion_inputs()
    if raises:
        model.head.register_forward_hook(raising(Stop))
    before = state(model, inputs)
    packed = PackedModel(model, inputs, list(LAYERS.values()))
    x = packed.pack(inputs)
    if raises:
        with pytest.raises(Stop):
            packed(x)
    else:
        packed.zero_grad()
        packed.train()
        packed.eval()
        PeerGradCAM(packed, packed.target_layers)(x, None)
    assert_unchanged(before, state(model, inputs))


@pytest.mark.parametrize("raises", [False, True])
def test_listing_layers_leaves_everything_as_it_was(raises: bool) -> None:
    model, inputs = dirty(), fusion_inputs()
    if raises:
        model.head.register_forward_hook(raising(Stop))
    before = state(model, inputs)
    if raises:
        with pytest.raises(Stop):
            list_layers(model, inputs)
    else:
        list_layers(model, inputs)
    assert_unchanged(before, state(model, inputs))


def test_a_model_may_write_into_its_inputs_without_reaching_the_users() -> None:
    class Overwriting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = Branch(3)

        def forward(self, views: list[Tensor], mask: Tensor) -> Tensor:
            views[0].mul_(2)
            views[1] = views[0] + 1
            mask[:] = 0
            return self.branch(views[1]).mean((2, 3))

    views, mask = [torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8)], torch.ones(1, 4)
    kept = [v.clone() for v in views]
    first = HiResCAM(seeded(Overwriting), "branch")((views, mask), 1, signed=True)
    assert all(torch.equal(a, b) for a, b in zip(views, kept, strict=True))
    assert mask.all()
    assert torch.equal(first, HiResCAM(seeded(Overwriting), "branch")((views, mask), 1, signed=True))
    packed = PackedModel(seeded(Overwriting), (views, mask))
    packed(packed.pack((views, mask)))
    assert mask.all()
