"""One warm process for all kill trials: importing takes longer than a trial."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

DRIVER = Path(__file__).parent / "kill_driver.py"


class Driver:
    """Runs trials (see `kill_driver.py`), one after another, in folders below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.errors = (root / "errors.txt").open("a")
        self.told = (root / "errors.txt").open()
        self.process = subprocess.Popen(
            [sys.executable, str(DRIVER), str(root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        self.n = 0

    def trial(
        self, recipe: dict[str, Any], kills: list[dict[str, Any]], spoil: list[int], **more: Any
    ) -> dict[str, Any]:
        """The driver's answer: `name` (its folder), `whole` (of the run without kills), `statuses`, `differing`."""
        self.n += 1
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        plan = {"name": f"trial-{self.n}", "recipe": recipe, "kills": kills, "spoil": spoil, **more}
        self.process.stdin.write(json.dumps(plan) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):
                return {**json.loads(line), "said": self._said()}
        raise AssertionError(f"the driver ended: {self._said()}")

    def _said(self) -> str:
        """What the process has written to its standard error since the last trial."""
        return self.told.read()[-3000:]

    def close(self) -> None:
        """Let the process end."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.errors.close()
        self.told.close()
