"""One pass tells the places of layers, and on which inputs their values depend; it is made once, and again where it has to be."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multicam import HiResCAM, Inputs, Layer, MulticamError, Trace, list_layers, tokens
from multicam.watch.placing import Placed
from multicam.watch.survey import Survey, located
from tests.helpers.models import Fusion, Siamese, fusion_inputs, seeded


def survey(model: nn.Module, inputs: Any) -> Survey:
    return Survey.of(model, Inputs.of(inputs).bind(model))


def sees(model: nn.Module, inputs: Any) -> dict[str, tuple[str, ...]]:
    return {info.path: info.sees for info in list_layers(model, inputs)}


class Counted(nn.Module):
    """A model that counts its passes, by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
        self.passes: list[int] = []
        self.flip = False

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.passes.append(1)
        return self.head(self.conv(x * scale).mean((2, 3)))


def passes(model: Counted, run: Callable[[], Any]) -> int:
    hook = model.passes
    hook.clear()
    run()
    return len(hook)


# When it is made


def test_it_is_made_once_for_calls_of_a_kind() -> None:
    model, count = seeded(Counted), []
    model.conv.register_forward_hook(lambda *_: count.append(1))
    cam = HiResCAM(model, "conv")

    def cost(*args: Any) -> int:
        count.clear()
        cam(*args, 1, signed=True)
        return len(count)

    x = torch.rand(2, 3, 8, 8)
    assert [cost(x), cost(torch.rand(2, 3, 8, 8)), cost(x)] == [2, 1, 1]
    assert [cost(torch.rand(2, 3, 8, 9)), cost(torch.rand(2, 3, 8, 9))] == [2, 1]  # another size
    assert [cost(Inputs(x, 2.0)), cost(Inputs(x, 2.0)), cost(Inputs(x, 3.0))] == [2, 1, 2]  # another plain value
    assert cost(x) == 1
    model.head.register_forward_hook(lambda *_: None)
    assert [cost(x), cost(x)] == [2, 1]  # a hook of somebody else's
    assert cost(torch.rand(3, 3, 8, 8)) == 2


def test_what_is_said_needs_none() -> None:
    model, count = seeded(Counted), []
    model.conv.register_forward_hook(lambda *_: count.append(1))
    HiResCAM(model, Layer("conv", reshape=lambda x: x))(torch.rand(2, 3, 8, 8), 1, signed=True)
    assert len(count) == 1


def test_few_kinds_are_remembered_and_none_longer_than_the_model() -> None:
    import gc
    import weakref

    from multicam.watch import survey as module

    model = seeded(Counted)
    for size in range(6, 6 + 2 * module.REMEMBERED):
        survey(model, torch.rand(1, 3, size, size))
    assert len(module._KNOWN[model]) == module.REMEMBERED
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_places_that_values_choose_are_asked_for_in_every_call() -> None:
    class Pruned(nn.Module):
        """The three brightest patches go on, in the order of their brightness."""

        def __init__(self) -> None:
            super().__init__()
            self.patches, self.layer, self.head = nn.Conv2d(1, 4, 4, 4), nn.Tanh(), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.patches(x).flatten(2).mT
            best = F.avg_pool2d(x, 4).flatten(1).topk(3).indices
            return self.head(self.layer(y.gather(1, best[..., None].expand(-1, -1, 4))).mean(1))

    model = seeded(Pruned)
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.rand(2, 1, 8, 12)
        acts = Trace(model, x, {"": "layer"}, 1).sites[""].acts
        best = F.avg_pool2d(x, 4).flatten(1).topk(3).indices
        kept = torch.zeros(2, 6).scatter(1, best, 1.0).view(2, 1, 2, 3)
        torch.testing.assert_close(acts, model.patches(x).tanh().detach() * kept)
    found = survey(model, x)
    assert found.chosen_by_values("layer", Layer("layer")) and not found.chosen_by_values("patches", Layer("patches"))


# On what values depend


class Lengths(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.photo, self.head = nn.Embedding(9, 4), nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, ids: Tensor, lengths: Tensor, photo: Tensor) -> Tensor:
        cut = ids[:, : int(lengths.max())]
        return self.head(self.words(cut).mean(1) + self.photo(photo).mean((2, 3)))


def test_a_length_is_not_seen_by_what_runs_after_it() -> None:
    call = {"ids": torch.randint(9, (2, 6)), "lengths": torch.tensor([6, 4]), "photo": torch.rand(2, 3, 8, 8)}
    assert sees(seeded(Lengths), call) == {
        "words": ("ids", "lengths"), "photo": ("photo",), "head": ("ids", "lengths", "photo"),
    }  # fmt: skip


def test_a_number_that_is_multiplied_with_is_seen() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.after = nn.Tanh(), nn.Tanh()

        def forward(self, photo: Tensor, gain: Tensor) -> Tensor:
            return self.after(self.before(photo) * float(gain.mean())).mean((2, 3))

    call = {"photo": torch.rand(2, 3, 4, 4), "gain": torch.rand(2, 1)}
    assert sees(seeded(Scaled), call) == {"before": ("photo",), "after": ("photo", "gain")}


def test_integers_complex_numbers_and_shared_encoders_are_seen() -> None:
    class Kspace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.conv = nn.Embedding(5, 4), nn.Conv2d(1, 4, 3)

        def forward(self, kspace: Tensor, view: Tensor) -> Tensor:
            return self.conv(torch.fft.ifft2(kspace).abs()).mean((2, 3)) + self.embed(view)

    call = {"kspace": torch.rand(2, 1, 8, 8, dtype=torch.complex64), "view": torch.tensor([1, 3])}
    assert sees(seeded(Kspace), call) == {"conv": ("kspace",), "embed": ("view",)}
    x = torch.rand(2, 3, 16, 16)
    calls = {path: each for path, each in sees(seeded(Siamese), (x, x)).items() if path.startswith("encoder#")}
    assert calls == {"encoder#0": ("before",), "encoder#1": ("after",)}


def test_several_inputs_take_one_pass() -> None:
    model, count = seeded(Fusion), []
    model.head.register_forward_hook(lambda *_: count.append(1))
    list_layers(model, fusion_inputs())
    assert len(count) == 1


# What has no place of its own


class Behind(nn.Module):
    """A convolution behind something that moves entries in a way that is not followed."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.stem, self.layer = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.theta = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        if self.kind == "spatial transformer":
            grid = F.affine_grid(self.theta(y.mean((2, 3))).view(-1, 2, 3), list(y.shape), align_corners=False)
            y = F.grid_sample(y, grid, align_corners=False)
        elif self.kind == "spectrum":
            y = torch.fft.ifft2(torch.fft.fft2(y)).real
        else:
            y = y.flatten(2).sort(2).values.view_as(y)
        return self.layer(y).mean((2, 3))


@pytest.mark.parametrize("kind", ["spatial transformer", "spectrum", "sorted"])
def test_a_convolution_behind_lost_places_lies_corner_to_corner(kind: str) -> None:
    model, x = seeded(lambda: Behind(kind)), torch.rand(2, 3, 8, 12)
    call = Inputs.of(x).bind(model)
    layers = located(model, call, {"stem": Layer("stem"), "layer": Layer("layer")})
    for name, by_axes in (("stem", False), ("layer", True)):
        reshape = layers[name].reshape
        assert isinstance(reshape, Placed) and reshape.by_axes == by_axes and reshape.grid == (8, 12)
    with pytest.warns(UserWarning, match="layer 'layer': where its entries come from was lost on the way"):
        assert HiResCAM(model, "layer")(x, 1, signed=True).shape == (2, 8, 12)
    assert HiResCAM(model, "stem")(x, 1, signed=True).shape == (2, 8, 12)  # without a word


def test_values_that_are_fetched_belong_to_where_they_are_fetched_to() -> None:
    class Flow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flow, self.layer = nn.Conv2d(3, 2, 3, padding=1), nn.Tanh()

        def forward(self, x: Tensor) -> Tensor:
            base = F.affine_grid(torch.eye(2, 3).expand(len(x), -1, -1), list(x.shape), align_corners=False)
            return self.layer(F.grid_sample(x, base + self.flow(x).movedim(1, -1), align_corners=False)).mean((2, 3))

    model, x = seeded(Flow), torch.rand(2, 3, 8, 12)
    reshape = located(model, Inputs.of(x).bind(model), {"": Layer("layer")})[""].reshape
    assert isinstance(reshape, Placed) and not reshape.by_axes and reshape.grid == (8, 12)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("batch_first", [True, False])
def test_each_step_of_a_recurrent_layer_is_the_one_that_it_has_come_to(kind: Any, batch_first: bool) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = kind(5, 4, batch_first=batch_first), nn.Linear(4, 2)

        def forward(self, ecg: Tensor) -> Tensor:
            steps, _ = self.rnn(ecg if batch_first else ecg.transpose(0, 1))
            return self.head(steps.mean(1 if batch_first else 0))

    model, x = seeded(Recurrent), torch.rand(2, 7, 5)
    said = Layer("rnn", pick=0, reshape=tokens(7, sequence_first=not batch_first))
    found, expected = (
        HiResCAM(model, {"it": layer})(x, 1, signed=True)["it"] for layer in (Layer("rnn", pick=0), said)
    )
    torch.testing.assert_close(found, expected)


# What is refused


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Layer("scores"), r"no grid of places in it \(bmm in ''\): 'photo': where its entries come from was lost"),
        (Layer("position"), "which comes from no input"),
        (Layer("age"), "which comes from age, which has no places"),
        (Layer("pooled"), r"returns \(2, 4\): it has no spatial axes left"),
        (Layer("patches", onto="age"), "layer 'patches' does not see input 'age'.*it sees 'photo'"),
    ],
    ids=["attention is no picture", "a constant", "a number", "flat", "another input"],
)
def test_what_has_no_grid_is_refused_with_the_reason(layer: Layer, message: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.scores, self.position = nn.Conv2d(3, 4, 4, 4), nn.Softmax(-1), nn.Identity()
            self.age, self.pooled = nn.Identity(), nn.Identity()

        def forward(self, photo: Tensor, age: Tensor) -> Tensor:
            q = self.patches(photo).flatten(2).mT + self.position(torch.ones(1, 16, 4))
            y = self.scores(q @ q.mT) @ q
            return self.pooled(y.mean(1)) + self.age(age[:, None, None].expand(-1, 1, 4)).sum(1)

    call = {"photo": torch.rand(2, 3, 16, 16), "age": torch.rand(2)}
    with pytest.raises(MulticamError, match=message):
        HiResCAM(seeded(Net), layer)(call, 1, signed=True)


def test_layers_that_threads_call_by_chance_are_refused() -> None:
    class Threads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Conv2d(3, 4, 3)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            with ThreadPoolExecutor(2) as pool:
                found = list(pool.map(self.encoder, (a, b)))
            return sum(found).mean((2, 3))

    x = torch.rand(2, 3, 8, 8)
    with pytest.raises(MulticamError, match="in threads, so chance decides"):
        HiResCAM(seeded(Threads), "encoder#0")((x, x), 1, signed=True)
