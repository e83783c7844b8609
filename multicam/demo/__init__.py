"""The bundled three-input detector of local edits, its photos and its pictures."""

from multicam.faces import face

__getattr__, __dir__, __all__ = face(__name__, __file__)
