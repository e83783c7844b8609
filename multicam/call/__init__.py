"""What goes into a model, and what is asked of what comes out; no model runs here."""

from multicam.faces import face

__getattr__, __dir__, __all__ = face(__name__, __file__)
