"""What no pass can take is refused before one runs, and what works is left alone."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from multicam import Inputs, MulticamError
from multicam.call.refusals import refuse_around, refuse_unreadable, said, transformed


class Wrapped(Tensor):
    """A tensor without memory of its own, as quantised and sharded ones are."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Wrapped":
        made: Wrapped = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*(x.inner if isinstance(x, Wrapped) else x for x in args), **(kwargs or {}))


class Labelled(Tensor):
    """A plain tensor of another class, as torchvision's images are."""


X = torch.rand(2, 3, 4, 4)
UNREADABLE: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "meta": (lambda x: x.to("meta"), "on the meta device and has no values: make it on another"),
    "coo": (Tensor.to_sparse, r"sparse \(sparse_coo\): give x.to_dense\(\), or keep it in a buffer"),
    "csr": (lambda x: x[0, 0].to_sparse_csr(), r"sparse \(sparse_csr\)"),
    "mkldnn": (Tensor.to_mkldnn, r"\(_mkldnn\): give x.to_dense\(\)"),
    "nested": (lambda x: torch.nested.nested_tensor(list(x)), r"nested tensor.*x.unbind\(\)\[i\]\[None\]"),
    "jagged": (lambda x: torch.nested.nested_tensor(list(x[:, 0]), layout=torch.jagged), "nested tensor"),
    "quantised": (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8), r"quantised: give x.dequantize\(\)"),
    "wrapped": (Wrapped, "a Wrapped, whose values only its own class reads: give a plain tensor"),
    "fake": (lambda x: FakeTensorMode().from_tensor(x), "a FakeTensor, whose values only its own class reads"),
    "generator": (lambda x: (row for row in x), "a generator, which is empty after one pass: give a list"),
    "map": (lambda x: map(abs, x), "a map, which is empty after one pass"),
}
READABLE: dict[str, Callable[[Tensor], Any]] = {
    "plain": lambda x: x,
    "a parameter": nn.Parameter,
    "a labelled tensor": lambda x: x.as_subclass(Labelled),
    "a view": lambda x: x[:1].expand_as(x),
    "with a history": lambda x: x.clone().requires_grad_() * 2,
    "conjugate": lambda x: torch.complex(x, x).conj(),
    "small": lambda x: x.to(torch.float8_e4m3fn),
    "a list": list,
    "text": lambda x: "a cat",
    "None": lambda x: None,
    "a range": lambda x: range(3),
}


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit:FutureWarning", "ignore:.*beta state:UserWarning", "ignore:.*prototype:UserWarning"
)
@pytest.mark.filterwarnings("ignore:.*quantized tensor.*:UserWarning", "ignore:.*deprecated.*:DeprecationWarning")
@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_has_no_values_is_refused_with_what_to_give(kind: str) -> None:
    make, message = UNREADABLE[kind]
    with pytest.raises(MulticamError, match=message):
        refuse_unreadable("input 'rgb'", make(X))
    with pytest.raises(MulticamError, match=r"input 'input\.rgb' is"):
        Inputs({"rgb": make(X), "depth": X}).bind(nn.Flatten())


@pytest.mark.parametrize("kind", READABLE)
def test_what_has_values_is_not(kind: str) -> None:
    refuse_unreadable("input 'rgb'", READABLE[kind](X))
    Inputs({"rgb": READABLE[kind](X), "depth": X}).bind(nn.Identity())


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")  # jvp's own
@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp", "functionalize", "another's"])
def test_a_transform_around_a_call_is_seen(transform: str) -> None:
    def asked(x: Tensor) -> Tensor:
        assert transformed()
        with pytest.raises(MulticamError, match=r"a transform of torch.func \(vmap, grad, jvp …\) is around this call"):
            Inputs(x if transform != "another's" else X).bind(nn.Flatten())
        if transform != "another's":
            with pytest.raises(MulticamError, match="wrapped by a transform"):
                refuse_unreadable("input", x)
        return x.sum()

    match transform:
        case "grad":
            torch.func.grad(asked)(X)
        case "jvp":
            torch.func.jvp(asked, (X,), (X,))
        case "functionalize":
            torch.func.functionalize(asked)(X)
        case _:
            torch.vmap(asked)(X)
    assert not transformed()
    refuse_around()


def test_tensors_without_values_around_a_call_are_seen() -> None:
    with FakeTensorMode(), pytest.raises(MulticamError, match="tensors are fake here"):
        Inputs(X).bind(nn.Flatten())
    with torch.device("meta"), pytest.raises(MulticamError, match="the default device is meta"):
        Inputs(X).bind(nn.Flatten())
    with torch.device("cpu"):
        Inputs(X).bind(nn.Flatten())


@pytest.mark.parametrize("part", ["parameter", "buffer"])
def test_a_model_without_values_is_refused(part: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    if part == "parameter":
        model[0].to("meta")
    else:
        model[1].running_mean = torch.empty(4, device="meta")
    name = "'weight' of Conv2d" if part == "parameter" else "'running_mean' of BatchNorm2d"
    with pytest.raises(
        MulticamError, match=f"{name} is on the meta device and has no values: load the model's weights"
    ):
        Inputs(X).bind(model)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_frozen_torchscript_is_refused_and_other_is_not() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1)).eval()
    for made in (torch.jit.script(model), torch.jit.trace(model, X)):
        Inputs(X).bind(made)
        Inputs(X).bind(nn.Sequential(made))
    frozen = torch.jit.freeze(torch.jit.script(model))
    for made in (frozen, nn.Sequential(frozen)):
        with pytest.raises(MulticamError, match=r"is frozen TorchScript.* explain the module that was frozen"):
            Inputs(X).bind(made)


class Reads(nn.Module):
    """A model that takes an array or a picture as it is."""

    def forward(self, x: Tensor, photo: Any) -> Tensor:
        return x.sum() + float(np.asarray(photo).sum())


@pytest.mark.parametrize(
    "photo", [np.ones((2, 3, 4, 4), np.float32), Image.new("RGB", (4, 4))], ids=["array", "picture"]
)
def test_a_picture_that_is_no_tensor_is_refused_unless_it_is_held(photo: Any) -> None:
    way_out = r"torch.from_numpy\(x\)" if isinstance(photo, np.ndarray) else r"to_tensor\(x\)\[None\]"
    with pytest.raises(
        MulticamError, match=rf"input 'photo' is a \w+\.\w+ and no tensor: give .*{way_out}.*hold\('photo'\)"
    ):
        Inputs(X, photo).bind(Reads())
    for mark in (Inputs.hold, Inputs.constant):
        assert torch.isfinite(mark(Inputs(X, photo), "photo").bind(Reads()).run(Reads()))
    Inputs(X, np.array([12, 9])).bind(Reads())  # lengths, which are no picture


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.ones((2, 4), np.float32), r"Linear failed with TypeError: .*ndarray\. Input 'table' is a numpy.ndarray and no tensor"),
        ([[[[1.0] * 4]], [[[2.0] * 4]]], r"Linear failed with TypeError: .*list\. Input 'table' is a list of numbers and no tensor: give torch.tensor\(x\)"),
    ],
    ids=["array", "list"],
)  # fmt: skip
def test_what_a_model_fails_on_is_named(value: Any, message: str) -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, image: Tensor, table: Tensor) -> Tensor:
            return self.linear(table) + image.mean()

    model = Reader()
    with pytest.raises(MulticamError, match=message.replace("Linear failed", "Reader failed")) as raised:
        Inputs(X, value).bind(model).run(model)
    assert isinstance(raised.value.__cause__, TypeError)


@pytest.mark.parametrize(
    "error", [TypeError("my own"), AttributeError("no 'list' here"), RuntimeError("shapes"), KeyError("k")], ids=repr
)
def test_other_errors_are_the_models_own(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, said(nn.Flatten(), {"x": X, "lengths": np.array([2, 3]), "sizes.0": 3}):
        raise error
    assert raised.value is error


def exported(rows: bool, by_name: bool) -> nn.Module:
    model = nn.Bilinear(4, 3, 2)
    x, y = torch.rand(2, 4), torch.rand(2, 3)
    any_of = {"input1": {0: torch.export.Dim.DYNAMIC}, "input2": {0: torch.export.Dim.DYNAMIC}} if rows else None
    given = ((), {"input1": x, "input2": y}) if by_name else ((x, y), {})
    return torch.export.export(model, *given, dynamic_shapes=any_of).module()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_an_exported_model_says_what_it_was_exported_for() -> None:
    x, y = torch.rand(3, 4), torch.rand(3, 3)
    for by_name, inputs in ((False, Inputs(x, y)), (True, Inputs(input1=x, input2=y))):
        fixed, any_of = exported(False, by_name), exported(True, by_name)
        with pytest.raises(MulticamError, match=r"exported for inputs of one shape.*dynamic_shapes=.*Dim.DYNAMIC"):
            inputs.bind(fixed).run(fixed)
        assert inputs.bind(any_of).run(any_of).shape == (3, 2)
    with pytest.raises(
        MulticamError, match="exported with other arguments by name: give inputs by position, as a tuple"
    ):
        Inputs(input1=x, input2=y).run(exported(True, False))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_that_fails_says_why() -> None:
    traced = torch.jit.trace(nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (2, 48))), X)
    assert traced(X).shape == (2, 48)
    with pytest.raises(
        MulticamError, match=r"failed with RuntimeError: .*; TorchScript runs it.*explain the module that was traced"
    ):
        Inputs(X[:1]).run(traced)
