"""What there is of a model and its inputs before and after something ran, and what stops it halfway."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers.models import Fusion, fusion_inputs, seeded

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
        **{f"d {n}": x.grad for n, x in inputs.items() if x.grad is not None},
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
