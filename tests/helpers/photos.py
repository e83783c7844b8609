"""Photos to make companions of, and what they look like in grey."""

import torch
from hypothesis import settings
from hypothesis import strategies as st


def photos(b=2, c=3, h=24, w=32, seed=0, dtype=torch.float64):
    return torch.rand(b, c, h, w, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def luma(x):
    return x.mul(torch.tensor([0.299, 0.587, 0.114], dtype=x.dtype).view(3, 1, 1)).sum(1)


few = settings(max_examples=25, deadline=None, derandomize=True)
sides = st.integers(2, 19)
any_photos = st.builds(
    photos, b=st.integers(1, 2), c=st.sampled_from([1, 3]), h=sides, w=sides, seed=st.integers(0, 99)
)
