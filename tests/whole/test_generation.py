"""Many forward passes: text that is generated about a picture, and pictures that are made from a text, in memory that stays flat."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from einops import rearrange
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from multicam.attending.attend import attention, record_attention
from multicam.attending.attention_call import AttentionCall
from multicam.errors import MulticamError
from multicam.watch.reshape import tokens

IMAGE = 60  # the word that stands for a patch
PROMPT = [1, 5, 7, *[IMAGE] * 16, 9, 11]
STEPS = 4


@pytest.fixture(scope="module")
def llava() -> LlavaForConditionalGeneration:
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text = LlamaConfig(
            **small, num_key_value_heads=2, vocab_size=64, bos_token_id=1, eos_token_id=2, pad_token_id=0
        )
        vision = CLIPVisionConfig(**small, image_size=32, patch_size=8, projection_dim=32)
        config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-1)
        config._attn_implementation = "eager"
        return LlavaForConditionalGeneration(config).eval()


@pytest.fixture
def question() -> dict[str, Tensor]:
    return {"input_ids": torch.tensor([PROMPT]), "pixel_values": torch.rand(1, 3, 32, 32)}


def generate(model: LlavaForConditionalGeneration, question: dict[str, Tensor], **options: bool):
    settings = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False, "pad_token_id": 0}
    return model.generate(
        **question, attention_mask=torch.ones(1, len(PROMPT), dtype=torch.int64), **settings, **options
    )


def on_image(weights: Tensor) -> Tensor:
    """The attention `(1 heads q k)` of the last query on the patches, as a density at the size of the image."""
    patches = weights[:, :, -1, 3:19].mean(1).view(1, 1, 4, 4)
    return F.interpolate(16 * patches, (32, 32), mode="bilinear")[:, 0]


def test_each_generated_word_looks_at_the_image(llava, question) -> None:
    """The keys of earlier passes are in a cache, so it is said which of them are the image."""

    def look(call: AttentionCall) -> Tensor | None:
        return call.heatmap("pixel_values", query=-1) if "language_model" in call.path else None

    with (
        torch.no_grad(),
        record_attention(llava, keep=look, layouts={"pixel_values": tokens(4, 4, part=slice(3, 19))}) as att,
    ):
        answer = generate(llava, question)
    truth = generate(llava, question, output_attentions=True, return_dict_in_generate=True)
    assert torch.equal(answer, truth.sequences)
    found = [map for map in att.kept if map is not None]
    expected = [on_image(layer) for step in truth.attentions for layer in step]
    assert len(found) == len(expected) == 2 * STEPS
    for map, layer in zip(found, expected, strict=True):
        assert torch.allclose(map, layer, atol=1e-6)


def test_patches_are_followed_into_the_sequence_of_words(llava, question) -> None:
    att = attention(llava, question)
    with torch.no_grad():
        truth = llava(**question, output_attentions=True).attentions
    for call, layer in zip(att.find("*language_model*"), truth, strict=True):
        assert call.describe().count("pixel_values 4 x 4") == 2
        assert torch.allclose(call.heatmap("pixel_values", query=-1), on_image(layer), atol=1e-6)


def test_a_name_that_no_pass_knows_is_refused(llava, question) -> None:
    with (
        pytest.raises(MulticamError, match="pixel_valuez"),
        record_attention(llava, layouts={"pixel_valuez": tokens(4, 4)}),
    ):
        llava(**question)


def test_only_what_is_asked_for_is_kept(llava, question) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def look(call: AttentionCall) -> float:
        alive.append(weakref.ref(call.weights))
        return call.weights[..., -1, :].sum().item()

    with torch.no_grad(), record_attention(llava, keep=look) as att:
        generate(llava, question)
    assert len(att.kept) == len(att) == len(alive) == 2 * STEPS + 2
    assert att.kept == pytest.approx([4.0] * len(att))  # heads that add up to one each
    assert not any(reference() is not None for reference in alive)
    with pytest.raises(MulticamError, match="are gone"):
        _ = att[0].weights


# Pictures from words: small models written as those of diffusion are.


class Attend(nn.Module):
    """Attention of a picture's cells to themselves or to words."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.to_q, self.to_k, self.to_v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor, words: Tensor | None = None) -> Tensor:
        q = self.to_q(self.norm(x))
        k, v = (layer(self.norm(x) if words is None else words) for layer in (self.to_k, self.to_v))
        q, k, v = (rearrange(t, "b n (heads e) -> b heads n e", heads=self.heads) for t in (q, k, v))
        return x + self.out(rearrange(F.scaled_dot_product_attention(q, k, v), "b heads n e -> b n (heads e)"))


class Block(nn.Module):
    def __init__(self, inward: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inward, width, 3, padding=1)
        self.norm = nn.GroupNorm(4, width)
        self.time = nn.Linear(1, width)
        self.attn1, self.attn2 = Attend(width), Attend(width)

    def forward(self, x: Tensor, time: Tensor, words: Tensor) -> Tensor:
        x = F.silu(self.norm(self.conv(x))) + self.time(time[:, None])[..., None, None]
        cells = self.attn2(self.attn1(rearrange(x, "b c h w -> b (h w) c")), words)
        return rearrange(cells, "b (h w) c -> b c h w", h=x.shape[2])


class UNet(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.conv_in, self.conv_out = nn.Conv2d(4, width, 3, padding=1), nn.Conv2d(width, 4, 3, padding=1)
        self.down = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList([Block(width, width), Block(width, width), Block(2 * width, width)])

    def forward(self, latents: Tensor, time: Tensor, words: Tensor) -> Tensor:
        fine = self.blocks[0](self.conv_in(latents), time, words)
        coarse = self.blocks[1](self.down(fine), time, words)
        both = torch.cat([F.interpolate(coarse, scale_factor=2.0, mode="nearest"), fine], 1)
        return self.conv_out(self.blocks[2](both, time, words))


class JointTransformer(nn.Module):
    """Words and patches in one attention, with projections of their own (MM-DiT)."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.patches = nn.Conv2d(4, width, 2, stride=2)
        self.modulation = nn.Linear(1, 2 * width)
        self.image_qkv, self.word_qkv = (nn.Linear(width, 3 * width) for _ in range(2))
        self.out = nn.Linear(width, 16)

    def forward(self, latents: Tensor, time: Tensor, words: Tensor) -> Tensor:
        cells = self.patches(latents)
        height = cells.shape[2]
        scale, shift = self.modulation(time[:, None])[:, None].chunk(2, -1)
        cells = rearrange(cells, "b c h w -> b (h w) c") * (1 + scale) + shift
        joint = torch.cat([self.word_qkv(words), self.image_qkv(cells)], 1)
        q, k, v = rearrange(joint, "b n (three heads e) -> three b heads n e", three=3, heads=self.heads)
        mixed = rearrange(F.scaled_dot_product_attention(q, k, v), "b heads n e -> b n (heads e)")
        _, image = mixed.split([words.shape[1], height * height], 1)
        return rearrange(self.out(cells + image), "b (h w) (i j c) -> b c (h i) (w j)", h=height, i=2, j=2)


def denoise(model: nn.Module, latents: Tensor, words: Tensor) -> Tensor:
    for step in range(3, 0, -1):
        latents = latents - 0.3 * model(latents, torch.full((len(latents),), step / 3), words)
    return latents


@contextmanager
def projected(model: nn.Module, wanted: str) -> Iterator[list[Tensor]]:
    """What the modules whose name ends so return, in the order in which they run."""
    found: list[Tensor] = []
    handles = [
        module.register_forward_hook(lambda module, args, output: found.append(output))
        for name, module in model.named_modules()
        if name.endswith(wanted)
    ]
    yield found
    for handle in handles:
        handle.remove()


def probabilities(q: Tensor, k: Tensor, heads: int = 2) -> Tensor:
    """`(b q k)`, the mean over the heads."""
    q, k = (rearrange(t, "b n (heads e) -> b heads n e", heads=heads) for t in (q, k))
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1).mean(1)


def as_pictures(p: Tensor, size: int) -> Tensor:
    """Each key's attention `(b cells k)` as a picture `(b k h w)`."""
    grids = rearrange(p, "b (h w) k -> b k h w", h=int(p.shape[1] ** 0.5))
    return F.interpolate(grids, (size, size), mode="bilinear")


@pytest.fixture
def latents() -> Tensor:
    return torch.randn(2, 4, 8, 8)


@pytest.fixture
def words() -> Tensor:
    return torch.randn(2, 5, 16)


def test_each_word_of_the_prompt_has_a_map_on_the_picture(latents, words) -> None:
    """The mean over steps and layers, from an unchanged UNet and matrices that are gone at once (DAAM, Tang et al. 2022)."""
    model = UNet().eval()

    def per_word(call: AttentionCall) -> Tensor | None:
        if "words" not in call.inputs()[1]:
            return None
        return torch.stack([call.footprint(word, "latents") for word in range(5)], 1)

    with torch.no_grad(), record_attention(model, keep=per_word) as att:
        picture = denoise(model, latents, words)
    with torch.no_grad(), projected(model, "attn2.to_q") as q, projected(model, "attn2.to_k") as k:
        assert torch.equal(picture, denoise(model, latents, words))
    kept = [maps for maps in att.kept if maps is not None]
    expected = [as_pictures(probabilities(a, b), 8) for a, b in zip(q, k, strict=True)]
    assert len(kept) == len(expected) == 9  # three blocks, three steps
    found = torch.stack(kept).mean(0)
    assert torch.allclose(found, torch.stack(expected).mean(0), atol=1e-6)
    assert torch.allclose(found.sum(1), torch.ones(2, 8, 8), atol=1e-5)  # every cell gives all its attention to words


def test_joint_attention_of_words_and_patches(latents, words) -> None:
    model = JointTransformer().eval()

    def per_word(call: AttentionCall) -> Tensor:
        return torch.stack([call.footprint(word, "latents") for word in range(5)], 1)

    with torch.no_grad(), record_attention(model, keep=per_word) as att:
        denoise(model, latents, words)
    with torch.no_grad(), projected(model, "word_qkv") as of_words, projected(model, "image_qkv") as of_cells:
        denoise(model, latents, words)
    assert len(att.kept) == 3
    for maps, a, b in zip(att.kept, of_words, of_cells, strict=True):
        q, k, _ = torch.cat([a, b], 1).chunk(3, -1)
        p = probabilities(q, k)[:, 5:, :5]
        assert torch.allclose(maps, as_pictures(p, 8), atol=1e-6)


def test_the_unet_of_a_diffusion_pipeline(words) -> None:
    """Its words' maps, averaged over steps and layers, are those of its own attention that is written out."""
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=4,
    ).eval()  # fmt: skip

    def per_word(call: AttentionCall) -> Tensor | None:
        if "encoder_hidden_states" not in call.inputs()[1]:
            return None
        return torch.stack([call.footprint(word, "sample") for word in range(5)], 1)

    def drawn() -> list[Tensor]:
        latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        scheduler = DDIMScheduler()
        scheduler.set_timesteps(3)
        with torch.no_grad(), record_attention(unet, keep=per_word) as att:
            for time in scheduler.timesteps:
                latents = scheduler.step(unet(latents, time, words).sample, time, latents).prev_sample
        return [maps for maps in att.kept if maps is not None]

    fused = drawn()
    assert len(fused) == 4 * 3  # one layer on the way down, one in the middle, two on the way up; three steps
    unet.set_attn_processor(AttnProcessor())
    written_out = drawn()
    assert torch.allclose(torch.stack(fused).mean(0), torch.stack(written_out).mean(0), atol=1e-6)
    assert torch.allclose(torch.stack(fused).sum(2), torch.ones(12, 2, 8, 8), atol=1e-5)


def test_the_joint_transformer_of_a_diffusion_pipeline() -> None:
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=12, pos_embed_max_size=8,
    ).eval()  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 16),
        "pooled_projections": torch.randn(2, 12),
        "timestep": torch.tensor([5, 5]),
    }
    att = attention(model, inputs)
    assert [call.describe() for call in att] == [
        "hidden_states 4 x 4 + encoder_hidden_states 5 -> hidden_states 4 x 4 + encoder_hidden_states 5"
    ] * 2
    for call in att:
        mean = call.weights.mean(1)
        assert torch.allclose(
            call.footprint(16 + 3, "hidden_states"), as_pictures(mean[:, :16, 16:], 8)[:, 3], atol=1e-6
        )
        of_image = call.heatmap("encoder_hidden_states", of="hidden_states")
        assert torch.allclose(of_image, 5 * mean[:, :16, 16:].mean(1), atol=1e-6)


def test_the_footprint_of_a_patch_is_a_column(latents, words) -> None:
    (call,) = attention(JointTransformer(), (latents, torch.ones(2), words))
    p = call.weights.mean(1)[:, 5:, 5:]
    assert torch.allclose(call.footprint(5 + 6, "latents"), as_pictures(p, 8)[:, 6], atol=1e-6)
    assert torch.allclose(call.footprint((3, 5), "latents"), as_pictures(p, 8)[:, 6], atol=1e-6)  # row 1, column 2


def test_a_footprint_refuses_what_it_cannot_know(latents, words) -> None:
    (call,) = attention(JointTransformer(), (latents, torch.ones(2), words))
    with pytest.raises(MulticamError, match=r"stand for \['latents', 'words'\]: say which with of=…"):
        call.footprint(0)
    with pytest.raises(MulticamError, match="0 to 20, not 21"):
        call.footprint(21, "latents")
