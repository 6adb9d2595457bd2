"""Swapping a module's behaviour in place: the object stays, its class becomes a subclass that runs our operators.

As torch.nn.utils.parametrize and FSDP do it. Parameters, buffers, submodules, hooks, the training flag and every
reference to the module stay what they are; ``isinstance`` still holds; going back is assigning the old class again.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import nn

__all__ = [
    "Fused",
    "attributes_of",
    "extended",
    "original_class",
    "pop_input",
    "restore",
    "settings_of",
    "swap",
    "unexpected",
]


class Fused:
    """First base of every swapped class. `_fused_plan` on the instance says how to run it.

    `_input_name` is what the original's forward calls its input. Ours calls it x, and takes it by either name.
    """

    _original_class: type[nn.Module]
    _input_name: str

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time and has no importable name: deepcopy and pickle make it anew.
        state = super().__reduce_ex__(protocol)[2]
        return _new_instance, (_behaviour(type(self)), self._original_class), state

    def __prepare_scriptable__(self) -> nn.Module:
        # Called by torch.jit.script. A module returned instead would stay in its parent afterwards, unnoticed.
        raise RuntimeError(
            f"torch.jit.script: a {type(self).__name__} cannot be scripted; unfuse(model) first, or script "
            "unfuse(copy.deepcopy(model))"
        )


@functools.cache
def _fused_class(behaviour: type[Fused], original: type[nn.Module]) -> type:
    _, *names = inspect.signature(original.forward).parameters
    namespace = {
        "__module__": behaviour.__module__,
        "__doc__": behaviour.__doc__,
        "_original_class": original,
        "_input_name": names[0] if names else "x",
    }
    return type(f"Fused{original.__name__}", (behaviour, original), namespace)


def _behaviour(cls: type) -> type[Fused]:
    return cls.__bases__[0]


def _new_instance(behaviour: type[Fused], original: type[nn.Module]) -> nn.Module:
    cls = _fused_class(behaviour, original)
    return cls.__new__(cls)


def swap(module: nn.Module, behaviour: type[Fused], plan: Any) -> None:
    """Gives `module` the behaviour; a module that has it already gets the new plan."""
    if not isinstance(module, Fused):
        module.__class__ = _fused_class(behaviour, type(module))
    module._fused_plan = plan


def restore(module: nn.Module) -> None:
    """Undoes `swap`, for a module that is not `extended`."""
    behaviour = _behaviour(type(module))
    # Who has wrapped forward and put it back may have left the fused one on the instance, as accelerate does.
    if getattr(vars(module).get("forward"), "__func__", None) is behaviour.forward:
        del module.forward
    module.__class__ = module._original_class
    del module._fused_plan


def pop_input(module: Fused, named: dict[str, Any]) -> Any:
    """The input of a call that names it as the original does; `named` is left with what no forward takes."""
    if module._input_name not in named:
        raise TypeError(f"{type(module).__name__}.forward() is missing its argument '{module._input_name}'")
    return named.pop(module._input_name)


def unexpected(module: Fused, named: dict[str, Any]) -> TypeError:
    return TypeError(f"{type(module).__name__}.forward() got an unexpected argument '{next(iter(named))}'")


def extended(module: nn.Module) -> bool:
    """Whether a swapped module's class has since been replaced by a subclass, as parametrizations and FSDP do it."""
    return "_original_class" not in vars(type(module))


def original_class(module: nn.Module) -> type[nn.Module]:
    return module._original_class if isinstance(module, Fused) else type(module)


def attributes_of(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """Every plain attribute: what a layer's result may depend on where its class is not known."""
    return tuple(
        (name, value)
        for name, value in vars(module).items()
        if name != "training" and name[0] != "_" and isinstance(value, (bool, int, float, str, tuple, type(None)))
    )


def settings_of(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """What a layer of PyTorch's results depend on, besides its class and parameters."""
    names = {
        nn.Conv2d: ("stride", "padding", "dilation", "groups", "padding_mode"),
        nn.Dropout: ("p",),
        nn.GELU: ("approximate",),
    }.get(original_class(module), ())
    return tuple((name, getattr(module, name)) for name in names)
