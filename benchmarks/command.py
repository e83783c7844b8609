"""The command of a benchmark: which parts to measure, where, and where the report goes."""

import argparse
import gc
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.meter import MIB, Part, Setting, known_memory, machine
from benchmarks.tables import goals_met, section

Parts = Mapping[str, Callable[[Setting], Part]]


def mark(program: str) -> str:
    """The line of a page behind which a benchmark writes its report."""
    return f"<!-- What `python -m {program} --write` prints follows. -->"


def report(parts: Parts, setting: Setting) -> str:
    """Where the numbers come from, a check of the memory meter, the goals and the tables."""
    began = time.perf_counter()
    known = known_memory(setting.device) / MIB
    gc.freeze()  # what was imported is no garbage, and looking through it before every run takes most of a quick report
    with warnings.catch_warnings():
        # Maps of random weights may well be empty; what they show is not the question here.
        warnings.simplefilter("ignore")
        measured = [part(setting) for part in parts.values()]
    gc.unfreeze()
    goals = [goal for part in measured for goal in part.goals]
    where = (
        f"{machine(setting.device)}. Parts: {', '.join(parts)}{' (quick: small models)' if setting.quick else ''}; "
        f"medians of {setting.repeat} repetitions; {(time.perf_counter() - began) / 60:.1f} minutes. Check of the memory "
        f"meter: three tensors of 32 MiB, two at a time, read {known:.1f} MiB."
    )
    results = ["### Goals", goals_met(goals)] if goals else []
    return "\n\n".join([where, *results, *map(section, measured)])


def run(program: str, about: str, parts: Parts, arguments: Sequence[str] | None = None) -> None:
    """Print the report, or write it into a page."""
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=about.splitlines()[0])
    parser.add_argument("--part", choices=parts, action="append", help="what to measure, several times (all)")
    parser.add_argument("--repeat", type=int, default=5, help="timed passes of every row (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (%(default)s)")
    parser.add_argument("--device", type=torch.device, default="cpu", help="cpu, cuda, cuda:1 … (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="small models, to see that everything runs")
    parser.add_argument(
        "--write", type=Path, metavar="PAGE", help="a page whose results to replace, instead of printing"
    )
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports a missing GPU as an error
    chosen = {name: parts[name] for name in given.part or parts}
    text = report(chosen, Setting(given.device, given.repeat, given.quick))
    publish(text, given.write, mark(program))


def publish(text: str, page: Path | None, line: str) -> None:
    """Print a report, or write it into a page behind its line."""
    if page is None:
        print(text)
        return
    before, found, _ = page.read_text().partition(line)
    if not found:
        raise SystemExit(f"{page} has no line {line}")
    page.write_text(f"{before}{line}\n\n{text}\n")
