"""The threads that work for a pass are those that it hands work to, and no others."""

import _thread
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import ThreadPool
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from multicam import AblationCAM, GradCAM, contribution, occlusion
from multicam.watch.threads import at_work, lend, own, works


def in_pool(pool: ThreadPoolExecutor, work: Callable[[], Any]) -> Any:
    return pool.submit(work).result()


def started(_: object, work: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


def mapped(pool: ThreadPool, work: Callable[[], Any]) -> Any:
    return pool.map(lambda _: work(), [0])[0]


WAYS = {
    "pool": (lambda: ThreadPoolExecutor(1), in_pool),
    "thread": (lambda: None, started),
    "thread pool": (lambda: ThreadPool(1), mapped),
}


class Fused(nn.Module):
    """Two branches, of which one may run in a thread."""

    def __init__(self, pool: Any = None, run: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(1, 4, 3), nn.Linear(8, 3)
        self.pool, self.run = [pool], run

    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        a, graph = self.a(rgb).relu().mean((2, 3)), torch.is_grad_enabled()

        def work() -> Tensor:
            with torch.set_grad_enabled(graph):
                return self.b(depth).relu().mean((2, 3))

        b = work() if self.run is None else self.run(self.pool[0], work)
        return self.head(torch.cat([a, b], 1)).tanh()


@pytest.mark.parametrize("way", WAYS)
def test_a_branch_in_a_thread_counts_as_in_none(way: str) -> None:
    torch.manual_seed(0)
    make, run = WAYS[way]
    pool = make()
    plain, threaded = Fused().eval(), Fused(pool, run).eval()
    threaded.load_state_dict(plain.state_dict())
    inputs = {"rgb": torch.rand(2, 3, 8, 8), "depth": torch.rand(2, 1, 8, 8)}
    for explain in (
        lambda model: contribution(model, inputs, 1).shapley,
        lambda model: occlusion(model, inputs, 1, patch=4)["depth"],
        lambda model: GradCAM(model, {"depth": "b"})(inputs, 1, signed=True)["depth"],
        lambda model: AblationCAM(model, {"depth": "b"})(inputs, 1, signed=True)["depth"],
    ):
        torch.testing.assert_close(explain(threaded), explain(plain))
    if pool is not None:
        (pool.shutdown if isinstance(pool, ThreadPoolExecutor) else pool.terminate)()


def test_others_may_predict_while_one_explains() -> None:
    torch.manual_seed(0)
    model, inputs = Fused().eval(), {"rgb": torch.rand(2, 3, 8, 8), "depth": torch.rand(2, 1, 8, 8)}
    other = torch.rand(3, 3, 8, 8), torch.rand(3, 1, 8, 8)
    with torch.no_grad():
        expected, features = model(*other), model.a(other[0])
    maps = AblationCAM(model, {"depth": "b"})(inputs, 1, signed=True)["depth"]
    stop, wrong = threading.Event(), []

    def predict() -> None:
        while not stop.is_set():
            with torch.no_grad():
                if not (torch.equal(model(*other), expected) and torch.equal(model.a(other[0]), features)):
                    wrong.append("prediction")

    server = threading.Thread(target=predict)
    server.start()
    try:
        for _ in range(5):
            found = AblationCAM(model, {"depth": "b"})(inputs, 1, signed=True)["depth"]
            torch.testing.assert_close(found, maps)
            contribution(model, inputs, 1)
    finally:
        stop.set()
        server.join()
    assert not wrong


def test_who_works() -> None:
    assert works()  # no pass, so nobody is left out
    answers: dict[str, bool] = {}
    with ThreadPoolExecutor(1) as pool:
        with at_work():
            answers["own"] = works()
            answers["handed"] = pool.submit(works).result()
            thread = threading.Thread(target=lambda: answers.__setitem__("started", works()))
            thread.start()
            thread.join()
        assert answers == {"own": True, "handed": True, "started": True}
        with at_work():
            assert not in_stranger(works)


def in_stranger(ask: Callable[[], bool]) -> bool:
    """The answer that a thread gets which was not started by one of the pass."""
    done, found = threading.Event(), []

    def run() -> None:
        found.append(ask())
        done.set()

    _thread.start_new_thread(run, ())
    done.wait(10)
    return bool(found[0])


def test_a_stranger_works_for_a_pass_with_what_the_pass_lends_it_or_with_its_memory() -> None:
    lent, mine, weight = (torch.rand(4) for _ in range(3))
    with at_work():
        own([mine, weight])
        lend([lent], [weight])
        for given, expected in (
            (lent, True),
            (lent[1:], True),
            (lent.detach(), False),
            (mine, True),
            (mine.detach(), True),
            (weight, False),
            ([weight, mine], True),
            (torch.rand(4), False),
        ):
            assert in_stranger(lambda given=given: works([given])) is expected
