"""Full passes run all, short ones what depends on the change, and both give the scores of a plain pass."""

import pytest
import torch
from torch import Tensor, nn

from multicam import Inputs, Layer, MulticamError
from multicam.watch.reruns import Reruns, count, pair, rows_of
from tests.helpers.counting import counted


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(1, 4, 3), nn.Linear(8, 2)

    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        return self.head(torch.cat([self.a(rgb).relu().mean((2, 3)), self.b(depth).relu().mean((2, 3))], 1))


def made(source: Layer | tuple[str, ...]) -> tuple[nn.Module, Inputs, Reruns]:
    torch.manual_seed(0)
    model = Fused().eval()
    call = Inputs(torch.rand(1, 3, 8, 8), torch.rand(1, 1, 8, 8)).bind(model)
    reruns = Reruns(model, call, source, lambda output, n: output[:, 1])
    torch.testing.assert_close(reruns.record(), model(*call.args)[:, 1].detach())
    return model, call, reruns


def test_changed_inputs_run_one_branch() -> None:
    model, call, reruns = made(("depth",))
    values = {"depth": torch.rand(3, 1, 8, 8)}
    with torch.no_grad():
        expected = model(call.args[0].expand(3, -1, -1, -1), values["depth"])[:, 1]
    probes = reruns.probes(values)
    assert count(probes) == 2
    reruns.full(rows_of(probes, 0))
    torch.testing.assert_close(reruns.full(values), expected)
    with counted(model) as counts:
        torch.testing.assert_close(reruns.short(values), expected)
    assert set(counts) == {"", "b", "head"}
    with counted(model) as counts:
        reruns.full(values)
    assert set(counts) == {"", "a", "b", "head"}


def test_changed_activations_run_what_is_behind() -> None:
    model, call, reruns = made(Layer("b"))
    acts = torch.rand(2, 4, 6, 6)
    with torch.no_grad():
        a = model.a(call.args[0]).relu().mean((2, 3)).expand(2, -1)
        expected = model.head(torch.cat([a, acts.relu().mean((2, 3))], 1))[:, 1]
    reruns.full(rows_of(acts, 0))
    torch.testing.assert_close(reruns.full(acts), expected)
    with counted(model) as counts:
        torch.testing.assert_close(reruns.short(acts), expected)
    assert set(counts) == {"", "head"}
    reruns.forget()
    with counted(model) as counts:
        torch.testing.assert_close(reruns.short(acts), expected)
    assert set(counts) == {"", "a", "b", "head"}


def test_what_ifs_are_taken_apart_and_put_together() -> None:
    values = {"x": torch.rand(3, 2), "y": torch.rand(3, 1)}
    first, last = rows_of(values, 0), rows_of(values, 2)
    both = pair(first, last)
    assert count(values) == 3 and count(both) == 2
    assert all(torch.equal(both[name], x[[0, 2]]) for name, x in values.items())
    assert torch.equal(pair(values["x"][:1], values["x"][1:2]), values["x"][:2])


def test_no_pass_makes_a_graph() -> None:
    model, _, reruns = made(("depth",))
    graphs: list[bool] = []
    model.head.register_forward_hook(lambda module, args, output: graphs.append(torch.is_grad_enabled()))
    values = {"depth": torch.rand(2, 1, 8, 8)}
    reruns.record()
    reruns.leave_another()
    reruns.full(values)
    reruns.short(values)
    assert graphs == [False] * 4


@pytest.mark.parametrize("shape", [(2, 4, 6, 5), (2, 4, 6, 7), (2, 3, 6, 6), (2, 4, 36)])
def test_activations_that_do_not_fit_the_layer_are_refused(shape: tuple[int, ...]) -> None:
    _, _, reruns = made(Layer("b"))
    assert reruns.check(torch.rand(2, 4, 6, 6)) == 2
    with pytest.raises(MulticamError, match="what-ifs are a tensor"):
        reruns.check({"depth": torch.rand(2, 1, 8, 8)})
    with pytest.raises(MulticamError, match=r"do not fit layer 'b', which has \(n, 4, 6, 6\)"):
        reruns.check(torch.rand(shape))


@pytest.mark.parametrize(
    ("error", "told", "message"),
    [
        (
            ValueError("too dark"),
            MulticamError,
            "Fused ran with the sample as it is, but not with a what-if of it: too",
        ),
        (torch.OutOfMemoryError("no room"), torch.OutOfMemoryError, "no room"),
    ],
    ids=["refused", "out of memory"],
)
def test_an_error_of_a_what_if_is_told_as_such(error: Exception, told: type[Exception], message: str) -> None:
    model, _, reruns = made(("depth",))

    def refuse(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise error

    model.b.register_forward_pre_hook(refuse)
    with pytest.raises(told, match=message):
        reruns.full({"depth": torch.rand(2, 1, 8, 8)})
