from .errors import MulticamError as MulticamError
from .maps import Maps as Maps
from .call import targets as targets, Inputs as Inputs, Spec as Spec, MODALITIES as MODALITIES
from .watch import (
    Layer as Layer,
    PackedModel as PackedModel,
    Site as Site,
    Trace as Trace,
    list_layers as list_layers,
    as_it_is as as_it_is,
    channels_last as channels_last,
    stacked as stacked,
)
from .watch.reshape import tokens as tokens
from .attending import (
    attention as attention,
    record_attention as record_attention,
    relevance as relevance,
    rollout as rollout,
    legrad as legrad,
)
from .cam import *
from .saliency import (
    gradient as gradient,
    input_x_gradient as input_x_gradient,
    guided_backprop as guided_backprop,
    deconvnet as deconvnet,
    guided_gradcam as guided_gradcam,
    smoothgrad as smoothgrad,
    vargrad as vargrad,
    integrated_gradients as integrated_gradients,
    expected_gradients as expected_gradients,
    occlusion as occlusion,
    captum_attribution as captum_attribution,
)
from .inside import (
    feature_maps as feature_maps,
    kernels as kernels,
    activation_maximization as activation_maximization,
    deep_dream as deep_dream,
    factorize as factorize,
)
from .shares import (
    contribution as contribution,
    region_contribution as region_contribution,
    double_occlusion as double_occlusion,
    second_order_gradient as second_order_gradient,
)
from .metrics import evaluate as evaluate, explainer as explainer
from .figures import panel as panel, compare as compare
from . import (
    attending as attending,
    call as call,
    cam as cam,
    figures as figures,
    inside as inside,
    metrics as metrics,
    saliency as saliency,
    shares as shares,
    watch as watch,
)

__version__: str
