"""What an error says: what was given, what exists, and what is nearest to it."""

from fractions import Fraction
from inspect import unwrap
from typing import Any

import numpy as np
import pytest
import torch

from multicam import MulticamError, errors
from multicam.errors import unknown

# Without the checks of types that the tests add, which would answer first.
number, at_least_one = map(unwrap, (errors.number, errors.at_least_one))


def test_an_error_is_a_value_error() -> None:
    assert issubclass(MulticamError, ValueError)
    assert isinstance(unknown("layer", "a", []), MulticamError)


@pytest.mark.parametrize(
    ("given", "names", "message"),
    [
        ("rbg", ["rgb", "depth"], "no input 'rbg'; did you mean 'rgb'? There are: 'rgb', 'depth'"),
        ("words", ["rgb", "depth"], "no input 'words'. There are: 'rgb', 'depth'"),
        (3, {"0": None, "1": None}, "no input '3'. There are: '0', '1'"),
        ("x", [], "no input 'x'. There are: none"),
    ],
    ids=["near", "far", "number", "nothing"],
)
def test_a_name_that_does_not_exist(given: object, names: Any, message: str) -> None:
    assert str(unknown("input", given, names)) == message


def test_of_many_names_twenty_are_told_and_the_nearest_of_all() -> None:
    names = [f"layer.{i}" for i in range(25)] + ["head"]
    said = str(unknown("layer", "haed", iter(names)))
    assert said.startswith("no layer 'haed'; did you mean 'head'? There are: 'layer.0', ")
    assert said.endswith("'layer.19' and 6 more")
    assert str(unknown("layer", "z", names[:20])).endswith("'layer.19'")


@pytest.mark.parametrize("value", [0.5, -3, Fraction(1, 2), np.float32(0.25), np.int64(2)], ids=repr)
def test_numbers_of_every_kind(value: Any) -> None:
    assert number("alpha", value) is value


@pytest.mark.parametrize("value", [True, "0.5", None, 1j])
def test_what_is_no_number(value: Any) -> None:
    with pytest.raises(MulticamError, match="alpha is a number, not "):
        number("alpha", value)


@pytest.mark.parametrize("value", [1, 12, np.int64(3), torch.tensor(2)], ids=repr)
def test_whole_numbers_come_out_as_int(value: Any) -> None:
    found = at_least_one("steps", value)
    assert found == int(value) and type(found) is int


@pytest.mark.parametrize("value", [0, -1, True, 1.0, "2", None])
def test_what_is_no_count(value: Any) -> None:
    with pytest.raises(MulticamError, match=f"steps must be a whole number of at least 1, not {value!r}"):
        at_least_one("steps", value)
