"""Random numbers of a key, and how sure a mean is."""

import pytest
import torch

from multicam import MulticamError
from multicam.chance import mean_interval, normal, value_range


def test_the_numbers_of_a_key_do_not_depend_on_what_was_drawn_before_or_on_the_global_state() -> None:
    before = torch.get_rng_state()
    first = normal((2, 3), (7, 1))
    normal((5,), (7, 2))
    torch.rand(3)
    assert torch.equal(normal((2, 3), (7, 1)), first)
    torch.set_rng_state(before)
    normal((4,), (1,))
    assert torch.equal(torch.get_rng_state(), before)


def test_every_key_has_numbers_of_its_own() -> None:
    keys = [(seed, sample, name) for seed in range(4) for sample in range(-2, 4) for name in range(4)]
    assert len({tuple(normal((4,), key).tolist()) for key in keys}) == len(keys)
    assert normal((4,), (0, 1)).tolist() != normal((4,), (1, 0)).tolist() != normal((4,), (1,)).tolist()


def test_a_sample_has_the_same_noise_in_every_batch() -> None:
    def noise(samples: list[int]) -> list[torch.Tensor]:
        return [normal((3, 4), (0, sample)) for sample in samples]

    assert torch.equal(torch.stack(noise([2, 0, 1]))[0], torch.stack(noise([2]))[0])


def test_normal_numbers_are_standard_and_of_their_dtype() -> None:
    found = normal((200, 500), (3,), torch.float64)
    assert found.dtype == torch.float64
    assert abs(float(found.mean())) < 0.02 and abs(float(found.std()) - 1) < 0.02
    assert found[0, 0] != found[0, 0].float()  # drawn as such, and not rounded before


def test_a_seed_may_be_of_any_size() -> None:
    assert normal((4,), (2**80, -5)).tolist() != normal((4,), (2**80 + 1, -5)).tolist()


@pytest.mark.parametrize("confidence", [0.5, 0.9])
def test_the_interval_covers_the_mean_as_often_as_it_says(confidence: float) -> None:
    g = torch.Generator().manual_seed(0)
    draws = torch.rand(40, 300, generator=g) ** 2  # 300 experiments of 40 samples; the mean is 1/3
    low, high = mean_interval(draws, confidence=confidence, resamples=500)
    covered = float(((low <= 1 / 3) & (high >= 1 / 3)).float().mean())
    assert abs(covered - confidence) < 0.07


def test_the_ends_are_quantiles_of_the_means_of_resamples() -> None:
    values = torch.tensor([0.0, 1.0])  # the mean of two draws is 0, ½ or 1 with probabilities ¼, ½ and ¼
    assert [float(x) for x in mean_interval(values, confidence=0.4)] == [0.5, 0.5]
    assert [float(x) for x in mean_interval(values, confidence=0.6)] == [0.0, 1.0]
    assert [float(x) for x in mean_interval(torch.tensor([3.0]))] == [3.0, 3.0]


def test_the_quantities_of_a_sample_stay_together() -> None:
    x = torch.rand(20, generator=torch.Generator().manual_seed(0))
    low, high = mean_interval(torch.stack([x, 1 - x], 1))
    torch.testing.assert_close(low[0], 1 - high[1])
    alone = mean_interval(x)
    torch.testing.assert_close((low[0], high[0]), alone)
    assert not torch.equal(mean_interval(x, seed=1)[0], alone[0])


def test_refusals() -> None:
    with pytest.raises(MulticamError, match=r"confidence lies between 0 and 1, not 95\.0"):
        mean_interval(torch.rand(3), confidence=95.0)
    with pytest.raises(MulticamError, match="resamples"):
        mean_interval(torch.rand(3), resamples=0)


def test_the_spread_of_each_sample_broadcasts_against_it() -> None:
    x = torch.tensor([[[1.0, 4.0], [0.0, 2.0]], [[5.0, 5.0], [5.0, 5.0]]])
    assert torch.equal(value_range(x), torch.tensor([4.0, 0.0])[:, None, None])
    turned = torch.tensor([[3 + 4j, 1j]])
    assert torch.equal(value_range(turned), torch.tensor([[4.0]]))


def test_an_interval_covers_the_true_mean_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    trials = torch.randn(300, 40, generator=generator)
    covered = 0
    for i, values in enumerate(trials):
        low, high = mean_interval(values, confidence=0.9, resamples=150, seed=i)
        covered += int(low <= 0 <= high)
    assert 0.83 < covered / 300 < 0.95
    low, high = mean_interval(trials[0], resamples=4000)
    error = trials[0].std(correction=0) / 40**0.5
    torch.testing.assert_close((high - low) / 2, 1.96 * error, rtol=0.06, atol=0.0)
