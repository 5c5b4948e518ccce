"""The recipe: one strict record for one run. Read `Recipe` first; `load.py` makes it from a file."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator
from pydantic.types import Strict

from frostline.recipe.base import Record
from frostline.recipe.data_spec import DataSpec, Sources, one_or_many
from frostline.recipe.model_spec import ScratchModel, TrainedTokenizer
from frostline.recipe.schedule_spec import ScheduleSpec
from frostline.recipe.stage_spec import StageSpec
from frostline.secrecy import find_secret
from frostline.units import parse_bytes


def _name_or_record(value: object) -> str:
    return "name" if isinstance(value, str) else "record"


NO_STAGES = "'stages' is missing"


class EvalSpec(Record):
    """When the held-out loss is measured, beside the start and the end of every stage."""

    every: Annotated[int, Field(ge=1)] | None = None
    """Also every so many steps."""
    batches: Annotated[int, Field(ge=1)] = 8
    """Held-out batches of `data.batch` rows; always the same ones."""
    keep: Sources | None = None
    """Data of what the model is not to forget, in any format that `data` reads: its loss is measured where the held-out
    loss is, and the report shows learning against forgetting."""
    by_source: bool = False
    """Also measure every file of the held-out data and of `keep` by itself, where there are several."""

    _keep_list = field_validator("keep", mode="before")(one_or_many)


class RunRateSpec(Record):
    """One course of the learning rate across all stages; it multiplies every stage's own `lr`."""

    warmup: Annotated[int, Field(ge=0)] = 0
    """Steps of the run over which the factor rises linearly to 1."""
    decay: Literal["none", "linear", "cosine"] = "none"
    """How the factor falls to zero over the rest of the run."""


class CheckpointSpec(Record):
    """When the state of the run is saved, so that it can go on after a kill. Always also at every stage's end and when
    a signal stops the run; how often changes nothing about the result."""

    every: Annotated[int, Field(ge=1)] | None = None
    """Steps between checkpoints."""
    minutes: Annotated[float, Field(gt=0)] | None = 10.0
    """Minutes between checkpoints."""
    keep: Annotated[int, Field(ge=1)] = 2
    """So many of the newest are kept."""


class NonFiniteSpec(Record):
    """What happens when a loss or a gradient is not finite; the update never does."""

    policy: Literal["halt", "skip", "rollback"] = "halt"
    """`halt`: the run stops before the update and says where it began. `skip`: the step changes nothing, optimizer
    state included, and is counted. `rollback`: the run goes back to its newest checkpoint (of `checkpoint.every`, or of
    a stage's end) and on from there without the batches in between; the log keeps what was taken back, marked."""
    limit: Annotated[int, Field(ge=1)] = 3
    """At most so many steps in a row are skipped, or so many times in all a run goes back; the next one halts it."""


class SpikeSpec(Record):
    """When a finite loss is a spike, and what then. Off, unless a recipe has this record."""

    factor: Annotated[float, Field(gt=1)] = 2.0
    """A spike is a training loss above so many times the median of the stage's losses before it."""
    window: Annotated[int, Field(ge=2)] = 20
    """So many losses the median is of; a stage has no spike before it has so many."""
    policy: Literal["warn", "halt", "rollback"] = "warn"
    """`warn`: the step is marked in the log, and said. `halt`: the run stops before the update. `rollback`: as for
    numbers that are not finite."""
    limit: Annotated[int, Field(ge=1)] = 3
    """At most so many times in all a run goes back; the next one halts it."""


class CacheSpec(Record):
    """What the frozen blocks below everything that learns give for a row is computed once and read in later epochs and
    later runs, where that is the same to the bit."""

    prefix: Literal["auto", "on", "off"] = "auto"
    """`auto`: where it is exact and pays. `on`: wherever it is exact."""
    dir: str | None = None
    """Where it is kept; `$FROSTLINE_CACHE` or `~/.cache/frostline` when left out. Safe to delete."""
    limit: str = "10GB"
    """All of it holds at most so much: what was used longest ago goes first."""

    @field_validator("limit")
    @classmethod
    def _a_size(cls, value: str) -> str:
        parse_bytes(value)
        return value

    @property
    def limit_bytes(self) -> int:
        """The limit as a number."""
        return parse_bytes(self.limit)


class EvidenceSpec(Record):
    """What is recorded for the audit beside the hashes, which are always recorded."""

    gradients_every: Annotated[int, Field(ge=1)] = 10
    """Gradient norms per part are recorded every so many steps, and at the first and last step of a stage."""
    flow_every: Annotated[int, Field(ge=1)] | None = None
    """Steps between measurements of where gradients go (at block boundaries; bias against no stops); two further
    backward passes each. When left out: every 50, if a stage has routes or local losses, else never."""
    at_switch: Literal["everything", "changing"] = "everything"
    """What is hashed between two stages. `everything`: every tensor, and the values that the next stage starts to train
    are kept. `changing`: only what has learned or is about to, and values are kept only where a part learns for the
    first time; the rest is hashed at the start and the end of the run. For runs of many stages."""


class Recipe(Record):
    """One run: a model, data, and stages."""

    model: Annotated[
        Annotated[str, Tag("name")] | Annotated[ScratchModel, Tag("record")], Discriminator(_name_or_record)
    ]
    """A folder, a hub name, or `{architecture: llama, hidden_size: 256, …}` from scratch."""
    data: DataSpec
    """The text."""
    stages: Annotated[tuple[StageSpec, ...], Strict(False), Field(min_length=1)] = ()
    """What learns, one after another. Either this or `schedule`."""
    schedule: ScheduleSpec | None = None
    """A named schedule in place of `stages`: `{name: lisa, layers: 2, every: 20, steps: 400, lr: 1e-4}`. The run
    folder's recipe has its stages written out; `frostline schedule` prints them."""
    tokenizer: (
        Annotated[
            Annotated[str, Tag("name")] | Annotated[TrainedTokenizer, Tag("record")],
            Discriminator(_name_or_record),
        ]
        | None
    ) = None
    """A folder or hub name, or `{train: byte-bpe}`; the model's own, or a trained one from scratch, when left out."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """All randomness is a function of it: initial weights, order of the data, dropout."""
    precision: Literal["fp32", "bf16-mixed", "bf16"] = "fp32"
    """`bf16-mixed`: fp32 weights and optimizer, matrix products in bf16 (autocast). `bf16`: weights in bf16 too, in the
    saved model as well; frozen parts cost 2 bytes a parameter."""
    rounding: Literal["masters", "stochastic", "nearest"] | None = None
    """How bf16 weights take updates, with `precision: bf16`. `masters` (when left out): the optimizer works on fp32
    copies of what learns. `stochastic`: no copies; a step is computed in fp32 and rounded up or down by chance, so that
    it is right on average. `nearest`: the optimizer works in bf16; small updates are lost, the share is measured."""
    compile: Literal["off", "blocks"] = "off"
    """`blocks`: blocks are compiled by `torch.compile`, once for all that are alike. At the start of every stage one
    micro-batch is also computed uncompiled, and both must give the same gradients; held-out losses stay uncompiled."""
    recompute: Literal["auto", "off", "blocks"] | Annotated[float, Field(gt=0, lt=1)] = "auto"
    """`blocks`: a block keeps only its input and is computed again for its backward pass (gradient checkpointing). A
    share, such as 0.8, with `compile: blocks`: compiled blocks keep at most so much of what they would keep for their
    backward pass, and the cheapest of the rest is computed again. `auto`: blocks where the plan says that the run would
    not fit into memory; 0.8 for compiled blocks in fp32 on a CPU, where it costs nothing; else off."""
    deterministic: bool = False
    """Only operations that give the same bits every time; on CUDA that costs time. An operation without such a way is
    an error."""
    loss: Literal["auto", "fused", "plain"] = "auto"
    """`fused`: head and loss are computed together, some rows at a time, so that the logits of all tokens never exist;
    equal to `plain` up to rounding. `auto`: where it is exact and the logits are many."""
    freed_memory: Literal["auto", "keep", "return"] = "auto"
    """`keep`: what a step frees of the host's memory stays with the process for the next step, so that its pages need
    not be asked for again. `auto`: on a CPU, where the allocator is glibc's."""
    ties: Literal["error", "together", "untie"] = "error"
    """When a selection takes one of two tied parts: refuse, take both, or give the model separate weights first."""
    lr_across: RunRateSpec | None = None
    """Warm-up and decay across the run, in place of the stages' own: `{warmup: 100, decay: cosine}`."""
    eval: EvalSpec = EvalSpec()
    """Held-out loss."""
    nonfinite: NonFiniteSpec = NonFiniteSpec()
    """NaN and infinity."""
    spike: SpikeSpec | None = None
    """Losses that jump: `{factor: 2, window: 20, policy: warn}`; nothing is looked for when left out."""
    checkpoint: CheckpointSpec = CheckpointSpec()
    """Where the run can go on from."""
    cache: CacheSpec = CacheSpec()
    """The frozen blocks, computed once."""
    evidence: EvidenceSpec = EvidenceSpec()
    """Records for the audit."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: CUDA where there is one."""

    @model_validator(mode="after")
    def _stages_or_schedule(self) -> Recipe:
        if self.stages and self.schedule:
            raise ValueError("stages and schedule are both given: a named schedule is its stages; drop one of the two")
        if not self.stages and not self.schedule:
            raise ValueError(NO_STAGES)
        return self

    @model_validator(mode="after")
    def _shares_are_for_compiled_blocks(self) -> Recipe:
        if isinstance(self.recompute, float) and self.compile == "off":
            raise ValueError(
                f"recompute: {self.recompute} is for compiled blocks: "
                "add `compile: blocks`, or write `recompute: blocks`"
            )
        return self

    @model_validator(mode="after")
    def _stages_named_apart(self) -> Recipe:
        for name, n in Counter(stage_name(self, i) for i in range(len(self.stages))).items():
            if n > 1:
                raise ValueError(f"two stages are named '{name}'")
        return self

    @model_validator(mode="after")
    def _holds_no_secret(self) -> Recipe:
        texts = {k: v for k, v in keys_of(self.as_dict()).items() if isinstance(v, str)}
        if find_secret("\n".join(texts.values())) is not None:
            key = next((k for k, v in texts.items() if find_secret(v) is not None), "a text")
            raise ValueError(
                f"{key} holds a token, key or password. A recipe is copied into the run folder and its reports: keep "
                "the secret in an environment variable such as HF_TOKEN"
            )
        return self

    @property
    def rolls_back(self) -> bool:
        """Whether the run may go back to a checkpoint of its own."""
        return self.nonfinite.policy == "rollback" or (self.spike is not None and self.spike.policy == "rollback")

    @model_validator(mode="after")
    def _a_rollback_has_somewhere_to_go(self) -> Recipe:
        if self.rolls_back and self.checkpoint.every is None:
            raise ValueError(
                "a rollback goes back to a checkpoint of a fixed step, where a resumed run would go back to as well: "
                "say how many steps lie between them, as in checkpoint: {every: 100}"
            )
        return self

    @model_validator(mode="after")
    def _only_bf16_weights_are_rounded(self) -> Recipe:
        if self.rounding is not None and self.precision != "bf16":
            raise ValueError(f"rounding is of bf16 weights, and precision is {self.precision}: drop it, or say bf16")
        return self

    @model_validator(mode="after")
    def _compiled_blocks_hide_their_routers(self) -> Recipe:
        for i, stage in enumerate(self.stages):
            if self.compile != "off" and stage.moe is not None:
                raise ValueError(
                    f"stages[{i}].moe watches routers inside the blocks, which compiled blocks do not show: drop "
                    "one of moe and compile"
                )
        return self

    @model_validator(mode="after")
    def _one_course_of_the_rate(self) -> Recipe:
        if self.lr_across is None:
            return self
        for i, stage in enumerate(self.stages):
            if stage.warmup or stage.decay != "none":
                raise ValueError(f"stages[{i}] has a warmup or decay of its own beside lr_across; drop one of the two")
            if stage.plateau is not None and self.lr_across.decay != "none":
                raise ValueError(f"stages[{i}] may end early, so lr_across cannot decay to the end of the run")
        return self

    @model_validator(mode="after")
    def _plateaus_have_something_to_measure(self) -> Recipe:
        for i, stage in enumerate(self.stages):
            longest = stage.steps
            if stage.plateau and longest is not None and stage.plateau.every * (stage.plateau.patience + 1) >= longest:
                raise ValueError(
                    f"stages[{i}].plateau can never end the stage: every × (patience + 1) "
                    f"({stage.plateau.every} × {stage.plateau.patience + 1}) must be less than its {longest} steps"
                )
        return self

    @model_validator(mode="after")
    def _going_back_needs_what_a_stage_started_with(self) -> Recipe:
        policies = (self.nonfinite.policy, self.spike.policy if self.spike else None)
        if self.evidence.at_switch == "changing" and "rollback" in policies:
            raise ValueError(
                "evidence.at_switch: changing does not keep what a stage started with, to which a rollback may have to "
                "go back; drop one of the two"
            )
        return self

    @model_validator(mode="after")
    def _batch_divides(self) -> Recipe:
        for i, stage in enumerate(self.stages):
            if self.data.batch % stage.accumulate:
                raise ValueError(
                    f"stages[{i}].accumulate ({stage.accumulate}) does not divide data.batch ({self.data.batch})"
                )
        return self

    def as_dict(self) -> dict[str, Any]:
        """Every field with its value, defaults included, as plain data (what the run folder's recipe holds); without
        `stages` where a named schedule stands for them."""
        values = {name: plain(value) for name, value in self.model_dump().items()}
        return values if self.stages else {k: v for k, v in values.items() if k != "stages"}


def keys_of(value: Any, key: str = "") -> dict[str, Any]:
    """Nested plain data as one level: `stages[0].optimizer.name`, each with its value."""
    if isinstance(value, dict) and value:
        inner = [(f"{key}.{k}" if key else str(k), v) for k, v in value.items()]
    elif isinstance(value, list) and value:
        inner = [(f"{key}[{i}]", v) for i, v in enumerate(value)]
    else:
        return {key: value}
    return {k: v for name, part in inner for k, v in keys_of(part, name).items()}


def plain(value: Any) -> Any:
    """Tuples as lists, all the way down: what YAML and JSON have."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def stage_name(recipe: Recipe, index: int) -> str:
    """The name of stage `index` (0-based): its own, or `stage-1`, `stage-2`, …"""
    return recipe.stages[index].name or f"stage-{index + 1}"
