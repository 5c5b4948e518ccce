"""The benchmark on the CPU: every system on the same weights, tokens, order, dtype and optimizer, in alternating runs.

    python benchmarks/bench/run.py core                           the 12 cells of `cells.CORE`, each system once
    python benchmarks/bench/run.py next --reps 5                  the next cell that has not been measured so often
    python benchmarks/bench/run.py cell ffn llama-8k 512 fp32     one cell; results are appended
    python benchmarks/bench/run.py table                          table and plot of what was measured so far
    python benchmarks/bench/run.py targets                        the promises with what was measured: `promises.py`

Results go to `.bench/results.jsonl` and are read from there; `targets` reads those of the repository. `--out`: another.

Each system runs in a process and a virtual environment of its own, made on first use in `.bench/`. A run during which
other processes took more than 5 % of a core is recorded as void and does not count. Read `measure`, then `show.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))
from cells import CORE, MODELS, WIDE, Cell, all_cells, workload  # noqa: E402
from job import Job  # noqa: E402
from promises import OURS, report, write_targets  # noqa: E402
from show import BASE, Row, lines_of, plot, table  # noqa: E402

WORK = ROOT / ".bench"
COMMITTED = HERE / "results" / "two-cores.jsonl"
"""What the page and the promises are made from."""
VOID_ABOVE = 0.05
"""Seconds of other processes per second of a run, from which on it does not count."""


@dataclass(frozen=True, kw_only=True)
class System:
    """One thing that trains, as it comes or at its best."""

    script: str
    needs: tuple[str, ...]
    """What is installed into its environment."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of its script: its best for the job, or nothing for its defaults."""
    fixed_only: bool = False
    """Whether it takes rows of one length alone."""
    pinned: bool = True
    """Whether the repository's `constraints.txt` holds in its environment; a peer may need other releases."""

    @property
    def environment(self) -> Path:
        """Its virtual environment; systems with the same script share it."""
        return WORK / "environments" / self.script


TRL = ("torch", "transformers", "accelerate==1.15.0", "trl==1.16.0")
LLAMA_FACTORY = ("torch==2.13.0", "transformers==5.6.0", "llamafactory==0.9.5")
SWIFT = ("torch==2.13.0", "transformers==5.19.0", "ms-swift==4.6.0")
SYSTEMS: dict[str, System] = {
    "bare loop": System(script="bare", needs=("torch", "transformers")),
    "bare loop, compiled": System(
        script="bare", needs=("torch", "transformers"), settings={"compile": True}, fixed_only=True
    ),
    "HF Trainer": System(script="trainer", needs=("torch", "transformers", "accelerate")),
    "HF Trainer, compiled": System(
        script="trainer",
        needs=("torch", "transformers", "accelerate"),
        settings={"torch_compile": True},
        fixed_only=True,
    ),
    "TRL": System(script="trl_", needs=TRL),
    "TRL, at its best": System(
        script="trl_",
        needs=TRL,
        settings={"gradient_checkpointing": False, "torch_compile": True, "padding_free": True},
    ),
    "LLaMA-Factory": System(script="llamafactory_", needs=LLAMA_FACTORY, pinned=False),
    "LLaMA-Factory, at its best": System(
        script="llamafactory_",
        needs=LLAMA_FACTORY,
        pinned=False,
        settings={"disable_gradient_checkpointing": True, "torch_compile": True, "neat_packing": True},
    ),
    "ms-swift": System(script="swift_", needs=SWIFT, pinned=False),
    "ms-swift, at its best": System(
        script="swift_", needs=SWIFT, pinned=False, settings={"gradient_checkpointing": False, "torch_compile": True}
    ),
    "Frostline": System(script="frostline_", needs=("-e", str(ROOT))),
    "Frostline, compiled": System(
        script="frostline_", needs=("-e", str(ROOT)), settings={"compile": True}, fixed_only=True
    ),
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


def measure(name: str, job: Job, *, python: str) -> dict[str, Any]:
    """One run of one system in its own process, and what else the machine did meanwhile."""
    folder = WORK / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    asked, answer = folder / f"job-{os.getpid()}.json", folder / f"result-{os.getpid()}.json"
    asked.write_text(json.dumps(asdict(job)))
    answer.unlink(missing_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(job.threads), "GOMP_SPINCOUNT": "2000", "HF_HUB_OFFLINE": "1"}
    busy, own, started = busy_seconds(), own_seconds(), time.monotonic()
    script = HERE / "systems" / f"{SYSTEMS[name].script}.py"
    done = subprocess.run(
        [python, str(script), str(asked), str(answer)], capture_output=True, text=True, env=environment, check=False
    )
    wall = time.monotonic() - started
    foreign = max(busy_seconds() - busy - (own_seconds() - own), 0.0) / wall
    said = {**asdict(job), "model": Path(job.model).name, "tokens": Path(job.tokens).name}
    row = {"system": name, "job": said, "foreign": foreign, "void": foreign > VOID_ABOVE, "wall": wall}
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


def run_cell(cell: Cell, asked: argparse.Namespace) -> None:
    """Every system in turn, `asked.reps` times; each result is appended as soon as it is there."""
    sizes = json.loads(asked.sizes)
    model, tokens = workload(cell, WORK / "work", rows=asked.rows, sizes=sizes)
    given = dict(text.split("=", 1) for text in asked.python)
    for rep in range(asked.reps):
        rate = products(cell, asked, {**WIDE, **MODELS[cell.model], **sizes}) if cell.fixed else {}
        for name, system in systems_for(cell, asked.only):
            job = Job(
                model=model,
                tokens=tokens,
                learn=cell.learn,
                batch=asked.batch if cell.fixed else 2 * asked.batch,
                epochs=asked.epochs,
                dtype=cell.dtype,
                threads=asked.threads,
                settings=system.settings,
            )
            row = measure(name, job, python=python_of(system, given))
            append(asked.out, {"cell": str(cell), "rep": rep, "machine": platform.processor(), **rate, **row})
            state = "failed" if "error" in row else "void" if row["void"] else "ok"
            print(f"{cell} | {name}: {state}, others {row['foreign']:.0%}, {row['wall']:.0f} s", flush=True)


def systems_for(cell: Cell, only: list[str] | None) -> Iterator[tuple[str, System]]:
    """Those that take the cell's rows; `only`: of these names."""
    for name, system in SYSTEMS.items():
        if (cell.fixed or not system.fixed_only) and (not only or name in only):
            yield name, system


def core_systems(cell: Cell) -> list[str]:
    """Of the core, so that it ends within an hour: peers as they come are measured on FFN-only training alone."""
    all_of_them = (cell.learn, cell.model, cell.dtype) == ("ffn", "llama-8k", "fp32")
    return [n for n, s in SYSTEMS.items() if all_of_them or s.settings or n in (BASE, OURS)]


def products(cell: Cell, asked: argparse.Namespace, config: Mapping[str, Any]) -> dict[str, float]:
    """FLOPs of a step, and the rate of its matrix products alone."""
    import torch
    from gemm import Sizes, replay_rate, step_flops

    torch.set_num_threads(asked.threads)
    shape, n = Sizes.of(config), asked.batch * int(cell.lengths)
    rate = replay_rate(shape, cell.learn, n, torch.bfloat16 if cell.dtype == "bf16" else torch.float32)
    return {"flops": step_flops(shape, cell.learn, n, int(cell.lengths)), "products_rate": rate}


def append(out: Path, row: Mapping[str, Any]) -> None:
    """One line more."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read(out: Path) -> list[Row]:
    """What was measured so far."""
    if not out.exists():
        sys.exit(
            f"nothing was measured yet: there is no {out}; what was published: --out {COMMITTED.relative_to(ROOT)}"
        )
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def missing(cell: Cell, asked: argparse.Namespace) -> bool:
    """Whether some system has fewer than `asked.reps` runs that count or failed."""
    rows = read(asked.out) if asked.out.exists() else []
    done = Counter(r["system"] for r in rows if r["cell"] == str(cell) and ("error" in r or not r["void"]))
    return any(done[name] < asked.reps for name, _ in systems_for(cell, asked.only))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("core", "cell", "next", "table", "targets"))
    parser.add_argument("cell", nargs="*", help="job, model, lengths, precision, such as: ffn llama-8k 512 fp32")
    parser.add_argument("--out", type=Path, help=".bench/results.jsonl, but for `targets`")
    parser.add_argument("--reps", type=int, default=1, help="runs of every system")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rows", type=int, default=16, help="rows, or documents, of the training data")
    parser.add_argument("--batch", type=int, default=4, help="rows per step; twice as many documents")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sizes", default="{}", help="JSON: fields of the model's configuration")
    parser.add_argument("--only", nargs="*", help="these systems alone")
    parser.add_argument(
        "--python", action="append", default=[], metavar="SCRIPT=PATH", help="instead of its environment"
    )
    parser.add_argument("--void-too", action="store_true", help="show runs that do not count, to try the harness")
    parser.add_argument("--plot", type=Path, help="a picture to write")
    asked = parser.parse_args()
    if asked.out is None:
        asked.out = COMMITTED if asked.what == "targets" else WORK / "results.jsonl"
    if asked.what == "cell":
        try:
            run_cell(Cell.parse(" ".join(asked.cell)), asked)
        except ValueError as error:
            parser.error(str(error))
    if asked.what == "core":
        for cell in CORE:
            asked.only = core_systems(cell)
            if missing(cell, asked):
                run_cell(cell, asked)
    if asked.what == "next" and (cell := next((c for c in all_cells() if missing(c, asked)), None)):
        run_cell(cell, asked)
    lines = lines_of(read(asked.out), void_too=asked.void_too)
    if asked.what == "targets":
        write_targets(lines)
        print(report(lines))
        return
    print(table(lines) if lines else "no run counts yet: other processes were computing; --void-too shows them")
    if asked.plot and lines:
        plot(lines, asked.plot)


if __name__ == "__main__":
    main()
