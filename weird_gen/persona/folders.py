"""Where the study's files are."""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).resolve().parent.parent  # weird_gen/
ROOT = HERE.parent
DATA = HERE / "data"
RESULTS = HERE / "results"
