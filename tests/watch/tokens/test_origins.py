"""Token ids against what is known without the rules: values that are their own place, gradients, and the models' own words."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
import transformers as hf
from einops import rearrange, repeat
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from multicam.call.inputs import Inputs
from multicam.demo.detector import EditDetector
from multicam.watch.tokens.origins import Origins


class Watch(TorchDispatchMode):
    """A recorder in miniature: the queries and keys of every attention, with their ids."""

    def __init__(self, **leaves: Tensor) -> None:
        super().__init__()
        self.origins = Origins(leaves, len(next(iter(leaves.values()))))
        self.places = self.origins.places
        self.calls: list[tuple[Tensor, Tensor]] = []
        self.queries: list[Tensor] = []
        self.waiting: tuple[Tensor, Tensor] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # PyTorch would take resizing apart into its corners, whose union has no grid.
        if torch.is_inference_mode_enabled() and not func._opname.startswith("upsample"):
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        self.origins._follow(func, args, kwargs, out)  # `follow` lets no error of a rule through
        if func._opname.startswith("_scaled_dot_product"):
            q, k = args[:2]
            rows = self.record(q, k, (1, 3), (1, 3))
            self.origins.give(out[0], rows, 1, 3)
        elif func._opname in ("bmm", "baddbmm"):
            a, b = args[-2:]
            if self.waiting is not None and a.shape == (*self.waiting[0].shape, self.waiting[1].shape[1]):
                self.origins.give(out, self.waiting[0], 2)
                self.waiting = None
            elif (self.origins.ids(b) > 0).any():
                self.waiting = self.record(a, b, (2,), (1,)), self.calls[-1][1]
        return out

    def record(self, q: Tensor, k: Tensor, of_q: tuple[int, ...], of_k: tuple[int, ...]) -> Tensor:
        rows, columns = self.origins.ids(q, *of_q), self.origins.ids(k, *of_k)
        if (rows == 0).all():
            rows = self.origins.fresh(*rows.shape, samples=self.places.sample[columns.amax(1)] if columns.any() else None)
        self.calls.append((rows, columns))
        self.queries.append(q)
        return rows

    @property
    def said(self) -> list[tuple[str, str]]:
        """Queries and keys of the last row of every call in words, repetitions left out."""
        words = [(self.places.describe(q[-1]), self.places.describe(k[-1])) for q, k in self.calls]
        return [word for i, word in enumerate(words) if word not in words[:i]]


def watched(model: nn.Module, *args: Any, **kwargs: Any) -> Watch:
    leaves = {name: x for name, x in Inputs(*args, **kwargs).bind(model).leaves.items() if isinstance(x, Tensor)}
    watch = Watch(**leaves)
    with watch:  # with gradients, so that PyTorch's fast path for transformers, one operation, does not run
        model.eval()(*args, **kwargs)
    return watch


def after(op: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Origins, Tensor]:
    watch = Watch(x=x)
    with torch.inference_mode(), watch:
        y = op(x)
    return watch.origins, y


# Rearranging: each entry of the input is its own id, so the ids that come out must be the values that come out.

MOVES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "transpose": lambda x, i: x.transpose(i % x.ndim, (i + 1) % x.ndim),
    "permute": lambda x, i: x.permute(*range(1, x.ndim), 0),
    "flatten": lambda x, i: x.flatten(1),
    "merge": lambda x, i: x.flatten(i % (x.ndim - 1), i % (x.ndim - 1) + 1) if x.ndim > 2 else x,
    "divide": lambda x, i: x.unflatten(i % x.ndim, (2, -1)) if x.shape[i % x.ndim] % 2 == 0 and x.ndim < 6 else x,
    "roll": lambda x, i: x.roll((i, -1), (i % x.ndim, (i + 1) % x.ndim)),
    "flip": lambda x, i: x.flip(i % x.ndim),
    "slice": lambda x, i: x.narrow(i % x.ndim, 1, x.shape[i % x.ndim] - 1) if x.shape[i % x.ndim] > 2 else x,
    "step": lambda x, i: x[..., i % 2 :: 2] if x.shape[-1] > 2 else x,
    "pad": lambda x, i: F.pad(x, (i, 1, 0, 1), value=0) if varied(x) else x,
    "crop": lambda x, i: F.pad(x, (-1, 1)) if x.shape[-1] > 2 and varied(x) else x,
    "split": lambda x, i: torch.cat(x.split(1 + i % 3, i % x.ndim)[::-1], i % x.ndim),
    "stack": lambda x, i: torch.stack([x.select(0, 0), x.select(0, -1)], i % x.ndim),
    "unbind": lambda x, i: torch.cat(x.unbind(i % x.ndim), 0) if x.ndim > 2 else x,
    "repeat": lambda x, i: x.repeat(*([1] * (x.ndim - 1)), 2) if x.numel() < 500 else x,
    "repeat_interleave": lambda x, i: x.repeat_interleave(2, i % x.ndim) if x.numel() < 500 else x,
    "expand": lambda x, i: x[None].expand(2, *x.shape).flatten(0, 1) if x.numel() < 500 else x,
    "index": lambda x, i: x[:, torch.arange(x.shape[1]).flip(0)],
    "two indices": lambda x, i: x[torch.arange(2)[:, None] % len(x), torch.arange(3)[None] % x.shape[1]],
    "mask": lambda x, i: x[:, torch.arange(x.shape[1]) % 2 == 0],
    "gather": lambda x, i: x.gather(-1, (torch.arange(x.shape[-1]).flip(0) % x.shape[-1]).expand(x.shape)),
    "index_select": lambda x, i: x.index_select(i % x.ndim, torch.tensor([0, x.shape[i % x.ndim] - 1, 0])),
    "masked_select": lambda x, i: x.masked_select(x % 3 != 0).view(1, -1) if (x % 3 != 0).any() else x,
    "unfold": lambda x, i: x.unfold(-1, 2, 1).flatten(-2) if x.shape[-1] > 2 and x.numel() < 500 else x,
    "as_strided": lambda x, i: x.contiguous().as_strided((2, 2), (x.numel() // 2, 1)) if x.numel() > 3 else x,
    "write": lambda x, i: written(x, lambda y: y.narrow(i % x.ndim, 0, 1).copy_(x.narrow(i % x.ndim, -1, 1))),
    "write a view of a view": lambda x, i: written(x, lambda y: y.transpose(0, 1)[0].copy_(x.transpose(0, 1)[-1])),
    "put": lambda x, i: written(x, lambda y: y.__setitem__(torch.tensor([0]), x[-1:])),
    "slice_scatter": lambda x, i: x.slice_scatter(x.narrow(0, len(x) - 1, 1), 0, 0, 1),
    "contiguous": lambda x, i: x.mT.contiguous().clone(),
    "masked_scatter": lambda x, i: torch.zeros_like(x).masked_scatter(torch.ones_like(x, dtype=torch.bool), x.flip(0)),
}


def varied(x: Tensor) -> bool:
    """Whether no axis looks like features: along these, what is added to a token becomes a part of it."""
    return all(bool((x != x.narrow(axis, 0, 1)).any()) for axis in (-1, -2))


def written(x: Tensor, write: Callable[[Tensor], Any]) -> Tensor:
    y = torch.zeros_like(x)
    y[:] = x
    write(y)
    return y


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(MOVES)), st.integers(0, 3)), max_size=8))
def test_ids_go_where_the_entries_go(moves: list[tuple[str, int]]) -> None:
    def chain(x: Tensor) -> Tensor:
        for name, i in moves:
            x = MOVES[name](x, i)
        return x

    origins, y = after(chain, torch.arange(1, 2 * 4 * 6 + 1).view(2, 4, 6))
    assert torch.equal(origins.ids(y), y)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(set(MOVES) - {"masked_select", "crop", "pad"})), st.integers(0, 3)), max_size=4
    )
)
def test_pixels_go_where_their_values_go_in_every_channel(moves: list[tuple[str, int]]) -> None:
    def chain(x: Tensor) -> Tensor:
        for name, i in moves:
            x = MOVES[name](x, i)
        return x

    x = torch.arange(1.0, 2 * 4 * 6 + 1).view(2, 1, 4, 6).expand(2, 3, 4, 6).contiguous()
    origins, y = after(chain, x)
    assert torch.equal(origins.ids(y).float(), y)


@pytest.mark.parametrize("move", sorted(MOVES))
@pytest.mark.parametrize("i", [0, 1, 2])
def test_every_move_alone(move: str, i: int) -> None:
    origins, y = after(lambda x: MOVES[move](x, i), torch.arange(1, 49).view(2, 4, 6))
    assert torch.equal(origins.ids(y), y)


@pytest.mark.parametrize(
    "op",
    [
        pytest.param(lambda x: F.unfold(x, 2, stride=2), id="unfold"),
        pytest.param(
            lambda x: F.unfold(x, (2, 3), dilation=(1, 2), padding=1, stride=(1, 2)), id="unfold with all options"
        ),
        pytest.param(lambda x: F.pixel_unshuffle(x, 2), id="pixel_unshuffle"),
        pytest.param(lambda x: F.pixel_shuffle(x, 2), id="pixel_shuffle"),
        pytest.param(lambda x: F.pad(x, (1, 2, 2, 1), mode="reflect"), id="reflect"),
        pytest.param(lambda x: F.pad(x, (1, 2, 2, 1), mode="replicate"), id="replicate"),
        pytest.param(lambda x: F.pad(x, (1, 2, 2, 1), mode="circular"), id="circular"),
        pytest.param(lambda x: rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=2, q=3), id="patches"),
        pytest.param(lambda x: rearrange(x, "b c (h p) (w q) -> (b p q) h w c", p=2, q=3), id="grid windows"),
        pytest.param(lambda x: repeat(x, "b c h w -> (b t) h w c", t=2), id="repeat"),
        pytest.param(lambda x: torch.stack([x, x.flip(-1)], 1).flatten(0, 1), id="pairs"),
        pytest.param(lambda x: F.pad(x, (0, 0, 1, 1))[:, :, 1:-1].relu() * 1.0, id="pad and cut"),
    ],
)
def test_images_are_rearranged_exactly(op: Callable[[Tensor], Tensor]) -> None:
    x = torch.arange(1.0, 49).view(2, 1, 4, 6).expand(2, 4, 4, 6).contiguous()
    origins, y = after(op, x)
    assert torch.equal(origins.ids(y).float(), y)


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


# What computes, case by case.

X = torch.rand(2, 3, 16, 16)


def parts(origins: Origins, y: Tensor, *but: int) -> list[str]:
    """The tokens of each row in words."""
    return [origins.places.describe(row) for row in origins.ids(y, *but)]


CONV = torch.rand(4, 3, 3, 3)


@pytest.mark.parametrize(
    ("op", "words"),
    [
        pytest.param(lambda x: F.conv2d(x, CONV, padding=1), "x 16 x 16", id="same size"),
        pytest.param(lambda x: F.conv2d(x, CONV, stride=2, padding=1), "x 8 x 8", id="strided"),
        pytest.param(lambda x: F.conv2d(F.pad(x, (0, 1, 0, 1)), CONV, stride=2), "x 8 x 8", id="padded by hand"),
        pytest.param(lambda x: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), CONV), "x 16 x 16", id="mirrored"),
        pytest.param(
            lambda x: F.conv2d(F.pad(x, (0, 8, 0, 0)), torch.rand(4, 3, 8, 8), stride=8)[..., :2],
            "x 2 x 2",
            id="patches of a padded image",
        ),
        pytest.param(lambda x: F.conv_transpose2d(x, torch.rand(3, 4, 2, 2), stride=2), "x 32 x 32", id="transposed"),
        pytest.param(
            lambda x: F.interpolate(F.max_pool2d(x, 4), size=(8, 8), mode="bilinear"),
            "x 8 x 8",
            id="pooled and resized",
        ),
        pytest.param(lambda x: F.adaptive_avg_pool2d(x, (3, 5)), "x 3 x 5", id="adaptive pooling"),
        pytest.param(lambda x: F.adaptive_avg_pool2d(x, 1), "1 of the whole x", id="pooled away"),
        pytest.param(lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(), "x 16 x 16", id="squeeze and excitation"),
        pytest.param(
            lambda x: (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True), "x 16 x 16", id="norm over channels"
        ),
        pytest.param(
            lambda x: F.batch_norm(x, torch.zeros(3), torch.ones(3)).relu_().add_(1),
            "x 16 x 16",
            id="batch norm and in place",
        ),
        pytest.param(
            lambda x: F.conv2d(torch.cat([x, x.flip(1), torch.ones(2, 1, 16, 16)], 1), torch.rand(4, 7, 1, 1)),
            "x 16 x 16",
            id="channels beside channels",
        ),
        pytest.param(
            lambda x: F.conv2d(F.pixel_unshuffle(x, 2), torch.rand(4, 12, 1, 1)), "x 8 x 8", id="space to depth"
        ),
        pytest.param(
            lambda x: F.avg_pool2d(F.conv2d(x, CONV, padding=1), 2) + F.conv2d(x, CONV, stride=2, padding=1),
            "x 8 x 8",
            id="two ways to one grid",
        ),
        pytest.param(lambda x: torch.where(x > 0.5, x, torch.zeros(())), "x 16 x 16", id="where"),
        pytest.param(
            lambda x: F.dropout(x, 0.5).clamp(0, 1).lerp(torch.ones(()), 0.1), "x 16 x 16", id="element by element"
        ),
        pytest.param(lambda x: torch.fft.fft2(x).real, "256 unknown", id="a transform"),
        pytest.param(
            lambda x: F.grid_sample(x, torch.zeros(2, 16, 16, 2), align_corners=False), "256 unknown", id="warped"
        ),
        pytest.param(lambda x: x + x.flip(0), "256 unknown", id="samples mixed"),
        pytest.param(lambda x: x - x.mean(0, keepdim=True), "x 16 x 16", id="statistics of the batch"),
        pytest.param(lambda x: x.sort(-1).values, "256 unknown", id="sorted"),
        pytest.param(lambda x: torch.zeros_like(x), "256 constant", id="constants"),
    ],
)
def test_operations_on_images(op: Callable[[Tensor], Tensor], words: str) -> None:
    origins, y = after(op, X)
    assert parts(origins, y, 1) == [words] * 2


def test_what_shifts_becomes_what_covers_both() -> None:
    """Never the first of two places: that would be silently wrong about the other."""
    origins, y = after(lambda x: x + x.roll(1, -1), X)
    box = origins.places.boxes[origins.ids(y, 1)][0, 3, 5]
    assert torch.equal(box, torch.tensor([0, 3, 4, 16, 4, 6]).double() / torch.tensor([1, 16, 16, 16, 16, 16]))


def test_all_pairs_are_lost_but_conditions_are_not() -> None:
    def pairs(x: Tensor) -> Tensor:
        tokens = x.flatten(2).mT
        return tokens[:, :, None] + tokens[:, None]

    def conditioned(x: Tensor) -> Tensor:
        shift = torch.sort(x.mean((2, 3))).values[:, None]  # lost, but the same for all tokens
        return x.flatten(2).mT * 2 + shift

    assert parts(*after(pairs, X[:, :, :4, :4]), -1) == ["256 unknown"] * 2
    assert parts(*after(conditioned, X), -1) == ["x 16 x 16"] * 2


def test_mixed_tokens_are_the_union_of_what_is_mixed() -> None:
    def mixer(x: Tensor) -> Tensor:
        tokens = x.flatten(2)
        return tokens.mT + (tokens @ torch.rand(256, 256)).mT

    def merged(x: Tensor) -> Tensor:
        grid = x.permute(0, 2, 3, 1)
        four = torch.cat([grid[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], -1)
        return F.linear(four, torch.rand(6, 12)).flatten(1, 2)

    assert parts(*after(lambda x: (x.flatten(2) @ torch.rand(256, 9)).mT, X), -1) == ["9 of the whole x"] * 2
    assert parts(*after(mixer, X), -1) == ["x 16 x 16"] * 2
    assert parts(*after(merged, X), -1) == ["x 8 x 8"] * 2


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
        (lambda x: F.conv1d(x, torch.rand(5, 8, 3), padding=1, stride=2), (1,), "x 1 x 3"),
        (lambda x: F.conv2d(x[:, None], torch.rand(5, 1, 2, 2), stride=2), (1,), "x 4 x 3"),
        (lambda x: F.conv2d(x[:, None].mT, torch.rand(5, 1, 2, 2), stride=2), (1,), "x 4 x 3"),
    ]
    for read, but, words in readings:
        assert parts(*after(read, x), *but) == [words] * 2


def test_a_row_that_is_repeated_over_columns_has_no_columns() -> None:
    def op(x: Tensor) -> Tensor:
        rows = x.mean(3, keepdim=True).expand(2, 3, 16, 16)
        return F.avg_pool2d(rows, 2)

    assert parts(*after(op, X), 1) == ["64 unknown"] * 2


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
