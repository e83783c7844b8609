"""One call, seen as named leaves."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from multicam import Inputs, MulticamError
from multicam.call.inputs import as_names, frames_second, wide

RGB, DEPTH, IDS = torch.rand(2, 3, 8, 8), torch.rand(2, 1, 8, 8), torch.arange(6).view(2, 3)


class Model(nn.Module):
    def forward(self, rgb: Tensor, *more: Tensor, depth: Tensor | None = None, mode: str = "sum") -> Any:
        return rgb, more, depth, mode


class Batched(nn.Module):
    def forward(self, batch: dict[str, Tensor]) -> Any:
        return batch


def test_of_takes_tuples_as_positional_and_dicts_as_keyword_arguments() -> None:
    assert Inputs.of((RGB, DEPTH)).args == (RGB, DEPTH)
    assert Inputs.of({"rgb": RGB}).kwargs == {"rgb": RGB}
    assert Inputs.of([RGB, DEPTH]).args == ([RGB, DEPTH],)
    assert Inputs.of(RGB).args == (RGB,)
    whole = Inputs({"rgb": RGB})
    assert Inputs.of(whole) is whole
    with pytest.raises(MulticamError, match=r"keys are \[0, 1\].*write Inputs\(batch\)"):
        Inputs.of({0: RGB, 1: DEPTH})


def test_leaves_are_named_by_the_signature() -> None:
    bound = Inputs(RGB, [DEPTH, None], {"ids": IDS}, mode="sum").bind(Model())
    assert list(bound.leaves) == ["rgb", "more.0.0", "more.0.1", "more.1.ids", "mode"]
    assert list(bound.images) == ["rgb", "more.0.0"]
    assert bound.name("ids") == "more.1.ids"
    assert list(Inputs({"image": RGB}).bind(Batched()).leaves) == ["batch.image"]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (Inputs(), r"Model\.forward\(rgb.*missing a required argument: 'rgb'"),
        (Inputs(rbg=RGB), r"no argument 'rbg'; did you mean 'rgb'"),
        (Inputs(RGB, dept=DEPTH), r"no argument 'dept'; did you mean 'depth'"),
    ],
)
def test_a_call_that_does_not_fit_says_what_would(inputs: Inputs, message: str) -> None:
    with pytest.raises(MulticamError, match=message):
        inputs.bind(Model())


@pytest.mark.parametrize(
    ("leaf", "image"),
    [
        (torch.rand(2, 3, 8, 8), True),
        (torch.rand(2, 3, 4, 8, 8), True),
        (torch.rand(2, 2, 3, 4, 8, 8), True),
        (torch.zeros(2, 1, 8, 8, dtype=torch.bool), True),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), True),
        (torch.zeros(2, 1, 8, 8, dtype=torch.complex64), True),
        (torch.zeros(2, 1, 8, 8, dtype=torch.int64), False),
        (torch.rand(2, 8, 8), False),
        (torch.rand(0, 3, 8, 8), False),
        (torch.rand(2, 3, 8, 8).to_sparse(), False),
        (None, False),
        ("text", False),
    ],
)
def test_what_counts_as_an_image(leaf: Any, image: bool) -> None:
    assert bool(Inputs(leaf, RGB).images.keys() - {"1"}) is image


def test_hold_and_constant_take_leaves_out_of_the_images() -> None:
    inputs = Inputs(RGB, depth=DEPTH).hold("depth")
    assert list(inputs.images) == ["0"]
    assert list(inputs.bind(Model()).images) == ["rgb"]
    assert list(Inputs(RGB, DEPTH).constant("0").images) == ["1"]
    assert list(Inputs(RGB, DEPTH).hold("0").bind(Model()).images) == ["more.0"]
    with pytest.raises(MulticamError, match="no input 'dept'"):
        _ = Inputs(RGB, depth=DEPTH).hold("dept").images
    with pytest.raises(MulticamError, match="no input 'dept'"):
        Inputs(RGB, depth=DEPTH).hold("dept").bind(Model())


def test_containers_are_fresh_on_every_run() -> None:
    class Overwriting(nn.Module):
        def forward(self, views: list[Tensor]) -> int:
            views[0] = views[0] * 2
            views.append(views[0])
            return len(views)

    views = [RGB, DEPTH]
    inputs = Inputs(views)
    assert [inputs.run(Overwriting()), inputs.run(Overwriting())] == [3, 3]
    assert len(views) == 2
    assert views[0] is RGB


def test_replace_exchanges_by_full_or_short_name() -> None:
    inputs = Inputs({"image": RGB, "ids": IDS}).bind(Batched())
    assert inputs.replace({"image": DEPTH}).leaves["batch.image"] is DEPTH
    assert inputs.leaves["batch.image"] is RGB
    with pytest.raises(MulticamError, match=r"no input 'imgae'.*'batch\.image', 'batch\.ids'"):
        inputs.replace({"imgae": DEPTH})


def test_repeat_keeps_copies_of_a_sample_together_and_held_values_as_they_are() -> None:
    scale, prompts = torch.tensor(3.0), torch.rand(5, 4)
    inputs = Inputs(RGB, ids=IDS, scale=scale, prompts=prompts, mode="sum").constant("prompts")
    grown = inputs.repeat(3)
    assert grown.batch == 6
    assert torch.equal(grown.kwargs["ids"], IDS[[0, 0, 0, 1, 1, 1]])
    assert grown.kwargs["ids"].dtype == torch.int64
    assert grown.kwargs["scale"] is scale
    assert grown.kwargs["prompts"] is prompts
    assert torch.equal(inputs.take([1, 0]).args[0], RGB.flip(0))


def test_a_batch_that_nobody_can_tell_is_refused_with_the_way_out() -> None:
    prompts = Inputs(RGB, prompts=torch.rand(5, 4))
    with pytest.raises(MulticamError, match=r"'prompts' of shape \(5, 4\) with a batch of 2.*constant\('prompts'\)"):
        prompts.repeat(2)
    with pytest.raises(MulticamError, match=r"differ in batch size: 0 \(2, 3, 8, 8\), 1 \(3, 1, 8, 8\)"):
        _ = Inputs(RGB, torch.rand(3, 1, 8, 8)).batch
    with pytest.raises(MulticamError, match="no tensor with a batch axis"):
        _ = Inputs("text", 3).batch
    assert Inputs(IDS).batch == 2


def test_alike_looks_at_held_leaves_only() -> None:
    assert not Inputs(RGB, ids=IDS).alike("0")
    assert Inputs(RGB, ids=IDS[:1].expand(2, -1)).alike("0")
    assert Inputs(RGB, ids=IDS).constant("ids").alike("0")


def test_a_list_of_unbatched_images_is_told_to_stack() -> None:
    class Detector(nn.Module):
        def forward(self, images: list[Tensor]) -> Any:
            return images

    with pytest.raises(MulticamError, match=r"'images\.0' and the others.*no batch axis.*give torch\.stack\(images\)"):
        _ = Inputs([RGB[0], RGB[1]]).bind(Detector()).batch
    assert Inputs([RGB, RGB]).bind(Detector()).batch == 2
    assert Inputs([RGB[0], RGB[1]]).bind(Batched()).batch == 3  # sequences (b n c), for all that is known


def test_own_of_an_inference_tensor_takes_part_in_gradients() -> None:
    with torch.inference_mode():
        x = torch.rand(2, 3)
    found, weight = Inputs(x).own().args[0], torch.ones(3, requires_grad=True)
    (found * weight).sum().backward()
    assert torch.equal(weight.grad, x.sum(0))
    found.zero_()
    assert x.any()


@pytest.mark.parametrize(
    ("names", "expected"), [(None, None), ("rgb", ("rgb",)), (["rgb", "depth"], ("rgb", "depth")), ([], ())]
)
def test_names_are_none_one_or_several(names: Any, expected: tuple[str, ...] | None) -> None:
    assert as_names(names) == expected


@pytest.mark.parametrize(
    ("axes", "frames", "moved"),
    [
        ((16, 3), None, True),
        ((5, 1), None, True),
        ((3, 16), None, False),
        ((1, 3), None, False),
        ((3, 1), None, False),
        ((4, 5), None, False),
        ((3, 1), 3, True),
        ((6, 3), 2, True),
        ((16, 3), 3, False),
        ((6, 3), 3, True),
        ((3, 6), 3, False),
        ((16, 3), 5, True),
    ],
)
def test_frames_come_second_in_a_clip(axes: tuple[int, int], frames: int | None, moved: bool) -> None:
    clip = torch.rand(2, *axes, 4, 4)
    assert torch.equal(frames_second(clip, frames), clip.transpose(1, 2) if moved else clip)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (torch.float16, torch.float32),
        (torch.uint8, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.complex32, torch.complex64),
        (torch.complex64, torch.complex64),
        (torch.complex128, torch.complex128),
    ],
)
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_results_are_in_single_precision_at_least(given: torch.dtype, found: torch.dtype) -> None:
    x = torch.tensor([2, 3]).to(given)
    assert torch.equal(wide(x), x.to(found))
    assert wide(x).dtype == found
