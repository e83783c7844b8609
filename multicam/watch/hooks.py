"""Hooks of a pass: they come before all others, and hear the threads that work for it only."""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.jit._script import RecursiveScriptModule
from torch.nn.modules import module as registry
from torch.utils.hooks import RemovableHandle

from multicam.watch.threads import own, works

Before = Callable[[nn.Module, Any, Any], None]
After = Callable[[nn.Module, Any, Any], Any]


class Heard:
    """A hook that only hears the calls of a pass.

    Args:
        hook: Called as `hook(module, args, output)`; what it returns, unless it is None, goes on instead of the output.
        only: The module whose calls it hears; None: that of its own.
    """

    def __init__(self, hook: After, only: nn.Module | None = None) -> None:
        self._hook, self._only = hook, only

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """What the hook makes of the output of a call that is of the pass."""
        if (self._only is not None and module is not self._only) or not works(args):
            return None
        own(output)
        return self._hook(module, args, output)


def after(module: nn.Module, hook: After) -> RemovableHandle:
    """Tell a hook what each call of a module returned, before anybody else is told.

    A hook of the model's own, or of its user's, may keep an output that the model reads later; it must keep what goes on. Hooks for all modules,
    which torch calls first, are preceded by one of the same kind.

    Args:
        module: The module. Nothing is heard of one that TorchScript runs, as it takes no hooks.
        hook: As for `Heard`.
    """
    if not takes_hooks(module):
        return RemovableHandle(OrderedDict())
    if not registry._global_forward_hooks:
        return module.register_forward_hook(Heard(hook), prepend=True)
    handle = registry.register_module_forward_hook(Heard(hook, module))
    registry._global_forward_hooks.move_to_end(handle.id, last=False)  # type: ignore[attr-defined]
    return handle


def takes_hooks(module: nn.Module) -> bool:
    """Whether a module tells hooks of its calls: all do but those that TorchScript was given by their code."""
    return not isinstance(module, RecursiveScriptModule)


class HeardBefore:
    """The same before a call.

    Args:
        hook: Called as `hook(module, args, kwargs)`.
    """

    def __init__(self, hook: Before) -> None:
        self._hook = hook

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Tell the hook of a call that is of the pass."""
        if works((args, kwargs)):
            self._hook(module, args, kwargs)


def before(module: nn.Module, hook: Before) -> RemovableHandle:
    """Tell a hook what each call of a module is given, as `hook(module, args, kwargs)`, before its other hooks are told."""
    if not takes_hooks(module):
        return RemovableHandle(OrderedDict())
    return module.register_forward_pre_hook(HeardBefore(hook), prepend=True, with_kwargs=True)


class Kernels:
    """A hook by which a pass takes other kernels of PyTorch's; it changes nothing, and hears whoever calls.

    Args:
        hook: Called as PyTorch calls a hook.
    """

    def __init__(self, hook: Callable[..., Any]) -> None:
        self._hook = hook

    def __call__(self, *given: Any) -> Any:
        """What the hook returns."""
        return self._hook(*given)


def others(module: nn.Module) -> list[Any]:
    """The hooks on a module that are not of a pass, those for all modules among them."""
    return [hook for _, hook in _others(module)]


def numbers_of_others(module: nn.Module) -> list[int]:
    """The numbers of these hooks, which no hook that comes later has."""
    return [number for number, _ in _others(module)]


def _others(module: nn.Module) -> list[tuple[int, Any]]:
    everybody = (
        module._forward_pre_hooks,
        module._forward_hooks,
        registry._global_forward_pre_hooks,
        registry._global_forward_hooks,
    )
    return [
        each for hooks in everybody for each in hooks.items() if not isinstance(each[1], Heard | HeardBefore | Kernels)
    ]


def has_others(module: nn.Module) -> bool:
    """Whether a module tells somebody else what it is given or returns."""
    return bool(others(module))


def take_off(modules: Iterable[nn.Module], mine: Callable[[Any], bool]) -> None:
    """Take the hooks that are mine off these modules; it may be called again where it was interrupted, also while they were put on."""
    for module in modules:
        for key in [key for key, hook in module._forward_pre_hooks.items() if mine(hook)]:
            module._forward_pre_hooks_with_kwargs.pop(key, None)
            module._forward_pre_hooks.pop(key, None)
        for key in [key for key, hook in module._forward_hooks.items() if mine(hook)]:
            module._forward_hooks_with_kwargs.pop(key, None)
            module._forward_hooks_always_called.pop(key, None)
            module._forward_hooks.pop(key, None)
