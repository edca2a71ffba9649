"""Results on disk to comparison.json, summary.md, the terminal's table and report.html."""

from __future__ import annotations

from analysis.compare import compare
from experiments import BASELINE
from reporting.vocabulary import LEGEND, summary, terminal_table
from runner.results import Run, read_json, write_json, write_text


def compare_run(run: Run, manifest: dict) -> dict:
    """What comparison.json of a run holds: its results against its baseline. Raises FrankenError if one is
    corrupt."""
    results = {name: result for name in manifest["experiments"] if (result := run.load(name)) is not None}
    return compare(results, manifest, run.path.name, BASELINE)


def write_reports(run: Run) -> str:
    """Make comparison.json, summary.md and report.html of a run; returns the terminal's table.

    Raises FrankenError if a result is corrupt or the disk refuses.
    """
    from reporting.html_report import (
        write_html,  # here: matplotlib takes a second to import, for which no run should wait
    )

    manifest = read_json(run.manifest_path)
    comparison = compare_run(run, manifest)
    write_json(run.path / "comparison.json", comparison)
    write_text(run.path / "summary.md", summary(comparison, manifest))
    write_html(run, manifest, comparison)
    return f"{terminal_table(comparison)}\n\n{LEGEND}\n\nReport: {run.path / 'report.html'}"
