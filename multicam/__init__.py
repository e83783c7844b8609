"""Explain a PyTorch model that takes several inputs, without editing it."""

from multicam.adapter import PackedModel
from multicam.cam import CAM, explain_methods
from multicam.errors import MulticamError
from multicam.figures import Picture, Tile, figure
from multicam.inputs import Inputs
from multicam.layers import Layer
from multicam.maps import Maps
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
from multicam.modalities import MODALITIES
from multicam.packing import Spec
from multicam.panels import compare, panel
from multicam.render import colorize, normalize, overlay
from multicam.reshape import as_it_is, channels_last, stacked, tokens
from multicam.survey import list_layers
from multicam.targets import Binary, ClassScore, Contrast, Probability, Regression, Similarity, TopClass
from multicam.trace import Site, Trace

__version__ = "0.1.0"

__all__ = [
    "CAM",
    "MODALITIES",
    "Binary",
    "ClassScore",
    "Contrast",
    "EigenCAM",
    "EigenGradCAM",
    "GradCAM",
    "GradCAMElementWise",
    "GradCAMPlusPlus",
    "HiResCAM",
    "Inputs",
    "Layer",
    "LayerCAM",
    "Maps",
    "MulticamError",
    "PackedModel",
    "Picture",
    "Probability",
    "Regression",
    "Similarity",
    "Site",
    "Spec",
    "Tile",
    "TopClass",
    "Trace",
    "XGradCAM",
    "as_it_is",
    "channels_last",
    "colorize",
    "explain_methods",
    "figure",
    "list_layers",
    "normalize",
    "overlay",
    "panel",
    "stacked",
    "tokens",
]
