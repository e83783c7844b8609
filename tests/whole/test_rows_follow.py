"""Lists, tuples and arrays with one item for each sample follow the rows of every what-if, as a tensor does."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import multicam as mc
from multicam import metrics
from multicam.cam.sess import SESS

RED = {"a cat": 1.0, "a dog": 2.5, "nothing": -1.5}
VALUES = {
    "lengths": [3, 5, 2],
    "captions": [*RED],
    "flags": [True, False, True],
    "arrays": [np.array([1.0, 2.0]), np.array([4.0, 1.5]), np.array([0.5, 0.5])],
    "tensors": [torch.ones(2, 3), torch.ones(4, 3), torch.ones(1, 3)],
    "dicts": [{"n": 2, "label": "x"}, {"n": 3, "label": "yy"}, {"n": 1, "label": "z"}],
}


def number(value: Any) -> float:
    """What the model makes of one sample's item."""
    if isinstance(value, dict):
        return value["n"] * len(value["label"])
    if isinstance(value, str):
        return RED[value]
    return float(np.asarray(value).sum()) or -0.5


class Net(nn.Module):
    """A photo and a depth image, and something about each sample that is no tensor; what has none is seen as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.depth, self.head = (
            nn.Conv2d(3, 4, 3, padding=1),
            nn.Conv2d(1, 4, 3, padding=1),
            nn.Linear(4, 3),
        )

    def forward(self, image: Tensor, depth: Tensor, about: Any, size: Any = (8, 8)) -> Tensor:
        scales = torch.ones(len(image), dtype=image.dtype)
        for i, value in enumerate(about):
            scales[i] = number(value)
        a, b = self.image(image).relu(), self.depth(depth).tanh()
        size = tuple(size)
        return self.head((a * b * scales.view(-1, 1, 1, 1))[..., : size[0], : size[1]].mean((2, 3)).tanh())


class OfCodes(Net):
    """The same model, told of each sample by the number of its item, in a tensor."""

    def __init__(self, values: Sequence[Any]) -> None:
        super().__init__()
        self.values = values

    def forward(self, image: Tensor, depth: Tensor, about: Tensor, size: Any = (8, 8)) -> Tensor:
        return super().forward(image, depth, [self.values[i] for i in about.tolist()], size)


def both(kind: str, batch: int) -> tuple[Net, OfCodes, dict[str, Any], list[Any]]:
    """The model given lists, that given tensors, the call of the latter, and the items of the former."""
    torch.manual_seed(batch)
    codes = OfCodes(VALUES[kind]).double().eval()
    net = Net().double().eval()
    net.load_state_dict(codes.state_dict())
    order = [1, 0, 2][:batch]
    call = {"image": torch.rand(batch, 3, 8, 8).double(), "depth": torch.rand(batch, 1, 8, 8).double()}
    return net, codes, {**call, "about": torch.tensor(order)}, [VALUES[kind][i] for i in order]


def packed_score_cam(model: nn.Module, call: Any) -> Tensor:
    from pytorch_grad_cam import AblationCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    packed = mc.PackedModel(model, call, layers=["image"])
    x = packed.pack(call)
    engine = AblationCAM(packed, packed.target_layers)
    return torch.from_numpy(engine(x, [ClassifierOutputTarget(1)] * len(x)))


Entry = Callable[[nn.Module, Any], Any]
ENTRIES: dict[str, Entry] = {
    "occlusion": lambda model, call: mc.occlusion(model, call, 1, patch=4)["image"],
    "ScoreCAM": lambda model, call: mc.ScoreCAM(model, {"image": "image"})(call, 1, signed=True)["image"],
    "AblationCAM": lambda model, call: mc.AblationCAM(model, {"image": "image"})(call, 1, signed=True)["image"],
    "RISE": lambda model, call: mc.RISE(model, "image", masks=8)(call, 1),
    "SESS": lambda model, call: SESS(mc.GradCAM(model, {"image": "image"}), "image", scales=(1.0, 1.5))(call, 1)["image"],
    "smoothgrad": lambda model, call: mc.smoothgrad(model, call, 1, samples=3)["image"],
    "vargrad": lambda model, call: mc.vargrad(model, call, 1, samples=3)["depth"],
    "integrated gradients": lambda model, call: mc.integrated_gradients(model, call, 1, steps=16)["depth"],
    "expected gradients": lambda model, call: mc.expected_gradients(
        model, call, {**call, "image": torch.zeros(2, 3, 8, 8), "depth": torch.ones(2, 1, 8, 8)}, 1, samples=4
    )["image"],
    "captum": lambda model, call: mc.captum_attribution("FeatureAblation", model, call, 1, wrt="depth", perturbations_per_eval=3)["depth"],
    "contribution": lambda model, call: mc.contribution(model, call, 1).shapley,
    "region contribution": lambda model, call: mc.region_contribution(model, call, 1, regions={"image": 2}).maps["image"],
    "double occlusion": lambda model, call: mc.double_occlusion(model, call, {"image": np.s_[:4, :4]}, 1, patch=4)["depth"],
    "deletion": lambda model, call: metrics.deletion(model, call, {"image": call["image"].mean(1)}, 1, steps=4).scores,
    "insertion": lambda model, call: metrics.insertion(model, call, {"image": call["image"].mean(1)}, 1, steps=4).scores,
    "seen through": lambda model, call: metrics.seen_through(model, call, {"image": call["image"].mean(1)}, mc.targets.Probability(1)).masked,
    "infidelity": lambda model, call: metrics.infidelity(model, call, mc.gradient(model, call, 1), 1, samples=4).changes,
    "the proxy": packed_score_cam,
}  # fmt: skip
# Which of them stand for the others: each moves rows in its own way.
MOVING = (
    "occlusion",
    "ScoreCAM",
    "AblationCAM",
    "smoothgrad",
    "integrated gradients",
    "region contribution",
    "contribution",
    "deletion",
)
FEW = ("occlusion", "smoothgrad", "contribution")


@pytest.mark.parametrize(
    ("name", "batch"), [(name, 2) for name in ENTRIES] + [(name, b) for name in MOVING for b in (1, 3)]
)
def test_a_list_follows_as_a_tensor_does(name: str, batch: int) -> None:
    net, codes, call, items = both("lengths", batch)
    expected = ENTRIES[name](codes, call)
    assert expected.abs().max() > 0
    torch.testing.assert_close(ENTRIES[name](net, {**call, "about": items}), expected)


def as_array(items: list[Any]) -> np.ndarray:
    return np.array(items)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize(
    ("kind", "made"),
    [(kind, list) for kind in VALUES]
    + [("lengths", tuple), ("lengths", as_array), ("captions", as_array), ("flags", as_array), ("arrays", as_array)],
    ids=lambda x: x if isinstance(x, str) else x.__name__,
)
def test_items_of_every_kind_follow(kind: str, made: Callable[[list[Any]], Any], name: str) -> None:
    net, codes, call, items = both(kind, 2)
    expected = ENTRIES[name](codes, call)
    torch.testing.assert_close(ENTRIES[name](net, {**call, "about": made(items)}), expected)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("size", [(4, 6), [4, 4], np.array([4, 6])], ids=str)
def test_sizes_stay_as_they_are_beside_lists(size: Any, name: str) -> None:
    net, codes, call, items = both("lengths", 2)
    expected = ENTRIES[name](codes, {**call, "size": torch.Size([*size])})
    torch.testing.assert_close(ENTRIES[name](net, {**call, "about": items, "size": size}), expected)


class Nested(nn.Module):
    """The model inside another, whose only argument is a dict."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, batch: dict[str, Any]) -> Tensor:
        return self.net(batch["image"], batch["depth"], batch["meta"]["about"])


@pytest.mark.parametrize("batch", [1, 2])
def test_lists_in_dicts_follow(batch: int) -> None:
    net, codes, call, items = both("captions", batch)
    nested = mc.Inputs({"image": call["image"], "depth": call["depth"], "meta": {"about": items, "source": "camera"}})
    found = mc.occlusion(Nested(net), nested, 1, patch=4, wrt=["image"])["image"]
    torch.testing.assert_close(found, mc.occlusion(codes, call, 1, patch=4)["image"])


class Ignoring(nn.Module):
    """A model that takes file names and reads none."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, 4, 3)

    def forward(self, image: Tensor, names: Any = None) -> Tensor:
        return self.encoder(image).mean((2, 3)).tanh()


@pytest.mark.parametrize("names", [["a.png", "b.png"], np.array(["a.png", "b.png"]), ("a.png", None)], ids=str)
def test_what_a_model_does_not_read_is_of_no_effect(names: Any) -> None:
    model, image = Ignoring().double(), torch.rand(2, 3, 8, 8).double()
    for entry in (
        lambda call: mc.occlusion(model, call, 1, patch=4),
        lambda call: mc.smoothgrad(model, call, 1, samples=2),
    ):
        torch.testing.assert_close(entry({"image": image, "names": names})["image"], entry({"image": image})["image"])


class ByPlace(nn.Module):
    """A model that no order of its samples leaves alone."""

    def forward(self, image: Tensor, depth: Tensor, about: Any) -> Tensor:
        rows = (image.mean((1, 2, 3)) + depth.mean((1, 2, 3)))[:, None] * torch.arange(1, 4)
        return rows * torch.arange(1, 1 + len(rows))[:, None] ** 2 * len(about) + about[0]


@pytest.mark.parametrize("name", [name for name in FEW if name != "contribution"])
def test_a_list_that_nobody_can_tell_is_refused_by_name(name: str) -> None:
    _, _, call, items = both("lengths", 2)
    with pytest.raises(
        mc.MulticamError, match=r"'about' = \[5, 3\].*rows\('about'\) or Inputs\(…\)\.constant\('about'\)"
    ):
        ENTRIES[name](ByPlace(), {**call, "about": items})


def test_a_dream_of_several_classes_keeps_what_its_sample_has() -> None:
    net, codes, call, items = both("lengths", 2)
    dreams = [
        mc.activation_maximization(
            model, {**call, "about": about}, onto="image", target=[0, 2], steps=2, seed=0
        ).objective
        for model, about in ((net, items), (codes, call["about"]))
    ]
    torch.testing.assert_close(*dreams)
