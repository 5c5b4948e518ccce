"""What docs/integrations.md shows is what happens."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tiny
from trainers import rows

from frostline.run_folder import RunFolder

PAGE = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_the_pages_code_runs_in_its_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.model("llama").save_pretrained("base")  # type: ignore[operator]
    first, adapters, stages, again = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    quick = "max_steps=8, save_steps=4, use_cpu=True, report_to=[], dataloader_pin_memory=False"
    first = first.replace("path/to/model", "base").replace("max_steps=100", quick)
    names: dict[str, Any] = {"dataset": rows()}
    exec(first, names)
    exec(again, names)  # from its last checkpoint: nothing is left to do
    dropped = names["trainer"]
    exec(adapters, names | {"model": tiny.model("llama")})
    assert names["trainer"] is dropped
    exec(stages.replace("60", "2").replace("30", "1"), names)
    assert [s.end for s in RunFolder("runs/stages").read_schedule()] == [2, 3, 8]
