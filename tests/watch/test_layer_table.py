"""The layers of a model, and which inputs each of them sees."""

import pytest
import torch
from torch import Tensor, nn

from multicam import HiResCAM, MulticamError, list_layers
from multicam.watch.layer_table import LayerTable
from tests.helpers.models import Fusion, Siamese, fusion_inputs, seeded


def test_the_layers_of_a_model_and_what_they_see() -> None:
    table = list_layers(seeded(Fusion), fusion_inputs())
    row = {info.path: info for info in table}
    assert row["rgb.net.0"].grid == (16, 16)
    assert row["rgb.net.0"].sees == ("rgb",)
    assert row["attn"].shapes == {"0": (2, 64, 16), "1": (2, 64, 64)}
    assert row["attn"].grid == (8, 8)
    assert row["attn"].sees == ("rgb", "depth", "texture")
    assert row["head"].grid is None
    assert "no spatial axes" in row["head"].note
    assert [info.path for info in table.find("Multihead")] == ["attn"]
    assert str(table).splitlines()[0].split() == ["layer", "kind", "returns", "grid", "sees"]
    x = torch.rand(2, 3, 16, 16)
    calls = [info for info in list_layers(seeded(Siamese), (x, x)) if info.kind == "Branch"]
    assert [(info.path, info.sees) for info in calls] == [("encoder#0", ("before",)), ("encoder#1", ("after",))]
    for info in calls:
        assert HiResCAM(seeded(Siamese), info.path)((x, x), 1, signed=True).shape == (2, *info.grid)


def test_integer_inputs_alone_still_list_their_layers() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten())
    assert [(i.path, i.sees) for i in list_layers(model, torch.zeros(2, 3, dtype=torch.long))] == [
        ("0", ("input",)), ("1", ("input",)),
    ]  # fmt: skip


def test_a_layer_sees_what_it_changes_with() -> None:
    """Each input is changed in turn, and what each layer returns is compared."""
    model, inputs = seeded(Fusion), fusion_inputs()
    kept: dict[str, Tensor] = {}

    def keep(path: str) -> None:
        def hook(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            kept[path] = (output[0] if isinstance(output, tuple) else output).clone()

        model.get_submodule(path).register_forward_hook(hook)

    table = list_layers(model, inputs)
    for info in table:
        keep(info.path)
    model(**inputs)
    before = dict(kept)
    seen: dict[str, list[str]] = {path: [] for path in before}
    for name, x in inputs.items():
        model(**inputs | {name: x.flip(0) + 0.1})
        for path, value in kept.items():
            if not torch.equal(value, before[path]):
                seen[path].append(name)
    assert {info.path: list(info.sees) for info in table} == seen
    assert [info.path for info in table] == list(before)  # in the order in which they return


def test_a_table_says_what_returns_several_tensors_and_where_nothing_proves_a_grid() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.split = nn.Conv2d(3, 4, 3), Split()

        def forward(self, x: Tensor) -> Tensor:
            return self.split(self.conv(x))["left"].mean((2, 3))

    class Split(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"left": x[:, :2], "right": x[:, 2:]}

    conv, split = list_layers(Two(), torch.rand(2, 3, 8, 10))
    assert (conv.path, conv.kind, conv.shapes, conv.grid, conv.note) == (
        "conv",
        "Conv2d",
        {"": (2, 4, 6, 8)},
        (6, 8),
        "",
    )
    assert split.shapes == {"left": (2, 2, 6, 8), "right": (2, 2, 6, 8)}
    assert split.grid is None and "pick=" in split.note
    assert repr(LayerTable([conv, split])).splitlines() == [
        "layer  kind    returns                                  grid   sees",
        "conv   Conv2d  (2, 4, 6, 8)                             6 x 8  x",
        "split  Split   left: (2, 2, 6, 8), right: (2, 2, 6, 8)  -      x",
    ]


def test_a_model_that_writes_into_its_input_is_listed_and_nothing_of_the_callers_changes() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x.mul_(2)
            return self.conv(x)

    model, x = Scaled(), torch.rand(2, 3, 8, 8)
    before = x.clone()
    assert [info.sees for info in list_layers(model, x)] == [("x",)]
    assert torch.equal(x, before) and not x.requires_grad
    assert not model.conv._forward_hooks and model.training and model.conv.weight.requires_grad


class Transformed(nn.Module):
    """A model that runs layers inside of a transform of torch.func."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.rgb, self.depth, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(1, 4, 3), nn.Linear(4, 5)

    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        match self.how:
            case "vmap":
                one = lambda x, y: self.head((self.rgb(x[None]) * self.depth(y[None])).mean((2, 3)))[0]  # noqa: E731
                return torch.vmap(one)(rgb, depth)
            case "vmap twice":
                seen = torch.vmap(torch.vmap(lambda x: self.rgb(x[None])[0]))(rgb[:, None])[:, 0]
                return self.head((seen * self.depth(depth)).mean((2, 3)))
            case "jvp":
                seen, _ = torch.func.jvp(self.rgb, (rgb,), (torch.ones_like(rgb),))
                return self.head((seen * self.depth(depth)).mean((2, 3)))
        return self.head((self.rgb(rgb) * self.depth(depth)).mean((2, 3)))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")  # jvp's own
@pytest.mark.parametrize("how", ["vmap", "vmap twice", "jvp", "none"])
def test_layers_inside_of_a_transform_see_what_they_see(how: str) -> None:
    model = seeded(lambda: Transformed(how))
    inputs = {"rgb": torch.rand(2, 3, 8, 8), "depth": torch.rand(2, 1, 8, 8)}
    sees = {info.path: info.sees for info in list_layers(model, inputs)}
    assert sees == {"rgb": ("rgb",), "depth": ("depth",), "head": ("rgb", "depth")}
    inside = {info.path for info in list_layers(model, inputs) if info.transformed}
    assert inside == {"vmap": {"rgb", "depth", "head"}, "none": set()}.get(how, {"rgb"})
    if "vmap" in how:
        [info] = list_layers(model, inputs).find("rgb")
        assert "runs inside of a torch.vmap of the model's own" in info.note
        with pytest.raises(
            MulticamError, match=r"inside of a torch.vmap of the model's own.* take a layer outside of it"
        ):
            HiResCAM(model, {"rgb": "rgb"})(inputs, 1)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_what_torchscript_runs_is_not_listed_and_said_to_be_out_of_sight() -> None:
    part = nn.Sequential(torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())), nn.Conv2d(4, 4, 3))
    x = torch.rand(2, 3, 8, 8)
    assert [(info.path, info.sees) for info in list_layers(part, x)] == [("1", ("input",))]
    assert not list_layers(torch.jit.script(part), x)
    for layer in ("0", "0.0"):
        with pytest.raises(MulticamError, match=rf"layer '{layer}' .* TorchScript runs it out of sight"):
            HiResCAM(part, layer)(x, lambda out: out.mean((1, 2, 3)))
