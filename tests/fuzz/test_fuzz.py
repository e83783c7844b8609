"""The random models of the first seeds: about a minute's worth."""

import pytest

from tests.fuzz.checks import failures
from tests.fuzz.specs import random_spec


@pytest.mark.parametrize("seed", range(40))
def test_a_random_model_is_explained_as_by_brute_force(seed: int) -> None:
    assert failures(random_spec(seed)) == []
