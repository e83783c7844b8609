"""Class activation maps: where in its inputs a model found the evidence for a score.

Each method is a class; whoever lists them reads this face (`multicam.cam.catalogue`).
"""

from multicam.faces import face

__getattr__, __dir__, __all__ = face(__name__, __file__)
