"""The modules of pytorch-grad-cam, by their names there: each has every name of this room.

A script that imports `pytorch_grad_cam.utils.image` finds the same functions in `multicam.compat.utils.image`, with one
word replaced. The modules are not files: they would be forty with a line each.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from multicam.errors import MulticamError

METHODS = (
    "ablation_cam ablation_cam_multilayer eigen_cam eigen_grad_cam fem finer_cam fullgrad_cam grad_cam grad_cam_elementwise "
    "grad_cam_plusplus hirescam kpca_cam layer_cam random_cam refine_cam score_cam seg_eigen_cam sess shapley_cam xgrad_cam"
)
PARTS = "ablation_layer activations_and_gradients base_cam guided_backprop sobel_cam"
FOLDERS = {
    "utils": "find_layers image model_targets reshape_transforms svd_on_activations",
    "metrics": "arcc cam_mult_image perturbation_confidence road",
    "feature_factorization": "deep_feature_factorization",
}
MODULES = (
    *METHODS.split(),
    *PARTS.split(),
    *FOLDERS,
    *(f"{folder}.{name}" for folder, names in FOLDERS.items() for name in names.split()),
)
GUIDED = "GuidedBackpropReLUModel(model) guides every ReLU of a model, and changes none"
NOT_OFFERED = {
    "GuidedBackpropReLU": GUIDED,
    "GuidedBackpropReLUasModule": GUIDED,
    "dff": "DeepFeatureFactorization(model, layer) factorizes a layer, multicam.inside.factorize several of any model",
    "multiply_tensor_with_cam": "write image * cam",
    "batch_pearson_coherency": "Coherency() correlates a method's maps",
    "sliding_window": "SESS(model, layers) has windows of its own, and so has multicam.SESS",
    "window_starts": "SESS(model, layers) has windows of its own, and so has multicam.SESS",
    "neighbors_weights": "NoisyLinearImputer() has weights of its own",
}


def add_modules(package: str, get: Callable[[str], Any], names: Sequence[str]) -> None:
    """Make `package.utils.image` and the others importable.

    Args:
        package: The package that they are in; it is being imported.
        get: Its `__getattr__`.
        names: Its public names.
    """

    def found(name: str) -> Any:
        if name in NOT_OFFERED:
            raise MulticamError(f"{package} has no {name} of pytorch-grad-cam's: {NOT_OFFERED[name]}")
        return get(name)

    for path in MODULES:
        module = ModuleType(f"{package}.{path}", "The names of `multicam.compat`, as a module of pytorch-grad-cam.")
        module.__spec__ = ModuleSpec(module.__name__, None, is_package=path in FOLDERS)
        if path in FOLDERS:
            module.__path__ = []
        module.__getattr__ = found  # type: ignore[method-assign]
        module.__all__ = names  # type: ignore[attr-defined]
        sys.modules[module.__name__] = module
        parent, _, name = module.__name__.rpartition(".")
        if name not in names:  # `sobel_cam` is a function here, and in the module of its name
            setattr(sys.modules[parent], name, module)
