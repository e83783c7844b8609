"""The benchmark's command prints every row, and its memory meter reads what was allocated."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TINY = ["--size", "64", "--batch", "1", "--repeat", "1", "--threads", "1"]
MULTICAM_ROWS, PEER_ROWS = 4, 7


@pytest.fixture(scope="module")
def printed() -> str:
    command = [sys.executable, "-m", "benchmarks.engine", *TINY]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def rows(printed: str) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if line[:1] == "|"]
    assert {len(row) for row in cells} == {7}
    return {name: values for name, *values in cells[2:]}


def test_every_row_is_there(rows):
    assert next(iter(rows)) == "bare forward, `no_grad`"
    assert sum(name.startswith("**multicam**") for name in rows) == MULTICAM_ROWS
    assert sum(name.startswith(("pytorch-grad-cam", "captum", "torchcam")) for name in rows) == PEER_ROWS
    assert len(rows) == 1 + MULTICAM_ROWS + PEER_ROWS


def test_the_bare_forward_is_the_unit(rows):
    _, _, time_ratio, _, memory_ratio, gradients = rows["bare forward, `no_grad`"]
    assert (time_ratio, memory_ratio, gradients) == ("1.00", "1.00", "untouched")


def test_only_a_full_backward_changes_the_gradients_of_parameters(rows):
    changed = {name for name, values in rows.items() if values[-1] == "changed"}
    assert changed == {"pytorch-grad-cam, a wrapper per branch"}


def test_the_memory_meter_reads_a_known_allocation(printed):
    assert "three tensors of 32 MiB, two at a time, read 64.0 MiB" in printed
