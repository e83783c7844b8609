"""What moves entries: each entry of the input is its own id, so the ids that come out must be the values that come out."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.following import after, parts
from tests.helpers.moves import MOVES, PICKS


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(MOVES | PICKS)), st.integers(0, 3)), max_size=8))
def test_ids_go_where_the_entries_go(moves: list[tuple[str, int]]) -> None:
    def chain(x: Tensor) -> Tensor:
        for name, i in moves:
            x = (MOVES | PICKS)[name](x, i)
        return x

    origins, y = after(chain, torch.arange(1, 2 * 4 * 6 + 1).view(2, 4, 6))
    assert torch.equal(origins.ids(y), y)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted({*MOVES, *PICKS} - {"masked_select", "crop", "pad"})), st.integers(0, 3)),
        max_size=4,
    )
)
def test_pixels_go_where_their_values_go_in_every_channel(moves: list[tuple[str, int]]) -> None:
    def chain(x: Tensor) -> Tensor:
        for name, i in moves:
            x = (MOVES | PICKS)[name](x, i)
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
        pytest.param(lambda x: x[1:] * 1.0, id="one sample of several"),
        pytest.param(lambda x: torch.cat([x.flatten()[5:], x[1, 0, :2].flatten()]), id="vectors joined"),
        pytest.param(lambda x: torch.cat([torch.empty(0), x, x[:1]]), id="joined with nothing"),
        pytest.param(
            lambda x: torch.cat([x, x.flip(-1), torch.zeros(2, 1, 4, 6)], 1), id="constants beside other channels"
        ),
    ],
)
def test_images_are_rearranged_exactly(op: Callable[[Tensor], Tensor]) -> None:
    x = torch.arange(1.0, 49).view(2, 1, 4, 6).expand(2, 4, 4, 6).contiguous()
    origins, y = after(op, x)
    assert torch.equal(origins.ids(y).float(), y)


@pytest.mark.parametrize("part", [slice(1, None), slice(0, 2, 2)])
def test_a_part_of_a_batch_of_images_needs_no_ids_of_pixels(part: slice) -> None:
    origins, y = after(lambda x: F.conv2d(x[part], torch.rand(4, 3, 2, 2), stride=2), torch.rand(3, 3, 4, 6))
    assert len(origins.places) == 1
    ids = origins.ids(y, 1)
    assert ids.shape == (y.shape[0], 2, 3)
    assert torch.equal(origins.places.sample[ids[:, 0, 0]], torch.arange(3)[part])
    assert parts(origins, y, 1) == ["x 2 x 3"] * len(y)


def test_three_axes_with_a_channel_put_in_are_an_image() -> None:
    x = torch.arange(1.0, 49).view(2, 4, 6)
    origins, y = after(lambda x: torch.conv2d(x[:, None], torch.ones(1, 1, 1, 1)), x)
    assert torch.equal(origins.ids(y)[:, 0].float(), x)
