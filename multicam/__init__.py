"""Explain a PyTorch model that takes several inputs, without editing it."""

from multicam.faces import face

__version__ = "0.2.0.dev0"
# What is not shown on the front page is in the rooms.
__getattr__, __dir__, __all__ = face(
    __name__,
    __file__,
    elsewhere=("targets", "metrics", "figures", "call", "watch", "attending", "saliency", "inside", "shares"),
)
