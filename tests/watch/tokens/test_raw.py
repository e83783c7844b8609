"""What an input's axes are is told by the first operation that computes; until then entries are followed along each axis."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from multicam.watch.tokens.places import CONSTANT, Places
from multicam.watch.tokens.raw import Leaf, channels_are_last, usual_channels
from tests.helpers.following import after

Read = Callable[[Tensor], Tensor]

MOVES: dict[str, Read] = {
    "flip": lambda x: x.flip(-1),
    "transpose": lambda x: x.transpose(-1, -2),
    "last first": lambda x: x.movedim(-1, 1),
    "flatten": lambda x: x.flatten(-2) if x.ndim > 3 else x,
    "split": lambda x: x.unflatten(-1, (2, -1)) if x.shape[-1] % 2 == 0 and x.ndim < 6 else x,
    "slice": lambda x: x[..., 1:] if x.shape[-1] > 2 else x,
    "select": lambda x: x.select(1, 0) if x.ndim > 3 else x,
    "roll": lambda x: x.roll(1, -1),
    "pad": lambda x: F.pad(x, (1, 2)),
    "scale": lambda x: x * 2 - 1,
    "copy": lambda x: x.clone(),
    "unfold": lambda x: x.unfold(-1, 2, 1) if x.shape[-1] > 2 and x.ndim < 6 else x,
    "in the batch": lambda x: x.flatten(0, 1) if x.ndim > 3 else x,
}


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.sampled_from(sorted(MOVES)), max_size=5), st.sampled_from([(2, 3, 4, 6), (1, 3, 4, 6), (2, 3, 2, 4, 4)])
)
def test_entries_of_pictures_are_followed_wherever_they_go(moves: list[str], shape: tuple[int, ...]) -> None:
    """Each entry has the id of its pixel, the same for all of its channels."""

    def read(x: Tensor) -> Tensor:
        for move in moves:
            x = MOVES[move](x)
        return x

    x = torch.rand(shape)
    origins, y = after(read, x)
    (channels,) = usual_channels(x)
    base = torch.from_numpy(np.broadcast_to(origins.mark(x).ids, shape).copy())
    plain = {"scale", "copy"}
    expected = base
    for move in moves:
        expected = expected if move in plain else MOVES[move](expected)
    assert torch.equal(origins.ids(y).where(expected > CONSTANT, CONSTANT), expected)
    assert base.movedim(channels, 0).unique(dim=0).shape[0] == 1 and (base > CONSTANT).all()


def told(read: Read, *shape: int, integers: bool = False) -> tuple[int, ...]:
    """The size of an input along its places, once a model has read it."""
    x = torch.ones(shape, dtype=torch.int64) if integers else torch.rand(shape)
    origins, _ = after(read, x)
    return origins.places.sizes["x"]


def conv(n: int, channels: int) -> Read:
    weight = torch.rand(2, channels, *[1] * n)
    return lambda x: (F.conv1d, F.conv2d, F.conv3d)[n - 1](x, weight)


@pytest.mark.parametrize(
    ("read", "shape", "places"),
    [
        (conv(2, 3), (2, 3, 8, 6), (8, 6)),
        (lambda x: conv(2, 3)(x.permute(0, 3, 1, 2)), (2, 8, 6, 3), (8, 6)),
        (lambda x: conv(2, 6)(x.permute(0, 3, 1, 2)), (2, 3, 8, 6), (3, 8)),
        (conv(3, 4), (1, 4, 3, 8, 6), (3, 8, 6)),
        (conv(3, 3), (1, 3, 3, 8, 6), (3, 8, 6)),
        (lambda x: conv(3, 3)(x.transpose(1, 2)), (1, 5, 3, 8, 6), (5, 8, 6)),
        (lambda x: conv(2, 3)(x.flatten(0, 1)), (2, 3, 3, 8, 6), (3, 8, 6)),
        (lambda x: conv(2, 5)(x.flatten(0, 1)), (2, 3, 5, 8, 6), (3, 8, 6)),
        (lambda x: conv(2, 12)(x.flatten(1, 2)), (2, 4, 3, 8, 6), (8, 6)),
        (lambda x: conv(2, 1)(x.flatten(0, 1)[:, None]), (2, 4, 8, 6), (4, 8, 6)),
        (lambda x: conv(2, 3)(x[:, 0]), (2, 4, 3, 8, 6), (4, 8, 6)),
        (lambda x: conv(2, 3)(F.pad(x / 2 - 1, (1, 1, 1, 1))), (2, 3, 8, 6), (8, 6)),
        (lambda x: conv(3, 4)(F.avg_pool3d(x, 2)), (1, 4, 4, 8, 6), (4, 8, 6)),
        (conv(1, 5), (2, 5, 9), (9,)),
        (lambda x: x @ torch.rand(5, 3), (2, 9, 5), (9,)),
        (lambda x: x.mT @ torch.rand(9, 3), (2, 9, 5), (5,)),
        (lambda x: conv(2, 1)(x[:, None]), (2, 9, 5), (9, 5)),
        (lambda x: F.linear(x, torch.rand(4, 7)), (2, 7), (7,)),
        (lambda x: F.linear(x.flatten(1), torch.rand(4, 144)), (2, 3, 8, 6), (8, 6)),
        (
            lambda x: F.linear(
                x.unflatten(2, (4, 2)).unflatten(4, (3, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3), torch.rand(4, 12)
            ),
            (2, 3, 8, 6),
            (8, 6),
        ),
        (lambda x: x.tanh(), (2, 3, 8, 6), (8, 6)),
        (lambda x: x.tanh(), (2, 8, 9, 3), (8, 9)),
        (lambda x: x.tanh(), (2, 16, 3, 8, 6), (16, 8, 6)),
        (lambda x: conv(2, 9)(x.flatten(1, 3)), (2, 3, 1, 3, 8, 6), (8, 6)),
    ],
    ids=[
        "image", "channels last", "width as channels", "sequences of a volume", "three of each", "frames first", "frames in the batch",
        "five channels in the batch", "frames as channels", "grey views", "one of several views", "padded and scaled", "pooled first",
        "signal", "features", "features mixed along tokens", "features as a picture", "table", "all at once", "patches", "never told",
        "never told, channels last", "never told, frames first", "six axes",
    ],
)  # fmt: skip
def test_the_axis_that_an_operation_takes_for_channels_is_that_of_channels(
    read: Read, shape: tuple[int, ...], places: tuple[int, ...]
) -> None:
    assert told(read, *shape) == places


def test_words_are_places() -> None:
    assert told(lambda x: F.embedding(x, torch.rand(3, 4)), 2, 7, integers=True) == (7,)


def test_what_was_told_stays_told() -> None:
    def read(x: Tensor) -> Tensor:
        first = conv(3, 4)(x)
        return first.mean() + conv(2, 3)(x.flatten(0, 1)).mean()

    assert told(read, 1, 4, 3, 8, 6) == (3, 8, 6)


def test_one_tensor_for_two_inputs_is_told_once() -> None:
    x, places = torch.rand(2, 3, 4, 5), Places({"a": (3, 4, 5), "b": (3, 4, 5)})
    leaf = Leaf(["a", "b"], x, places)
    assert places.sizes == {"a": (4, 5), "b": (4, 5)} and leaf.axes == [2, 3]
    mark = leaf.start.mark(places)
    assert mark.lattice is not None and mark.lattice.grid == (4, 5) and mark.shape == (2, 1, 4, 5)
    assert np.array_equal(mark.ids[:, 0], leaf.ids)


def test_channels_are_last_only_where_they_may_be_colour_and_nothing_else_is() -> None:
    assert channels_are_last(torch.rand(2, 8, 9, 3)) and channels_are_last(torch.rand(2, 8, 9, 1))
    assert not channels_are_last(torch.rand(2, 3, 9, 3))
    assert not channels_are_last(torch.rand(2, 8, 9, 5))
    assert not channels_are_last(torch.rand(2, 8, 3))
