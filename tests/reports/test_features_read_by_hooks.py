"""Backbones whose stages are read by hooks, as transformers and timm do: the ways of a stage to the score that such readers open count.

People met maps of nearly nothing, and another map at the second call than at the first (captum #469; hidden states of transformers 5).
"""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import transformers as hf
from torch import Tensor, nn

from multicam import AblationCAM, HiResCAM, Layer, PackedModel, tokens
from tests.helpers.attention_models import enliven


def segformer() -> nn.Module:
    config = hf.SegformerConfig(hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 2],
                                decoder_hidden_size=16, num_labels=4)  # fmt: skip
    return hf.SegformerForSemanticSegmentation(config)


def dpt() -> nn.Module:
    config = hf.DPTConfig(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
                          backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[4, 4, 8, 8], fusion_hidden_size=8, num_labels=4,
                          use_auxiliary_head=False)  # fmt: skip
    return hf.DPTForSemanticSegmentation(config)


def upernet() -> nn.Module:
    stages = [f"stage{i}" for i in range(1, 5)]
    backbone = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, layer_type="basic", out_features=stages
    )
    config = hf.UperNetConfig(backbone_config=backbone, hidden_size=8, pool_scales=[1, 2], num_labels=4,
                              use_auxiliary_head=False)  # fmt: skip
    return hf.UperNetForSemanticSegmentation(config)


class Pyramid(nn.Module):
    """A head on the stages that a timm backbone reads by hooks of its own."""

    def __init__(self) -> None:
        super().__init__()
        options: Any = {"features_only": True, "feature_cls": "hook", "out_indices": (1, 2)}
        self.backbone = timm.create_model("resnet18", **options)
        self.head = nn.Linear(64 + 128, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.cat([stage.tanh().mean((2, 3)) for stage in self.backbone(x)], 1))
        return out


class Probed(nn.Module):
    """A classifier, and a probe on all that hooks on its blocks keep in one list."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = timm.create_model("mobilenetv3_small_050", num_classes=4)
        self.probe = nn.Linear(48, 4)
        self.kept: list[Tensor] = []
        for block in self.trunk.blocks[:3]:
            block.register_forward_hook(lambda module, args, output: self.kept.append(output))

    def forward(self, x: Tensor) -> Tensor:
        self.kept.clear()
        logits: Tensor = self.trunk(x)
        return logits + self.probe(torch.cat([stage.square().mean((2, 3)) for stage in self.kept], 1))


def of_class(output: Any) -> Tensor:
    """The mean of a class over the picture, or its logit."""
    scores: Tensor = getattr(output, "logits", output)[:, 1]
    return scores.flatten(1).mean(1) if scores.ndim > 1 else scores


CASES: dict[str, tuple[Callable[[], nn.Module], str, int | None]] = {
    "segformer": (segformer, "segformer.stages.1", None),
    "dpt": (dpt, "dpt.encoder.layer.1", 4),
    "upernet": (upernet, "backbone.encoder.stages.1", None),
    "timm features": (Pyramid, "backbone.body.layer1", None),
    "probe": (Probed, "trunk.blocks.1", None),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    """A model that was never called, and a photo."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CASES[name][0]().eval()
        enliven(model)
        return model, torch.rand(1, 3, 32, 32)


def by_hand(name: str) -> Tensor:
    """The evidence at the layer, by autograd on what its readers see."""
    model, x = made(name)
    _, layer, side = CASES[name]
    with torch.no_grad():
        model(x)  # readers that come at the first call are there now
    kept: list[Tensor] = []
    model.get_submodule(layer).register_forward_hook(lambda module, args, out: kept.append(out), prepend=True)
    (gradient,) = torch.autograd.grad(of_class(model(x))[0], kept)
    evidence = kept[0].detach() * gradient
    return (evidence if side is None else evidence[:, 1:]).sum()  # without the class token


def explained(name: str) -> Layer:
    _, layer, side = CASES[name]
    return Layer(layer) if side is None else Layer(layer, reshape=tokens(side, side, prefix=1))


@pytest.mark.parametrize("name", CASES)
def test_the_first_map_and_the_second_are_the_evidence_by_hand(name: str) -> None:
    model, x = made(name)
    truth = by_hand(name)
    assert truth.abs() > 1e-4
    first, second = (HiResCAM(model, explained(name))(x, of_class, signed=True) for _ in range(2))
    torch.testing.assert_close(first.mean(), truth, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(second, first)


@pytest.mark.parametrize("name", CASES)
def test_what_tools_change_at_the_layer_reaches_its_readers(name: str) -> None:
    model, x = made(name)
    layer = explained(name)
    packed = PackedModel(model, x, layers=[layer])
    for _ in range(2):
        kept: list[Tensor] = []
        handle = packed.target_layers[0].register_forward_hook(lambda module, args, out, kept=kept: kept.append(out))
        (gradient,) = torch.autograd.grad(of_class(packed(packed.pack(x)))[0], kept)
        handle.remove()
        torch.testing.assert_close((kept[0].detach() * gradient).sum(), by_hand(name), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", ["segformer", "timm features", "probe"])
def test_a_channel_that_is_taken_away_is_taken_away_from_all_readers(name: str) -> None:
    model, x = made(name)
    layer = CASES[name][1]
    trace = HiResCAM(model, explained(name)).trace(x, of_class)
    (site,) = trace.sites.values()
    changed = site.acts.clone()
    changed[:, ::2] = 0
    handle = model.get_submodule(layer).register_forward_hook(lambda *_: changed.clone(), prepend=True)
    with torch.no_grad():
        expected = of_class(model(x))
    handle.remove()
    torch.testing.assert_close(site.rescore(changed), expected)
    assert AblationCAM(model, explained(name))(x, of_class, signed=True).abs().max() > 1e-6
