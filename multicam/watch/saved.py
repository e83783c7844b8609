"""What a graph saves for its backward pass: kept as it is while the pass goes on, and asked whether it still is."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from multicam.call.tree import leaves
from multicam.errors import MulticamError

T = TypeVar("T")
_SAVED: dict[type, tuple[str, ...]] = {}  # by the kind of a node, the attributes that are what it saved


class Kept:
    """The values of a tensor at the time when it was kept."""

    def __init__(self, x: Tensor) -> None:
        self.value = x.detach()
        self._version = self.value._version

    def copy(self) -> None:
        """Have the values apart from now on."""
        self.value = self.value.clone()
        self._version = self.value._version

    def unpacked(self) -> Tensor:
        """The values.

        Raises:
            MulticamError: If they were overwritten after the pass.
        """
        if self.value._version != self._version:
            raise MulticamError(
                f"a tensor of shape {tuple(self.value.shape)} that the gradient needs was written into after the forward pass; "
                "run the model and the backward pass again, or write into a copy of it"
            )
        return self.value


def overwritten(returned: Any) -> bool:
    """Whether something that the graph of an output saved was written into since, as PyTorch would say in the backward pass.

    Args:
        returned: The output. No part of its graph is under `torch.utils.checkpoint`, which would run it now.
    """
    tensors = [leaf for leaf in leaves(returned).values() if isinstance(leaf, Tensor)]
    open_ = [x.grad_fn for x in tensors if x.grad_fn is not None]
    seen = set(open_)
    while open_:
        node = open_.pop()
        for name in _saved(node):
            try:
                getattr(node, name)
            except RuntimeError as error:
                if overwrites(error):
                    return True
        before = {behind for behind, _ in node.next_functions if behind is not None} - seen
        seen |= before
        open_ += before
    return False


def overwrites(error: BaseException) -> bool:
    """Whether an error of a backward pass says that what it needs was overwritten."""
    return "inplace operation" in str(error)


def retried(run: Callable[[], T]) -> T:
    """What `run` returns; once more where a pass in it must do without hooks of saved tensors, which its memory knows by then."""
    try:
        return run()
    except (RuntimeError, MulticamError) as error:
        if not refuses_hooks(error):
            raise
    return run()


def refuses_hooks(error: Exception) -> bool:
    """Whether an error says that `torch.func` runs under no hooks of saved tensors."""
    return "saved tensor hooks" in str(error)


def _saved(node: Any) -> tuple[str, ...]:
    kind = type(node)
    if kind not in _SAVED:
        raw = (name.removeprefix("_raw") for name in dir(kind) if name.startswith("_raw_saved_"))
        # A function that is written in Python has no underline.
        _SAVED[kind] = tuple(name if hasattr(kind, name) else name.removeprefix("_") for name in raw)
    return _SAVED[kind]
