"""What a model's inside looks like: feature maps, kernels, dreams, concepts."""

from multicam.faces import face

__getattr__, __dir__, __all__ = face(__name__, __file__)
