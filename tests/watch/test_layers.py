"""Addresses of activations, and what the messages say when one does not exist."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from multicam import GradCAM, HiResCAM, Layer, MulticamError, PackedModel, Trace, tokens
from tests.helpers.models import Fusion, Siamese, fusion_inputs, seeded

X = torch.rand(2, 3, 16, 16)
HEAD = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))


class Wrapped(nn.Module):
    """A model whose middle layer returns whatever `wrap` makes of a tensor, read back by `read`."""

    class Middle(nn.Module):
        def __init__(self, wrap: Any) -> None:
            super().__init__()
            self.wrap, self.conv = wrap, nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Any:
            return self.wrap(self.conv(x))

    def __init__(self, wrap: Any = lambda x: x, read: Any = lambda y: y) -> None:
        super().__init__()
        self.middle, self.read, self.head = self.Middle(wrap), read, nn.Sequential(*HEAD)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.read(self.middle(x)))


def test_addresses_are_parsed() -> None:
    conv = nn.Conv2d(1, 1, 1)
    assert Layer.of("a.b#2") == Layer("a.b", call=2)
    assert Layer.of(Layer("a.b#0", onto="rgb")) == Layer("a.b", call=0, onto="rgb")
    assert Layer.of(conv).path is conv
    assert repr(Layer("a", call=1, pick="x")) == "Layer('a', call=1, pick='x')"


def test_a_module_is_as_good_as_its_path() -> None:
    model = seeded(Fusion)
    inputs = fusion_inputs()
    by_path = HiResCAM(model, {"rgb": "rgb.net.3"})(inputs, 1, signed=True)
    by_module = HiResCAM(model, {"rgb": model.rgb.net[3]})(inputs, 1, signed=True)
    assert torch.equal(by_path["rgb"], by_module["rgb"])


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("rgb.net.9", r"no layer in Fusion 'rgb\.net\.9'; did you mean 'rgb\.net\.\d'"),
        (Layer("attn", pick="5"), r"no output of layer 'attn': '5'.*'0', '1'"),
        ("rgb#1", r"layer 'rgb#1' does not exist: 'rgb' is called 1 times, counted from 0"),
        ("head", r"layer 'head' returns \(2, 5\): it has no spatial axes left"),
    ],
)
def test_addresses_that_lead_nowhere(layer: Any, message: str) -> None:
    with pytest.raises(MulticamError, match=message):
        GradCAM(seeded(Fusion), layer)(fusion_inputs())


def test_a_shared_layer_wants_to_know_which_call() -> None:
    """The first call, or the last, would be a map of one input that looks like a map of the other."""
    model, inputs = seeded(Siamese), {"before": X, "after": X.flip(-1)}
    with pytest.raises(MulticamError, match=r"'encoder' is called 2 times.*'encoder#0' to 'encoder#1'"):
        GradCAM(model, "encoder")(inputs)
    both = HiResCAM(model, {"before": "encoder#0", "after": "encoder#1"})(inputs, 1, signed=True)
    # The head is linear in after - before, so what speaks for a class in one date speaks against it in the other.
    swapped = HiResCAM(model, {"after": "encoder#1"})({"before": X.flip(-1), "after": X}, 1, signed=True)
    assert both["before"].abs().max() > 0
    assert torch.allclose(both["before"], -swapped["after"], atol=1e-6)


def test_a_call_is_not_laid_on_an_input_that_it_does_not_see() -> None:
    """Which call sees which date depends on how forward is written: `encoder(after) - encoder(before)` swaps them."""
    model, inputs = seeded(Siamese), {"before": X, "after": X.flip(-1)}
    with pytest.raises(MulticamError, match=r"'encoder#0' does not see input 'after'.*it sees 'before'"):
        HiResCAM(model, {"before": "encoder#0", "after": "encoder#0"})(inputs, 1, signed=True)
    with pytest.raises(MulticamError, match=r"'encoder#1' does not see input 'before'.*it sees 'after'"):
        HiResCAM(model, Layer("encoder#1", onto="before"))(inputs, 1, signed=True)
    runs = []
    model.head.register_forward_hook(lambda m, i, o: runs.append(1))
    cam = HiResCAM(model, {"before": "encoder#0", "after": "encoder#1"})
    cam(inputs, 1, signed=True)
    assert len(runs) == 2
    cam(inputs, 1, signed=True)
    assert len(runs) == 3  # once surveyed, it asks no more


def test_a_layer_that_is_never_called_names_those_that_are() -> None:
    class Bypassed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stage = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
            self.head = nn.Sequential(*HEAD)

        def forward(self, x: Tensor) -> Tensor:
            for part in self.stage:
                x = part(x)
            return self.head(x)

    with pytest.raises(
        MulticamError,
        match=r"'stage' \(Sequential\) was never called.*its forward was bypassed; .*its parts instead: stage\.0, stage\.1",
    ):
        GradCAM(Bypassed(), "stage")(X)


@pytest.mark.parametrize(
    ("wrap", "read", "pick"),
    [
        (lambda x: (x, None), lambda y: y[0], None),
        (lambda x: [x, 3, "text"], lambda y: y[0], None),
        (lambda x: {"features": x, "index": torch.arange(2)}, lambda y: y["features"], None),
        (lambda x: (x.argmax(1), x), lambda y: y[1], None),
        (lambda x: (x * 2, x), lambda y: y[1], 1),
        (lambda x: {"maps": [x * 2, x]}, lambda y: y["maps"][1], "maps.1"),
    ],
    ids=["tuple with None", "list", "dict", "index first", "tuple of two", "nested"],
)
def test_any_output_of_a_layer(wrap: Any, read: Any, pick: Any) -> None:
    torch.manual_seed(0)
    plain = Wrapped()
    model = Wrapped(wrap, read)
    model.load_state_dict(plain.state_dict())
    found = HiResCAM(model, Layer("middle", pick=pick))(X, 1, signed=True)
    assert torch.equal(found, HiResCAM(plain, "middle")(X, 1, signed=True))


def test_several_tensors_are_listed_rather_than_guessed() -> None:
    with pytest.raises(MulticamError, match=r"several tensors.*pick='0' \(2, 4, 14, 14\), pick='1' \(2, 4, 14, 14\)"):
        GradCAM(Wrapped(lambda x: (x, x), lambda y: y[0]), "middle")(X)


@pytest.mark.parametrize(
    ("wrap", "message"),
    [(lambda x: x.argmax(1), "torch.int64, which is not floating point"), (lambda x: "text", "str, which is not")],
    ids=["indices", "text"],
)
def test_what_is_not_floating_point_can_carry_no_map(wrap: Any, message: str) -> None:
    with pytest.raises(MulticamError, match=message):
        GradCAM(Wrapped(wrap, lambda y: torch.rand(2, 4, 3, 3)), "middle")(X)


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_is_read_whichever_way_its_axes_lie(batch_first: bool) -> None:
    """The batch of 2 and of 1 both: with one sample `(n b c)` has no second axis to tell it by."""
    model = seeded(Fusion, batch_first=batch_first)
    other = seeded(Fusion, batch_first=True)
    for b in (1, 2):
        trace = Trace(model, fusion_inputs(b), {"attn": "attn"}, 1)
        assert trace.sites["attn"].acts.shape == (b, 16, 8, 8)
        reference = Trace(other, fusion_inputs(b), {"attn": Layer("attn", reshape=tokens(8, 8))}, 1)
        assert torch.allclose(trace.sites["attn"].acts, reference.sites["attn"].acts, atol=1e-6)
        assert torch.allclose(trace.sites["attn"].grads, reference.sites["attn"].grads, atol=1e-6)


def test_a_reshape_must_return_the_batch() -> None:
    layer = Layer("rgb", reshape=lambda x: x[:1])
    with pytest.raises(MulticamError, match=r"reshape of layer 'rgb' returned \(1, 16, 8, 8\).*b = 2"):
        GradCAM(seeded(Fusion), layer)(fusion_inputs())


def test_an_input_may_have_any_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(1, 4, 3)

        def forward(self, image: Tensor, map: Tensor) -> Tensor:
            return self.a(image).mean((2, 3)) + self.b(map).mean((2, 3))

    inputs = {"image": torch.rand(1, 3, 16, 16), "map": torch.rand(1, 1, 40, 20)}
    assert HiResCAM(Named(), "a")(inputs, 1, signed=True).shape == (1, 14, 14)


def test_a_layer_that_does_not_exist_is_refused_before_the_first_call() -> None:
    with pytest.raises(MulticamError, match="no layer in Fusion 'rbg'"):
        GradCAM(seeded(Fusion), "rbg")


def test_a_reshape_that_computes_is_refused() -> None:
    with pytest.raises(MulticamError, match="must only rearrange or select"):
        GradCAM(seeded(Fusion), Layer("rgb", reshape=lambda x: x * 2))(fusion_inputs(), 1)


class HandingOn(nn.Module):
    """A layer that does nothing in evaluation mode, before something in place, and a shortcut from before it or none."""

    def __init__(self, shortcut: bool, write: bool) -> None:
        super().__init__()
        self.shortcut, self.conv, self.drop = shortcut, nn.Conv2d(3, 4, 3), nn.Dropout(0.5)
        self.act = nn.ReLU(inplace=write)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        y = self.act(self.drop(x))
        return (y + 0.5 * x if self.shortcut else y).mean((2, 3))


@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize("write", [True, False])
def test_a_copy_of_what_a_layer_hands_on_must_not_change_the_model(shortcut: bool, write: bool) -> None:
    torch.manual_seed(0)
    model, x = HandingOn(shortcut, write).eval(), torch.rand(1, 3, 6, 6)
    packed = PackedModel(model, x, ["drop"])
    if shortcut and write:
        for call in (lambda: GradCAM(model, "drop")(x, 1), lambda: packed(packed.pack(x))):
            with pytest.raises(MulticamError, match="'drop' returns what it is given, the model writes into that"):
                call()
        return
    with torch.no_grad():
        expected = model(x)
    assert torch.equal(Trace(model, x, {"drop": "drop"}, 1).scores, expected[:, 1])
    assert torch.equal(packed(packed.pack(x)), expected)


@pytest.mark.parametrize("times", [1, 2])
def test_which_call_is_the_first_is_not_left_to_threads(times: int) -> None:
    class Threaded(Wrapped):
        def forward(self, x: Tensor) -> Tensor:
            with ThreadPoolExecutor(1) as pool:
                return sum(self.head(pool.submit(self.middle, x).result()) for _ in range(times))

    model = seeded(Threaded)
    layer = Layer("middle", call=0)
    if times == 1:
        assert torch.equal(Trace(model, X, {"it": layer}, 1).sites["it"].acts, model.middle(X))
        return
    with pytest.raises(MulticamError, match="'middle' is called 2 times in one forward pass, in threads"):
        Trace(model, X, {"it": layer}, 1)
