"""Every method, for whoever needs to choose one by name or to try them all: what the room's face names."""

from inspect import isabstract

from multicam import cam
from multicam.cam.base import CAM, InputCAM
from multicam.cam.wrappers import Wrapper

_NAMED = [kind for name in cam.__dir__() if isinstance(kind := getattr(cam, name), type) and not isabstract(kind)]
# On a layer.
METHODS: tuple[type[CAM], ...] = tuple(
    kind for kind in _NAMED if issubclass(kind, CAM) and not issubclass(kind, Wrapper)
)
# On any layer, all from the one forward and backward pass of a trace.
ONE_PASS: tuple[type[CAM], ...] = tuple(kind for kind in METHODS if kind.one_pass)
# Without a layer.
INPUT_METHODS: tuple[type[InputCAM], ...] = tuple(kind for kind in _NAMED if issubclass(kind, InputCAM))
# Around another method.
WRAPPERS: tuple[type[Wrapper], ...] = tuple(kind for kind in _NAMED if issubclass(kind, Wrapper))
