"""The blocks: whether one is covered, and running it through our operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import reference
from ..operators._arguments import autocast_dtype
from ..operators.mlp import branch_dtype
from ..parts import find_subclass, has_hooks, is_traced, log_unfused
from ..visible import VisiblePatches, run_operator
from .convolutions import check_convolution
from .inspection import (
    NotCoveredError,
    agrees,
    check_calls,
    check_tensors,
    gelu_form,
    random_input,
    random_twin,
    try_forward,
)
from .layouts import Layout, find_layout, known_class
from .norms import plan_norm, trial_tolerance
from .swap import Fused, attributes_of, original_class, pop_input, settings_of, unexpected

__all__ = ["BlockPlan", "FusedBlock", "plan_block"]


class Part(NamedTuple):
    """A submodule that the fused computation takes for granted: where, of what class, and set how."""

    path: tuple[str, ...]
    cls: type[nn.Module]
    settings: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class BlockPlan:
    """How to run a block. `parts` must stay as they were when it was fused; those of the layout's roles come first."""

    layout: Layout
    parts: tuple[Part, ...]
    has_grn: bool
    approximate: str
    recompute: bool = True
    backend: str | None = None


class FusedBlock(Fused):
    """A ConvNeXt block that runs as one operator.

    Everything is read from the original's own submodules at each call. If one of them has since been replaced, hooked,
    quantised or set differently (an adapter, pruning, dilation), or a hook on all modules is registered, the original
    forward runs instead, which is logged once. Visible patches take no notice of such a hook, as there is no forward
    for them.
    """

    def forward(self, x: Tensor | None = None, visible: VisiblePatches | None = None, **named: Tensor) -> Tensor:
        if x is None:
            x = pop_input(self, named)
        if visible is None and is_traced(x):
            return super().forward(x)
        if named:
            raise unexpected(self, named)
        plan = self._fused_plan
        modules = _find(self, plan.parts)
        reason = _find_change(modules, plan.parts) or (_find_global_hook() if visible is None else None)
        if reason is None:
            tensors = _tensors(self, plan, modules)
            reason = find_subclass(*tensors) or _find_mixture(x, tensors)
        if reason is not None:
            if visible is not None:
                raise RuntimeError(f"{type(self).__name__} cannot run on visible patches: {reason}")
            log_unfused(self, reason)
            return super().forward(x)
        return run_operator(
            x,
            visible,
            *tensors,
            _sample_scale(modules[_DROP_PATH], x, tensors[-1], visible),
            eps=modules[_NORM].eps,
            approximate=plan.approximate,
            recompute=plan.recompute,
            backend=plan.backend,
        )


def find_change(block: nn.Module, plan: BlockPlan) -> str | None:
    """What is not as it was when the block was fused, as a reason to run unfused; None if all is."""
    modules = _find(block, plan.parts)
    return (
        _find_change(modules, plan.parts)
        or _find_global_hook()
        or find_subclass(*_tensors(block, plan, modules), in_call=False)
    )


# Positions in `BlockPlan.parts`, and in what `_find` returns for it.
_CONV, _NORM, _FC1, _ACT, _FC2, _DROP_PATH, _GRN = range(7)


def _roles(layout: Layout, has_grn: bool) -> list[str]:
    roles = [layout.conv, layout.norm, layout.fc1, layout.act, layout.fc2, layout.drop_path]
    return [*roles, layout.grn] if has_grn else roles


def _find(block: nn.Module, parts: tuple[Part, ...]) -> list[nn.Module | None]:
    found = []
    for path, _, _ in parts:
        module = block
        for name in path:
            module = None if module is None else module._modules.get(name)
        found.append(module)
    return found


def _find_change(modules: list[nn.Module | None], parts: tuple[Part, ...]) -> str | None:
    for module, (path, cls, settings) in zip(modules, parts):
        if type(module) is not cls:
            return f"since it was fused, its '{'.'.join(path)}' has become a {type(module).__name__}"
        if has_hooks(module):
            return f"since it was fused, its '{'.'.join(path)}' has got hooks, or a forward assigned to the instance"
        for name, value in settings:
            if getattr(module, name) != value:
                return f"since it was fused, the {name} of its '{'.'.join(path)}' has become {getattr(module, name)!r}"
    return None


def _find_global_hook() -> str | None:
    """Hooks of register_module_forward_hook and the like expect to see the parts' calls: FlopCounterMode's, say."""
    return "a hook on all modules is registered" if _has_any_global_hook() else None


def _find_mixture(x: Tensor, tensors: tuple[Tensor | None, ...]) -> str | None:
    """Eager takes some mixtures of dtypes, a bf16 model whose norms have stayed in fp32 for one; our operator none."""
    if not isinstance(x, Tensor) or autocast_dtype(x) is not None:
        return None
    for tensor in tensors:
        if tensor is not None and tensor.dtype != x.dtype:
            return f"it holds a parameter in {tensor.dtype} where x is in {x.dtype}, and no autocast is active"
    return None


def _tensors(block: nn.Module, plan: BlockPlan, modules: list[nn.Module]) -> tuple[Tensor | None, ...]:
    """The parameters in the operator's order, from the convolution's weight to the layer scale."""
    conv, norm, fc1, fc2 = modules[_CONV], modules[_NORM], modules[_FC1], modules[_FC2]
    layout, grn_weight, grn_bias = plan.layout, None, None
    if plan.has_grn:
        grn_weight = getattr(modules[_GRN], layout.grn_weight)
        grn_bias = getattr(modules[_GRN], layout.grn_bias)
    return (
        conv.weight,
        conv.bias,
        norm.weight,
        norm.bias,
        fc1.weight,
        fc1.bias,
        grn_weight,
        grn_bias,
        fc2.weight,
        fc2.bias,
        getattr(block, layout.layer_scale, None),
    )


def _sample_scale(
    drop_path: nn.Module, x: Tensor, layer_scale: Tensor | None, visible: VisiblePatches | None = None
) -> Tensor | None:
    """What the block's own drop path makes of ones in the branch's dtype, (N,); None where it drops nothing.

    So the probability, the random numbers and the scaling are the original's whatever its library.
    """
    if isinstance(drop_path, nn.Identity) or not drop_path.training or not getattr(drop_path, _probability(drop_path)):
        return None
    dtype = branch_dtype(autocast_dtype(x) or x.dtype, layer_scale)
    samples = len(x if visible is None else visible.index)
    return drop_path(x.new_ones((samples, 1, 1, 1), dtype=dtype)).flatten()


def _probability(drop_path: nn.Module) -> str:
    """The name of the attribute: timm's and transformers' `drop_prob`, torchvision's `p`."""
    return "drop_prob" if hasattr(drop_path, "drop_prob") else "p"


def _settings(module: nn.Module, is_grn: bool) -> tuple[tuple[str, Any], ...]:
    # Each library has a GRN of its own.
    return attributes_of(module) if is_grn else settings_of(module)


def plan_block(block: nn.Module, trials: dict[Any, str]) -> BlockPlan:
    """How to run `block`, a module that has a layout. `trials` remembers the outcomes for blocks of the same make.

    Raises:
        NotCoveredError: our operator cannot stand in for it.
    """
    layout = find_layout(block)
    _check_class(block, layout)
    modules = _check_modules(block, layout)
    check_convolution(modules[layout.conv])
    _check_tensors(block, layout, modules)
    act = modules[layout.act]
    approximate = gelu_form(act) if "gelu" in type(act).__name__.lower() else None
    if approximate is None:
        raise NotCoveredError(f"its activation is {type(act).__name__}, not GELU")
    roles = _roles(layout, layout.grn in modules)
    parts = [
        Part(tuple(path.split(".")), type(modules[path]), _settings(modules[path], path == layout.grn))
        for path in [*roles, *(path for path in modules if path not in roles)]
    ]
    plan = BlockPlan(layout, tuple(parts), layout.grn in modules, approximate)
    make = _make(block, plan)
    if make not in trials:
        trials[make] = _try(block, plan)
    if trials[make]:
        raise NotCoveredError(trials[make])
    return plan


def _check_class(block: nn.Module, layout: Layout) -> None:
    known = known_class(block, layout)
    if known is not None and type(block).forward is not known.forward:
        raise NotCoveredError(f"its class {type(block).__name__} overrides the forward of {known.__name__}")
    if "forward" in vars(block):
        raise NotCoveredError("it has a forward assigned to the instance")


def _check_modules(block: nn.Module, layout: Layout) -> dict[str, nn.Module]:
    """Every submodule has a known place, is of a known type, and does nothing but its work."""
    modules = dict(block.named_modules(remove_duplicate=False))
    del modules[""]
    roles = _roles(layout, layout.grn in modules)
    for path in roles:
        if path not in modules:
            raise NotCoveredError(f"it has no '{path}'")
    _check_type(modules[layout.conv], layout.conv, nn.Conv2d)
    for path in (layout.fc1, layout.fc2):
        _check_type(modules[path], path, nn.Linear, nn.Conv2d)
    places = {*roles, *layout.inert}
    containers = {path.rpartition(".")[0] for path in places if "." in path}
    for path, module in modules.items():
        if path in layout.inert:
            _check_inert(module, path)
        elif path not in places | containers:
            raise NotCoveredError(f"it has a '{path}', which has no place in a ConvNeXt block")
        check_calls(module, path)
    try:
        plan_norm(modules[layout.norm])
    except NotCoveredError as error:
        raise NotCoveredError(f"its '{layout.norm}': {error}") from error
    drop_path = modules[layout.drop_path]
    probability = getattr(drop_path, _probability(drop_path), None)
    if type(drop_path) is not nn.Identity and not isinstance(probability, (int, float)):
        raise NotCoveredError(f"its '{layout.drop_path}' is a {type(drop_path).__name__}, not a known drop path")
    return modules


def _check_inert(module: nn.Module, path: str) -> None:
    if type(module) is nn.Identity or type(module).__name__ == "Permute":
        return
    if type(module) is nn.Dropout:
        if module.p > 0:
            raise NotCoveredError(f"its '{path}' is a dropout with p = {module.p}")
        return
    if path == "shortcut":
        raise NotCoveredError(f"its shortcut is a {type(module).__name__}: it has a stride, dilation or other width")
    raise NotCoveredError(f"its '{path}' is a {type(module).__name__}")


def _check_tensors(block: nn.Module, layout: Layout, modules: dict[str, nn.Module]) -> None:
    """The parameters are the expected ones, in number and size."""
    channels, hidden = modules[layout.conv].in_channels, modules[layout.fc1].weight.shape[0]
    sizes = {
        f"{layout.conv}.weight": channels * modules[layout.conv].kernel_size[0] ** 2,
        f"{layout.conv}.bias": channels,
        f"{layout.norm}.weight": channels,
        f"{layout.norm}.bias": channels,
        f"{layout.fc1}.weight": hidden * channels,  # a 1x1 convolution's too, and only a 1x1's
        f"{layout.fc1}.bias": hidden,
        f"{layout.grn}.{layout.grn_weight}": hidden,
        f"{layout.grn}.{layout.grn_bias}": hidden,
        f"{layout.fc2}.weight": channels * hidden,
        f"{layout.fc2}.bias": channels,
        layout.layer_scale: channels,
    }
    check_tensors(block, set(sizes))
    for name, parameter in block.named_parameters(remove_duplicate=False):
        if parameter.numel() != sizes[name]:
            raise NotCoveredError(f"its '{name}' has shape {tuple(parameter.shape)}, which does not fit the others")


def _check_type(module: nn.Module, path: str, *wanted: type[nn.Module]) -> None:
    # Exactly: a subclass is an adapter, a quantised or a parametrized layer.
    if original_class(module) not in wanted:
        names = " or ".join(f"torch.nn.{cls.__name__}" for cls in wanted)
        raise NotCoveredError(f"its '{path}' is a {type(module).__module__}.{type(module).__name__}, not a {names}")


def _make(block: nn.Module, plan: BlockPlan) -> Any:
    """What decides how a block computes, apart from sizes: blocks of equal make need one trial."""
    modules = _find(block, plan.parts)
    attributes = [
        (name, repr(value))
        for module in (block, modules[_GRN] if plan.has_grn else block)
        for name, value in attributes_of(module)
    ]
    return (
        type(block),
        plan.layout,
        tuple((part.path, part.cls) for part in plan.parts),
        plan.approximate,
        modules[_NORM].eps,
        tuple(tensor is None for tensor in _tensors(block, plan, modules)),
        tuple(attributes),
    )


def _try(block: nn.Module, plan: BlockPlan) -> str:
    """Runs a copy of the block against the reference, in evaluation and with drop path; returns what is wrong."""
    twin = random_twin(block)
    modules = _find(twin, plan.parts)
    tensors, drop_path = _tensors(twin, plan, modules), modules[_DROP_PATH]
    x = random_input(4, modules[_CONV].in_channels, 5, 4)
    tolerance = trial_tolerance(modules[_NORM])

    def computes_block(sample_scale: Tensor | None) -> bool:
        expected = reference.convnext_block(x, *tensors, sample_scale, modules[_NORM].eps, plan.approximate)
        return agrees(try_forward(lambda: twin.forward(x.clone())), expected, tolerance)

    try:
        same = computes_block(None)
        if type(drop_path) is not nn.Identity:
            twin.train()
            setattr(drop_path, _probability(drop_path), 0.5)
            sample_scale = try_forward(lambda: _sample_scale(drop_path, x, tensors[-1]))
            same = same and sample_scale.numel() == x.shape[0] and computes_block(sample_scale)
    except NotCoveredError as error:
        return str(error)
    return "" if same else "its forward computes something else than a ConvNeXt block (tried on a small input)"
