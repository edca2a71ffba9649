"""Put the repository root behind this folder on the import path, so that scripts here find stats.py and the rest."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
DATA = HERE / "data"
RESULTS = HERE / "results"

for _folder in (ROOT, HERE):
    if str(_folder) not in sys.path:
        # Before site-packages: the root has an evaluate.py, and so has a popular package.
        sys.path.insert(0, str(_folder))
