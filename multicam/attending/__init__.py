"""What attends to what: every attention of a pass, and what all of them together pass on."""

from multicam.faces import face

__getattr__, __dir__, __all__ = face(__name__, __file__)
