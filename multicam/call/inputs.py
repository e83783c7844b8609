"""One call of a model, seen as named leaves."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from multicam.call.tree import leaves, rebuild, resolve
from multicam.errors import MulticamError, unknown

# Integers beyond these do not survive a float canvas.
PACKABLE_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16)


class Inputs:
    """The positional and keyword arguments of one call of a model.

    Every leaf has a name made of the parameter of `forward` and the path inside it: `rgb`, `samples.tensors`, `x.0`,
    `batch.image`. A short tail such as `image` does wherever it is unambiguous. Containers are built anew, with their
    own types, on every use, because models overwrite what they are given.

    Args:
        *args: The positional arguments.
        **kwargs: The keyword arguments.

    Example:
        >>> import torch
        >>> photo, depth = torch.rand(2, 3, 8, 8), torch.rand(2, 1, 8, 8)
        >>> Inputs(photo, depth=depth).leaves.keys()
        dict_keys(['0', 'depth'])
        >>> Inputs({"image": photo, "ids": torch.arange(2)})
        Inputs(0.image=float32 (2, 3, 8, 8), 0.ids=int64 (2,))
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args
        self.kwargs = kwargs
        self._names = tuple(str(i) for i in range(len(args)))
        self._held: frozenset[str] = frozenset()
        self._constant: frozenset[str] = frozenset()

    @classmethod
    def of(cls, value: Any) -> "Inputs":
        """`value` as one call: a plain tuple is positional arguments, a plain dict is keyword arguments.

        Anything else (a tensor, a list, a dataclass, a dict subclass …) is one positional argument. A model whose only
        argument is a dict or a tuple is called with `Inputs(batch)`.

        Example:
            >>> Inputs.of({"rgb": 1, "depth": 2})
            Inputs(rgb=1, depth=2)
        """
        if isinstance(value, Inputs):
            return value
        if type(value) is tuple:
            return cls(*value)
        if type(value) is dict:
            if not all(isinstance(key, str) for key in value):
                raise MulticamError(
                    f"a plain dict is taken as keyword arguments, but its keys are {list(value)!r}; "
                    "for a model that takes the dict itself write Inputs(batch)"
                )
            return cls(**value)
        return cls(value)

    def bind(self, model: nn.Module) -> "Inputs":
        """The same call with its positional arguments named by the signature of `model.forward`.

        Raises:
            MulticamError: If `forward` cannot be called this way.
        """
        try:
            signature = inspect.signature(model.forward)
        except ValueError:  # a traced module has none
            return self
        try:
            signature.bind(*self.args, **self.kwargs)
        except TypeError as error:
            raise MulticamError(self._misfit(type(model).__name__, signature, error)) from None
        names: list[str] = []
        for parameter in signature.parameters.values():
            if parameter.kind is parameter.VAR_POSITIONAL:
                names += [f"{parameter.name}.{i}" for i in range(len(self.args) - len(names))]
            elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                names.append(parameter.name)
        bound = self._copy()
        bound._names = tuple(names[: len(self.args)])
        # Names that were marked before the signature was known are still positions.
        renamed = dict(zip(self._names, bound._names, strict=True))
        bound._held = frozenset(_renamed(name, renamed) for name in self._held)
        bound._constant = frozenset(_renamed(name, renamed) for name in self._constant)
        for name in (*bound._held, *bound._constant):
            bound.name(name)
        return bound

    @property
    def leaves(self) -> dict[str, Any]:
        """Every leaf by name, in the order of the call."""
        return leaves(self._named())

    @property
    def images(self) -> dict[str, Tensor]:
        """The image leaves by name: `(b … h w)` tensors with a batch axis and at least two spatial axes.

        Integers wider than 16 bits are not images, nor is what `hold` or `constant` marks.
        """
        marked = {self.name(name) for name in self._held | self._constant}
        return {name: leaf for name, leaf in self.leaves.items() if is_image(leaf) and name not in marked}

    @property
    def batch(self) -> int:
        """How many samples the call has: the first axis of its image leaves, else of its first tensor.

        Raises:
            MulticamError: If image leaves disagree, or there is no tensor with a batch axis.
        """
        images = self.images
        constant = {self.name(name) for name in self._constant}
        tensors = images or {
            name: leaf
            for name, leaf in self.leaves.items()
            if isinstance(leaf, Tensor) and leaf.ndim and name not in constant
        }
        unbatched = [name for name, leaf in tensors.items() if leaf.ndim == 3 and name.startswith(("image", "img"))]
        if not images and len(unbatched) > 1:
            raise MulticamError(
                f"{self!r}: {unbatched[0]!r} and the others of its list have no batch axis; detectors also take one tensor "
                "(b c h w), so give torch.stack(images). Images of different sizes are explained one by one, as image[None]"
            )
        sizes = {name: leaf.shape[0] for name, leaf in tensors.items()}
        if not sizes:
            raise MulticamError(f"the inputs have no tensor with a batch axis: {self!r}")
        if 0 in sizes.values():
            raise MulticamError(f"the inputs hold no sample: {self!r}")
        if images and len(set(sizes.values())) > 1:
            shapes = ", ".join(f"{name} {tuple(leaf.shape)}" for name, leaf in images.items())
            raise MulticamError(
                f"the image inputs differ in batch size: {shapes}; give each the same number of samples, or say "
                "which of them is the same for every sample with Inputs(…).constant(name)"
            )
        return next(iter(sizes.values()))

    def name(self, short: str) -> str:
        """The full name of the leaf that `short` means; did-you-mean otherwise."""
        if not isinstance(short, str):  # callers without a type checker
            raise MulticamError(
                f"inputs are named by strings, such as {next(iter(self.leaves), 'rgb')!r}, not by {short!r}"
            )
        return resolve("input", short, self.leaves)

    def hold(self, *names: str) -> "Inputs":
        """The same call with these leaves held: carried as they are, never packed and never explained."""
        return self._mark("_held", names)

    def constant(self, *names: str) -> "Inputs":
        """The same call with these leaves held and the same for every sample: never repeated with the batch.

        Class prompts `(classes n)` of an image-text model are the usual case.
        """
        return self._mark("_constant", names)

    def map(self, exchange: Callable[[str, Any], Any]) -> "Inputs":
        """The same call in fresh containers, each leaf replaced by `exchange(name, leaf)`."""
        fresh = rebuild(self._named(), exchange)
        new = self._copy()
        new.args = tuple(fresh[name] for name in self._names)
        new.kwargs = {name: fresh[name] for name in self.kwargs}
        return new

    def replace(self, values: Mapping[str, Any]) -> "Inputs":
        """The same call with the leaves that `values` names exchanged."""
        full = {self.name(name): value for name, value in values.items()}
        return self.map(lambda name, leaf: full.get(name, leaf))

    def repeat(self, n: int) -> "Inputs":
        """The same call for `n` copies of each sample, side by side: sample 0 n times, then sample 1; see `take`.

        Example:
            >>> import torch
            >>> Inputs(torch.rand(2, 3, 8, 8), ids=torch.tensor([[7], [8]])).repeat(2).kwargs["ids"].flatten()
            tensor([7, 7, 8, 8])
        """
        if not isinstance(n, int) or n < 1:
            raise MulticamError(f"repeat takes a number of copies, at least 1, not {n!r}")
        return self.take([sample for sample in range(self.batch) for _ in range(n)])

    def take(self, samples: Sequence[int]) -> "Inputs":
        """The same call for these samples, which may come several times.

        Every tensor with the batch size on its first axis follows; scalars and other values stay as they are.

        Raises:
            MulticamError: If a tensor has another first axis and is not marked by `constant`.
        """
        batched = self.batched
        return self.map(
            lambda name, leaf: leaf[torch.as_tensor(samples, device=leaf.device)] if name in batched else leaf
        )

    @property
    def batched(self) -> dict[str, Tensor]:
        """The tensors by name that have one row for each sample: all but scalars and what `constant` marks.

        Raises:
            MulticamError: If a tensor has another first axis and is not marked by `constant`.
        """
        batch = self.batch
        constant = {self.name(name) for name in self._constant}
        found = {
            name: leaf
            for name, leaf in self.leaves.items()
            if isinstance(leaf, Tensor) and leaf.ndim and name not in constant
        }
        for name, leaf in found.items():
            if leaf.shape[0] != batch:
                raise MulticamError(
                    f"cannot tell the samples of input {name!r} of shape {tuple(leaf.shape)} with a batch of {batch}: if it is the "
                    f"same for every sample, say so with Inputs(…).constant({name!r}); else give it {batch} rows"
                )
        return found

    def own(self) -> "Inputs":
        """The same call with tensors that a model may write into, that carry no gradient and are no inference tensors."""
        return self.map(lambda name, leaf: own(leaf) if isinstance(leaf, Tensor) else leaf)

    def alike(self, *but: str) -> bool:
        """Whether all samples have the same content in every tensor other than these."""
        skip = {self.name(name) for name in (*but, *self._constant)}
        return all(
            bool((leaf == leaf[:1]).all())
            for name, leaf in self.leaves.items()
            if isinstance(leaf, Tensor) and name not in skip and leaf.ndim and leaf.shape[0] == self.batch
        )

    def run(self, model: nn.Module) -> Any:
        """What `model` returns for this call; it is handed fresh containers."""
        fresh = self.map(lambda name, leaf: leaf)
        return model(*fresh.args, **fresh.kwargs)

    def __repr__(self) -> str:
        return f"Inputs({', '.join(f'{name}={_shown(leaf)}' for name, leaf in self.leaves.items())})"

    def _named(self) -> dict[str, Any]:
        return dict(zip(self._names, self.args, strict=True)) | self.kwargs

    def _copy(self) -> "Inputs":
        new = Inputs(*self.args, **self.kwargs)
        new._names, new._held, new._constant = self._names, self._held, self._constant
        return new

    def _mark(self, mark: str, names: tuple[str, ...]) -> "Inputs":
        new = self._copy()
        setattr(new, mark, getattr(self, mark) | frozenset(names))
        return new

    def _misfit(self, model: str, signature: inspect.Signature, error: TypeError) -> str:
        surplus = [name for name in self.kwargs if name not in signature.parameters]
        takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
        misnamed = bool(surplus) and not takes_any
        hint = unknown("argument", surplus[0], signature.parameters) if misnamed else error
        return (
            f"{model}.forward{signature} cannot be called with {self!r}: {hint}. A plain tuple is taken as positional "
            "and a plain dict as keyword arguments; a model that takes the container itself is given Inputs(container)"
        )


def as_names(names: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """The names of inputs that a caller gave: one, several, or None.

    Raises:
        MulticamError: If it is anything else.
    """
    if names is None or isinstance(names, str):
        return names if names is None else (names,)
    if isinstance(names, Sequence) and all(isinstance(name, str) for name in names):
        return tuple(names)
    raise MulticamError(f"inputs are named by a string, or several in a list, not by {names!r}")


def is_image(leaf: Any) -> bool:
    """Whether a leaf can be packed and carry a map: `(b … h w)` with a channel axis, of a packable dtype."""
    return (
        isinstance(leaf, Tensor)
        and leaf.layout is torch.strided
        and not leaf.is_nested
        and leaf.ndim >= 4
        and leaf.numel() > 0
        and (leaf.is_floating_point() or leaf.is_complex() or leaf.dtype in PACKABLE_INTEGERS)
    )


def frames_second(clip: Tensor, frames: int | None = None) -> Tensor:
    """A clip `(b c t h w)`, given as that or as `(b t c h w)`.

    Args:
        clip: The clip.
        frames: How many frames are told apart in it: they divide the axis of time. Where that does not decide, an axis of
            one or three is colour.

    Example:
        >>> frames_second(torch.rand(2, 16, 3, 8, 8)).shape
        torch.Size([2, 3, 16, 8, 8])
    """
    first, second = clip.shape[1], clip.shape[2]
    if frames and (first % frames == 0) != (second % frames == 0):
        return clip.transpose(1, 2) if first % frames == 0 else clip
    return clip.transpose(1, 2) if second in (1, 3) and first not in (1, 3) else clip


def own(x: Tensor) -> Tensor:
    """A copy of a tensor without gradient, made only when somebody writes to either: whole inputs are not held twice in memory."""
    try:
        lazy: Tensor = torch._lazy_clone(x.detach())
    except (AttributeError, RuntimeError):  # memory that is not torch's own, such as a NumPy array's
        return x.detach().clone()
    return lazy


def wide(x: Tensor) -> Tensor:
    """A tensor in single precision at least, in which results are computed and handed out."""
    if x.is_complex():
        return x if x.dtype == torch.complex128 else x.to(torch.complex64)
    return x if x.dtype == torch.float64 else x.float()


def _renamed(name: str, names: Mapping[str, str]) -> str:
    head, dot, rest = name.partition(".")
    return names.get(head, head) + dot + rest


def _shown(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}"
    return repr(leaf) if len(repr(leaf)) <= 40 else type(leaf).__name__
