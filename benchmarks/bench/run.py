"""The benchmark on the CPU: every system on the same weights, tokens, order, dtype and optimizer, in alternating runs.

    python benchmarks/bench/run.py core                  the 12 cells, each system once (about an hour on two cores)
    python benchmarks/bench/run.py next                  the next cell of them that has not been measured
    python benchmarks/bench/run.py cell ffn 8192         one cell; results are appended
    python benchmarks/bench/run.py table                 table and plot of what was measured so far

Each system runs in a process and a virtual environment of its own, made on first use in `.bench/`. A run during which
other processes took more than 5 % of a core is recorded as void and does not count. Read `measure`, then `table`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))
from job import Job  # noqa: E402

WORK = ROOT / ".bench"
VOID_ABOVE = 0.05
"""Seconds of other processes per second of a run, from which on it does not count."""
JOBS = ("all", "ffn", "last-4", "last-2", "last-1", "head")
VOCABULARIES = (8192, 32000)
SIZES = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
         "num_key_value_heads": 8, "max_position_embeddings": 1024, "tie_word_embeddings": False}  # fmt: skip
ROWS, LENGTH, BATCH = 24, 512, 4
"""Six steps of 2,048 tokens an epoch."""


@dataclass(frozen=True, kw_only=True)
class System:
    """One thing that trains, as it comes or at its best."""

    script: str
    needs: tuple[str, ...]
    """What is installed into its environment."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of its script: its best for the job, or nothing for its defaults."""
    pinned: bool = True
    """Whether the repository's `constraints.txt` holds in its environment; a peer may need other releases."""

    @property
    def environment(self) -> Path:
        """Its virtual environment; systems with the same script share it."""
        return WORK / "environments" / self.script


TRL = ("torch", "transformers", "accelerate==1.15.0", "trl==1.16.0")
SYSTEMS: dict[str, System] = {
    "bare loop": System(script="bare", needs=("torch", "transformers")),
    "HF Trainer": System(script="trainer", needs=("torch", "transformers", "accelerate")),
    "HF Trainer, compiled": System(
        script="trainer", needs=("torch", "transformers", "accelerate"), settings={"torch_compile": True}
    ),
    "TRL": System(script="trl_", needs=TRL),
    "TRL, at its best": System(
        script="trl_",
        needs=TRL,
        settings={"gradient_checkpointing": False, "torch_compile": True, "padding_free": True},
    ),
    "Frostline": System(script="frostline_", needs=("-e", str(ROOT))),
}
"""More systems: a script beside the others, and a line here."""


def python_of(system: System, given: Mapping[str, str]) -> str:
    """The interpreter of a system's environment; made when it is not there. `given`: script → an interpreter to use."""
    if system.script in given:
        return given[system.script]
    python = system.environment / "bin" / "python"
    if not (system.environment / "ready").exists():
        print(f"making {system.environment}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(system.environment)], check=True)
        held = ("-c", str(ROOT / "constraints.txt")) if system.pinned else ()
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *held, *system.needs], check=True, cwd=ROOT)
        (system.environment / "ready").touch()
    return str(python)


def workload(vocabulary: int, sizes: Mapping[str, Any], rows: int, length: int) -> tuple[str, str]:
    """The folder of the weights and the file of the tokens; random, from a seed."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    folder = WORK / "work" / f"{vocabulary}-{sizes['hidden_size']}-{rows}x{length}"
    if not (folder / "tokens.pt").exists():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=vocabulary, **sizes), dtype=torch.float32)
        model.save_pretrained(folder / "model")
        torch.save(torch.randint(vocabulary, (rows, length)), folder / "tokens.pt")
    return str(folder / "model"), str(folder / "tokens.pt")


def measure(name: str, job: Job, *, python: str) -> dict[str, Any]:
    """One run of one system in its own process, and what else the machine did meanwhile."""
    folder = WORK / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    asked, answer = folder / f"job-{os.getpid()}.json", folder / f"result-{os.getpid()}.json"
    asked.write_text(json.dumps(asdict(job)))
    answer.unlink(missing_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(job.threads), "GOMP_SPINCOUNT": "0", "HF_HUB_OFFLINE": "1"}
    busy, own, started = busy_seconds(), own_seconds(), time.monotonic()
    script = HERE / "systems" / f"{SYSTEMS[name].script}.py"
    done = subprocess.run(
        [python, str(script), str(asked), str(answer)], capture_output=True, text=True, env=environment, check=False
    )
    wall = time.monotonic() - started
    foreign = max(busy_seconds() - busy - (own_seconds() - own), 0.0) / wall
    row = {"system": name, "job": asdict(job), "foreign": foreign, "void": foreign > VOID_ABOVE, "wall": wall}
    if done.returncode or not answer.exists():
        return {**row, "error": done.stderr.strip()[-2000:] or f"exit code {done.returncode}"}
    return {**row, **json.loads(answer.read_text())}


def busy_seconds() -> float:
    """Seconds that all cores together have spent on any process."""
    user, nice, system, _idle, _iowait, irq, softirq, *_ = map(
        int, Path("/proc/stat").read_text().split("\n")[0].split()[1:]
    )
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """Seconds of this process and of those that it has waited for."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in both)


def run_cell(learn: str, vocabulary: int, asked: argparse.Namespace) -> None:
    """Every system in turn, `asked.reps` times; each result is appended as soon as it is there."""
    import torch
    from gemm import Sizes, replay_seconds

    sizes = {**SIZES, **json.loads(asked.sizes)}
    model, tokens = workload(vocabulary, sizes, asked.rows, asked.length)
    cell = f"{learn} | {vocabulary} | {asked.rows}x{asked.length} | {asked.dtype}"
    torch.set_num_threads(asked.threads)
    dtype = torch.bfloat16 if asked.dtype == "bf16" else torch.float32
    shape = Sizes(
        hidden=sizes["hidden_size"],
        ffn=sizes["intermediate_size"],
        layers=sizes["num_hidden_layers"],
        vocabulary=vocabulary,
    )
    given = dict(text.split("=", 1) for text in asked.python)
    names = [n for n in SYSTEMS if not asked.only or n in asked.only]
    for rep in range(asked.reps):
        busy, own, started = busy_seconds(), own_seconds(), time.monotonic()
        seconds, flops = replay_seconds(shape, learn, asked.batch * asked.length, dtype)
        foreign = max(busy_seconds() - busy - (own_seconds() - own), 0.0) / (time.monotonic() - started)
        append(asked.out, {"cell": cell, "system": "products alone", "replay_seconds": seconds, "flops": flops,
                           "foreign": foreign, "void": foreign > VOID_ABOVE})  # fmt: skip
        for name in names:
            system = SYSTEMS[name]
            job = Job(
                model=model,
                tokens=tokens,
                learn=learn,
                batch=asked.batch,
                epochs=asked.epochs,
                dtype=asked.dtype,
                threads=asked.threads,
                settings=system.settings,
            )
            row = measure(name, job, python=python_of(system, given))
            append(asked.out, {"cell": cell, "rep": rep, "machine": platform.processor(), **row})
            state = "failed" if "error" in row else "void" if row["void"] else "ok"
            print(f"{cell} | {name}: {state}, others {row['foreign']:.0%}, {row['wall']:.0f} s", flush=True)


def append(out: Path, row: Mapping[str, Any]) -> None:
    """One line more."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


@dataclass(frozen=True, kw_only=True)
class Line:
    """One system in one cell: medians over the runs that count."""

    cell: str
    system: str
    runs: int
    voids: int
    first: float
    """Tokens per second in the first epoch, its first step left out."""
    later: float
    """Tokens per second afterwards."""
    spread: tuple[float, float]
    """The slowest and the fastest run's `later`."""
    peak_bytes: float
    loss_difference: float
    """The largest relative one from the bare loop."""
    share: float | None
    """Of what the products alone would take."""


def lines_of(rows: Iterable[dict[str, Any]], *, void_too: bool = False) -> list[Line]:
    """The table's lines."""
    good: dict[tuple[str, str], list[dict[str, Any]]] = {}
    voids: dict[tuple[str, str], int] = {}
    for row in rows:
        key = (row["cell"], row["system"])
        if row["void"] and not void_too:
            voids[key] = voids.get(key, 0) + 1
        elif "error" not in row:
            good.setdefault(key, []).append(row)
    out = []
    for (cell, system), found in good.items():
        if system == "products alone":
            continue
        speeds = [_speeds(r) for r in found]
        base = good.get((cell, "bare loop"), found)[0]["losses"]
        off = max(abs(a - b) / abs(b) for r in found for a, b in zip(r["losses"], base, strict=False))
        alone = [r["replay_seconds"] for r in good.get((cell, "products alone"), [])]
        later = statistics.median(s[1] for s in speeds)
        tokens = _tokens(found[0])
        out.append(
            Line(
                cell=cell,
                system=system,
                runs=len(found),
                voids=voids.get((cell, system), 0),
                first=statistics.median(s[0] for s in speeds),
                later=later,
                spread=(min(s[1] for s in speeds), max(s[1] for s in speeds)),
                peak_bytes=statistics.median(r["peak_bytes"] for r in found),
                loss_difference=off,
                share=statistics.median(alone) * later / tokens if alone else None,
            )
        )
    return out


def _tokens(row: Mapping[str, Any]) -> int:
    return row["job"]["batch"] * int(row["cell"].split(" | ")[2].split("x")[1])


def _speeds(row: Mapping[str, Any]) -> tuple[float, float]:
    """Tokens per second in the first epoch (without its first step) and afterwards."""
    per_epoch, tokens = len(row["seconds"]) // row["job"]["epochs"], _tokens(row)
    first, later = row["seconds"][1:per_epoch], row["seconds"][per_epoch:]
    return tokens / statistics.median(first), tokens / statistics.median(later or first)


def table(lines: Iterable[Line]) -> str:
    """Markdown."""
    columns = (
        "job, vocabulary, rows",
        "system",
        "tokens/s, epoch 1",
        "later",
        "(range)",
        "× bare",
        "peak MB",
        "× bare",
    )
    columns += ("of products", "loss", "runs")
    out = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines = list(lines)
    bare = {line.cell: line for line in lines if line.system == "bare loop"}
    for line in sorted(lines, key=lambda x: x.cell):
        base = bare.get(line.cell, line)
        out.append(
            f"| {line.cell.replace(' | ', ', ')} | {line.system} | {line.first:,.0f} | {line.later:,.0f} | "
            f"{line.spread[0]:,.0f}–{line.spread[1]:,.0f} | {line.later / base.later:.2f} | "
            f"{line.peak_bytes / 1e6:,.0f} | {line.peak_bytes / base.peak_bytes:.2f} | "
            f"{f'{line.share:.0%}' if line.share else '–'} | {line.loss_difference:.0e} | "
            f"{line.runs}{f' ({line.voids} void)' if line.voids else ''} |"
        )
    return "\n".join(out)


def plot(lines: list[Line], to: Path) -> None:
    """Speed against memory, both relative to the bare loop: up and to the left is better."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bare = {line.cell: line for line in lines if line.system == "bare loop"}
    cells = [c for c in dict.fromkeys(line.cell for line in lines) if c in bare]
    systems = list(dict.fromkeys(line.system for line in lines))
    figure, (speed, memory) = pyplot.subplots(1, 2, figsize=(11, 0.5 + 0.55 * max(len(cells), 2)), sharey=True)
    height = 0.8 / max(len(systems), 1)
    for i, system in enumerate(systems):
        mine = {line.cell: line for line in lines if line.system == system}
        at = [y + i * height for y, c in enumerate(cells) if c in mine]
        found = [mine[c] for c in cells if c in mine]
        speed.barh(at, [f.later / bare[f.cell].later for f in found], height=height, label=system)
        memory.barh(at, [f.peak_bytes / bare[f.cell].peak_bytes for f in found], height=height)
    for axis, title in ((speed, "tokens/s from epoch 2 on, × bare loop"), (memory, "peak memory, × bare loop")):
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set_title(title, fontsize=10)
    speed.set_yticks([y + 0.4 - height / 2 for y in range(len(cells))], [" ".join(c.split(" | ")[:2]) for c in cells])
    speed.invert_yaxis()
    figure.legend(loc="lower center", ncol=len(systems), fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(to, dpi=130)


def read(out: Path) -> list[dict[str, Any]]:
    """What was measured so far."""
    if not out.exists():
        sys.exit(f"nothing was measured yet: there is no {out}")
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def done_cells(out: Path) -> set[str]:
    """Cells in which every system has a run that counts."""
    if not out.exists():
        return set()
    counted: dict[str, set[str]] = {}
    for row in read(out):
        if not row["void"] and "error" not in row:
            counted.setdefault(row["cell"], set()).add(row["system"])
    return {cell for cell, systems in counted.items() if systems >= set(SYSTEMS)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("core", "cell", "next", "table"))
    parser.add_argument("cell", nargs="*", help="job and vocabulary, such as: ffn 8192")
    parser.add_argument("--out", type=Path, default=WORK / "results.jsonl")
    parser.add_argument("--reps", type=int, default=1, help="runs of every system")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sizes", default="{}", help="JSON: fields of the model's configuration")
    parser.add_argument("--only", nargs="*", help="these systems alone")
    parser.add_argument(
        "--python", action="append", default=[], metavar="SCRIPT=PATH", help="instead of its environment"
    )
    parser.add_argument("--void-too", action="store_true", help="show runs that do not count, to try the harness")
    parser.add_argument("--plot", type=Path, help="a picture to write")
    asked = parser.parse_args()
    if asked.what in ("core", "next"):
        there = done_cells(asked.out)
        for learn in JOBS:
            for vocabulary in VOCABULARIES:
                if f"{learn} | {vocabulary} | {asked.rows}x{asked.length} | {asked.dtype}" in there:
                    continue
                run_cell(learn, vocabulary, asked)
                if asked.what == "next":
                    return
    if asked.what == "cell":
        learn, vocabulary = asked.cell
        run_cell(learn, int(vocabulary), asked)
    lines = lines_of(read(asked.out), void_too=asked.void_too)
    print(table(lines) if lines else "no run counts yet: other processes were computing; --void-too shows them")
    if asked.plot and lines:
        plot(lines, asked.plot)


if __name__ == "__main__":
    main()
