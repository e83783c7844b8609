"""Grids that a pass shows: each cell holds the entries that depend on its part of the input, and on no other."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn

from multicam import HiResCAM, Inputs, Layer, MulticamError, Trace, tokens
from multicam.watch.placing import Placed
from multicam.watch.reshape import positions, put_back
from multicam.watch.survey import located, located_for_any_number
from tests.helpers.models import seeded

Arrange = Callable[[Tensor], Tensor]


class Arranged(nn.Module):
    """Patches of pictures as tokens `(b n c)` in some arrangement, and a layer that leaves them apart."""

    def __init__(self, arrange: Arrange, patches: nn.Module | None = None) -> None:
        super().__init__()
        self.patches = patches or nn.Conv2d(3, 4, 4, 4)
        self.layer, self.head = nn.Tanh(), nn.Linear(4, 2)
        self.register = nn.Parameter(torch.rand(1, 1, 4))
        self.arrange = arrange

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(self.arrange(self.patches(x)))
        return self.head(y.flatten(1).unfold(1, 4, 4).mean(1))


def row_by_row(x: Tensor) -> Tensor:
    return rearrange(x, "b c h w -> b (h w) c")


def with_registers(where: str) -> Arrange:
    def arrange(x: Tensor) -> Tensor:
        flat, extra = row_by_row(x), torch.rand(1, 2, x.shape[1]).expand(len(x), -1, -1)
        parts = {"front": [extra, flat], "behind": [flat, extra], "middle": [flat[:, :5], extra, flat[:, 5:]]}
        return torch.cat(parts[where], 1)

    return arrange


def in_units(x: Tensor) -> Tensor:
    """The order of Hiera: the four tokens of a unit lie together, and units one after the other."""
    return rearrange(x, "b c (h i) (w j) -> b (h w i j) c", i=2, j=2)


def in_windows(x: Tensor) -> Tensor:
    return rearrange(x, "b c (h i) (w j) -> (b h w) (i j) c", i=2, j=2)


ARRANGEMENTS: dict[str, Arrange] = {
    "as they are": lambda x: x,
    "row by row": row_by_row,
    "column by column": lambda x: rearrange(x, "b c h w -> b (w h) c"),
    "from the last": lambda x: row_by_row(x).flip(1),
    "sequence first": lambda x: rearrange(x, "b c h w -> (h w) b c"),
    "channels last": lambda x: rearrange(x, "b c h w -> b h w c"),
    "width first": lambda x: rearrange(x, "b c h w -> b c w h"),
    "units": in_units,
    "windows": in_windows,
    "windows of all samples": lambda x: rearrange(x, "b c (h i) (w j) -> (h w b) (i j) c", i=2, j=2),
    "shifted": lambda x: in_units(x.roll((-1, -1), (2, 3))),
    "registers in front": with_registers("front"),
    "registers behind": with_registers("behind"),
    "registers in the middle": with_registers("middle"),
    "shuffled": lambda x: row_by_row(x)[:, torch.randperm(24, generator=torch.Generator().manual_seed(0))],
    "every other": lambda x: row_by_row(x)[:, ::2],
    "heads": lambda x: rearrange(x, "b (heads e) h w -> b heads (h w) e", heads=2),
    "two of each": lambda x: torch.stack([row_by_row(x), -row_by_row(x)], 2).flatten(1, 2),
    "four to a pixel": lambda x: nn.functional.pixel_unshuffle(x, 2),
}


def outputs(model: nn.Module, x: Tensor, path: str) -> Tensor:
    """What a layer returns, with its graph."""
    kept: list[Tensor] = []
    hook = model.get_submodule(path).register_forward_hook(lambda module, args, output: kept.append(output))
    model(x)
    hook.remove()
    return kept[0]


def grid_of(model: nn.Module, x: Any, path: str = "layer", **said: Any) -> Placed:
    call = Inputs.of(x).bind(model)
    reshape = located(model, call, {"": Layer(path, **said)})[""].reshape
    assert isinstance(reshape, Placed)
    return reshape


def assert_each_cell_sees_its_own_part(model: nn.Module, x: Tensor, path: str = "layer") -> Placed:
    """By gradients: the entries of a cell depend on the pixels of its part and on no others."""
    reshape = grid_of(model, x, path)
    given = x.clone().requires_grad_()
    cells = reshape(outputs(model, given, path))
    assert cells.shape[0] == len(x) and tuple(cells.shape[2:]) == reshape.grid
    parts = [torch.arange(size) * cells.shape[2 + i] // size for i, size in enumerate(x.shape[2:])]
    assert cells.shape[2:].numel() > 1
    for cell in range(cells.shape[2:].numel()):
        at = torch.unravel_index(torch.tensor(cell), cells.shape[2:])
        (gradient,) = torch.autograd.grad(cells.flatten(2)[-1, :, cell].square().sum(), given, retain_graph=True)
        reached = (gradient[-1] != 0).any(0)
        own = torch.ones_like(reached)
        for axis, (part, index) in enumerate(zip(parts, at, strict=True)):
            shape = [-1 if i == axis else 1 for i in range(own.ndim)]
            own &= (part == index).view(shape)
        absent = bool((reshape.cells[-1] < 0).all(0)[cell])
        assert torch.equal(reached, own & (not absent)), at
        assert not gradient[:-1].any()
    return reshape


@pytest.mark.parametrize("name", ARRANGEMENTS)
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_wherever_tokens_go_their_cells_are_found(name: str, batch: int) -> None:
    model = seeded(lambda: Arranged(ARRANGEMENTS[name])).eval()
    reshape = assert_each_cell_sees_its_own_part(model, torch.rand(batch, 3, 16, 24))
    assert reshape.grid == (4, 6)
    many = [3] if name in ("windows of all samples",) else [1, 2, 5]
    call = Inputs.of(torch.rand(batch, 3, 16, 24)).bind(model)
    general = located_for_any_number(model, call, {"": Layer("layer")})[""].reshape
    for n in many:
        x = torch.rand(n, 3, 16, 24)
        found, expected = general(outputs(model, x, "layer")), grid_of(model, x)(outputs(model, x, "layer"))
        assert torch.equal(found, expected)


def test_what_is_put_back_is_where_it_was() -> None:
    for name, arrange in ARRANGEMENTS.items():
        model = seeded(lambda arrange=arrange: Arranged(arrange)).eval()
        x = torch.rand(2, 3, 16, 24)
        out = outputs(model, x, "layer").detach()
        reshape = grid_of(model, x)
        changed = put_back(reshape, out, reshape(out) + 1)
        there = positions(reshape, out)
        expected = out.flatten().clone()
        expected[there[there >= 0]] += 1
        assert torch.equal(changed, expected.view(out.shape)), name


class Clip(nn.Module):
    """A clip or a volume of which some axes are folded into the batch or into channels."""

    def __init__(self, kind: str, channels: int = 3) -> None:
        super().__init__()
        self.kind = kind
        self.layer = nn.Conv3d(channels, 4, 2, 2) if kind == "volume" else nn.Conv2d(channels, 4, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        b = len(x)
        if self.kind == "volume":
            return self.layer(x).mean((2, 3, 4))
        frames = {
            "frames second": lambda: x.flatten(0, 1),
            "frames third": lambda: x.transpose(1, 2).flatten(0, 1),
            "frames apart": lambda: rearrange(x, "b t c h w -> (t b) c h w"),
        }[self.kind]()
        y = self.layer(frames)
        return y.view(b, -1, 4, *y.shape[2:]).mean((1, 3, 4)) if "apart" not in self.kind else y[:b].mean((2, 3))


@pytest.mark.parametrize(
    ("kind", "shape", "channels", "size"),
    [
        ("volume", (4, 6, 8, 4), 4, (6, 8, 4)),
        ("volume", (4, 3, 8, 4), 4, (3, 8, 4)),
        ("volume", (3, 4, 8, 4), 3, (4, 8, 4)),
        ("volume", (1, 6, 8, 4), 1, (6, 8, 4)),
        ("volume", (2, 75, 8, 4), 2, (75, 8, 4)),
        ("frames second", (5, 3, 8, 4), 3, (5, 8, 4)),
        ("frames second", (3, 3, 8, 4), 3, (3, 8, 4)),
        ("frames second", (3, 5, 8, 4), 5, (3, 8, 4)),
        ("frames third", (3, 5, 8, 4), 3, (5, 8, 4)),
        ("frames third", (3, 3, 8, 4), 3, (3, 8, 4)),
        ("frames apart", (3, 3, 8, 4), 3, (3, 8, 4)),
        ("frames apart", (6, 1, 8, 4), 1, (6, 8, 4)),
    ],
)
def test_the_axis_that_a_convolution_takes_for_channels_is_that_of_channels(
    kind: str, shape: tuple[int, ...], channels: int, size: tuple[int, ...]
) -> None:
    model, x = seeded(lambda: Clip(kind, channels)).eval(), torch.rand(2, *shape)
    found = HiResCAM(model, "layer")(x, 1, signed=True)
    assert found.shape == (2, *size)
    reshape = grid_of(model, x)
    out = outputs(model, x, "layer")
    if kind != "volume":
        order = "t b" if "apart" in kind else "b t"
        expected = rearrange(out, f"({order}) c h w -> b c t h w", b=2)
        assert torch.equal(reshape(out), expected)
    else:
        assert torch.equal(reshape(out), out)


def test_views_that_are_left_out_have_no_evidence() -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 2, 2)

        def forward(self, views: Tensor) -> Tensor:
            return self.layer(views[:, 1]).mean((2, 3))

    model, views = seeded(First), torch.rand(2, 3, 3, 8, 8)
    found = HiResCAM(model, "layer")(views, 1, signed=True)
    assert found.shape == (2, 3, 8, 8)
    peak = found.abs().flatten(2).amax(2)
    assert (peak[:, 1] > 0).all()
    acts = Trace(model, views, {"": "layer"}, 1).sites[""].acts
    assert not acts[:, :, [0, 2]].any() and acts[:, :, 1].any()


def test_two_pictures_side_by_side_have_a_grid_each() -> None:
    class Mosaic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 4, 4)

        def forward(self, prompt: Tensor, photo: Tensor) -> Tensor:
            return self.layer(torch.cat([prompt, photo], 2)).mean((2, 3))

    model, call = seeded(Mosaic), {"prompt": torch.rand(2, 3, 8, 16), "photo": torch.rand(2, 3, 8, 16)}
    out = model.layer(torch.cat([*call.values()], 2))
    for name, part in (("prompt", out[:, :, :2]), ("photo", out[:, :, 2:])):
        assert torch.equal(grid_of(model, call, onto=name)(out), part)
    with pytest.raises(
        MulticamError, match=r"places of several inputs.*onto='prompt' \(2 x 4\), onto='photo' \(2 x 4\)"
    ):
        grid_of(model, call)


def test_merged_patches_are_a_grid_of_what_they_merge() -> None:
    class Merging(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.layer = nn.Conv2d(3, 4, 2, 2), nn.LayerNorm(16)
            self.reduction = nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.patches(x).permute(0, 2, 3, 1)
            y = nn.functional.pad(y, (0, 0, 0, y.shape[2] % 2, 0, y.shape[1] % 2))
            four = [y[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
            return self.reduction(self.layer(torch.cat(four, -1))).mean((1, 2))

    model, x = seeded(Merging), torch.rand(2, 3, 16, 24)
    assert_each_cell_sees_its_own_part(model, x)
    assert grid_of(model, x, "reduction").grid == (4, 6)
    odd = torch.rand(
        2, 3, 12, 20
    )  # 6 x 10 patches, 3 x 5 merged; then 3 x 5 is odd, and the padding reaches over the edge
    assert grid_of(model, odd, "reduction").grid == (3, 5)
    padded = torch.rand(2, 3, 12, 18)
    reshape = grid_of(model, padded, "reduction")
    assert reshape.grid == (3, 5) and reshape.sides[1] == pytest.approx(2 / 9)
    steps = torch.arange(5.0).expand(1, 3, 5)
    laid = reshape.laid(steps)
    assert laid.shape == (1, 12, 18)
    torch.testing.assert_close(laid, nn.functional.interpolate(steps[:, None], (12, 20), mode="bilinear")[:, 0, :, :18])


class VisionTransformer(nn.Module):
    def __init__(self, registers: int = 0) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 8, 4, 4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 8))
        self.reg_token = nn.Parameter(torch.randn(1, registers, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens_ = self.patch_embed(x).flatten(2).mT
        front = torch.cat([self.cls_token, self.reg_token], 1).expand(len(x), -1, -1)
        return self.head(self.block(torch.cat([front, tokens_], 1)).mean(1))


@pytest.mark.parametrize("registers", [0, 4])
def test_class_and_register_tokens_are_left_out(registers: int) -> None:
    model = VisionTransformer(registers).eval()
    x = torch.rand(2, 3, 16, 24)
    trace = Trace(model, x, {"block": "block"}, 1)
    expected = Trace(model, x, {"block": Layer("block", reshape=tokens(4, 6, prefix=1 + registers))}, 1)
    assert torch.equal(trace.sites["block"].acts, expected.sites["block"].acts)
    assert trace.sites["block"].acts.shape == (2, 8, 4, 6)


def test_two_branches_with_different_grids_are_told_apart() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = VisionTransformer(), VisionTransformer(2)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.left(left) + self.right(right)

    # 4 x 4 + 1 and 2 x 7 + 3 are both 17 tokens: only the branch itself can tell.
    inputs = {"left": torch.rand(1, 3, 16, 16), "right": torch.rand(1, 3, 8, 28)}
    maps = Trace(Two().eval(), inputs, {"l": "left.block", "r": "right.block"}, 1).sites
    assert maps["l"].acts.shape == (1, 8, 4, 4)
    assert maps["r"].acts.shape == (1, 8, 2, 7)


def test_words_do_not_get_the_grid_of_the_photo() -> None:
    """64 words beside a photo with an 8 x 8 grid."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image, self.embed = nn.Conv2d(3, 16, 8, 8), nn.Embedding(50, 32)
            self.text = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
            self.head = nn.Linear(48, 2)

        def forward(self, image: Tensor, ids: Tensor) -> Tensor:
            seen = self.image(image).relu().mean((2, 3))
            return self.head(torch.cat([seen, self.text(self.embed(ids)).mean(1)], 1))

    inputs = {"image": torch.rand(2, 3, 64, 64), "ids": torch.randint(0, 50, (2, 64))}
    with pytest.raises(MulticamError, match="layer 'text' does not see input 'image'"):
        HiResCAM(seeded(Both), "text")(inputs, 1, signed=True)


@pytest.mark.parametrize("batch_first", [True, False])
def test_recurrent_layers_say_which_axis_is_the_batch(batch_first: bool) -> None:
    """With as many samples as tokens, nothing but the layer itself can tell."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.rnn = nn.Conv2d(3, 8, 4, 4), nn.GRU(8, 6, batch_first=batch_first)
            self.head = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            order = (0, 2, 1) if batch_first else (2, 0, 1)
            return self.head(self.rnn(self.conv(x).flatten(2).permute(order))[0].mean(1 if batch_first else 0))

    model, x = seeded(Recurrent), torch.rand(16, 3, 16, 16)
    cam = HiResCAM(model, Layer("rnn", pick=0))
    assert torch.allclose(cam(x, 1, signed=True)[3:5], cam(x[3:5], 1, signed=True), atol=1e-6)


def test_tokens_in_front_need_no_names() -> None:
    class Embedded(nn.Module):
        """A class token from a table, and another token that no name tells."""

        def __init__(self) -> None:
            super().__init__()
            self.patches, self.cls_token = nn.Conv2d(3, 8, 4, 4), nn.Embedding(1, 8)
            self.extra, self.block = nn.Parameter(torch.rand(1, 1, 8)), nn.LayerNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            front = torch.cat([self.cls_token.weight[None], self.extra], 1).expand(len(x), -1, -1)
            return self.block(torch.cat([front, self.patches(x).flatten(2).mT], 1)).mean(1)

    model, x = seeded(Embedded), torch.rand(2, 3, 16, 16)
    acts = Trace(model, x, {"block": "block"}, 1).sites["block"].acts
    assert torch.equal(acts, Trace(model, x, {"": Layer("block", reshape=tokens(4, 4, prefix=2))}, 1).sites[""].acts)
