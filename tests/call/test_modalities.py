"""The face of the companions: all of them are listed, and what several kinds share."""

import pytest
import torch

from multicam.call import modalities
from multicam.call.modalities import MODALITIES, difference_of_gaussians, fft_high_pass, srm_residuals
from tests.helpers.photos import photos


def test_the_registry_lists_the_public_functions_themselves():
    assert set(MODALITIES) == set(modalities.__all__) - {"MODALITIES", "Modality", "grey", "modality"}
    assert all(MODALITIES[name].make is getattr(modalities, name) for name in MODALITIES)


@pytest.mark.parametrize("companion", [srm_residuals, difference_of_gaussians, fft_high_pass])
def test_flat_photos_leave_no_residual(companion):
    flat = photos(b=5, h=2, w=2, dtype=torch.float32)[:, :, :1, :1].expand(-1, -1, 17, 20)
    torch.testing.assert_close(companion(flat), torch.zeros_like(companion(flat)), atol=1e-4, rtol=0)
