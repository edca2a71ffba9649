"""The GPU benchmark on a tiny model of a CPU: its sections run, and write what its readers read."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SURGERY = [
    "floor: read bandwidth",
    "floor: pinned host to device",
    "floor: bf16 matrix products",
    "first load from the page cache",
    "swap of two layers, applied and undone",
    "shuffle_all applied",
    "  its extra GPU memory",
    "splice of 4 base layers from host memory, through staging buffers",
    "splice from registered pages",
    "fingerprint of all weights",
]
RESIDENT = [
    "host memory beyond the page cache",
    "processor time of this process",
    "splice of 4 layers with both models on the card",
]


def bench(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "benchmarks/gpu_bench.py", "--device", "cpu", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=160)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu_bench")
    done = bench("--only", "resident", "surgery", "--work", folder, "--output", folder / "figures.json")
    assert not [line for line in done.stderr.splitlines() if "Traceback" in line], done.stderr
    return json.loads((folder / "figures.json").read_text()), (folder / "figures.md").read_text(), done.stdout


def test_chosen_sections_run_in_their_order_and_are_timed(measured):
    figures, _, _ = measured
    assert [row["what"] for row in figures["rows"]] == SURGERY + RESIDENT
    assert list(figures["details"]["wall"]) == ["floors", "write", "load", "surgery", "resident"]
    assert list(figures["details"]["processor"]) == list(figures["details"]["wall"])


def test_every_row_says_what_was_measured_and_whether_the_target_was_reached(measured):
    figures, table, printed = measured
    for row in figures["rows"]:
        assert list(row) == ["what", "measured", "floor", "target", "ok", "note"]
        assert f"| {row['what']} | {row['measured']} | {row['floor']} |" in table
    assert table.splitlines()[4:] == printed[printed.index("| what |") :].splitlines()
    (back,) = (row for row in figures["rows"] if row["what"] == "fingerprint of all weights")
    assert back["ok"] is True and back["target"] == "back to the bit"


def test_a_trial_with_few_layers_moves_no_layer_that_is_not_there(tmp_path):
    done = bench("--only", "surgery", "--layers", 2, "--work", tmp_path)
    assert "splice of 1 base layers" in done.stdout and "Traceback" not in done.stderr, done.stderr
