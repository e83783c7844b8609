"""What no pass can take, in words: tensors without plain values, models without modules, and what those fail with."""

from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import active_fake_mode

from multicam.errors import MulticamError

IMAGE = 4  # axes that an image has at least: samples, channels, height and width
# What errors of models that others made say, and what to do about it.
FOREIGN = {
    ("Guard failed", "Expected input at"): "it was exported for inputs of one shape, and other numbers of samples are tried here. Export "
    "it for any, as in torch.export.export(model, args, dynamic_shapes={'rgb': {0: torch.export.Dim.DYNAMIC}, …}), or "
    "explain the module that was exported",
    ("kwarg keyword mismatch",): "it was exported with other arguments by name: give inputs by position, as a tuple, if it was "
    "exported with such, and else by the same names",
    ("TorchScript interpreter",): "TorchScript runs it, and a traced module may have the shapes of its example written into it: explain "
    "the module that was traced or scripted",
    ("torch.func", "functorch", "functional transform"): "it runs parts of itself in a transform of torch.func (vmap, grad, jvp …), which "
    "cannot be looked into: take a method that only runs the model, such as occlusion, or layers outside of it",
}  # fmt: skip


def refuse_call(model: nn.Module, named: Mapping[str, Any], marked: Container[str]) -> None:
    """Refuse a call that no pass can make.

    Args:
        model: The model.
        named: Its inputs, leaf by leaf, by name.
        marked: The names of those that the caller knows not to be explained.

    Raises:
        MulticamError: If one of them has no values that can be read, the model has none, or a transform of torch.func is around the call.
    """
    refuse_around()
    for module in model.modules():
        if not hasattr(module, "training"):
            raise MulticamError(
                f"{type(model).__name__} is frozen TorchScript, which has no modules and parameters left: explain the module "
                "that was frozen"
            )
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.is_meta:
                raise MulticamError(
                    f"{name!r} of {type(module).__name__} is on the meta device and has no values: load the model's weights, "
                    "as with model.to_empty(device='cpu') and load_state_dict"
                )
    for name, leaf in named.items():
        refuse_unreadable(f"input {name!r}", leaf)
        if _is_array(leaf) and getattr(leaf, "ndim", IMAGE) >= IMAGE and name not in marked:
            raise MulticamError(
                f"input {name!r} {_array(leaf)}; a model that takes it as it is gets Inputs(…).hold({name!r}), and it is not explained"
            )


def refuse_around() -> None:
    """Refuse to run inside of something that changes what tensors are.

    Raises:
        MulticamError: If a transform of torch.func, a mode of fake tensors or a default device without memory is around.
    """
    if transformed():
        raise MulticamError(
            "a transform of torch.func (vmap, grad, jvp …) is around this call, where no tensor is that of a single pass: "
            "explain outside of it, one batch after the other"
        )
    if active_fake_mode() is not None:
        raise MulticamError("tensors are fake here (FakeTensorMode), and have no values: explain outside of it")
    if torch.get_default_device().type == "meta":
        raise MulticamError(
            "the default device is meta, where tensors have no values: explain outside of torch.device('meta')"
        )


def transformed() -> bool:
    """Whether a transform of torch.func is around: then tensors are wrapped.

    Example:
        >>> transformed(), torch.vmap(lambda x: x + transformed())(torch.zeros(2))
        (False, tensor([1., 1.]))
    """
    return torch._C._functorch.peek_interpreter_stack() is not None


def refuse_unreadable(what: str, value: Any) -> None:
    """Refuse a value whose numbers cannot be read as those of a plain tensor, or only once.

    Args:
        what: What to call it, such as `"input 'rgb'"`.
        value: Any value.

    Raises:
        MulticamError: If it is such; the message says what to give instead.

    Example:
        >>> refuse_unreadable("input 'rgb'", torch.rand(2, 3, device="meta"))
        Traceback (most recent call last):
        multicam.errors.MulticamError: input 'rgb' is on the meta device and has no values: make it on another
    """
    if isinstance(value, Tensor):
        why = _unreadable(value)
    elif isinstance(value, Iterator):
        why = f"is a {type(value).__name__}, which is empty after one pass: give a list"
    else:
        why = ""
    if why:
        raise MulticamError(f"{what} {why}")


def _unreadable(x: Tensor) -> str:
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        return "is wrapped by a transform of torch.func (vmap, grad, jvp …): explain outside of it"
    if x.is_meta:
        return "is on the meta device and has no values: make it on another"
    if x.is_nested:
        return (
            "is a nested tensor, whose samples differ in size: give one sample at a time, x.unbind()[i][None], or "
            "torch.nested.to_padded_tensor(x, 0.0) where the model takes padding"
        )
    if x.is_quantized:
        return "is quantised: give x.dequantize()"
    if x.layout is not torch.strided:
        return (
            f"is sparse ({str(x.layout).removeprefix('torch.')}): give x.to_dense(), or keep it in a buffer of the model if it is the "
            "same for every sample"
        )
    if type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"is a {type(x).__name__}, whose values only its own class reads: give a plain tensor"
    return ""


@contextmanager
def said(model: nn.Module, named: Mapping[str, Any]) -> Iterator[None]:
    """What a model fails with because of what it is, or is given, becomes an error that says so.

    Args:
        model: The model that runs inside.
        named: Its inputs, leaf by leaf, by name.

    Raises:
        MulticamError: If that is why it failed; all other errors pass unchanged.
    """
    try:
        yield
    except MulticamError:
        raise
    except (TypeError, AttributeError) as error:
        for name, leaf in named.items():
            if _is_array(leaf) and type(leaf).__name__ in str(error):
                raise _failed(model, error, f". Input {name!r} {_array(leaf)}") from error
            if isinstance(leaf, int | float) and name.count(".") >= IMAGE - 1 and "list" in str(error):
                raise _failed(
                    model,
                    error,
                    f". Input {name.partition('.')[0]!r} is a list of numbers and no tensor: give torch.tensor(x)",
                ) from error
        raise
    except (RuntimeError, AssertionError, ValueError) as error:
        for marks, advice in FOREIGN.items():
            if any(mark in str(error) for mark in marks):
                raise _failed(model, error, f"; {advice}") from error
        raise


def _failed(model: nn.Module, error: Exception, advice: str) -> MulticamError:
    lines = str(error).strip().splitlines()
    # What TorchScript says first is where it failed, and last why.
    why = lines[-1 if "TorchScript" in lines[0] else 0] if lines else ""
    return MulticamError(f"{type(model).__name__} failed with {type(error).__name__}: {why}{advice}")


def _is_array(value: Any) -> bool:
    """Whether a value is something that a tensor can be made of, such as a NumPy array or a picture of Pillow's."""
    return not isinstance(value, Tensor) and (hasattr(value, "__array__") or hasattr(value, "__array_interface__"))


def _array(value: Any) -> str:
    kind = type(value)
    picture = (
        "torch.from_numpy(x)" if hasattr(value, "dtype") else "torchvision.transforms.functional.to_tensor(x)[None]"
    )
    return f"is a {kind.__module__.partition('.')[0]}.{kind.__name__} and no tensor: give {picture}, with a batch axis first"
