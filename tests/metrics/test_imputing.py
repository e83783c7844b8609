"""Scores of changed inputs, and pixels imputed from their neighbours: by value, and against pytorch-grad-cam."""

import pytest
import torch
from pytorch_grad_cam.metrics import road
from torch import Tensor

from multicam.metrics.imputing import NEIGHBOURS, impute, score_change
from tests.helpers.drop_in import Net, images, seeded


def test_the_change_of_a_score_keeps_the_class_that_was_chosen() -> None:
    model, x = seeded(Net), images(2, 3, 16, 18)
    top = model(x).argmax(1)
    expected = (model(3 * x) - model(x)).gather(1, top[:, None])[:, 0]
    assert torch.allclose(score_change(model, x, 3 * x), expected, atol=1e-6)


def test_an_imputed_pixel_is_the_weighted_mean_of_its_neighbours() -> None:
    known = torch.rand(2, 16, 18, generator=torch.Generator().manual_seed(2)) > 0.7
    filled = impute(images(2, 3, 16, 18), known, noise=0.0)
    padded = torch.nn.functional.pad(filled, (1, 1, 1, 1))
    inside = torch.nn.functional.pad(torch.ones(16, 18), (1, 1, 1, 1))

    def moved(x: Tensor, y: int, z: int) -> Tensor:
        return x[..., 1 + y : 17 + y, 1 + z : 19 + z]

    total = sum(w * moved(padded, y, z) for y, z, w in NEIGHBOURS)
    weights = sum(w * moved(inside, y, z) for y, z, w in NEIGHBOURS)
    assert torch.allclose(
        filled[:, :, :][~known[:, None].expand_as(filled)],
        (total / weights)[~known[:, None].expand_as(filled)],
        atol=1e-5,
    )
    assert torch.equal(filled[known[:, None].expand_as(filled)], images(2, 3, 16, 18)[known[:, None].expand_as(filled)])


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")  # theirs
def test_imputing_is_theirs_up_to_the_noise() -> None:
    x, known = images(1, 3, 16, 18), torch.rand(16, 18, generator=torch.Generator().manual_seed(2)) > 0.5
    theirs = road.NoisyLinearImputer(noise=0)(x[0], known.float())
    assert torch.allclose(impute(x, known[None], noise=0.0)[0], theirs, atol=1e-5)


def test_noise_is_repeatable_and_leaves_the_global_random_state_alone() -> None:
    x, known = images(2, 3, 16, 18), torch.zeros(2, 16, 18, dtype=torch.bool)
    known[:, :8] = True
    before = torch.get_rng_state()
    noisy = impute(x, known)
    assert torch.equal(noisy, impute(x, known))
    assert not torch.equal(noisy, impute(x, known, seed=1))
    assert torch.equal(torch.get_rng_state(), before)
    assert 0.005 < (noisy - impute(x, known, noise=0.0))[:, :, 8:].std() < 0.02


def test_an_image_of_which_nothing_is_known_becomes_its_mean_colour() -> None:
    x = images(1, 3, 8, 8)
    filled = impute(x, torch.zeros(1, 8, 8, dtype=torch.bool), noise=0.0)
    assert torch.allclose(filled, x.mean((2, 3), keepdim=True).expand_as(x), atol=1e-6)
