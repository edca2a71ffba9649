"""Results on disk to comparison.json, summary.md, the terminal's table and report.html."""

from __future__ import annotations

from analysis.compare import compare
from analysis.comparison import Comparison, from_json, to_json
from experiments import BASELINE
from reporting.injected import injected_section
from reporting.vocabulary import LEGEND, summary, terminal_table
from runner.results import Run, read_json, write_computed, write_text


def load_results(run: Run, manifest: dict) -> dict[str, dict]:
    """The experiments that have run, by name, in the manifest's order. Raises FrankenError if one is
    corrupt."""
    return {name: result for name in manifest["experiments"] if (result := run.load(name)) is not None}


def compare_run(run: Run, manifest: dict) -> Comparison:
    """A run's results against its baseline. Raises FrankenError if one is corrupt."""
    return compare(load_results(run, manifest), manifest, run.path.name, BASELINE)


def read_comparison(run: Run) -> Comparison:
    """A run's comparison.json. Raises FrankenError if it is missing, broken or of another version."""
    path = run.path / "comparison.json"
    return from_json(read_json(path), str(path))


def write_reports(run: Run) -> str:
    """Make comparison.json, summary.md and report.html of a run; returns the terminal's table.

    Each result is read and checked once. Raises FrankenError if one is corrupt or the disk refuses.
    """
    from reporting.html_report import (
        write_html,  # here: matplotlib takes a second to import, for which no run should wait
    )
    from reporting.inside import phases_section, probe_section, probed  # scikit-learn takes two seconds

    manifest = read_json(run.manifest_path)
    results = load_results(run, manifest)
    comparison = compare(results, manifest, run.path.name, BASELINE)
    write_computed(run.path / "comparison.json", to_json(comparison))
    lines = phases_section(run, results, manifest["protocol"]["seed"])
    lines += probe_section(probed(run, results, comparison, manifest))
    lines += injected_section(run, results, manifest["protocol"]["seed"])
    write_text(
        run.path / "summary.md", summary(comparison, manifest) + "\n".join([*lines, ""] if lines else [])
    )
    write_html(run, manifest, comparison, results)
    return f"{terminal_table(comparison)}\n\n{LEGEND}\n\nReport: {run.path / 'report.html'}"
