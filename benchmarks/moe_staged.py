"""The shipped recipe for mixtures on a pretrained Llama, against its dense FFN trained for as many steps.

    python benchmarks/moe_staged.py runs/moe --dense DENSE --text TEXT [--seeds 0 1 2] [--experts 4]

Per seed: upcycle, train by `frostline/recipes/moe.yaml` (routers, then experts and routers, all that is shared frozen),
and train the dense model's FFN alone with the same batches, rates and number of steps. What is printed is read from run
folders: held-out losses, the audit's verdict, attention's bytes, the largest share of an expert over the last fifth.
A run that is there already is read, not trained again.
"""

from __future__ import annotations

import argparse
from importlib.resources import files
from pathlib import Path

from frostline.audit import Audit, audit
from frostline.experts import experts_of_run
from frostline.moe import upcycle
from frostline.recipe import Recipe, load_recipe
from frostline.run import train
from frostline.run_folder import RunFolder

SHIPPED = Path(str(files("frostline"))) / "recipes" / "moe.yaml"


def main() -> None:
    """Train what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--dense", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--experts", type=int, default=4)
    asked = parser.parse_args()
    for seed in asked.seeds:
        moe, dense = asked.out / f"moe-{seed}", asked.out / f"dense-{seed}"
        base = asked.out / f"start-{seed}"
        if not base.exists():
            upcycle(asked.dense, base, experts=asked.experts, top_k=2, seed=seed)
        run_once(recipe_of(base, asked.text, seed), moe)
        run_once(dense_recipe(asked.dense, asked.text, seed), dense)
        print(f"seed {seed}: mixture {losses(moe)}; dense FFN {losses(dense)}")
        verdict = audit(moe)
        print(f"  audit {verdict.verdict}; bytes of attention that changed: {changed_bytes(verdict, '.attn.')}")
        for h in experts_of_run(moe):
            print(
                f"  {h.site}: largest share over the last fifth {h.largest_share:.3f}, 2/N {2 / h.n_experts:.3f}, "
                f"experts never used {len(h.never)}"
            )


def recipe_of(base: Path, text: str, seed: int) -> Recipe:
    """The shipped recipe on the upcycled model."""
    return load_recipe(SHIPPED, overrides=[f"model={base}", f"data.train={text}", f"seed={seed}"])


def dense_recipe(dense: str, text: str, seed: int) -> Recipe:
    """The shipped recipe's second stage on the dense model's FFN, as long as both of its stages."""
    shipped = load_recipe(SHIPPED, overrides=[f"model={dense}", f"data.train={text}", f"seed={seed}"])
    second = shipped.stages[1]
    steps = sum(s.steps or 0 for s in shipped.stages)
    stage = second.model_copy(update={"name": "ffn", "learn": "ffn", "steps": steps, "moe": None})
    return shipped.model_copy(update={"stages": (stage,)})


def run_once(recipe: Recipe, out: Path) -> None:
    """Train unless the run is there."""
    if not (out / "status.json").exists():
        train(recipe, out=out)


def losses(run: Path) -> str:
    """Held-out loss before and after."""
    folder = RunFolder.open(run)
    found = [r["held_out_loss"] for r in folder.read_lines(folder.metrics) if "held_out_loss" in r]
    return f"{found[0]:.4f} → {found[-1]:.4f}"


def changed_bytes(verdict: Audit, name: str) -> int:
    """Of all parts with `name` in their own, over all stages."""
    return sum(r.bytes_changed or 0 for r in verdict.rows if name in r.component)


if __name__ == "__main__":
    main()
