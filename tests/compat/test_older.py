"""Calls as older versions of pytorch-grad-cam took them, and calls that do not fit."""

import inspect
import re
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from multicam import MulticamError, compat
from multicam.compat.modules import MODULES, NOT_OFFERED
from multicam.compat.older import spoken
from tests.helpers.drop_in import METHODS, Net, ViT, images, seeded

pytestmark = pytest.mark.filterwarnings("ignore:the .* map of layer:UserWarning")
CUDA = "move it before, as in model.to('cuda'), and leave {} out; the images follow the model"


@pytest.mark.parametrize("name", [*METHODS, "RandomCAM"])
def test_where_the_model_is_may_be_said(name: str) -> None:
    model, x = seeded(Net), images(1, 3, 16, 16)
    make = getattr(compat, name)
    today = make(model, [model.third])(x)
    older = (
        make(model, [model.third], False),
        make(model, [model.third], use_cuda=False),
        make(model=model, target_layer=model.third, use_cuda=False),
        make(model, [model.third], device="cpu"),
        make(model, [model.third], False, None, output=None),
    )
    for cam in older:
        assert np.array_equal(cam(input_tensor=x, target_category=None), today)
    for call in ({"use_cuda": True}, {"device": "cuda"}, {"device": torch.device("cuda:0")}):
        with pytest.raises(
            MulticamError, match=next(iter(call)) + "=.*, but the model is on cpu, and it is not moved here"
        ):
            make(model, [model.third], **call)
    with pytest.raises(MulticamError, match=re.escape(CUDA.format("use_cuda"))):
        make(model, [model.third], True)


def test_the_reshape_follows_the_switch_that_was_in_its_place() -> None:
    model, x = seeded(ViT), images(1, 3, 32, 32)
    reshape: Callable[..., Any] = lambda t: compat.vit_reshape_transform(t, 4, 4).flip(3)  # noqa: E731
    today = compat.HiResCAM(model, [model.blocks[0]], reshape)(x)
    assert np.array_equal(compat.HiResCAM(model, [model.blocks[0]], False, reshape)(x), today)
    assert np.array_equal(
        compat.HiResCAM(model, [model.blocks[0]], use_cuda=False, reshape_transform=reshape)(x), today
    )
    assert not np.array_equal(compat.HiResCAM(model, [model.blocks[0]])(x), today)
    layers = seeded(Net)
    cam = compat.AblationCAM(layers, [layers.third], False, None, compat.AblationLayer(), 7)
    assert cam.batch_size == 7


def test_a_subclass_may_hand_on_what_older_versions_took() -> None:
    class Old(compat.BaseCAM):
        def __init__(
            self, model: nn.Module, target_layers: Any, use_cuda: bool = False, reshape_transform: Any = None
        ) -> None:
            super().__init__(model, target_layers, use_cuda, reshape_transform, False, True)

        def get_cam_weights(self, x: Any, layer: Any, targets: Any, acts: Any, grads: Any) -> Any:
            return grads.mean((2, 3))

        def forward(self, input_tensor: Any, targets: Any, eigen_smooth: bool = False) -> Any:
            assert not self.cuda and str(self.device) == "cpu"
            return super().forward(input_tensor, targets, eigen_smooth)

    model, x = seeded(Net), images(2, 3, 16, 16)
    assert np.allclose(Old(model, [model.third])(x), compat.GradCAM(model, [model.third])(x), atol=1e-5)
    with pytest.raises(MulticamError, match="use_cuda=True, but the model is on cpu"):
        Old(model, [model.third], True)


@pytest.mark.parametrize("category", [3, [3, 5], torch.tensor([3, 5]), np.array([3, 5]), [np.int64(3), 5]])
def test_a_target_may_be_a_class(category: Any) -> None:
    model, x = seeded(Net), images(2, 3, 16, 16)
    each = [3, 3] if isinstance(category, int) else [3, 5]
    today = compat.GradCAM(model, [model.third])(x, [compat.ClassifierOutputTarget(c) for c in each], True, False)
    cam = compat.GradCAM(model, [model.third])
    assert np.array_equal(cam(x, category, True), today)
    assert np.array_equal(cam(input_tensor=x, target_category=category, aug_smooth=True), today)
    refined = compat.RefineCAM(model, [model.third], base_method=compat.GradCAM)
    assert np.allclose(refined(x, target_category=category), cam(x, category), atol=1e-5)


REFUSED: list[tuple[Callable[[Any, Any], Any], str]] = [
    (lambda m, x: compat.GradCAM(m, [m.third])(x, target_category=1, targets=None), "old name of targets; give one"),
    (lambda m, x: compat.GradCAM(m, [m.third])(x, [1], target_category=1), "old name of targets; give one"),
    (lambda m, x: compat.GradCAM(m, [m.third], target_layer=m.third), "old name of target_layers; give one"),
    (lambda m, x: compat.GradCAM(m, [m.third])(x, True), "one target for each image, not True"),
    (lambda m, x: compat.GradCAM(m, [m.third])(x, [True]), "or a class, not True"),
    (lambda m, x: compat.GradCAM(m, [m.third])(x, torch.tensor([0.5])), r"or a class, not tensor\(0.5000\)"),
    (lambda m, x: compat.GradCAM(m, [m.third])(x, [1, 2]), "2 targets for 1 images"),
    (lambda m, x: compat.GradCAM(m, [m.third])(x, 99), "class 99 does not exist"),
    (lambda m, x: compat.GradCAM(m, [m.third], uses_gradients=False), "no argument of GradCAM 'uses_gradients'"),
    (lambda m, x: compat.GradCAM(m, [m.third], reshape_transfrom=None), "did you mean 'reshape_transform'"),
    (lambda m, x: compat.GradCAM(m), r"GradCAM takes \(model, target_layers, .*: missing a required argument"),
    (lambda m, x: compat.GradCAM(m, [m.third], None, 1, 2), "does not fit: too many positional arguments"),
    (lambda m, x: compat.GradCAM(m, [m.third])(x, [1], False, False, 1), "the call of a GradCAM takes"),
    (lambda m, x: compat.GradCAM(m, [m.third])(), "missing a required argument: 'input_tensor'"),
    (lambda m, x: compat.SESS(m, [m.third])(x, aug_smooth=True), "no argument of SESS.forward 'aug_smooth'"),
    (lambda m, x: compat.SESS(m, [m.third], window_size=9), "window_size of SESS is always None, not 9"),
    (lambda m, x: compat.SESS(m, [m.third], pool="max"), "pool of SESS is always 'mean'"),
    (lambda m, x: compat.SESS(m, [m.third], num_scales=0), "num_scales must be a whole number of at least 1, not 0"),
    (lambda m, x: compat.RefineCAM(m, []), "give at least one"),
    (lambda m, x: compat.GuidedBackpropReLUModel(m, use_cuda=True), "use_cuda=True, but the model is on cpu"),
    (lambda m, x: compat.GuidedBackpropReLUModel(m, True), "use_cuda=True, but the model is on cpu"),
    (lambda m, x: compat.GuidedBackpropReLUModel(m, "cuda"), "device='cuda', but the model is on cpu"),
    (lambda m, x: compat.NoisyLinearImputer(0.01, [1]), r"NoisyLinearImputer takes \(noise, seed\)"),
    (lambda m, x: compat.NoisyLinearImputer(weighting=[1]), "no argument of NoisyLinearImputer 'weighting'"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=map(str, range(len(REFUSED))))
def test_what_does_not_fit_is_refused_in_words(call: Callable[[Any, Any], Any], message: str) -> None:
    with pytest.raises(MulticamError, match=message):
        call(seeded(Net), images(1, 3, 16, 16))


def test_a_gpu_may_be_said_where_the_model_is_on_it() -> None:
    # The model need not exist on a GPU to be asked where it is.
    class There(Net):
        def parameters(self, recurse: bool = True) -> Any:
            return iter([type("Parameter", (), {"device": torch.device("cuda:0")})()])

    made = spoken(lambda model, target_layers, reshape_transform=None: target_layers)
    for call in ({"use_cuda": True}, {"device": "cuda"}, {"device": "cuda:0"}, {"use_cuda": False}):
        assert made(There(), target_layer=3, **call) == 3
    assert made(There(), 3, True, None) == 3
    with pytest.raises(MulticamError, match="but the model is on cuda:0"):
        made(There(), 3, device="cuda:1")


def theirs() -> dict[str, tuple[str, str, list[str]]]:
    """Every function and class that a module of pytorch-grad-cam defines, what of it is called, and its arguments."""
    found = {}
    for path in MODULES:
        module = import_module(f"pytorch_grad_cam.{path}")
        for name, value in vars(module).items():
            if getattr(value, "__module__", None) != module.__name__ or name in NOT_OFFERED or name.startswith("_"):
                continue
            for method in ("__init__", "__call__", "forward") if inspect.isclass(value) else ("",):
                called = getattr(value, method, None) if method else value
                if inspect.isfunction(called):
                    arguments = {*inspect.signature(called).parameters} - {"self", "args", "kwargs"}
                    found[f"{path}.{name}.{method}"] = (name, method, sorted(arguments))
    return found


@pytest.mark.parametrize(("name", "method", "arguments"), theirs().values(), ids=theirs().keys())
def test_every_argument_is_taken_or_refused_in_words(name: str, method: str, arguments: list[str]) -> None:
    if name.startswith("AblationLayer"):  # a name to hand to AblationCAM
        return
    value = getattr(compat, name)
    called = getattr(value, method) if method else value
    taken = inspect.signature(called).parameters
    for argument in () if {"args", "kwargs"} & {*taken} else {*arguments} - {*taken}:
        with pytest.raises(MulticamError, match=f"no argument of .* '{argument}'"):
            called(*[compat] * bool(method), **{argument: None})
