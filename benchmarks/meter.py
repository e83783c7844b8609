"""Time and memory of several ways to do the same work, side by side, and what they say about a goal."""

import gc
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

MIB = 2**20
SLOW_TURNS = 2


@dataclass(frozen=True)
class Setting:
    """Where and how much is measured: the real models, or small ones that only show that everything runs."""

    device: torch.device
    repeat: int
    quick: bool

    def resnet(self, depth: int) -> nn.Module:
        """A ResNet with random weights."""
        torch.manual_seed(0)
        made = timm.create_model("test_resnet") if self.quick else getattr(torchvision.models, f"resnet{depth}")()
        model: nn.Module = made.eval().to(self.device)
        return model

    def image(self, batch: int, size: int = 224) -> Tensor:
        """Noise; smaller where the models are."""
        size = max(size // 4, 64) if self.quick else size
        return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(self.device)

    def few(self, number: int, fewer: int) -> int:
        """The number, or fewer for the small models."""
        return fewer if self.quick else number


@dataclass(frozen=True)
class Side:
    """One way to do the work.

    Attributes:
        run: What is measured.
        share: The part of the work that `run` does, where all of it takes too long; its time is divided by it.
        slow: Timed in the first turns only, and its memory is not measured.
    """

    run: Callable[[], object]
    share: float = 1.0
    slow: bool = False


class Cost(NamedTuple):
    """What a side costs: the seconds of every turn for all of the work, and the peak of its extra memory in bytes."""

    times: list[float]
    memory: int | None

    @property
    def median(self) -> float:
        """The median time."""
        return float(np.median(self.times))


class Goal(NamedTuple):
    """A number, and the most (or with `least` the least) that it may be."""

    work: str
    value: float
    limit: float
    least: bool = False

    @property
    def reached(self) -> bool:
        """Whether the number keeps to the limit."""
        return self.value >= self.limit if self.least else self.value <= self.limit


class Part(NamedTuple):
    """A section of the report: its title, what was measured, tables in Markdown, and goals."""

    title: str
    text: str
    tables: Sequence[str]
    goals: Sequence[Goal] = ()


def measure(model: nn.Module, sides: Mapping[str, Side], setting: Setting) -> dict[str, Cost]:
    """What every side costs. The sides take turns, so that a disturbance hits all of them alike."""
    memory: dict[str, int | None] = {}
    for name, side in sides.items():  # which also warms them up
        model.zero_grad(set_to_none=True)
        memory[name] = None if side.slow else peak_memory(side.run, setting.device)
    times: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides.items())
    for turn in range(setting.repeat):
        start = turn % len(order)
        for name, side in order[start:] + order[:start]:
            if not (side.slow and turn >= SLOW_TURNS):
                model.zero_grad(set_to_none=True)
                times[name].append(seconds(side.run, setting.device) / side.share)
    return {name: Cost(times[name], memory[name]) for name in sides}


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """The time of one run."""
    gc.collect()
    _wait(device)
    began = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - began


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """The most bytes that PyTorch's allocator had handed out at one time during `run`, beyond what it had before.

    Tensors, what autograd saves and the scratch memory of kernels count, to the byte and alike on every run: on CUDA by
    the allocator's own peak, on the CPU by adding up every allocation and release that the profiler reports. NumPy's and
    OpenCV's arrays do not count, which flatters pytorch-grad-cam by a few maps.
    """
    gc.collect()
    _wait(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        seen.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    events.sort(key=lambda event: (event["ts"], event["args"]["Ev Idx"]))
    return max(accumulate((int(event["args"]["Bytes"]) for event in events), initial=0))


def known_memory(device: torch.device) -> int:
    """What the memory meter reads of three tensors of 32 MiB, two at a time."""

    def two_of_three() -> Tensor:
        first = torch.ones(32 * MIB, dtype=torch.uint8, device=device)
        second = first.clone()
        del first
        return second.clone()

    return peak_memory(two_of_three, device)


def machine(device: torch.device) -> str:
    """Where and when the numbers were measured."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "grad-cam", "captum", "torchcam"))
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{name}, {threads}; {versions}; {datetime.now(UTC):%Y-%m-%d}"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
