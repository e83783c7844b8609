"""Rows whose inputs come from different samples: whatever the model, their scores are those of full passes, one row at a time."""

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from multicam import Inputs
from multicam.watch.mixing import Mixing
from multicam.watch.recorded import Read
from multicam.watch.singly import Singly
from tests.helpers.counting import counted
from tests.helpers.models import Fusion, Siamese, fusion_inputs, seeded


def first_class(output: Tensor, samples: object) -> Tensor:
    return output[:, 0]


def one_by_one(model: nn.Module, inputs: Inputs, parts: list[list[str]], rows: list[list[int]]) -> Tensor:
    """The first class of a full pass for each row, whose last number is the sample that it belongs to."""
    found = []
    for *sources, own in rows:
        of = {name: sources[i] for i, names in enumerate(parts) for name in names}
        leaves = {name: x[of.get(name, own)][None] for name, x in inputs.leaves.items()}
        found.append(model(*inputs.replace(leaves).args)[0, 0])
    return torch.stack(found).detach()


def bound(model: nn.Module, *args: Tensor) -> Inputs:
    return Inputs(*args).bind(model)


def mixing_of(model: nn.Module, inputs: Inputs, parts: list[list[str]], read: Read = first_class) -> Mixing:
    """A mixing of all rows of a call but the last, which replaces their parts."""
    samples = inputs.batch - 1
    return Mixing(model, inputs, parts, read, samples, Singly(model, inputs, parts, read, samples))


def pair(b: int = 3) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(b)
    return torch.rand(b, 3, 16, 16, generator=g), torch.rand(b, 3, 16, 16, generator=g)


class Loop(nn.Module):
    """An encoder that is called sample by sample."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.Tanh()), nn.Bilinear(8, 8, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a = torch.cat([self.encoder(row[None]) for row in x])
        return self.head(a, self.encoder(y))


class Folded(nn.Module):
    """Both inputs as one batch in one call of the encoder, which so depends on both."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.Tanh()), nn.Bilinear(8, 8, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(*self.encoder(torch.cat([x, y])).chunk(2))


class Chosen(nn.Module):
    """What `x` chooses without a gradient says what `y` is scaled with."""

    def __init__(self) -> None:
        super().__init__()
        self.choose, self.scale, self.head = nn.Linear(256, 4), nn.Embedding(4, 8), nn.Linear(768, 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        scale = self.scale(self.choose(x[:, 0].flatten(1)).argmax(1))
        return (self.head(y.flatten(1)) * scale).sum(1, keepdim=True)


@pytest.mark.parametrize("b", [2, 3, 4])
@pytest.mark.parametrize("make", [Siamese, Loop, Folded, Chosen])
def test_all_combinations_equal_single_full_passes(make: type[nn.Module], b: int) -> None:
    model = seeded(make)
    inputs = bound(model, *pair(b))
    parts = [[name] for name in inputs.leaves]
    rows = [[i, j, i % (b - 1)] for i, j in product(range(b), repeat=2)]
    mixing = mixing_of(model, inputs, parts)
    assert mixing.used == [True, True]
    expected = one_by_one(model, inputs, parts, rows)
    assert mixing.together
    for some in (slice(0, 1), slice(1, b * b)):
        left, right, own = zip(*rows[some], strict=True)
        torch.testing.assert_close(mixing([left, right], own), expected[some], rtol=1e-4, atol=1e-5)


def test_inputs_of_one_part_come_together_and_all_others_are_a_rows_own() -> None:
    model = seeded(Fusion)
    inputs = bound(model, *fusion_inputs(4).values())
    parts = [["rgb", "texture"]]
    rows = [[0, 3], [2, 1], [1, 1], [3, 0]]
    found = mixing_of(model, inputs, parts)([[0, 2, 1, 3]], [3, 1, 1, 0])
    torch.testing.assert_close(found, one_by_one(model, inputs, parts, rows), rtol=1e-4, atol=1e-5)


def test_what_sees_one_part_never_runs_again() -> None:
    model = seeded(Fusion)
    mixing = mixing_of(model, bound(model, *fusion_inputs(3).values()), [["rgb"], ["depth"]])
    mixing([[0], [1]], [2])  # pays for the proof
    with counted(model) as runs:
        mixing([[2, 1, 0], [1, 1, 0]], [0, 1, 2])
    assert {path.partition(".")[0] for path in runs} == {"", "attn", "head"}
    assert all("_call_impl" not in vars(module) for module in model.modules())


class Encoder(nn.Linear):
    """Leaves behind what it computed, beside what it returns."""

    def forward(self, x: Tensor) -> Tensor:
        self.memory = super().forward(x.flatten(1))
        return self.memory.tanh()


class Recall(nn.Module):
    """Returns what the encoder left: it is given nothing, and computes nothing."""

    def forward(self, of: tuple[Encoder]) -> Tensor:
        return of[0].memory


class Remembering(nn.Module):
    def __init__(self, recall: bool = True) -> None:
        super().__init__()
        self.encoder, self.recall = Encoder(768, 8), Recall() if recall else None
        self.other, self.head = nn.Linear(768, 8), nn.Bilinear(8, 8, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        seen = self.encoder(x)
        kept = self.encoder.memory if self.recall is None else self.recall((self.encoder,))
        return self.head(seen + kept, self.other(y.flatten(1)))


class Shelf(Remembering):
    """What the encoder leaves is on a shelf, which is the same object before and after."""

    def __init__(self) -> None:
        super().__init__(recall=False)
        self.shelf: dict[str, Tensor] = {}
        self.encoder = Shelving(self.shelf)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(self.encoder(x) + self.shelf["x"], self.other(y.flatten(1)))


class Shelving(nn.Module):
    def __init__(self, shelf: dict[str, Tensor]) -> None:
        super().__init__()
        self.net, self.shelf = nn.Linear(768, 8), shelf

    def forward(self, x: Tensor) -> Tensor:
        self.shelf["x"] = self.net(x.flatten(1))
        return self.shelf["x"].tanh()


def all_pairs(model: nn.Module, b: int = 6) -> tuple[Mixing, Tensor, Tensor]:
    """A mixing of two inputs, its scores of every combination, and those of single passes."""
    inputs, parts = bound(model, *pair(b)), [["x"], ["y"]]
    mixing = mixing_of(model, inputs, parts)
    rows = [[i, j, 0] for i, j in product(range(b), repeat=2)]
    found = mixing(list(zip(*rows, strict=True))[:2], [0] * len(rows))
    return mixing, found, one_by_one(model, inputs, parts, rows)


@pytest.mark.parametrize("recall", [True, False])
def test_what_leaves_something_behind_runs_again(recall: bool) -> None:
    model = seeded(Remembering, recall=recall)
    mixing, found, expected = all_pairs(model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with counted(model) as runs:
        mixing([[1], [2]], [0])
    # What returns a part without being given it depends on it, and does not run.
    assert set(runs) == {"", "encoder", "head"}


def test_what_is_left_behind_unseen_is_noticed_and_all_is_run() -> None:
    model = seeded(Shelf)
    with pytest.warns(UserWarning, match="fusion of Shelf on recorded encodings does not give"):
        mixing, found, expected = all_pairs(model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with counted(model) as runs:
        mixing([[1], [2]], [3])  # a row that was not asked for before; without another warning
    assert set(runs) == {"", "encoder", "encoder.net", "other", "head"}


def test_what_a_hook_of_the_user_makes_of_an_encoding_counts() -> None:
    model = seeded(Remembering)
    model.other.register_forward_hook(lambda module, args, output: output.square())
    _, found, expected = all_pairs(model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_part_that_the_output_ignores_is_not_used() -> None:
    class Deaf(nn.Module):
        def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
            return x.flatten(1)[:, :2] + 0 * z.detach().mean() + y.shape[2]

    model = Deaf()
    x, y = pair()
    assert mixing_of(model, bound(model, x, y, x), [["x"], ["y"], ["z"]]).used == [True, False, True]


class Company(nn.Module):
    """Features are centred over the batch, so a row's score depends on the others."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(768, 8), nn.Linear(768, 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = self.left(x.flatten(1)), self.right(y.flatten(1))
        return ((a - a.mean(0)).tanh() * b).sum(1, keepdim=True)


def test_rows_that_depend_on_their_company_run_alone() -> None:
    model, x, y = seeded(Company), *pair(4)
    mixing = mixing_of(model, bound(model, x, y), [["x"], ["y"]])
    left, right = [0, 2, 3], [1, 1, 0]
    expected = torch.cat([model(x[[i]], y[[j]])[:, 0] for i, j in zip(left, right, strict=True)]).detach()
    assert not mixing.together
    torch.testing.assert_close(mixing([left, right], [0, 0, 0]), expected)


class Fixed(nn.Module):
    """Takes so many samples and no other number."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.head = size, nn.Linear(768, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head((x * y).reshape(self.size, 768))


@pytest.mark.parametrize("b", [1, 2, 3])
def test_a_model_for_one_size_of_batch_runs_copies_of_a_row(b: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, (x, y) = Fixed(b), pair(b + 1)
    left, right = [0, b, 0], [b, 0, 0]
    rows = zip(left, right, strict=True)
    expected = torch.stack([model(x[[i] * b], y[[j] * b])[0, 0] for i, j in rows]).detach()
    mixing = mixing_of(model, bound(model, x, y), [["x"], ["y"]])
    assert mixing.output is None  # with what replaces them there are too many
    assert mixing.used == [True, True]
    torch.testing.assert_close(mixing([left, right], [0, 0, 0]), expected)


def test_scores_are_read_with_the_samples_of_their_rows() -> None:
    model = seeded(Siamese)
    x, y = pair()
    classes = torch.tensor([2, 0, 1])

    def read(output: Tensor, samples: list[int]) -> Tensor:
        return output.gather(1, classes[torch.as_tensor(samples)][:, None])[:, 0]

    found = mixing_of(model, bound(model, x, y), [["before"], ["after"]], read)([[0, 1], [2, 2]], [0, 2])
    expected = model(x[[0, 1]], y[[2, 2]]).detach()
    torch.testing.assert_close(found, torch.stack([expected[0, 2], expected[1, 1]]), rtol=1e-4, atol=1e-5)


def test_what_sees_no_part_never_runs_again_either() -> None:
    class Placed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.place, self.head = nn.Linear(4, 8), nn.Bilinear(768, 768, 8)
            self.register_buffer("at", torch.rand(4))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.head(x.flatten(1), y.flatten(1)) * self.place(self.at)

    model = seeded(Placed)
    mixing, found, expected = all_pairs(model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with counted(model) as runs:
        mixing([[1], [2]], [0])
    assert set(runs) == {"", "head"}


def test_a_branch_by_all_rows_lets_each_run_alone() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            both = x + y
            return both * (2 if both.mean() > 0 else -1)

    # Alone, both rows of the proof take the branch that all rows take together, and the second row that is asked for does not.
    model, x, y = Branching().eval(), torch.tensor([[5.0], [-1.0], [0.0]]), torch.tensor([[0.0], [5.0], [0.0]])
    inputs, parts, read = Inputs(x, y).bind(model), [["x"], ["y"]], lambda output, rows: output[:, 0]
    mixing = Mixing(model, inputs, parts, read, 2, Singly(model, inputs, parts, read, 2))
    assert mixing([[0, 1], [2, 2]], [0, 1]).tolist() == [10.0, 1.0]
