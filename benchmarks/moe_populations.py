"""Two populations of text on a small mixture: which experts learn decides what is gained, and what is forgotten.

    python benchmarks/moe_populations.py runs/populations [--seeds 0 1 2] [--top 2]

A mixture of 8 experts per layer is trained from scratch on prose and code (the documentation and the sources that every
CPython carries), then on more code alone, letting learn, in every layer: the experts that code uses most
(`experts[top 2 by tokens]`, measured by the run itself), as many drawn at random, or all experts.
Everything else is frozen. Gain is the fall of the loss on held-out code, forgetting its rise on held-out prose;
intervals are 95 % bootstrap intervals over rows. A run that is there already is read, not trained again.
"""

from __future__ import annotations

import argparse
import json
import random
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from torch.nn import functional

from frostline.audit import audit
from frostline.choices import read_choice
from frostline.data import Rows, encode, iter_documents
from frostline.experts import experts_on
from frostline.model import load_model, load_tokenizer
from frostline.moe import scores_of
from frostline.recipe import recipe_from_dict
from frostline.run import train
from frostline.run_folder import RunFolder
from frostline.selection import expression_of, select

MODEL = {
    "architecture": "mixtral",
    "vocab_size": 1024,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
}
LENGTH, BATCH, ROWS = 128, 16, 160
BASE_STEPS, STEPS = 220, 60
BYTES, MORE = 340_000, 600_000
"""Characters of each population for the base, and of more code for the runs on code alone."""


def main() -> None:
    """Train what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--top", type=int, default=2)
    asked = parser.parse_args()
    text = write_populations(asked.out / "text")
    found = [of_seed(asked.out, text, seed, asked.top) for seed in asked.seeds]
    (asked.out / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for kind in found[0]["sets"]:
        for seed, one in zip(asked.seeds, found, strict=True):
            s = one["sets"][kind]
            print(
                f"{kind:>8}  seed {seed}  {s['n_learning']:>7} parameters learn, {s['parts_moved']:>2} experts moved, "
                f"{s['others_moved']} other parts; code gains {shown(s['gain'])}, prose forgets {shown(s['forgotten'])}"
            )
    for seed, one in zip(asked.seeds, found, strict=True):
        print(f"chosen − random, seed {seed}: gain on code {shown(one['better'])}; use by code {one['use']}")


def write_populations(folder: Path) -> dict[str, Path]:
    """Prose and code as files: `both` for the base, `code` for afterwards, and held-out parts of each."""
    sources = [
        p.read_text(encoding="utf-8", errors="ignore") for p in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    ]
    prose, code = "\n\n".join(topics[n] for n in sorted(topics)), sources
    random.Random(0).shuffle(code)
    code_text = "\n\n".join(code)
    held = 2 * ROWS * LENGTH * 3  # more characters than the held-out rows can need
    parts = {
        "both": prose[held : held + BYTES] + "\n\n" + code_text[held : held + BYTES],
        "code": code_text[held + BYTES : held + BYTES + MORE],
        "held-prose": prose[:held],
        "held-code": code_text[:held],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in parts.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.txt" for name in parts}


def of_seed(out: Path, text: dict[str, Path], seed: int, top: int) -> dict[str, object]:
    """The base of a seed, and the runs on code from it."""
    base = out / f"base-{seed}"
    everything = {
        "learn": "all",
        "steps": BASE_STEPS,
        "lr": 3e-3,
        "warmup": 20,
        "decay": "cosine",
        "moe": {"balance": 0.01},
    }
    run_once(base, MODEL, text["both"], everything, seed)
    start = str(base / "model")
    use = scores_of(experts_on(start, [text["code"]], length=LENGTH))["tokens"]
    generator = random.Random(seed)
    sets = {
        "chosen": f"experts[top {top} by tokens]",
        "random": expression_of({site: generator.sample(range(8), top) for site in use}),
        "all": "experts",
    }
    before = {kind: row_losses(start, text[f"held-{kind}"]) for kind in ("code", "prose")}
    results, gains = {}, {}
    for name, learn in sets.items():
        run = out / f"{name}-{seed}"
        stage = {"learn": learn, "steps": STEPS, "lr": 1e-3, "warmup": 10, "decay": "cosine"}
        run_once(run, start, text["code"], stage, seed)
        after = {kind: row_losses(str(run / "model"), text[f"held-{kind}"]) for kind in ("code", "prose")}
        gains[name] = before["code"] - after["code"]
        results[name] = {
            **moved(run),
            "gain": interval(gains[name]),
            "forgotten": interval(after["prose"] - before["prose"]),
        }
    return {
        "seed": seed,
        "sets": results,
        "better": interval(gains["chosen"] - gains["random"]),
        "use": {site: [round(s, 3) for s in shares] for site, shares in use.items()},
    }


def run_once(out: Path, model: object, text: Path, stage: dict[str, object], seed: int) -> None:
    """Train unless the run is there."""
    if (out / "status.json").exists():
        return
    data = {"train": str(text), "length": LENGTH, "batch": BATCH}
    scratch = {"tokenizer": {"train": "byte-bpe"}} if isinstance(model, dict) else {}
    train(recipe_from_dict({"model": model, "data": data, "stages": [stage], "seed": seed, **scratch}), out=out)


def row_losses(model: str, text: Path) -> np.ndarray:
    """The loss per token of every held-out row."""
    loaded, tokenizer = load_model(model).eval(), load_tokenizer(model)
    rows = Rows(encode(list(iter_documents([str(text)])), tokenizer, n_vocabulary=MODEL["vocab_size"]), LENGTH)  # type: ignore[arg-type]
    out: list[torch.Tensor] = []
    with torch.no_grad():
        for at in range(0, ROWS, BATCH):
            batch = rows.batch(range(at, at + BATCH))
            logits = loaded(input_ids=batch.input_ids, use_cache=False).logits
            each = functional.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten(), reduction="none")
            out += each.view_as(batch.labels).mean(1)
    return torch.stack(out).numpy()


def moved(run: Path) -> dict[str, int]:
    """What learned and what moved, from the run folder; every chosen part must have moved and nothing else."""
    folder, verdict = RunFolder.open(run), audit(run)
    stage, choice = folder.read_schedule()[0], read_choice(folder)
    learn = choice.of(stage.learn) if choice else stage.learn
    wanted = {c.name for c, _ in select(folder.read_anatomy(), learn).by_component()}
    changed = {r.component for r in verdict.rows if r.bytes_changed}
    if not verdict.passed or changed - wanted:
        raise SystemExit(f"{run}: audit {verdict.verdict}, moved beside what was to learn: {sorted(changed - wanted)}")
    return {
        "n_learning": stage.n_learning,
        "parts_moved": len({c.rpartition(".")[0] for c in changed}),
        "others_moved": len(changed - wanted),
    }


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean over rows with its 95 % bootstrap interval."""
    generator = np.random.default_rng(0)
    means = generator.choice(values, (2000, len(values))).mean(axis=1)
    return float(values.mean()), float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def shown(found: Iterable[float]) -> str:
    """`0.123 [0.100, 0.146]`."""
    mean, low, high = found
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


if __name__ == "__main__":
    main()
