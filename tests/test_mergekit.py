"""mergekit's YAML: read as experiments, written from recipes, and held against an installed mergekit."""

from dataclasses import replace

import pytest
import tiny
import torch
import yaml
from cli_runs import latest, read, refused
from exports import exporter
from safetensors.torch import load_file

import run_all
from errors import FrankenError
from planning import mergekit
from runner.export import Chosen
from surgery.recipes import (
    Mixing,
    Outer,
    Recipe,
    Ref,
    Slot,
    attenuate,
    blend,
    delete,
    identity,
    linear,
    parallel,
    permute_units,
    perturb,
    plain,
    repeat,
    reverse,
    splice,
    swap,
    with_outer,
)

NAMES = {"org/instruct": "instruct", "org/base": "base"}
MODELS = {source: name for name, source in NAMES.items()}
N = 6


def slerped(share: float, by_name=()) -> Recipe:
    """Every layer and all outside `share` of the way from instruct to base."""
    how = Mixing("slerp", False, tuple((text, (1.0 - t, t)) for text, t in by_name))
    slots = [Slot(((Ref("instruct", i), 1.0 - share), (Ref("base", i), share)), mixing=how) for i in range(N)]
    outer = Outer((("instruct", 1.0 - share), ("base", share)), Mixing("slerp"))
    return Recipe(tuple(slots), outer, outer, outer)


EXPRESSIBLE = {
    "identity": lambda r: r,
    "swap": lambda r: swap(r, 1, 4),
    "delete": lambda r: delete(r, 2, 4),
    "repeat": lambda r: repeat(r, 1, 3, 3),
    "reverse": lambda r: reverse(r, 0, N),
    "splice": lambda r: splice(r, "base", 0, 3),
    "late splice": lambda r: splice(r, "base", 3, N),
    "whole base": lambda r: with_outer(splice(r, "base", 0, N), "base"),
    "other outside": lambda r: with_outer(r, "base"),
    "blend": lambda r: blend(r, "base", linear),
    "moved blend": lambda r: swap(blend(r, "base", [0.3, 0, 0, 0.7, 0, 1]), 0, 5),
    "slerp": lambda r: slerped(0.25),
    "slerp by name": lambda r: slerped(0.25, [("mlp", 0.75), ("self_attn", 0.5)]),
}


def written(recipe: Recipe, models=MODELS, dtype: str = "float32") -> str:
    return mergekit.to_yaml(recipe, models, dict.fromkeys(models, N), dtype)


def experiment(folder, text: str, names=NAMES, layers=N) -> Recipe:
    """What a configuration is read as."""
    (folder / "mine.yaml").write_text(text)
    (found,) = mergekit.load(str(folder / "mine.yaml"))
    assert found.name == "mine"
    return found.plan(layers, 0, names).recipe


# ---- written -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_what_is_written_is_read_back_as_the_same_recipe(tmp_path, name):
    recipe = EXPRESSIBLE[name](identity(N))
    assert experiment(tmp_path, written(recipe)) == recipe


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (perturb(identity(N), 0.1, 0, [2]), "add noise, as this recipe does at position 2"),
        (permute_units(identity(N), 0), "permute units"),
        (attenuate(identity(N), 0.5, 3, 4), "scale what a layer contributes, as at position 3"),
        (parallel(identity(N), 1, 3), "side by side"),
        (splice(identity(N), "tuned", 1, 2), "tuned is an adapter"),
        (
            replace(identity(1), slots=(Slot(((Ref("instruct", 0), 0.5), (Ref("instruct", 1), 0.5))),)),
            "no two layers of one model",
        ),
        (
            replace(
                slerped(0.5), slots=(*slerped(0.5).slots[:3], *blend(identity(N), "base", linear).slots[3:])
            ),
            "by several",
        ),
        (splice(slerped(0.5), "third", 0, 1), "from one model to one other"),
    ],
)
def test_what_mergekit_does_not_do_is_refused_by_name(recipe, words):
    with pytest.raises(FrankenError, match=words):
        written(recipe, MODELS | {"third": "org/third"})


# ---- read --------------------------------------------------------------------------------------------------

FRANKENMERGE = """
slices:
- sources: [{model: org/instruct, layer_range: [0, 4]}]
- sources: [{model: org/base, layer_range: [2, 6]}]
merge_method: passthrough
dtype: bfloat16
"""
GRADIENT = """
merge_method: linear
models:
- {model: org/instruct, parameters: {weight: [1, 0]}}
- {model: org/base, parameters: {weight: [0, 0.5, 1]}}
parameters: {normalize: false}
"""
AVERAGE = """
merge_method: linear
models:
- {model: org/instruct, parameters: {weight: 1.0}}
- {model: org/base, parameters: {weight: 3.0}}
dtype: float32
"""
# the example of mergekit's own documentation, with six layers
SLERP = """
slices:
  - sources:
      - model: org/instruct
        layer_range: [0, 6]
      - model: org/base
        layer_range: [0, 6]
merge_method: slerp
base_model: org/base
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: float32
"""
FILTERED = """
merge_method: linear
slices:
- sources:
  - model: org/instruct
    layer_range: [0, 5]
    parameters: {weight: [{filter: q_proj, value: 1e-1}, {value: 1}]}
  - model: org/base
    layer_range: [1, 6]
    parameters: {weight: [{filter: q_proj, value: 0.7}, {value: 0.25}]}
- sources:
  - {model: org/base, layer_range: [1, 2], parameters: {weight: 1}}
  - {model: org/instruct, layer_range: [4, 5], parameters: {weight: 0}}
"""


def test_a_passthrough_is_its_slices_and_takes_its_ends_from_them(tmp_path):
    recipe = experiment(tmp_path, FRANKENMERGE)
    layers = [("instruct", 0), ("instruct", 1), ("instruct", 2), ("instruct", 3)]
    assert recipe.slots == tuple(plain(*at) for at in [*layers, *(("base", i) for i in range(2, 6))])
    assert (recipe.embed, recipe.norm, recipe.head) == ("instruct", "base", "base")


def test_gradients_run_over_the_layers_and_begin_outside(tmp_path):
    recipe = experiment(tmp_path, GRADIENT)
    for k, slot in enumerate(recipe.slots):
        weights = {ref.source: w for ref, w in slot.mix}
        assert weights.get("instruct", 0.0) == pytest.approx(1 - k / 5)
        assert weights.get("base", 0.0) == pytest.approx(k / 5)
        assert all(ref.layer == k for ref, _ in slot.mix)
    assert recipe.embed == recipe.head == "instruct"  # where every gradient begins


def test_weights_are_normalized_unless_told_otherwise(tmp_path):
    recipe = experiment(tmp_path, AVERAGE)
    assert recipe.slots[2].mix == ((Ref("instruct", 2), 1.0), (Ref("base", 2), 3.0))
    assert recipe.slots[2].mixing == recipe.norm.mixing == Mixing("linear", True)


def test_slerp_begins_at_its_base_and_filters_choose_tensors(tmp_path):
    recipe = experiment(tmp_path, SLERP)
    first = recipe.slots[0]
    assert [ref.source for ref, _ in first.mix] == ["base", "instruct"]
    assert first.mixing.weights_of("self_attn.q_proj.weight", (9, 9)) == (1.0, 0.0)
    assert first.mixing.weights_of("mlp.up_proj.weight", (9, 9)) == (0.0, 1.0)
    assert first.mixing.weights_of("input_layernorm.weight", (0.5, 0.5)) == (0.5, 0.5)
    assert recipe.embed == Outer((("base", 0.5), ("instruct", 0.5)), Mixing("slerp"))


BAD = {
    "another method": ("merge_method: ties\nmodels: [{model: org/base}]", "'ties' cannot be expressed"),
    "no method": ("models: [{model: org/base}]", "None cannot be expressed"),
    "an unknown key": (FRANKENMERGE + "tokenizer_source: union", "'tokenizer_source' in the configuration"),
    "a tokenizer of its own": (
        FRANKENMERGE + "tokenizer: {source: base}",
        "'tokenizer' in the configuration",
    ),
    "a chat template": (FRANKENMERGE + "chat_template: auto", "'chat_template' in the configuration"),
    "slerp of embeddings alone": (
        SLERP.replace("parameters:", "parameters:\n  embed_slerp: true", 1),
        "'embed_slerp' in the parameters of slerp",
    ),
    "a residual weight": (
        FRANKENMERGE.replace("- sources:", "- residual_weight: 0.5\n  sources:", 1),
        "'residual_weight' in a slice",
    ),
    "modules": ("merge_method: linear\nmodules: {default: {}}", "'modules' in the configuration"),
    "a scale": (FRANKENMERGE + "parameters: {scale: 0.5}", "scale 0.5 of weights cannot be expressed"),
    "a density": (AVERAGE.replace("weight: 3.0", "density: 0.5"), "'density' in the parameters of linear"),
    "no weight": (AVERAGE.replace("{weight: 3.0}", "{}"), "no weight of 'org/base'"),
    "an adapter": (FRANKENMERGE.replace("org/base", "org/base+org/lora"), "LoRA adapter"),
    "a model that is not here": (
        FRANKENMERGE.replace("org/base", "org/other"),
        "takes layers from 'org/other'",
    ),
    "too deep": (FRANKENMERGE.replace("[2, 6]", "[2, 7]"), "beyond the 6 layers"),
    "no layers": (FRANKENMERGE.replace("[2, 6]", "[6, 2]"), "holds no layer"),
    "a huge range": (FRANKENMERGE.replace("[2, 6]", "[0, 999999999]"), "not two numbers of layers"),
    "a word for layers": (FRANKENMERGE.replace("[2, 6]", "[2, six]"), "not two numbers of layers"),
    "two in a passthrough": (
        "merge_method: passthrough\nmodels: [{model: org/base}, {model: org/instruct}]",
        "takes one model a slice",
    ),
    "one model twice": (AVERAGE.replace("org/base", "org/instruct"), "'org/instruct' twice"),
    "a filter by number": (FILTERED.replace("q_proj", "layers.3.mlp"), "names layers"),
    "slerp without a base": (SLERP.replace("base_model: org/base\n", ""), "base_model names one"),
    "slerp without t": (SLERP.replace("    - value: 0.5\n", ""), "slerp has no t"),
    "infinity": (AVERAGE.replace("3.0", ".inf"), "the parameter weight is inf"),
    "weights of nothing": (AVERAGE.replace("3.0", "-1.0"), "sum to zero"),
    "unequal slices": (FILTERED.replace("[0, 5]", "[0, 2]"), "different numbers of layers"),
    "code": ("merge_method: !!python/object/apply:os.system ['echo owned']", "not YAML that can be read"),
    "an alias": ("a: &a [1]\nb: *a", "alias"),
    "a nest": ("a: " + "[" * 400 + "]" * 400, "nested too deep"),
    "many nodes": ("a: [" + "1," * 60_000 + "1]", "holds too much"),
    "two documents": ("a: 1\n---\nb: 2", "not YAML that can be read"),
    "a list": ("- 1", "holds no merge configuration"),
    "broken text": ("a: [1", "not YAML that can be read"),
    "a dtype": (FRANKENMERGE.replace("bfloat16", "int8"), "dtype 'int8'"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_refused_in_one_line_that_names_it(tmp_path, name):
    text, words = BAD[name]
    with pytest.raises(FrankenError) as refusal:
        experiment(tmp_path, text)
    assert words in str(refusal.value) and "mine" in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1 and len(str(refusal.value)) < 500


def test_a_file_over_its_size_is_not_read(tmp_path):
    (tmp_path / "mine.yaml").write_text("# " + "x" * (2 << 20))
    with pytest.raises(FrankenError, match="more than is read of such a file"):
        mergekit.load(str(tmp_path / "mine.yaml"))


# ---- in a run ----------------------------------------------------------------------------------------------


def test_a_configuration_is_an_experiment_of_a_run(go, pair, tmp_path, monkeypatch):
    import small_battery

    small_battery.use(monkeypatch)
    text = SLERP.replace("org/instruct", str(pair / "instruct")).replace("org/base", "base")
    (tmp_path / "merged.yml").write_text(text)
    code, _, err = go("--experiments-file", tmp_path / "merged.yml", "--suites", "quick")
    assert code == 0, err
    results = read(latest(tmp_path / "out"))
    assert set(results) == {"baseline_instruct", "merged"}
    assert results["merged"]["status"] == "done" and results["merged"]["weights"]["exact"]
    recipe = Recipe.from_json(results["merged"]["experiment"]["recipe"])
    assert recipe.slots[0].mixing.method == "slerp" and isinstance(recipe.head, Outer)


def test_a_model_that_the_run_has_not_is_refused_before_loading(go, tmp_path, monkeypatch):
    (tmp_path / "merged.yaml").write_text(FRANKENMERGE)
    monkeypatch.setattr(run_all, "execute", run_all.execute)
    monkeypatch.setattr("runner.replica.open_pair", lambda *a: pytest.fail("a model was loaded"))
    refused(go("--experiments-file", tmp_path / "merged.yaml"), "give it as --instruct, --base or --source")


# ---- against mergekit --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kit():
    """kit(text, folder) -> the tensors that an installed mergekit writes from the YAML."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    def merge(text: str, folder):
        config = MergeConfiguration.model_validate(yaml.safe_load(text))
        run_merge(config, str(folder), MergeOptions(quiet=True, copy_tokenizer=False))
        return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}

    return merge


def both(kit, pair: tiny.Tiny, text: str, recipe: Recipe, folder, dtype=torch.float32) -> tuple[dict, dict]:
    """(what is exported here, what mergekit writes)."""
    exporter(pair, dtype).write(Chosen("mine", recipe), folder / "ours")
    return load_file(folder / "ours" / "model.safetensors"), kit(text, folder / "theirs")


IN_BOTH = [(name, "float32") for name in EXPRESSIBLE]
IN_BOTH += [(name, "bfloat16") for name in ("swap", "other outside", "moved blend", "slerp by name")]


@pytest.mark.extra("mergekit")
@pytest.mark.parametrize("family", ["llama", "qwen2"])  # tied ends, and ends of their own
@pytest.mark.parametrize(("name", "dtype"), IN_BOTH)
def test_mergekit_writes_the_same_weights_from_our_yaml(kit, tiny_pair, tmp_path, family, name, dtype):
    pair, recipe = tiny_pair(family), EXPRESSIBLE[name](identity(N))
    if family == "qwen2" and len(recipe) != N:
        pytest.skip("mergekit keeps the old layer_types there, which transformers refuses")
    text = written(recipe, {n: str(p) for n, p in pair.paths.items()}, dtype)
    ours, theirs = both(kit, pair, text, recipe, tmp_path, getattr(torch, dtype))
    assert set(ours) == set(theirs) and {str(t.dtype) for t in theirs.values()} == {f"torch.{dtype}"}
    for key, tensor in ours.items():
        if name.startswith("slerp"):
            step = 1e-5 if dtype == "float32" else 2**-7
            torch.testing.assert_close(tensor, theirs[key], rtol=step, atol=1e-6)
        else:
            assert torch.equal(tensor, theirs[key]), key


@pytest.mark.parametrize(
    "text", [FRANKENMERGE, GRADIENT, AVERAGE, SLERP, FILTERED], ids=["passthrough", *"gasf"]
)
@pytest.mark.extra("mergekit")
def test_a_configuration_is_read_as_mergekit_reads_it(kit, tiny_pair, tmp_path, text):
    pair = tiny_pair("qwen2" if text != FRANKENMERGE else "llama")
    if text == FRANKENMERGE:  # tied ends cannot come from two models
        text = text.replace("org/base", "org/instruct")
    recipe = experiment(tmp_path, text)
    for name, source in NAMES.items():
        text = text.replace(name, str(pair.paths[source]))
    ours, theirs = both(kit, pair, text.replace("bfloat16", "float32"), recipe, tmp_path)
    assert set(ours) == set(theirs)
    for key, tensor in ours.items():
        if "slerp" in text:
            torch.testing.assert_close(tensor, theirs[key], rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(tensor, theirs[key]), key


@pytest.mark.extra("mergekit")
@pytest.mark.real
def test_mergekit_writes_a_real_models_weights_too(kit, smollm2, tmp_path):
    from runner.commands import main

    words = ["swap_distant_10_55", "--instruct", str(smollm2), "--device-map", "cpu"]
    assert main(["mergekit", *words, "--output", str(tmp_path / "mine.yaml")]) == 0
    assert main(["export", words[0], str(tmp_path / "ours"), *words[1:]]) == 0
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    theirs = kit((tmp_path / "mine.yaml").read_text(), tmp_path / "theirs")
    assert set(ours) == set(theirs) and all(torch.equal(ours[k], theirs[k]) for k in ours)
