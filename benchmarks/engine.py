"""What maps of every input cost beside a bare forward pass: multicam and its peers, in one run, as one Markdown table.

The model has three ResNet-18 trunks with random weights, fused by cross-attention. A row starts from the model and its
inputs, builds its engine, and ends with one map of each input at the input's size.

    python -m benchmarks.engine --repeat 20 --threads 2
"""

import argparse
import gc
import json
import os
import platform
import tempfile
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_grad_cam
import torch
import torchcam.methods
from captum.attr import LayerAttribution, LayerGradCam
from einops import rearrange
from jaxtyping import Float
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torchvision.models import resnet18

from multicam import GradCAM, HiResCAM, PackedModel, explain_methods
from multicam.catalogue import METHODS

BRANCHES = ("rgb", "frequency", "texture")
CLASS = 3
MIB = 2**20

Maps = Sequence[Any]  # one map per branch `(b h w)`, a tensor or an array


class ThreeBranch(nn.Module):
    """Three ResNet-18 trunks; the tokens of `rgb` read those of the other two by cross-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.rgb, self.frequency, self.texture = _trunk(), _trunk(), _trunk()
        self.attention = nn.MultiheadAttention(512, num_heads=8, batch_first=True)
        self.head = nn.Linear(512, 10)

    def forward(
        self, rgb: Float[Tensor, "b 3 h w"], frequency: Float[Tensor, "b 3 h w"], texture: Float[Tensor, "b 3 h w"]
    ) -> Float[Tensor, "b 10"]:
        """The class scores `(b 10)`."""
        query = rearrange(self.rgb(rgb), "b c h w -> b (h w) c")
        others = torch.cat([self.frequency(frequency), self.texture(texture)], dim=2)
        context = rearrange(others, "b c h w -> b (h w) c")
        read, _ = self.attention(query, context, context, need_weights=False)
        scores: Tensor = self.head((query + read).mean(1))
        return scores


class OneInput(nn.Module):
    """The wrapper that users of a tool for one input write today: the other inputs are fixed."""

    def __init__(self, model: nn.Module, inputs: Sequence[Tensor], free: int) -> None:
        super().__init__()
        self.model, self.inputs, self.free = model, inputs, free

    def forward(self, x: Tensor) -> Tensor:
        """The class scores for `x` in the place of the free input."""
        call = list(self.inputs)
        call[self.free] = x
        scores: Tensor = self.model(*call)
        return scores


class Workload:
    """The model, its inputs, and every way to explain it that the table compares."""

    def __init__(self, device: torch.device, batch: int, size: int) -> None:
        torch.manual_seed(0)
        self.device = device
        self.model = ThreeBranch().eval().to(device)
        self.inputs = tuple(torch.rand(batch, 3, size, size, device=device) for _ in BRANCHES)

    @property
    def rows(self) -> dict[str, Callable[[], Maps]]:
        """What is measured, by the name it has in the table; the bare forward is first."""
        return {
            "bare forward, `no_grad`": self.forward,
            "**multicam** GradCAM, layer4": lambda: self.multicam(GradCAM, "layer4"),
            "**multicam** HiResCAM, layer4": lambda: self.multicam(HiResCAM, "layer4"),
            "**multicam** GradCAM, layer2": lambda: self.multicam(GradCAM, "layer2"),
            f"**multicam** `explain_methods`, {len(METHODS)} methods, layer4": self.multicam_methods,
            "pytorch-grad-cam on `PackedModel`, one engine": self.packed_grad_cam,
            "pytorch-grad-cam on `PackedModel`, an engine per tap": self.packed_grad_cam_by_tap,
            "torchcam on `PackedModel`": self.packed_torchcam,
            "captum on `PackedModel`, a call per tap": self.packed_captum,
            "pytorch-grad-cam, a wrapper per branch": self.raw_grad_cam,
            "torchcam, raw model": self.raw_torchcam,
            "captum, raw model, a call per branch": self.raw_captum,
        }

    def forward(self) -> Maps:
        """No map: the unit of the table."""
        with torch.no_grad():
            self.model(*self.inputs)
        return ()

    def multicam(self, method: type[GradCAM | HiResCAM], layer: str) -> Maps:
        """All branches in one call."""
        cam = method(self.model, {branch: f"{branch}.{layer}" for branch in BRANCHES})
        return list(cam(self.inputs, CLASS).values())

    def multicam_methods(self) -> Maps:
        """All branches and all methods from one trace; the maps of the first method stand for the rest."""
        layers = {branch: f"{branch}.layer4" for branch in BRANCHES}
        return list(explain_methods(self.model, self.inputs, layers, METHODS, CLASS)["GradCAM"].values())

    def packed_grad_cam(self) -> Maps:
        """One engine for all taps. Its call averages them; the maps of single layers are read from what it keeps."""
        packed, x = self._packed()
        with pytorch_grad_cam.GradCAM(packed, packed.target_layers) as cam:
            cam(x, self._targets)
            return [maps[:, 0] for maps in cam.compute_cam_per_layer(x, self._targets, eigen_smooth=False)]

    def packed_grad_cam_by_tap(self) -> Maps:
        """What its manual teaches: a map of one layer is an engine with one layer."""
        packed, x = self._packed()
        return [_grad_cam(packed, tap, x, self._targets) for tap in packed.target_layers]

    def packed_torchcam(self) -> Maps:
        """One extractor with all taps."""
        packed, x = self._packed()
        with torchcam.methods.GradCAM(packed, [*packed.target_layers]) as cam:
            return [self._resized(grid[:, None]) for grid in cam(CLASS, packed(x))]

    def packed_captum(self) -> Maps:
        """One attribution per tap: it knows one layer at a time."""
        packed, x = self._packed()
        return [self._captum(packed, tap, x) for tap in packed.target_layers]

    def raw_grad_cam(self) -> Maps:
        """It takes one tensor: a wrapper and an engine for each branch."""
        return [
            _grad_cam(OneInput(self.model, self.inputs, i), layer, self.inputs[i], self._targets)
            for i, layer in enumerate(self._last_layers)
        ]

    def raw_torchcam(self) -> Maps:
        """The caller runs the model, so several inputs need no wrapper."""
        with torchcam.methods.GradCAM(self.model, [*self._last_layers]) as cam:
            return [self._resized(grid[:, None]) for grid in cam(CLASS, self.model(*self.inputs))]

    def raw_captum(self) -> Maps:
        """It takes tuples of inputs, and one layer at a time."""
        return [self._captum(self.model, layer, self.inputs) for layer in self._last_layers]

    @property
    def _last_layers(self) -> list[nn.Module]:
        return [self.model.get_submodule(f"{branch}.layer4") for branch in BRANCHES]

    @property
    def _targets(self) -> list[ClassifierOutputTarget]:
        return [ClassifierOutputTarget(CLASS)] * len(self.inputs[0])

    def _packed(self) -> tuple[PackedModel, Tensor]:
        packed = PackedModel(self.model, self.inputs, layers=self._last_layers)
        return packed, packed.pack(self.inputs)

    def _captum(self, model: nn.Module, layer: nn.Module, x: Any) -> Tensor:
        grid: Tensor = LayerGradCam(model, layer).attribute(x, target=CLASS, relu_attributions=True)
        return self._resized(grid)

    def _resized(self, grid: Tensor) -> Tensor:
        full: Tensor = LayerAttribution.interpolate(grid, self.inputs[0].shape[2:], "bilinear")
        return full[:, 0]


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
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        seen.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    events.sort(key=lambda event: (event["ts"], event["args"]["Ev Idx"]))
    return max(accumulate((int(event["args"]["Bytes"]) for event in events), initial=0))


def gradients_stay(model: nn.Module, run: Callable[[], Maps]) -> tuple[Maps, bool]:
    """What `run` returns, and whether it leaves every `param.grad` the same tensor with the same values."""
    parameters = list(model.parameters())
    marks = [torch.full_like(parameter, 0.5) for parameter in parameters]
    for parameter, mark in zip(parameters, marks, strict=True):
        parameter.grad = mark
    maps = run()
    kept = all(p.grad is mark and bool((mark == 0.5).all()) for p, mark in zip(parameters, marks, strict=True))
    model.zero_grad(set_to_none=True)
    return maps, kept


def seconds(workload: Workload, repeat: int) -> dict[str, list[float]]:
    """The times of every row; the rows take turns, so that a disturbance hits all of them alike."""
    rows = list(workload.rows.items())
    times: dict[str, list[float]] = {name: [] for name, _ in rows}
    for turn in range(repeat):
        start = turn % len(rows)
        for name, run in rows[start:] + rows[:start]:
            workload.model.zero_grad(set_to_none=True)
            gc.collect()
            _wait(workload.device)
            began = time.perf_counter()
            run()
            _wait(workload.device)
            times[name].append(time.perf_counter() - began)
    return times


def measure(workload: Workload, repeat: int) -> str:
    """The table in Markdown."""
    inputs, rows = workload.inputs, workload.rows
    sizes = [(len(x), *x.shape[2:]) for x in inputs]
    untouched, memory = {}, {}
    for name, run in rows.items():  # which also warms them up
        memory[name] = peak_memory(run, workload.device)
        maps, untouched[name] = gradients_stay(workload.model, run)
        shapes = [tuple(found.shape) for found in maps]
        assert shapes in ([], sizes), f"{name} returned {shapes} for inputs of {sizes}"
    times = seconds(workload, repeat)
    bare = next(iter(rows))
    unit = np.median(times[bare])
    lines = [
        "| maps of all three inputs | median s | quartiles | x forward | peak extra MiB | x forward | `param.grad` |",
        "|---|--:|--:|--:|--:|--:|---|",
    ]
    for name, found in times.items():
        low, median, high = np.percentile(found, [25, 50, 75])
        lines.append(
            f"| {name} | {median:.3f} | {low:.3f} to {high:.3f} | {median / unit:.2f} | {memory[name] / MIB:.1f} | "
            f"{memory[name] / memory[bare]:.2f} | {'untouched' if untouched[name] else 'changed'} |"
        )
    return "\n".join(lines)


def machine(device: torch.device) -> str:
    """Where the numbers come from."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "grad-cam", "captum", "torchcam"))
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; {versions}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print where the numbers come from, a check of the memory meter, and the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeat", type=int, default=20, help="timed passes of every row (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (%(default)s)")
    parser.add_argument("--device", type=torch.device, default="cpu", help="cpu, cuda, cuda:1 … (%(default)s)")
    parser.add_argument("--size", type=int, default=224, help="height and width of the inputs (%(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="samples (%(default)s)")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports a missing GPU as an error
    known = peak_memory(lambda: _two_of_three_blocks(given.device), given.device)
    with warnings.catch_warnings():
        # Maps of random weights may well be empty; what they show is not the question here.
        warnings.simplefilter("ignore")
        table = measure(Workload(given.device, given.batch, given.size), given.repeat)
    print(f"{machine(given.device)}; batch {given.batch}, {given.size} px, {given.repeat} repetitions.")
    print(f"Check of the memory meter: three tensors of 32 MiB, two at a time, read {known / MIB:.1f} MiB.\n")
    print(table)


def _trunk() -> nn.Sequential:
    children = list(resnet18(weights=None).named_children())
    return nn.Sequential(OrderedDict(children[:-2]))  # without the pooling and the head


def _grad_cam(model: nn.Module, layer: nn.Module, x: Tensor, targets: list[ClassifierOutputTarget]) -> Any:
    with pytorch_grad_cam.GradCAM(model, [layer]) as cam:
        return cam(x, targets)


def _two_of_three_blocks(device: torch.device) -> Tensor:
    first = torch.ones(32 * MIB, dtype=torch.uint8, device=device)
    second = first.clone()
    del first
    return second.clone()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
