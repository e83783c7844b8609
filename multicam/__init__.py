"""Explain a PyTorch model that takes several inputs, without editing it."""

from multicam.attending.attend import attention, record_attention
from multicam.attending.attention_call import AttentionCall
from multicam.attending.attentions import Attention
from multicam.attending.between import Between, flow_matrix
from multicam.attending.flow import Flow, legrad, relevance, rollout
from multicam.call.inputs import Inputs
from multicam.call.modalities import MODALITIES
from multicam.call.packing import Spec
from multicam.call.targets.detections import BoxScore, TopBox
from multicam.call.targets.scores import (
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
from multicam.cam.base import CAM, InputCAM, explain_methods
from multicam.cam.components import KPCACAM, EigenCAM, EigenGradCAM, SegEigenCAM
from multicam.cam.fullgrad import CompleteFullGrad, FullGrad
from multicam.cam.masking import ISCAM, SSCAM, AblationCAM, ScoreCAM
from multicam.cam.rise import RISE
from multicam.cam.sess import SESS
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
    WeightedCAM,
    XGradCAM,
)
from multicam.cam.wrappers import Augmented, EigenSmoothed, FinerCAM, RefineCAM
from multicam.errors import MulticamError
from multicam.figures.attention import flow_figure, head_sheet, query_figure
from multicam.figures.colours import colorize, normalize, overlay
from multicam.figures.dreams import dream_figure, history_figure
from multicam.figures.features import feature_sheet, kernel_sheet
from multicam.figures.page import Picture
from multicam.figures.panels import compare, panel
from multicam.figures.saliency import saliency_figure
from multicam.figures.shares import contribution_figure
from multicam.figures.tiles import Tile, figure
from multicam.inside.concepts import Concepts, factorize
from multicam.inside.dream import Dream, activation_maximization, deep_dream
from multicam.inside.features import Kernels, feature_maps, kernels
from multicam.maps import Maps
from multicam.metrics.evaluation import Batch, evaluate
from multicam.metrics.explanations import explainer
from multicam.metrics.faithfulness import Curve, Masked, deletion, insertion, road, seen_through
from multicam.metrics.localization import agreement, complexity, energy_inside, names_input, pointing_game, sparseness
from multicam.metrics.measures import Explained, Metric
from multicam.metrics.randomization import Randomization, branch_of, parameter_randomization
from multicam.metrics.ranking import Comparison, Evaluation
from multicam.metrics.robustness import Infidelity, infidelity, sensitivity
from multicam.saliency.attributions import Attributions
from multicam.saliency.averaging import expected_gradients, integrated_gradients, smoothgrad, vargrad
from multicam.saliency.captum_bridge import captum_attribution
from multicam.saliency.gradients import deconvnet, gradient, guided_backprop, guided_gradcam, input_x_gradient
from multicam.saliency.occluding import occlusion
from multicam.shares.interactions import double_occlusion, second_order_gradient
from multicam.shares.regions import RegionContribution, region_contribution, superpixels
from multicam.shares.shapley import Contribution, contribution
from multicam.watch.layers import Layer
from multicam.watch.packed import PackedModel
from multicam.watch.reshape import as_it_is, channels_last, stacked, tokens
from multicam.watch.survey import list_layers
from multicam.watch.trace import Site, Trace

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
