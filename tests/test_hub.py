"""Downloads from the model hub, against a hub on this machine."""

import json
import time

import pytest
import tiny
import torch
from download_hub import COMMIT, Hub

from errors import FrankenError
from runner import hub, pairs
from runner.batch import as_sources_arrive
from runner.pairs import open_pair
from surgery import recipes as r

CONFIG = dict(hidden_size=512, intermediate_size=1024, num_attention_heads=4)  # several MB of weights


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = tiny.Tiny(tmp_path_factory.mktemp("models"), "qwen2", **CONFIG)
    for path in made.paths.values():
        tiny.tokenizer().save_pretrained(path)
    return made.paths


@pytest.fixture
def served(models, tmp_path, monkeypatch):
    from huggingface_hub import constants

    here = Hub(dict(models))
    for name, value in (("HF_ENDPOINT", here.url), ("HF_HOME", str(tmp_path / "home"))):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", here.url)
    template = here.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setenv("FRANKENMODEL_CACHE", str(tmp_path / "cache"))
    yield here
    here.close()


def weights(served, method="GET"):
    """Requests for weights, as (model, range), in order."""
    return [
        (path.split("/")[2], given)
        for how, path, given in served.asked
        if how == method and path.endswith(".safetensors")
    ]


def test_a_download_says_bytes_and_is_complete(served, models):
    told = []
    path, revision = hub.download("tiny/instruct", None, lambda here, total: told.append((here, total)))
    total = sum(f.stat().st_size for f in models["instruct"].iterdir() if f.suffix != ".md")
    assert revision == COMMIT and told[-1] == (total, total)
    assert [here for here, _ in told] == sorted(here for here, _ in told)
    for file in models["instruct"].glob("*.safetensors"):
        assert (path / file.name).read_bytes() == file.read_bytes()
    assert hub.missing("tiny/instruct", None) == (0, total)


def test_a_connection_that_breaks_is_taken_up_within_the_file(served, models):
    served.broken.add("instruct")
    path, _ = hub.download("tiny/instruct", None, lambda here, total: None)
    ranges = [given for _, given in weights(served) if given]
    assert ranges and all(int(given.removeprefix("bytes=").split("-")[0]) > 0 for given in ranges)
    for file in models["instruct"].glob("*.safetensors"):
        assert (path / file.name).read_bytes() == file.read_bytes()


def test_after_a_download_that_was_stopped_only_what_is_missing_comes_in(served):
    hub.small_files("tiny/instruct", None)
    served.held.add("instruct")
    first = hub.Arriving("tiny/instruct", None)
    deadline = time.monotonic() + 60
    while not weights(served) and time.monotonic() < deadline:
        time.sleep(0.1)
    first._process.kill()
    with pytest.raises(FrankenError, match="ended|cannot download"):
        first.wait()
    served.held.clear()
    served.asked.clear()
    hub.download("tiny/instruct", None, lambda here, total: None)
    got = {path.rsplit("/", 1)[1] for how, path, _ in served.asked if how == "GET"}
    assert got == {"model.safetensors"}


def test_the_run_begins_while_the_base_still_comes_in(served, tmp_path, models):
    served.held.add("base")
    opened = open_pair(None, base="tiny/base", instruct="tiny/instruct", device_map="cpu", dtype="float32")
    live, whole = opened.live, opened.live.original
    assert live.source_names == {"instruct", "base"} and "base" not in live.sources
    # the instruct side had all of the line, and runs
    assert [model for model, _ in weights(served)][0] == "instruct"
    live.apply(r.swap(whole, 0, 1))
    live.apply(whole)
    # what needs the base waits for it, and gets what is on disk
    served.go.set()
    live.apply(r.splice(whole, "base", 2, 4))
    direct = open_pair(
        None,
        base=str(models["base"]),
        instruct=str(models["instruct"]),
        device_map="cpu",
        dtype="float32",
    )
    direct.live.apply(r.splice(whole, "base", 2, 4))
    assert live.fingerprint() == direct.live.fingerprint()
    assert not live.coming and "base" in opened.checked["weights"]
    # the manifest's record, written before the weights were here, is that of the files
    assert opened.sources["base"] == live.sources["base"].describe()
    # a second time nothing is downloaded, and nothing comes in late
    before = len(weights(served))
    again = open_pair(None, base="tiny/base", instruct="tiny/instruct", device_map="cpu", dtype="float32")
    assert not again.live.coming and len(weights(served)) == before


def test_what_needs_the_base_comes_last_while_it_is_not_here():
    class Live:
        coming = {"base": None}

    def plan(name, *sources):
        recipe = type("Recipe", (), {"sources": {"instruct", *sources}})()
        return type("Plan", (), {"name": name, "recipe": recipe})()

    plans, live = [plan("a"), plan("b", "base"), plan("c"), plan("d", "base")], Live()
    assert [p.name for p in as_sources_arrive(plans, live)] == ["a", "c", "b", "d"]
    live.coming = {}
    assert [p.name for p in as_sources_arrive(plans, live)] == ["a", "b", "c", "d"]


def test_a_base_that_cannot_come_in_fails_what_needs_it_alone(served, monkeypatch):
    served.held.add("base")
    opened = open_pair(None, base="tiny/base", instruct="tiny/instruct", device_map="cpu", dtype="float32")
    live = opened.live
    live.coming["base"].args[2]._process.kill()
    for _ in range(2):
        with pytest.raises(FrankenError, match="cannot download tiny/base"):
            live.apply(r.splice(live.original, "base", 0, 1))
    live.apply(r.swap(live.original, 0, 1))


def test_a_pair_that_does_not_match_is_refused_before_weights_come_in(served, tmp_path, models):
    other = tmp_path / "other"
    other.mkdir()
    for file in models["base"].iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"intermediate_size": 2048}))
    served.folders["other"] = other
    with pytest.raises(FrankenError, match="intermediate_size"):
        open_pair(None, base="tiny/other", instruct="tiny/instruct", device_map="cpu")
    assert not weights(served)


def test_an_unknown_model_is_one_line(served):
    with pytest.raises(FrankenError, match="cannot download tiny/nobody"):
        pairs.locate("tiny/nobody", None)
    late = hub.Arriving("tiny/nobody", None)
    with pytest.raises(FrankenError, match="cannot download tiny/nobody"):
        late.wait()
    assert torch.get_num_threads()  # and the process goes on
