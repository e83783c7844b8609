"""How much each input, region or pair of them mattered."""

from multicam.faces import face

__getattr__, __dir__, __all__ = face(__name__, __file__)
