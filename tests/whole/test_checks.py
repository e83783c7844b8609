"""The tests check the types and shapes of the package at every call: what is annotated is what is passed."""

from dataclasses import dataclass

import pytest
import torch
from beartype import beartype
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Float, TypeCheckError
from torch import Tensor

from multicam.chance import seeded
from multicam.maps import Maps
from multicam.metrics.localization import sparseness
from tests.helpers.checks import jaxtyped

check = jaxtyped(typechecker=beartype)


def test_functions_methods_and_shapes_of_the_package_are_checked() -> None:
    with pytest.raises(BeartypeCallHintViolation):
        seeded("zero")
    with pytest.raises(BeartypeCallHintViolation):
        Maps({}, comparable="yes")
    with pytest.raises(TypeCheckError):
        sparseness(torch.zeros(3, 8))


def test_letters_agree_between_what_is_given_and_what_comes_back() -> None:
    @check
    def rows(x: Float[Tensor, "b c"], y: Float[Tensor, "b d"]) -> Float[Tensor, "d c"]:
        return x[:1] + y.mT[:, :1] if len(y.mT) == 2 else x

    assert rows(torch.zeros(3, 2), torch.zeros(3, 2)).shape == (2, 2)
    with pytest.raises(TypeCheckError, match="parameters"):
        rows(torch.zeros(3, 2), torch.zeros(4, 2))
    with pytest.raises(TypeCheckError, match="return value"):
        rows(torch.zeros(3, 2), torch.zeros(3, 5))


def test_fields_and_what_methods_return_are_checked() -> None:
    @check
    @dataclass
    class Point:
        x: int

        @staticmethod
        @check
        def wrong() -> int:
            return "one"

    with pytest.raises(BeartypeCallHintViolation):
        Point("one")
    with pytest.raises(BeartypeCallHintViolation):
        Point.wrong()


def test_the_first_functions_of_those_made_by_a_function_are_checked() -> None:
    def make():
        @check
        def inner(x: int) -> None:
            pass

        return inner

    for _ in range(10):
        with pytest.raises(BeartypeCallHintViolation):
            make()("one")
    make()("one")
