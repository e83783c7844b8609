"""pytorch-grad-cam's names, signatures and conventions, on this engine: change the import and keep the script.

Maps are NumPy arrays `(b h w)` in 0..1: cut at zero, scaled for each image and layer, enlarged, averaged over the layers
and scaled again, as in pytorch-grad-cam 1.5.7. The how-to page "From pytorch-grad-cam" lists what differs.
"""

from multicam.compat.modules import add_modules
from multicam.faces import face

__getattr__, __dir__, __all__ = face(__name__, __file__)
add_modules(__name__, __getattr__, __all__)
