from .attributions import Attributions as Attributions
from .gradients import (
    gradient as gradient,
    input_x_gradient as input_x_gradient,
    guided_backprop as guided_backprop,
    deconvnet as deconvnet,
    guided_gradcam as guided_gradcam,
)
from .averaging import (
    smoothgrad as smoothgrad,
    vargrad as vargrad,
    integrated_gradients as integrated_gradients,
    expected_gradients as expected_gradients,
)
from .occluding import occlusion as occlusion
from .captum_bridge import captum_attribution as captum_attribution
