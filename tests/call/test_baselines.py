import math

import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from multicam import Inputs, MulticamError
from multicam.call.baselines import BLUR, baselines, references_of
from multicam.chance import normal, value_range


def call(**more: Tensor) -> Inputs:
    return Inputs(rgb=torch.rand(2, 3, 16, 8), depth=torch.rand(2, 1, 8, 8), **more)


def of(inputs: Inputs, baseline: object, name: str = "rgb") -> Tensor:
    return baselines(inputs, [name], baseline)[name]


@pytest.mark.parametrize("number", [0.0, 0.5, -2.0])
def test_a_number_is_every_entry(number: float) -> None:
    inputs = call()
    assert torch.equal(of(inputs, number), torch.full((2, 3, 16, 8), float(number)))


def test_a_number_is_exact_in_double_precision() -> None:
    assert of(Inputs(rgb=torch.rand(1, 3, 4, 4, dtype=torch.float64)), 0.1)[0, 0, 0, 0].item() == 0.1


def test_the_mean_is_that_of_each_sample_and_channel() -> None:
    inputs = call(signal=torch.rand(2, 3, 20), clip=torch.rand(2, 3, 4, 8, 8))
    assert torch.allclose(of(inputs, "mean"), inputs.leaves["rgb"].mean((2, 3), keepdim=True).expand(2, 3, 16, 8))
    signal = inputs.leaves["signal"].mean(2, keepdim=True).expand(2, 3, 20)
    assert torch.allclose(of(inputs, "mean", "signal"), signal)
    assert of(inputs, "mean", "clip").shape == (2, 3, 4, 8, 8)


def test_the_blur_is_scipys() -> None:
    inputs = Inputs(rgb=torch.rand(2, 3, 32, 24))
    x = inputs.leaves["rgb"].numpy()
    expected = gaussian_filter(x, (0, 0, 32 * BLUR, 24 * BLUR), mode="nearest", radius=(0, 0, 6, math.ceil(4.5)))
    assert torch.allclose(of(inputs, "blur"), torch.from_numpy(expected), atol=1e-5)
    signal = Inputs(x=torch.rand(2, 3, 32))
    expected = gaussian_filter(signal.leaves["x"].numpy(), (0, 0, 2), mode="nearest", radius=(0, 0, 6))
    assert torch.allclose(of(signal, "blur", "x"), torch.from_numpy(expected), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("baseline", ["mean", "blur", 0.5], ids=str)
def test_the_dtype_is_the_inputs(dtype: torch.dtype, baseline: object) -> None:
    found = of(Inputs(rgb=torch.rand(1, 3, 8, 8, dtype=dtype)), baseline)
    assert found.dtype == dtype
    assert abs(float(found.mean()) - 0.5) < 0.1


@pytest.mark.parametrize("shape", [(2, 3, 16, 8), (3, 16, 8), (1, 3, 16, 8)], ids=str)
def test_a_tensor_for_all_or_for_one(shape: tuple[int, ...]) -> None:
    given = torch.rand(shape, requires_grad=True)
    found = of(call(), given)
    assert torch.equal(found, given.expand(2, 3, 16, 8))
    assert not found.requires_grad


def test_one_for_each_name_and_zero_for_the_others() -> None:
    inputs = call()
    found = baselines(inputs, ["rgb", "depth"], {"depth": 1.0})
    assert found.keys() == {"rgb", "depth"}
    assert not found["rgb"].any()
    assert (found["depth"] == 1).all()


def test_short_names() -> None:
    inputs = Inputs({"image": torch.rand(1, 3, 4, 4)})
    assert (baselines(inputs, ["0.image"], {"image": 2.0})["0.image"] == 2).all()


def test_what_an_integer_input_shows_instead() -> None:
    inputs = Inputs(rgb=torch.full((1, 3, 4, 4), 9, dtype=torch.uint8), mask=torch.ones(1, 1, 4, 4, dtype=torch.bool))
    assert torch.equal(of(inputs, 127.0), torch.full((1, 3, 4, 4), 127, dtype=torch.uint8))
    assert not of(inputs, 0.0, "mask").any()
    for number in (0.5, -1.0, 256.0, float("nan")):
        with pytest.raises(MulticamError, match=f"input 'rgb' is torch.uint8, which cannot hold the baseline {number}"):
            of(inputs, number)
    assert (of(inputs, torch.full((3, 4, 4), 3.0)) == 3).all()
    with pytest.raises(MulticamError, match="cannot hold the baseline that was given"):
        of(inputs, torch.rand(3, 4, 4) + 0.01)


@pytest.mark.parametrize(
    ("baseline", "message"),
    [
        ({"dept": 0.0}, "no input 'dept'; did you mean 'depth'"),
        ({"depth": 0.0}, "no explained input 'depth'. There are: 'rgb'"),
        (
            torch.zeros(2, 3, 16, 8, device="meta"),
            "the baseline of input 'rgb' is on the meta device and has no values",
        ),
        ({"rgb": torch.zeros(2, 3, 16, 8).to_sparse()}, "the baseline of input 'rgb' is sparse"),
        (torch.rand(16, 8), r"the baseline \(16, 8\) of input 'rgb' does not fit it: it is \(2, 3, 16, 8\)"),
    ],
    ids=["name", "unexplained", "meta", "sparse", "shape"],
)
def test_what_does_not_fit(baseline: object, message: str) -> None:
    with pytest.raises(MulticamError, match=message):
        of(call(), baseline)


@pytest.mark.parametrize("word", ["mean", "blur"])
def test_words_are_for_images(word: str) -> None:
    inputs = Inputs(rgb=torch.zeros(1, 3, 4, 4, dtype=torch.uint8), table=torch.rand(1, 5))
    with pytest.raises(MulticamError, match=rf"'{word}' of input 'rgb' needs a floating-point image, not torch.uint8"):
        of(inputs, word)
    with pytest.raises(MulticamError, match=r"input 'table' needs a floating-point image, not torch.float32 \(1, 5\)"):
        of(inputs, word, "table")


def test_noise_is_normal_and_belongs_to_its_key() -> None:
    state = torch.get_rng_state()
    noise = normal((200, 500), (0, 3, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert abs(float(noise.mean())) < 0.01
    assert abs(float(noise.std()) - 1) < 0.01
    for other in ((1, 3, 1), (0, 4, 1), (0, 3, 2), (3, 0, 1)):
        assert abs(float((noise * normal((200, 500), other)).mean())) < 0.02
    assert abs(float(normal((100, 100), (0,), torch.complex64).abs().square().mean()) - 1) < 0.05
    assert torch.isfinite(normal((2,), (-1, 2**70))).all()


def test_the_spread_of_each_sample() -> None:
    x = torch.tensor([[[[1.0, 5.0]]], [[[-2.0, -2.0]]]])
    assert value_range(x).tolist() == [[[[4.0]]], [[[0.0]]]]
    assert value_range(x.to(torch.complex64)).shape == (2, 1, 1, 1)


def test_what_is_not_finite_stands_for_nothing_only_in_an_input_that_holds_such() -> None:
    x = torch.rand(2, 1, 4, 4)
    missing = x.index_fill(3, torch.tensor([1]), torch.nan)
    for baseline in (float("nan"), float("inf"), torch.full((4, 4), float("nan"))[None]):
        with pytest.raises(
            MulticamError, match="the baseline of input 'x' holds NaN or infinite values in float32, and the input none"
        ):
            baselines(Inputs(x=x), ["x"], baseline)
        assert not baselines(Inputs(x=missing), ["x"], baseline)["x"].isfinite().any()
    both = "the baseline of input 'x' holds .*; the baseline of input 'y' holds NaN or infinite values in float32, and the input none"
    with pytest.raises(MulticamError, match=both):
        baselines(Inputs(x=x, y=x, z=missing), ["x", "y", "z"], float("nan"))
    with pytest.raises(MulticamError, match="holds NaN or infinite values in float16"):
        baselines(Inputs(x=x.half()), ["x"], 1e6)
    for word in ("mean", "blur"):
        with pytest.raises(
            MulticamError, match=f"the baseline '{word}' of input 'x' is not finite, because the input holds NaN"
        ):
            baselines(Inputs(x=missing), ["x"], word)
    with pytest.raises(MulticamError, match="a reference of input 'input' holds NaN or infinite values"):
        references_of(nn.Flatten(), Inputs(x).bind(nn.Flatten()), missing, ["input"])
