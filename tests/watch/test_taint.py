"""Which tensors are computed from marked ones: whatever changes with a marked tensor must be marked, however it gets there.

Marks are those of one thread: what other threads compute, and what is written through a pointer, is not seen.
"""

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from multicam.watch.plain import has_memory
from multicam.watch.taint import Taint

X, Y = 1, 2  # the colours of the two tensors that the programs below are given
Program = Callable[[Tensor, Tensor], object]


def written(x: Tensor, y: Tensor) -> Tensor:
    y.mul_(x)
    return y


def written_through_a_view(x: Tensor, y: Tensor) -> Tensor:
    y.view(-1)[2:].t().add_(x.flatten()[2:])
    return y[:1]


def view_from_before(x: Tensor, y: Tensor) -> Tensor:
    first = y[0]
    y[0, 1:] = x[0, 1:]
    return first


def out_argument(x: Tensor, y: Tensor) -> Tensor:
    z = torch.empty(2, 3)
    torch.add(x, 1, out=z)
    return z


def several_at_once(x: Tensor, y: Tensor) -> Tensor:
    z = torch.zeros(2, 3)
    torch._foreach_add_([torch.zeros(2, 3), z], [x, x])
    return z


def branched(x: Tensor, y: Tensor) -> Tensor:
    return y + 1 if x.sum() > 3 else y - 1


def counted(x: Tensor, y: Tensor) -> Tensor:
    return torch.full((2,), len((x > 0.5).nonzero()))


def through_numpy(x: Tensor, y: Tensor) -> Tensor:
    return y + torch.from_numpy(np.sqrt(x.numpy()))


def through_an_array(x: Tensor, y: Tensor) -> Tensor:
    return y * float(np.asarray(x).max())


PROGRAMS: dict[str, tuple[Program, int]] = {
    "values": (lambda x, y: x * y, X | Y),
    "alone": (lambda x, y: y.exp(), Y),
    "view": (lambda x, y: x.T[1:].reshape(-1), X),
    "list": (lambda x, y: {"a": [y, x.unbind()]}, X | Y),
    "detached": (lambda x, y: y + x.detach().round(), X | Y),
    "argmax": (lambda x, y: x.argmax(1), X),
    "looked up": (lambda x, y: y[x.argmax(0)], X | Y),
    "compared": (lambda x, y: torch.where(x > 0.5, 1.0, 0.0), X),
    "shape alone": (lambda x, y: torch.ones(x.shape) * x.shape[0], 0),
    "overwritten": (lambda x, y: torch.zeros(3).copy_(y[0]), Y),
    "written": (written, X | Y),
    "written through a view": (written_through_a_view, X | Y),
    "view from before": (view_from_before, X | Y),
    "out": (out_argument, X),
    "several at once": (several_at_once, X),
    "item": (lambda x, y: y * x[0, 0].item(), X | Y),
    "int": (lambda x, y: y.repeat(int(10 * x[0, 0]) + 1, 1), X | Y),
    "branch": (branched, X | Y),
    "count": (counted, X),
    "mask": (lambda x, y: y[x > 0.5], X | Y),
    "unique": (lambda x, y: torch.ones(len(x.round().unique())), X),
    "tolist": (lambda x, y: torch.tensor(x.tolist()), X),
    "numpy": (through_numpy, X | Y),
    "array": (through_an_array, X | Y),
    "dlpack": (lambda x, y: torch.from_numpy(np.from_dlpack(x)) + y, X | Y),
    "text": (lambda x, y: y + len(f"{x}{x[0, 0]:.5f}") + hash(repr(x)) % 97, X | Y),
    "equal": (lambda x, y: y + torch.equal(x.round(), torch.ones(2, 3)), X | Y),
    "sparse": (lambda x, y: x.to_sparse().to_dense(), X),
    "attention": (lambda x, y: F.scaled_dot_product_attention(x[None], y[None], y[None]), X | Y),
}


def tensors() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.rand(2, 3, generator=g), torch.rand(2, 3, generator=g)


def watched(program: Program) -> int:
    """The colours of what a program returns."""
    x, y = tensors()
    taint = Taint()
    taint.mark(x, colours=X)
    taint.mark(y, colours=Y)
    with taint:
        returned = program(x, y)
    return taint.colours(returned)


def flat(value: object) -> list[float]:
    leaves = torch.utils._pytree.tree_leaves(value)
    return [number for leaf in leaves for number in [*leaf.shape, *leaf.double().flatten().tolist()]]


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_changes_with_a_tensor_has_its_colour_and_nothing_else_has(name: str) -> None:
    program, expected = PROGRAMS[name]
    assert watched(program) == expected
    g = torch.Generator().manual_seed(1)
    changes = 0
    for _ in range(40):
        for colour in (X, Y):
            given, other = tensors(), tensors()
            other[colour - 1].copy_(torch.rand(2, 3, generator=g))
            if flat(program(*given)) != flat(program(*other)):
                changes |= colour
    assert changes == expected


def test_once_a_value_became_a_number_everything_after_it_counts() -> None:
    x, y = tensors()
    taint = Taint()
    taint.mark(x)
    taint.know([y])
    with taint:
        before = y + 1
        assert taint.colours(before) == 0
        x.sum().item()
        assert taint.colours(torch.ones(2) + 1) == 1
    assert taint.colours(y) == taint.colours(3) == 1  # anything may be chosen by it


def test_a_tensor_without_memory_of_its_own_cannot_be_followed_so_everything_counts() -> None:
    taint = Taint()
    sparse = torch.eye(3).to_sparse()
    assert not has_memory(sparse) and has_memory(torch.eye(3))
    assert not has_memory(torch.nested.as_nested_tensor([torch.rand(2), torch.rand(3)], layout=torch.jagged))
    taint.mark(sparse, colours=4)
    assert taint.colours(torch.ones(2)) == 4


def test_memory_that_is_freed_and_used_again_has_its_new_colours_alone() -> None:
    (x, y), other = tensors(), torch.rand(2, 3)
    taint = Taint()
    taint.mark(x, colours=X)
    taint.mark(y, colours=Y)
    taint.know([other])
    last: dict[int, int] = {}
    changed = set()
    with taint:
        for source, colour in [(x, X), (y, Y), (other, 0)] * 20:
            several = [source + i for i in range(50)]
            assert {taint.colours(z) for z in several} == {colour}
            places = {z.data_ptr() for z in several}
            changed |= {(last[place], colour) for place in places & last.keys()}
            last |= dict.fromkeys(places, colour)
            del several
    assert changed >= {(X, Y), (Y, 0), (0, X)}  # else nothing was shown


def test_memory_from_nowhere_counts_as_all_that_is_marked() -> None:
    x, y = tensors()
    taint = Taint()
    taint.mark(x, colours=X)
    taint.mark(y, colours=Y)
    made: list[Tensor] = []
    thread = threading.Thread(target=lambda: made.append(x * 2))
    with taint:
        thread.start()
        thread.join()
        z = made[0] + 1
        constant = torch.tensor([1.0, 2.0]) + torch.zeros(2)
    assert taint.colours(z) == X | Y
    assert taint.colours(constant) == 0


def test_touched_hears_of_every_operation_on_something_marked_and_of_no_other() -> None:
    x, y = tensors()
    taint, heard = Taint(), []
    taint.touched = heard.append
    taint.mark(x, colours=X)
    taint.mark(y, colours=Y)
    with taint:
        z = torch.ones(2, 3)
        z + 1
        assert heard == []
        x + z
        y * 2
        x + y
    assert heard == [X, Y, X | Y]


def test_nothing_is_seen_behind_the_context() -> None:
    x, _ = tensors()
    taint = Taint()
    taint.mark(x)
    with taint:
        pass
    assert taint.colours(x.tolist()) == 0
    x.argmax().item()
    assert taint.colours(2) == 0
    assert taint.colours(x) == 1


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_an_operator_of_higher_order_may_depend_on_all_that_is_marked() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    x, y, q = torch.rand(1, 1, 4, 8), torch.rand(4), torch.rand(1, 1, 4, 8)
    taint = Taint()
    taint.mark(x, colours=X)
    taint.mark(y, colours=Y)
    taint.know([q])
    # The function closes over y, which is among the arguments of no operation.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), taint:
        z = flex_attention(q, q, x, lambda score, b, h, i, k: score + y[k])
        other = q + 1
    assert taint.colours(z) == X | Y
    assert taint.colours(other) == 0
