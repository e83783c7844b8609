"""What a pass writes into memory that is not its own is put back, by whatever way it is written."""

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from multicam.call.inputs import Inputs
from multicam.errors import MulticamError
from multicam.watch.memory import Writes, written_arguments
from multicam.watch.undisturbed import undisturbed
from tests.helpers.insides import changes, insides
from tests.helpers.wrapped import Wrapped

SIDES = 70, 100  # more numbers than are always copied
Write = Callable[["Writing", Tensor], Any]


class Writing(nn.Module):
    """Writes into what it has, and into its input, before it computes anything."""

    def __init__(self, write: Write, **buffers: Tensor) -> None:
        super().__init__()
        self.write = write
        self.head = nn.Linear(100, 3)
        self.weight = nn.Parameter(torch.rand(SIDES))
        for name, x in {"large": torch.rand(SIDES), "small": torch.rand(4), **buffers}.items():
            self.register_buffer(name, x)

    def forward(self, x: Tensor) -> Tensor:
        self.write(self, x)
        out: Tensor = self.head(x if x.shape == SIDES else torch.zeros(SIDES))
        return out


def changed_by(write: Write, *, passes: int = 2, **buffers: Tensor) -> list[str]:
    """What passes of such a model leave changed, in it or in its input."""
    model, x = Writing(write, **buffers), torch.rand(SIDES)
    before = insides(model, x)
    for _ in range(passes):
        with undisturbed(model, graph=False, call=Inputs(x)) as memory:
            memory.call.run(model)
    return changes(before, insides(model, x))


def everywhere(write: Callable[[Tensor], Any]) -> Write:
    def into(model: Writing, x: Tensor) -> None:
        for each in (model.large, model.small, model.weight, x):
            write(each.detach() if each.requires_grad else each)

    return into


def in_a_thread(model: Writing, x: Tensor) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(everywhere(lambda each: each.data.add_(1)), model, x).result()


def by_the_norm(model: Writing, x: Tensor) -> None:
    nn.functional.batch_norm(torch.rand(4, 7000), model.mean, model.variance, training=True)


WAYS: dict[str, Write] = {
    "in place": lambda model, x: [each.add_(1) for each in (model.large, model.small, x)],
    "data": everywhere(lambda x: x.data.mul_(0.9).add_(0.1)),
    "other data": lambda model, _: [setattr(x, "data", torch.zeros(2)) for x in (model.large, model.small)],
    "other data of a parameter": lambda model, _: setattr(model.weight, "data", torch.zeros(3)),
    "another type": lambda model, _: [setattr(x, "data", x.half()) for x in (model.large, model.weight)],
    "set_": lambda model, x: [each.set_(torch.zeros(2)) for each in (model.large, model.small, x)],
    "smaller": lambda model, x: [each.resize_(1).fill_(3) for each in (model.large, model.small, x)],
    "turned": lambda model, x: [each.t_() for each in (model.large, model.weight.data)],
    "storage": everywhere(lambda x: x.untyped_storage().fill_(0)),
    "out": everywhere(lambda x: torch.add(x, 1, out=x)),
    "foreach": lambda model, x: torch._foreach_add_([model.large, model.small, x], 1.0),
    "rows": everywhere(lambda x: x[:1].zero_()),
    "NaN": everywhere(lambda x: x.fill_(float("nan"))),
    "thread": in_a_thread,
    "inside of a no-grad": torch.no_grad()(lambda model, x: model.weight.add_(1)),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_written_is_put_back(way: str) -> None:
    assert changed_by(WAYS[way]) == []


@pytest.mark.parametrize("view", ["numpy", "__array__", "dlpack"])
def test_what_is_written_through_another_library_is_put_back(view: str) -> None:
    def write(model: Writing, x: Tensor) -> None:
        for each in (model.large, model.small, x):
            if view == "dlpack":
                torch.utils.dlpack.from_dlpack(each).add_(1)
            else:
                array = each.numpy() if view == "numpy" else np.asarray(each)
                array += 1

    assert changed_by(write) == []


def test_what_a_view_writes_that_was_made_before_is_put_back_and_stays_a_view() -> None:
    model = Writing(lambda model, _: [model.arrays[0].fill(0), model.arrays[1].fill(0)])
    model.arrays = model.large.numpy(), model.small.numpy()
    kept = [array.copy() for array in model.arrays]
    for _ in range(2):
        with undisturbed(model, graph=False, call=Inputs(torch.rand(SIDES))) as memory:
            memory.call.run(model)
    for x, array, values in zip((model.large, model.small), model.arrays, kept, strict=True):
        assert (array == values).all()
        x.add_(1)
        assert (array == values + 1).all()


def test_statistics_of_a_normalisation_are_put_back() -> None:
    mean, variance = torch.zeros(7000), torch.ones(7000)
    assert changed_by(by_the_norm, mean=mean, variance=variance) == []


def test_rows_of_an_embedding_that_are_scaled_are_put_back() -> None:
    model = Writing(lambda model, _: model.words(torch.arange(50)))
    model.words = nn.Embedding(100, 100, max_norm=0.01)
    before = insides(model)
    with undisturbed(model, graph=False, call=Inputs(torch.rand(SIDES))) as memory:
        memory.call.run(model)
    assert changes(before, insides(model)) == []


KINDS: dict[str, Callable[[], Tensor]] = {
    "float16": lambda: torch.rand(SIDES).half(),
    "float8": lambda: torch.rand(SIDES).to(torch.float8_e4m3fn),
    "uint16": lambda: torch.zeros(SIDES, dtype=torch.uint16),
    "bool": lambda: torch.zeros(SIDES, dtype=torch.bool),
    "complex": lambda: torch.rand(SIDES, dtype=torch.complex64),
    "conjugate": lambda: torch.rand(SIDES, dtype=torch.complex64).conj(),
    "negative": lambda: torch.rand(SIDES, dtype=torch.complex64).conj().imag,
    "channels last": lambda: torch.rand(2, 3, 40, 50).to(memory_format=torch.channels_last),
    "turned": lambda: torch.rand(SIDES).T,
    "a part": lambda: torch.rand(300, 300)[20:90, 10:110],
    "expanded": lambda: torch.rand(1, 7000).expand(3, 7000),
    "overlapping": lambda: torch.rand(8000).unfold(0, 3, 1),
    "sparse": lambda: torch.eye(100).to_sparse(),
    "sparse rows": lambda: torch.eye(100).to_sparse_csr(),
    "one number": lambda: torch.zeros((), dtype=torch.int64),
    "empty": lambda: torch.zeros(0, 3),
    "meta": lambda: torch.zeros(SIDES, device="meta"),
}


def number_by_number(x: Tensor) -> None:
    if x.layout is torch.sparse_coo:
        x.mul_(3)
    elif x.layout is torch.sparse_csr:
        x.values().mul_(3)
    elif x.numel() and not x.is_meta:
        place = x if x.ndim == 0 else x[0].view(-1) if x[0].is_contiguous() else x[0]
        place.copy_((place.to(torch.complex64).real + 1).to(place.dtype))


@pytest.mark.filterwarnings("ignore:Sparse .*:UserWarning")
@pytest.mark.parametrize("few", [False, True], ids=["many", "few"])
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_of_every_kind_are_put_back(kind: str, few: bool) -> None:
    x = KINDS[kind]()
    if few and x.layout is torch.strided and x.ndim:
        x = x[:1, :1]
    assert changed_by(lambda model, _: number_by_number(model.other), other=x) == []


def test_quantised_tensors_are_put_back() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are going
        x = torch.quantize_per_tensor(torch.rand(7000), 0.1, 0, torch.quint8)
    model = Writing(lambda model, _: [model.many.copy_(torch.ones(7000)), model.few.copy_(torch.ones(9))])
    model.register_buffer("many", x)
    model.register_buffer("few", x[:9].clone())
    before = [x.int_repr().clone() for x in (model.many, model.few)]
    for _ in range(2):
        with undisturbed(model, graph=False, call=Inputs(torch.rand(SIDES))) as memory:
            memory.call.run(model)
    assert all(torch.equal(x.int_repr(), y) for x, y in zip((model.many, model.few), before, strict=True))


@pytest.mark.parametrize("sides", [SIDES, (2, 3)], ids=["many", "few"])
def test_tensors_that_are_made_of_others_are_put_back(sides: tuple[int, ...]) -> None:
    def write(model: Writing, _: Tensor) -> None:
        model.other.mul_(2)
        model.other.inner.add_(1)
        model.another.inner = torch.zeros(sides)

    assert changed_by(write, other=Wrapped(torch.rand(sides)), another=Wrapped(torch.rand(sides))) == []


def test_tensors_that_share_memory_are_put_back_together() -> None:
    whole = torch.rand(90, 100)
    parts = {"part": whole[3:80, 2:], "first": whole.view(-1)[:4], "again": whole, "turned": whole.T}
    assert changed_by(lambda model, _: [x.data.add_(1) for x in model.buffers()], **parts) == []


@pytest.mark.parametrize("size", [0, 50000])
def test_memory_that_is_freed_or_grows_in_the_pass_is_there_again_as_it_was(size: int) -> None:
    def resize(model: Writing, _: Tensor) -> None:
        model.large.untyped_storage().resize_(size)
        model.small.untyped_storage().resize_(size)

    model = Writing(resize)
    values = [model.large.clone(), model.small.clone()]
    for _ in range(2):
        with undisturbed(model, graph=False, call=Inputs(torch.rand(SIDES))) as memory:
            memory.call.run(model)
    for x, before in zip((model.large, model.small), values, strict=True):
        assert torch.equal(x, before) and x.untyped_storage().nbytes() == before.untyped_storage().nbytes()


def test_memory_that_is_elsewhere_is_left_there() -> None:
    model = Writing(lambda model, _: None)
    model.large.untyped_storage().resize_(0)  # as where each process has a part
    with undisturbed(model, graph=False, call=Inputs(torch.rand(SIDES))) as memory:
        memory.call.run(model)
    assert model.large.untyped_storage().nbytes() == 0 and model.large.shape == SIDES


def test_graphs_of_the_user_that_stand_on_a_buffer_are_good() -> None:
    model = Writing(lambda model, _: model.large.add_(1))
    x = torch.rand(SIDES, requires_grad=True)
    y = (x * model.large).sum()
    with undisturbed(model, graph=False, call=Inputs(torch.rand(SIDES))) as memory:
        memory.call.run(model)
    assert torch.equal(torch.autograd.grad(y, x)[0], model.large)


def later(write: Callable[[Writing, Tensor], Any]) -> Write:
    return lambda model, x: write(model, x) if x.mean() > 100 else None


@pytest.mark.parametrize(
    ("write", "named"),
    [
        (lambda model, x: model.large.add_(1), "large"),
        (lambda model, x: model.large.data.add_(1), "large"),
        (lambda model, x: model.weight.data.add_(1), "weight"),
        (lambda model, x: model.weight.detach().numpy().fill(1), "weight"),
        (lambda model, x: x.add_(1), "input x"),
        (lambda model, x: x.data.add_(1), "input x"),
    ],
    ids=["buffer", "data of a buffer", "data of a parameter", "array of a parameter", "input", "data of an input"],
)
def test_what_only_a_later_pass_writes_is_told_and_put_back_the_next_time(write: Any, named: str) -> None:
    model, x = Writing(later(write)), torch.rand(SIDES)

    def run(x: Tensor) -> None:
        with undisturbed(model, graph=False, call=Inputs(x).bind(model)) as memory:
            memory.call.run(model)

    run(x)
    with pytest.warns(UserWarning, match=f"Writing wrote into {named} where it was not seen"):
        run(x + 200)
    before = insides(model)
    x = torch.rand(SIDES) + 200
    kept = x.clone()
    run(x)
    assert changes(before, insides(model)) == [] and torch.equal(x, kept)


def test_an_operation_of_others_may_write_without_saying_so() -> None:
    with torch.library._scoped_library("multicam_tests", "DEF") as library:
        library.define("quietly(Tensor x) -> Tensor")
        library.impl("quietly", lambda x: x.numpy().fill(7) or x.clone(), "CPU")
        quietly = torch.ops.multicam_tests.quietly
        assert changed_by(lambda model, x: [quietly(model.weight.detach()), quietly(x), quietly(model.small)]) == []


def test_a_pass_is_watched_once_for_each_kind() -> None:
    model = Writing(lambda model, _: None)

    def watched(*call: Any, part: Any = None, **options: Any) -> bool:
        with undisturbed(model, graph=False, call=Inputs(*call, **options), part=part) as memory:
            return memory.watched

    x = torch.rand(SIDES)
    assert [watched(x), watched(x), watched(x + 1)] == [True, False, False]
    assert [watched(x[:3]), watched(x.double()), watched(x, part="other"), watched(x, flag=True)] == [True] * 4
    assert [watched(x, flag=False), watched(x, flag=True)] == [True, False]
    model.switch = True
    assert [watched(x), watched(x)] == [True, False]


def test_a_pass_that_raises_is_watched_again_and_all_is_put_back() -> None:
    def write(model: Writing, x: Tensor) -> None:
        model.large.add_(1)
        x.add_(1)
        raise KeyError

    model, x = Writing(write), torch.rand(SIDES)
    before = insides(model, x)
    for _ in range(2):
        with pytest.raises(KeyError), undisturbed(model, graph=False, call=Inputs(x)) as memory:
            assert memory.watched
            memory.call.run(model)
    assert changes(before, insides(model, x)) == []


def test_the_call_that_is_lent_has_the_same_memory_and_no_gradient() -> None:
    x = torch.rand(SIDES, requires_grad=True)
    array, other = np.ones(3), Special(torch.rand(3))
    model = Writing(lambda model, _: None)
    with undisturbed(model, graph=True, call=Inputs(x, array=array, other=other)) as memory:
        lent = memory.call.leaves
        assert lent["0"].data_ptr() == x.data_ptr() and not lent["0"].requires_grad
        assert type(lent["other"]) is Special and lent["other"].data_ptr() != other.data_ptr()


class Special(Tensor):
    pass


def test_an_input_made_in_inference_mode_is_lent_as_a_plain_one() -> None:
    with torch.inference_mode():
        x = torch.rand(SIDES)
    model = Writing(lambda model, x: x.add_(1), mode=x)
    before = insides(model, x)
    with undisturbed(model, graph=True, call=Inputs(x)) as memory:
        assert not memory.call.leaves["0"].is_inference()
        memory.call.run(model)
    assert changes(before, insides(model, x)) == []


def test_what_is_handed_out_does_not_change_when_memory_is_put_back() -> None:
    model, x = Writing(lambda model, x: [model.large.add_(1), x.add_(1)]), torch.rand(SIDES)
    with undisturbed(model, graph=False, call=Inputs(x)) as memory:
        memory.call.run(model)
        found = [memory.apart(y) for y in (model.large, memory.call.leaves["0"][1:], torch.ones(2), "text")]
        wanted = [y.clone() if isinstance(y, Tensor) else y for y in found]
    assert all(torch.equal(y, z) for y, z in zip(found[:3], wanted, strict=False)) and found[3] == "text"


def test_values_that_are_kept_outlast_whoever_writes() -> None:
    model, x = nn.ReLU(), torch.rand(3)
    with undisturbed(model, graph=False) as memory:
        kept, other = memory.keep(x), memory.keep(torch.ones(2))
        values = x.clone()
        x.add_(1)
        assert torch.equal(kept.unpacked(), values)
    other.value.add_(1)
    with pytest.raises(MulticamError, match=r"a tensor of shape \(2,\) that the gradient needs was written into"):
        other.unpacked()


class Scaling(nn.Module):
    """Its gradient needs the state that it writes, which is put back before the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.ones(1))
        self.large: Tensor
        self.register_buffer("large", torch.ones(SIDES))

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        self.large += 1
        return x * self.steps + x * self.large


def test_gradients_are_those_of_the_state_that_was_computed_with() -> None:
    model = Scaling()
    for _ in range(2):
        x = torch.rand(SIDES, requires_grad=True)
        with undisturbed(model, graph=True) as memory, memory.saving():
            y = model(x).sum()
        assert torch.equal(torch.autograd.grad(y, x)[0], torch.full(SIDES, 4.0))


@pytest.mark.parametrize(
    "write",
    [
        lambda model, x: [model.large.add_(1), x.add_(1)],
        lambda model, x: [setattr(model.large, "data", model.large + 1), setattr(x, "data", x + 1)],
        lambda model, x: [model.large.set_(torch.ones(2)), x.resize_(1)],
        lambda model, x: setattr(model, "large", model.large + 1),
    ],
    ids=["in place", "other memory", "other sizes", "another tensor"],
)
def test_states_are_rewound_between_the_passes_of_one_block(write: Any) -> None:
    model, x = Writing(write), torch.rand(SIDES)
    kept = model.large.clone(), x.clone()
    with undisturbed(model, graph=False, call=Inputs(x)) as memory:
        memory.call.run(model)
        memory.rewind()
        assert torch.equal(model.large, kept[0]) and torch.equal(memory.call.leaves["0"], kept[1])
        memory.call.run(model)
    assert torch.equal(model.large, kept[0]) and torch.equal(x, kept[1])


@pytest.fixture
def told() -> Iterator[list[Tensor]]:
    heard: list[Tensor] = []
    with Writes(heard.append, lambda x: None):
        yield heard


def test_every_operation_that_writes_is_told(told: list[Tensor]) -> None:
    x, y = torch.rand(3), torch.rand(3)
    _ = x + y, x.view(3), x.clone()
    assert told == []
    x.add_(1)
    torch.mul(x, y, out=y)
    torch._foreach_mul_([x, y], 2)
    assert [id(each) for each in told] == [id(x), id(y), id(x), id(y)]


def test_the_arguments_that_are_written_are_those_of_the_schema_and_those_that_it_hides() -> None:
    aten = torch.ops.aten
    assert written_arguments(aten.add_.Tensor) == ((0, "self"),)
    assert written_arguments(aten.add.Tensor) == ()
    assert [name for _, name in written_arguments(aten.native_batch_norm.default)] == ["running_mean", "running_var"]
    assert written_arguments(lambda x: x) == ()
