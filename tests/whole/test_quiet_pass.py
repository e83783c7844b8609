"""Whatever runs a model runs it in the same quiet pass: no part of it can be forgotten in one place."""

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import multicam as mc

ROOT = Path(__file__).parents[2]


class Ignoring(nn.Module):
    """A transformer of PyTorch's own, whose fast path rounds otherwise, and an input that is not used."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 3)

    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        out: Tensor = self.head(self.encoder(self.patch(rgb).flatten(2).mT).mean(1))
        return out


@pytest.mark.parametrize("width", [8, 16, 24, 32, 64, 128])
def test_an_ignored_input_of_a_transformer_has_no_gradient_and_is_not_refused(width: int) -> None:
    torch.manual_seed(width)
    inputs = {"rgb": torch.rand(2, 3, 16, 16), "depth": torch.rand(2, 1, 16, 16)}
    found = mc.gradient(Ignoring(width).eval(), inputs, 1)
    assert found["depth"].abs().max() == 0
    assert found["rgb"].abs().max() > 0


class Drawing(nn.Module):
    """Draws from every generator there is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, rgb: Tensor) -> Tensor:
        noise = torch.rand(()) + random.random() + np.random.rand()  # noqa: NPY002 (as models do)
        out: Tensor = self.head((self.conv(rgb).relu() * (1 + 0 * noise)).mean((2, 3)))
        return out


RUNS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "CAM": lambda model, x: mc.GradCAM(model, "conv")(x, 1),
    "masks": lambda model, x: mc.ScoreCAM(model, "conv")(x, 1),
    "full gradient": lambda model, x: mc.CompleteFullGrad(model)(x, 1),
    "gradient": lambda model, x: mc.gradient(model, x, 1),
    "curvature": lambda model, x: mc.ShapleyCAM(model, "conv")(x, 1),
    "shares": lambda model, x: mc.contribution(model, x, 1),
    "layers": mc.list_layers,
    "feature maps": lambda model, x: mc.feature_maps(model, x, "conv"),
    "kernels": lambda model, _: mc.kernels(model.get_submodule("conv")),
    "dream": lambda model, x: mc.activation_maximization(model, x, "conv", 0, steps=2),
    "captum": lambda model, x: mc.captum_attribution("Saliency", model, x, 1),
    "packed": lambda model, x: (lambda packed: packed(packed.pack(x)))(mc.PackedModel(model, x, ["conv"])),
}


def states() -> tuple[list[int], object, list[int]]:
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002


def moved() -> list[str]:
    """The runs behind which some random state is another one."""
    model, x, found = Drawing().eval(), torch.rand(1, 3, 8, 8), []
    for name, run in RUNS.items():
        before = states()
        run(model, x)
        found += [name] * (states() != before)
    return found


def test_every_random_state_is_as_before() -> None:
    # In a process without the tests' type checks, which draw from Python's generator.
    script = "from tests.whole.test_quiet_pass import moved; print(moved())"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("name", sorted(RUNS.keys() - {"packed"}))  # a proxy keeps the caller's modes
def test_a_caller_in_inference_mode_gets_the_same(name: str) -> None:
    model, x = Drawing().eval(), torch.rand(1, 3, 8, 8)
    expected = RUNS[name](model, x)
    with torch.inference_mode():
        found = RUNS[name](model, x)
        assert torch.is_inference_mode_enabled()
    assert repr(found) == repr(expected)


class Flexible(nn.Module):
    """Depth is read by flex attention, which compiles itself."""

    def __init__(self) -> None:
        super().__init__()
        self.rgb, self.depth, self.head = nn.Conv2d(3, 16, 4, 4), nn.Conv2d(1, 16, 4, 4), nn.Linear(16, 3)

    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        q, k = (x.flatten(2).mT[:, None] for x in (self.rgb(rgb), self.depth(depth)))
        out: Tensor = self.head(flex_attention(q, k, k)[:, 0].mean(1))
        return out


def first_of_a_process() -> None:
    """The first attention and the first shares of a process, whose compiler nobody has imported; shares by hand behind it."""
    import torch.nn.attention.flex_attention

    torch.manual_seed(0)
    model, rgb, depth = Flexible().eval(), torch.rand(2, 3, 16, 16), torch.rand(2, 1, 16, 16)
    assert mc.attention(model, {"rgb": rgb, "depth": depth})[0].source == "flex"
    found = mc.contribution(model, {"rgb": rgb, "depth": depth}, 1).shapley
    with torch.no_grad():
        v = {(i, j): model(i * rgb, j * depth)[:, 1] for i in (0, 1) for j in (0, 1)}
    first = (v[1, 0] - v[0, 0] + v[1, 1] - v[0, 1]) / 2
    torch.testing.assert_close(found, torch.stack([first, v[1, 1] - v[0, 0] - first], 1), atol=1e-6, rtol=1e-4)


def test_flex_attention_is_run_eagerly_also_by_the_first_pass_of_a_process() -> None:
    script = "from tests.whole.test_quiet_pass import first_of_a_process; first_of_a_process()"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
