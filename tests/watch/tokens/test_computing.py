"""What computes, case by case: the tokens of what comes out, in words."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.following import Watch, X, after, parts

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
        pytest.param(lambda x: x.mean(1, keepdim=True), "x 16 x 16", id="mean over channels"),
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
        pytest.param(lambda x: x + x.sort(-1).values, "256 unknown", id="beside what is sorted"),
        pytest.param(
            lambda x: F.conv2d(x.mean((2, 3), keepdim=True).expand(2, 3, 16, 16), CONV, padding=1),
            "256 of the whole x",
            id="the mean everywhere",
        ),
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


def test_a_row_that_is_repeated_over_columns_has_no_columns() -> None:
    def op(x: Tensor) -> Tensor:
        rows = x.mean(3, keepdim=True).expand(2, 3, 16, 16)
        return F.avg_pool2d(rows, 2)

    assert parts(*after(op, X), 1) == ["64 of x"] * 2


def test_channels_with_places_of_their_own_are_united_also_of_a_single_sample() -> None:
    origins, y = after(lambda x: F.conv2d(F.pixel_unshuffle(x, 2), torch.rand(4, 12, 1, 1)), X[:1])
    assert parts(origins, y, 1) == ["x 8 x 8"]


def test_two_inputs_on_one_grid_are_tokens_of_both() -> None:
    watch = Watch(x=X, y=(other := torch.rand(2, 3, 16, 16)))
    with torch.inference_mode(), watch:
        both = F.max_pool2d(X, 4) + F.max_pool2d(other, 4)
        more = F.avg_pool2d(other, 4) * both
    assert parts(watch.origins, both, 1) == parts(watch.origins, more, 1) == ["x and y 4 x 4"] * 2
