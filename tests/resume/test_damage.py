"""Damage, foreign files, full disks, other software: said aloud, nothing lost, never guessed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import tiny
from typer.testing import CliRunner

from frostline import audit, checkpoints, train
from frostline.cli import app
from frostline.engine import RunStarted, StepDone
from frostline.environment import hash_code
from frostline.errors import RunFolderError, StorageError
from frostline.recipe import Recipe
from frostline.resume import resume
from frostline.run_folder import RunFolder, record_sizes, rewind

STAGES = [
    {"name": "joint", "learn": "all", "steps": 5, "lr": 3e-3},
    {"name": "ffn", "learn": "ffn", "steps": 4, "lr": 3e-3},
]


def recipe(folder: Path) -> Recipe:
    saved = {"every": 2, "minutes": None, "keep": 3}
    return tiny.recipe(folder, stages=STAGES, checkpoint=saved, eval={"batches": 1})


def stop_after(step: int) -> Callable[[object], None]:
    """Send this process a SIGTERM, as a scheduler does."""

    def look(event: object) -> None:
        if isinstance(event, StepDone) and event.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return look


def digests(run: Path) -> dict[str, str]:
    names = ["metrics.jsonl", "endings.jsonl", "evidence/gradients.jsonl", "model/model.safetensors"]
    return {n: hashlib.sha256((run / n).read_bytes()).hexdigest() for n in names}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `whole`, a finished run, and `cut`, the same one stopped after step 7."""
    folder = tmp_path_factory.mktemp("runs")
    train(recipe(folder), out=folder / "whole")
    result = train(recipe(folder), out=folder / "cut", observers=[stop_after(7)])
    assert (result.state, result.steps) == ("interrupted", 7)
    return folder


@pytest.fixture
def cut(stopped: Path, tmp_path: Path) -> Path:
    """A copy of the stopped run."""
    shutil.copytree(stopped / "cut", tmp_path / "cut")
    return tmp_path / "cut"


def newest(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("step-?????????"))[-1]


def test_a_stopped_run_is_audited_as_interrupted_and_says_how_to_go_on(cut: Path, stopped: Path) -> None:
    assert audit(cut).verdict == "interrupted"
    shown = CliRunner().invoke(app, ["audit", str(cut)])
    assert (shown.exit_code, "frostline resume" in shown.output) == (75, True)
    done = CliRunner().invoke(app, ["resume", str(cut)])
    assert done.exit_code == 0, done.output
    assert "going on after step 7" in done.output
    assert digests(cut) == digests(stopped / "whole")
    again = CliRunner().invoke(app, ["resume", str(cut)])
    assert (again.exit_code, "is finished" in again.output) == (2, True)


def test_only_so_many_checkpoints_are_kept(cut: Path) -> None:
    assert [p.name for p in sorted((cut / "checkpoints").iterdir())] == [f"step-{k:09d}" for k in (5, 6, 7)]


FILES = ["weights.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json"]


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", [cut_short, flip_a_bit, empty, Path.unlink])
def test_a_damaged_checkpoint_is_set_aside_aloud_and_the_one_before_taken(
    cut: Path, stopped: Path, file: str, damage: Callable[[Path], None]
) -> None:
    damage(newest(cut) / file)
    said: list[str] = []
    resume(cut, say=said.append)
    assert any("rejected: step-000000007.corrupt" in line for line in said), said
    assert "going on after step 6" in said
    assert digests(cut) == digests(stopped / "whole")
    assert list((cut / "checkpoints").glob("*.corrupt-*"))


def test_a_checkpoint_of_another_run_or_with_a_foreign_file_is_refused(cut: Path) -> None:
    manifest = json.loads((newest(cut) / "MANIFEST.json").read_text())
    (newest(cut) / "MANIFEST.json").write_text(json.dumps(manifest | {"run": "another"}))
    six = newest(cut).with_name("step-000000006")
    (six / "extra.pkl").write_bytes(b"cos\nsystem\n.")
    said: list[str] = []
    resume(cut, say=said.append)
    assert any("belongs to another run" in line for line in said)
    assert any("extra.pkl" in line for line in said)
    assert "going on after step 5" in said


def test_when_no_checkpoint_verifies_nothing_is_started_again_silently(cut: Path) -> None:
    for path in (cut / "checkpoints").iterdir():
        flip_a_bit(path / "weights.safetensors")
    for _ in range(2):  # the second time they are set aside already
        with pytest.raises(RunFolderError, match="no checkpoint verifies"):
            resume(cut)


def test_what_a_kill_left_unfinished_is_ignored_and_reported(cut: Path, stopped: Path) -> None:
    shutil.copytree(newest(cut), cut / "checkpoints" / "step-000000008.tmp-abcd")
    said: list[str] = []
    resume(cut, say=said.append)
    assert any("ignored: step-000000008.tmp-abcd" in line for line in said)
    assert digests(cut) == digests(stopped / "whole")


def test_killed_before_the_first_checkpoint_it_starts_again_and_says_so(cut: Path, stopped: Path) -> None:
    shutil.rmtree(cut / "checkpoints")
    RunFolder(cut).write_status("running", step=0)
    said: list[str] = []
    resume(cut, say=said.append)
    assert said == ["no checkpoint was written yet: starting again"]
    assert digests(cut) == digests(stopped / "whole")


def test_two_processes_never_work_on_one_run(cut: Path) -> None:
    with RunFolder(cut).locked(), pytest.raises(RunFolderError, match="another process is working"):
        resume(cut)


def test_changed_data_are_refused_with_old_and_new(tmp_path: Path) -> None:
    train(recipe(tmp_path), out=tmp_path / "cut", observers=[stop_after(6)])
    text = next(p for p in tmp_path.iterdir() if p.suffix == ".txt")
    text.write_text(text.read_text() + " and one more word")
    with pytest.raises(RunFolderError, match=r"data .*→[\s\S]*--allow-inexact"):
        resume(tmp_path / "cut")
    said: list[str] = []
    assert resume(tmp_path / "cut", allow_inexact=True, say=said.append).state == "finished"
    assert any(line.startswith("inexact: data") for line in said)
    (told,) = [e for e in audit(tmp_path / "cut").evidence if "--allow-inexact" in e.claim]
    assert told.measured.startswith("after step 6: data ")
    assert told.passed


def test_data_and_base_that_were_moved_are_as_good_and_those_that_are_gone_are_named(
    tmp_path: Path, stopped: Path
) -> None:
    base = shutil.copytree(stopped / "whole" / "model", tmp_path / "base")
    made = tiny.recipe(tmp_path, model=str(base), stages=STAGES, eval={"batches": 1})
    train(made, out=tmp_path / "whole")
    train(made, out=tmp_path / "cut", observers=[stop_after(6)])
    (tmp_path / "elsewhere").mkdir()
    for old in (base, tmp_path / "text.txt"):
        shutil.move(old, tmp_path / "elsewhere" / old.name)
    with pytest.raises(RunFolderError, match=r"text\.txt, .*base: what the run reads is not there any more"):
        resume(tmp_path / "cut", allow_inexact=True)
    recipe_file = tmp_path / "cut" / "recipe.yaml"
    recipe_file.write_text(recipe_file.read_text().replace(str(tmp_path), str(tmp_path / "elsewhere")))
    resume(tmp_path / "cut")
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")


def test_a_folder_that_is_no_run_says_where_one_is(cut: Path) -> None:
    with pytest.raises(RunFolderError, match=r"model is no run that can be resumed.*; .*cut is one"):
        resume(cut / "model")
    with pytest.raises(RunFolderError, match=r"no run folder: it has no schedule.json; inside it are .*cut"):
        audit(cut.parent)
    with pytest.raises(RunFolderError, match=r"recipe\.yaml is a file; a run folder is what `frostline train"):
        audit(cut / "recipe.yaml")


def test_other_versions_and_threads_are_refused_by_name(cut: Path) -> None:
    path = cut / "environment.json"
    environment = json.loads(path.read_text())
    environment["threads"] += 1
    environment["packages"]["torch"] = "1.0"
    path.write_text(json.dumps(environment))
    with pytest.raises(RunFolderError, match=r"packages\.torch: 1\.0 → 2[\s\S]*threads: \d+ → \d+"):
        resume(cut)


def test_a_run_that_other_code_began_is_refused_although_its_version_is_the_same(cut: Path) -> None:
    """As one of a GPT-2 begun before the dropout of frozen embeddings was switched off: then only the version was
    written down, and a run would go on with another computation."""
    path = cut / "environment.json"
    environment = json.loads(path.read_text())
    now = environment["packages"]["frostline"]
    for then in (version("frostline"), f"{version('frostline')}+0123456789ab"):
        environment["packages"]["frostline"] = then
        path.write_text(json.dumps(environment))
        with pytest.raises(RunFolderError, match=re.escape(f"packages.frostline: {then} → {now}")):
            resume(cut)


def test_the_hash_of_code_is_of_every_name_and_every_byte(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "engine" / "b.py").write_text("y = 1\n")
    found = [hash_code(tmp_path)]
    (tmp_path / "engine" / "b.py").write_text("y = 2\n")
    found.append(hash_code(tmp_path))
    (tmp_path / "engine" / "b.py").rename(tmp_path / "b.py")
    found.append(hash_code(tmp_path))
    assert len(set(found)) == 3
    (tmp_path / "notes.txt").write_text("no code")
    assert hash_code(tmp_path) == found[-1]


def test_an_edited_recipe_is_refused_with_old_and_new_and_how_to_save_may_be_edited(cut: Path, stopped: Path) -> None:
    text = (cut / "recipe.yaml").read_text()
    (cut / "recipe.yaml").write_text(text.replace("seed: 0", "seed: 1"))
    with pytest.raises(RunFolderError, match="recipe seed: 0 → 1"):
        resume(cut)
    assert len(list((cut / "checkpoints").glob("step-?????????"))) == 3, "none may be set aside for this"
    (cut / "recipe.yaml").write_text(text.replace("keep: 3", "keep: 1").replace("policy: halt", "policy: skip"))
    edited = (cut / "recipe.yaml").read_text().replace("freed_memory: auto", "freed_memory: return")
    assert "freed_memory: return" in edited
    (cut / "recipe.yaml").write_text(edited)
    resume(cut)
    assert digests(cut) == digests(stopped / "whole")


def test_records_that_lost_lines_are_an_error(cut: Path) -> None:
    cut_short(cut / "metrics.jsonl")
    with (cut / "metrics.jsonl").open("r+b") as file:
        file.truncate(10)
    with pytest.raises(RunFolderError, match="has lost lines"):
        resume(cut)


def garble(path: Path) -> None:
    path.write_bytes(b"\xff\x00{[" + path.read_bytes()[4:])


@pytest.mark.parametrize("harm", [Path.unlink, garble], ids=["gone", "garbled"])
@pytest.mark.parametrize(
    "name",
    [
        "evidence/boundary-0.json",
        "evidence/boundary-1.json",
        "evidence/entry-0.safetensors",
        "evidence/entry-1.safetensors",
        "evidence/gradients.jsonl",
        "metrics.jsonl",
        "endings.jsonl",
    ],
)
def test_a_record_that_the_audit_needs_is_missed_before_the_run_goes_on(
    cut: Path, name: str, harm: Callable[[Path], None]
) -> None:
    harm(cut / name)
    before = {p: p.read_bytes() for p in sorted(cut.rglob("*")) if p.is_file()}
    with pytest.raises(RunFolderError, match=re.escape(Path(name).name)):
        resume(cut)
    assert {p: p.read_bytes() for p in sorted(cut.rglob("*")) if p.is_file()} == before


def test_evidence_that_cannot_be_taken_away_is_an_error_of_storage(cut: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, **_: bool) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(StorageError, match=r"boundary-2\.json: Permission denied"):
        rewind(RunFolder.open(cut), record_sizes(RunFolder.open(cut)) | {"boundaries": 2})


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_disk_that_fails_ends_the_run_with_a_message_and_loses_nothing(
    tmp_path: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    calls = [0]
    original: Callable[[Path], None] = checkpoints.sync

    def fail(path: Path) -> None:
        calls[0] += 1
        if calls[0] > 12:
            raise OSError(number, os.strerror(number))
        original(path)

    monkeypatch.setattr(checkpoints, "sync", fail)
    with pytest.raises(StorageError, match="cannot write"):
        train(recipe(tmp_path), out=tmp_path / "run")
    monkeypatch.undo()
    assert not list((tmp_path / "run" / "checkpoints").glob("*.tmp-*"))
    assert resume(tmp_path / "run").state == "finished"
    assert digests(tmp_path / "run") == digests(stopped / "whole")


def test_too_little_space_is_noticed_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore
    with pytest.raises(StorageError, match="are free"):
        train(recipe(tmp_path), out=tmp_path / "run")


def test_a_symbolic_link_in_place_of_a_checkpoint_is_never_followed(cut: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.move(newest(cut), moved)
    (cut / "checkpoints" / "step-000000007").symlink_to(moved)
    said: list[str] = []
    resume(cut, say=said.append)
    assert "going on after step 6" in said
    assert moved.exists()


def test_settings_of_resume_can_be_read_from_any_folder(cut: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(cut)
    assert resume(".").state == "finished"


def test_no_run_and_no_folder_are_said(tmp_path: Path) -> None:
    for folder, message in ((tmp_path / "nothing", "no run folder"), (tmp_path, "no run that can be resumed")):
        with pytest.raises(RunFolderError, match=message):
            resume(folder)


def test_an_input_error_of_the_disk_sets_no_checkpoint_aside(cut: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_path: Path) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(checkpoints, "hash_file", fail)
    with pytest.raises(StorageError, match="cannot read"):
        resume(cut)
    monkeypatch.undo()
    assert resume(cut).state == "finished"


def test_stopped_again_before_its_first_step_a_resumed_run_keeps_its_only_checkpoint(
    cut: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in sorted((cut / "checkpoints").iterdir())[:-1]:
        shutil.rmtree(path)
    monkeypatch.setattr(checkpoints, "reached", lambda _: pytest.fail("the same step must not be written again"))

    def stop_at_once(event: object) -> None:
        if isinstance(event, RunStarted):
            os.kill(os.getpid(), signal.SIGTERM)

    result = resume(cut, observers=[stop_at_once])
    monkeypatch.undo()
    assert (result.state, result.steps) == ("interrupted", 7)
    assert resume(cut).state == "finished"
    assert digests(cut) == digests(stopped / "whole")


@pytest.mark.parametrize("name", ["status.json", "environment.json"])
def test_emptied_records_are_an_error_of_the_folder(cut: Path, name: str) -> None:
    (cut / name).write_text('{"schema": 1}')
    with pytest.raises(RunFolderError):
        resume(cut)


def test_what_was_edited_in_a_recipe_is_told_key_by_key(cut: Path) -> None:
    text = (cut / "recipe.yaml").read_text()
    edited = (
        text.replace("steps: 4", "steps: 6").replace("batch: 4", "batch: 2").replace("name: adamw", "name: adam", 1)
    )
    (cut / "recipe.yaml").write_text(edited)
    with pytest.raises(RunFolderError) as caught:
        resume(cut)
    lines = [line.strip() for line in str(caught.value).splitlines() if "→" in line]
    assert lines == [
        "recipe data.batch: 4 → 2",
        'recipe stages[0].optimizer.name: "adamw" → "adam"',
        "recipe stages[1].steps: 4 → 6",
    ]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("steps: 5", "steps: 6", r"stages\[0\] is over: it cannot be edited any more"),
        ("learn: ffn", "learn: attn", r"stages\[1\]\.learn: ffn → attn: the stage is under way"),
        ("steps: 4", "steps: 1", r"stages\[1\] would end after step 6, and step 7 is done"),
        ("steps: 4", "steps: 7", None),
    ],
)
def test_edits_that_no_resume_can_do_are_refused_whatever_is_allowed_and_others_are_done(
    cut: Path, old: str, new: str, said: str | None
) -> None:
    recipe_file = cut / "recipe.yaml"
    recipe_file.write_text(recipe_file.read_text().replace(old, new))
    if said is None:
        result = resume(cut, allow_inexact=True)
        assert (result.state, result.steps, result.audit.passed) == ("finished", 12, True)
        return
    with pytest.raises(RunFolderError, match=said):
        resume(cut, allow_inexact=True)
    recipe_file.write_text(recipe_file.read_text().replace(new, old))
    assert resume(cut).state == "finished"


def test_another_optimizer_in_the_stage_under_way_is_refused(cut: Path) -> None:
    text = (cut / "recipe.yaml").read_text()
    head, tail = text[: text.rindex("name: adamw")], text[text.rindex("name: adamw") :]
    (cut / "recipe.yaml").write_text(head + tail.replace("name: adamw", "name: adafactor"))
    with pytest.raises(RunFolderError, match=r"stages\[1\]\.optimizer\.name: adamw → adafactor"):
        resume(cut, allow_inexact=True)


def test_a_log_that_a_kill_has_cut_is_audited_up_to_there_and_resumed(cut: Path, stopped: Path) -> None:
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "loss"')
    RunFolder(cut).write_status("running", step=0)
    (follows,) = [e for e in audit(cut).evidence if "log lacks" in e.claim]
    assert follows.passed
    resume(cut)
    assert digests(cut) == digests(stopped / "whole")


def test_a_log_that_lacks_a_step_or_has_one_twice_fails_the_audit(stopped: Path, tmp_path: Path) -> None:
    for change in (lambda rows: rows[:3] + rows[4:], lambda rows: [*rows[:4], *rows[3:]]):
        run = shutil.copytree(stopped / "whole", tmp_path / "run")
        rows = [r for r in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in r]
        (run / "metrics.jsonl").write_text("\n".join(change(rows)) + "\n")
        (follows,) = [e for e in audit(run).evidence if "log lacks" in e.claim]
        assert "follows step" in follows.measured
        assert not follows.passed
        shutil.rmtree(run)
