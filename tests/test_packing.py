"""A packed run: byte for byte what it was, read like any other, and nothing lost however it ends."""

import io
import lzma
import os
import subprocess
import sys
import tarfile

import made_results as made
import pytest

import report
import run_all
from errors import FrankenError
from files import ROOT
from reporting.reports import compare_run, load_results
from reporting.vocabulary import summary
from runner import packing, results
from runner.results import Run

NAMES = ["baseline_instruct", "placebo_mlp_1", "swap_adjacent_30_35"]
REFERENCE = ROOT / "results" / "reference"


@pytest.fixture
def run(tmp_path):
    """A run of three experiments and of one that has not run, with arrays beside the first."""
    run, _ = made.make(tmp_path / "run_x", [made.result(name) for name in NAMES], missing=("later",))
    (run.path / "experiments" / f"{NAMES[0]}.npz").write_bytes(b"arrays")
    results.write_json(run.texts_path, {"schema_version": 2, "texts": {}})
    return run


def files(run) -> dict[str, bytes]:
    """Every file of a run by its path in there."""
    return {
        str(path.relative_to(run.path)): path.read_bytes() for path in run.path.rglob("*") if path.is_file()
    }


def packed(run) -> bytes:
    run.pack()
    return run.archive.read_bytes()


def tar_of(entries: list[tuple[str, bytes]], kind=tarfile.REGTYPE) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in entries:
            entry = tarfile.TarInfo(name)
            entry.size, entry.type = len(content), kind
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


# ---- there and back ----------------------------------------------------------------------------------------


def test_a_packed_and_unpacked_run_has_every_byte_it_had(run):
    before = files(run)
    count, size, small = run.pack()
    json_of = {
        name: data
        for name, data in before.items()
        if name == "texts.json" or (name.startswith("experiments/") and "json" in name)
    }
    assert "texts.json" in json_of
    assert (count, size) == (3, sum(map(len, json_of.values()))) and small < size
    assert files(run) == {n: d for n, d in before.items() if n not in json_of} | {
        "experiments.tar.xz": run.archive.read_bytes()
    }
    assert run.unpack() == 3
    assert files(run) == before


def test_plain_tar_gives_the_files_back(run):
    before = files(run)
    run.pack()
    with tarfile.open(run.archive) as tar:
        tar.extractall(run.path, filter="data")
    run.archive.unlink()
    assert files(run) == before


def test_equal_files_make_an_equal_archive(run, tmp_path):
    other, _ = made.make(tmp_path / "other", [made.result(name) for name in reversed(NAMES)])
    results.write_json(other.texts_path, {"schema_version": 2, "texts": {}})
    for file in (other.path / "experiments").iterdir():
        os.utime(file, (10**9, 10**9))
    assert packed(run) == packed(other)
    held = packing.read_archive(run.archive)
    assert packing.archive_bytes(dict(reversed(held.items()))) == run.archive.read_bytes()


def test_packing_again_and_a_folder_without_arrays(run):
    (run.path / "experiments" / f"{NAMES[0]}.npz").unlink()
    first = packed(run)
    assert not (run.path / "experiments").exists()
    assert packed(run) == first
    run.unpack()
    assert len(list((run.path / "experiments").iterdir())) == 3
    with pytest.raises(FrankenError, match="run_x is not packed"):
        run.unpack()


def test_a_run_without_experiments_is_not_packed(tmp_path):
    run, _ = made.make(tmp_path / "empty", [])
    with pytest.raises(FrankenError, match="empty holds no experiments to pack"):
        run.pack()
    assert not run.archive.exists()


def test_texts_beside_an_archive_have_to_be_its_own(run):
    wanted = run.load(NAMES[0])
    texts = run.texts_path.read_bytes()
    run.pack()
    assert not run.texts_path.exists() and Run(run.path).load(NAMES[0]) == wanted
    run.texts_path.write_bytes(texts)  # what a kill between archive and removal leaves
    assert Run(run.path).load(NAMES[0]) == wanted
    run.texts_path.write_bytes(texts.replace(b"version", b"Version"))
    with pytest.raises(FrankenError, match="texts.json is not what experiments.tar.xz has"):
        Run(run.path).load(NAMES[0])
    with pytest.raises(FrankenError, match="texts.json is not what experiments.tar.xz has"):
        run.unpack()


def test_an_archive_without_texts_takes_those_that_are_put_back_beside_it(tmp_path):
    run, _ = made.make(tmp_path / "run_y", [made.result("x", made.everything())])
    texts, wanted = run.texts_path.read_bytes(), run.load("x")
    run.texts_path.unlink()
    run.pack()
    with pytest.raises(FrankenError) as caught:
        Run(run.path).load("x")
    missing = f"{run.texts_path} is missing, and experiments.tar.xz has no file of that name either; put it"
    assert str(caught.value).startswith(missing)
    run.texts_path.write_bytes(texts)
    assert Run(run.path).load("x") == wanted


# ---- read like any other -----------------------------------------------------------------------------------


def test_every_experiment_loads_as_before_and_the_archive_is_read_once(run, monkeypatch):
    before = {name: Run(run.path).load(name) for name in [*NAMES, "later"]}
    run.pack()
    reads, checks = [], []
    whole, check = packing.read_archive, results.check
    monkeypatch.setattr(packing, "read_archive", lambda path: reads.append(path) or whole(path))

    def counting(result):
        checks.append(result["experiment"]["name"])
        check(result)

    monkeypatch.setattr(results, "check", counting)
    again = Run(run.path)
    for _ in range(2):
        assert {name: again.load(name) for name in before} == before
    assert before["later"] is None and before[NAMES[0]] is not None
    assert reads == [run.archive] and checks == NAMES


def test_an_archive_that_was_changed_is_read_and_checked_again(run):
    run.pack()
    assert run.load(NAMES[1])["status"] == "failed"
    held = packing.read_archive(run.archive)
    held[packing.member(NAMES[1])] = held[packing.member(NAMES[1])].replace(b'"failed"', b'"gone"')
    run.archive.write_bytes(packing.archive_bytes(held))
    with pytest.raises(FrankenError, match=r"placebo_mlp_1.json in .*experiments.tar.xz is corrupt .*unpack"):
        run.load(NAMES[1])


def test_the_pages_of_a_packed_run_are_the_same(tmp_path, capsys):
    made.compared(tmp_path / "run_x")
    folder = tmp_path / "run_x"
    count = len(list((folder / "experiments").iterdir()))
    pages = ("comparison.json", "summary.md")
    assert report.main([str(folder)]) == 0
    before, table = [(folder / page).read_bytes() for page in pages], capsys.readouterr().out
    assert report.main(["--pack", str(folder)]) == 0
    assert f"{folder}: {count} experiments packed, " in capsys.readouterr().out
    assert not (folder / "experiments").exists()
    for page in pages:
        (folder / page).unlink()
    assert report.main([str(folder)]) == 0
    assert [(folder / page).read_bytes() for page in pages] == before
    assert capsys.readouterr().out == table
    assert report.main(["--unpack", str(folder)]) == 0
    assert len(list((folder / "experiments").iterdir())) == count


# ---- refused -----------------------------------------------------------------------------------------------

ENTRY = (packing.member("a"), b"{}")
SPOILED = {
    "empty": lambda data: b"",
    "cut short": lambda data: data[:-20],
    "half of it": lambda data: data[: len(data) // 2],
    "a bit turned": lambda data: data[:200] + bytes([data[200] ^ 4]) + data[201:],
    "no archive": lambda data: b"version https://git-lfs.github.com/spec/v1\n",
    "more behind it": lambda data: data + b"x",
    "another archive behind it": lambda data: data + data,
    "no tar file": lambda data: lzma.compress(b"experiments" * 100),
    "a tar file without its end": lambda data: lzma.compress(tar_of([ENTRY])[:1024]),
    "a broken header inside": lambda data: lzma.compress(
        tar_of([ENTRY])[:1024] + b"x" * 512 + tar_of([ENTRY])
    ),
    "a path that leaves the folder": lambda data: lzma.compress(
        tar_of([("experiments/../../a.json", b"{}")])
    ),
    "another file": lambda data: lzma.compress(tar_of([("manifest.json", b"{}")])),
    "a link": lambda data: lzma.compress(tar_of([(ENTRY[0], b"")], tarfile.SYMTYPE)),
    "a name twice": lambda data: lzma.compress(tar_of([ENTRY, ENTRY])),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_broken_archive_is_one_line_and_is_kept(run, name, capsys):
    spoiled = SPOILED[name](packed(run))
    run.archive.write_bytes(spoiled)
    before = files(run)
    for call in (lambda: Run(run.path).load(NAMES[0]), run.pack, run.unpack):
        with pytest.raises(FrankenError, match=r"experiments\.tar\.xz is corrupt \(") as refused:
            call()
        assert "\n" not in str(refused.value)
    assert report.main([str(run.path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert files(run) == before


def test_an_archive_that_holds_too_much_is_refused(run, monkeypatch):
    run.pack()
    monkeypatch.setattr(packing, "LARGEST", 5000)
    with pytest.raises(FrankenError, match="experiments.tar.xz is corrupt .it holds over"):
        run.load(NAMES[0])


def test_a_file_that_is_not_the_archives_is_refused_by_all(run):
    content = run.file(NAMES[0]).read_bytes()
    run.pack()
    run.file(NAMES[0]).write_bytes(content + b"\n")
    before = files(run)
    for call in (lambda: Run(run.path).load(NAMES[0]), run.pack, run.unpack):
        with pytest.raises(FrankenError, match="baseline_instruct.json is not what experiments.tar.xz has"):
            call()
    assert files(run) == before


def test_nothing_is_added_to_a_packed_run(run, capsys):
    result = run.load(NAMES[0])
    run.pack()
    before = files(run)
    with pytest.raises(FrankenError, match="is packed; `python report.py --unpack"):
        run.save(result)
    assert run_all.main(["--resume", str(run.path)]) == 1
    said = capsys.readouterr().err
    assert "is packed; `python report.py --unpack" in said and said.count("\n") == 1
    assert files(run) == before


def test_a_run_at_work_or_with_a_corrupt_experiment_is_not_packed(run, capsys):
    with run.alone():
        assert report.main(["--pack", str(run.path)]) == 1
    assert "another process is at work" in capsys.readouterr().err
    run.file(NAMES[1]).write_text("{")
    before = files(run)
    assert report.main(["--pack", str(run.path)]) == 1
    assert "placebo_mlp_1.json is corrupt" in capsys.readouterr().err and files(run) == before


def test_output_is_not_for_packing(run, capsys):
    assert report.main(["--pack", str(run.path), "--output", "x"]) == 1
    assert capsys.readouterr().err.count("\n") == 1 and not run.archive.exists()


# ---- killed, or the disk full ------------------------------------------------------------------------------

KILLED = """
import os, sys
from pathlib import Path
from runner import packing
if sys.argv[2] == "replace":
    os.replace = lambda *a: os._exit(9)
else:
    steps = iter(range(int(sys.argv[2])))
    whole = packing._remove
    packing._remove = lambda path: whole(path) if next(steps, None) is not None else os._exit(9)
getattr(packing, sys.argv[3])(Path(sys.argv[1]))
"""


@pytest.mark.parametrize("action", ["pack", "unpack"])
@pytest.mark.parametrize("step", ["replace", "0", "2"])
def test_a_kill_at_any_step_loses_nothing(run, action, step):
    whole = files(run)
    loaded = {name: run.load(name) for name in NAMES}
    if action == "unpack":
        run.pack()
    ended = subprocess.run([sys.executable, "-c", KILLED, run.path, step, action], cwd=ROOT)
    assert ended.returncode == (0 if (action, step) == ("unpack", "2") else 9)  # it removes one file
    if (action, step) == ("pack", "2"):  # two files removed of three
        assert len(list(run.path.glob("experiments/*.json"))) == 1 and run.archive.exists()
    again = Run(run.path)
    assert {name: again.load(name) for name in NAMES} == loaded
    again.pack()
    again.unpack()
    assert files(run) == whole


def test_an_archive_that_was_not_written_well_removes_nothing(run, monkeypatch):
    before = files(run)
    monkeypatch.setattr(packing, "archive_bytes", lambda files: lzma.compress(tar_of([ENTRY])))
    with pytest.raises(FrankenError, match="not written as it should be; nothing is removed"):
        run.pack()
    assert files(run) == before


def test_a_full_disk_removes_nothing(run, monkeypatch):
    before = files(run)

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(os, "replace", full)
        with pytest.raises(FrankenError, match="cannot write .*No space left"):
            run.pack()
    assert files(run) == before
    run.pack()
    before = files(run)
    with monkeypatch.context() as m:
        m.setattr(os, "replace", full)
        with pytest.raises(FrankenError, match="cannot write .*No space left"):
            run.unpack()
    assert files(run) == before


# ---- the committed runs ------------------------------------------------------------------------------------


@pytest.mark.real
def test_the_reference_runs_of_real_weights_are_packed_whole():
    for name in ("smollm2-135m", "qwen2.5-coder-1.5b-replace", "smollm2-135m-russell"):
        run, manifest = Run.resume(str(REFERENCE / name))
        assert not list(run.path.glob("experiments/*.json"))
        held = packing.read_archive(run.archive)
        assert held.keys() - {packing.TEXTS} == {packing.member(n) for n in manifest["experiments"]}
        assert list(load_results(run, manifest)) == manifest["experiments"]


@pytest.mark.real
def test_a_rebuilt_reference_summary_is_the_committed_one():
    run, manifest = Run.resume(str(REFERENCE / "smollm2-135m-russell"))
    rebuilt = summary(compare_run(run, manifest), manifest)
    assert "| experiment |" in rebuilt
    assert (run.path / "summary.md").read_text().startswith(rebuilt)
