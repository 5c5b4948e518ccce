from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import tiny
from typer.testing import CliRunner

import frostline
from frostline.audit import rewind
from frostline.cli import app
from frostline.engine import StepDone
from frostline.errors import RunFolderError
from frostline.experiment import bench as bench_module
from frostline.experiment import demo as demo_module
from frostline.experiment.report import write_report
from frostline.model import load_model
from frostline.prepared import prepare
from frostline.ready import load_weights
from frostline.run import RunResult
from frostline.run_folder import RunFolder

SMALL_DEMO = [
    "model.hidden_size=32", "model.intermediate_size=48", "model.num_hidden_layers=2", "model.vocab_size=300",
    "model.num_attention_heads=2", "model.num_key_value_heads=1", "stages[0].steps=6", "stages[0].warmup=1",
    "stages[1].steps=4", "data.length=32", "data.batch=4", "eval.batches=2",
]  # fmt: skip
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def frost_demo(out: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> object:
    monkeypatch.setattr("frostline.experiment.demo.write_corpus", lambda folder: _small_corpus(folder))
    sets = [a for s in SMALL_DEMO for a in ("--set", s)]
    return CliRunner().invoke(app, ["demo", "--out", str(out), *sets, *more])


def _small_corpus(folder: Path) -> Path:
    from frostline.experiment.corpus import write_corpus

    return write_corpus(folder, n_bytes=1)  # the documentation alone


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        result = frost_demo(folder, patch)
    assert result.exit_code == 0, result.output  # type: ignore[attr-defined]
    for text in ("AUDIT PASSED", "held-out loss", "before training", "after stage ffn", "FALSE", "report:"):
        assert text in result.output  # type: ignore[attr-defined]
    return folder


def test_the_demo_ends_with_claims_that_have_numbers_and_a_page(demo: Path) -> None:
    claims = json.loads((demo / "run" / "claims.json").read_text())
    assert claims["hold"] is True
    assert all(re.search(r"\d", c["measured"]) for c in claims["claims"])
    assert (demo / "run" / "report.html").stat().st_size > 20_000


def test_breaking_a_claimed_property_turns_the_demos_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_module, "DECAY", 0.0)
    original = bench_module.Bench.update

    def no_update(self: bench_module.Bench, active: object) -> None:
        original(self, active)  # type: ignore[arg-type]
        self.learn("all")  # puts the weights back: nothing ever moves

    monkeypatch.setattr(bench_module.Bench, "update", no_update)
    result = frost_demo(tmp_path / "demo", monkeypatch)
    assert result.exit_code == 1  # type: ignore[attr-defined]
    assert "CONTRADICTS" in result.output  # type: ignore[attr-defined]


def test_the_demo_never_overwrites(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert frost_demo(demo, monkeypatch).exit_code == 2  # type: ignore[attr-defined]


def stopped_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, training gets a SIGINT after a step of its run."""

    def interrupt(event: object) -> None:
        if isinstance(event, StepDone) and event.step == step:
            signal.raise_signal(signal.SIGINT)

    for name in ("train", "resume"):
        original = getattr(demo_module, name)

        def with_signal(what: Any, *, observers: Any, original: Any = original, **keys: Any) -> RunResult:
            result: RunResult = original(what, observers=[*observers, interrupt], **keys)
            return result

        monkeypatch.setattr(demo_module, name, with_signal)


def test_a_demo_that_is_interrupted_measures_nothing_and_goes_on_to_the_same_bytes(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stopped_after(3, patch)
        result: Any = frost_demo(out, patch)
    assert result.exit_code == 75, result.output
    assert f"interrupted after step 3, and saved; run it again to go on: frostline demo --out {out}" in result.output
    assert "FALSE" not in result.output
    assert not (out / "run" / "claims.json").exists()
    changed: Any = frost_demo(out, monkeypatch, "--set", "seed=1")
    assert changed.exit_code == 2
    assert "begun with other settings" in changed.output
    with monkeypatch.context() as patch:  # in the measuring
        patch.setattr(demo_module, "sample_run", interrupted)
        again: Any = CliRunner().invoke(app, ["demo", "--out", str(out)])
    assert again.exit_code == 75, again.output
    assert "going on after step 3" in again.output
    last: Any = frost_demo(out, monkeypatch)
    assert last.exit_code == 0, last.output
    assert "the run is finished" in last.output
    assert "AUDIT PASSED" in last.output
    for name in ("metrics.jsonl", "model/model.safetensors", "claims.json", "samples.json"):
        assert (out / "run" / name).read_bytes() == (demo / "run" / name).read_bytes(), name
    done: Any = frost_demo(out, monkeypatch)
    assert done.exit_code == 2
    assert "holds a demo that is done" in done.output


def test_a_demo_that_was_killed_while_its_run_folder_was_made_starts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise SystemExit(9)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("frostline.run.describe_environment", killed)
        assert frost_demo(out, patch).exit_code == 9  # type: ignore[attr-defined]
    assert (out / "run" / "recipe.yaml").exists()
    with monkeypatch.context() as patch:
        stopped_after(1, patch)
        result: Any = frost_demo(out, patch)
    assert result.exit_code == 75, result.output


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


class Page(HTMLParser):
    """Collects tags, attributes and text; fails on tags that do not nest."""

    VOID = frozenset({"meta", "br", "link", "img", "hr", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_and_asks_the_network_for_nothing(demo: Path) -> None:
    page = Page((demo / "run" / "report.html").read_text(encoding="utf-8"))
    assert not [t for t, _ in page.tags if t in ("script", "link", "img", "iframe", "object", "embed")]
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "action"):
            value = attributes.get(name) or ""
            assert not re.match(r"(?i)(https?:)?//|javascript:|data:(?!image/png)", value), value
    css = (demo / "run" / "report.html").read_text(encoding="utf-8")
    assert "@import" not in css
    assert not re.search(r"url\((?!['\"]?#)", css)
    for text in ("Audit passed", "What moved", "Gradient received", "Claims", "Samples", "What was run", "layer 1"):
        assert text in page.text
    images = [a for t, a in page.tags if t == "svg"]
    assert len(images) == 5
    assert all(a.get("role") == "img" and a.get("aria-label") for a in images)


def test_everything_that_comes_from_data_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    folder = tmp_path / evil.replace("/", "-")
    folder.mkdir()
    frostline.train(tiny.recipe(folder), out=folder / "run")
    run = RunFolder.open(folder / "run")
    run.write_json("samples.json", {"samples": [{"when": evil, "prompt": evil, "text": evil}]})
    claim = {"key": evil, "belief": evil, "verdict": evil, "measured": evil, "holds": True, "table": [[evil]]}
    run.write_json("claims.json", {"model": evil, "n_tokens": 1, "claims": [claim]})
    text = write_report(folder / "run", to=tmp_path / "page.html").read_text(encoding="utf-8")
    assert evil not in text
    assert text.count("&lt;script&gt;") >= 9
    assert not [t for t, _ in Page(text).tags if t == "script"]


def test_a_failed_audit_is_shown_as_failed(tmp_path: Path) -> None:
    frostline.train(tiny.recipe(tmp_path), out=tmp_path / "run")
    path = tmp_path / "run" / "evidence" / "boundary-2.json"
    data = json.loads(path.read_text())
    data["hashes"]["model.embed_tokens.weight[0:320, 0:32]"] = "0" * 64
    path.write_text(json.dumps(data))
    page = Page(write_report(tmp_path / "run").read_text(encoding="utf-8"))
    assert "Audit failed" in page.text
    assert "frozen but moved" in page.text


def test_the_report_of_something_else_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no run folder"):
        write_report(tmp_path)


def test_a_run_can_be_taken_back_to_before_any_stage(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, "mixtral")
    start = load_weights(prepare(recipe)).state_dict()
    frostline.train(recipe, out=tmp_path / "run")
    run = RunFolder.open(tmp_path / "run")
    model = load_model(str(run.model))
    rewind(model, run, 0)
    assert all((v == start[n]).all() for n, v in model.state_dict().items())


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_draws_the_page_without_errors_and_without_sideways_scrolling(
    demo: Path, tmp_path: Path, width: int
) -> None:
    measure = "[document.documentElement.scrollWidth,innerWidth,document.querySelectorAll('svg').length].join(' ')"
    probe = f"<script>document.title={measure}</script>"
    html = (demo / "run" / "report.html").read_text(encoding="utf-8")
    html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html).replace("</body>", probe + "</body>")
    # a headless window has a least width of its own: the page is looked at in a frame of the width wanted
    (tmp_path / "page.html").write_text(html, encoding="utf-8")
    onload = "document.body.id=this.contentDocument.title"
    frame = f'<iframe src="page.html" width="{width}" height="900" onload="{onload}"></iframe>'
    (tmp_path / "frame.html").write_text(f"<!doctype html><body>{frame}</body>", encoding="utf-8")
    done = subprocess.run(
        [
            CHROMIUM or "", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--allow-file-access-from-files", "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=4000", "--dump-dom", f"file://{tmp_path / 'frame.html'}",
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    match = re.search(r'<body id="(\d+) (\d+) (\d+)"', done.stdout)
    assert match, done.stdout[:500]
    scroll_width, inner_width, n_figures = map(int, match.groups())
    assert n_figures == 5
    assert scroll_width <= inner_width <= width
