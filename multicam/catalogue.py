"""Every method, for whoever needs to choose one by name or to try them all."""

from multicam.cam import CAM
from multicam.methods import (
    EigenCAM,
    EigenGradCAM,
    GradCAM,
    GradCAMElementWise,
    GradCAMPlusPlus,
    HiResCAM,
    LayerCAM,
    XGradCAM,
)

METHODS: tuple[type[CAM], ...] = (
    GradCAM, HiResCAM, GradCAMElementWise, GradCAMPlusPlus, XGradCAM, LayerCAM, EigenCAM, EigenGradCAM,
)  # fmt: skip
