"""For the tests and the docstrings' examples: one thread, as their models are too small for more, and one seed each."""

import pytest
import torch

torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """An example that a reader can copy has no seed, and random weights now and then give a map that warns."""
    torch.manual_seed(0)
