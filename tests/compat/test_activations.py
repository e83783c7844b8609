"""The record of layers in passes of a script's own, against pytorch-grad-cam's."""

from collections.abc import Callable
from typing import Any

import pytest
import pytorch_grad_cam as peer
import torch
from torch import Tensor, nn

from multicam import Layer, MulticamError, compat
from tests.helpers.drop_in import Net, ViT, images, seeded


class Shared(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - super().forward(x.flip(3)).tanh()


class Pyramid(Net):
    """A layer that returns levels."""

    class Levels(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"0": x, "pool": nn.functional.max_pool2d(x, 2)}

    def __init__(self) -> None:
        super().__init__()
        self.levels = self.Levels()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.levels(self.third(self.second(self.first(x))))["pool"].mean((2, 3)))


CASES: dict[str, tuple[Callable[[], nn.Module], list[str], Any]] = {
    "a layer": (Net, ["third"], None),
    "several layers": (Net, ["first", "second", "third"], None),
    "a layer given twice": (Net, ["second", "second"], None),
    "a shared layer": (Shared, ["third"], None),
    "tokens": (ViT, ["blocks.0", "blocks.1"], lambda t: compat.vit_reshape_transform(t, 4, 4)),
    "a reshape that computes": (Net, ["third"], lambda t: t.relu() * 2),
    "levels": (Pyramid, ["levels"], compat.fasterrcnn_reshape_transform),
    "volumes": (lambda: Net(3), ["second", "third"], None),
}


def close(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(map(torch.allclose, ours, theirs))


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_the_record_is_theirs(case: str, detach: bool) -> None:
    make, paths, reshape = CASES[case]
    if not detach and case == "levels":
        pytest.skip("the levels themselves are no tensor")
    x = images(2, 3, 16, 16, 16) if case == "volumes" else images(2, 3, 32, 32)
    records = []
    for m in (compat, peer):
        model = seeded(make)
        record = m.ActivationsAndGradients(model, [model.get_submodule(path) for path in paths], reshape, detach)
        record(x)[:, 3].sum().backward()
        records.append(record)
    ours, theirs = records
    assert close(ours.activations, theirs.activations) and len(ours.activations) >= len(paths)
    assert close(ours.gradients, theirs.gradients) and len(ours.gradients) == (
        0 if case == "levels" else len(ours.activations)
    )
    assert all(a.requires_grad != detach for a in ours.activations)
    ours.release()
    assert ours.activations == ours.gradients == [] and not any(m._forward_hooks for m in ours.model.modules())


def test_passes_of_the_model_itself_are_recorded_until_the_release() -> None:
    for m in (compat, peer):
        model, x = seeded(Net), images(2, 3, 16, 16)
        record = m.ActivationsAndGradients(model, [model.third], None)
        model(x).sum().backward()
        model(x)
        assert len(record.activations) == 2 and len(record.gradients) == 1
        record(x)
        assert len(record.activations) == 1 and record.gradients == []
        record.gradients, record.activations = [], []
        record.release()
        model(x)
        assert record.activations == [] and not model.third._forward_hooks and not record.handles


def test_the_pass_is_the_scripts_own() -> None:
    model, x = seeded(Net).train(), images(2, 3, 16, 16)
    record = compat.ActivationsAndGradients(model, ["third"])
    record(x).sum().backward()
    assert model.training and model.head.weight.grad is not None
    assert torch.equal(record(x=x), model(x))
    model.requires_grad_(False)
    assert not record(x).requires_grad and len(record.activations) == 1


def test_what_follows_the_layer_does_not_reach_the_record() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)), images(1, 3, 8, 8)
    record = compat.ActivationsAndGradients(model, [model[0]])
    record(x)
    assert torch.equal(record.activations[0], model[0](x))


def test_a_script_may_record_in_its_own_way() -> None:
    class First(compat.ActivationsAndGradients):
        """Of a layer that returns several tensors."""

        def save_activation(self, module: nn.Module, input: Any, output: Any) -> None:
            super().save_activation(module, input, output[0])

        def save_gradient(self, module: nn.Module, input: Any, output: Any) -> None:
            super().save_gradient(module, input, output[0])

    model = nn.LSTM(3, 5, batch_first=True)
    record = First(model, [model])
    record(images(2, 4, 3))[0].sum().backward()
    assert record.activations[0].shape == (2, 4, 5) and torch.equal(record.gradients[0], torch.ones(2, 4, 5))


def test_layers_that_no_record_fits_are_refused() -> None:
    model = seeded(Pyramid)
    with pytest.raises(MulticamError, match="a Levels returns a dict, and activations are tensors"):
        compat.ActivationsAndGradients(model, [model.levels])(images(1, 3, 16, 16))
    with pytest.raises(MulticamError, match="did you mean 'third'"):
        compat.ActivationsAndGradients(model, ["thrid"])
    with pytest.raises(MulticamError, match=r"activations are those of every call .*call=1"):
        compat.ActivationsAndGradients(model, [Layer("third", call=1)])


# The object that a CAM has.


@pytest.mark.parametrize("name", ["GradCAM", "LayerCAM", "EigenCAM"])
def test_a_cam_tells_what_its_last_call_saw(name: str) -> None:
    found = []
    for m in (compat, peer):
        model, x = seeded(Net), images(2, 3, 16, 16)
        cam = getattr(m, name)(model, [model.second, model.third])
        cam(x, [compat.ClassifierOutputTarget(2)] * 2)
        found.append(cam.activations_and_grads)
        assert m is peer or not any(module._forward_hooks for module in model.modules())
    ours, theirs = found
    assert close(ours.activations, theirs.activations) and close(ours.gradients, theirs.gradients)
    theirs.release()


class Boxes:
    """Scripts for detectors have their own record, which runs the model and sorts out what it returns."""

    def __init__(self, model: nn.Module, layers: list[nn.Module]) -> None:
        self.model, self.gradients, self.activations = model, [], []
        for layer in layers:
            layer.register_forward_hook(self.save)

    def save(self, module: nn.Module, input: Any, output: Tensor) -> None:
        self.activations.append(output.cpu().detach())
        output.register_hook(self.receive)

    def receive(self, gradient: Tensor) -> None:
        self.gradients = [gradient.cpu().detach(), *self.gradients]

    def __call__(self, x: Tensor) -> Any:
        self.gradients, self.activations = [], []
        out = self.model(x)
        return [[out.softmax(1), "boxes"]]

    def release(self) -> None:
        pass


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "name", ["GradCAM", "GradCAMPlusPlus", "XGradCAM", "HiResCAM", "LayerCAM", "GradCAMElementWise", "FEM"]
)
def test_a_record_of_somebody_elses_may_run_the_model(name: str, frozen: bool) -> None:
    found = []
    for m in (compat, peer):
        model, x = seeded(Net), images(1, 3, 16, 16)
        model.head.weight.grad = torch.full_like(model.head.weight, 7.0)
        model.requires_grad_(not frozen or m is peer)  # there it has no gradient then
        cam = getattr(m, name)(model, [model.second, model.third])
        cam.activations_and_grads = Boxes(model, [model.second, model.third])
        with torch.no_grad() if m is compat else torch.enable_grad():
            found.append(cam(x, [lambda data: 1e4 * data[0][0, 2] + len(data[1])]))
        assert m is peer or (model.head.weight.grad == 7).all()
    assert abs(found[0] - found[1]).max() < 1e-4 and found[0].max() > 0.9


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.photo, self.table = nn.Conv2d(3, 8, 3, 2), nn.Linear(4, 8)

    def forward(self, photo: Tensor, table: Tensor) -> Tensor:
        return torch.einsum("b c h w, b c -> b c", self.photo(photo).relu(), self.table(table))


@pytest.mark.parametrize("container", [list, tuple])
def test_a_record_may_take_several_inputs_as_one(container: type) -> None:
    """As scripts for image-text models do: a method with a record, and a call, of its own."""
    found = []
    for m in (compat, peer):

        class Pair(m.ActivationsAndGradients):
            def __call__(self, x: Any) -> Any:
                self.gradients, self.activations = [], []
                assert type(x) is container
                return self.model(x[0], x[1])

        class Method(m.GradCAM):
            def __init__(self, model: nn.Module, target_layers: Any) -> None:
                super().__init__(model, target_layers)
                self.activations_and_grads = Pair(self.model, target_layers, self.reshape_transform)

            def __call__(self, x: Any, targets: Any) -> Any:
                if isinstance(self, compat.BaseCAM):
                    return super().__call__(x, targets)
                outputs = self.activations_and_grads(x)
                sum(target(output) for target, output in zip(targets, outputs, strict=True)).backward()
                return self.aggregate_multi_layers(self.compute_cam_per_layer(x[0], targets, False))

            def get_target_width_height(self, x: Any) -> tuple[int, ...]:
                return 18, 16

        model, x = seeded(TwoInputs), container([images(2, 3, 16, 18), images(2, 4)])
        found.append(Method(model, [model.photo])(x, [compat.ClassifierOutputTarget(c) for c in (2, 5)]))
        assert m is peer or all(p.grad is None for p in model.parameters())
    assert found[0].shape == (2, 16, 18) and abs(found[0] - found[1]).max() < 1e-5


def test_a_step_may_read_the_gradient_of_each_input() -> None:
    class Both(compat.BaseCAM):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given, compute_input_gradient=True)

        def get_cam_image(self, x: Any, layer: Any, targets: Any, acts: Any, grads: Any, eigen_smooth: bool) -> Any:
            told.update({name: leaf.grad for name, leaf in x.leaves.items()})
            return acts.sum(1)

    told: dict[str, Tensor] = {}
    model, photo, table = seeded(TwoInputs), images(2, 3, 16, 18).requires_grad_(), images(2, 4).requires_grad_()
    Both(model, ["photo"])((photo, table), 3)
    model(photo, table)[:, 3].sum().backward()
    assert torch.allclose(told["photo"], photo.grad) and torch.allclose(told["table"], table.grad)


def test_a_record_that_does_not_fit_is_refused() -> None:
    model, x = seeded(Net), images(2, 3, 16, 16)
    cam = compat.GradCAM(model, [model.second, model.third])
    cam.activations_and_grads = Boxes(model, [model.third])
    with pytest.raises(MulticamError, match="2 targets for 1 outputs"):
        cam(x, [0, 0])
    with pytest.raises(MulticamError, match="2 target layers and 1 activations"):
        cam(x[:1], [lambda data: data[0].sum()])
    with pytest.raises(MulticamError, match="output"):
        cam(x[:1])
    with pytest.raises(MulticamError, match=r"returned shape \(10,\)"):
        cam(x[:1], [lambda data: data[0][0]])
    with pytest.raises(MulticamError, match="no gradient leads from the targets to the inputs"):
        cam(x[:1], [lambda data: data[0][0, 1].detach()])
    for other in (compat.ScoreCAM, compat.AblationCAM, compat.FullGrad):
        cam = other(model, [model.third])
        cam.activations_and_grads = Boxes(model, [model.third])
        with pytest.raises(MulticamError, match=r"a pass|passes of its own"):
            cam(x[:1], [lambda data: data[0].sum()])
