"""Put the checkout behind this folder on the import path: the seed's commands are run from here, as
scripts."""

from __future__ import annotations

import sys
from pathlib import Path

_ROOT = str(Path(__file__).resolve().parent.parent)
if _ROOT not in sys.path:
    # before site-packages: the root has an evaluate.py, and so has a popular package
    sys.path.insert(0, _ROOT)
