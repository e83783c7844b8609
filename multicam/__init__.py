"""Explain a PyTorch model that takes several inputs, without editing it."""

from multicam.adapter import PackedModel
from multicam.attending import attention, record_attention
from multicam.attention_figures import flow_figure, head_sheet, query_figure
from multicam.attributions import Attributions
from multicam.averaging import expected_gradients, integrated_gradients, smoothgrad, vargrad
from multicam.boxes import BoxScore, TopBox
from multicam.calls import AttentionCall
from multicam.cam import CAM, explain_methods
from multicam.captum_bridge import captum_attribution
from multicam.concepts import Concepts, factorize
from multicam.contribution_figures import contribution_figure
from multicam.covering import occlusion
from multicam.dream import Dream, activation_maximization, deep_dream
from multicam.dream_figures import dream_figure, history_figure
from multicam.errors import MulticamError
from multicam.evaluation import Batch, evaluate
from multicam.explaining import explainer
from multicam.faithfulness import Curve, Masked, deletion, insertion, road, seen_through
from multicam.feature_figures import feature_sheet, kernel_sheet
from multicam.features import Kernels, feature_maps, kernels
from multicam.figures import Picture, Tile, figure
from multicam.flow import Flow, legrad, relevance, rollout
from multicam.fullgrad import CompleteFullGrad, FullGrad
from multicam.input_cam import InputCAM
from multicam.inputs import Inputs
from multicam.interactions import double_occlusion, second_order_gradient
from multicam.layers import Layer
from multicam.localization import agreement, complexity, energy_inside, names_input, pointing_game, sparseness
from multicam.maps import Maps
from multicam.measures import Explained, Metric
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
    WeightedCAM,
    XGradCAM,
)
from multicam.modalities import MODALITIES
from multicam.packing import Spec
from multicam.panels import compare, panel
from multicam.perturb import ISCAM, RISE, SSCAM, AblationCAM, ScoreCAM, SmoothGradCAMPlusPlus
from multicam.randomization import Randomization, branch_of, parameter_randomization
from multicam.ranking import Comparison, Evaluation
from multicam.record import Attention
from multicam.regions import RegionContribution, region_contribution, superpixels
from multicam.render import colorize, normalize, overlay
from multicam.reshape import as_it_is, channels_last, stacked, tokens
from multicam.robustness import Infidelity, infidelity, sensitivity
from multicam.saliency import deconvnet, gradient, guided_backprop, guided_gradcam, input_x_gradient
from multicam.saliency_figures import saliency_figure
from multicam.sess import SESS
from multicam.shapley import Contribution, contribution
from multicam.shares import Between, flow_matrix
from multicam.survey import list_layers
from multicam.targets import (
    Binary,
    ClassScore,
    Contrast,
    Probability,
    QueryScore,
    Regression,
    SegmentationScore,
    Similarity,
    TopClass,
)
from multicam.trace import Site, Trace
from multicam.wrappers import Augmented, EigenSmoothed, FinerCAM, RefineCAM

__version__ = "0.1.0"

__all__ = [
    "CAM",
    "FEM",
    "ISCAM",
    "KPCACAM",
    "MODALITIES",
    "RISE",
    "SESS",
    "SSCAM",
    "AblationCAM",
    "Attention",
    "AttentionCall",
    "Attributions",
    "Augmented",
    "Batch",
    "Between",
    "Binary",
    "BoxScore",
    "ClassScore",
    "Comparison",
    "CompleteFullGrad",
    "Concepts",
    "Contrast",
    "Contribution",
    "Curve",
    "Dream",
    "EigenCAM",
    "EigenGradCAM",
    "EigenSmoothed",
    "Evaluation",
    "Explained",
    "FinerCAM",
    "Flow",
    "FullGrad",
    "GradCAM",
    "GradCAMElementWise",
    "GradCAMPlusPlus",
    "HiResCAM",
    "Infidelity",
    "InputCAM",
    "Inputs",
    "Kernels",
    "Layer",
    "LayerCAM",
    "Maps",
    "Masked",
    "Metric",
    "MulticamError",
    "OriginalCAM",
    "PackedModel",
    "Picture",
    "Probability",
    "QueryScore",
    "RandomCAM",
    "Randomization",
    "RefineCAM",
    "RegionContribution",
    "Regression",
    "ScoreCAM",
    "SegEigenCAM",
    "SegmentationScore",
    "ShapleyCAM",
    "Similarity",
    "Site",
    "SmoothGradCAMPlusPlus",
    "Spec",
    "Tile",
    "TopBox",
    "TopClass",
    "Trace",
    "WeightedCAM",
    "XGradCAM",
    "activation_maximization",
    "agreement",
    "as_it_is",
    "attention",
    "branch_of",
    "captum_attribution",
    "channels_last",
    "colorize",
    "compare",
    "complexity",
    "contribution",
    "contribution_figure",
    "deconvnet",
    "deep_dream",
    "deletion",
    "double_occlusion",
    "dream_figure",
    "energy_inside",
    "evaluate",
    "expected_gradients",
    "explain_methods",
    "explainer",
    "factorize",
    "feature_maps",
    "feature_sheet",
    "figure",
    "flow_figure",
    "flow_matrix",
    "gradient",
    "guided_backprop",
    "guided_gradcam",
    "head_sheet",
    "history_figure",
    "infidelity",
    "input_x_gradient",
    "insertion",
    "integrated_gradients",
    "kernel_sheet",
    "kernels",
    "legrad",
    "list_layers",
    "names_input",
    "normalize",
    "occlusion",
    "overlay",
    "panel",
    "parameter_randomization",
    "pointing_game",
    "query_figure",
    "record_attention",
    "region_contribution",
    "relevance",
    "road",
    "rollout",
    "saliency_figure",
    "second_order_gradient",
    "seen_through",
    "sensitivity",
    "smoothgrad",
    "sparseness",
    "stacked",
    "superpixels",
    "tokens",
    "vargrad",
]
