"""`python -m tests.fuzz --minutes 5 --seed 0`: random models until the time is over, and the smallest specs that fail."""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator

import torch

from tests.fuzz.checks import Failure, failures
from tests.fuzz.models import Spec
from tests.fuzz.specs import random_spec, smallest


def found(seeds: Iterator[int], until: float, told: Counter[tuple[str, ...]], shrink: bool) -> int:
    """Try seeds until the time is over; how many models were tried."""
    count = 0
    for seed in seeds:
        if time.monotonic() > until:
            break
        spec = random_spec(seed)
        count += 1
        kinds: dict[tuple[str, ...], list[Failure]] = {}
        for failure in failures(spec):
            kinds.setdefault(kind_of(failure), []).append(failure)
        for kind, several in kinds.items():
            told[kind] += 1
            small = shrunk(spec, several[0]) if shrink and told[kind] <= 3 else spec
            methods = ", ".join(dict.fromkeys(failure.method for failure in several))
            say(f"{seed} {methods} {several[0].kind}: {several[0].detail[:200]}\n    {small!r}")
    return count


def kind_of(failure: Failure) -> tuple[str, ...]:
    """What failures of one cause have in common, as far as can be told."""
    maps = "CAM" in failure.method and failure.method != "AblationCAM"
    head = " ".join(failure.detail.split()[:5]) if failure.kind in ("crashed", "refused") else ""
    return "maps" if maps else failure.method, failure.kind, head


def shrunk(spec: Spec, failure: Failure) -> Spec:
    """The smallest spec with a failure of the same kind."""
    return smallest(spec, lambda other: any(kind_of(f) == kind_of(failure) for f in failures(other, failure.method)))


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first model; the others count on from it")
    parser.add_argument("--models", type=int, default=10**9, help="how many at most")
    parser.add_argument("--no-shrink", action="store_true", help="print specs as they were drawn")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    told: Counter[tuple[str, ...]] = Counter()
    seeds = iter(range(asked.seed, asked.seed + asked.models))
    count = found(seeds, time.monotonic() + 60 * asked.minutes, told, not asked.no_shrink)
    say(f"{count} models, {sum(told.values())} failures")
    for kind, times in told.most_common():
        say(f"{times:5} {' '.join(kind)}")
    sys.exit(bool(told))


if __name__ == "__main__":
    main()
