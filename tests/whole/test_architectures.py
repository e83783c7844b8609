"""Real architectures with several inputs, unedited: the same bits through the proxy, and a map for every image."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from multicam import HiResCAM, Inputs, Layer, MulticamError, PackedModel, Trace, tokens
from multicam.call.scorer import as_target
from multicam.call.tree import leaves
from multicam.watch.layers import LayerLike
from tests.helpers.architectures import ARCHITECTURES, faster_rcnn, lxmert, naflex, videomae_hidden

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def run(call: Callable[[], Any]) -> Any:
    """What a call returns from a fixed state of the random numbers, which some of these models draw."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return call()


def bits(output: Any) -> dict[str, Tensor]:
    return {path: leaf.detach() for path, leaf in leaves(output).items() if isinstance(leaf, Tensor)}


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for path, tensor in expected.items():
        torch.testing.assert_close(found[path], tensor, rtol=0, atol=0, equal_nan=True, msg=path)


@every_architecture
@pytest.mark.parametrize("tapped", [False, True], ids=["plain", "tapped"])
def test_the_proxy_returns_the_models_own_bits(name: str, tapped: bool) -> None:
    case = ARCHITECTURES[name]()
    packed = PackedModel(case.model, case.inputs, list(case.layers.values()) if tapped else None)
    own = run(lambda: case.inputs.run(case.model))
    through = run(lambda: packed(packed.pack(case.inputs)))
    assert type(through) is type(own)
    assert_same_bits(bits(through), bits(own))


@contextmanager
def trainable(model: nn.Module) -> Iterator[None]:
    model.requires_grad_(True)
    try:
        yield
    finally:
        model.requires_grad_(False)


@every_architecture
def test_the_bits_of_a_trainable_model_are_its_own_without_a_graph_and_those_of_a_frozen_one_with(name: str) -> None:
    """PyTorch multiplies by other kernels where a weight requires a gradient, whether a graph is made or not."""
    case = ARCHITECTURES[name]()
    packed = PackedModel(case.model, case.inputs, list(case.layers.values()))
    frozen = bits(run(lambda: case.inputs.run(case.model)))
    with trainable(case.model):
        assert_same_bits(bits(run(lambda: packed(packed.pack(case.inputs)))), frozen)
        with torch.no_grad():
            own = bits(run(lambda: case.inputs.run(case.model)))
            assert_same_bits(bits(run(lambda: packed(packed.pack(case.inputs)))), own)


@every_architecture
def test_every_layer_gives_a_map_on_its_input(name: str) -> None:
    case = ARCHITECTURES[name]()
    cam = HiResCAM(case.model, case.layers, output=case.output)
    for key, found in run(lambda: cam(case.inputs, case.target, signed=True)).items():
        assert found.shape == (2, *case.size(key)), key
        assert found.isfinite().all(), key
        assert (found.flatten(1).abs().amax(1) > 0).all(), key


@every_architecture
def test_an_engine_sees_at_a_tap_what_the_trace_sees(name: str) -> None:
    case = ARCHITECTURES[name]()
    packed = PackedModel(case.model, case.inputs, list(case.layers.values()), case.output)
    seen: dict[str, Tensor] = {}
    for key, tap in zip(case.layers, packed.target_layers, strict=True):
        tap.register_forward_hook(lambda _, inputs, output, key=key: seen.update({key: output}))
    scores = as_target(case.target)(run(lambda: packed(packed.pack(case.inputs))))
    grads = dict(zip(seen, torch.autograd.grad(scores.sum(), list(seen.values())), strict=True))
    trace = run(lambda: Trace(case.model, case.inputs, case.layers, case.target, case.output))
    torch.testing.assert_close(scores, trace.scores, rtol=0, atol=0)
    for key, site in trace.sites.items():
        torch.testing.assert_close(seen[key], site.acts, rtol=0, atol=0)
        torch.testing.assert_close(grads[key], site.grads, rtol=1e-5, atol=1e-8)


# What cannot be explained says so instead of showing something.


def map_of(name: str, layer: LayerLike) -> Any:
    case = ARCHITECTURES[name]()
    return run(lambda: HiResCAM(case.model, layer, output=case.output)(case.inputs, case.target))


@pytest.mark.parametrize(
    ("name", "layer", "message"),
    [
        pytest.param(
            "clipseg_by_image", "clip.vision_model.encoder.layers.1#0", r"own torch\.no_grad\(\)", id="no_grad"
        ),
        pytest.param("clipseg_by_image", "clip.vision_model.encoder.layers.1", "called 2 times", id="shared tower"),
        pytest.param("raft", "update_block.flow_head#0", "not by a gradient", id="detached between iterations"),
        pytest.param(
            "raft",
            "feature_encoder",
            "places of several inputs: say which with.*onto='image1'",
            id="images on the batch",
        ),
        pytest.param("crossvit", "blocks.0.fusion.1.attn", "stand for 2 own, and none for 'x'", id="class token only"),
        pytest.param("crossvit", "blocks.0", r"pick='0' \(2, 37, 16\), pick='1' \(2, 5, 32\)", id="two grids"),
        pytest.param("blip2", "qformer.encoder.layer.0.crossattention", "stand for 6 own, and none", id="queries"),
        pytest.param("clip", "vision_model.pre_layrnorm.0", "did you mean 'vision_model.pre_layrnorm'", id="typo"),
        pytest.param("detr", "class_labels_classifier", "no grid of places in it", id="boxes"),
    ],
)
def test_a_layer_that_has_no_map_says_why(name: str, layer: LayerLike, message: str) -> None:
    with pytest.raises(MulticamError, match=message):
        map_of(name, layer)


@pytest.mark.parametrize("factory", [lxmert, naflex])
def test_features_are_no_image(factory: Any) -> None:
    with pytest.raises(MulticamError, match=r"nothing to pack in Inputs\("):
        PackedModel(*factory())


def test_features_have_a_map_along_their_own_axis() -> None:
    model, inputs = lxmert()
    layer = Layer("encoder.r_layers.0", reshape=tokens(5), onto="visual_feats")
    regions = HiResCAM(model, layer, output="pooled_output")(inputs, 0, signed=True)
    assert regions.shape == (2, 5)
    assert regions.abs().max() > 0
    followed = HiResCAM(model, "encoder.r_layers.0", output="pooled_output")(inputs, 0, signed=True)
    torch.testing.assert_close(followed, regions)


def test_patches_of_sizes_of_their_own_are_refused() -> None:
    model, inputs = naflex()
    with pytest.raises(MulticamError, match=r"no grid of places in it \(cat in 'embeds'\)"):
        HiResCAM(model, "blocks.0")(inputs, 0)


def test_a_list_of_unbatched_images_is_refused() -> None:
    model, inputs = faster_rcnn()
    with pytest.raises(MulticamError, match=r"nothing to pack.*a list of \(c h w\) images torch\.stack"):
        PackedModel(model, inputs)
    with pytest.raises(MulticamError, match=r"batch"):
        HiResCAM(model, "backbone.body.4", output="0.scores")(inputs, 0)


# A grid is claimed only where it is one.


def grid_of(model: nn.Module, inputs: Inputs, layer: str) -> tuple[int, ...] | None:
    try:
        trace = Trace(model, inputs, {"": layer}, lambda output: torch.zeros(2), output=lambda output: output)
    except MulticamError:
        return None
    return tuple(trace.sites[""].acts.shape[2:])


@pytest.mark.parametrize(
    ("name", "layer", "grid"),
    [
        ("swin_channels_last", "permute", (4, 4)),
        ("swin_channels_last", "features.3.0.norm1", (4, 4)),
        ("swin_channels_last", "features.3.0.stochastic_depth#0", (4, 4)),
        ("seggpt", "model.encoder.layers.1.attention", None),  # of two pictures, one above the other
        ("sam", "vision_encoder.layers.0.attn", (4, 4)),
        ("vilt", "vilt.encoder.layer.1", (4, 4)),
        ("trocr", "decoder.model.decoder.layers.1.encoder_attn", (6,)),
        ("sam", "vision_encoder.layers.1.mlp.act", (4, 4)),
        ("sam", "mask_decoder.transformer.layers.0.cross_attn_image_to_token", (4, 4)),
        ("mask2former", "model.transformer_module.decoder.layers.0.cross_attn", None),
        ("bridgetower", "bridgetower.vision_model.visual.transformer.resblocks.1", (4, 4)),
        ("vjepa2", "vjepa2.encoder.layer.1", (2, 2, 2)),
        ("perceiver_two_frames", "perceiver.encoder.cross_attention", None),
    ],
)
def test_the_grid_found_without_help(name: str, layer: str, grid: tuple[int, ...] | None) -> None:
    case = ARCHITECTURES[name]()
    assert grid_of(case.model, case.inputs, layer) == grid


def test_tokens_out_of_their_order_with_some_left_out_are_where_they_were() -> None:
    model, inputs = videomae_hidden()
    assert grid_of(model, inputs, "videomae.embeddings.patch_embeddings") == (2, 2, 2)
    assert grid_of(model, inputs, "videomae.encoder.layer.0") == (2, 2, 2)
