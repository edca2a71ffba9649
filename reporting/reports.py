"""Results on disk to comparison.json, summary.md, the terminal's table and report.html."""

from __future__ import annotations

from functools import partial
from importlib import import_module

from threadpoolctl import threadpool_limits

from analysis.compare import compare
from analysis.comparison import Comparison, from_json, to_json
from analysis.phases import adjusted
from command_line import held_back
from experiments import BASELINE
from reporting.harness import harness_section
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


def _import_pages() -> None:
    """Import matplotlib, and what draws with it, while other processes read the results."""
    with held_back():
        import_module("reporting.html_report")


def _write_comparison(run: Run, comparison: Comparison) -> None:
    write_computed(run.path / "comparison.json", to_json(comparison))


# matrices of a few hundred rows: threads of the processes that share the work would only wait for each other
@threadpool_limits.wrap(limits=1, user_api="blas")
def write_reports(run: Run, every_form: bool = False) -> str:
    """Make comparison.json, summary.md and report.html of a run; returns the terminal's table.

    Each result is read and checked once. every_form: figures beside the page as PNG and PDF too. Raises
    FrankenError if a result is corrupt or the disk refuses.
    """
    # here: they take a second to import, for which no run should wait
    with held_back():
        from reporting.digests import compared, digests

    manifest = read_json(run.manifest_path)
    made = digests(run, manifest, meanwhile=_import_pages)
    from reporting.html_report import EVERY_FORM, FORMS, write_html
    from reporting.inside import phases_section, probe_section, probed, standing_section

    comparison = compared(run, manifest, made)
    lines = phases_section(run, adjusted([score for digest in made.values() for score in digest.phases]))
    read = probed(run, made, comparison, manifest)
    lines += probe_section(read) if read else standing_section(run, made)
    kept = [digest.kept for digest in made.values()]
    lines += injected_section(run, kept, manifest["protocol"]["seed"])
    lines += harness_section({n: d.kept["lm_eval"] for n, d in made.items() if "lm_eval" in d.kept})
    write_text(
        run.path / "summary.md", summary(comparison, manifest) + "\n".join([*lines, ""] if lines else [])
    )
    besides = [partial(_write_comparison, run, comparison)]
    write_html(run, manifest, comparison, made, EVERY_FORM if every_form else FORMS, besides)
    return f"{terminal_table(comparison)}\n\n{LEGEND}\n\nReport: {run.path / 'report.html'}"
