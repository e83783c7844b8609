from .scores import (
    Target as Target,
    Binary as Binary,
    ClassScore as ClassScore,
    Contrast as Contrast,
    Probability as Probability,
    QueryScore as QueryScore,
    Regression as Regression,
    SegmentationScore as SegmentationScore,
    Similarity as Similarity,
    TopClass as TopClass,
)
from .detections import BoxScore as BoxScore, TopBox as TopBox
