"""Token ids against what is known without the rules: gradients and the models' own words."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
import transformers as hf
from einops import rearrange, repeat
from torch import Tensor, nn

from multicam import MulticamError, tokens
from multicam.demo.detector import EditDetector
from multicam.watch.tokens.origins import Origins
from tests.helpers.following import Watch, X, after, parts, watched

# Computing: the gradient of a token with respect to the input knows where it comes from.


def boxes_hold_gradients(watch: Watch, y: Tensor, ids: Tensor, x: Tensor, name: str) -> None:
    """The gradient of each row `(rows n e)` of `y` is zero outside the box of its id, and not zero inside."""
    places = watch.places
    for row in (0, len(y) - 1):
        for n in {0, 1, y.shape[1] // 2, y.shape[1] - 1}:
            token = int(ids[row, n])
            (grad,) = torch.autograd.grad(y[row, n].square().sum(), x, retain_graph=True, allow_unused=True)
            touched = torch.zeros_like(x) if grad is None else grad.abs()
            if name not in places.inputs_of(token):
                assert not touched.any()
                continue
            sample = int(places.sample[token])
            low, high = places.boxes[token].view(2, 3)
            inside = [
                slice(round(float(a) * s), round(float(b) * s))
                for a, b, s in zip(low[-2:], high[-2:], x.shape[-2:], strict=True)
            ]
            frames = (
                [slice(round(float(low[0]) * x.shape[1]), round(float(high[0]) * x.shape[1]))] if x.ndim == 5 else []
            )
            part = touched[(sample, *frames, ..., *inside)]
            assert part.any()
            assert part.sum() == pytest.approx(float(touched.sum()))


def small(**options: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return sizes | options


class Joint(nn.Module):
    """Attention over the tokens of two inputs, put together with einops; patches are cut by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.rgb, self.frequency = nn.Linear(3 * 16, 16), nn.Conv2d(8, 16, 1)
        self.token, self.qkv = nn.Parameter(torch.rand(1, 1, 16)), nn.Linear(16, 48)

    def forward(self, rgb: Tensor, frequency: Tensor) -> Tensor:
        patches = self.rgb(rearrange(rgb, "b c (h p) (w q) -> b (h w) (p q c)", p=4, q=4))
        lines = rearrange(self.frequency(frequency), "b c h w -> b (h w) c")
        x = torch.cat([repeat(self.token, "1 n c -> b n c", b=len(rgb)), patches, lines], 1)
        for _ in range(2):
            q, k, v = rearrange(self.qkv(x), "b n (three heads e) -> three b heads n e", three=3, heads=2)
            weights = torch.einsum("b h q e, b h k e -> b h q k", q, k).softmax(-1)
            x = x + rearrange(torch.einsum("b h q k, b h k e -> b h q e", weights, v), "b h n e -> b n (h e)")
        return x


def vit(**options: Any) -> nn.Module:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
    return timm.models.VisionTransformer(**(sizes | options))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        pytest.param(vit, "x", id="vit"),
        pytest.param(
            lambda: timm.models.SwinTransformer(
                img_size=32, patch_size=2, window_size=4, embed_dim=8, depths=(1,), num_heads=(2,)
            ),
            "x",
            id="swin",
        ),
        pytest.param(
            lambda: hf.ViltModel(hf.ViltConfig(vocab_size=60, image_size=32, patch_size=8, **small())),
            "pixel_values",
            id="vilt",
        ),
        pytest.param(
            lambda: hf.VideoMAEModel(hf.VideoMAEConfig(image_size=32, patch_size=8, num_frames=4, **small())),
            "pixel_values",
            id="videomae",
        ),
        pytest.param(Joint, "rgb", id="joint"),
    ],
)
def test_a_token_sees_its_box_and_nothing_else(make: Callable[[], nn.Module], name: str) -> None:
    torch.manual_seed(0)
    model = make().eval()
    shape = (2, 4, 3, 32, 32) if isinstance(model, hf.VideoMAEModel) else (2, 3, 32, 32)
    x = torch.rand(shape, requires_grad=True)
    others = {"input_ids": torch.randint(1, 50, (2, 5))} if name == "pixel_values" and len(shape) == 4 else {}
    others |= {"frequency": torch.rand(2, 8, 3, 3)} if name == "rgb" else {}
    watch = Watch(**{name: x}, **others)
    with watch:
        model(x, **others) if name == "x" else model(**{name: x}, **others)
    q, rows = watch.queries[0], watch.calls[0][0]
    boxes_hold_gradients(watch, q.transpose(1, 2).flatten(2) if q.ndim == 4 else q, rows, x, name)


# Models: what is known about their tokens from their papers.

IMAGES = torch.rand(2, 3, 32, 32)
WORDS = torch.randint(1, 50, (2, 7), generator=torch.Generator().manual_seed(0))

MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor], list[tuple[str, str]]]] = {
    "vit": (vit, {"x": IMAGES}, [("1 own + x 4 x 4",) * 2]),
    "registers": (lambda: vit(reg_tokens=4), {"x": IMAGES}, [("5 own + x 4 x 4",) * 2]),
    "deit distilled": (
        lambda: timm.models.VisionTransformerDistilled(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2),
        {"x": IMAGES},
        [("2 own + x 4 x 4",) * 2],
    ),
    "crossvit": (
        lambda: timm.models.CrossVit(
            img_size=48,
            img_scale=(1.0, 32 / 48),
            patch_size=(8, 16),
            embed_dim=(16, 32),
            depth=((1, 1, 0), (1, 1, 0)),
            num_heads=(2, 2),
            mlp_ratio=(2, 2, 1),
        ),
        {"x": torch.rand(2, 3, 48, 48)},
        [
            ("1 own + x 6 x 6",) * 2,
            ("1 own + x 2 x 2",) * 2,
            ("1 own", "1 own + x 2 x 2"),
            ("1 own", "1 own + x 6 x 6"),
        ],
    ),
    "torchvision vit": (
        lambda: torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64),
        {"x": IMAGES},
        [("1 own + x 4 x 4",) * 2],
    ),
    "timm swin": (
        lambda: timm.models.SwinTransformer(
            img_size=32, patch_size=2, window_size=4, embed_dim=8, depths=(2, 1), num_heads=(2, 2)
        ),
        {"x": IMAGES},
        [("x 4 x 4 of 16 x 16",) * 2, ("x 16 of 16 x 16",) * 2, ("x 4 x 4 of 8 x 8",) * 2],
    ),
    "torchvision swin": (
        lambda: torchvision.models.SwinTransformer([2, 2], 8, [2, 1], [2, 2], [4, 4]),
        {"x": IMAGES},
        [("x 4 x 4 of 16 x 16",) * 2, ("x 16 of 16 x 16",) * 2, ("x 4 x 4 of 8 x 8",) * 2],
    ),
    "padded swin": (
        lambda: hf.SwinModel(
            hf.SwinConfig(image_size=20, patch_size=2, embed_dim=8, depths=[1], num_heads=[2], window_size=4)
        ),
        {"pixel_values": torch.rand(2, 3, 20, 20)},
        [("pixel_values 2 x 2 of 10 x 10 + 12 constant",) * 2],
    ),
    "torchvision maxvit": (
        lambda: torchvision.models.MaxVit((64, 64), 8, 4, [8, 16], [1, 1], 4, 0.0, num_classes=2),
        {"x": torch.rand(2, 3, 64, 64)},
        [("x 4 x 4 of 16 x 16",) * 2, ("x 16 of 16 x 16",) * 2, ("x 4 x 4 of 8 x 8",) * 2, ("x 16 of 8 x 8",) * 2],
    ),
    "pvt": (
        lambda: timm.models.PyramidVisionTransformerV2(
            depths=(1, 1, 1, 1), embed_dims=(8, 8, 8, 8), num_heads=(1, 1, 1, 1)
        ),
        {"x": torch.rand(2, 3, 64, 64)},
        [(f"x {n} x {n}", "x 2 x 2") for n in (16, 8, 4, 2)],
    ),
    "clip": (
        lambda: hf.CLIPModel(
            hf.CLIPConfig(
                text_config=small(vocab_size=60, max_position_embeddings=12, bos_token_id=1, eos_token_id=2),
                vision_config=small(image_size=32, patch_size=8),
            )
        ),
        {"pixel_values": IMAGES, "input_ids": WORDS[[0, 1, 0]]},
        [("1 own + pixel_values 4 x 4",) * 2, ("input_ids 7",) * 2],
    ),
    "lxmert": (
        lambda: hf.LxmertModel(
            hf.LxmertConfig(
                vocab_size=60,
                hidden_size=32,
                num_attention_heads=2,
                intermediate_size=64,
                l_layers=1,
                x_layers=1,
                r_layers=1,
                visual_feat_dim=10,
            )
        ),
        {"input_ids": WORDS, "visual_feats": torch.rand(2, 5, 10), "visual_pos": torch.rand(2, 5, 4)},
        [
            (a, b)
            for words, seen in [("input_ids 7", "visual_feats and visual_pos 5")]
            for a, b in ((words, words), (seen, seen), (words, seen), (seen, words))
        ],
    ),
    "vilt": (
        lambda: hf.ViltModel(hf.ViltConfig(vocab_size=60, image_size=32, patch_size=8, **small())),
        {"input_ids": WORDS, "pixel_values": IMAGES},
        [("input_ids 7 + 1 own + pixel_values 4 x 4",) * 2],
    ),
    "llava": (
        lambda: hf.LlavaModel(
            hf.LlavaConfig(
                vision_config=hf.CLIPVisionConfig(image_size=32, patch_size=8, **small()),
                text_config=hf.LlamaConfig(vocab_size=60, num_key_value_heads=2, **small()),
                image_token_index=59,
            )
        ),
        {"input_ids": torch.cat([torch.full((2, 16), 59), WORDS], 1), "pixel_values": IMAGES},
        [("1 own + pixel_values 4 x 4",) * 2, ("pixel_values 4 x 4 + input_ids 7 of 23",) * 2],
    ),
    "detr": (
        lambda: hf.DetrModel(
            hf.DetrConfig(
                use_timm_backbone=False,
                backbone=None,
                backbone_config=hf.ResNetConfig(
                    embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"]
                ),
                d_model=32,
                encoder_layers=1,
                decoder_layers=2,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=32,
                decoder_ffn_dim=32,
                num_queries=6,
            )
        ),
        {"pixel_values": IMAGES},
        [("pixel_values 4 x 4",) * 2, ("6 own", "6 constant"), ("6 own", "pixel_values 4 x 4"), ("6 own",) * 2],
    ),
    "perceiver": (
        lambda: hf.PerceiverModel(
            hf.PerceiverConfig(
                num_latents=5,
                d_latents=16,
                d_model=12,
                num_blocks=1,
                num_self_attends_per_block=1,
                num_self_attention_heads=2,
                num_cross_attention_heads=2,
            )
        ),
        {"inputs": torch.rand(2, 9, 12)},
        [("5 own", "inputs 9"), ("5 own",) * 2],
    ),
    "timesformer": (
        lambda: hf.TimesformerModel(hf.TimesformerConfig(image_size=32, patch_size=8, num_frames=4, **small())),
        {"pixel_values": torch.rand(2, 4, 3, 32, 32)},
        [("pixel_values 4 x 1 x 1 of 4 x 4 x 4",) * 2, ("1 own + pixel_values 1 x 4 x 4 of 4 x 4 x 4",) * 2],
    ),
    "spectrogram": (
        lambda: hf.ASTModel(hf.ASTConfig(max_length=64, num_mel_bins=32, **small())),
        {"input_values": torch.rand(2, 64, 32)},
        [("2 own + input_values 5 x 2",) * 2],
    ),
    "waveform": (
        lambda: hf.Wav2Vec2Model(
            hf.Wav2Vec2Config(
                conv_dim=[8, 8],
                conv_stride=[5, 4],
                conv_kernel=[10, 4],
                num_feat_extract_layers=2,
                num_conv_pos_embeddings=4,
                num_conv_pos_embedding_groups=2,
                mask_time_prob=0.0,
                **small(),
            )
        ),
        {"input_values": torch.rand(2, 400)},
        [("input_values 19",) * 2],
    ),
    "demo": (
        EditDetector,
        {"rgb": torch.rand(2, 3, 64, 64), "frequency": torch.rand(2, 64, 16, 16), "texture": torch.rand(2, 3, 32, 32)},
        [("rgb 16 x 16", "frequency 16 x 16"), ("rgb 16 x 16", "texture 16 x 16")],
    ),
    "joint": (
        Joint,
        {"rgb": IMAGES, "frequency": torch.rand(2, 8, 3, 3)},
        [("1 own + rgb 8 x 8 + frequency 3 x 3",) * 2],
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_tokens_of_real_models(name: str) -> None:
    make, inputs, expected = MODELS[name]
    torch.manual_seed(0)
    watch = watched(make(), **inputs)
    assert watch.said == expected
    for rows, _ in watch.calls:
        placed = (rows > 0) & (watch.places.inputs[rows.clamp(min=0)] > 0)
        samples = watch.places.sample[rows]
        assert (samples.amax(1, keepdim=True) == samples)[placed].all(), "a row belongs to one sample"
        for row in rows:
            assert len(set(row[row > 0].tolist())) == int((row > 0).sum()), "no token comes twice"


# Case by case.


def test_inputs_that_meet_in_place_are_joined() -> None:
    watch = Watch(rgb=X, depth=(depth := torch.rand(2, 1, 16, 16)), tabular=(row := torch.rand(2, 3)))
    with torch.inference_mode(), watch:
        early = F.conv2d(torch.cat([X, depth], 1), torch.rand(4, 4, 4, 4), stride=4)
        late = F.conv2d(X, torch.rand(3, 3, 4, 4), stride=4) + F.conv2d(depth, torch.rand(3, 1, 4, 4), stride=4)
        film = late * row[:, :, None, None]
        assert len(watch.places) < 4, "nobody asked for pixels"
        token = torch.cat([row[:, None], late.flatten(2).mT], 1)
    for y in (early, late, film):
        assert parts(watch.origins, y, 1) == ["rgb and depth 4 x 4"] * 2
    assert torch.equal(watch.origins.ids(late, 1), watch.origins.ids(film, 1))
    with watch:
        q = token @ torch.rand(3, 5)
    assert parts(watch.origins, q, -1) == ["1 of the whole tabular + rgb and depth 4 x 4"] * 2


def test_a_clip_is_followed_whichever_axis_is_time() -> None:
    weight = torch.rand(4, 3, 8, 8)
    for shape, fold in (((2, 4, 3, 16, 16), lambda x: x), ((2, 3, 4, 16, 16), lambda x: x.transpose(1, 2))):
        origins, y = after(lambda x, fold=fold: F.conv2d(fold(x).flatten(0, 1), weight, stride=8), torch.rand(shape))
        assert len(origins.places) == 1
        ids = origins.ids(y, 1)
        assert [origins.places.describe(frame) for frame in ids] == ["x 1 x 2 x 2 of 4 x 2 x 2"] * 8
        assert origins.places.boxes[ids[6, 1, 0]].tolist() == [0.5, 0.5, 0, 0.75, 1, 0.5]
        assert origins.places.sample[ids].flatten(1).tolist() == [[s] * 4 for s in (0, 0, 0, 0, 1, 1, 1, 1)]


def test_three_axes_are_features_a_signal_or_an_image() -> None:
    x = torch.rand(2, 8, 6)
    readings: list[tuple[Callable[[Tensor], Tensor], tuple[int, ...], str]] = [
        (lambda x: F.linear(x, torch.rand(5, 6)), (-1,), "x 8"),
        (lambda x: F.conv1d(x, torch.rand(5, 8, 3), padding=1, stride=2), (1,), "x 3"),
        (lambda x: F.conv2d(x[:, None], torch.rand(5, 1, 2, 2), stride=2), (1,), "x 4 x 3"),
        (lambda x: F.conv2d(x[:, None].mT, torch.rand(5, 1, 2, 2), stride=2), (1,), "x 4 x 3"),
    ]
    for read, but, words in readings:
        assert parts(*after(read, x), *but) == [words] * 2


def test_a_vector_can_be_a_token() -> None:
    row = torch.rand(2, 3)
    origins, y = after(lambda row: torch.cat([torch.zeros(2, 1, 3), row[:, None]], 1) @ torch.rand(3, 4), row)
    assert parts(origins, y, -1) == ["1 own + 1 of the whole x"] * 2


def test_in_place_on_a_part_reaches_the_whole_and_out_the_result() -> None:
    def op(x: Tensor) -> Tensor:
        y, z = torch.zeros(2, 17, 3), torch.empty(2, 17, 3)
        y[:, 1:].add_(x[:, :, :4, :4].flatten(2).mT)
        return torch.mul(y, 2.0, out=z)

    assert parts(*after(op, X), -1) == ["1 constant + x 4 x 4 of 16 x 16"] * 2


def test_class_tokens_belong_to_the_sample_of_their_row() -> None:
    def windows(x: Tensor) -> Tensor:
        tokens = rearrange(x, "b c (i h) (j w) -> (i b j) (h w) c", i=2, j=2)
        return torch.cat([torch.zeros(8, 1, 3), tokens], 1)

    origins, y = after(windows, X)
    assert origins.places.sample[origins.ids(y, -1)[:, 0]].tolist() == [0, 0, 1, 1] * 2
    origins, y = after(
        lambda x: torch.cat([torch.zeros(1, 1, 3), x.flatten(0, 0).flatten(2).mT.flatten(0, 1)[None]], 1), X
    )
    assert origins.ids(y, -1)[0, 0] == -1, "a row of two samples"


def test_given_ids_are_kept_and_tokens_of_the_models_own_are_fresh() -> None:
    watch = Watch(x=X)
    queries, out = torch.rand(2, 5, 4), torch.rand(2, 2, 5, 2)
    assert (watch.origins.ids(queries) == 0).all()
    mine = watch.origins.fresh(2, 5)
    watch.origins.give(out, mine, 1, -1)
    assert torch.equal(watch.origins.ids(out, 1, 3), mine)
    with watch:
        y = queries + out.transpose(1, 2).flatten(2)
    assert torch.equal(watch.origins.ids(y, 2), mine)
    assert watch.places.sample[mine].tolist() == [[0] * 5, [1] * 5]
    assert watch.places.describe(mine[0]) == "5 own"
    assert (watch.origins.fresh(4, 5) == -1).all(), "four rows, two samples: nobody says whose"
    windows = watch.origins.fresh(4, 1, torch.tensor([0, 0, 1, 1]))
    assert watch.places.sample[windows].tolist() == [[0], [0], [1], [1]]
    assert not set(mine.flatten().tolist()) & set(watch.origins.fresh(2, 5).flatten().tolist())


def test_an_operation_that_no_rule_expects_is_lost_and_does_not_raise() -> None:
    origins = Origins({"x": X}, 2)
    y = torch.rand(2, 3, 7)
    origins.follow(torch.ops.aten.view.default, (X, [2, 3, 7]), {}, y)
    assert (origins.ids(y) == -1).all()
    assert torch.equal(X, X.clone())


def test_nothing_stays_with_the_tensors_of_the_user() -> None:
    x = X.clone()
    before = set(vars(x))
    watched(vit(img_size=16), x)
    assert set(vars(x)) == before
    assert not x.requires_grad and x.grad is None


def test_tokens_of_an_input_lie_as_the_user_says_the_same_every_time() -> None:
    origins = Origins({"x": X, "ids": torch.ones(2, 5, dtype=torch.int64)}, 2)
    said = origins.said("x", tokens(2, 3, prefix=1), 2, 7)
    assert [origins.places.describe(row) for row in said] == ["1 own + x 2 x 3"] * 2
    assert torch.equal(origins.places.sample[said], torch.arange(2)[:, None].expand(2, 7))
    assert origins.places.cells(said[1, 1:], "x")[1].tolist() == [*range(6)]
    assert torch.equal(origins.said("x", tokens(2, 3, prefix=1), 2, 7), said)
    assert origins.places.describe(origins.said("ids", None, 2, 5)[1]) == "ids 5"
    for name, layout, rows, n, message in (
        ("y", None, 2, 5, "no input in streams 'y'"),
        ("x", None, 2, 6, r"names input 'x', whose layout is needed"),
        (
            "x",
            tokens(2, 3),
            2,
            7,
            "does not fit 7 tokens in 2 rows for 2 samples: it takes 7 of them for a grid of 2 x 3",
        ),
        ("x", tokens(6), 2, 6, "does not fit 6 tokens"),
        ("x", tokens(2, 3), 4, 6, "does not fit 6 tokens in 4 rows for 2 samples"),
    ):
        with pytest.raises(MulticamError, match=message):
            origins.said(name, layout, rows, n)


def test_an_operation_in_place_that_keeps_the_tokens_needs_no_ids_of_pixels() -> None:
    origins, y = after(lambda x: F.conv2d((z := x.clone()).detach().relu_() + z, torch.rand(4, 3, 4, 4), stride=4), X)
    assert len(origins.places) == 1
    assert parts(origins, y, 1) == ["x 4 x 4"] * 2
