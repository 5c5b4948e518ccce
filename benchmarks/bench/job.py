"""One run of the benchmark as plain data: what every system is given, and what it gives back. Needs torch alone.

A system is a script `systems/NAME.py` with a function `run(job) -> Result`; the harness calls `python systems/NAME.py
JOB.json RESULT.json`, each in its own process and, for peers, its own virtual environment. Read `Job`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(kw_only=True)
class Job:
    """The same weights, tokens, order, dtype and optimizer for every system: AdamW without decay, clipped at 1."""

    model: str
    """A folder with the weights that all start from."""
    tokens: str
    """A `.pt` file: (rows, length), int64; or a list of documents of different lengths, each (length,)."""
    learn: str
    """`all`, `ffn`, `attn`, `last-4`, `head`, `experts`, …"""
    batch: int
    epochs: int = 3
    lr: float = 1e-4
    dtype: str = "fp32"
    """`fp32`; `bf16`: products in bf16, weights in fp32."""
    device: str = "cpu"
    threads: int = 2
    max_steps: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    """Of one system: its best for the job, or nothing for its defaults."""

    def order(self, n_rows: int) -> list[list[int]]:
        """The rows of every step, in order; the same for every system."""
        import torch

        out: list[list[int]] = []
        for epoch in range(self.epochs):
            rows = torch.randperm(n_rows, generator=torch.Generator().manual_seed(epoch)).tolist()
            out += [rows[i : i + self.batch] for i in range(0, n_rows - self.batch + 1, self.batch)]
        return out[: self.max_steps]


@dataclass(kw_only=True)
class Result:
    """What a system did."""

    seconds: list[float]
    """Per step, from the end of the one before."""
    losses: list[float]
    peak_bytes: int
    """CPU: the process's largest resident memory above that after its imports. CUDA: the most that was allocated."""
    n_learning: int
    tokens: list[int] = field(default_factory=list)
    """Real ones per step, padding not counted, where rows differ in length."""
    cpu_seconds: list[float] = field(default_factory=list)
    """Per step, of the process: says something where other processes compute too."""
    notes: dict[str, Any] = field(default_factory=dict)


def learns(name: str, learn: str, n_layers: int) -> bool:
    """Whether a parameter of a Llama-like model is to learn, by its own name."""
    if learn == "all":
        return True
    if learn == "ffn":
        return ".mlp." in name
    if learn == "attn":
        return ".self_attn." in name
    if learn == "experts":
        return ".mlp.experts." in name or ".mlp.gate." in name
    if learn == "head":
        return name.startswith("lm_head")
    if learn.startswith("last-"):
        parts = name.split(".")
        return "layers" in parts and int(parts[parts.index("layers") + 1]) >= n_layers - int(learn[5:])
    raise ValueError(f"no job is called {learn}")


def collate(rows: Any, indices: Sequence[int]) -> dict[str, Any]:
    """A batch as `transformers` collates it by default: rows filled up on the right to the longest, and masked."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    if isinstance(rows, torch.Tensor):
        return {"input_ids": rows[list(indices)], "labels": rows[list(indices)]}
    found = [rows[i] for i in indices]
    return {
        "input_ids": pad_sequence(found, batch_first=True),
        "labels": pad_sequence(found, batch_first=True, padding_value=-100),
        "attention_mask": pad_sequence([torch.ones_like(r) for r in found], batch_first=True),
    }


def tokens_of(rows: Any, order: Sequence[Sequence[int]]) -> list[int]:
    """Real tokens of every step."""
    return [sum(len(rows[i]) for i in indices) for indices in order]


def load_model(job: Job) -> Any:
    """The model by plain transformers, with what learns marked."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32).to(job.device)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(learns(name, job.learn, model.config.num_hidden_layers))
    return model


class Meter:
    """Clock and memory of one run."""

    def __init__(self, job: Job) -> None:
        import torch._inductor.compile_fx  # what some system loads later anyway counts for none
        from transformers import AutoModelForCausalLM  # noqa: F401

        self.cuda = job.device == "cuda"
        self.before = resident_bytes()
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.last_cpu = time.process_time()
        if self.cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
        self.last = time.perf_counter()

    def start(self) -> None:
        """The first step begins."""
        self.last, self.last_cpu = self._now(), time.process_time()

    def tick(self) -> None:
        """A step has ended."""
        now, cpu = self._now(), time.process_time()
        self.seconds.append(now - self.last)
        self.cpu_seconds.append(cpu - self.last_cpu)
        self.last, self.last_cpu = now, cpu

    def _now(self) -> float:
        if self.cuda:
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()

    def peak_bytes(self) -> int:
        """See `Result.peak_bytes`."""
        if self.cuda:
            import torch

            return torch.cuda.max_memory_allocated()
        return resident_bytes("VmHWM") - self.before


def resident_bytes(field_name: str = "VmRSS") -> int:
    """Resident memory of this process, now or (`VmHWM`) at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field_name):
            return 1024 * int(line.split()[1])
    return 0


def main(run: Callable[[Job], Result]) -> None:
    """`python systems/NAME.py JOB.json RESULT.json`."""
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    import torch

    torch.set_num_threads(job.threads)
    Path(sys.argv[2]).write_text(json.dumps(asdict(run(job))))
