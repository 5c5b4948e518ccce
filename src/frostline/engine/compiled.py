"""Blocks compiled by `torch.compile`, and the proof at every stage that they train what the model itself would.

Compiled is the forward pass of every block, as one graph each; blocks that are alike share one. What a graph depends
on is checked before it is used: which tensors learn, the attributes of gradient routes, shapes. A stage needs other
graphs than the one before it, so at its start one micro-batch is computed twice, as compiled and as it is, and both
must leave gradients in the same places, of the same size: torch has used stale graphs before (pytorch 139476), and
compiled blocks ignore hooks. The pass as it is keeps little (`lean`), so that it is not what memory has to suffice for.
Measurements (held-out losses, flow, the metered step) are never compiled.
Read `Compiled.prove` first.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx, nn
from torch._dynamo import config as dynamo
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._dynamo.utils import counters
from torch._functorch import config as functorch

from frostline.engine.owned import Ownership
from frostline.engine.product_attention import with_product_attention
from frostline.engine.recompute import is_recomputed, recomputed
from frostline.engine.step import Countable, LossFunction, step
from frostline.errors import CompileError

BACKEND = "inductor"
"""Of `torch.compile`; tests put a faster one here that runs the same graphs without making code of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Proof:
    """One micro-batch of a stage, compiled and as it is."""

    n_graphs: int
    """Graphs that the stage needed and that were not there yet."""
    seconds: float
    """For these, and the pass itself: what warming up took."""
    loss_difference: float
    """Of the losses, relative."""
    gradient_difference: float
    """The largest difference of a leaf's gradient norm, relative to it."""


class Compiled:
    """The blocks of a model, compiled; made once, after the points of routes and `recompute_blocks`."""

    def __init__(self, blocks: Sequence[nn.Module], *, n_stages: int, kept: float = 1.0) -> None:
        """Nothing is compiled yet: that happens when a block is first called.

        `kept`: of what blocks would keep for their backward pass, the share they keep; what is cheapest to compute
        again is what they do not. 1: torch's own choice.
        """
        self.kept = kept
        self._forwards = {block: block.forward for block in blocks if not is_recomputed(block)}
        for block in blocks:
            block.forward = torch.compile(block.forward, backend=_backend, fullgraph=True, dynamic=False)
        self.limit = 64 + 8 * len(blocks) * n_stages
        """Graphs at most; torch's own limit is 8, and from there on it goes on uncompiled after a line in the log."""
        self._silent: list[nn.Parameter] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around a run: graphs are looked for among those that the run made, and too many are an error."""
        torch._dynamo.reset()
        with (
            _torch_at_ease(),
            functorch.patch(activation_memory_budget=self.kept),
            dynamo.patch(
                recompile_limit=self.limit, accumulated_recompile_limit=self.limit, fail_on_recompile_limit_hit=True
            ),
        ):
            try:
                yield
            except FailOnRecompileLimitHit as error:
                raise CompileError(f"the run needs more than {self.limit} graphs; leave `compile` out") from error
            except TorchDynamoException as error:
                raise cannot_compile(error) from error

    def prove(
        self,
        model: nn.Module,
        ownership: Ownership,
        micro_batch: Countable,
        loss: LossFunction,
        *,
        seed: int,
        device: torch.device,
        bf16: bool,
    ) -> Proof:
        """Compile what a stage needs, and hold it against the model itself. Raises `CompileError` where they differ.

        Gradients are cleared afterwards; nothing else is changed.
        """

        def computed() -> tuple[float, list[float | None]]:
            value = step(model, [micro_batch], loss, seed=seed, device=device, bf16=bf16).loss.item()
            found = [o.value.grad for o in ownership.owned]
            norms = [None if g is None else torch.linalg.vector_norm(g.float()).item() for g in found]
            for o in ownership.owned:
                o.value.grad = None
            return value, norms

        self._silent = []
        with self.lean():
            plain = computed()
        before, started = graphs(), time.perf_counter()
        compiled = computed()
        seconds = time.perf_counter() - started
        narrow = bf16 or any(o.parameter.element_size() < 4 for o in ownership.owned)
        names = [str(o.piece) for o in ownership.owned]
        difference = _compare(names, plain, compiled, within=0.25 if narrow else 1e-2)
        self._silent = [o.value for o, norm in zip(ownership.owned, plain[1], strict=True) if norm is None]
        return Proof(
            n_graphs=graphs() - before,
            seconds=seconds,
            loss_difference=abs(compiled[0] - plain[0]) / max(abs(plain[0]), 1e-30),
            gradient_difference=difference,
        )

    @property
    def is_lean(self) -> bool:
        """Whether `lean` recomputes what the run itself keeps."""
        return bool(self._forwards)

    @contextmanager
    def lean(self) -> Iterator[None]:
        """Inside, blocks run uncompiled and keep no more than their input: a pass that takes no more memory than a
        compiled one, with the gradients of the model as it is."""
        with as_it_is(), recomputed(self._forwards):
            yield

    def drop_zeros(self) -> None:
        """Where the model itself gives no gradient, a compiled one may give zeros, by which weights would decay."""
        for leaf in self._silent:
            if leaf.grad is not None and not bool(leaf.grad.any()):
                leaf.grad = None


def _backend(graph: fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
    """Code for the graph of a block; where dropout draws, it draws the numbers that the block itself would."""
    graph = with_product_attention(graph)
    if BACKEND != "inductor":
        return lookup_backend(BACKEND)(graph, inputs)
    from torch._inductor.compile_fx import compile_fx

    return cast(Callable[..., Any], compile_fx(graph, inputs, config_patches={"fallback_random": True}))


@contextmanager
def _torch_at_ease() -> Iterator[None]:
    """Inside, torch does not warn of itself: of a `.grad` it looks for, of caches it looks into, of what it imports."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        warnings.filterwarnings("ignore", message="`torch.jit", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
        yield


@contextmanager
def as_it_is() -> Iterator[None]:
    """Inside, compiled blocks run uncompiled."""
    with torch.compiler.set_stance("force_eager"):
        yield


def graphs() -> int:
    """Graphs made in this process so far."""
    return int(counters["stats"]["unique_graphs"])


def _compare(
    names: Sequence[str],
    plain: tuple[float, list[float | None]],
    compiled: tuple[float, list[float | None]],
    *,
    within: float,
) -> float:
    """The largest relative difference of a gradient's norm. Raises `CompileError` for one that is no rounding."""
    if not abs(compiled[0] - plain[0]) <= within * abs(plain[0]):
        raise CompileError(f"compiled, the loss is {compiled[0]}, and uncompiled {plain[0]}; leave `compile` out")
    floor = 1e-3 * max((n for n in plain[1] if n), default=0.0)
    largest = 0.0
    for name, a, b in zip(names, plain[1], compiled[1], strict=True):
        if (a is None and b) or (a and b is None):
            raise CompileError(
                f"compiled, {name} gets {'a' if b else 'no'} gradient, and uncompiled {'one' if a else 'none'}: a "
                "graph of another stage or without its routes was used; leave `compile` out, and please report this"
            )
        if a is None or b is None:
            continue
        if not abs(a - b) <= within * a + floor:
            raise CompileError(
                f"compiled, the gradient of {name} has norm {b:.3e}, and uncompiled {a:.3e}; leave `compile` out"
            )
        largest = max(largest, abs(a - b) / max(a, floor, 1e-30))
    return largest


def check_compiles(blocks: Sequence[nn.Module], call: Callable[[], Any], *, device: str) -> None:
    """Whether every block is one graph, and there is something to make code of it with. Raises `CompileError`.

    `call` runs the model on a row. The graphs are run, not made into code: that is what takes long.
    """
    if BACKEND == "inductor":
        check_toolchain(device)
    held = {block: vars(block).get("forward") for block in blocks}
    try:
        with _torch_at_ease(), dynamo.patch(recompile_limit=8 * len(blocks), fail_on_recompile_limit_hit=True):
            for block in blocks:
                block.forward = torch.compile(block.forward, backend="eager", fullgraph=True, dynamic=False)
            call()
    except TorchDynamoException as error:
        raise cannot_compile(error) from error
    finally:
        for block, forward in held.items():
            if forward is None:
                del block.forward
            else:
                block.forward = forward
        torch._dynamo.reset()


def check_toolchain(device: str) -> None:
    """Raise `CompileError` when there is nothing here to make code with: a C++ compiler, and on CUDA Triton too."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch.utils._triton import has_triton

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise CompileError(
            "`compile: blocks` needs a C++ compiler, and there is none here: install one (g++ or clang++), name it in "
            "the environment variable CXX, or leave `compile` out"
        ) from None
    if device == "cuda" and not has_triton():
        raise CompileError(
            "`compile: blocks` on CUDA needs Triton, which torch does not find here; leave `compile` out"
        )


def cannot_compile(error: Exception) -> CompileError:
    """What torch says the reason is, and what to do."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    reason = next((line for line in lines if not line.endswith("raised:")), lines[0])
    return CompileError(f"the model's blocks cannot be compiled: {reason}; leave `compile` out")
