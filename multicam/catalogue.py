"""Every method, for whoever needs to choose one by name or to try them all."""

from collections.abc import Callable

from multicam.attributions import Attributions
from multicam.averaging import integrated_gradients, smoothgrad, vargrad
from multicam.cam import CAM
from multicam.covering import occlusion
from multicam.fullgrad import CompleteFullGrad, FullGrad
from multicam.input_cam import InputCAM
from multicam.methods import (
    FEM,
    KPCACAM,
    EigenCAM,
    EigenGradCAM,
    GradCAM,
    GradCAMElementWise,
    GradCAMPlusPlus,
    HiResCAM,
    LayerCAM,
    OriginalCAM,
    RandomCAM,
    SegEigenCAM,
    ShapleyCAM,
    XGradCAM,
)
from multicam.perturb import ISCAM, RISE, SSCAM, AblationCAM, ScoreCAM, SmoothGradCAMPlusPlus
from multicam.saliency import deconvnet, gradient, guided_backprop, guided_gradcam, input_x_gradient

# On any layer, all from the one forward and backward pass of a trace.
ONE_PASS: tuple[type[CAM], ...] = (
    GradCAM, HiResCAM, GradCAMElementWise, GradCAMPlusPlus, XGradCAM, LayerCAM,
    EigenCAM, EigenGradCAM, SegEigenCAM, KPCACAM, FEM, RandomCAM,
)  # fmt: skip
METHODS: tuple[type[CAM], ...] = (
    *ONE_PASS, OriginalCAM, ShapleyCAM, SmoothGradCAMPlusPlus, AblationCAM, ScoreCAM, ISCAM, SSCAM,
)  # fmt: skip
# Without a layer.
INPUT_METHODS: tuple[type[InputCAM], ...] = (RISE, FullGrad, CompleteFullGrad)
# Entry by entry, all called alike but guided Grad-CAM, which takes layers. Expected gradients need references.
ATTRIBUTIONS: tuple[Callable[..., Attributions], ...] = (
    gradient, input_x_gradient, guided_backprop, deconvnet, guided_gradcam, smoothgrad, vargrad, integrated_gradients,
    occlusion,
)  # fmt: skip
