"""What maps cost beside a bare forward pass: multicam and its peers, in one run, as Markdown.

Weights are random. Sides take turns within every repetition; ratios are those of medians.

    python -m benchmarks.engine --threads 2 --write docs/explanation/what-it-costs.md
    python -m benchmarks.engine --part gradient --part perturb --repeat 10
"""

import argparse
import gc
import os
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import branches, catalogue, gradient, perturb, scaling
from benchmarks.meter import MIB, Setting, known_memory, machine
from benchmarks.tables import goals_met, section

PARTS = {
    "branches": branches.part,
    "gradient": gradient.part,
    "perturb": perturb.part,
    "scaling": scaling.part,
    "catalogue": catalogue.part,
}
MARK = "<!-- What `python -m benchmarks.engine --write` prints follows. -->"


def report(parts: Sequence[str], setting: Setting) -> str:
    """Where the numbers come from, a check of the memory meter, the goals and the tables."""
    began = time.perf_counter()
    known = known_memory(setting.device) / MIB
    gc.freeze()  # what was imported is no garbage, and looking through it before every run takes most of a quick report
    with warnings.catch_warnings():
        # Maps of random weights may well be empty; what they show is not the question here.
        warnings.simplefilter("ignore")
        measured = [PARTS[name](setting) for name in parts]
    gc.unfreeze()
    goals = [goal for part in measured for goal in part.goals]
    where = (
        f"{machine(setting.device)}. Parts: {', '.join(parts)}{' (quick: small models)' if setting.quick else ''}; "
        f"medians of {setting.repeat} repetitions; {(time.perf_counter() - began) / 60:.1f} minutes. Check of the memory "
        f"meter: three tensors of 32 MiB, two at a time, read {known:.1f} MiB."
    )
    results = ["### Goals", goals_met(goals)] if goals else []
    return "\n\n".join([where, *results, *map(section, measured)])


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the report, or write it into a page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", choices=PARTS, action="append", help="what to measure, several times (all)")
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
    text = report(given.part or list(PARTS), Setting(given.device, given.repeat, given.quick))
    if given.write is None:
        print(text)
        return
    before, mark, _ = given.write.read_text().partition(MARK)
    if not mark:
        parser.error(f"{given.write} has no line {MARK}")
    given.write.write_text(f"{before}{MARK}\n\n{text}\n")


if __name__ == "__main__":
    main()
