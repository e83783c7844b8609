"""The attributions that are called alike, for whoever needs to choose one by name or to try them all."""

from collections.abc import Callable

from multicam.saliency.attributions import Attributions
from multicam.saliency.averaging import integrated_gradients, smoothgrad, vargrad
from multicam.saliency.gradients import deconvnet, gradient, guided_backprop, guided_gradcam, input_x_gradient
from multicam.saliency.occluding import occlusion

# Entry by entry, all called alike but guided Grad-CAM, which takes layers. Expected gradients need references.
ATTRIBUTIONS: tuple[Callable[..., Attributions], ...] = (
    gradient, input_x_gradient, guided_backprop, deconvnet, guided_gradcam, smoothgrad, vargrad, integrated_gradients,
    occlusion,
)  # fmt: skip
