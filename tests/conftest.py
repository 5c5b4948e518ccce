"""Every test runs without a network, on few threads, and never asks a model hub."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["GOMP_SPINCOUNT"] = "0"  # before torch is imported: threads that wait do not spin
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as many workers as cores
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["FROSTLINE_CACHE"] = tempfile.mkdtemp(prefix="frostline-tests-")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has it ignored in what it starts in the background
sys.path.insert(0, str(Path(__file__).parent))
