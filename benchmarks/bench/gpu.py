"""The benchmark on one CUDA device, in one process and one command: `python benchmarks/bench/gpu.py OUT.json`.

A Llama of 270 M parameters (16 rows of 1,024 tokens a step, bf16 products, fp32 weights, AdamW) in four jobs: a bare
loop, Hugging Face Trainer, Frostline as it is by default, and Frostline without fused loss and prefix cache. Then an
8 B Llama shape, FFN-only, 4,096 tokens, weights in bf16: its share of the measured bf16 matmul rate, its memory
against the plan. Every cell that fails is recorded with its error; none starts after `--seconds`.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "systems")]

import bare  # noqa: E402
import frostline_  # noqa: E402
import trainer  # noqa: E402
from job import Job, Result  # noqa: E402

SMALL = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16, "num_attention_heads": 16,
    "num_key_value_heads": 16, "vocab_size": 32000, "max_position_embeddings": 1024, "tie_word_embeddings": False,
}  # fmt: skip
EIGHT = {
    "architecture": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}  # fmt: skip
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 8, "num_attention_heads": 4,
        "num_key_value_heads": 4, "vocab_size": 512}  # fmt: skip
SYSTEMS: dict[str, tuple[Callable[[Job], Result], dict[str, Any]]] = {
    "bare loop": (bare.run, {}),
    "HF Trainer": (trainer.run, {}),
    "Frostline": (frostline_.run, {"cache": "on"}),
    "Frostline, plain loss, no cache": (frostline_.run, {"loss": "plain", "cache": "off"}),
}


def matmul_rate(n: int, device: str) -> float:
    """FLOPs per second of one large bf16 product, the best of five."""
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = 0.0
    for _ in range(6):
        _sync(device)
        started = time.perf_counter()
        for _ in range(4):
            a @ b
        _sync(device)
        best = max(best, 4 * 2 * n**3 / (time.perf_counter() - started))
    return best


def _sync(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def cell(job: Job, run: Callable[[Job], Result]) -> dict[str, Any]:
    """One run: the median step of the first epoch and of the later ones, memory, losses."""
    done = run(job)
    per_epoch = len(done.seconds) // job.epochs
    return {
        "epoch 1 s": statistics.median(done.seconds[1:per_epoch]),
        "later s": statistics.median(done.seconds[per_epoch:]),
        "first step s": done.seconds[0],
        "peak bytes": done.peak_bytes,
        "learning": done.n_learning,
        "losses": done.losses,
        "notes": done.notes,
        "job": asdict(job),
    }


def eight(device: str, config: dict[str, Any], length: int) -> dict[str, Any]:
    """FFN-only steps of a model in bf16, by the engine; the optimizer is the best that the plan says fits."""
    from transformers import AutoModelForCausalLM

    from frostline.anatomy import read_anatomy
    from frostline.engine import choose_loss
    from frostline.model import load_config, load_skeleton
    from frostline.plan import Batching, make_plan, time_stage
    from frostline.recipe import OptimizerSpec, ScratchModel, StageSpec
    from frostline.schedule import Schedule
    from frostline.selection import select

    source = ScratchModel(**config)
    anatomy = read_anatomy(load_skeleton(source))
    memory = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else 1 << 40
    tried = []
    for name, rounding in (("adamw", "stochastic"), ("sgd", "nearest")):
        spec = StageSpec(learn="ffn", steps=1, lr=1e-5, optimizer=OptimizerSpec(name=name, weight_decay=0.0), clip=1.0)
        schedule = Schedule.of([("ffn", spec, select(anatomy, "ffn"))])
        batching = Batching(
            rows=1,
            length=length,
            weights="bf16",
            rounding=rounding,
            device=device,
            loss="fused",  # type: ignore[arg-type]
        )
        plan = make_plan(source, schedule, batching)
        tried.append({"optimizer": name, "rounding": rounding, "planned peak bytes": plan.peak_bytes})
        if plan.peak_bytes < 0.92 * memory:
            break
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(load_config(source), dtype=torch.bfloat16)
    loss = choose_loss("fused", model, anatomy, n_tokens=length)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = time_stage(
        model,
        anatomy,
        schedule.stages[0],
        rows=1,
        length=length,
        n_vocabulary=config["vocab_size"],
        rounding=rounding,  # type: ignore[arg-type]
        language=loss.loss,
    )
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    flops = plan.stages[0].cost.total_flops
    return {
        "tried": tried, "seconds": seconds, "tokens/s": length / seconds, "flops": flops, "flops/s": flops / seconds,
        "peak bytes": peak, "planned peak bytes": plan.peak_bytes, "parameters": anatomy.n_parameters,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=200)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the script itself")
    asked = parser.parse_args()
    started = time.monotonic()
    found: dict[str, Any] = {"torch": torch.__version__, "cells": {}}
    if asked.device == "cuda":
        found["device"] = torch.cuda.get_device_name(0)
        torch.backends.cuda.matmul.allow_tf32 = False

    def attempt(name: str, work: Callable[[], Any]) -> None:
        if time.monotonic() - started > asked.seconds:
            found["cells"][name] = {"error": "no time was left"}
            return
        began = time.monotonic()
        try:
            found["cells"][name] = work()
        except Exception as error:
            found["cells"][name] = {
                "error": f"{type(error).__name__}: {error}",
                "trace": traceback.format_exc()[-2000:],
            }
        gc.collect()
        if asked.device == "cuda":
            torch.cuda.empty_cache()
        print(f"{time.monotonic() - started:6.1f} s  {name} took {time.monotonic() - began:.1f} s", flush=True)
        asked.out.write_text(json.dumps(found, indent=1))

    with tempfile.TemporaryDirectory() as folder:
        model, tokens = str(Path(folder) / "model"), str(Path(folder) / "tokens.pt")
        attempt("matmul", lambda: {"flops/s": matmul_rate(512 if asked.tiny else 8192, asked.device)})
        attempt("model", lambda: make_model(model, tokens, tiny=asked.tiny))
        for learn in ("ffn", "last-2", "8B", "head", "all"):
            if learn == "8B":
                small = {**EIGHT, **TINY, "num_attention_heads": 8} if asked.tiny else EIGHT
                attempt("8B ffn", lambda s=small: eight(asked.device, s, 64 if asked.tiny else 4096))
                continue
            for name, (run, settings) in SYSTEMS.items():
                job = Job(
                    model=model,
                    tokens=tokens,
                    learn=learn,
                    batch=4 if asked.tiny else 16,
                    dtype="bf16",
                    device=asked.device,
                    settings=settings,
                )
                attempt(f"{learn} | {name}", lambda job=job, run=run: cell(job, run))
    print(table(found))


def make_model(model: str, tokens: str, *, tiny: bool) -> dict[str, Any]:
    """The weights and tokens that all systems start from."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    sizes = SMALL | (TINY if tiny else {})
    made = AutoModelForCausalLM.from_config(LlamaConfig(**sizes), dtype=torch.float32)
    made.save_pretrained(model)
    rows, length = (16, 64) if tiny else (64, 1024)
    torch.save(torch.randint(sizes["vocab_size"], (rows, length)), tokens)
    return {"parameters": sum(p.numel() for p in made.parameters()), "rows": rows, "length": length}


def table(found: dict[str, Any]) -> str:
    """The cells as Markdown."""
    cells, lines = found["cells"], []
    rate = cells.get("matmul", {}).get("flops/s")
    if rate:
        lines.append(f"{found.get('device', 'CPU')}, torch {found['torch']}; bf16 matmul {rate / 1e12:.1f} TFLOP/s\n")
    lines += ["| job | system | step, epoch 1 | step, later | against bare | peak | planned | loss |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for name, c in cells.items():
        if " | " not in name:
            continue
        job, system = name.split(" | ")
        if "error" in c:
            lines.append(f"| {job} | {system} | {c['error'][:80]} | | | | | |")
            continue
        base = cells.get(f"{job} | bare loop", {}).get("later s")
        planned = c["notes"].get("planned_peak_bytes")
        off = [
            abs(a - b) / abs(b)
            for a, b in zip(c["losses"], cells[f"{job} | bare loop"].get("losses", []), strict=False)
        ]
        lines.append(
            f"| {job} | {system} | {1e3 * c['epoch 1 s']:.1f} ms | {1e3 * c['later s']:.1f} ms | "
            f"{base / c['later s'] if base else float('nan'):.2f} × | {c['peak bytes'] / 1e9:.2f} GB | "
            f"{f'{planned / 1e9:.2f} GB' if planned else '–'} | {max(off, default=0):.1e} |"
        )
    large = cells.get("8B ffn", {})
    if "seconds" in large:
        lines.append(
            f"\n8 B, FFN-only, {large['tried'][-1]['optimizer']}: {large['seconds']:.3f} s, {large['tokens/s']:,.0f} "
            f"tokens/s, {large['flops/s'] / 1e12:.0f} TFLOP/s ({large['flops/s'] / rate if rate else 0:.0%} of the "
            f"matmul rate), peak {large['peak bytes'] / 1e9:.1f} GB, planned {large['planned peak bytes'] / 1e9:.1f} GB"
        )
    elif large:
        lines.append(f"\n8 B: {large['error']}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
