"""The wrappers against pytorch-grad-cam and their formulas, what they leave as it is, and several inputs."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import pytorch_grad_cam as pgc
import timm
import torch
from pytorch_grad_cam.utils.image import scale_cam_image
from pytorch_grad_cam.utils.model_targets import FinerWeightedTarget
from torch import Tensor, nn

from multicam import CAM, EigenCAM, EigenGradCAM, GradCAM, HiResCAM, Inputs, Layer, LayerCAM, Maps, MulticamError
from multicam.call.targets import Contrast, Probability, TopClass
from multicam.call.targets.scores import ClassScore
from multicam.cam.catalogue import METHODS
from multicam.cam.sess import SESS
from multicam.cam.wrappers import Augmented, EigenSmoothed, FinerCAM, FinerScore, RefineCAM, Wrapper
from tests.helpers.classifier import EARLY, LATE, minmax, net, photos, theirs
from tests.helpers.hygiene import LAYERS, Stop, assert_unchanged, dirty, raising, state
from tests.helpers.models import Captioned, Fusion, fusion_inputs, seeded

# Against pytorch-grad-cam


def assert_zeros(maps: Tensor) -> None:
    """Where a map has zeros, its engines' scaling by minimum and maximum is ours by the maximum."""
    assert (maps.flatten(1).amin(1) == 0).all()
    assert (maps.flatten(1).amax(1) > 0).all()


@pytest.mark.parametrize(
    ("engine", "method"),
    [(pgc.GradCAM, GradCAM), (pgc.HiResCAM, HiResCAM), (pgc.LayerCAM, LayerCAM)],
    ids=lambda value: value.__name__,
)
def test_eigen_smoothing_is_pytorch_grad_cams_but_for_the_sign_it_leaves_to_chance(
    engine: type[pgc.base_cam.BaseCAM], method: type[CAM]
) -> None:
    model, x = net(), photos()
    with engine(model, [model[5]]) as cam:
        found = cam(x, theirs(x), eigen_smooth=True)
    smoothed = EigenSmoothed(method(model, LATE))
    saliency = smoothed.saliency(smoothed.trace(x, 1).sites[""])
    for i in range(2):
        either = [scale_cam_image(scale_cam_image((sign * saliency[i : i + 1]).relu().numpy(), (32, 24)))[0]
                  for sign in (1, -1)]  # fmt: skip
        assert min(np.abs(found[i] - one).max() for one in either) < 1e-4


def test_augmentation_is_pytorch_grad_cams_of_maps_scaled_to_one() -> None:
    model, x = net(), photos()
    inner = RefineCAM(LayerCAM(model, EARLY))  # of one layer: the map up to its maximum
    assert_zeros(inner(x, 1))
    with pgc.LayerCAM(model, [model[2]]) as cam:
        expected = cam(x, theirs(x), aug_smooth=True)
    np.testing.assert_allclose(Augmented(inner)(x, 1).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("target", [None, 1])
def test_finer_cam_is_pytorch_grad_cams(alpha: float, target: int | None) -> None:
    model, x = net(), photos()
    with pgc.FinerCAM(model, [model[2]]) as cam:
        expected = cam(x, alpha=alpha, target_idx=target)
    np.testing.assert_allclose(minmax(FinerCAM(GradCAM(model, EARLY), alpha)(x, target)), expected, atol=1e-5)


def test_the_finer_score_of_a_sure_model_is_not_lost_in_an_epsilon() -> None:
    logits = torch.tensor([[100.0, 1.0, 2.0, 3.0, -5.0]], dtype=torch.float64)
    weights = torch.tensor([3.0, 2.0, 1.0]).double().softmax(0)
    expected = 100 - (weights * torch.tensor([3.0, 2.0, 1.0])).sum()
    ours = FinerScore(ClassScore(0), 1.0, (1, 2, 3))
    assert torch.allclose(ours(logits), expected)
    assert FinerWeightedTarget(0, [3, 2, 1], 1)(logits[0]) < 1e-20  # as if nothing spoke for the class
    mild = logits / 10
    assert torch.allclose(ours(mild), FinerWeightedTarget(0, [3, 2, 1], 1)(mild[0]), rtol=1e-4)


def test_refine_cam_is_pytorch_grad_cams_from_one_pass() -> None:
    model, x = net(), photos()
    inner = LayerCAM(model, {"early": EARLY, "late": LATE})
    for m in inner(x, 5).values():
        assert_zeros(m)
    expected = pgc.RefineCAM(model, [model[2], model[5]], base_method=pgc.LayerCAM)(x, theirs(x, 5))
    runs = passes(model, lambda: RefineCAM(inner)(x, 5))
    assert runs == [2]
    np.testing.assert_allclose(minmax(RefineCAM(inner)(x, 5)["input"]), expected, atol=1e-5)


# Formulas and identities


def test_eigen_smoothed_hirescam_is_eigen_grad_cam() -> None:
    model, x = net(), photos()
    smoothed = EigenSmoothed(HiResCAM(model, EARLY))(x, 1, signed=True)
    assert torch.equal(smoothed, EigenGradCAM(model, EARLY)(x, 1, signed=True))


def test_smoothing_a_layer_of_one_channel_only_centres_it() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(3, 1, 3), nn.Flatten(), nn.Linear(36, 3)).eval()
    cam, x = HiResCAM(model, "0"), photos(size=(8, 8))
    site = cam.trace(x, 1).sites[""]
    plain, smoothed = cam.saliency(site), EigenSmoothed(cam).saliency(site)
    torch.testing.assert_close(smoothed, plain - plain.mean((1, 2), keepdim=True))


@pytest.mark.parametrize("signed", [False, True])
def test_wrappers_that_change_nothing_give_the_inner_map(signed: bool) -> None:
    model, x = net(), photos()
    cam = GradCAM(model, EARLY)
    inner = cam(x, signed=signed)
    assert torch.equal(Augmented(cam, flip=False, factors=(1.0,))(x, signed=signed), inner)
    assert torch.equal(FinerCAM(cam, alpha=0.0)(x, signed=signed), inner)
    peak = inner.flatten(1).abs().amax(1)[:, None, None]
    torch.testing.assert_close(RefineCAM(cam)(x, signed=signed), inner / peak)
    sure = model(x).softmax(1).amax(1).detach()[:, None, None]
    torch.testing.assert_close(SESS(cam, scales=(1.0,), smooth=False)(x, signed=signed), sure * inner / peak)


def test_mirroring_changes_nothing_for_a_model_that_mirrors_along() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        conv = nn.Conv2d(3, 6, 3, padding=1)
        with torch.no_grad():
            conv.weight += conv.weight.flip(-1).clone()
        model = nn.Sequential(conv, nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    cam, x = HiResCAM(model, "1"), photos()
    mirrored = Augmented(cam, factors=(1.0,))(x, 2, signed=True)
    torch.testing.assert_close(mirrored, cam(x, 2, signed=True))


def test_augmented_is_the_mean_of_six_maps_mirrored_back() -> None:
    model, x = net(), photos()
    cam = GradCAM(model, EARLY)
    top = model(x).argmax(1)
    expected = torch.zeros(2, 24, 32)
    for factor in (0.9, 1.0, 1.1):
        expected += cam(factor * x, top, signed=True) / 6 + cam(factor * x.flip(-1), top, signed=True).flip(-1) / 6
    torch.testing.assert_close(Augmented(cam)(x, signed=True), expected)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)
def test_wrappers_take_any_method(method: type[CAM]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    cam, x = method(model.eval(), "1"), photos()
    plain, turned = cam(x, 2, signed=True), cam(x.flip(-1), 2, signed=True).flip(-1)
    torch.testing.assert_close(Augmented(cam, factors=(1.0,))(x, 2, signed=True), (plain + turned) / 2)
    peak = plain.flatten(1).abs().amax(1)[:, None, None]
    torch.testing.assert_close(RefineCAM(cam)(x, 2, signed=True), plain / peak)
    sure = model(x).softmax(1)[:, 2].detach()[:, None, None]
    whole = SESS(cam, scales=(1.0,), smooth=False)(x, 2, signed=True)
    torch.testing.assert_close(whole, sure * plain / peak)


@pytest.mark.parametrize(
    ("name", "layer"),
    [("vit_tiny_patch16_224", "blocks.3.norm1"), ("swin_tiny_patch4_window7_224", "layers.1"), ("resnet18", "layer3")],
)
def test_real_architectures(name: str, layer: str) -> None:
    size = {"vit": {"img_size": 64, "depth": 6}, "swin": {"img_size": 64, "window_size": 4}}.get(name.split("_")[0], {})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=8, **size).eval()
    x = photos(2, (64, 64))
    cam = EigenSmoothed(FinerCAM(GradCAM(model, layer)))
    chosen = FinerScore(TopClass(), 1.0, (1, 2, 3)).pin(model(x))
    turned = EigenSmoothed(GradCAM(model, layer))(x.flip(-1), chosen, signed=True).flip(-1)
    expected = (cam(x, signed=True) + turned) / 2
    torch.testing.assert_close(Augmented(cam, factors=(1.0,))(x, signed=True), expected)
    assert (SESS(cam, scales=(1.0, 1.5))(x) > 0).any()


def test_the_class_is_that_of_the_inputs_as_they_are() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3, 4, bias=False), nn.Flatten(), nn.Linear(4 * 48, 5, bias=False))
    x = photos()
    top = model(x).argmax(1)
    assert (model(-x).argmax(1) != top).all()
    cam = Augmented(GradCAM(model, "0"), factors=(-1.0, 2.0))
    assert torch.equal(cam(x, signed=True), cam(x, top, signed=True))


def test_the_finer_score_by_hand() -> None:
    logits = torch.tensor([[1.0, 4.0, 3.5, -9.0], [0.0, 5.0, 5.0, 2.0]], requires_grad=True)
    pinned = FinerScore(ClassScore([1, -2]), 0.5, (1, 3)).pin(logits)
    assert (pinned.index, pinned.others) == ((1, 2), ((2, 3), (1, 0)))
    expected = []
    for own, others in (((4.0), (3.5, -9.0)), (5.0, (5.0, 0.0))):
        p = np.exp(others) / np.exp(others).sum()
        expected.append(own - 0.5 * float(p @ np.array(others)))
    torch.testing.assert_close(pinned(logits), torch.tensor(expected))
    torch.testing.assert_close(pinned.take([1, 1, 0])(logits[[1, 1, 0]]), torch.tensor(expected)[[1, 1, 0]])


def test_the_finer_score_leaves_out_classes_that_are_masked() -> None:
    logits = torch.tensor([[1.0, 4.0, 3.5, 0.0]], requires_grad=True)
    masked = torch.cat([logits, torch.full((1, 2), -torch.inf)], 1)
    scores = [FinerScore(ClassScore(1), 0.5, (1, 2, 3)).pin(x)(x) for x in (logits, masked)]
    assert torch.equal(*scores)
    assert torch.equal(*(torch.autograd.grad(s.sum(), logits)[0] for s in scores))
    chosen = FinerScore(ClassScore(1), 0.5, (1, 2, 3, 4)).pin(masked)  # one of them is among the chosen
    assert torch.equal(chosen(masked), scores[0])
    assert torch.autograd.grad(chosen(masked).sum(), logits)[0].isfinite().all()


def test_refine_cam_keeps_what_all_layers_agree_on() -> None:
    """Signed: positive where all are positive, negative where all are negative, else nothing."""
    model, x = net(), photos()
    inner = GradCAM(model, {"early": EARLY, "late": LATE})
    early, late = inner(x, 1, signed=True).values()
    fused = RefineCAM(inner)(x, 1, signed=True)["input"]
    scaled = [m / m.flatten(1).abs().amax(1)[:, None, None] for m in (early, late)]
    agree = early.sign() == late.sign()
    assert not agree.all()
    torch.testing.assert_close(fused, torch.where(agree, early.sign() * (scaled[0] * scaled[1]).abs(), 0))


# Passes


def passes(model: nn.Module, run: Callable[[], Any]) -> list[int]:
    """The batch sizes of the forward passes that `run` makes, once a first one has told the places."""
    seen: list[int] = []
    hook = model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    run()
    seen.clear()
    run()
    hook.remove()
    return seen


def test_what_each_wrapper_costs() -> None:
    model, x = net(), photos()
    cam = GradCAM(model, EARLY)
    assert passes(model, lambda: EigenSmoothed(cam)(x)) == [2]
    assert passes(model, lambda: FinerCAM(cam)(x)) == [2]
    assert passes(model, lambda: RefineCAM(cam)(x)) == [2]
    assert passes(model, lambda: Augmented(cam)(x)) == [2] * 6
    assert passes(model, lambda: SESS(cam, scales=(1.0, 2.0), batch_size=3)(x, signed=True)) == [2, 2, 3, 3, 2]
    assert sum(passes(model, lambda: SESS(cam)(x[:1], signed=True))) == 1 + 122


# Nesting, several layers, samples

WRAPPERS: dict[str, Callable[[CAM], Wrapper]] = {
    "EigenSmoothed": EigenSmoothed,
    "Augmented": lambda cam: Augmented(cam, ("rgb", "depth")),
    "FinerCAM": FinerCAM,
    "RefineCAM": RefineCAM,
    "SESS": lambda cam: SESS(cam, ("rgb", "depth"), scales=(1.0, 1.5), batch_size=5),
    "nested": lambda cam: Augmented(EigenSmoothed(FinerCAM(cam)), "rgb"),
    "all": lambda cam: RefineCAM(
        SESS(
            Augmented(FinerCAM(EigenSmoothed(cam), 0.5), "rgb", factors=(1.0,)), "rgb", scales=(1.0, 1.5), batch_size=7
        )
    ),
}
every_wrapper = pytest.mark.parametrize("wrap", [pytest.param(wrap, id=name) for name, wrap in WRAPPERS.items()])
ON_INPUTS = {"rgb": "rgb.net.1", "depth": "depth", "early texture": Layer("texture.net.0", onto="texture")}


@every_wrapper
@pytest.mark.parametrize("signed", [False, True])
def test_every_wrapper_keeps_the_contract(wrap: Callable[[CAM], Wrapper], signed: bool) -> None:
    model, inputs = seeded(Fusion), fusion_inputs()
    several = wrap(LayerCAM(model, ON_INPUTS))
    maps = several(inputs, [1, 2], signed=signed)
    assert isinstance(maps, Maps)
    assert maps.comparable is several.comparable
    sizes = {"rgb": (2, 32, 32), "depth": (2, 16, 32), "texture": (2, 32, 16)}
    assert {name.removeprefix("early "): tuple(m.shape) for name, m in maps.items()} == sizes
    assert all((m != 0).any() for m in maps.values())
    assert signed or all((m >= 0).all() for m in maps.values())
    alone = wrap(LayerCAM(model, {"rgb": "rgb.net.1"}))(inputs, [1, 2], signed=signed)["rgb"]
    assert torch.equal(alone, maps["rgb"])
    single = wrap(LayerCAM(model, Layer("rgb.net.1", onto="rgb")))(inputs, [1, 2], signed=signed)
    assert isinstance(single, Tensor)
    assert torch.equal(single, maps["rgb"])


@every_wrapper
def test_every_sample_is_explained_on_its_own(wrap: Callable[[CAM], Wrapper]) -> None:
    model, inputs = seeded(Fusion), fusion_inputs()
    cam = wrap(LayerCAM(model, ON_INPUTS))
    together = cam(inputs, signed=True)
    for i in range(2):
        for name, m in cam({k: x[i : i + 1] for k, x in inputs.items()}, signed=True).items():
            torch.testing.assert_close(
                m[0], together[name][i], rtol=1e-3, atol=1e-4 * float(together[name][i].abs().max())
            )


def test_an_order_of_wrappers_that_means_the_same_gives_the_same() -> None:
    model, x = net(), photos()
    cam = GradCAM(model, EARLY)
    ways = [
        Augmented(EigenSmoothed(FinerCAM(cam))),
        Augmented(FinerCAM(EigenSmoothed(cam))),
        FinerCAM(Augmented(EigenSmoothed(cam))),
    ]
    first, *others = [way(x, signed=True) for way in ways]
    assert all(torch.equal(first, other) for other in others)
    assert not torch.allclose(first, Augmented(EigenSmoothed(cam))(x, signed=True))
    assert [way.comparable for way in (*ways, Augmented(cam), FinerCAM(cam))] == [False] * 3 + [True] * 2
    assert repr(ways[0]) == "Augmented(EigenSmoothed(FinerCAM(GradCAM(Sequential, Layer('2')))))"


single = pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda cam: Augmented(cam, factors=(1.0,)), id="Augmented"),
        EigenSmoothed,
        RefineCAM,
        pytest.param(lambda cam: SESS(cam, scales=(1.0, 1.5)), id="SESS"),
    ],
    ids=lambda w: w.__name__,
)


@single
def test_callable_targets(wrap: Callable[[CAM], Wrapper]) -> None:
    model, x = net(), photos()
    by_class, by_call = (
        wrap(LayerCAM(model, EARLY))(x, target) for target in (Probability(1), lambda out: out.softmax(1)[:, 1])
    )
    assert (by_call > 0).any()
    assert torch.equal(by_class, by_call)


@single
def test_volumes(wrap: Callable[[CAM], Wrapper]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Conv3d(3, 4, 3, 2, 1), nn.SiLU(), nn.AdaptiveAvgPool3d(2), nn.Flatten(), nn.Linear(32, 3)
        )
    x = photos(2, (4, 12, 16))
    found = wrap(HiResCAM(model, "1"))(x, 1, signed=True)
    assert found.shape == (2, 4, 12, 16)
    assert (found != 0).any()


def test_signals_are_smoothed_and_fused() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.SiLU(), nn.Conv1d(4, 4, 3), nn.Flatten(), nn.Linear(112, 3))
    x = torch.rand(2, 3, 32, generator=torch.Generator().manual_seed(0))
    cam = RefineCAM(EigenSmoothed(GradCAM(model, {"early": "0", "late": "2"})))
    assert cam(x, 1, signed=True)["input"].shape == (2, 32)
    with pytest.raises(MulticamError, match="image inputs are: none"):
        Augmented(GradCAM(model, "0"))(x, 1)


# Several inputs


class TwoStream(nn.Module):
    """A photo and its spectrum, each scored by place; the scores are added."""

    def __init__(self) -> None:
        super().__init__()
        self.photo, self.freq = nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(2, 4, 3, 1, 1)
        self.mixed = nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(4 * 48, 5)

    def forward(self, photo: Tensor, freq: Tensor) -> Tensor:
        return self.head(self.mixed(torch.cat([self.photo(photo), self.freq(freq)], 1)).flatten(1))


def streams(b: int = 2) -> dict[str, Tensor]:
    return {"photo": photos(b, (6, 8)), "freq": photos(b, (6, 8), c=2)}


def test_a_spectrum_is_not_mirrored_with_its_photo() -> None:
    model, inputs = seeded(TwoStream), streams()
    cam = HiResCAM(model, {"photo": "photo", "freq": "freq"})
    plain = cam(inputs, 1, signed=True)
    right = Augmented(cam, "photo", factors=(1.0,))(inputs, 1, signed=True)
    torch.testing.assert_close(right["freq"], plain["freq"])
    turned = cam(inputs | {"photo": inputs["photo"].flip(-1)}, 1, signed=True)["photo"].flip(-1)
    torch.testing.assert_close(right["photo"], (plain["photo"] + turned) / 2)
    wrong = Augmented(cam, ("photo", "freq"), factors=(1.0,))(inputs, 1, signed=True)
    assert (wrong["freq"] - plain["freq"]).abs().max() > 0.1 * plain["freq"].abs().max()


@pytest.mark.parametrize("wrap", [Augmented, SESS], ids=lambda w: w.__name__)
def test_pictures_are_named_where_there_are_several_images(wrap: Any) -> None:
    model, inputs = seeded(TwoStream), streams()
    cam = HiResCAM(model, {"photo": "photo"})
    with pytest.raises(MulticamError, match=r"inputs=…; the image inputs are: 'photo', 'freq'"):
        wrap(cam)(inputs, 1)
    with pytest.raises(MulticamError, match="no input 'foto'; did you mean 'photo'"):
        wrap(cam, "foto")(inputs, 1)
    with pytest.raises(MulticamError, match="'nothing' is no image input; the image inputs are: 'photo', 'freq'"):
        wrap(cam, ())(inputs, 1)


@pytest.mark.parametrize("wrap", [Augmented, SESS], ids=lambda w: w.__name__)
def test_a_map_on_a_grid_follows_what_its_layer_sees(wrap: Any) -> None:
    model, inputs = seeded(TwoStream), streams()
    named = HiResCAM(model, {"photo": "photo", "freq": "freq"})
    on_grid = HiResCAM(model, {"a": "photo", "b": "freq"})
    few = {"scales": (1.0, 1.5)} if wrap is SESS else {"factors": (1.0,)}
    expected, found = (wrap(cam, "photo", **few)(inputs, 1, signed=True) for cam in (named, on_grid))
    assert torch.equal(found["a"], expected["photo"])
    assert torch.equal(found["b"], expected["freq"])
    mixed = HiResCAM(model, {"c": "mixed"})
    with pytest.raises(
        MulticamError, match=r"map of 'c' lies on no input, and its layer sees both 'photo', .* and 'freq'"
    ):
        wrap(mixed, "photo")(inputs, 1)
    assert wrap(mixed, ("photo", "freq"), **few)(inputs, 1, signed=True)["c"].shape == (2, 6, 8)
    said = HiResCAM(model, {"c": Layer("mixed", onto="photo")})
    assert wrap(said, "photo", **few)(inputs, 1, signed=True)["c"].shape == (2, 6, 8)


@pytest.mark.parametrize("wrap", [Augmented, SESS], ids=lambda w: w.__name__)
def test_pictures_change_together_and_nothing_else_does(wrap: Any) -> None:
    """Two copies of one picture stay alike in every pass, and each row keeps the spectrum of its sample."""

    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.streams = seeded(TwoStream)

        def forward(self, photo: Tensor, small: Tensor, freq: Tensor) -> Tensor:
            if not torch.equal(photo, small):
                seen.append("apart")
            rows = [[torch.equal(row, own) for own in inputs["freq"]] for row in freq]
            seen.append("kept" if all(map(any, rows)) else "lost")
            assert photo.shape[1:] == (3, 6, 8)
            return self.streams(photo + small, freq)

    seen: list[str] = []
    inputs = streams()
    inputs["small"] = inputs["photo"].clone()
    options = {"scales": (1.0, 1.3, 2.5)} if wrap is SESS else {}
    wrap(HiResCAM(Three(), {"photo": "streams.photo"}), ("photo", "small"), **options)(inputs, 1, signed=True)
    assert len(seen) >= 4
    assert set(seen) == {"kept"}


def test_held_leaves_follow_their_samples() -> None:
    model = seeded(Captioned)
    g = torch.Generator().manual_seed(0)
    inputs = {"image": photos(2, (16, 16)), "ids": torch.randint(0, 50, (2, 5), generator=g)}
    cam = SESS(Augmented(HiResCAM(model, "image", output="logits")), scales=(1.0, 1.5), batch_size=3)
    together = cam(inputs, [0, 2], signed=True)
    for i, c in enumerate([0, 2]):
        alone = cam({k: x[i : i + 1] for k, x in inputs.items()}, c, signed=True)
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-5)


def test_integer_pictures_are_mirrored_and_not_scaled() -> None:
    class Bytes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, image: Tensor, mask: Tensor) -> Tensor:
            assert image.dtype == torch.uint8
            return self.net(image * mask / 255)

    g = torch.Generator().manual_seed(0)
    image, mask = torch.randint(0, 256, (2, 3, 24, 32), generator=g).byte(), torch.ones(2, 1, 24, 32)
    mask[..., :20] = 0
    inputs = Inputs(image, mask).hold("1")
    cam = HiResCAM(Bytes(), Layer("net.2", onto="image"))
    with pytest.raises(MulticamError, match=r"'image' is torch.uint8, .* factors=\(1.0,\)"):
        Augmented(cam)(inputs, 1)
    with pytest.raises(MulticamError, match=r"'image' is torch.uint8, which cannot be enlarged"):
        SESS(cam)(inputs, 1)
    # A held leaf that lies on the picture, such as a mask, is mirrored where it is named.
    found = Augmented(cam, ("image", "mask"), factors=(1.0,))(inputs, 1, signed=True)
    flipped = cam((image.flip(-1), mask.flip(-1)), 1, signed=True).flip(-1)
    torch.testing.assert_close(found, (cam(inputs, 1, signed=True) + flipped) / 2)


# What is refused


def test_smoothing_needs_channels() -> None:
    model = net()
    with pytest.raises(
        MulticamError, match=r"weighted channels, which EigenCAM has not\. Those that have: .*GradCAM.*LayerCAM"
    ):
        EigenSmoothed(EigenCAM(model, EARLY))
    with pytest.raises(MulticamError, match=r"Augmented has not; smooth inside of it: Augmented\(EigenSmoothed\(…\)\)"):
        EigenSmoothed(Augmented(GradCAM(model, EARLY)))
    with pytest.raises(MulticamError, match=r"which EigenSmoothed has not\. Those"):
        EigenSmoothed(EigenSmoothed(GradCAM(model, EARLY)))


def test_finer_cam_needs_classes() -> None:
    x = photos()
    cam = FinerCAM(GradCAM(net(3), EARLY))
    with pytest.raises(
        MulticamError, match=r"needs 3 classes besides the target, but the output has 3 .*similar=\(1, 2\)\)"
    ):
        cam(x)
    with pytest.raises(
        MulticamError, match="compares classes: its target is None, a class or one per sample, not Contrast"
    ):
        cam(x, Contrast(1, 2))
    with pytest.raises(MulticamError, match="target class 9 does not exist"):
        cam(x, 9)
    with pytest.raises(MulticamError, match=r"ranks from 1, the nearest, as in \(1, 2, 3\), not \(0, 1\)"):
        FinerCAM(GradCAM(net(), EARLY), similar=(0, 1))


def test_refine_cam_needs_maps_of_one_input() -> None:
    model, inputs = seeded(Fusion), fusion_inputs()
    with pytest.raises(MulticamError, match=r"the map of 'a' lies on none; .*onto=…\): 'rgb', 'depth', 'texture'"):
        RefineCAM(LayerCAM(model, {"a": "rgb", "b": "depth"}))(inputs)


def test_options_that_make_no_sense_are_refused() -> None:
    cam = GradCAM(net(), EARLY)
    for factors in ((), (0.0, 1.0), (float("nan"),)):
        with pytest.raises(MulticamError, match="factors are numbers other than 0"):
            Augmented(cam, factors=factors)


# Hygiene


@every_wrapper
@pytest.mark.parametrize("when", ["normal", "target raises", "model raises", "interrupted"])
@pytest.mark.filterwarnings("ignore:the .* map of:UserWarning")
def test_every_wrapper_leaves_everything_as_it_was(wrap: Callable[[CAM], Wrapper], when: str) -> None:
    """Also when the model raises halfway: in its second pass, where there is one."""
    model = dirty()
    inputs = {name: x.requires_grad_() for name, x in fusion_inputs().items()}
    cam = wrap(GradCAM(model, {name: LAYERS[name] for name in ("rgb", "depth")}))
    several = isinstance(cam, Augmented | SESS) or isinstance(cam.cam, SESS)
    calls: list[int] = []
    stops = {"model raises": Stop, "interrupted": KeyboardInterrupt}

    def stop(*_: Any) -> None:
        calls.append(1)
        if when in stops and len(calls) == (2 if several else 1):
            raise stops[when]

    model.head.register_forward_hook(stop)
    before = state(model, inputs)
    if when == "normal":
        cam(inputs, 1)
    else:  # Finer-CAM refuses a target that is no class
        with pytest.raises((Stop, KeyboardInterrupt, MulticamError)):
            cam(inputs, raising(Stop) if when == "target raises" else 1)
    assert_unchanged(before, state(model, inputs))
