"""What the documentation shows is what happens: every code block and every path in it is tried."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from typer.testing import CliRunner

import frostline
from frostline.cli import app
from frostline.recipe import dump_yaml
from frostline.recipe.describe import recipe_markdown
from frostline.recipe.yaml_text import parse_yaml
from frostline.selection import GROUPS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small base model, a text, and the README's recipe pointing at them with fewer steps."""
    folder = tmp_path_factory.mktemp("readme")
    data: dict[str, Any] = {"train": str(tiny.write_text(folder / "text.txt")), "length": 32, "batch": 4}
    small = tiny.recipe_dict(folder, data=data)
    frostline.train(frostline.recipe_from_dict(small), out=folder / "base")
    values = parse_yaml(blocks("yaml")[0], where="README").values
    values["model"], values["data"] = str(folder / "base" / "model"), data
    for stage in values["stages"]:
        stage["steps"] = 2
    (folder / "recipe.yaml").write_text(dump_yaml(values))
    return folder


def test_the_readmes_recipe_is_read_as_written(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(blocks("yaml")[0])
    loaded = frostline.load_recipe(tmp_path / "recipe.yaml")
    assert [s.learn for s in loaded.stages] == ["all", "ffn"]
    assert loaded.stages[0].lr == 1e-3


def test_the_readmes_commands_run(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    lines = [line for block in blocks("console") for line in block.splitlines() if line.startswith("$ frostline")]
    assert len(lines) >= 3
    for line in lines:
        words = shlex.split(line.split("   #")[0])[2:]
        words = [w.replace("layers[2:]", "layers[1:]") for w in words]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, (line, result.output)


def test_the_readmes_stages_run(workplace: Path) -> None:
    recipe = parse_yaml((workplace / "recipe.yaml").read_text(), where="recipe.yaml").values
    values = {**recipe, **parse_yaml(blocks("yaml")[1], where="README").values, "eval": {"batches": 1}}
    warm, repeated, polish = values["stages"]
    assert warm["tokens"] == 100_000
    warm |= {"tokens": 300, "warmup": 1}
    repeated["stages"][0]["steps"] = repeated["stages"][1]["steps"] = 2
    polish |= {"epochs": 0.1, "plateau": {"every": 1, "patience": 3}}
    result = frostline.train(frostline.recipe_from_dict(values), out=workplace / "stages")
    assert result.audit.passed
    assert result.audit.stages[1:3] == ("ffn-1", "heads-1")


def test_the_readmes_python_runs(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    main, loop = blocks("python")
    exec(main.replace("stages[0].steps=10", "stages[0].steps=1"), {})
    ids = torch.arange(20).reshape(2, 10)
    code = loop.replace("path/to/model", str(workplace / "base" / "model"))
    exec(code, {"batches": [{"input_ids": ids, "labels": ids}] * 2})


def test_every_expression_in_the_readmes_table_means_something() -> None:
    (table,) = re.findall(r"\| write \| meaning \|\n\|---\|---\|\n(.*?)\n\n", README, re.S)
    expressions = [e for row in table.splitlines()[:-1] for e in re.findall(r"`([^`]+)`", row.split("|")[1])]
    assert len(expressions) > 15
    anatomies = [tiny.anatomy(a) for a in ("llama", "gpt2", "mixtral")]
    for expression in expressions:
        shorter = expression
        for large, small in (
            ("4:8", "2:3"),
            ("layers[3]", "layers[2]"),
            ("[5]", "[3]"),
            ("128", "40"),
            ("32000", "300"),
        ):
            shorter = shorter.replace(large, small)
        if expression in ("linear_attn", "ssm", "conv", "residual", "adapter", "other"):
            continue  # parts that only some architectures have: tested with the anatomies
        assert any(_selects(a, shorter) for a in anatomies), expression
    assert {e for e in expressions if e in GROUPS} == set(GROUPS)


def _selects(anatomy: frostline.Anatomy, expression: str) -> bool:
    try:
        return frostline.select(anatomy, expression, ties="together").n_elements > 0
    except frostline.FrostlineError:
        return False


def test_the_page_of_recipe_keys_is_what_the_records_say() -> None:
    assert (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8") == recipe_markdown(), "run `make docs`"


def test_every_command_is_described_and_every_link_leads_somewhere() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    described = {word for page in pages for word in re.findall(r"`frostline (\w+)", page.read_text(encoding="utf-8"))}
    assert {c.name or c.callback.__name__ for c in app.registered_commands if c.callback} <= described
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), (page.name, target)


def test_the_story_of_freezing_has_the_numbers_of_the_readmes_table() -> None:
    page = (ROOT / "docs" / "how-parameters-update.md").read_text(encoding="utf-8")
    found = re.search(r"has norm (\S+) to (\S+) over", README)
    cosines = re.search(
        r"cosine to the true gradient ([\d., ]+), (\d\.\d+) for the FFNs.*?and (\S+) at the embedding", README
    )
    moved = re.search(r"AdamW moved (\d+) of (\d+) attention parameters", README)
    bytes_ = re.search(r"0 of (\d+) attention bytes", README)
    assert found
    assert cosines
    assert moved
    assert bytes_
    told = " ".join(page.split())
    assert f"between {found[1]} and {found[2]}" in told
    assert f"is {cosines[1]} and {cosines[2]} for the FFNs" in told
    assert f"**{cosines[3]}** at the embedding" in told
    assert f"{int(moved[1]):,} of {int(moved[2]):,}" in told
    assert f"0 of {int(bytes_[1]):,} attention bytes" in told
    for number in ("2,525,440", "1,081,344", "1.3e-07", "10.00", "`offload` 16"):
        assert number in README, number
    for number in ("2,525,440", "1,081,344", "1.3e-07", "10.00", "16 under `offload`"):
        assert number in told, number


def test_the_readmes_table_of_claims_names_every_claim() -> None:
    from frostline.experiment.claims import CLAIMS

    table = README[README.index("| | what is said") :].split("\n\n")[0]
    assert table.count("\n") == len(CLAIMS) + 1


def test_the_run_folders_tree_in_the_readme_is_what_a_run_writes(workplace: Path) -> None:
    names = re.findall(r"^  ? ?([\w.-]+\.(?:jsonl|json|yaml|safetensors))\b", README, re.M)
    assert len(names) >= 8
    written = {p.name for p in (workplace / "base").rglob("*")}
    optional = {"claims.json", "samples.json", "expansion.json", "load.jsonl", "likeness.jsonl"}
    assert set(names) - optional <= written
