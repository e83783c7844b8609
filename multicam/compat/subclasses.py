"""What a subclass of somebody else's may replace, and what would change nothing: never ignored without a word."""

from collections.abc import Mapping
from inspect import signature
from typing import Any, ClassVar

from multicam.errors import MulticamError


class Checked:
    """A class whose subclasses may replace what is called here, and nothing else that pytorch-grad-cam's class has.

    Attributes:
        _unused: The methods that would never be called, and what to do instead.
    """

    _unused: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name, instead in cls._unused.items():
            if foreign(cls, name):
                raise MulticamError(f"{cls.__name__} defines {name}, which would never be called here: {instead}")


def foreign(cls: type, name: str) -> bool:
    """Whether somebody else's class defines the method that a class has by a name."""
    owner = next((base for base in cls.__mro__ if name in vars(base)), object)
    return owner is not object and not owner.__module__.startswith("multicam.")


def asked(cam: Any, contract: type, name: str, *given: Any) -> Any:
    """What a step returns, which a subclass may have replaced.

    Args:
        cam: Whose step it is.
        contract: The class whose step of this name takes what is given.
        name: Its name.
        *given: What it is given.

    Raises:
        MulticamError: If it takes something else.
    """
    step = getattr(cam, name)
    try:
        signature(step).bind(*given)
    except TypeError as error:
        takes = ", ".join(signature(getattr(contract, name)).parameters).removeprefix("self, ")
        raise MulticamError(
            f"{type(cam).__name__}.{name} is called as {name}({takes}), which does not fit: {error}"
        ) from None
    return step(*given)


def refuse_unasked(kind: type, asks_weights: bool) -> None:
    """Refuse a class of layer methods with a step that nothing would ask.

    Args:
        kind: The class.
        asks_weights: Whether the `get_cam_image` that it has of this room asks for weights.

    Raises:
        MulticamError: If it has one.
    """
    own = {name for name in ("__call__", "forward", "compute_cam_per_layer", "get_cam_image") if foreign(kind, name)}
    if foreign(kind, "get_cam_weights") and not own and not asks_weights:
        base = next(base.__name__ for base in kind.__mro__ if base.__module__.startswith("multicam."))
        raise MulticamError(
            f"{kind.__name__} defines get_cam_weights, for which {base}'s get_cam_image does not ask: derive it from BaseCAM, "
            "or define get_cam_image"
        )
    if foreign(kind, "get_loss") and not own & {"__call__", "forward"}:
        raise MulticamError(
            f"{kind.__name__} defines get_loss, which nothing calls: say the score by targets=[…], one for each image"
        )
