"""Models that run their branches in threads of their own: what is told of them is what is told of the same branches one after the other.

A branch in a pool was not heard of, and its input had no share; and hooks of a pass heard the predictions of others.
"""

import asyncio
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import multicam as mc

Work = Callable[[], Tensor]
Run = Callable[[list[Work]], list[Tensor]]


def one_after_the_other(works: list[Work]) -> list[Tensor]:
    return [work() for work in works]


def in_pool(pool: ThreadPoolExecutor) -> Run:
    """A pool that was made long before the pass, and whose threads may have served others."""
    return lambda works: [future.result() for future in [pool.submit(work) for work in works]]


def mapped(pool: ThreadPoolExecutor) -> Run:
    """`map`, by which a thread takes what comes."""
    return lambda works: list(pool.map(lambda work: work(), works))


def as_they_come(pool: ThreadPoolExecutor) -> Run:
    """Results by whichever is ready first, put in order afterwards."""

    def run(works: list[Work]) -> list[Tensor]:
        futures = {pool.submit(work): i for i, work in enumerate(works)}
        found = {futures[future]: future.result() for future in as_completed(futures)}
        return [found[i] for i in range(len(works))]

    return run


def one_each(pool: ThreadPoolExecutor) -> Run:
    """A thread for each branch, which leaves its result on a list."""

    def run(works: list[Work]) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        threads = [
            threading.Thread(target=lambda i=i, work=work: found.__setitem__(i, work())) for i, work in enumerate(works)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [found[i] for i in range(len(works))]

    return run


def one_inside_of_another(pool: ThreadPoolExecutor) -> Run:
    """The thread of a branch hands the next one to a pool that it makes."""

    def run(works: list[Work]) -> list[Tensor]:
        with ThreadPoolExecutor(1) as inner:
            if len(works) == 1:
                return [inner.submit(works[0]).result()]
            rest = inner.submit(run, works[1:])
            return [works[0](), *rest.result()]

    return run


def by_asyncio(pool: ThreadPoolExecutor) -> Run:
    """A loop of events, and `to_thread` for each branch."""

    async def all_of(works: list[Work]) -> list[Tensor]:
        return list(await asyncio.gather(*(asyncio.to_thread(work) for work in works)))

    return lambda works: asyncio.run(all_of(works))


WAYS: dict[str, Callable[[ThreadPoolExecutor], Run]] = {
    way.__name__: way for way in (in_pool, mapped, as_they_come, one_each, one_inside_of_another, by_asyncio)
}


class Cameras(nn.Module):
    """Three cameras with an encoder each, which all run at once, and a head on all of them."""

    def __init__(self, run: Run = one_after_the_other) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(nn.Conv2d(3, 4, 3) for _ in range(3))
        self.head, self.run = nn.Linear(12, 3), run

    def forward(self, left: Tensor, front: Tensor, right: Tensor) -> Tensor:
        def work(encoder: nn.Module, x: Tensor) -> Tensor:
            seen: Tensor = encoder(x).relu().mean((2, 3))  # with a graph, as threads have a mode of their own
            return seen

        each = zip(self.encoders, (left, front, right), strict=True)
        found = self.run([lambda encoder=encoder, x=x: work(encoder, x) for encoder, x in each])
        out: Tensor = self.head(torch.cat(found, 1)).tanh()
        return out


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: threading.get_ident(), range(9)))  # all of its threads are there
        yield pool


EXPLAIN: dict[str, Callable[[nn.Module, dict[str, Tensor]], Any]] = {
    "contribution": lambda model, x: mc.contribution(model, x, 1).shapley,
    "occlusion": lambda model, x: mc.occlusion(model, x, 1, patch=4)["right"],
    "HiResCAM": lambda model, x: mc.HiResCAM(model, {"front": "encoders.1", "right": "encoders.2"})(x, 1, signed=True),
    "AblationCAM": lambda model, x: mc.AblationCAM(model, {"right": "encoders.2"})(x, 1, signed=True),
    "gradient": lambda model, x: mc.gradient(model, x, 1)["left"],
    "integrated gradients": lambda model, x: mc.integrated_gradients(model, x, 1, steps=8)["front"],
}


@pytest.mark.parametrize("explain", EXPLAIN)
@pytest.mark.parametrize("way", WAYS)
def test_branches_in_threads_count_as_in_none(way: str, explain: str, pool: ThreadPoolExecutor) -> None:
    torch.manual_seed(0)
    plain, threaded = Cameras().eval(), Cameras().eval()
    threaded.load_state_dict(plain.state_dict())
    threaded.run = WAYS[way](pool)
    x = {name: torch.rand(2, 3, 8, 8) for name in ("left", "front", "right")}
    expected = EXPLAIN[explain](plain, x)
    for _ in range(2):
        torch.testing.assert_close(plainly(EXPLAIN[explain](threaded, x)), plainly(expected))


def plainly(found: Any) -> Any:
    """Maps as a dict, which is what `assert_close` compares."""
    return found if isinstance(found, Tensor) else dict(found)


@pytest.mark.filterwarnings("ignore:.*in a thread of the model's own.*from corner to corner:UserWarning")
def test_a_worker_that_waits_for_ever_counts_as_none() -> None:
    """A thread that was started when the model was made takes branches from a queue, as a server's does.

    Its operations are out of sight, so that its convolutions have places by their axes alone, which a warning says.
    """
    torch.manual_seed(0)
    todo: queue.Queue[Any] = queue.Queue()

    def serve() -> None:
        while (task := todo.get()) is not None:
            work, found, done = task
            found.append(work())
            done.set()

    worker = threading.Thread(target=serve, daemon=True)
    worker.start()

    def run(works: list[Work]) -> list[Tensor]:
        tasks: list[tuple[Work, list[Tensor], threading.Event]] = [(work, [], threading.Event()) for work in works]
        for task in tasks:
            todo.put(task)
        for _, _, done in tasks:
            assert done.wait(30)
        return [found[0] for _, found, _ in tasks]

    try:
        plain, served = Cameras().eval(), Cameras().eval()
        served.load_state_dict(plain.state_dict())
        served.run = run
        x = {name: torch.rand(2, 3, 8, 8) for name in ("left", "front", "right")}
        for explain in EXPLAIN.values():
            torch.testing.assert_close(plainly(explain(served, x)), plainly(explain(plain, x)))
    finally:
        todo.put(None)
        worker.join()
