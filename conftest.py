"""For the tests and the docstrings' examples: one thread, as their models are too small for more, and one seed each."""

import jaxtyping
import pytest
import torch

from tests.helpers.checks import jaxtyped

torch.set_num_threads(1)
jaxtyping.jaxtyped = jaxtyped


def pytest_runtest_setup(item: pytest.Item) -> None:
    """An example that a reader can copy has no seed, and random weights now and then give a map that warns."""
    torch.manual_seed(0)
