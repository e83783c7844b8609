"""The checks of types and shapes at run time, at a price that 5,000 tests can pay.

jaxtyping wraps every function so that the letters of its shapes agree, which costs more than most of the functions.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import is_dataclass
from inspect import isclass
from types import CodeType
from typing import Any

import jaxtyping
from beartype import beartype

with_shapes = jaxtyping.jaxtyped
made: Counter[CodeType] = Counter()


def jaxtyped(*, typechecker: Any) -> Callable[[Any], Any]:
    """What the import hook decorates with: only functions that name shapes need letters to agree."""

    def check(decorated: Any) -> Any:
        if is_dataclass(decorated):
            decorated.__init__ = check(decorated.__init__)
        if isclass(decorated):
            return decorated
        if any(isinstance(hint, str) or "jaxtyping" in repr(hint) for hint in decorated.__annotations__.values()):
            return with_shapes(decorated, typechecker=typechecker)
        # A function inside another is made anew by every call, and to compile its checks costs more than the call.
        made[decorated.__code__] += 1
        return beartype(decorated) if made[decorated.__code__] <= 10 else decorated

    return check
