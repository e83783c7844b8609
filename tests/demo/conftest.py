"""The demo's photos, cut and ready to be edited, and a small trial of the detector."""

import numpy as np
import pytest
import torch
from einops import rearrange

from multicam import demo
from multicam.demo.photos import PHOTOS
from multicam.demo.training import Trial


@pytest.fixture(scope="session")
def crops():
    """Crops of every final photo, far enough from 0 and 255 for no edit to be clipped."""
    middles = [demo.crop_of(demo.photo(name)) for name in PHOTOS["final"]]
    return rearrange(torch.from_numpy(np.stack(middles)), "b h w c -> b c h w").float() / 4 + 96


@pytest.fixture(scope="session")
def small_trial():
    return Trial.of("tuning", clean=4, each=4)
