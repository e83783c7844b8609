"""The methods that change something and look: against their formulas written out in full passes, and other libraries."""

import warnings
from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np
import pytest
import pytorch_grad_cam as pgc
import torch
import torch.nn.functional as F
import torchcam.methods as torchcam
import torchvision
from torch import Tensor, nn

from multicam import CAM, GradCAM, GradCAMPlusPlus, Inputs, Layer, Maps, MulticamError, PackedModel, Trace
from multicam.call.targets import Probability
from multicam.cam.masking import ISCAM, SSCAM, AblationCAM, ScoreCAM
from multicam.cam.rise import RISE
from multicam.cam.weighted import SmoothGradCAMPlusPlus
from tests.helpers.counting import counted
from tests.helpers.engines import assert_close, pgc_raw
from tests.helpers.grids import same_size
from tests.helpers.hygiene import Stop, assert_unchanged, dirty, raising, state
from tests.helpers.models import Fusion, Siamese, fusion_inputs, seeded

MASKING: dict[str, Callable[..., CAM]] = {
    "ScoreCAM": ScoreCAM,
    "SSCAM": lambda *args, **kwargs: SSCAM(*args, samples=3, **kwargs),
    "ISCAM": lambda *args, **kwargs: ISCAM(*args, steps=3, **kwargs),
}
LAYERED = {**MASKING, "AblationCAM": AblationCAM}
EVERY = {**LAYERED, "SmoothGradCAMPlusPlus": SmoothGradCAMPlusPlus}


def network(*grid: int, c: int = 5) -> tuple[nn.Sequential, Tensor]:
    """A net without in-place operations on 1-D, 2-D or 3-D input whose layer `"1"` has the grid; and two samples."""
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(grid)]
    with torch.random.fork_rng():
        torch.manual_seed(len(grid))
        mixed = [conv(3, c, 3, stride=2, padding=1), nn.SiLU(), conv(c, 6, 3, padding=1), nn.Tanh(), nn.Flatten()]
        model = nn.Sequential(*mixed, nn.Linear(6 * int(np.prod(grid)), 4)).double().eval()
        return model, torch.rand(2, 3, *(2 * side for side in grid), dtype=torch.float64)


def enlarged(acts: Tensor, size: tuple[int, ...]) -> Tensor:
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(size)]
    large = F.interpolate(acts, size, mode=mode)
    low, high = large.flatten(2).amin(2), large.flatten(2).amax(2)
    ones = (..., *[None] * len(size))
    return (large - low[ones]) / (high - low).where(high > low, 1)[ones]


@pytest.mark.parametrize("grid", [(9,), (5, 7), (3, 4, 5)], ids=str)
def test_ablation_cam_is_its_formula(grid: tuple[int, ...]) -> None:
    model, x = network(*grid)
    cam = AblationCAM(model, "1")
    site = cam.trace(x, 2).sites[""]
    head = model[2:]
    expected = torch.zeros_like(site.acts[:, 0])
    for b in range(2):
        for c in range(5):
            acts = site.acts[b : b + 1].clone()
            acts[:, c] = 0
            expected[b] += (model(x)[b, 2] - head(acts)[0, 2]).item() * site.acts[b, c]
    torch.testing.assert_close(cam.saliency(site), expected)


@pytest.mark.parametrize("grid", [(9,), (5, 7), (3, 4, 5)], ids=str)
def test_score_cam_is_its_formula(grid: tuple[int, ...]) -> None:
    model, x = network(*grid)
    cam = ScoreCAM(model, "1")
    site = cam.trace(x, 2).sites[""]
    masks = enlarged(site.acts, tuple(x.shape[2:]))
    weights = torch.stack([model(x[[b]] * masks[b][:, None])[:, 2] for b in range(2)]).softmax(1).detach()
    expected = (weights[(..., *[None] * len(grid))] * site.acts).sum(1)
    torch.testing.assert_close(cam.saliency(site), expected)


def test_is_cam_is_torchcams_where_the_masks_are_not_enlarged() -> None:
    model, x = same_size()
    for method, theirs in ((ScoreCAM, torchcam.ScoreCAM), (ISCAM, torchcam.ISCAM)):
        with theirs(model, "1") as extractor:
            extractor._relu = False
            model(x)
            found = extractor(2, normalized=False)[0]
        cam = method(model, "1")
        assert_close(cam.saliency(cam.trace(x, 2).sites[""]), found.to(x), 1e-5)


def test_score_and_ablation_cam_are_those_of_pytorch_grad_cam() -> None:
    """Away from its corners: no enlarging, and activations that are not negative."""
    model, x = same_size()
    ours = ScoreCAM(model, "1")
    found = ours.saliency(ours.trace(x, 1).sites[""])
    assert_close(found, pgc_raw(pgc.ScoreCAM, model, model[1], x).to(found), 1e-5)
    ours = AblationCAM(model, "1")
    site = ours.trace(x, 1).sites[""]
    theirs = pgc_raw(pgc.AblationCAM, model, model[1], x).to(found)
    assert_close(ours.saliency(site) / site.scores[:, None, None], theirs, 1e-4)


def test_ss_cam_averages_scores_of_noisy_masks() -> None:
    model, x = same_size()
    cam = SSCAM(model, "1", samples=400, std=0.3)
    site = cam.trace(x[:1], 2).sites[""]
    masks = enlarged(site.acts, (10, 8))[0, :, None]
    g = torch.Generator().manual_seed(9)
    total = torch.zeros(6)
    for _ in range(400):
        total += model(x[:1] * (masks + 0.3 * torch.randn(masks.shape, generator=g)))[:, 2].detach() / 400
    expected = (total.softmax(0)[:, None, None] * site.acts[0]).sum(0)
    assert_close(cam.saliency(site)[0], expected, 1e-2)
    without = SSCAM(model, "1", samples=2, std=0.0)
    assert_close(without.saliency(site), ScoreCAM(model, "1").saliency(site))


def test_smooth_grad_cam_without_noise_is_grad_cam_plus_plus() -> None:
    model, x = network(5, 7)
    cam = SmoothGradCAMPlusPlus(model, "1", std=0.0)
    site = cam.trace(x, 2).sites[""]
    torch.testing.assert_close(cam.saliency(site), GradCAMPlusPlus(model, "1").saliency(site))


def test_smooth_grad_cam_is_its_formula_with_the_noise_that_it_drew() -> None:
    model, x = network(5, 7)
    cam = SmoothGradCAMPlusPlus(model, "1", samples=3, std=0.2, seed=5)
    trace = cam.trace(x, 2)
    drawn: list[Tensor] = []
    hook = model.register_forward_pre_hook(lambda module, args: drawn.append(args[0].detach().clone()))
    Trace(model, x, {"": "1"}, 2)  # its first pass with such a hook
    drawn.clear()
    found = cam.saliency(trace.sites[""])
    hook.remove()
    assert len(drawn) == 3
    spread = x.flatten(1).amax(1) - x.flatten(1).amin(1)
    noise = torch.stack([(y - x) / spread[:, None, None, None] for y in drawn])
    assert torch.allclose(noise[:, 0], noise[:, 1])  # the same for every sample
    assert noise.std().item() == pytest.approx(0.2, rel=0.1)
    G = torch.stack([Trace(model, y, {"": "1"}, 2).sites[""].grads for y in drawn])
    A = trace.sites[""].acts
    D1, D2, D3 = (G**p for p in (1, 2, 3))
    alpha = D2.mean(0) / (2 * D2.mean(0) + A.sum((2, 3), keepdim=True) * D3.mean(0))
    expected = ((alpha * D1.mean(0).relu()).sum((2, 3), keepdim=True) * A).sum(1)
    torch.testing.assert_close(found, expected)


# What a user relies on


@pytest.mark.parametrize("name", EVERY)
def test_the_batch_size_and_the_other_samples_change_nothing(name: str) -> None:
    model, x = network(5, 7)
    sizes = (1, 3, 64) if name in LAYERED else (None,)
    maps = [EVERY[name](model, "1", **({"batch_size": n} if n else {}))(x, [2, 0], signed=True) for n in sizes]
    for found in maps[1:]:
        torch.testing.assert_close(found, maps[0])
    for b, target in enumerate((2, 0)):
        alone = EVERY[name](model, "1")(x[b : b + 1], target, signed=True)
        torch.testing.assert_close(alone, maps[0][b : b + 1])


@pytest.mark.parametrize("name", EVERY)
def test_one_map_for_each_input(name: str) -> None:
    layers = {"rgb": "rgb.net", "depth": "depth.net", "texture": "texture.net"}
    maps = EVERY[name](seeded(Fusion), layers)(fusion_inputs(2), 1, signed=True)
    assert isinstance(maps, Maps)
    assert not maps.comparable
    for key, leaf in fusion_inputs(2).items():
        assert maps[key].shape == (2, *leaf.shape[-2:])
        assert maps[key].abs().amax() > 0


@pytest.mark.parametrize("name", [*LAYERED, "RISE"])
def test_no_pass_has_more_rows_than_the_batch_size(name: str) -> None:
    """What bounds the memory: 40 channels or masks, eight at a time."""
    model, x = network(5, 7, c=40)
    rows: list[int] = []
    hook = model.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    cam = RISE(model, masks=40, batch_size=8) if name == "RISE" else LAYERED[name](model, "1", batch_size=8)
    cam(x, 2, signed=True)
    hook.remove()
    assert max(rows) == 8
    assert rows.count(8) >= 5


def test_ablation_does_not_flip_with_the_sign_of_the_score() -> None:
    model, x = network(5, 7)

    def plus(constant: float) -> Callable[[Tensor], Tensor]:
        return lambda logits: logits[:, 2] + constant

    high, low = (AblationCAM(model, "1")(x, plus(c), signed=True) for c in (3.0, -3.0))
    torch.testing.assert_close(high, low)


def test_ablation_of_a_linear_head_is_grad_cam_weighed_by_the_mean_activation() -> None:
    """The drop of a channel behind pooling is its weight times its mean: exact, so also its place in the ranking."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = torchvision.models.resnet18(num_classes=4).eval(), torch.rand(1, 3, 64, 64)
    cam = AblationCAM(model, "layer4")
    site = cam.trace(x, 1).sites[""]
    expected = (model.fc.weight[1] * site.acts[0].mean((1, 2)))[:, None, None] * site.acts[0]
    assert_close(cam.weighted(site)[0], expected.detach(), 1e-4)


@pytest.mark.parametrize("name", MASKING)
def test_masks_stay_on_their_input(name: str) -> None:
    """The depth map masks depth alone: rgb and texture reach the model as they are, and their branches do not run."""
    model, inputs = seeded(Fusion), fusion_inputs(1)
    cam = MASKING[name](model, {"depth": "depth.net"})
    trace = cam.trace(inputs, 1)
    trace.rescore({"depth": inputs["depth"].repeat(8, 1, 1, 1)}, 0)  # records and checks
    with counted(model) as counts:
        cam.maps(trace)
    assert "rgb" not in counts
    assert "texture" not in counts
    assert counts["depth"] > 0


def test_masks_of_a_fusion_layer_go_where_the_user_says() -> None:
    model, inputs = seeded(Fusion), fusion_inputs(1)
    site = Trace(model, inputs, {"attn": Layer("attn", onto="rgb")}, 1).sites["attn"]
    masks = enlarged(site.acts, (32, 32))[0, :, None]
    alone = ScoreCAM(model, {"attn": site.layer})
    both = ScoreCAM(model, {"attn": site.layer}, masked=["rgb", "depth"])
    with torch.no_grad():
        rest = {name: x.expand(16, -1, -1, -1) for name, x in inputs.items()}
        scores = model(**rest | {"rgb": masks * inputs["rgb"]})[:, 1]
        assert_close(alone.weighted(site)[0], scores.softmax(0)[:, None, None] * site.acts[0])
        depth = enlarged(site.acts, (16, 32))[0, :, None] * inputs["depth"]
        scores = model(**rest | {"rgb": masks * inputs["rgb"], "depth": depth})[:, 1]
        assert_close(both.weighted(site)[0], scores.softmax(0)[:, None, None] * site.acts[0])


def test_an_unnamed_fusion_layer_masks_every_image() -> None:
    model, inputs = seeded(Fusion), fusion_inputs(1)
    assert ScoreCAM(model, {"fused": "attn"})._names(Trace(model, inputs, {"fused": "attn"}).sites["fused"]) == [
        *inputs
    ]


def test_a_probability_weighs_the_channels_more_evenly() -> None:
    model, x = same_size()
    spread = []
    for target in (lambda logits: 20 * logits[:, 2], Probability(2)):
        cam = ScoreCAM(model, "1")
        site = cam.trace(x, target).sites[""]
        share = cam.weighted(site)[0].amax((1, 2)) / site.acts[0].amax((1, 2)).clamp(min=1e-9)
        spread.append(share.max() - share.min())
    assert spread[1] < spread[0]


def test_each_call_of_a_shared_encoder_masks_its_own_input() -> None:
    model = seeded(Siamese)
    g = torch.Generator().manual_seed(1)
    inputs = {name: torch.rand(1, 3, 32, 32, generator=g) for name in ("before", "after")}
    layers = {"before": "encoder#0", "after": "encoder#1"}
    found = ScoreCAM(model, layers).maps(Trace(model, inputs, layers, 1), signed=True)
    site = Trace(model, inputs, layers, 1).sites["after"]
    masks = enlarged(site.acts, (32, 32))[0, :, None]
    with torch.no_grad():
        scores = model(inputs["before"].expand(16, -1, -1, -1), masks * inputs["after"])[:, 1]
    expected = (scores.softmax(0)[:, None, None] * site.acts[0]).sum(0) * 64
    assert_close(found["after"][0], F.interpolate(expected[None, None], (32, 32), mode="bilinear")[0, 0])


def test_a_flat_channel_masks_everything_and_divides_by_nothing() -> None:
    model, x = same_size()
    model[0].weight.data[2] = 0
    found = ScoreCAM(model, "1")(x, 2)
    assert found.isfinite().all()


# Nothing of the user's is changed; what does not fit is refused


@pytest.mark.parametrize("when", ["normal", "target raises", "model raises", "interrupted"])
@pytest.mark.parametrize("name", [*EVERY, "RISE"])
@pytest.mark.filterwarnings("ignore:the .* map of layer:UserWarning")
def test_everything_is_as_it_was(name: str, when: str) -> None:
    model = dirty()
    inputs = {key: x.requires_grad_() for key, x in fusion_inputs().items()}
    calls = 0

    def later(what: type[BaseException]) -> Callable[..., None]:
        def stop(*_: Any) -> None:
            nonlocal calls
            calls += 1
            if calls > 4:  # amid the replays
                raise what

        return stop

    stops = {"model raises": Stop, "interrupted": KeyboardInterrupt}
    if when in stops:
        model.head.register_forward_hook(later(stops[when]))
    before = state(model, inputs)
    cam = RISE(model, masks=64) if name == "RISE" else EVERY[name](model, {"rgb": "rgb.net.1", "depth": "depth"})
    if when == "normal":
        cam(inputs, 1)
    else:
        with pytest.raises((Stop, KeyboardInterrupt)):
            cam(inputs, raising(Stop) if when == "target raises" else 1)
    assert_unchanged(before, state(model, inputs))


def test_wrong_settings_are_refused() -> None:
    model, x = same_size()
    for make in (
        lambda: AblationCAM(model, "1", batch_size=0),
        lambda: SSCAM(model, "1", samples=0),
        lambda: ISCAM(model, "1", steps=0),
        lambda: RISE(model, masks=0),
    ):
        with pytest.raises(MulticamError, match="must be a whole number of at least 1, not 0"):
            make()
    with pytest.raises(MulticamError, match="keep is a share between 0 and 1"):
        RISE(model, keep=1.0)
    with pytest.raises(MulticamError, match=r"'ids' is no image input; the image inputs are: 'image'"):
        from tests.helpers.models import Captioned

        RISE(seeded(Captioned), "ids", output="logits")({"image": x, "ids": torch.ones(2, 3, dtype=torch.long)})
    with pytest.raises(MulticamError, match="no input 'rbg'"):
        ScoreCAM(seeded(Fusion), {"rgb": "rgb"}, masked="rbg")(fusion_inputs())


def test_a_grid_that_cannot_mask_an_input_is_refused() -> None:
    inputs = {"rgb": torch.rand(1, 3, 16, 16), "code": torch.rand(1, 4)}

    class Coded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, rgb: Tensor, code: Tensor) -> Tensor:
            return self.conv(rgb).mean((2, 3)) * code

    with pytest.raises(MulticamError, match=r"cannot mask input 'code'.*masked="):
        ScoreCAM(Coded(), {"rgb": "conv"}, masked="code")(inputs, 1)


def test_the_peer_through_the_proxy_masks_everything_where_ours_masks_one() -> None:
    """pytorch-grad-cam multiplies the whole canvas: another, and a costlier, question."""
    model, inputs = seeded(Fusion), {name: x[:, :, :16, :16] for name, x in fusion_inputs(1).items()}
    packed = PackedModel(model, inputs, "rgb.net")
    raw = pgc_raw(pgc.ScoreCAM, packed, packed.target_layers[0], packed.pack(inputs))
    for masked, same in (("rgb", False), (["rgb", "depth", "texture"], True)):
        cam = ScoreCAM(model, {"rgb": "rgb.net"}, masked=masked)
        found = cam.saliency(cam.trace(inputs, 1).sites["rgb"])
        assert (torch.corrcoef(torch.stack([found.flatten(), raw.flatten()]))[0, 1] > 0.999) == same or not same


@pytest.mark.parametrize(("seconds", "shown"), [(0, False), (3, True)])
def test_progress_is_silent_for_what_is_quick(
    seconds: int, shown: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """By a clock that goes on by so many seconds each time that the bar looks at it."""
    monkeypatch.setattr("tqdm.std.time", count(0, seconds).__next__)
    model, x = same_size()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AblationCAM(model, "1")(x, 1)
    out, err = capfd.readouterr()
    assert out == ""
    assert ("AblationCAM" in err) == bool(err) == shown


def test_of_a_clip_masks_follow_the_frames() -> None:
    conv = nn.Conv3d(3, 4, 3, padding=1)
    for frames_first in (False, True):

        class Clip(nn.Module):
            def __init__(self, turned: bool) -> None:
                super().__init__()
                self.turned, self.conv, self.mix = turned, conv, nn.Conv3d(4, 2, 1)

            def forward(self, x: Tensor) -> Tensor:
                return self.mix(self.conv(x.transpose(1, 2) if self.turned else x).relu()).mean((2, 3, 4))

        torch.manual_seed(0)
        clip = Clip(frames_first).eval()
        x = torch.rand(1, 3, 6, 10, 12)
        found = ScoreCAM(clip, "conv")(Inputs(x.transpose(1, 2) if frames_first else x), 1, signed=True)
        site = Trace(clip, x.transpose(1, 2) if frames_first else x, {"": "conv"}, 1).sites[""]
        masks = enlarged(site.acts, (6, 10, 12))[0, :, None]
        rows = masks * x
        scores = clip(rows.transpose(1, 2) if frames_first else rows)[:, 1].detach()
        assert_close(found[0], (scores.softmax(0)[:, None, None, None] * site.acts[0]).sum(0) * 720)


def test_grad_cam_is_what_ablation_tends_to_for_small_changes() -> None:
    """Removing a small share of a channel changes the score by gradient times activation, summed over the grid."""
    model, x = network(5, 7)
    site = GradCAM(model, "1").trace(x, 2).sites[""]
    share = 1e-4
    acts = site.acts[:1].repeat(5, 1, 1, 1)
    acts[range(5), range(5)] *= 1 - share
    drops = (site.scores[0] - site.rescore(acts, 0)) / share
    torch.testing.assert_close(drops, (site.grads * site.acts)[0].sum((1, 2)), rtol=1e-2, atol=1e-4)
