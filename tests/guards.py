"""Under which guards code can be run on this machine: in bubblewrap, or only without."""

import shutil

import pytest

from errors import FrankenError
from questions import sandbox


def _boxed() -> bool:
    try:
        sandbox.check(True)
    except FrankenError:
        return False
    return True


BOXED = shutil.which("bwrap") is not None and _boxed()
BEST: sandbox.Execute = True if BOXED else sandbox.UNSANDBOXED  # for tests of what grading makes of a run
needs_box = pytest.mark.skipif(not BOXED, reason="bubblewrap is not here, or may not make namespaces")
EACH = [pytest.param(True, marks=needs_box, id="bubblewrap"), pytest.param(sandbox.UNSANDBOXED, id="without")]
