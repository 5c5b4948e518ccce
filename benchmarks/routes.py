"""Exact freezing, stopped gradients, block-local learning and removed residuals, compared on the demo's corpus.

    python benchmarks/routes.py --out runs/routes                 # everything; resumable: what is done is skipped
    python benchmarks/routes.py --out runs/routes --only cost     # one part: train, cost or write

Every strategy starts from the same trained weights (`docs/routes/start.yaml`, one start per seed, 200 steps or 20) and
has 100 steps (`docs/routes/*.yaml`). Its learning rate is chosen on seed 3 by the loss on files that are neither
trained on nor reported; if the best is at an end of the grid, the grid grows there. Seeds 0, 1 and 2 are then trained
with it and reported on other files. Every run must pass its audit.

`runs.jsonl` has a line per run, `cost.json` the times of a step; `write` makes `docs/routes/results.json` and the
figures of them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from frostline.anatomy import read_anatomy
from frostline.engine import LoopSettings, next_token_loss
from frostline.engine.evaluation import held_out_loss
from frostline.experiment.corpus import write_corpus
from frostline.experiment.figures import STYLE, WIDTH_IN
from frostline.feed import held_out_batches
from frostline.model import load_random, load_skeleton
from frostline.plan import Batching, make_plan, points_for, time_stage
from frostline.prepared import choose_device, prepare
from frostline.ready import load_weights
from frostline.recipe import Recipe, ScratchModel, StageSpec, load_recipe
from frostline.run import train
from frostline.schedule import Schedule
from frostline.selection import select

DOCS = Path(__file__).parents[1] / "docs" / "routes"
STRATEGIES = ("exact", "detach", "local", "blocks-alone", "no-attn-skip", "no-ffn-skip", "all")
ALSO_EARLY = ("all-local", "all-no-attn-skip", "all-no-ffn-skip", "all-longer")
"""Strategies in which everything learns: compared where there is much to learn. `all-longer`: `all` for as many steps
as cost what 100 steps of `all-local` cost."""
STARTS = {"late": 200, "early": 20}
"""Name → steps of the common start."""
GRID = (3e-4, 1e-3, 3e-3, 1e-2)
WIDER = (1e-5, 3e-5, 1e-4, *GRID, 3e-2, 1e-1)
CHOICE_SEED, SEEDS = 3, (0, 1, 2)
LABELS = {
    "exact": "exact freezing",
    "detach": "stop attn.out",
    "local": "block-local, local losses",
    "blocks-alone": "block-local, no local losses",
    "no-attn-skip": "no residual past attention",
    "no-ffn-skip": "no residual past the FFN",
    "all": "everything learns",
    "all-local": "everything, block-local, local losses",
    "all-longer": "everything learns, 168 steps",
    "all-no-attn-skip": "everything, no residual past attention",
    "all-no-ffn-skip": "everything, no residual past the FFN",
}
SHAPES = {
    "demo": ({"hidden_size": 128, "intermediate_size": 352}, 16, 128),
    "longer": ({"hidden_size": 256, "intermediate_size": 704}, 2, 1024),
}
"""Name → what differs of the model, rows, tokens per row; for the cost."""


def jobs() -> list[tuple[str, str]]:
    """(start, strategy), in the order in which they are run."""
    return [(start, s) for start in STARTS for s in STRATEGIES] + [("early", s) for s in ALSO_EARLY]


def split_corpus(out: Path) -> None:
    """The demo's corpus in three folders: train, choose (for learning rates) and test."""
    if (out / "corpus" / "test").exists():
        return
    whole = write_corpus(out / "whole")
    for i, path in enumerate(sorted(whole.glob("*.txt"))):
        folder = out / "corpus" / {5: "choose", 11: "test"}.get(i % 12, "train")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / path.name)


class Runs:
    """The runs of one output folder; each is made once."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.file = out / "runs.jsonl"
        self.done = {r["key"]: r for r in read_lines(self.file)}

    def start(self, start: str, seed: int) -> Path:
        """The model every strategy of a start and seed begins with."""
        folder = self.out / f"start-{start}-{seed}"
        if not (folder / "model" / "model.safetensors").exists():
            shutil.rmtree(folder, ignore_errors=True)
            extra = [f"stages[0].steps={STARTS[start]}", f"seed={seed}"]
            self._train("start", folder, extra, held_out="test")
        return folder / "model"

    def run(self, start: str, strategy: str, seed: int, lr: float) -> dict[str, Any]:
        """One run: what it measured. Its folder is removed again."""
        key = f"{start}/{strategy}/{seed}/{lr:g}"
        if key in self.done:
            return self.done[key]
        choosing = seed == CHOICE_SEED
        extra = [f"model={self.start(start, seed)}", f"stages[0].lr={lr}", f"seed={100 + seed}"]
        extra += ["evidence.flow_every=1000", "eval.every=1000"] if choosing else []
        folder = self.out / "run"
        shutil.rmtree(folder, ignore_errors=True)
        recipe = self._train(strategy, folder, extra, held_out="choose" if choosing else "test")
        record = {"key": key, "start": start, "strategy": strategy, "seed": seed, "lr": lr, **measured(folder)}
        if not choosing and any(r.remove for r in recipe.stages[0].routes):
            record["saved_model_loss"] = saved_loss(recipe, folder / "model")
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self.done[key] = record
        print(f"{key:34} held-out {record['loss']:.4f}", flush=True)
        return record

    def chosen(self, start: str, strategy: str) -> float:
        """The learning rate of a strategy."""
        grid = list(GRID)
        while True:
            losses = {lr: self.run(start, strategy, CHOICE_SEED, lr)["loss"] for lr in grid}
            best = min(losses, key=losses.__getitem__)
            at = WIDER.index(best)
            if best == grid[0] and at > 0:
                grid.insert(0, WIDER[at - 1])
            elif best == grid[-1] and at < len(WIDER) - 1:
                grid.append(WIDER[at + 1])
            else:
                return best

    def _train(self, name: str, folder: Path, extra: Sequence[str], *, held_out: str) -> Recipe:
        corpus = self.out / "corpus"
        paths = [f"data.train={corpus / 'train'}", f"data.held_out={corpus / held_out}"]
        recipe = load_recipe(DOCS / f"{name}.yaml", overrides=[*paths, *extra])
        result = train(recipe, out=folder)
        if not result.audit.passed:
            raise SystemExit(f"{folder}: the audit did not pass; see `frostline audit {folder}`")
        return recipe


def measured(folder: Path) -> dict[str, Any]:
    """What a finished run recorded: its curve, its loss, and the bias of the FFN's gradients per layer."""
    curve = [(r["step"], r["held_out_loss"]) for r in read_lines(folder / "metrics.jsonl") if "held_out_loss" in r]
    flows = list(read_lines(folder / "evidence" / "flow.jsonl"))
    bias = [{"step": r["step"], "ffn": ffn_cosines(r["bias"])} for r in flows]
    return {"loss": curve[-1][1], "curve": curve, "bias": bias}


def ffn_cosines(bias: dict[str, list[float] | None]) -> list[float | None]:
    """Per layer, the mean cosine over gate, up and down; None where no gradient arrives."""
    layers: dict[int, list[float]] = {}
    for name, found in bias.items():
        if ".ffn." in name:
            mine = layers.setdefault(int(name.split("[")[1].split("]")[0]), [])
            mine += [found[0]] if found else []
    return [statistics.mean(v) if v else None for _, v in sorted(layers.items())]


def saved_loss(recipe: Recipe, model: Path) -> float:
    """The held-out loss of a saved model as transformers runs it: with every residual connection."""
    prepared = prepare(recipe.model_copy(update={"model": str(model)}))
    batches = held_out_batches(recipe, prepared.held_out_rows, choose_device(recipe))
    loss: float = held_out_loss(load_weights(prepared), batches, next_token_loss, LoopSettings())
    return loss


def measure_cost(n_alternations: int = 9, n_steps: int = 10) -> dict[str, Any]:
    """Exact freezing beside attn.out stopped: planned FLOPs and peak, seconds of a step, alternating in one process."""
    out = {}
    for name, (sizes, rows, length) in SHAPES.items():
        fields = {"vocab_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
        fields |= {"max_position_embeddings": max(length, 256), "tie_word_embeddings": False, **sizes}
        source = ScratchModel.model_validate({"architecture": "llama", **fields})
        anatomy = read_anatomy(load_skeleton(source))
        cells: dict[str, Any] = {}
        for strategy, routes in {"exact": [], "detach": [{"stop": "attn.out"}]}.items():
            spec = StageSpec.model_validate({"learn": "ffn", "steps": 1, "lr": 1e-4, "routes": routes})
            schedule = Schedule.of([(strategy, spec, select(anatomy, "ffn"))])
            cost = make_plan(source, schedule, Batching(rows=rows, length=length)).stages[0].cost
            model = load_random(source)
            cells[strategy] = (schedule.stages[0], model, points_for(schedule, model, anatomy), cost)
        seconds: dict[str, list[float]] = {s: [] for s in cells}
        for i in range(1 + n_alternations):
            for strategy, (stage, model, points, _) in cells.items():
                took = time_stage(
                    model, anatomy, stage, rows=rows, length=length, n_vocabulary=2048, points=points, n_steps=n_steps
                )
                seconds[strategy] += [took] if i else []
        ratios = sorted(a / b for a, b in zip(seconds["exact"], seconds["detach"], strict=True))
        exact, detach = cells["exact"][3], cells["detach"][3]
        out[name] = {
            "hidden_size": sizes["hidden_size"], "rows": rows, "length": length,
            "alternations": n_alternations, "steps_each": n_steps,
            "time_ratio": {"median": statistics.median(ratios), "low": ratios[0], "high": ratios[-1]},
            "milliseconds": {s: 1000 * statistics.median(v) for s, v in seconds.items()},
            "planned_flops": {"exact": exact.total_flops, "detach": detach.total_flops,
                              "ratio": exact.total_flops / detach.total_flops},
            "planned_peak_bytes": {"exact": exact.peak_bytes, "detach": detach.peak_bytes},
        }  # fmt: skip
        print(name, json.dumps(out[name]), flush=True)
    return out


def planned_steps() -> dict[str, dict[str, float]]:
    """Per strategy, what the plan says of one step of the demo's model."""
    start = load_recipe(DOCS / "start.yaml")
    anatomy = read_anatomy(load_skeleton(start.model))
    batching = Batching(rows=start.data.batch, length=start.data.length)
    out = {}
    for strategy in LABELS:
        spec = load_recipe(DOCS / f"{strategy}.yaml").stages[0]
        schedule = Schedule.of([(strategy, spec, select(anatomy, spec.learn))])
        cost = make_plan(start.model, schedule, batching).stages[0].cost
        out[strategy] = {"gflop": cost.total_flops / 1e9, "peak_mib": cost.peak_bytes / 2**20}
    return out


def summary(runs: Runs, cost: dict[str, Any]) -> dict[str, Any]:
    """Everything that the page says, from what is recorded."""
    found: dict[str, Any] = {}
    for start, strategy in jobs():
        lr = runs.chosen(start, strategy)
        mine = [runs.run(start, strategy, seed, lr) for seed in SEEDS]
        choice = {r["lr"]: r["loss"] for r in runs.done.values()
                  if (r["start"], r["strategy"], r["seed"]) == (start, strategy, CHOICE_SEED)}  # fmt: skip
        found.setdefault(start, {})[strategy] = {
            "lr": lr,
            "losses": [round(r["loss"], 4) for r in mine],
            "mean": round(statistics.mean(r["loss"] for r in mine), 4),
            "saved_model_losses": [round(r.get("saved_model_loss", r["loss"]), 4) for r in mine],
            "choice": {f"{k:g}": round(v, 4) for k, v in sorted(choice.items())},
            "curves": [[(step, round(loss, 4)) for step, loss in r["curve"]] for r in mine],
            "bias": mean_bias([r["bias"] for r in mine]),
        }
    for of_start in found.values():
        before = [c[0][1] for c in of_start["exact"]["curves"]]
        of_start["no further training"] = {"losses": before, "mean": round(statistics.mean(before), 4)}
    return {"starts": STARTS, "seeds": SEEDS, "choice_seed": CHOICE_SEED, "results": found, "cost": cost}


def mean_bias(of_seeds: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The cosines per step and layer as mean, lowest and highest over seeds; None where no gradient arrives."""
    out = []
    for rows in zip(*of_seeds, strict=True):
        layers = zip(*(r["ffn"] for r in rows), strict=True)
        cosines = [
            None if None in v else [round(x, 4) for x in (statistics.mean(v), min(v), max(v))]
            for v in map(list, layers)
        ]
        out.append({"step": rows[0]["step"], "ffn": cosines})
    return out


def curves_figure(results: dict[str, Any]) -> Figure:
    """Held-out loss over steps, one panel per start: mean of the seeds, shaded from lowest to highest."""
    figure = Figure(figsize=(WIDTH_IN, 7.4), layout="constrained")
    colors = mpl.colormaps["tab10"]
    for axes, (start, of_start) in zip(figure.subplots(2, 1), results.items(), strict=True):
        shown = [s for s in (*STRATEGIES, "all-local") if s in of_start]
        before = of_start["no further training"]["mean"]
        lowest = min(of_start[s]["mean"] for s in shown)
        top = before + 0.25 * (before - lowest)
        for i, strategy in enumerate(shown):
            curves = of_start[strategy]["curves"]
            steps = [step for step, _ in curves[0]]
            values = list(zip(*([loss for _, loss in c] for c in curves), strict=True))
            mean = [statistics.mean(v) for v in values]
            label = LABELS[strategy] + (f"\n(above: ends at {mean[-1]:.2f})" if mean[-1] > top else "")
            axes.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=colors(i), alpha=0.15)
            axes.plot(steps, mean, color=colors(i), lw=1.5, marker="o", ms=3, label=label)
        axes.axhline(before, color="#555555", lw=0.8, ls=":", label="no further training")
        axes.set_ylim(lowest - 0.12 * (before - lowest), top)
        axes.set_title(f"after {STARTS[start]} common steps", loc="left", fontsize=10)
        axes.set_xlabel("step of the stage")
        axes.set_ylabel("held-out loss (nats per token)")
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def bias_figure(results: dict[str, Any]) -> Figure:
    """Cosine of the FFN's routed to its true gradient per layer, attn.out stopped, at the first and last step."""
    figure = Figure(figsize=(WIDTH_IN, 2.9), layout="constrained")
    colors = mpl.colormaps["tab10"]
    for axes, (start, of_start) in zip(figure.subplots(1, 2, sharey=True), results.items(), strict=True):
        for i, (strategy, label) in enumerate((("detach", "stop attn.out"), ("local", "block-local"))):
            for at, style in ((0, ":"), (-1, "-")):
                row = of_start[strategy]["bias"][at]
                values = [v if v is not None else (None,) * 3 for v in row["ffn"]]
                mean, low, high = zip(*values, strict=True)
                layers = range(len(values))
                axes.plot(layers, mean, color=colors(1 + i), ls=style, marker="o", ms=4, lw=1.4,
                          label=f"{label}, step {row['step']}")  # fmt: skip
                axes.vlines(layers, low, high, color=colors(1 + i), lw=1)
        axes.axhline(1, color="#555555", lw=0.6, ls=":")
        axes.axhline(0, color="#555555", lw=0.6)
        axes.set_xticks(list(layers))
        axes.set_xlabel("layer of the FFN")
        axes.set_title(f"after {STARTS[start]} common steps", loc="left", fontsize=10)
        axes.set_ylim(-0.6, 1.08)
    figure.axes[0].set_ylabel("cosine to the true gradient")
    figure.axes[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def write(runs: Runs, cost: dict[str, Any]) -> None:
    """The summary and the figures, into `docs/routes`."""
    found = summary(runs, cost)
    (DOCS / "results.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
    for name, draw in (("curves", curves_figure), ("bias", bias_figure)):
        with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
            draw(found["results"]).savefig(DOCS / f"{name}.svg", metadata={"Date": None})
    for start, of_start in found["results"].items():
        print(f"\nafter {STARTS[start]} common steps")
        for name, r in sorted(of_start.items(), key=lambda item: item[1]["mean"]):
            saved = r.get("saved_model_losses", r["losses"])
            print(f"  {name:22} lr {r.get('lr', 0):7g}  {r['mean']:.4f}  {min(r['losses']):.4f} to "
                  f"{max(r['losses']):.4f}  saved {statistics.mean(saved):.4f}")  # fmt: skip


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a JSONL file; none where there is no file."""
    if path.exists():
        yield from map(json.loads, path.read_text(encoding="utf-8").splitlines())


def main() -> None:
    """All of it, or the part that `--only` names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/routes"))
    parser.add_argument("--only", choices=["train", "cost", "write"])
    options = parser.parse_args()
    out = options.out.resolve()
    split_corpus(out)
    runs = Runs(out)
    if options.only in (None, "train"):
        for start, strategy in jobs():
            lr = runs.chosen(start, strategy)
            for seed in SEEDS:
                runs.run(start, strategy, seed, lr)
    if options.only in (None, "cost"):
        cost = {"planned": planned_steps(), **measure_cost()}
        (out / "cost.json").write_text(json.dumps(cost) + "\n", encoding="utf-8")
    if options.only in (None, "write"):
        write(runs, json.loads((out / "cost.json").read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
