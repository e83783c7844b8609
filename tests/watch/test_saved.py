"""What a graph saved: kept apart from what is written later, and found out where it is not."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from multicam import MulticamError
from multicam.watch.saved import Kept, overwrites, overwritten, retried


class Square(torch.autograd.Function):
    """Written in Python."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return 2 * x * gradient


RUNS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "an output": (lambda x: x.exp(), True),
    "an input": (lambda x: x.clone() ** 2, False),
    "nothing saved": (lambda x: x.clone() + 1, False),
    "a function in Python": (lambda x: Square.apply(x.clone()), False),
}


@pytest.mark.parametrize("name", RUNS)
def test_it_is_as_the_backward_pass_says(name: str) -> None:
    run, output = RUNS[name]
    x = torch.rand(2, 3, requires_grad=True)
    for write in (False, True):
        kept = run(x)
        returned = {"scores": [kept.flatten(1).sum(1)], "name": "x", "detached": kept.detach()}
        if write:
            kept.detach().mul_(2)
        assert overwritten(returned) == (write and output)
        try:
            returned["scores"][0].sum().backward()
        except RuntimeError as error:
            assert overwrites(error)
            assert write
            assert output
        else:
            assert not (write and output)


@pytest.mark.parametrize("square", [Square.apply, torch.square])
def test_inputs_and_lists_of_them_are_looked_at(square: Callable[[Tensor], Tensor]) -> None:
    x = torch.rand(2, 3, requires_grad=True)
    first, second = x * 1, x * 1
    joined = torch.einsum("b c, b c -> b", square(first), second)
    assert not overwritten(joined)
    first.detach().zero_()
    assert overwritten(joined)
    assert not overwritten(x)
    assert not overwritten(second)
    assert not overwritten(None)


def test_what_is_kept_is_told_from_what_was_written_since() -> None:
    x = torch.ones(2, 3)
    kept = Kept(x)
    assert torch.equal(kept.unpacked(), torch.ones(2, 3))
    kept.copy()
    x.zero_()
    assert torch.equal(kept.unpacked(), torch.ones(2, 3))
    late = Kept(x)
    x.add_(2)
    with pytest.raises(MulticamError, match=r"a tensor of shape \(2, 3\) that the gradient needs was written into"):
        late.unpacked()


@pytest.mark.parametrize("kind", [RuntimeError, MulticamError])
def test_only_what_takes_no_hooks_is_run_again(kind: type[Exception]) -> None:
    said = ["they don't yet support saved tensor hooks", "another"]

    def run() -> int:
        if said:
            raise kind(said.pop(0))
        return 3

    with pytest.raises(kind, match="another"):
        retried(run)
    said.append("no saved tensor hooks")
    assert retried(run) == 3
