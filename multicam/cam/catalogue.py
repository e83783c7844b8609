"""Every method, for whoever needs to choose one by name or to try them all."""

from multicam.cam.base import CAM, InputCAM
from multicam.cam.components import KPCACAM, EigenCAM, EigenGradCAM, SegEigenCAM
from multicam.cam.fullgrad import CompleteFullGrad, FullGrad
from multicam.cam.masking import ISCAM, SSCAM, AblationCAM, ScoreCAM
from multicam.cam.rise import RISE
from multicam.cam.weighted import (
    FEM,
    GradCAM,
    GradCAMElementWise,
    GradCAMPlusPlus,
    HiResCAM,
    LayerCAM,
    OriginalCAM,
    RandomCAM,
    ShapleyCAM,
    SmoothGradCAMPlusPlus,
    XGradCAM,
)

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
