"""The points at which a gradient can stop, as modules: the same module, its class swapped for a subclass.

A point reads plain attributes, which per-block compilation guards on where it ignores hooks; names of parameters,
`isinstance` and checkpoints are as before (FSDP2 swaps classes in the same way). A stop computes nothing, so forward
values keep their bits. Read `RoutePoint.forward` first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from inspect import signature
from typing import Any, Literal, cast

import torch
from torch import nn

from frostline.errors import RouteError

Mode = Literal["keep", "stop", "remove"]
"""What a skip does: as in the model; carries values and no gradient; carries nothing."""


class RoutePoint(nn.Module):
    """What the class of a point inherits from first. All attributes are plain: compilation guards on them."""

    stop_input: bool = False
    """The stream that comes in carries no gradient."""
    own_input: bool = False
    """The stream that comes in is copied, so that a reader inside may cut it without touching the one outside."""
    skip: Mode = "keep"
    """What happens to the stream that this module reads, for whoever uses the same tensor after it."""
    is_last_reader: bool = True
    """Whether the skip may be cut here: no other branch reads the stream afterwards."""
    stop_output: bool = False
    """The (first) output carries no gradient."""
    graphless: bool = False
    """With `stop_output`: nothing in the module learns, so no graph is made at all."""
    residual_argument: str | None = None
    """The argument that the module adds to its output: a stop lets its gradient through."""
    watched: bool = False
    """`read` and `gave` hold what the last call read and gave; whoever sets this takes them away afterwards."""
    read: torch.Tensor | None = None
    gave: torch.Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Outside of `forward`: outside of checkpointing (no second time in the recomputation) and of compilation."""
        if not self.watched:
            return super().__call__(*args, **kwargs)
        held = self.stop_input, self.own_input, self.skip
        self.own_input = False
        entered = self._enter(_stream(args, kwargs))
        self.read = entered.view_as(entered)  # a node of its own: its gradient is what comes back through here
        inside = self.read.clone() if held[1] else self.read  # a reader inside may cut its own copy alone
        args, kwargs = _with_stream(args, kwargs, inside)
        self.stop_input, self.skip = False, "keep"  # done above
        try:
            out = super().__call__(*args, **kwargs)
        finally:
            self.stop_input, self.own_input, self.skip = held
        self.gave = out[0] if isinstance(out, (tuple, list)) else out
        return out

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward between what the attributes say."""
        if self.stop_input or self.own_input or self.skip != "keep":
            args, kwargs = _with_stream(args, kwargs, self._enter(_stream(args, kwargs)))
        if not self.stop_output:
            return super().forward(*args, **kwargs)
        residual = None
        if self.residual_argument is not None:
            residual, args, kwargs = _detached(args, kwargs, self.residual_argument, _argument_names(type(self)))
        if self.graphless:
            with torch.no_grad():
                out = super().forward(*args, **kwargs)
        else:
            out = super().forward(*args, **kwargs)
        several = isinstance(out, (tuple, list))
        first = (out[0] if several else out).detach()
        if residual is not None:
            first = _Carry.apply(first, residual)  # type: ignore[no-untyped-call]
        return type(out)((first, *out[1:])) if several else first

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled as the class it was made from: the swapped one has no name of its own to be found by."""
        return _remade, (type(self).__mro__[2],), self.__getstate__()  # type: ignore[no-untyped-call]

    def _enter(self, stream: torch.Tensor) -> torch.Tensor:
        if self.stop_input:
            stream = stream.detach()
        if self.own_input:
            stream = stream.clone()
        if self.skip == "stop":
            read = stream.view_as(stream)
            if self.is_last_reader:
                stream.detach_()  # the skip adds this very tensor: what follows sees it without a history
            return read
        if self.skip == "remove":
            read = stream.clone()
            if self.is_last_reader:
                stream.zero_()
            return read
        return stream


SETTINGS = ("stop_input", "own_input", "skip", "is_last_reader", "stop_output", "graphless")
"""What a route sets of a point."""


class _Carry(torch.autograd.Function):
    """The value of the first argument with the gradient of the second."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        ctx.dtype = source.dtype
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return None, gradient.to(ctx.dtype)


@contextmanager
def watched(points: Iterable[RoutePoint]) -> Iterator[None]:
    """Inside, points keep what they read and gave in their last call; those watched already stay so afterwards."""
    points = [p for p in points if not p.watched]
    for point in points:
        point.watched = True
    try:
        yield
    finally:
        for point in points:
            point.watched, point.read, point.gave = False, None, None


def make_point(module: nn.Module) -> RoutePoint:
    """Make a module a point, once and for good; nothing changes until an attribute is set. Raises `RouteError`."""
    if not isinstance(module, RoutePoint):
        check_free(module)
        module.__class__ = _point_class(type(module))  # type: ignore[arg-type]
    return cast(RoutePoint, module)


def check_free(module: nn.Module) -> None:
    """Raise `RouteError` when something else has put itself in the place of a module's `forward`."""
    if "forward" in vars(module) and not isinstance(module, RoutePoint):
        raise RouteError(f"{type(module).__name__} has a forward of its own already; routes must be placed first")


@cache  # one subclass per class, so that identical layers share compiled code
def _point_class(cls: type[nn.Module]) -> type[nn.Module]:
    names = tuple(signature(cls.forward).parameters)[1:]
    return type(f"Routed{cls.__name__}", (RoutePoint, cls), {"__module__": cls.__module__, "argument_names": names})


def _remade(cls: type[nn.Module]) -> nn.Module:
    point = _point_class(cls)  # type: ignore[arg-type]
    return point.__new__(point)


def _argument_names(cls: Any) -> tuple[str, ...]:
    return cast(tuple[str, ...], cls.argument_names)


def _stream(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    return cast(torch.Tensor, kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])


def _with_stream(args: tuple[Any, ...], kwargs: dict[str, Any], stream: torch.Tensor) -> Any:
    if "hidden_states" in kwargs:
        return args, {**kwargs, "hidden_states": stream}
    return (stream, *args[1:]), kwargs


def _detached(args: tuple[Any, ...], kwargs: dict[str, Any], name: str, names: tuple[str, ...]) -> Any:
    """(the argument `name`, args and kwargs in which it is detached)."""
    if name in kwargs:
        return kwargs[name], args, {**kwargs, name: kwargs[name].detach()}
    at = names.index(name)
    return args[at], (*args[:at], args[at].detach(), *args[at + 1 :]), kwargs
