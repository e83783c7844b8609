"""Architectures with attention of every kind: tiny random versions, one call of each, and how their own matrices are laid."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache

import timm
import torch
import torchvision
import transformers as hf
from timm import models as timm_models
from timm.layers.halo_attn import HaloAttn
from torch import Tensor, nn

from multicam import Inputs
from tests.helpers.architectures import ARCHITECTURES, TEXT, VISION, everywhere, images, words

TIMM = {"num_classes": 4}
VIT = TIMM | {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


@dataclass(frozen=True)
class Attending:
    """A model, one call of it, and what its attentions are.

    Attributes:
        model: With random weights.
        inputs: Of two samples.
        calls: How many attentions a pass runs, by the architecture.
        lay: From what a softmax of it returned to `(b heads q k)`.
    """

    model: nn.Module
    inputs: Inputs
    calls: int
    lay: Callable[[Tensor], Tensor] = lambda p: p


ATTENDING: dict[str, Callable[[], Attending]] = {}


def attending(factory: Callable[[], Attending]) -> Callable[[], Attending]:
    def seeded() -> Attending:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            case = factory()
            enliven(case.model)
        case.model.eval().requires_grad_(False)
        return case

    ATTENDING[factory.__name__] = cache(seeded)
    return ATTENDING[factory.__name__]


def enliven(model: nn.Module) -> None:
    """Weights so large that attention is far from uniform, and no block is multiplied by a layer scale of nearly zero."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 1.1 * parameter[0].numel() ** -0.5)
        elif "weight" not in name:
            parameter.data.uniform_(-0.5, 0.5)


def folded(p: Tensor) -> Tensor:
    """Windows, in front of the heads, join the samples."""
    return p.flatten(0, -4) if p.ndim == 5 else p


def apart(heads: int) -> Callable[[Tensor], Tensor]:
    """The heads leave the samples."""
    return lambda p: p.unflatten(0, (-1, heads)) if p.ndim == 3 else p


def windows_last(p: Tensor) -> Tensor:
    """Windows, behind the heads, join the samples."""
    return p.transpose(1, 2).flatten(0, 1) if p.ndim == 5 else p


# timm


@attending
def timm_vit() -> Attending:
    return Attending(timm_models.VisionTransformer(**VIT), Inputs(images()), 2)


@attending
def timm_deit() -> Attending:
    return Attending(timm_models.deit.VisionTransformerDistilled(**VIT), Inputs(images()), 2)


@attending
def timm_vit_registers() -> Attending:
    model = timm_models.VisionTransformer(**VIT, reg_tokens=4, no_embed_class=True, qk_norm=True, init_values=0.1)
    return Attending(model, Inputs(images()), 2)


@attending
def timm_siglip() -> Attending:
    model = timm_models.VisionTransformer(**VIT, class_token=False, global_pool="map")
    return Attending(model, Inputs(images()), 3)


@attending
def timm_beit() -> Attending:
    model = timm_models.beit.Beit(**VIT, use_rel_pos_bias=True, use_abs_pos_emb=False, init_values=0.1)
    return Attending(model, Inputs(images()), 2)


@attending
def timm_eva02() -> Attending:
    model = timm_models.eva.Eva(**VIT, use_rot_pos_emb=True, swiglu_mlp=True, scale_mlp=True, qkv_fused=False)
    return Attending(model, Inputs(images()), 2)


@attending
def timm_swin() -> Attending:
    model = timm_models.SwinTransformer(img_size=56, patch_size=4, embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=4, **TIMM)  # fmt: skip
    return Attending(model, Inputs(images(3, 56, 56)), 4)


@attending
def timm_swinv2() -> Attending:
    model = timm_models.SwinTransformerV2(img_size=32, patch_size=4, embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=4, **TIMM)  # fmt: skip
    return Attending(model, Inputs(images()), 4)


@attending
def timm_crossvit() -> Attending:
    model = timm_models.crossvit.CrossVit(
        img_size=24, img_scale=(1.0, 2 / 3), patch_size=(4, 8), num_classes=4, embed_dim=(16, 32), depth=((1, 2, 0),),
        num_heads=(2, 2), mlp_ratio=(2, 2, 1),
    )  # fmt: skip
    return Attending(model, Inputs(images(3, 24, 24)), 5)


@attending
def timm_maxvit() -> Attending:
    config = timm_models.maxxvit.MaxxVitCfg(
        embed_dim=(16, 32), depths=(1, 1), block_type=("M", "M"), stem_width=8,
        transformer_cfg=timm_models.maxxvit.MaxxVitTransformerCfg(dim_head=8, window_size=4, grid_size=4),
    )  # fmt: skip
    return Attending(timm_models.MaxxVit(config, img_size=32, **TIMM), Inputs(images()), 4)


@attending
def timm_pvt_v2() -> Attending:
    model = timm_models.pvt_v2.PyramidVisionTransformerV2(
        depths=(1, 1, 1, 1), embed_dims=(8, 16, 16, 16), num_heads=(1, 2, 2, 2), mlp_ratios=(2, 2, 2, 2), **TIMM
    )
    return Attending(model, Inputs(images(3, 64, 64)), 4)


@attending
def timm_cait() -> Attending:
    model = timm_models.Cait(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, **TIMM)
    return Attending(model, Inputs(images()), 4)


@attending
def timm_xcit() -> Attending:
    model = timm_models.Xcit(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, cls_attn_layers=2, **TIMM)
    return Attending(model, Inputs(images()), 4)


@attending
def timm_twins() -> Attending:
    model = timm_models.Twins(
        img_size=64, patch_size=4, embed_dims=(8, 16), num_heads=(1, 2), mlp_ratios=(2, 2), depths=(2, 2),
        sr_ratios=(4, 2), wss=(4, 4), block_cls=timm_models.twins.Block, **TIMM,
    )  # fmt: skip
    return Attending(model, Inputs(images(3, 64, 64)), 4, lay=folded)


@attending
def timm_nest() -> Attending:
    model = timm_models.Nest(img_size=32, patch_size=4, num_levels=2, embed_dims=(8, 16), num_heads=(2, 4), depths=(1, 2), **TIMM)  # fmt: skip
    return Attending(model, Inputs(images()), 3, lay=windows_last)


@attending
def timm_levit() -> Attending:
    model = timm_models.Levit(img_size=64, embed_dim=(16, 24), key_dim=8, depth=(1, 1), num_heads=(2, 3), **TIMM)
    return Attending(model, Inputs(images(3, 64, 64)), 3)


@attending
def timm_mvitv2() -> Attending:
    config = timm_models.mvitv2.MultiScaleVitCfg(depths=(1, 1), embed_dim=8, num_heads=1, use_cls_token=True)
    return Attending(timm_models.MultiScaleVit(config, img_size=32, **TIMM), Inputs(images()), 2)


@attending
def timm_davit() -> Attending:
    model = timm_models.DaVit(depths=(1, 1), embed_dims=(8, 16), num_heads=(2, 2), window_size=4, **TIMM)
    return Attending(model, Inputs(images()), 4)


@attending
def timm_hiera() -> Attending:
    model = timm_models.Hiera(img_size=(64, 64), embed_dim=8, num_heads=1, stages=(1, 1, 1, 1), **TIMM)
    return Attending(model, Inputs(images(3, 64, 64)), 4, lay=windows_last)


@attending
def timm_botnet() -> Attending:
    return Attending(
        timm.create_model("botnet26t_256", img_size=64, **TIMM), Inputs(images(3, 64, 64)), 3, lay=apart(4)
    )


@attending
def timm_halonet() -> Attending:
    halo = HaloAttn(16, dim_head=8, num_heads=2, block_size=4, halo_size=1)
    model = nn.Sequential(nn.Conv2d(3, 16, 4, 4), halo, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Attending(model, Inputs(images()), 1, lay=folded)


@attending
def timm_gcvit() -> Attending:
    model = timm_models.GlobalContextVit(img_size=64, window_size=(4, 4, 2, 2), depths=(2, 1, 1, 1), num_heads=(1, 2, 2, 2), embed_dim=8, **TIMM)  # fmt: skip
    return Attending(model, Inputs(images(3, 64, 64)), 5)


@attending
def timm_coat() -> Attending:
    model = timm_models.CoaT(img_size=64, patch_size=4, embed_dims=(16,) * 4, serial_depths=(1,) * 4, parallel_depth=0, num_heads=8, mlp_ratios=(2,) * 4, **TIMM)  # fmt: skip
    return Attending(model, Inputs(images(3, 64, 64)), 4, lay=lambda p: p.mT)  # the softmax is over the keys' tokens


@attending
def timm_edgenext() -> Attending:
    model = timm_models.EdgeNeXt(dims=(8, 16, 16, 32), depths=(1, 2, 2, 2), global_block_counts=(0, 1, 1, 1), heads=(2, 2, 2, 2), **TIMM)  # fmt: skip
    return Attending(model, Inputs(images(3, 64, 64)), 3)


@attending
def timm_volo() -> Attending:
    model = timm_models.VOLO(
        img_size=64, layers=(1, 1), embed_dims=(16, 32), num_heads=(2, 2), outlook_attention=(True, False), mlp_ratio=(2, 2),
        stem_hidden_dim=8, downsamples=(True, False), post_layers=("ca", "ca"), **TIMM,
    )  # fmt: skip
    return Attending(model, Inputs(images(3, 64, 64)), 4, lay=windows_last)


@attending
def timm_mobilevit() -> Attending:
    return Attending(timm.create_model("mobilevit_xxs", **TIMM), Inputs(images(3, 64, 64)), 9)


# torchvision


@attending
def torchvision_vit() -> Attending:
    return Attending(torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=4), Inputs(images()), 2)


@attending
def torchvision_swin() -> Attending:
    model = torchvision.models.SwinTransformer([4, 4], 8, [2, 2], [1, 2], [4, 4], num_classes=4)
    return Attending(model, Inputs(images(3, 56, 40)), 4)


@attending
def torchvision_swin_v2() -> Attending:
    model = torchvision.models.SwinTransformer(
        [4, 4], 8, [2, 2], [1, 2], [4, 4], num_classes=4, block=torchvision.models.swin_transformer.SwinTransformerBlockV2,
        downsample_layer=torchvision.models.swin_transformer.PatchMergingV2,
    )  # fmt: skip
    return Attending(model, Inputs(images(3, 56, 40)), 4)


@attending
def torchvision_maxvit() -> Attending:
    model = torchvision.models.MaxVit((32, 32), 8, 4, [8, 16], [1, 1], 4, 0.0, num_classes=4)
    return Attending(model, Inputs(images()), 4, lay=folded)


# transformers


@attending
def hf_vit() -> Attending:
    return Attending(hf.ViTForImageClassification(hf.ViTConfig(**VISION, num_labels=4)), Inputs(images()), 2)


@attending
def hf_dinov2_registers() -> Attending:
    config = hf.Dinov2WithRegistersConfig(**{**VISION, "mlp_ratio": 2}, num_register_tokens=4)
    return Attending(hf.Dinov2WithRegistersModel(config), Inputs(images()), 2)


@attending
def hf_beit() -> Attending:
    config = hf.BeitConfig(**VISION, use_relative_position_bias=True, num_labels=4)
    return Attending(hf.BeitForImageClassification(config), Inputs(images()), 2)


@attending
def hf_swin() -> Attending:
    config = hf.SwinConfig(image_size=32, embed_dim=8, depths=[2, 2], num_heads=[1, 2], window_size=4, num_labels=4)
    return Attending(hf.SwinForImageClassification(config), Inputs(images(3, 32, 32)), 4)


@attending
def hf_segformer() -> Attending:
    config = hf.SegformerConfig(hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 2], decoder_hidden_size=16, num_labels=4)  # fmt: skip
    return Attending(hf.SegformerForSemanticSegmentation(config), Inputs(images(3, 64, 64)), 4)


@attending
def hf_perceiver() -> Attending:
    case = ARCHITECTURES["perceiver_two_frames"]()
    return Attending(case.model, case.inputs, 3)


@attending
def hf_clip() -> Attending:
    case = ARCHITECTURES["clip"]()
    return Attending(case.model, case.inputs, 4)


@attending
def hf_siglip() -> Attending:
    case = ARCHITECTURES["siglip"]()
    return Attending(case.model, case.inputs, 5)


@attending
def hf_vilt() -> Attending:
    case = ARCHITECTURES["vilt"]()
    return Attending(case.model, case.inputs, 2)


@attending
def hf_blip() -> Attending:
    case = ARCHITECTURES["blip"]()
    return Attending(case.model, case.inputs, 6)


@attending
def hf_blip2_qformer() -> Attending:
    case = ARCHITECTURES["blip2"]()
    return Attending(case.model, case.inputs, 5)


@attending
def hf_flava() -> Attending:
    case = ARCHITECTURES["flava"]()
    return Attending(case.model, case.inputs, 5)


@attending
def hf_lxmert() -> Attending:
    config = hf.LxmertConfig(
        vocab_size=40, hidden_size=16, num_attention_heads=2, intermediate_size=32, max_position_embeddings=16,
        l_layers=2, r_layers=2, x_layers=2, visual_feat_dim=8, num_qa_labels=4,
    )  # fmt: skip
    inputs = Inputs(
        input_ids=words(), visual_feats=torch.randn(2, 5, 8), visual_pos=torch.rand(2, 5, 4),
        attention_mask=torch.tensor([[1] * 6, [1] * 4 + [0] * 2]),
    )  # fmt: skip
    return Attending(hf.LxmertForQuestionAnswering(config), inputs, 2 + 2 + 2 * 4)


@attending
def hf_detr() -> Attending:
    case = ARCHITECTURES["detr"]()
    return Attending(case.model, case.inputs, 3)


@attending
def hf_bridgetower() -> Attending:
    case = ARCHITECTURES["bridgetower"]()
    return Attending(case.model, case.inputs, 3 + 3 + 8)


@attending
def hf_trocr() -> Attending:
    case = ARCHITECTURES["trocr"]()
    return Attending(case.model, case.inputs, 6, lay=apart(2))


@attending
def hf_llava() -> Attending:
    case = ARCHITECTURES["llava"]()
    return Attending(case.model, case.inputs, 4)


@attending
def hf_sam() -> Attending:
    case = ARCHITECTURES["sam"]()
    model = hf.SamModel._from_config(deepcopy(case.model.config), attn_implementation="eager")  # chosen when it is made
    return Attending(model, case.inputs, 2 + 3 + 1, lay=apart(2))


@attending
def hf_llama() -> Attending:
    config = hf.LlamaConfig(**TEXT | {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32})
    padded = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    return Attending(hf.LlamaForCausalLM(config), Inputs(words(), attention_mask=padded, use_cache=False), 2)


@attending
def hf_t5() -> Attending:
    config = hf.T5Config(
        vocab_size=40, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    inputs = Inputs(words(), attention_mask=everywhere(), decoder_input_ids=words(2, 4), use_cache=False)
    return Attending(hf.T5ForConditionalGeneration(config), inputs, 6)


@attending
def hf_bert() -> Attending:
    inputs = Inputs(words(), attention_mask=torch.tensor([[1] * 6, [1] * 3 + [0] * 3]))
    return Attending(hf.BertModel(hf.BertConfig(**TEXT)), inputs, 2)
