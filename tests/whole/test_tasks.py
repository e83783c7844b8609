"""Tasks beyond the classification of one image, on real architectures with small random weights.

Segmentation, detection, embeddings, several outputs, vision transformers and video: the values of maps against autograd by
hand on what the layer returned, against evidence planted at a known place, and against pytorch-grad-cam.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
import transformers as hf
from einops import rearrange
from pytorch_grad_cam.utils.model_targets import FasterRCNNBoxScoreTarget, SemanticSegmentationTarget
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.video.mvit import MSBlockConfig, MViT

from multicam import CAM, GradCAM, HiResCAM, Inputs, Layer, MulticamError, Trace, channels_last
from multicam.call.targets import Similarity
from multicam.call.targets.detections import BoxScore, TopBox
from multicam.call.targets.scores import QueryScore, SegmentationScore
from multicam.cam.masking import AblationCAM, ScoreCAM
from multicam.watch.layers import LayerLike

VIT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
       "patch_size": 8}  # fmt: skip
TIMM = {"embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 4}


def made(factory: Callable[[], nn.Module]) -> nn.Module:
    """A model with random weights in evaluation mode; the global RNG stays as it is."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return factory().eval()


def random(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)))


def by_hand(
    model: nn.Module, layer: str, x: Tensor, score: Callable[[Any], Tensor], grid: Callable[[Tensor], Tensor]
) -> Tensor:
    """Gradient times activation, summed over channels, with autograd on what the layer itself returned."""
    kept: list[Tensor] = []
    hook = model.get_submodule(layer).register_forward_hook(lambda _, inputs, output: kept.append(output))
    output = model(x.clone().requires_grad_())
    hook.remove()
    (gradient,) = torch.autograd.grad(score(output).sum(), kept)
    return grid(gradient * kept[0]).sum(1).detach()


def laid(grid_map: Tensor, *size: int) -> Tensor:
    """The density of a grid on an input of this size."""
    mode = "trilinear" if len(size) == 3 else "bilinear"
    return F.interpolate(grid_map[:, None] * grid_map[0].numel(), size, mode=mode)[:, 0]


# Transformers for images and clips.


def cut(prefix: int, *grid: int) -> Callable[[Tensor], Tensor]:
    def tokens_as_grid(x: Tensor) -> Tensor:
        return x[:, prefix:].transpose(1, 2).unflatten(2, grid)

    return tokens_as_grid


def last(x: Tensor) -> Tensor:
    return x.permute(0, -1, *range(1, x.ndim - 1))


def torchvision_vit() -> nn.Module:
    model = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=4)
    nn.init.normal_(model.heads.head.weight)  # it starts at zero
    return model


def video_swin() -> nn.Module:
    return torchvision.models.video.SwinTransformer3d([2, 4, 4], 8, [1, 1], [1, 2], [2, 4, 4], num_classes=4)


def mvit() -> nn.Module:
    def block(wide: int, out: int, q: int, kv: int) -> MSBlockConfig:
        return MSBlockConfig(1, wide, out, kernel_q=[3, 3, 3], kernel_kv=[3, 3, 3], stride_q=[1, q, q],
                             stride_kv=[1, kv, kv])  # fmt: skip

    return MViT(spatial_size=(32, 48), temporal_size=8, block_setting=[block(8, 16, 1, 2), block(16, 16, 2, 1)],
                residual_pool=True, residual_with_cls_embed=False, rel_pos_embed=True, proj_after_attn=True,
                num_classes=4)  # fmt: skip


TRANSFORMERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str, Callable[[Tensor], Tensor]]] = {
    "torchvision ViT": (
        torchvision_vit,
        (3, 32, 32), "encoder.layers.encoder_layer_1.ln_1", cut(1, 4, 4),
    ),
    "timm ViT, not square": (
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=(32, 48), patch_size=8, **TIMM),
        (3, 32, 48), "blocks.1.norm1", cut(1, 4, 6),
    ),
    "timm ViT with registers only": (
        lambda: timm.create_model("vit_medium_patch16_reg4_gap_256", img_size=(64, 96), **TIMM),
        (3, 64, 96), "blocks.1", cut(4, 4, 6),
    ),
    "timm DINOv2 with registers": (
        lambda: timm.create_model("vit_small_patch14_reg4_dinov2", img_size=(56, 84), **TIMM),
        (3, 56, 84), "blocks.1.norm1", cut(5, 4, 6),
    ),
    "timm distilled DeiT": (
        lambda: timm.create_model("deit_tiny_distilled_patch16_224", img_size=(64, 96), **TIMM),
        (3, 64, 96), "blocks.1.norm1", cut(2, 4, 6),
    ),
    "transformers DINOv2 with registers": (
        lambda: hf.Dinov2WithRegistersForImageClassification(
            hf.Dinov2WithRegistersConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2,
                                         image_size=56, patch_size=14, num_register_tokens=4, num_labels=4)
        ),
        (3, 56, 84), "dinov2_with_registers.encoder.layer.1.norm1", cut(5, 4, 6),
    ),
    "transformers distilled DeiT": (
        lambda: hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**VIT, num_labels=4)),
        (3, 32, 32), "deit.layers.1.layernorm_before", cut(2, 4, 4),
    ),
    "torchvision Swin": (
        lambda: torchvision.models.SwinTransformer([4, 4], 8, [1, 1], [1, 2], [4, 4], num_classes=4),
        (3, 32, 48), "norm", last,
    ),
    "timm Swin": (
        lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=(32, 48), embed_dim=8, depths=(1, 1),
                                  num_heads=(1, 2), window_size=4, num_classes=4),
        (3, 32, 48), "norm", last,
    ),
    "torchvision R3D": (
        lambda: torchvision.models.video.VideoResNet(
            torchvision.models.video.resnet.BasicBlock, [torchvision.models.video.resnet.Conv3DSimple] * 4, [1] * 4,
            torchvision.models.video.resnet.BasicStem, num_classes=4,
        ),
        (3, 8, 32, 48), "layer2", lambda x: x,
    ),
    "torchvision MViT": (mvit, (3, 8, 32, 48), "blocks.1.norm1", cut(1, 4, 8, 12)),
    "transformers VideoMAE": (
        lambda: hf.VideoMAEForVideoClassification(
            hf.VideoMAEConfig(**VIT, num_frames=4, tubelet_size=2, num_labels=4)
        ),
        (4, 3, 32, 32), "videomae.encoder.layer.0", cut(0, 2, 4, 4),
    ),
}  # fmt: skip


def logits_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_grid_that_the_model_proves_is_the_grid_of_its_tokens(name: str) -> None:
    factory, shape, layer, grid = TRANSFORMERS[name]
    model, x = made(factory), random(2, *shape)
    hand = by_hand(model, layer, x, lambda output: logits_of(output)[:, 2], grid)
    assert hand.abs().amax() > 0
    size = [side for side in shape if side != 3]
    found = HiResCAM(model, layer, output=logits_of)(x, 2, signed=True)
    torch.testing.assert_close(found, laid(hand, *size), rtol=1e-3, atol=1e-4 * float(found.abs().amax()))


@pytest.mark.parametrize("name", ["torchvision Swin", "timm Swin"])
def test_the_evidence_of_a_pooled_swin_is_its_logit_without_the_bias(name: str) -> None:
    factory, shape, layer, _ = TRANSFORMERS[name]
    model, x = made(factory), random(2, *shape)
    trace = Trace(model, x, {"it": layer}, 2)
    bias = next(p for path, p in model.named_parameters() if path.startswith("head") and p.ndim == 1)[2].detach()
    cam = HiResCAM(model, layer)
    torch.testing.assert_close(cam.saliency(trace.sites["it"]).sum((1, 2)), trace.scores - bias)


@pytest.mark.parametrize(
    ("name", "layer", "message"),
    [
        ("torchvision ViT", "encoder.layers.encoder_layer_1", "reads none of its cells"),
        ("timm DINOv2 with registers", "norm", "reads none of its cells"),
        ("timm Swin", "layers.1", "normalisation follows the layer"),
        ("torchvision MViT", "blocks.1", "reads none of its cells"),
    ],
)
def test_a_layer_behind_which_only_the_class_token_or_a_norm_is_read_warns(name: str, layer: str, message: str) -> None:
    factory, shape, _, _ = TRANSFORMERS[name]
    model = made(factory)
    with pytest.warns(UserWarning, match=message):
        found = HiResCAM(model, layer)(random(1, *shape), 2, signed=True)
    # What the warning says of the first kind is exact, of the second it is rounding.
    size = HiResCAM(model, TRANSFORMERS[name][2])(random(1, *shape), 2, signed=True).abs().amax()
    assert found.abs().amax() <= (0 if "none" in message else 1e-3 * size)


def test_merged_patches_of_a_clip_are_followed() -> None:
    model, x = made(video_swin), random(2, 3, 8, 32, 48)
    followed = HiResCAM(model, "norm")(x, 1, signed=True)
    found = HiResCAM(model, Layer("norm", reshape=channels_last))(x, 1, signed=True)
    torch.testing.assert_close(followed, found)
    hand = by_hand(model, "norm", x, lambda output: output[:, 1], last)
    torch.testing.assert_close(found, laid(hand, 8, 32, 48), rtol=1e-3, atol=1e-4)


def test_the_tokens_of_timesformer_are_frames_last() -> None:
    config = hf.TimesformerConfig(**VIT, num_frames=4, num_labels=3)
    model, x = made(lambda: hf.TimesformerForVideoClassification(config)), random(1, 4, 3, 32, 32)
    layer = "timesformer.embeddings"

    def frames(tokens: Tensor) -> Tensor:
        return rearrange(tokens[:, 1:], "b (h w t) c -> b c t h w", h=4, w=4)

    def acts(clip: Tensor) -> Tensor:
        said = Trace(model, clip, {"it": Layer(layer, reshape=frames)}, 0, "logits").sites["it"].acts
        assert torch.equal(Trace(model, clip, {"it": layer}, 0, "logits").sites["it"].acts, said)
        return said

    changed = x.clone()
    changed[:, 2, :, 8:16, 24:] += 1  # frame 2, row 1, column 3 of the patches
    where = (acts(changed) - acts(x)).abs().sum(1).nonzero().tolist()
    assert where == [[0, 2, 1, 3]]


# Segmentation.


@pytest.fixture(scope="module")
def segmenters() -> dict[str, tuple[nn.Module, Layer, str]]:
    networks, weightless = torchvision.models.segmentation, {"weights": None, "weights_backbone": None}
    config = hf.SegformerConfig(hidden_sizes=[8, 16, 16, 16], depths=[1] * 4, num_attention_heads=[1, 2, 2, 2],
                                decoder_hidden_size=16, num_labels=4)  # fmt: skip
    mobile = networks.deeplabv3_mobilenet_v3_large
    fcn = networks.fcn.FCN
    backbone = nn.ModuleDict({"out": nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU())})
    return {
        "DeepLabV3": (made(lambda: mobile(num_classes=4, **weightless)), Layer("backbone"), "out"),
        "LRASPP": (
            made(lambda: networks.lraspp_mobilenet_v3_large(num_classes=4, **weightless)),
            Layer("backbone", pick="high"),
            "out",
        ),
        "FCN": (
            made(lambda: fcn(_Named(backbone), networks.fcn.FCNHead(16, 4))),
            Layer("backbone", pick="out"),
            "out",
        ),
        "SegFormer": (
            made(lambda: hf.SegformerForSemanticSegmentation(config)),
            Layer("decode_head.linear_fuse"),
            "logits",
        ),
    }


class _Named(nn.Module):
    """A backbone that returns its features by name, as torchvision's IntermediateLayerGetter does."""

    def __init__(self, parts: nn.ModuleDict) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: part(x) for name, part in self.parts.items()}


NETWORKS = ["DeepLabV3", "LRASPP", "FCN", "SegFormer"]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_segmentation_score_is_that_of_pytorch_grad_cam_divided_by_the_region(name: str, segmenters: Any) -> None:
    model, layer, output = segmenters[name]
    x = random(2, 3, 64, 64)
    with torch.no_grad():
        logits = model(x)[output]
    region = torch.zeros(logits.shape[2:])
    region[2:9, 4:12] = 1
    trace = Trace(model, x, {"it": layer}, SegmentationScore(2, region), output)
    theirs = SemanticSegmentationTarget(2, region.numpy())
    expected = torch.stack([theirs(sample) for sample in logits]) / region.sum()
    torch.testing.assert_close(trace.scores, expected, rtol=1e-4, atol=1e-6)
    found = HiResCAM(model, layer, output=output)(x, SegmentationScore(2, region), signed=True)
    summed = HiResCAM(model, layer, output=output)(x, lambda out: (out[:, 2] * region).sum((1, 2)), signed=True)
    torch.testing.assert_close(found * region.sum(), summed, rtol=1e-3, atol=1e-3 * float(summed.abs().amax()))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_region_is_what_the_model_calls_the_class_and_stays_it(name: str, segmenters: Any) -> None:
    model, layer, output = segmenters[name]
    x = random(2, 3, 64, 64)
    with torch.no_grad():
        logits = model(x)[output]
    called = int(logits.argmax(1).flatten().mode().values)
    assert all((sample == called).any() for sample in logits.argmax(1))
    trace = Trace(model, x, {"it": layer}, SegmentationScore(called), output)
    torch.testing.assert_close(trace.target.mask, logits.argmax(1) == called)
    again = trace.again(1 - x[[1, 0, 1]], samples=[1, 0, 1])
    with torch.no_grad():
        other = model(1 - x[[1, 0, 1]])[output][:, called]
    region = (logits.argmax(1) == called)[[1, 0, 1]]
    expected = torch.stack([scores[mask].mean() for scores, mask in zip(other, region, strict=True)])
    torch.testing.assert_close(again.scores, expected, rtol=1e-4, atol=1e-6)


def test_the_map_of_a_region_lies_where_the_network_looks_for_it(segmenters: Any) -> None:
    model, layer, output = segmenters["FCN"]
    region = torch.zeros(64, 64, dtype=torch.bool)
    region[40:56, 8:24] = True
    found = HiResCAM(model, layer, output=output)(random(1, 3, 64, 64), SegmentationScore(1, region), signed=True)[0]
    # The head sees one cell of two pixels around each: nothing further from the region than a few pixels counts.
    near = F.max_pool2d(region[None, None].float(), 13, 1, 6)[0, 0] > 0
    assert found[region].abs().amax() > 0
    assert found[~near].abs().amax() == 0


# Detection.


class Brightness(nn.Module):
    """A head whose only class is the mean of the features inside the box, and which leaves boxes as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(4.0))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        score = self.scale * features.mean(1)
        return torch.stack([torch.zeros_like(score), score], 1), torch.zeros(len(score), 8)


@pytest.fixture(scope="module")
def bright() -> nn.Module:
    """Torchvision's Faster R-CNN, whose backbone and head are made by hand to find what is bright."""

    def build() -> nn.Module:
        backbone = nn.Sequential(nn.AvgPool2d(8), nn.Conv2d(3, 4, 1, bias=False))
        nn.init.constant_(backbone[1].weight, 1 / 3)
        backbone.out_channels = 4
        return torchvision.models.detection.FasterRCNN(
            backbone, rpn_anchor_generator=AnchorGenerator(((16,),), ((1.0,),)), box_head=nn.Flatten(),
            box_roi_pool=torchvision.ops.MultiScaleRoIAlign(["0"], 4, 0), box_predictor=Brightness(), min_size=96,
            max_size=128, rpn_nms_thresh=1.0, rpn_post_nms_top_n_test=500, image_mean=[0.0] * 3, image_std=[1.0] * 3,
        )  # fmt: skip

    return made(build)


def with_square(height: int, width: int, top: int, left: int, side: int) -> tuple[Tensor, Tensor]:
    """A dark image with a bright square, and the square's box."""
    image = torch.zeros(1, 3, height, width)
    image[..., top : top + side, left : left + side] = 1
    return image, torch.tensor([[left, top, left + side, top + side]], dtype=torch.float)


def centre(found: Tensor) -> tuple[float, float]:
    """Row and column of the centroid of a map `(h w)`."""
    rows, columns = (torch.arange(side) + 0.5 for side in found.shape)
    total = found.sum()
    return float((found.sum(1) * rows).sum() / total), float((found.sum(0) * columns).sum() / total)


@pytest.mark.parametrize("scale", [1, 2], ids=["own size", "resized"])
def test_the_map_of_a_box_lies_on_the_planted_object(scale: int, bright: nn.Module) -> None:
    image, box = with_square(96 * scale, 128 * scale, 64 * scale, 96 * scale, 16 * scale)
    found = HiResCAM(bright, "backbone")(image, BoxScore(box, [1]))[0]
    assert centre(found) == pytest.approx((72 * scale, 104 * scale), abs=2 * scale)
    assert 64 * scale <= found.amax(1).argmax() < 80 * scale
    assert 96 * scale <= found.amax(0).argmax() < 112 * scale


@pytest.mark.parametrize("method", [ScoreCAM, AblationCAM])
def test_methods_that_change_activations_keep_to_the_chosen_box(method: type[CAM], bright: nn.Module) -> None:
    images = torch.cat([with_square(96, 128, 64, 96, 16)[0], with_square(96, 128, 16, 32, 16)[0]])
    found = method(bright, "backbone")(images, TopBox())
    assert centre(found[0]) == pytest.approx((72, 104), abs=2)
    assert centre(found[1]) == pytest.approx((24, 40), abs=2)


def test_padding_to_a_multiple_of_32_does_not_squeeze_the_map(bright: nn.Module) -> None:
    image, box = with_square(96, 104, 64, 80, 16)  # padded to 96 x 128: 16 columns of 8 pixels, 13 of them on the image
    followed = HiResCAM(bright, "backbone")(image, BoxScore(box, [1]))[0]
    assert centre(followed) == pytest.approx((72, 88), abs=2)
    onto_image = Layer("backbone", reshape=lambda features: features[..., :13])
    cut_grid = HiResCAM(bright, onto_image)(image, BoxScore(box, [1]))[0]
    assert centre(cut_grid) == pytest.approx((72, 88), abs=2)
    cut_map = HiResCAM(bright, "backbone")(F.pad(image, (0, 24)), BoxScore(box, [1]))[0, :, :104]
    assert centre(cut_map) == pytest.approx((72, 88), abs=2)


def test_the_top_box_is_chosen_once(bright: nn.Module) -> None:
    image, _ = with_square(96, 128, 64, 96, 16)
    trace = Trace(bright, image, {"it": "backbone"}, TopBox())
    with torch.no_grad():
        (found,) = bright(image)
    assert found["scores"][0] > 0.9
    torch.testing.assert_close(trace.target.boxes[0], found["boxes"][:1])
    torch.testing.assert_close(trace.scores, found["scores"][:1])
    elsewhere, _ = with_square(96, 128, 16, 16, 16)
    assert trace.again(elsewhere).scores.item() <= 0.5  # what a dark box gets, or nothing
    both = trace.again(torch.cat([elsewhere, image]), samples=[0, 0])
    assert both.scores.tolist() == pytest.approx([trace.again(elsewhere).scores.item(), trace.scores.item()])


@pytest.fixture(scope="module")
def detectors() -> dict[str, nn.Module]:
    networks = torchvision.models.detection
    options = {"weights": None, "weights_backbone": None, "num_classes": 3}
    return {
        "Faster R-CNN": made(
            lambda: networks.fasterrcnn_mobilenet_v3_large_320_fpn(
                **options, min_size=64, max_size=128, box_score_thresh=0.0, box_detections_per_img=6,
                rpn_pre_nms_top_n_test=40, rpn_post_nms_top_n_test=12,
            )
        ),
        "RetinaNet": made(
            lambda: networks.retinanet_resnet50_fpn(
                **options, min_size=64, max_size=128, score_thresh=0.0, detections_per_img=6, topk_candidates=20
            )
        ),
    }  # fmt: skip


LEVELS: dict[str, dict[str, LayerLike]] = {
    "Faster R-CNN": {
        "p0": Layer("backbone", pick="0", onto="images"),
        "body": Layer("backbone.body", pick="0", onto="images"),
    },
    "RetinaNet": {name: Layer("backbone", pick=i, onto="images") for i, name in enumerate(("p3", "p4", "p5"))},
}


@pytest.mark.filterwarnings("ignore:the HiResCAM map")  # of a level that no box is read from
@pytest.mark.parametrize("name", LEVELS)
def test_every_level_of_a_detector_is_the_gradient_of_the_boxes_scores(name: str, detectors: Any) -> None:
    model, x = detectors[name], random(2, 3, 64, 96)
    with torch.no_grad():
        found = model(x)
    target = BoxScore([each["boxes"][:2] for each in found], [each["labels"][:2] for each in found])
    trace = Trace(model, x, LEVELS[name], target)
    ours = trace.scores
    theirs = [FasterRCNNBoxScoreTarget(each["labels"][:2], each["boxes"][:2])(each).item() for each in found]
    # Theirs adds the overlap of each box with itself, which is 1 and has no gradient.
    assert ours.tolist() == pytest.approx([score - 2 for score in theirs], rel=1e-4)

    def first_two(output: Any) -> Tensor:
        return torch.stack([each["scores"][:2].sum() for each in output])

    maps = HiResCAM(model, LEVELS[name])(x, target, signed=True)
    expected = HiResCAM(model, LEVELS[name])(x, first_two, signed=True)
    size = max(float(level.abs().amax()) for level in expected.values())
    assert size > 0
    for level, values in maps.items():
        assert values.shape == (2, 64, 96)
        torch.testing.assert_close(values, expected[level], rtol=1e-3, atol=1e-4 * size)


def test_a_box_that_the_model_does_not_find_says_what_it_finds(bright: nn.Module) -> None:
    image, box = with_square(96, 128, 64, 96, 16)
    cam = HiResCAM(bright, "backbone")
    with pytest.raises(
        MulticamError, match=r"in sample 0 the model finds none.*labels found: \[1\]\); boxes are x1, y1"
    ):
        cam(image, BoxScore(box, [2]))
    as_width_and_height = torch.tensor([[96.0, 64.0, 16.0, 16.0]])
    with pytest.raises(MulticamError, match="boxes are x1, y1, x2, y2"):
        cam(image, BoxScore(as_width_and_height, [1]))
    with pytest.raises(MulticamError, match=r"does not find a box of label 7 \(labels found: \[1\]\)"):
        cam(image, TopBox(label=7))
    with pytest.raises(MulticamError, match=r"need the whole output of a detector.*a tensor"):
        HiResCAM(bright, "backbone", output="0.scores")(image, TopBox())


def test_a_list_of_images_is_to_be_stacked(bright: nn.Module) -> None:
    image, _ = with_square(96, 128, 64, 96, 16)
    with pytest.raises(MulticamError, match=r"have no batch axis.*torch\.stack\(images\)"):
        HiResCAM(bright, "backbone")([image[0], image[0]], TopBox())


@pytest.fixture(scope="module")
def detr() -> nn.Module:
    backbone = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic",
                               out_features=["stage2"])  # fmt: skip
    config = hf.DetrConfig(backbone_config=backbone, d_model=16, encoder_layers=1, decoder_layers=1, num_queries=5,
                           encoder_ffn_dim=32, decoder_ffn_dim=32, encoder_attention_heads=2, decoder_attention_heads=2,
                           num_labels=3)  # fmt: skip
    return made(lambda: hf.DetrForObjectDetection(config))


@pytest.mark.parametrize("query", [3, None], ids=["said", "highest"])
def test_the_query_of_a_detr_on_the_tokens_of_its_encoder(query: int | None, detr: nn.Module) -> None:
    x = random(2, 3, 64, 96)
    inputs = Inputs(pixel_values=x, pixel_mask=torch.ones(2, 64, 96, dtype=torch.long))
    with torch.no_grad():
        logits = detr(x).logits
    chosen = [3, 3] if query == 3 else logits[:, :, 1].argmax(1).tolist()
    layers = {
        "tokens": Layer("model.encoder", onto="pixel_values"),
        "image": Layer("model.backbone", onto="pixel_values"),
    }
    trace = HiResCAM(detr, layers, output="logits").trace(inputs, QueryScore(1, query))
    assert trace.sites["tokens"].acts.shape == (2, 16, 8, 12)
    torch.testing.assert_close(trace.scores, logits[[0, 1], chosen, 1])
    kept: list[Tensor] = []
    hook = detr.model.encoder.register_forward_hook(lambda _, given, output: kept.append(output[0]))
    scores = detr(x.clone().requires_grad_()).logits[[0, 1], chosen, 1]
    hook.remove()
    (gradient,) = torch.autograd.grad(scores.sum(), kept)
    expected = (gradient * kept[0]).sum(2).unflatten(1, (8, 12)).detach()
    found = HiResCAM(detr, layers, output="logits").maps(trace, signed=True)["tokens"]
    torch.testing.assert_close(found, laid(expected, 64, 96), rtol=1e-3, atol=1e-4 * float(found.abs().amax()))


# Embeddings and several outputs.


@pytest.fixture(scope="module")
def tower() -> nn.Module:
    return made(lambda: hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**VIT, projection_dim=8)))


def test_similarity_of_images_by_a_clip_tower(tower: nn.Module) -> None:
    x, reference = random(2, 3, 32, 32), 1 - random(1, 3, 32, 32)
    with torch.no_grad():
        wanted, own = tower(reference).image_embeds[0], tower(x).image_embeds
    layer = "vision_model.encoder.layers.1.layer_norm1"
    found = HiResCAM(tower, layer, output="image_embeds")(x, Similarity(wanted), signed=True)

    def cosine(output: Any) -> Tensor:
        return F.cosine_similarity(output.image_embeds, wanted[None])

    hand = by_hand(tower, layer, x, cosine, cut(1, 4, 4))
    torch.testing.assert_close(found, laid(hand, 32, 32), rtol=1e-3, atol=1e-4 * float(found.abs().amax()))
    # The similarity to itself is at its maximum 1, where no direction changes it.
    itself = Trace(tower, x, {"it": layer}, Similarity(own), "image_embeds")
    torch.testing.assert_close(itself.scores, torch.ones(2))
    assert itself.sites["it"].grads.abs().amax() < 1e-4
    assert itself.again(x.flip(0), samples=[1, 0]).scores.tolist() == pytest.approx([1, 1])


class TwoByTwo(nn.Module):
    """Two images, a shared ResNet, what they share and a segmentation of each: output 0 does not look at image 1."""

    def __init__(self) -> None:
        super().__init__()
        resnet = torchvision.models.resnet18(weights=None)
        self.backbone = nn.Sequential(*list(resnet.children())[:6])
        self.fusion = nn.Conv2d(256, 32, 1)
        self.first, self.second = nn.Conv2d(128, 3, 1), nn.Conv2d(32, 3, 1)

    def forward(self, a: Tensor, b: Tensor) -> dict[str, list[Tensor]]:
        seen = self.backbone(a), self.backbone(b)
        fused = self.fusion(torch.cat(seen, 1)).relu()
        return {"masks": [self.first(seen[0]), self.second(fused)]}


@pytest.fixture(scope="module")
def two() -> Iterator[tuple[nn.Module, dict[str, Tensor]]]:
    yield made(TwoByTwo), {"a": random(2, 3, 64, 64), "b": 1 - random(2, 3, 64, 64)}


def test_every_output_against_every_input_of_a_shared_backbone(two: Any) -> None:
    model, images = two
    layers = {"a": "backbone#0", "b": "backbone#1", "fused": Layer("fusion", onto="a")}
    target = SegmentationScore(1, torch.ones(8, 8))
    second = HiResCAM(model, layers, output="masks.1")(images, target, signed=True)
    with pytest.raises(MulticamError, match="does not depend on layer 'backbone#1'"):
        HiResCAM(model, layers, output="masks.0")(images, target)
    first = HiResCAM(model, "backbone#0", output="masks.0")(images, target, signed=True)
    # The head of the first output is linear in the features: its evidence is its mean score without the bias.
    with torch.no_grad():
        masks = model(**images)["masks"]
        expected = masks[0][:, 1].mean((1, 2)) - model.first.bias[1]
    torch.testing.assert_close(first.mean((1, 2)), expected, rtol=0.05, atol=0.01)
    assert min(second[name].abs().amax() for name in second) > 0
    swapped = HiResCAM(model, {"b": "backbone#0", "a": "backbone#1"}, output="masks.1")
    with pytest.raises(MulticamError, match=r"does not see input 'b'"):
        swapped(images, target)


def test_maps_of_several_heads_are_those_of_each_head(two: Any) -> None:
    model, images = two
    whole = GradCAM(model, {"a": "backbone#0"}, output=lambda output: output["masks"][1][:, :, 4, 4])(images, 2)
    picked = GradCAM(model, {"a": "backbone#0"}, output="masks.1")(images, lambda masks: masks[:, 2, 4, 4])
    raw = GradCAM(model, {"a": "backbone#0"})(images, lambda output: output["masks"][1][:, 2, 4, 4])
    torch.testing.assert_close(whole["a"], picked["a"], rtol=0, atol=0)
    torch.testing.assert_close(whole["a"], raw["a"], rtol=0, atol=0)
