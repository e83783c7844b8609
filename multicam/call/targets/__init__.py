"""What to explain: from a model's output to one score for each sample."""

from multicam.faces import face

__getattr__, __dir__, __all__ = face(__name__, __file__)
