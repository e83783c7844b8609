"""Real architectures with several inputs: tiny random versions, one call of each, and the layers to look at."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import timm
import torch
import torchvision
import transformers as hf
from einops import rearrange
from torch import Tensor, nn

from multicam import Inputs, Layer, channels_last, stacked, tokens
from multicam.call.scorer import OutputLike, TargetLike
from multicam.watch.layers import LayerLike

VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
          "image_size": 32, "patch_size": 8}  # fmt: skip
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40,
        "max_position_embeddings": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model, one call of it, and where to look: a layer named like an input belongs to it."""

    model: nn.Module
    inputs: Inputs
    layers: dict[str, LayerLike]
    output: OutputLike = None
    target: TargetLike = 0
    sizes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # where it is not the input's height and width

    def size(self, name: str) -> tuple[int, ...]:
        inputs = self.inputs.bind(self.model)
        leaf = inputs.leaves[Layer.of(self.layers[name]).onto or inputs.name(name)]
        return self.sizes.get(name, tuple(leaf.shape[-2:]))


ARCHITECTURES: dict[str, Callable[[], Case]] = {}


def architecture(factory: Callable[[], Case]) -> Callable[[], Case]:
    def seeded() -> Case:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            case = factory()
        # With trainable weights PyTorch chooses other matrix kernels, whose last bits differ.
        case.model.eval().requires_grad_(False)
        return case

    ARCHITECTURES[factory.__name__] = cache(seeded)
    return ARCHITECTURES[factory.__name__]


def images(*shape: int) -> Tensor:
    return torch.rand(2, *(shape or (3, 32, 32)))


def words(rows: int = 2, count: int = 6) -> Tensor:
    return torch.arange(3, 3 + rows * count).view(rows, count)


def everywhere(rows: int = 2, *size: int) -> Tensor:
    return torch.ones(rows, *(size or (6,)), dtype=torch.long)


def swin(*stages: str) -> Any:
    depth = int(stages[-1].removeprefix("stage"))
    return hf.SwinConfig(image_size=64, embed_dim=8, depths=[1] * depth, num_heads=[1, 1, 2, 2][:depth], window_size=2,
                         out_features=list(stages))  # fmt: skip


# Image and text, in towers of their own.


@architecture
def clip() -> Case:
    model = hf.CLIPModel(hf.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8))
    inputs = Inputs(input_ids=words(), pixel_values=images())
    return Case(model, inputs, {"pixel_values": "vision_model.encoder.layers.1.layer_norm1"}, "logits_per_image")


@architecture
def altclip() -> Case:
    model = hf.AltCLIPModel(
        hf.AltCLIPConfig(text_config=TEXT | {"project_dim": 16}, vision_config=VISION, projection_dim=8)
    )
    inputs = Inputs(input_ids=words(), attention_mask=everywhere(), pixel_values=images())
    return Case(model, inputs, {"pixel_values": "vision_model.encoder.layers.1.layer_norm1"}, "logits_per_image")


@architecture
def siglip() -> Case:
    model = hf.SiglipModel(hf.SiglipConfig(text_config=TEXT, vision_config=VISION))
    inputs = Inputs(words(), images())
    return Case(model, inputs, {"pixel_values": "vision_model.post_layernorm"}, "logits_per_image")


@architecture
def owlvit() -> Case:
    model = hf.OwlViTForObjectDetection(hf.OwlViTConfig(text_config=TEXT, vision_config=VISION, projection_dim=16))
    # Two queries for each image, so that the text has twice as many rows.
    inputs = Inputs(input_ids=words(4), pixel_values=images(), attention_mask=everywhere(4))
    layers = {"pixel_values": "layer_norm"}
    return Case(
        model, inputs.constant("input_ids", "attention_mask"), layers, "logits", lambda out: out[..., 0].mean(1)
    )


# Image and text, fused.


@architecture
def vilt() -> Case:
    config = hf.ViltConfig(**VISION, vocab_size=40, max_position_embeddings=16, num_labels=4)
    inputs = Inputs(input_ids=words(), pixel_values=images(), pixel_mask=everywhere(2, 32, 32))
    # Behind the patches ViLT shuffles them at random: the only grid is here.
    return Case(
        hf.ViltForQuestionAnswering(config), inputs, {"pixel_values": "vilt.embeddings.patch_embeddings"}, "logits"
    )


@architecture
def vilt_two_images() -> Case:
    config = hf.ViltConfig(**VISION, vocab_size=40, max_position_embeddings=16, num_labels=2, num_images=2,
                           modality_type_vocab_size=3)  # fmt: skip
    inputs = Inputs(input_ids=words(), pixel_values=images(2, 3, 32, 32))
    layers = {f"image {i}": Layer(f"vilt.embeddings.patch_embeddings#{i}", onto="pixel_values") for i in range(2)}
    sizes = dict.fromkeys(layers, (2, 32, 32))  # of which each layer sees one
    return Case(hf.ViltForImagesAndTextClassification(config), inputs, layers, "logits", 1, sizes)


@architecture
def blip() -> Case:
    config = hf.BlipConfig(text_config=TEXT | {"encoder_hidden_size": 16, "sep_token_id": 3}, vision_config=VISION,
                           projection_dim=8, image_text_hidden_size=8)  # fmt: skip
    inputs = Inputs(input_ids=words(), pixel_values=images(), attention_mask=everywhere())
    layers = {"pixel_values": "vision_model.post_layernorm#0"}
    return Case(hf.BlipForImageTextRetrieval(config), inputs, layers, "itm_score")


@architecture
def blip2() -> Case:
    language = {"model_type": "opt", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 32,
                "vocab_size": 40, "word_embed_proj_dim": 16, "max_position_embeddings": 16}  # fmt: skip
    config = hf.Blip2Config(vision_config=VISION, text_config=language, num_query_tokens=3, image_text_hidden_size=8,
                            qformer_config=TEXT | {"encoder_hidden_size": 16, "use_qformer_text_input": True},
                            image_token_index=39)  # fmt: skip
    inputs = Inputs(images(), words(), everywhere(), use_image_text_matching_head=True)
    layers = {"pixel_values": "vision_model.post_layernorm#0"}
    return Case(hf.Blip2ForImageTextRetrieval(config), inputs, layers, "logits_per_image")


@architecture
def flava() -> Case:
    config = hf.FlavaConfig(text_config=TEXT, image_config=VISION, hidden_size=16, projection_dim=8,
                            multimodal_config=VISION | {"num_hidden_layers": 1})  # fmt: skip
    inputs = Inputs(input_ids=words(), pixel_values=images())
    joint = tokens(4, 4, part=slice(2, 18))  # two class tokens, the patches, the text
    layers = {
        "pixel_values": "image_model.encoder.layer.1.layernorm_before",
        "joint": Layer("multimodal_model.encoder.layer.0.layernorm_before", reshape=joint, onto="pixel_values"),
    }
    return Case(hf.FlavaModel(config), inputs, layers, "multimodal_output.pooler_output", 3)


@architecture
def bridgetower() -> Case:
    wide = {"hidden_size": 64, "num_hidden_layers": 3}
    config = hf.BridgeTowerConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, text_config=TEXT | wide,
                                  vision_config=VISION | wide)  # fmt: skip
    inputs = Inputs(input_ids=words(), attention_mask=everywhere(), pixel_values=images())
    layers = {
        "pixel_values": "bridgetower.cross_modal_image_link_tower.0",
        "sequence first": Layer("bridgetower.vision_model.visual.transformer.resblocks.1.ln_1", onto="pixel_values"),
        "cross-attention": Layer("bridgetower.cross_modal_image_layers.0", pick=0, onto="pixel_values"),
    }
    return Case(hf.BridgeTowerForImageAndTextRetrieval(config), inputs, layers, "logits", 1)


@architecture
def layoutlmv3() -> Case:
    config = hf.LayoutLMv3Config(**TEXT | {"hidden_size": 24}, coordinate_size=4, shape_size=4, input_size=32,
                                 patch_size=8, num_labels=3)  # fmt: skip
    boxes = 5 * torch.arange(48).view(2, 6, 4)
    inputs = Inputs(input_ids=words(), bbox=boxes, pixel_values=images())
    joint = tokens(4, 4, part=slice(7, 23))  # the text, a class token, the patches
    layers = {"pixel_values": Layer("layoutlmv3.encoder.layer.0", reshape=joint)}
    return Case(hf.LayoutLMv3ForSequenceClassification(config), inputs, layers, "logits", 2)


@architecture
def llava() -> Case:
    language = hf.LlamaConfig(**TEXT)
    config = hf.LlavaConfig(vision_config=hf.CLIPVisionConfig(**VISION), text_config=language, image_token_index=39,
                            vision_feature_layer=-1)  # fmt: skip
    prompt = torch.cat([words(count=2), torch.full((2, 16), 39), words(count=3)], 1)
    among_words = tokens(4, 4, part=slice(2, 18))
    layers = {
        "pixel_values": "model.multi_modal_projector",
        "in the prompt": Layer(
            "model.language_model.layers.1.input_layernorm", reshape=among_words, onto="pixel_values"
        ),
    }
    return Case(hf.LlavaForConditionalGeneration(config), Inputs(prompt, images()), layers, "logits",
                lambda logits: logits[:, -1, 7])  # fmt: skip


@architecture
def trocr() -> Case:
    decoder = hf.TrOCRConfig(vocab_size=40, d_model=16, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=32,
                             max_position_embeddings=16, cross_attention_hidden_size=16)  # fmt: skip
    both = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(hf.ViTConfig(**VISION), decoder)
    inputs = Inputs(pixel_values=images(), decoder_input_ids=words())
    return Case(hf.VisionEncoderDecoderModel(both), inputs, {"pixel_values": "encoder.layernorm"}, "logits",
                lambda logits: logits[:, -1, 7])  # fmt: skip


@architecture
def grounding_dino() -> Case:
    config = hf.GroundingDinoConfig(
        backbone_config=swin("stage2", "stage3"), text_config=TEXT | {"model_type": "bert"}, d_model=32,
        encoder_layers=1, decoder_layers=2, encoder_ffn_dim=32, decoder_ffn_dim=32, encoder_attention_heads=2,
        decoder_attention_heads=2, num_queries=5, num_feature_levels=2, encoder_n_points=2, decoder_n_points=2,
        max_text_len=8,
    )  # fmt: skip
    inputs = Inputs(pixel_values=images(3, 64, 64), input_ids=words(), attention_mask=everywhere())
    levels = {"fine": tokens(8, 8, suffix=16), "coarse": tokens(4, 4, prefix=64)}
    layers = {
        name: Layer("model.encoder", pick="last_hidden_state_vision", reshape=level, onto="pixel_values")
        for name, level in levels.items()
    }
    return Case(hf.GroundingDinoForObjectDetection(config), inputs, layers, "logits", lambda out: out[..., 1].mean(1))


@architecture
def clipseg_by_image() -> Case:
    config = hf.CLIPSegConfig(text_config=TEXT, vision_config=VISION | {"num_hidden_layers": 3}, projection_dim=16,
                              reduce_dim=16, extract_layers=[1, 2], decoder_num_attention_heads=2,
                              decoder_intermediate_size=32)  # fmt: skip
    inputs = Inputs(pixel_values=images(), conditional_pixel_values=images())
    return Case(hf.CLIPSegForImageSegmentation(config), inputs, {"pixel_values": "decoder.layers.0"}, "logits",
                lambda masks: masks.mean((1, 2)))  # fmt: skip


# Several images.


@architecture
def raft() -> Case:
    model = torchvision.models.optical_flow.raft_small(weights=None)
    inputs = Inputs(images(3, 128, 128) * 2 - 1, images(3, 128, 128) * 2 - 1, num_flow_updates=2)
    layers = {
        "image1": Layer("feature_encoder", reshape=stacked(0, of=2)),
        "image2": Layer("feature_encoder", reshape=stacked(1, of=2)),
        "context": Layer("context_encoder", onto="image1"),
        "update": Layer("update_block.recurrent_block#1", onto="image1"),
    }
    return Case(model, inputs, layers, -1, lambda flow: flow[:, 0].mean((1, 2)))


@architecture
def perceiver_two_frames() -> Case:
    config = hf.PerceiverConfig(num_latents=6, d_latents=16, d_model=322, num_blocks=1, num_self_attends_per_block=1,
                                num_self_attention_heads=2, num_cross_attention_heads=1, train_size=[16, 16])  # fmt: skip
    layers = {"inputs": Layer("perceiver.encoder.cross_attention.attention.self.layernorm2", reshape=tokens(16, 16))}
    return Case(hf.PerceiverForOpticalFlow(config), Inputs(images(2, 27, 16, 16)), layers, "logits",
                lambda flow: flow[..., 0].mean((1, 2)))  # fmt: skip


@architecture
def seggpt() -> Case:
    config = hf.SegGptConfig(**VISION | {"image_size": [32, 16], "num_hidden_layers": 3}, pretrain_image_size=16,
                             decoder_hidden_size=8, mlp_dim=32, merge_index=0,
                             intermediate_hidden_state_indices=[0, 1, 2])  # fmt: skip
    inputs = Inputs(images(3, 16, 16), images(3, 16, 16), images(3, 16, 16))
    # The prompt lies above the image in one picture, the prompt's mask is stacked on the batch axis until layer 0.
    layers = {
        "prompt_pixel_values": Layer("model.encoder.layers.1", reshape=lambda x: channels_last(x)[:, :, :2]),
        "pixel_values": Layer("model.encoder.layers.1", reshape=lambda x: channels_last(x)[:, :, 2:]),
        "prompt_masks": Layer("model.embeddings", reshape=stacked(1, of=2, then=lambda x: channels_last(x)[:, :, :2])),
    }
    return Case(hf.SegGptForImageSegmentation(config), inputs, layers, "pred_masks", lambda out: out.mean((1, 2, 3)))


@architecture
def prompt_depth_anything() -> Case:
    backbone = hf.Dinov2Config(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=2, image_size=28,
                               patch_size=14, out_features=["stage1", "stage2", "stage3", "stage4"],
                               reshape_hidden_states=False)  # fmt: skip
    config = hf.PromptDepthAnythingConfig(backbone_config=backbone, neck_hidden_sizes=[8] * 4, fusion_hidden_size=8,
                                          head_hidden_size=8, reassemble_hidden_size=16)  # fmt: skip
    inputs = Inputs(pixel_values=images(3, 28, 28), prompt_depth=images(1, 12, 12))
    layers = {
        "pixel_values": "neck.fusion_stage.layers.3.residual_layer1",
        "prompt_depth": "neck.fusion_stage.layers.3.prompt_depth_layer",
    }
    return Case(hf.PromptDepthAnythingForDepthEstimation(config), inputs, layers, "predicted_depth",
                lambda depth: depth.mean((1, 2)))  # fmt: skip


@architecture
def superglue() -> Case:
    points = hf.SuperPointConfig(encoder_hidden_sizes=[8] * 4, decoder_hidden_size=8, descriptor_decoder_dim=16,
                                 max_keypoints=8)  # fmt: skip
    config = hf.SuperGlueConfig(keypoint_detector_config=points, hidden_size=16, keypoint_encoder_sizes=[8, 16],
                                gnn_layers_types=["self", "cross"], num_attention_heads=2,
                                sinkhorn_iterations=2)  # fmt: skip
    layers = {
        f"image {i}": Layer("keypoint_detector.encoder", reshape=stacked(i, of=2, inner=True), onto="pixel_values")
        for i in range(2)
    }
    return Case(hf.SuperGlueForKeypointMatching(config), Inputs(images(2, 3, 64, 64)), layers, "matching_scores",
                lambda scores: scores.mean((1, 2)))  # fmt: skip


@architecture
def sam() -> Case:
    config = hf.SamConfig(
        vision_config=VISION | {"output_channels": 16, "mlp_dim": 32, "window_size": 2, "global_attn_indexes": [1],
                                "num_pos_feats": 8},
        prompt_encoder_config=VISION | {"mask_input_channels": 4},
        mask_decoder_config={"hidden_size": 16, "mlp_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                             "iou_head_hidden_dim": 16},
    )  # fmt: skip
    inputs = Inputs(pixel_values=images(), input_points=32 * torch.rand(2, 1, 2, 2)).hold("input_points")
    layers = {
        "pixel_values": "vision_encoder.neck",
        "channels last": Layer("vision_encoder.layers.1", onto="pixel_values"),
    }
    return Case(hf.SamModel(config), inputs, layers, "pred_masks", lambda masks: masks[:, 0, 0].mean((1, 2)))


# One image, several grids.


@architecture
def crossvit() -> Case:
    model = timm.models.crossvit.CrossVit(
        img_size=24, img_scale=(1.0, 2 / 3), patch_size=(4, 8), num_classes=4, embed_dim=(16, 32), depth=((1, 2, 0),),
        num_heads=(2, 2), mlp_ratio=(2, 2, 1),
    )  # fmt: skip
    layers = {
        "x": "blocks.0.fusion.1.norm1",
        "large patches": Layer("blocks.0.fusion.0.norm1", onto="x"),
    }
    return Case(model, Inputs(images(3, 24, 24)), layers, target=[0, 3])


@architecture
def detr() -> Case:
    backbone = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic",
                               out_features=["stage2"])  # fmt: skip
    config = hf.DetrConfig(backbone_config=backbone, d_model=16, encoder_layers=1, decoder_layers=1, num_queries=5,
                           encoder_ffn_dim=32, decoder_ffn_dim=32, encoder_attention_heads=2, decoder_attention_heads=2,
                           num_labels=3)  # fmt: skip
    inputs = Inputs(pixel_values=images(), pixel_mask=everywhere(2, 32, 32))
    layers = {"pixel_values": "model.backbone", "encoder": Layer("model.encoder", onto="pixel_values")}
    return Case(hf.DetrForObjectDetection(config), inputs, layers, "logits", lambda out: out[..., 1].mean(1))


@architecture
def mask2former() -> Case:
    config = hf.Mask2FormerConfig(backbone_config=swin("stage1", "stage2", "stage3", "stage4"), feature_size=32,
                                  mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32, encoder_layers=1,
                                  decoder_layers=2, num_attention_heads=2, dim_feedforward=32, num_queries=4,
                                  num_labels=3)  # fmt: skip
    layers = {
        "pixel_values": "model.pixel_level_module.decoder.adapter_1",
        "backbone": Layer("model.pixel_level_module.encoder", pick="feature_maps.2", onto="pixel_values"),
    }
    return Case(hf.Mask2FormerForUniversalSegmentation(config), Inputs(images(3, 64, 64)), layers,
                "masks_queries_logits", lambda masks: masks[:, 0].mean((1, 2)))  # fmt: skip


@architecture
def swin_channels_last() -> Case:
    model = torchvision.models.SwinTransformer([4, 4], 8, [1, 1], [1, 2], [4, 4], num_classes=3)
    return Case(model, Inputs(images()), {"x": "norm", "first stage": Layer("features.1", onto="x")})


# Video.


@architecture
def r3d() -> Case:
    video = torchvision.models.video.resnet
    model = video.VideoResNet(video.BasicBlock, [video.Conv3DSimple] * 4, [1, 1, 1, 1], video.BasicStem, num_classes=3)
    return Case(model, Inputs(images(3, 8, 32, 32)), {"x": "layer2"}, sizes={"x": (8, 32, 32)})


@architecture
def videomae() -> Case:
    config = hf.VideoMAEConfig(**VISION | {"image_size": 16}, num_frames=4, tubelet_size=2, num_labels=3)
    return Case(hf.VideoMAEForVideoClassification(config), Inputs(images(4, 3, 16, 16)),
                {"pixel_values": "videomae.encoder.layer.1"}, "logits", sizes={"pixel_values": (4, 16, 16)})  # fmt: skip


@architecture
def vjepa2() -> Case:
    config = hf.VJEPA2Config(patch_size=8, crop_size=16, frames_per_clip=4, tubelet_size=2, hidden_size=24,
                             num_attention_heads=2, num_hidden_layers=2, pred_hidden_size=24, pred_num_attention_heads=2,
                             pred_num_hidden_layers=1, num_pooler_layers=1, num_labels=3)  # fmt: skip
    return Case(hf.VJEPA2ForVideoClassification(config), Inputs(images(4, 3, 16, 16)),
                {"pixel_values_videos": "vjepa2.encoder"}, "logits", sizes={"pixel_values_videos": (4, 16, 16)})  # fmt: skip


@architecture
def xclip() -> Case:
    vision = VISION | {"num_frames": 4, "mit_hidden_size": 16, "mit_intermediate_size": 32, "mit_num_hidden_layers": 1,
                       "mit_num_attention_heads": 2}  # fmt: skip
    config = hf.XCLIPConfig(text_config=TEXT, vision_config=vision, projection_dim=16, prompt_num_attention_heads=2,
                            prompt_layers=1)  # fmt: skip

    def frames(x: Tensor) -> Tensor:
        return rearrange(x[:, 1:17], "(b t) (h w) c -> b c t h w", t=4, h=4)

    layer = "vision_model.encoder.layers.1.layer_norm1"
    one = stacked(2, of=4, inner=True, then=tokens(4, 4, prefix=1, suffix=1))
    layers = {"pixel_values": Layer(layer, reshape=frames), "frame 2": Layer(layer, reshape=one, onto="pixel_values")}
    inputs = Inputs(input_ids=words(), pixel_values=images(4, 3, 32, 32))
    return Case(hf.XCLIPModel(config), inputs, layers, "logits_per_video", sizes={"pixel_values": (4, 32, 32)})


# Models without an image leaf, or with tokens out of their order.


def lxmert() -> tuple[nn.Module, Inputs]:
    config = hf.LxmertConfig(vocab_size=40, hidden_size=16, intermediate_size=32, num_attention_heads=2, l_layers=1,
                             x_layers=1, r_layers=1, visual_feat_dim=8, max_position_embeddings=16)  # fmt: skip
    return hf.LxmertModel(config), Inputs(words(), torch.rand(2, 5, 8), torch.rand(2, 5, 4))


def naflex() -> tuple[nn.Module, Inputs]:
    model = timm.create_model("naflexvit_base_patch16_gap", embed_dim=16, depth=1, num_heads=2, num_classes=3)
    coordinates = torch.cartesian_prod(torch.arange(2), torch.arange(3)).expand(2, 6, 2)
    return model, Inputs(
        {
            "patches": torch.rand(2, 6, 768),
            "patch_coord": coordinates,
            "patch_valid": torch.ones(2, 6, dtype=torch.bool),
        }
    )


def faster_rcnn() -> tuple[nn.Module, Inputs]:
    model = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64
    )
    return model.eval(), Inputs([torch.rand(3, 64, 64), torch.rand(3, 64, 64)])


def videomae_hidden() -> tuple[nn.Module, Inputs]:
    config = hf.VideoMAEConfig(**VISION | {"image_size": 16}, num_frames=4, tubelet_size=2, decoder_hidden_size=16,
                               decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
                               decoder_intermediate_size=32)  # fmt: skip
    hidden = torch.tensor([[False, True] * 4] * 2)
    return hf.VideoMAEForPreTraining(config), Inputs(images(4, 3, 16, 16), hidden)
