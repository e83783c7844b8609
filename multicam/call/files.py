"""From words on a command line to objects: a model, its weights and its inputs."""

import ast
import importlib.util
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from types import ModuleType
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Inexact, Shaped
from torch import Tensor, nn

from multicam.call.inputs import Inputs
from multicam.call.pictures import PICTURES, read_picture
from multicam.call.refusals import refuse_unreadable
from multicam.call.tree import leaves, resolve
from multicam.errors import MulticamError, unknown

WEIGHTS = (".pt", ".pth", ".safetensors")
ARRAYS = (".npy", ".npz", *WEIGHTS)


@contextmanager
def blame(what: str) -> Iterator[None]:
    """Whatever goes wrong inside becomes an error that says whose code failed.

    Raises:
        MulticamError: If anything is raised inside; one of the library's own passes unchanged.
    """
    try:
        yield
    except MulticamError:
        raise
    except (Exception, SystemExit) as error:  # a script may parse its own arguments where it should only define a model
        raise MulticamError(f"{what} failed with {type(error).__name__}: {error}") from error


def find_object(address: str) -> Any:
    """What `MODULE:NAME` names; MODULE is the path of a .py file, or importable from the current directory.

    The folder of the file, or the current directory, is put on `sys.path` and stays there.

    Raises:
        MulticamError: If there is no such module or name, or importing it fails.

    Example:
        >>> find_object("torch.nn:ReLU")()
        ReLU()
    """
    place, _, name = address.rpartition(":")
    if not place or not name:
        raise MulticamError(
            f"{address!r} names no object: write MODULE:NAME, as in nets.py:build or project.nets:build"
        )
    module = _module(place)
    if not hasattr(module, name):
        raise unknown(
            f"object in {place}", name, (n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))
        )
    return getattr(module, name)


def load_model(
    address: str, weights: str | None = None, device: str | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """The model at `MODULE:FACTORY`, with its weights, on its device.

    Args:
        address: See `find_object`; a module, or a callable that returns one when called without arguments.
        weights: A checkpoint, see `load_weights`.
        device: Where to put the model; None leaves it where it is.
        dtype: The dtype of its floating-point weights; None leaves them.

    Raises:
        MulticamError: If there is no such model, its factory fails, or the weights do not fit.
    """
    model = find_object(address)
    if not isinstance(model, nn.Module):
        if not callable(model):
            raise MulticamError(
                f"{address} is of type {type(model).__name__}, neither a torch.nn.Module nor a function"
            )
        with blame(f"the factory {address}"):
            made = model()
        if not isinstance(made, nn.Module):
            raise MulticamError(f"{address}() returned a {type(made).__name__}, not a torch.nn.Module")
        model = made
    if weights is not None:
        load_weights(model, weights)
    with blame("moving the model"):
        return model.to(device=device, dtype=dtype)


def load_weights(model: nn.Module, file: str) -> None:
    """Loads a checkpoint (.pt, .pth or .safetensors) strictly.

    Nesting under `state_dict`, `model_state_dict` or `model` and the `module.` that data-parallel training puts in front
    of every name are taken off.

    Raises:
        MulticamError: If the file cannot be read without running code, or a name, shape or kind differs from the model's.
    """
    path = Path(file)
    state = _content(path, WEIGHTS)
    for nest in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(nest), Mapping):
            state = state[nest]
    if not isinstance(state, Mapping):
        raise MulticamError(f"{path} holds a {type(state).__name__}, not the state_dict() of a model")
    own = model.state_dict()
    if not own.keys() & state.keys() and all(str(name).startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    tensors = {name: (state[name], value) for name, value in own.items() if name in state and isinstance(value, Tensor)}
    misfits = {
        "missing": [name for name in own if name not in state],
        "unexpected": [name for name in state if name not in own],
        "of another kind": [
            f"{name} {_kind(given)} for {_kind(value)}"
            for name, (given, value) in tensors.items()
            if _kind(given) != _kind(value)
        ],
        "of another shape": [
            f"{name} {tuple(given.shape)} for {tuple(value.shape)}"
            for name, (given, value) in tensors.items()
            if _kind(given) == _kind(value) and given.shape != value.shape
        ],
    }
    if any(misfits.values()):
        shown = "; ".join(f"{len(names)} {what}: {_some(names)}" for what, names in misfits.items() if names)
        raise MulticamError(f"the weights in {path} do not fit {type(model).__name__}: {shown}")
    with blame(f"loading {path}"):
        model.load_state_dict(state)


def _kind(value: Any) -> str:
    """What a value is as a weight: only those of one kind are copied without loss."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    kinds = {
        "meta": value.is_meta,
        "nested": value.is_nested,
        "quantised": value.is_quantized,
        "complex": value.is_complex(),
    }
    return next((kind for kind, is_it in kinds.items() if is_it), str(value.layout).removeprefix("torch."))


def load_inputs(
    model: nn.Module,
    images: Sequence[tuple[str, str]],
    values: Sequence[tuple[str, str]] = (),
    preprocess: str | None = None,
) -> Inputs:
    """One call of the model, on its device; images have the dtype of its weights.

    Args:
        model: The model.
        images: Names and files, see `read_image`. Files of the same name are further samples.
        values: Names and other arguments, see `read_value`.
        preprocess: `MODULE:FUNC`, called with the dict of all of these; what it returns is taken as `Inputs.of` does.

    Raises:
        MulticamError: If a file cannot be read, or the preprocessing fails.
    """
    home = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    files: dict[str, list[str]] = {}
    for name, file in images:
        files.setdefault(name, []).append(file)
    given: dict[str, Any] = {name: _batch(name, several, home.dtype) for name, several in files.items()}
    for name, text in values:
        if name in given:
            raise MulticamError(f"the argument {name!r} is given twice")
        given[name] = read_value(text)
    call: Any = given
    if preprocess is not None:
        function = find_object(preprocess)
        with blame(f"the preprocessing {preprocess}"):
            call = function(given)
    return Inputs.of(call).map(lambda _, leaf: leaf.to(home.device) if isinstance(leaf, Tensor) else leaf)


def read_image(file: str, dtype: torch.dtype = torch.float32) -> Inexact[Tensor, "b c *hw"]:
    """A picture or array `FILE` or `FILE:KEY` as a batch `(b c h w)` of a floating-point dtype.

    Pictures are RGB; one of a single channel and more than 8 bits, as depth has, keeps its channel, and `FILE:grey` reads
    any picture as one channel. Those of 8 and 16 bits are divided by 255 and 65535, so that they lie in 0..1, but
    `FILE:raw` keeps the numbers; those of floating-point numbers stay as they are. Arrays `(h w)`, `(h w 1)`, `(h w 3)` and
    `(c h w)` are one sample; with more axes the first is the batch. Those of 8 bits are divided by 255, all others stay
    as they are.

    Args:
        file: A picture, .npy, .npz, .pt, .pth or .safetensors; KEY names one of several arrays.
        dtype: Of the result; complex arrays become complex64, or complex128 beside float64.

    Raises:
        MulticamError: If there is no such file or key, it cannot be read, or it has fewer than two axes.
    """
    path, key = _split(file)
    if path.suffix.lower() in PICTURES:
        _exists(path)
        picture, full = read_picture(path, key)
        x = picture[None]
    else:
        array = read_array(file)
        full = 255 if array.dtype == torch.uint8 else 1
        if array.ndim < 2:
            raise MulticamError(
                f"{file} has the shape {tuple(array.shape)}, which is no image; --value NAME=@{file} hands it over as it is"
            )
        x = _with_batch(array)
    if x.is_complex():
        return x.to(torch.complex128 if dtype == torch.float64 else torch.complex64)
    if full > 1:
        x = x.to(torch.float64 if dtype == torch.float64 else torch.float32) / full
    return x.to(dtype).contiguous()


def _with_batch(x: Shaped[Tensor, "..."]) -> Shaped[Tensor, "b c *hw"]:
    """An array `(h w)`, `(h w c)` or `(c h w)` as a batch of one; with more axes it is a batch."""
    if x.ndim == 2:
        return rearrange(x, "h w -> 1 1 h w")
    if x.ndim > 3:
        return x
    # Channels are last where there are 1 or 3 of them, since no image is that wide; unless the first axis may be theirs too.
    last = x.shape[-1] in (1, 3) and x.shape[0] > 4
    return rearrange(x, "h w c -> 1 c h w" if last else "c h w -> 1 c h w")


def read_array(file: str) -> Shaped[Tensor, "..."]:
    """The array in `FILE` or `FILE:KEY` as it is stored, without touching axes or dtype.

    Raises:
        MulticamError: If there is no such file or key, or it cannot be read.
    """
    path, key = _split(file)
    content = _content(path, ARRAYS)
    if not isinstance(content, np.ndarray | Tensor):
        arrays = {name: leaf for name, leaf in leaves(content).items() if isinstance(leaf, np.ndarray | Tensor)}
        if not arrays:
            raise MulticamError(f"{path} holds no array, but a {type(content).__name__}")
        if key is None and len(arrays) != 1:
            raise MulticamError(
                f"{path} holds {len(arrays)} arrays; say which one with {path}:KEY, KEY being one of: {_some(arrays)}"
            )
        content = next(iter(arrays.values())) if key is None else arrays[resolve(f"array in {path}:", key, arrays)]
    elif key is not None:
        raise MulticamError(f"{path} holds one array without a name; leave out :{key}")
    if isinstance(content, Tensor):
        refuse_unreadable(f"the array in {file}", content)
        return content
    with blame(f"reading {file}"):
        return torch.from_numpy(content.astype(content.dtype.newbyteorder("=")))


def read_value(text: str) -> Any:
    """An argument that is no image: a Python literal, `@FILE` or `@FILE:KEY` for an array as it is stored, else a string.

    Example:
        >>> read_value("3"), read_value("0.5"), read_value("true"), read_value("left")
        (3, 0.5, True, 'left')
    """
    if text.startswith("@"):
        return read_array(text[1:])
    if text.lower() in ("true", "false", "none"):
        text = text.capitalize()
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _module(place: str) -> ModuleType:
    path = Path(place)
    is_file = path.suffix == ".py"
    home = str((path.parent if is_file else Path()).resolve())
    # The folder stays on the path, as that of a script does: a factory, a forward or a preprocessing may import its
    # neighbours when it is called, and a checkpoint or a worker process looks them up by name.
    if home not in sys.path:
        sys.path.insert(0, home)
    if is_file:
        _exists(path)
        return _run(path.resolve())
    with blame(f"importing {place}"):
        return importlib.import_module(place)


@cache
def _run(path: Path) -> ModuleType:
    """The module that a file defines; its full path is its name, because the file may be called as an installed one is."""
    spec = importlib.util.spec_from_file_location(str(path), path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    with blame(f"running {path.name}"):
        spec.loader.exec_module(module)
    return module


def _batch(name: str, files: Sequence[str], dtype: torch.dtype) -> Inexact[Tensor, "b c *hw"]:
    samples = [read_image(file, dtype) for file in files]
    shapes = {file: tuple(x.shape[1:]) for file, x in zip(files, samples, strict=True)}
    if len(set(shapes.values())) > 1:
        raise MulticamError(f"the samples of input {name!r} must have one shape, but these are {shapes}")
    return torch.cat(samples)


def _split(file: str) -> tuple[Path, str | None]:
    """The path and the key of `FILE:KEY`."""
    endings = "|".join(re.escape(suffix) for suffix in (*PICTURES, *ARRAYS))
    keyed = re.fullmatch(rf"(.+?(?:{endings})):(.+)", file, re.IGNORECASE)
    return (Path(keyed[1]), keyed[2]) if keyed else (Path(file), None)


def _exists(path: Path) -> None:
    if path.is_file():
        return
    if not path.parent.is_dir():
        raise MulticamError(f"no file {str(path)!r}: there is no directory {str(path.parent)!r}")
    raise unknown("file", path, sorted(str(other) for other in path.parent.glob(f"*{path.suffix}")))


def _content(path: Path, kinds: Sequence[str]) -> Any:
    """What is in a file of arrays."""
    kind = path.suffix.lower()
    if kind not in kinds:
        readable = (*PICTURES, *kinds) if kinds is ARRAYS else kinds
        raise MulticamError(f"{str(path)!r} is no file that can be read here; these can: {', '.join(readable)}")
    _exists(path)
    with blame(f"reading {path}"):
        return _READERS[kind](path)


def _npz(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as arrays:
        return dict(arrays)


def _pt(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        if "GLOBAL" not in str(error):
            raise
        raise MulticamError(
            f"{path} holds pickled objects, and reading these could run any code: store tensors alone, as with "
            "torch.save(model.state_dict(), path), or torch.from_numpy(array) instead of an array"
        ) from error


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise MulticamError("reading .safetensors needs safetensors: pip install safetensors") from error
    return load_file(path)


_READERS: dict[str, Callable[[Path], Any]] = {
    ".npy": np.load,
    ".npz": _npz,
    ".pt": _pt,
    ".pth": _pt,
    ".safetensors": _safetensors,
}


def _some(names: Collection[object]) -> str:
    shown = ", ".join(map(str, [*names][:6]))
    return f"{shown} and {len(names) - 6} more" if len(names) > 6 else shown
