from .inputs import Inputs as Inputs
from .packing import Slot as Slot, Spec as Spec
from .modalities import MODALITIES as MODALITIES, Modality as Modality
