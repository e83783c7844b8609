"""One pass of a model observed, and run again in part; afterwards everything is as it was.

Hooks and dispatch modes live here and nowhere else.
"""

from multicam.faces import face

__getattr__, __dir__, __all__ = face(__name__, __file__)
