"""What a model's output is that is no tensor: one item for each sample or not, and what to say of it."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from multicam.call.tree import leaves

# What a model writes into its argument is lost with the containers that are made anew for every pass.
WRITES = """the model returns None, so there is nothing to score. If it writes its results into what it is given, explain a \
module that returns that, Returning(model):

class Returning(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        self.model(batch)
        return batch

Its layers are called 'model.' and their names in the model. Results that the model keeps in an attribute, as in \
self.result, are returned by "return self.model.result"."""


def has_tensor(output: Any) -> bool:
    """Whether there is a tensor in an output.

    Example:
        >>> has_tensor({"boxes": [Tensor()]}), has_tensor({"caption": "a cat"})
        (True, False)
    """
    return any(isinstance(leaf, Tensor) for leaf in leaves(output).values())


def by_sample(output: Any, samples: int) -> bool:
    """Whether an output is a list with one item for each sample, as detectors return it.

    As many heads or levels as there are samples are none, if each has a row for each of them. Nothing else tells these from as many tables of as
    many rows each, which are rare; detections have `boxes`.

    Example:
        >>> import torch
        >>> heads, vectors = [torch.rand(2, 5), torch.rand(2, 3)], [torch.rand(2), torch.rand(2)]
        >>> by_sample(heads, 2), by_sample(vectors, 2), by_sample([{"boxes": torch.rand(2, 4)}] * 2, 2)
        (False, True, True)
    """
    if not isinstance(output, list) or len(output) != samples:
        return False
    if samples == 1 or all(isinstance(item, Mapping) and "boxes" in item for item in output):
        return True
    tensors = [leaf for leaf in leaves(output).values() if isinstance(leaf, Tensor)]
    return not tensors or any(x.ndim < 2 or len(x) != samples for x in tensors)


def unpicked(output: Any) -> str:
    """What to say of an output that is no tensor: the tensors inside of it, or how a model comes to return one."""
    kind = type(output).__name__
    found = leaves(output)
    tensors = {name: leaf for name, leaf in found.items() if isinstance(leaf, Tensor)}
    if tensors:
        choices = ", ".join(f"{name!r} {tuple(leaf.shape)}" for name, leaf in tensors.items())
        return f"the model returns a {kind}, so say what to explain with output=…, one of: {choices}"
    if output is None:
        return WRITES
    if isinstance(output, Iterator):
        return (
            f"the model returns a {kind}, which computes when it is read: explain a module around it whose forward reads it, with "
            "return list(self.model(batch))"
        )
    within = (
        "" if "" in found else f" of {', '.join(sorted({type(leaf).__name__ for leaf in found.values()})) or 'nothing'}"
    )
    return (
        f"the model returns a {kind}{within}, in which there is no tensor to score: explain a module that returns the tensors that "
        "it is made of, such as logits"
    )
