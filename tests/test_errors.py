"""What an error says: what was given, what exists, and what is nearest to it."""

from collections.abc import Callable
from fractions import Fraction
from inspect import unwrap
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from multicam import MulticamError, errors
from multicam.errors import out_of_memory, unknown

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


def raised(run: Callable[[], object]) -> Exception:
    with pytest.raises(Exception) as error:
        run()
    return error.value


def chained(second: Exception, *, suppressed: bool = False) -> Exception:
    try:
        try:
            torch.empty(10**15)
        except RuntimeError:
            if suppressed:
                raise second from None
            raise second  # noqa: B904 (the chain that Python makes)
    except Exception as error:
        return error


@pytest.mark.parametrize(
    "run",
    [
        lambda: torch.empty(10**15),
        lambda: np.empty(10**15),
        lambda: bytearray(10**18),
        lambda: cv2.resize(np.zeros((9, 9), np.uint8), (2**30, 2**20)),
    ],
    ids=["torch", "numpy", "python", "opencv"],
)
def test_memory_that_really_ran_out(run: Callable[[], object]) -> None:
    assert out_of_memory(raised(run))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("whatever it says"),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 7.2 GB)"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("std::bad_alloc"),
        OSError(12, "Cannot allocate memory"),
        chained(RuntimeError("the branch failed")),
        chained(MulticamError("the model failed")),
    ],
    ids=repr,
)
def test_memory_that_ran_out_elsewhere(error: Exception) -> None:
    assert out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("shape mismatch"), ValueError(), KeyError("memory"), chained(ValueError("no"), suppressed=True)],
    ids=repr,
)
def test_errors_of_other_kinds(error: Exception) -> None:
    assert not out_of_memory(error)
