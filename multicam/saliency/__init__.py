"""What every entry of every input counts for: gradients and what is made of them, occlusion."""

from multicam.faces import face

__getattr__, __dir__, __all__ = face(__name__, __file__)
