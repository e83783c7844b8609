"""Explain a PyTorch model that takes several inputs, without editing it."""

from multicam.adapter import PackedModel
from multicam.cam import (
    CAM,
    EigenCAM,
    EigenGradCAM,
    GradCAM,
    GradCAMElementWise,
    GradCAMPlusPlus,
    HiResCAM,
    LayerCAM,
    XGradCAM,
    explain_methods,
)
from multicam.errors import MulticamError
from multicam.inputs import Inputs
from multicam.layers import Layer
from multicam.maps import Maps
from multicam.packing import Spec
from multicam.reshape import as_it_is, channels_last, stacked, tokens
from multicam.survey import list_layers
from multicam.targets import Binary, ClassScore, Contrast, Probability, Regression, Similarity, TopClass
from multicam.trace import Site, Trace

__version__ = "0.1.0"

__all__ = [
    "CAM",
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
    "Probability",
    "Regression",
    "Similarity",
    "Site",
    "Spec",
    "TopClass",
    "Trace",
    "XGradCAM",
    "as_it_is",
    "channels_last",
    "explain_methods",
    "list_layers",
    "stacked",
    "tokens",
]
