"""Reads a network as a chain of steps that tiles can take, and works out how far each of them sees."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional

from ._conv import SparseConv2d, same_margin
from ._grid import NO_MARGIN, Margin


class Value(NamedTuple):
    """The result of a step, where an argument of another one stands."""

    step: int


@dataclass(frozen=True)
class Step:
    """One operation on tiles. The first step of a chain is its input."""

    kind: str  # "input", "conv", "norm", "drop", "module" or "function"
    target: str  # path of a module, or a name in FUNCTIONS
    arguments: tuple[Any, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    #: Pixels around a tile that its result has, and those that it reads beyond them.
    margin: Margin = NO_MARGIN
    pad: Margin = NO_MARGIN
    #: Whether its result is 0 outside of the image.
    zero_outside: bool = False
    #: Earlier results that nobody reads after it.
    done: tuple[int, ...] = ()

    @property
    def reach(self) -> Margin:
        """Pixels around a tile that it takes of what it reads."""
        return self.margin.plus(self.pad)

    @property
    def reads(self) -> list[int]:
        """The steps whose results it takes."""
        return [value.step for value in values_in((self.arguments, dict(self.options)))]


def values_in(argument: Any) -> list[Value]:
    """All results of steps among arguments."""
    found: list[Value] = []
    replace_values(argument, lambda value: found.append(value))
    return found


def replace_values(argument: Any, function: Callable[[Value], Any]) -> Any:
    """Arguments with each :class:`Value` replaced by what `function` makes of it."""
    if isinstance(argument, Value):
        return function(argument)
    if isinstance(argument, (tuple, list)):
        return type(argument)(replace_values(item, function) for item in argument)
    if isinstance(argument, dict):
        return {name: replace_values(item, function) for name, item in argument.items()}
    return argument


#: Layers that work pixel by pixel, and whether they make 0 of 0.
_POINTWISE: dict[type, bool] = {
    nn.Identity: True,
    nn.ReLU: True,
    nn.ReLU6: True,
    nn.LeakyReLU: True,
    nn.PReLU: True,
    nn.ELU: True,
    nn.CELU: True,
    nn.SELU: True,
    nn.GELU: True,
    nn.SiLU: True,
    nn.Mish: True,
    nn.Hardswish: True,
    nn.Tanh: True,
    nn.Softsign: True,
    nn.Sigmoid: False,
    nn.Hardsigmoid: False,
    nn.Softplus: False,
}

#: What runs a convolution of which only the parameters matter.
_CONVOLUTIONS = (nn.Conv2d.forward, SparseConv2d.forward)

#: Layers that do nothing in eval mode.
_DROPS = (nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class _Function(NamedTuple):
    """A function of tiles."""

    call: Callable[..., Any]
    #: Whether it makes 0 of values that are all 0, and no numbers besides.
    keeps_zero: bool
    in_place: bool = False


def _add(input: Any, other: Any, *, alpha: float = 1) -> Any:
    return input + (other if alpha == 1 else alpha * other)


def _sub(input: Any, other: Any, *, alpha: float = 1) -> Any:
    return input - (other if alpha == 1 else alpha * other)


def _mul(input: Any, other: Any) -> Any:
    return input * other


FUNCTIONS: dict[str, _Function] = {
    "relu": _Function(functional.relu, True),
    "relu_": _Function(functional.relu, True, in_place=True),
    "relu6": _Function(functional.relu6, True),
    "leaky_relu": _Function(functional.leaky_relu, True),
    "elu": _Function(functional.elu, True),
    "gelu": _Function(functional.gelu, True),
    "silu": _Function(functional.silu, True),
    "mish": _Function(functional.mish, True),
    "hardswish": _Function(functional.hardswish, True),
    "tanh": _Function(torch.tanh, True),
    "sigmoid": _Function(torch.sigmoid, False),
    "neg": _Function(operator.neg, True),
    "add": _Function(_add, True),
    "add_": _Function(_add, True, in_place=True),
    "sub": _Function(_sub, True),
    "sub_": _Function(_sub, True, in_place=True),
    "mul": _Function(_mul, True),
    "mul_": _Function(_mul, True, in_place=True),
    "cat": _Function(torch.cat, True),
}

#: What a traced network may call, by the name in FUNCTIONS.
_NAMES: dict[Any, str] = {
    torch.relu: "relu",
    torch.relu_: "relu_",
    functional.relu: "relu",
    functional.relu_: "relu_",
    functional.relu6: "relu6",
    functional.leaky_relu: "leaky_relu",
    functional.elu: "elu",
    functional.gelu: "gelu",
    functional.silu: "silu",
    functional.mish: "mish",
    functional.hardswish: "hardswish",
    functional.tanh: "tanh",
    functional.sigmoid: "sigmoid",
    torch.tanh: "tanh",
    torch.sigmoid: "sigmoid",
    torch.neg: "neg",
    operator.neg: "neg",
    torch.add: "add",
    operator.add: "add",
    operator.iadd: "add_",
    torch.sub: "sub",
    operator.sub: "sub",
    operator.isub: "sub_",
    torch.mul: "mul",
    operator.mul: "mul",
    operator.imul: "mul_",
    torch.cat: "cat",
    torch.concat: "cat",
}

_METHODS = ("relu", "relu_", "tanh", "sigmoid", "neg", "add", "add_", "sub", "sub_", "mul", "mul_")


def read_chain(module: nn.Module) -> tuple[Step, ...]:
    """The steps of a network from its input to its output, with the margins that they need.

    Raises ValueError, with the name of the layer, where something cannot be done on tiles.
    """
    steps, output = _steps_of(module)
    steps = _with_margins(steps[: output + 1])
    return tuple(_with_zeros(_with_ends(steps)))


def _steps_of(module: nn.Module) -> tuple[list[Step], int]:
    """All steps, and the number of the one that is the result."""
    name = type(module).__name__
    try:
        graph = fx.Tracer().trace(module)
    except Exception as error:  # whatever the network raises when it meets a stand-in for a tensor
        wanted = "a network that torch.fx can trace"
        raise ValueError(f"{name}: expected {wanted}, got {type(error).__name__}: {error}") from error
    steps: list[Step] = []
    numbers: dict[Any, Value] = {}
    for node in graph.nodes:
        if node.op == "output":
            if not isinstance(node.args[0], fx.Node):
                raise ValueError(f"{name}: expected one tensor as the result, got {node.args[0]}")
            return steps, numbers[node.args[0]].step
        if node.op == "placeholder" and steps:
            if node.users or not node.args:  # another input; unused ones with a default do no harm
                raise ValueError(f"{node.name}: expected a network of one input, got another one")
            continue
        arguments = fx.node.map_arg((node.args, node.kwargs), lambda n: numbers[n])
        numbers[node] = Value(len(steps))
        steps.append(_step_of(node, module, *arguments))
    raise ValueError(f"{name}: expected a network with a result, got none")


def _step_of(node: Any, module: nn.Module, arguments: Any, options: Any) -> Step:
    if node.op == "placeholder":
        return Step("input", node.name)
    # Layers that hand on their input as it is.
    aliases = frozenset(path for path, layer in module.named_modules() if isinstance(layer, (nn.Identity, *_DROPS)))
    plain = _plain(arguments), tuple(_plain(dict(options)).items()), aliases
    if node.op == "call_module":
        return _module_step(node, module.get_submodule(node.target), *plain)
    if node.op == "call_function" and node.target in _NAMES:
        return _function_step(node, _NAMES[node.target], *plain)
    if node.op == "call_method" and node.target in _METHODS:
        return _function_step(node, node.target, *plain)
    what = getattr(node.target, "__name__", node.target)
    raise ValueError(f"{node.name}: expected a layer or function that works on each pixel alone, got {what}")


def _plain(argument: Any) -> Any:
    """Arguments without the containers of torch.fx, which do not compare or pickle as others do."""
    if isinstance(argument, Value):
        return argument
    if isinstance(argument, (tuple, list)):
        return tuple(_plain(item) for item in argument)
    if isinstance(argument, dict):
        return {name: _plain(item) for name, item in argument.items()}
    return argument


def _module_step(node: Any, layer: nn.Module, arguments: Any, options: Any, aliases: frozenset[str]) -> Step:
    path = node.target
    if not isinstance(arguments[0] if len(arguments) == 1 else None, Value) or options:
        raise ValueError(f"{path}: expected one tensor as its argument, got {arguments}, {dict(options)}")
    if isinstance(layer, nn.Conv2d) and type(layer).forward in _CONVOLUTIONS:
        return Step("conv", path, arguments, options, pad=same_margin(layer, path))
    if type(layer) is nn.BatchNorm2d:
        if not layer.track_running_stats:
            raise ValueError(f"{path}: expected running statistics, got track_running_stats=False")
        return Step("norm", path, arguments, options)
    if isinstance(layer, _DROPS):
        return Step("drop", path, arguments, options)
    if type(layer) in _POINTWISE:
        if getattr(layer, "inplace", False):
            _check_in_place(node, aliases)
        return Step("module", path, arguments, options, zero_outside=_POINTWISE[type(layer)])
    raise ValueError(
        f"{path}: expected a convolution of stride 1 that keeps the size of the image, batch norm, or a layer that "
        f"works on each pixel alone, got {layer}"
    )


def _function_step(node: Any, name: str, arguments: Any, options: Any, aliases: frozenset[str]) -> Step:
    function = FUNCTIONS[name]
    if name == "cat":
        axis = options[0][1] if options and options[0][0] == "dim" else arguments[1] if len(arguments) > 1 else 0
        if axis not in (1, -3):
            raise ValueError(f"{node.name}: expected to join channels, dim=1, got dim={axis}")
    named = dict(options)
    if named.pop("inplace", False) or function.in_place:
        _check_in_place(node, aliases)
    options = tuple(named.items())
    # A number that is added, to a pixel outside of the image as well, is no zero.
    added = (*arguments, named.get("other")) if name[:3] in ("add", "sub") else ()
    numbers = [value for value in added if isinstance(value, (int, float))]
    for value in (*arguments, *named.values()):
        if not isinstance(value, (Value, int, float, str, bool, tuple, list, type(None))):
            raise ValueError(f"{node.name}: expected numbers and results of layers, got {value!r}")
    return Step("function", name, arguments, options, zero_outside=function.keeps_zero and not any(numbers))


def _check_in_place(node: Any, aliases: frozenset[str]) -> None:
    """Raise if what is changed in place is used again: the change would show there."""
    changed = node.args[0] if node.args else None
    while isinstance(changed, fx.Node):
        others = [user.name for user in changed.users if user is not node]
        if len(changed.users) > 1:
            raise ValueError(
                f"{node.name}: expected not to work in place on a tensor that is used again, by {', '.join(others)}"
            )
        # A layer that does nothing hands on the very tensor.
        changed = changed.args[0] if changed.op == "call_module" and changed.target in aliases else None


def _with_margins(steps: list[Step]) -> list[Step]:
    """The steps that lead to the result, which is the last, with as many pixels around their tiles as others need."""
    needed: dict[int, Margin] = {len(steps) - 1: NO_MARGIN}
    for number in reversed(range(len(steps))):
        if number in needed:
            wanted = needed[number].plus(steps[number].pad)
            for source in steps[number].reads:
                needed[source] = wanted.union(needed.get(source, NO_MARGIN))
    if 0 not in needed:
        raise ValueError(f"{steps[0].target}: expected a result that depends on the input, got one that does not")
    numbers = {old: new for new, old in enumerate(sorted(needed))}

    def renumber(argument: Any) -> Any:
        return replace_values(argument, lambda value: Value(numbers[value.step]))

    return [
        replace(step, arguments=renumber(step.arguments), options=renumber(step.options), margin=needed[old])
        for old, step in enumerate(steps)
        if old in needed
    ]


def _with_ends(steps: list[Step]) -> list[Step]:
    """Steps that say which results nobody reads after them."""
    last = {source: number for number, step in enumerate(steps) for source in step.reads}
    ends: dict[int, list[int]] = {}
    for source, number in last.items():
        ends.setdefault(number, []).append(source)
    return [replace(step, done=tuple(ends.get(number, ()))) for number, step in enumerate(steps)]


def _with_zeros(steps: list[Step]) -> list[Step]:
    """Steps that say whether their results are 0 outside of the image: gathered tiles are."""
    found: list[Step] = []
    for step in steps:
        keeps = step.kind == "input" or step.kind == "drop" or step.zero_outside
        found.append(replace(step, zero_outside=keeps and all(found[source].zero_outside for source in step.reads)))
    return found
