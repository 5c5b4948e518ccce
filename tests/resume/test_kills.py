"""Real SIGKILLs of real processes: a run that is killed and resumed ends with the bytes of the run that was not."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from trials import Driver

POINTS = ["after weights", "after optimizer", "before manifest", "before rename", "after rename"]

STAGES: list[dict[str, Any]] = [
    {"name": "joint", "learn": "all", "steps": 4, "lr": 3e-3, "accumulate": 2},
    {"name": "heads", "learn": "layers[-1].attn.heads[0:2] | embed.rows[3:9]", "steps": 3, "lr": 3e-3,
     "state": "offload"},
    {"name": "ffn", "learn": "ffn", "steps": 4, "lr": {"ffn.gate": 1e-3, "rest": 3e-3}, "state": "offload",
     "plateau": {"every": 1, "patience": 2, "min_delta": 0.5}},
    {"name": "back", "learn": "attn | ffn", "steps": 3, "lr": 1e-3, "state": "keep"},
]  # fmt: skip


def recipe(folder: Path, **more: Any) -> dict[str, Any]:
    data = tiny.recipe_dict(folder)
    data |= {"stages": STAGES, "checkpoint": {"every": 3, "minutes": None}, "eval": {"every": 2, "batches": 2}}
    return data | {"evidence": {"gradients_every": 2}} | more


def check(
    driver: Driver, recipe: dict[str, Any], kills: list[list[dict[str, Any]]], spoil: list[int] | None = None
) -> Path:
    """Every run with kills ends with the bytes of the one without, whose folder is returned."""
    assert kills
    for each in kills:
        found = driver.trial(recipe, each, spoil or [])
        expected = [0 if "stop_after_step" in k else signal.SIGKILL for k in each]
        assert found["statuses"] == [*expected, 0], (each, found)
        assert found["differing"] == [], (each, found)
    return driver.root / str(found["whole"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the text lies: the same for all, so that equal recipes have one run without kills."""
    return tmp_path_factory.mktemp("text")


def test_killed_after_any_step_a_run_of_four_stages_ends_with_the_same_bytes(driver: Driver, folder: Path) -> None:
    """Slices, offloaded, kept and shared state, accumulation, rates by part, a plateau, kills at every stage's end."""
    check(driver, recipe(folder), [[{"after_step": k}] for k in range(1, 13)])


def test_killed_anywhere_inside_a_save_the_run_goes_on_from_the_save_before(driver: Driver, folder: Path) -> None:
    check(driver, recipe(folder), [[{"at": point, "count": n}] for point in POINTS for n in (1, 3)])


def test_killed_three_times_and_more_it_ends_with_the_same_bytes(driver: Driver, folder: Path) -> None:
    three = [{"after_step": 3}, {"after_step": 4}, {"after_step": 11}]
    four = [{"after_step": 2}, {"after_step": 5}, {"at": "before rename", "count": 1}, {"after_step": 9}]
    check(driver, recipe(folder), [three, four, [{"evaluated_at": 0}, {"after_step": 1}]])


def test_killed_while_the_held_out_loss_is_measured_it_ends_with_the_same_bytes(driver: Driver, folder: Path) -> None:
    check(driver, recipe(folder), [[{"measuring": n}] for n in (4, 7)])


def test_killed_in_the_middle_of_gradient_accumulation_it_ends_with_the_same_bytes(
    driver: Driver, folder: Path
) -> None:
    """Steps 1 to 4 are of two micro-batches; killed in the backward pass of one of them."""
    check(driver, recipe(folder), [[{"micro_batch": n}] for n in (2, 7, 8)])


def test_killed_before_and_after_a_switch_rebuilds_the_optimizer_it_ends_with_the_same_bytes(
    driver: Driver, folder: Path
) -> None:
    check(driver, recipe(folder), [[{"switching": n, "side": s}] for n in (2, 4) for s in ("before", "after")])


def test_killed_where_one_epoch_rolls_over_into_the_next_it_ends_with_the_same_bytes(
    driver: Driver, tmp_path: Path
) -> None:
    """A text of few rows: a batch spans two epochs, with dropout, kept state and a stage that lasts for two epochs."""
    data = recipe(tmp_path) | {"model": tiny.config("gpt2"), "ties": "together"}
    tiny.write_text(tmp_path / "text.txt", n_words=400)
    data["stages"] = [
        {"learn": "all", "epochs": 2, "lr": 1e-3},
        {"learn": "ffn", "epochs": 1.5, "lr": 1e-3, "state": "keep"},
    ]
    whole = check(driver, data, [[{"after_step": k}] for k in (2, 3, 5)])
    size = json.loads((whole / "schedule.json").read_text())["step_size"]
    assert size["n_rows"] % size["rows"], "an epoch ends inside a batch"
    assert 2 * size["n_rows"] / size["rows"] < 7, "so that the kills are around the end of an epoch"


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "optimizer", ["muon", *(pytest.param(n, marks=SLOW) for n in ("adam", "sgd", "adafactor", "adamw8bit", "lion"))]
)
def test_every_optimizers_state_survives(driver: Driver, folder: Path, optimizer: str) -> None:
    if optimizer in ("adamw8bit", "lion"):
        pytest.importorskip("bitsandbytes")
    chosen = {"name": optimizer, **({"momentum": 0.9} if optimizer == "sgd" else {})}
    stages = [{**s, "optimizer": chosen, "state": "keep"} for s in STAGES]
    check(driver, recipe(folder, stages=stages), [[{"after_step": k}] for k in (4, 8)])


def test_killed_while_the_prefix_cache_fills_it_ends_with_the_same_bytes(driver: Driver, tmp_path: Path) -> None:
    stages = [
        {"name": "last", "learn": "layers[-1]", "steps": 6, "lr": 3e-3, "accumulate": 2},
        {"name": "head", "learn": "layers[-1] | head", "steps": 4, "lr": 3e-3, "accumulate": 2},
    ]
    cache = {"prefix": "on", "dir": str(tmp_path / "cache"), "limit": "1GB"}
    data = recipe(tmp_path, stages=stages, cache=cache)
    data["data"] = {**data["data"], "held_out": 0.85}  # few rows: they come again
    kills = [[{"at": "rows synced", "count": 2}],
             [{"at": "entries synced", "count": 3}, {"at": "rows synced", "count": 1}, {"after_step": 8}]]  # fmt: skip
    check(driver, data, kills)


@pytest.mark.parametrize("state", ["reset", pytest.param("keep", marks=SLOW), pytest.param("offload", marks=SLOW)])
def test_every_policy_of_optimizer_state_survives_a_kill_in_and_between_stages(
    driver: Driver, folder: Path, state: str
) -> None:
    """Attention leaves, comes back whole, and comes back in part."""
    learns = ("attn | ffn", "ffn", "attn", "layers[1].attn.heads[1:3] | ffn.down")
    stages = [{"learn": e, "steps": 2, "lr": 3e-3, "state": state} for e in learns]
    check(driver, recipe(folder, stages=stages), [[{"after_step": k}] for k in (2, 4, 7)])


def test_routes_recomputation_and_bf16_survive(driver: Driver, folder: Path) -> None:
    stages = [
        {"name": "a", "learn": "all", "steps": 4, "lr": 3e-3, "routes": [{"stop": "attn.out", "layers": "1:"}]},
        {"name": "b", "learn": "ffn | norm", "steps": 4, "lr": 3e-3, "local_loss": "shared",
         "routes": [{"stop": "block.in", "layers": "1:"}]},
    ]  # fmt: skip
    data = recipe(folder, stages=stages, precision="bf16-mixed", recompute="blocks")
    data["evidence"] = {"gradients_every": 2, "flow_every": 2}
    check(driver, data, [[{"after_step": k}] for k in (2, 4, 7)])


def test_killed_before_during_and_after_a_rollback_the_run_goes_back_to_the_same_step(
    driver: Driver, folder: Path
) -> None:
    """Batch 5 is the second of its stage: back to the stage's start. Batch 16: back past checkpoints that stops have
    written, which a run without stops would not have."""
    stages = [{**s, "steps": n} for s, n in zip(STAGES, (4, 5, 7), strict=False)]
    stages[2].pop("plateau")
    data = recipe(folder, stages=stages, nonfinite={"policy": "rollback", "limit": 2})
    data["checkpoint"] = {"every": 4, "minutes": None, "keep": 1}
    kills: list[list[dict[str, Any]]] = [
        [{"after_step": 5}, {"rolled_back": True}],
        [{"rolled_back": True, "count": 2}],
        [{"stop_after_step": 13}, {"rolled_back": True}],
        [{"stop_after_step": 13}, {"stop_after_step": 14}, {"after_step": 13}, {"after_step": 14, "count": 2}],
        [{"at": "before rename", "count": 3}],
    ]
    whole = check(driver, data, kills, spoil=[5, 16])
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["rolled_back_to"]) for r in rows if "rolled_back_to" in r] == [(6, 4), (15, 12)]


def test_balanced_experts_survive_kills_and_rollbacks(driver: Driver, folder: Path) -> None:
    stages = [
        {"learn": "router | experts", "steps": 4, "lr": 1e-3, "moe": {"balance": 0.01, "z": 0.001}},
        {"learn": "experts[1]", "steps": 3, "lr": 1e-3},
    ]
    data = recipe(folder, model=tiny.config("mixtral"), stages=stages, nonfinite={"policy": "rollback"})
    data["checkpoint"] = {"every": 2, "minutes": None}
    check(driver, data, [[{"after_step": 1}, {"rolled_back": True}, {"after_step": 6}]], spoil=[3, 5])


DEEPSEEK = {
    "architecture": "deepseek_v3", "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48,
    "moe_intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "max_position_embeddings": 128,
}  # fmt: skip


@pytest.mark.parametrize("policy", ["skip", pytest.param("rollback", marks=SLOW)])
def test_the_load_of_a_step_that_did_not_count_moves_no_correction(driver: Driver, folder: Path, policy: str) -> None:
    """A buffer that learns by a rule, from counts that are no part of a checkpoint."""
    stages = [{"learn": "router", "steps": 6, "lr": 1e-2, "moe": {"bias": 0.01}, "accumulate": 2}]
    data = recipe(folder, model=DEEPSEEK, stages=stages, nonfinite={"policy": policy})
    data["checkpoint"] = {"every": 2, "minutes": None}
    check(driver, data, [[{"after_step": 3}, {"after_step": 5}]], spoil=[3])


# --- random runs ------------------------------------------------------------------------------------------------------

LEARN = ["all", "ffn", "attn", "norm", "all - embed", "layers[-1]", "layers[0].attn.heads[0:2] | embed.rows[3:40]"]
OPTIMIZERS = [{"name": "adamw"}, {"name": "sgd", "momentum": 0.9}, {"name": "adafactor"}, {"name": "muon"}]


@st.composite
def stages(draw: st.DrawFn) -> dict[str, Any]:
    steps = draw(st.integers(1, 4))
    plateau = {"plateau": {"every": 1, "patience": 1, "min_delta": 0.1}} if steps > 2 and draw(st.booleans()) else {}
    return {
        "learn": draw(st.sampled_from(LEARN)), "steps": steps, "lr": 3e-3, **plateau,
        "accumulate": draw(st.sampled_from([1, 2, 4])), "optimizer": draw(st.sampled_from(OPTIMIZERS)),
        "state": draw(st.sampled_from(["keep", "offload", "reset"])),
        "frozen_dropout": draw(st.sampled_from(["on", "off"])),
    }  # fmt: skip


@st.composite
def recipes(draw: st.DrawFn) -> dict[str, Any]:
    rolls_back = draw(st.booleans())
    every = draw(st.integers(1, 3)) if rolls_back else draw(st.none() | st.integers(1, 3))
    return {
        "model": tiny.config(draw(st.sampled_from(["llama", "gpt2", "mixtral"]))),
        "ties": "together",
        "stages": draw(st.lists(stages(), min_size=1, max_size=3)),
        "checkpoint": {"every": every, "minutes": None, "keep": draw(st.integers(1, 3))},
        "eval": {"every": draw(st.none() | st.integers(1, 3)), "batches": 1},
        "evidence": {"gradients_every": draw(st.integers(1, 4))},
        "precision": draw(st.sampled_from(["fp32", "bf16-mixed"])),
        "recompute": draw(st.sampled_from(["off", "blocks"])),
        "nonfinite": {"policy": "rollback" if rolls_back else "halt"},
        "seed": draw(st.integers(0, 3)),
    }


KILLS = st.one_of(
    st.builds(lambda k: {"after_step": k}, st.integers(1, 12)),
    st.builds(lambda k: {"stop_after_step": k}, st.integers(1, 12)),
    st.builds(lambda p, n: {"at": p, "count": n}, st.sampled_from(POINTS), st.integers(1, 4)),
    st.builds(lambda n: {"micro_batch": n}, st.integers(1, 12)),
    st.just({"rolled_back": True}),
)


def of_stops(driver: Driver, found: dict[str, Any], kills: list[dict[str, Any]]) -> list[list[str]]:
    """The checkpoints that one run has kept and the other has not: a stop saves one of its own, in another's place."""
    stopped = [
        k["stop_after_step"] for k, _ in zip(kills, found["statuses"][:-1], strict=False) if "stop_after_step" in k
    ]
    if not stopped:
        return []
    whole, killed = ({p.name for p in (driver.root / found[n] / "checkpoints").iterdir()} for n in ("whole", "name"))
    assert max(whole) == max(killed), found
    assert killed - whole <= {f"step-{step:09}" for step in stopped}, found
    return [["checkpoints", name] for name in whole ^ killed]


def survives(driver: Driver, folder: Path, made: dict[str, Any], kills: list[dict[str, Any]], spoiled: int) -> None:
    spoil = [spoiled] if made["nonfinite"]["policy"] == "rollback" else []
    found = driver.trial(tiny.recipe_dict(folder) | made, kills, spoil)
    assert found["statuses"][-1] == 0, found
    assert set(found["statuses"]) <= {0, signal.SIGKILL}, found
    kept_by_one = of_stops(driver, found, kills)
    assert [n for n in found["differing"] if n.split("/")[:2] not in kept_by_one] == [], found


RANDOM: dict[str, Any] = {
    "deadline": None, "database": None, "derandomize": True, "suppress_health_check": list(HealthCheck)
}  # fmt: skip


@settings(max_examples=8, **RANDOM)
@given(recipes(), st.lists(KILLS, min_size=1, max_size=3), st.integers(0, 8))
def test_any_run_killed_anywhere_ends_with_the_same_bytes(
    driver: Driver, folder: Path, made: dict[str, Any], kills: list[dict[str, Any]], spoiled: int
) -> None:
    survives(driver, folder, made, kills, spoiled)


@pytest.mark.slow
@pytest.mark.parametrize("share", range(6))
def test_many_runs_killed_anywhere_end_with_the_same_bytes(driver: Driver, folder: Path, share: int) -> None:
    """150 trials in shares of some minutes, which several workers can take."""

    @seed(share)
    @settings(max_examples=25, **RANDOM)
    @given(recipes(), st.lists(KILLS, min_size=1, max_size=3), st.integers(0, 8))
    def trial(made: dict[str, Any], kills: list[dict[str, Any]], spoiled: int) -> None:
        survives(driver, folder, made, kills, spoiled)

    trial()
