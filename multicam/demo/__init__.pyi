from .detector import (
    LAYERS as LAYERS,
    EditDetector as EditDetector,
    inputs_of as inputs_of,
    inputs_of_crops as inputs_of_crops,
    load as load,
)
from .edits import (
    CLASSES as CLASSES,
    EDITS as EDITS,
    Sample as Sample,
    edited as edited,
    regions as regions,
    sample as sample,
)
from .photos import PHOTOS as PHOTOS, SIDE as SIDE, VIEWS as VIEWS, crop_of as crop_of, photo as photo
