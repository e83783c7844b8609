"""The layers of a model, and which inputs each of them sees."""

import torch
from torch import nn

from multicam import HiResCAM, list_layers
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
    assert [(i.path, i.sees) for i in list_layers(model, torch.zeros(2, 3, dtype=torch.long))] == [("0", ()), ("1", ())]
