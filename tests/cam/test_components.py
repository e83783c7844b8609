"""Principal components: against an SVD, scikit-learn and pytorch-grad-cam, and the sign that none of these fixes."""

from collections.abc import Callable

import pytest
import pytorch_grad_cam as pgc
import torch
from sklearn.decomposition import KernelPCA
from torch import Tensor, nn

from multicam import CAM, Layer, MulticamError, Trace, as_it_is
from multicam.cam.components import KERNELS, KPCACAM, EigenCAM, EigenGradCAM, SegEigenCAM, first_component
from tests.helpers.engines import SUBJECTS, assert_close, pgc_raw
from tests.helpers.grids import every_grid, small
from tests.helpers.models import Fusion, fusion_inputs, seeded


def component(X: Tensor) -> Tensor:
    """The first principal component of `(c n)`, signed like the sum over channels."""
    centred = (X - X.mean(1, keepdim=True)).T
    projection = centred @ torch.linalg.svd(centred, full_matrices=False)[2][0]
    return projection * torch.sign(projection @ centred.sum(1))


def largest_positive(projection: Tensor) -> Tensor:
    return projection * torch.sign(projection[projection.abs().argmax()])


def kernel_component(A: Tensor, kernel: str, gamma: float | None = None) -> Tensor:
    """scikit-learn's, signed as above."""
    centred = (A - A.mean(1, keepdim=True)).T
    projection = torch.tensor(KernelPCA(1, kernel=kernel, gamma=gamma).fit_transform(centred.numpy())[:, 0])
    return projection * torch.sign(projection @ centred.sum(1))


FORMULAS: dict[type[CAM], Callable[[Tensor, Tensor], Tensor]] = {
    EigenCAM: lambda A, G: component(A),
    EigenGradCAM: lambda A, G: component(G * A),
    SegEigenCAM: lambda A, G: largest_positive(component(G.abs() * A)),
    KPCACAM: lambda A, G: kernel_component(A, "sigmoid"),
}


@every_grid
@pytest.mark.parametrize("method", FORMULAS, ids=lambda m: m.__name__)
def test_every_method_is_its_papers_formula(method: type[CAM], grid: tuple[int, ...]) -> None:
    model, x = small(grid, c=4 if len(grid) != 2 else 8)
    site = Trace(model, x, {"conv": "conv"}, 3).sites["conv"]
    found = method(model, "conv").saliency(site).flatten(1)
    for b in range(2):
        assert_close(found[b], FORMULAS[method](site.acts[b].flatten(1), site.grads[b].flatten(1)), 1e-5)


@pytest.mark.parametrize("method", FORMULAS, ids=lambda m: m.__name__)
def test_the_scale_of_a_component_means_nothing(method: type[CAM]) -> None:
    model, inputs = seeded(Fusion), fusion_inputs()
    assert not method(model, {"rgb": "rgb", "depth": "depth"})(inputs, 1).comparable


def test_components_of_several_axes_are_those_of_the_cells_in_any_order() -> None:
    x = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    found = first_component(x)
    torch.testing.assert_close(first_component(x.flatten(2)[:, :, order]), found.flatten(1)[:, order])
    for b in range(2):
        assert_close(found[b].flatten(), component(x[b].flatten(1)), 1e-9)
    turned = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
    again = first_component(torch.einsum("d c, b c h w -> b d h w", turned, x)).flatten(1)
    torch.testing.assert_close(again.abs(), found.flatten(1).abs())  # it knows no channels, but for the sign


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_map_does_not_depend_on_the_other_samples(kernel: str) -> None:
    model, x = small((5, 7), 4)
    both = KPCACAM(model, "conv", kernel=kernel)(x, signed=True)
    assert_close(KPCACAM(model, "conv", kernel=kernel)(x[1:], signed=True)[0], both[1], 1e-8)


@pytest.mark.parametrize("method", [EigenCAM, EigenGradCAM, SegEigenCAM, KPCACAM], ids=lambda m: m.__name__)
def test_the_sign_of_a_component_is_fixed(method: type[CAM]) -> None:
    """A bright object stays positive under perturbations that flip an SVD's sign freely."""
    model = nn.Sequential(
        nn.Conv2d(1, 8, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2, bias=False)
    )
    with torch.no_grad():
        model[0].weight.abs_()
        model[3].weight.abs_()
    x = torch.zeros(1, 1, 8, 8)
    x[..., 2:4, 2:4] = 1
    for seed in range(20):
        noisy = x + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
        found = method(model, "0")(noisy, 0, signed=True)[0]
        assert found[2:4, 2:4].min() > found.abs().mean()


@every_grid
@pytest.mark.parametrize("gamma", [None, 0.3])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_are_those_of_scikit_learn(kernel: str, gamma: float | None, grid: tuple[int, ...]) -> None:
    model, x = small(grid, c=4)
    site = Trace(model, x, {"conv": "conv"}).sites["conv"]
    found = KPCACAM(model, "conv", kernel=kernel, gamma=gamma).saliency(site).flatten(1)
    for b in range(2):
        assert_close(found[b], kernel_component(site.acts[b].flatten(1), kernel, gamma), 1e-8)


def test_a_linear_kernel_is_eigen_cam() -> None:
    model, inputs = seeded(Fusion), fusion_inputs()
    found = KPCACAM(model, {"rgb": "rgb"}, kernel="linear")(inputs, signed=True)["rgb"]
    assert_close(found, EigenCAM(model, {"rgb": "rgb"})(inputs, signed=True)["rgb"], 1e-4)


def test_a_kernel_must_exist() -> None:
    model, _ = small((5, 7), 4)
    with pytest.raises(
        MulticamError, match=r"no kernel 'rfb'; did you mean 'rbf'\? There are: 'linear', 'poly', 'rbf'"
    ):
        KPCACAM(model, "conv", kernel="rfb")
    for gamma in (0.0, -1.0, float("nan")):
        with pytest.raises(
            MulticamError, match="gamma is a positive number, or None for one over the number of channels"
        ):
            KPCACAM(model, "conv", gamma=gamma)


# It computes in single precision, in which the kernel of the nearly flat attended values is rounding alone.
@pytest.mark.parametrize("name", [name for name, make in SUBJECTS.items() if make().layer != "attn"])
@pytest.mark.parametrize("kernel", ["sigmoid", "rbf"])
def test_kpca_cam_of_pytorch_grad_cam(name: str, kernel: str) -> None:
    it = SUBJECTS[name]()
    packed, x = it.packed()

    def engine(model: nn.Module, layers: list[nn.Module]) -> pgc.KPCA_CAM:
        return pgc.KPCA_CAM(model, layers, kernel=kernel)

    found = pgc_raw(engine, packed, packed.target_layers[0], x)
    expected = KPCACAM(it.model, it.layer, kernel=kernel).saliency(it.site())
    flip = torch.where((found * expected).sum((1, 2), keepdim=True) < 0, -1, 1)
    assert_close(flip * found, expected, 1e-3)


def test_seg_eigen_cam_does_not_tell_for_from_against() -> None:
    model, x = small((5, 7), 8)
    pro, contra = (SegEigenCAM(model, "conv")(x, lambda out, s=s: s * out[:, 3], signed=True) for s in (1, -1))
    assert torch.equal(pro, contra)
    assert (pro.amax((1, 2)) >= -pro.amin((1, 2))).all()


@pytest.mark.parametrize("method", [EigenCAM, KPCACAM], ids=lambda m: m.__name__)
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_behind_a_normalisation_what_stands_out_is_positive(method: type[CAM], scale: float) -> None:
    """There the sum over channels is rounding, which must not decide the sign of a component."""
    acts = torch.rand(1, 6, 12, generator=torch.Generator().manual_seed(0)) * 0.1
    acts[0, :3, 4] += 3.0
    acts = acts - acts.mean(1, keepdim=True)
    for noise in (1e-7, -1e-7):
        model = nn.Sequential(nn.Identity(), nn.Conv1d(6, 2, 1))
        site = Trace(
            model,
            scale * (acts + noise * torch.rand(acts.shape)),
            {"": Layer("0", reshape=as_it_is)},
            lambda y: y[:, 0].sum(1),
        )
        found = method(model, "0").saliency(site.sites[""])
        assert found[0].argmax() == 4
        assert found[0, 4] > 0
