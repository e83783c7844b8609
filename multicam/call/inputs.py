"""One call of a model, seen as named leaves."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from multicam.call.marks import Marks, covered
from multicam.call.refusals import refuse_call, said
from multicam.call.samples import Samples
from multicam.call.tree import leaves, rebuild, resolve
from multicam.errors import MulticamError, unknown


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
        self._marks = Marks()

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
            MulticamError: If `forward` cannot be called this way, or no pass can be made of it, see `multicam.call.refusals`.
        """
        try:
            signature = inspect.signature(model.forward)
        except ValueError:  # a traced module has none
            self._refuse_unreadable(model)
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
        bound._marks = self._marks.renamed(dict(zip(self._names, bound._names, strict=True)))
        bound._samples.check()
        bound._refuse_unreadable(model)
        return bound

    @property
    def leaves(self) -> dict[str, Any]:
        """Every leaf by name, in the order of the call."""
        return leaves(self._named())

    @property
    def images(self) -> dict[str, Tensor]:
        """The image leaves by name: `(b … h w)` tensors with a batch axis and at least two spatial axes.

        Integers wider than 16 bits are not images, nor is what `hold` or `constant` marks, nor what one sample has in a list.
        """
        return self._samples.images

    @property
    def batch(self) -> int:
        """How many samples the call has: the first axis of its image leaves, else what `rows` marks has, else its first tensor.

        Of tensors in lists the first counts where there are no others, as they may be of one sample each.

        Raises:
            MulticamError: If image leaves disagree, or there is no tensor with a batch axis.
        """
        return self._samples.batch

    def name(self, short: str) -> str:
        """The full name of the leaf that `short` means; did-you-mean otherwise."""
        if not isinstance(short, str):  # callers without a type checker
            raise MulticamError(
                f"inputs are named by strings, such as {next(iter(self.leaves), 'rgb')!r}, not by {short!r}"
            )
        return resolve("input", short, self.leaves)

    def hold(self, *names: str) -> "Inputs":
        """The same call with these leaves held: carried as they are, never packed and never explained.

        The name of a container means all leaves in it.
        """
        return self._marked(self._marks.adding(held=names))

    def constant(self, *names: str) -> "Inputs":
        """The same call with these leaves held and the same for every sample: never repeated with the batch.

        Class prompts `(classes n)` of an image-text model are the usual case, and an image size such as `(16, 16)`. The name of
        a container means all leaves in it.
        """
        return self._marked(self._marks.adding(constant=names))

    def rows(self, *names: str) -> "Inputs":
        """The same call with these lists, tuples and arrays known to have one item for each sample: they follow the samples.

        Methods find it out by passes of the model where it can be seen; this says it. Tensors have one row for each sample
        anyway: marked by their own names, the tensors in a list tell that it is a list of several inputs.

        Example:
            >>> import torch
            >>> Inputs(torch.rand(2, 3, 8, 8), lengths=[12, 9]).rows("lengths").take([1, 1, 0]).kwargs["lengths"]
            [9, 9, 12]
        """
        return self._marked(self._marks.adding(rows=names))

    def only_marked(self) -> "Inputs":
        """The same call where lists and arrays that `rows` does not mark are known to have no item for each sample."""
        return self._marked(replace(self._marks, complete=True))

    def map(self, exchange: Callable[[str, Any], Any]) -> "Inputs":
        """The same call in fresh containers, each leaf replaced by `exchange(name, leaf)`."""
        return self._with(rebuild(self._named(), exchange))

    def replace(self, values: Mapping[str, Any]) -> "Inputs":
        """The same call with the leaves that `values` names exchanged.

        Raises:
            MulticamError: If a leaf does not exist, or is one sample's own in what `rows` marks.
        """
        full = {self.name(name): value for name, value in values.items()}
        for name in full.keys() & self._samples.single:
            raise MulticamError(
                f"input {name!r} is one sample's own, as the list that it is in has one item for each sample; if that list is one of "
                f"several inputs, each with a row for each sample, say so with Inputs(…).rows({name!r}, …)"
            )
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

        Every tensor with the batch size on its first axis follows, and so does what `rows` marks; scalars and other values stay.

        Raises:
            MulticamError: If a tensor has another first axis and is not marked by `constant`, or something is `undecided`.
        """
        found = self._samples
        moved = self._with(found.take(samples))
        return moved if found.undecided else moved.only_marked()

    @property
    def batched(self) -> dict[str, Tensor]:
        """The tensors by name that have one row for each sample: all but scalars, what `constant` marks and what one sample has.

        Raises:
            MulticamError: If a tensor has another first axis and is not marked by `constant`.
        """
        return self._samples.batched

    @property
    def listed(self) -> dict[str, Any]:
        """The lists, tuples and arrays by name that have one item for each sample, as `rows` says.

        Raises:
            MulticamError: If one has another number of items, or a part of it is marked besides.
        """
        return self._samples.listed

    @property
    def undecided(self) -> dict[str, Any]:
        """The lists, tuples and arrays by name that may have one item for each sample, or be the same for all.

        They have as many items as there are samples, or as many for each, and no image and nothing that is marked is in them; or they
        are objects that may hide such lists.
        """
        return self._samples.undecided

    def own(self) -> "Inputs":
        """The same call with copies of its tensors and arrays; the tensors carry no gradient and are no inference tensors."""
        return self.map(lambda name, leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else _apart(leaf))

    def alike(self, *but: str) -> bool:
        """Whether all samples have the same content, in all that has a row or an item for each of them other than these."""
        return self._samples.alike({self.name(name) for name in but})

    def run(self, model: nn.Module) -> Any:
        """What `model` returns for this call; it is handed fresh containers and copies of NumPy arrays."""
        fresh = self.map(lambda name, leaf: _apart(leaf))
        with said(model, self.leaves):
            return model(*fresh.args, **fresh.kwargs)

    def __repr__(self) -> str:
        return repr(self._samples)

    @property
    def _samples(self) -> Samples:
        return Samples(self._named(), self._marks)

    def _named(self) -> dict[str, Any]:
        return dict(zip(self._names, self.args, strict=True)) | self.kwargs

    def _copy(self) -> "Inputs":
        new = Inputs(*self.args, **self.kwargs)
        new._names, new._marks = self._names, self._marks
        return new

    def _with(self, named: Mapping[str, Any]) -> "Inputs":
        """The same call with other values of its arguments."""
        new = self._copy()
        new.args = tuple(named[name] for name in self._names)
        new.kwargs = {name: named[name] for name in self.kwargs}
        return new

    def _marked(self, marks: Marks) -> "Inputs":
        new = self._copy()
        new._marks = marks
        return new

    def _refuse_unreadable(self, model: nn.Module) -> None:
        marks = self._marks
        refuse_call(model, self.leaves, covered(self._named(), marks.held | marks.constant | marks.rows))

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


def wide(x: Tensor) -> Tensor:
    """A tensor in single precision at least, in which results are computed and handed out."""
    if x.is_complex():
        return x if x.dtype == torch.complex128 else x.to(torch.complex64)
    return x if x.dtype == torch.float64 else x.float()


def _apart(leaf: Any) -> Any:
    return leaf.copy() if isinstance(leaf, np.ndarray) else leaf
