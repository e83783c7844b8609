from .base import CAM as CAM, InputCAM as InputCAM
from .weighted import (
    WeightedCAM as WeightedCAM,
    GradCAM as GradCAM,
    HiResCAM as HiResCAM,
    GradCAMElementWise as GradCAMElementWise,
    GradCAMPlusPlus as GradCAMPlusPlus,
    XGradCAM as XGradCAM,
    LayerCAM as LayerCAM,
)
from .components import (
    EigenCAM as EigenCAM,
    EigenGradCAM as EigenGradCAM,
    SegEigenCAM as SegEigenCAM,
    KPCACAM as KPCACAM,
)
from .weighted import (
    FEM as FEM,
    RandomCAM as RandomCAM,
    OriginalCAM as OriginalCAM,
    ShapleyCAM as ShapleyCAM,
    SmoothGradCAMPlusPlus as SmoothGradCAMPlusPlus,
)
from .masking import AblationCAM as AblationCAM, ScoreCAM as ScoreCAM, ISCAM as ISCAM, SSCAM as SSCAM
from .rise import RISE as RISE
from .fullgrad import FullGrad as FullGrad, CompleteFullGrad as CompleteFullGrad
from .wrappers import (
    FinerCAM as FinerCAM,
    RefineCAM as RefineCAM,
    Augmented as Augmented,
    EigenSmoothed as EigenSmoothed,
)
from .sess import SESS as SESS
from .together import explain_methods as explain_methods
