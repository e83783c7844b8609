"""Figures that can be printed. One file knows matplotlib: `page`."""

from multicam.faces import face

__getattr__, __dir__, __all__ = face(__name__, __file__)
