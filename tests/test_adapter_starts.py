"""Every way in which the installed peft can begin a LoRA adapter, against peft's own merge: an adapter whose
beginning was taken out of the base model means another base than the one it is put on here."""

import ast
import inspect
import json
import typing

import pytest
import tiny
import torch
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora import layer as peft_layer
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from transformers import AutoModelForCausalLM

from errors import FrankenError
from surgery.weights import Adapter, Checkpoint

IDS = torch.tensor([tiny.random_prompt(1, 12), tiny.random_prompt(2, 12)])


def starts_in_source() -> set[str]:
    """The words that peft's layers compare init_lora_weights with, and those of its config's type."""
    words = set()
    for node in ast.walk(ast.parse(inspect.getsource(peft_layer))):
        if isinstance(node, ast.Compare) and "init_lora_weights" in ast.unparse(node.left):
            words |= {c.value for c in node.comparators if isinstance(c, ast.Constant)}
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "init_lora_weights.startswith":
            words |= {ast.literal_eval(a) for a in node.args}
    field = typing.get_type_hints(LoraConfig)["init_lora_weights"]
    for option in typing.get_args(field):
        words |= set(typing.get_args(option))
    return {w.partition("_niter_")[0] for w in words if isinstance(w, str)}


def forward_backward(model):
    model(input_ids=IDS, labels=IDS).loss.backward()


def made_by_peft(start, model):
    """A LoRA of the q_proj and down_proj of a model, begun by peft as its documentation says."""
    fields = dict(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    if start == "corda":
        config = LoraConfig(**fields, init_lora_weights=start, corda_config=CordaConfig(verbose=False))
        preprocess_corda(model, config, run_model=lambda: [model(input_ids=row[None]) for row in IDS])
    elif start == "lora_ga":
        config = LoraConfig(**fields, init_lora_weights=start, lora_ga_config=LoraGAConfig())
        preprocess_loraga(model, config, lambda: forward_backward(model))
    elif start == "eva":
        config = LoraConfig(**fields, init_lora_weights=start, eva_config=EvaConfig(rho=1.0))
        lora = get_peft_model(model, config)
        initialize_lora_eva_weights(lora, [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}] * 4)
        return lora
    else:
        config = LoraConfig(**fields, init_lora_weights=start != "loftq" and start)
    return get_peft_model(model, config)


STARTS = {  # whether the base stays as it is, and the adapter's own forward pass is that of LoRA
    True: True,
    False: True,
    "gaussian": True,
    "eva": True,
    "orthogonal": True,
    "pissa": False,
    "pissa_niter_4": False,
    "olora": False,
    "corda": False,
    "loftq": None,  # quantizes on a GPU: only its name is tried
    "lora_ga": False,
    "mica": None,  # whatever peft does
}


def test_no_beginning_that_the_installed_peft_knows_is_missing_here():
    assert {w for w in STARTS if isinstance(w, str)} - {"pissa_niter_4"} == starts_in_source()


@pytest.mark.parametrize("start", STARTS, ids=str)
def test_an_adapter_is_what_peft_makes_of_it_or_is_refused_in_one_line(tiny_pair, tmp_path, start):
    folder = tiny_pair("llama").paths["instruct"]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    lora = made_by_peft(start, model)
    kept = all(
        torch.equal(tensor, before[key.replace("base_model.model.", "").replace("base_layer.", "")])
        for key, tensor in lora.state_dict().items()
        if "lora_" not in key
    )
    for name, parameter in lora.named_parameters():  # as training does
        if "lora_" in name and parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape)
    lora.save_pretrained(tmp_path / "adapter")
    if start == "loftq":
        file = tmp_path / "adapter" / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": start}))
    under = Checkpoint("instruct", folder)
    if STARTS[start] is not None:
        assert kept == STARTS[start]
    try:
        adapter = Adapter("tuned", tmp_path / "adapter", under)
    except FrankenError as e:
        assert not STARTS[start]
        assert "\n" not in str(e)
        assert f"began as '{start}'" in str(e)
        return
    assert kept, "an adapter of another base than this one"
    merged = lora.merge_and_unload().state_dict()
    for layer in range(len(under.layers)):
        for name in under.layers[layer]:
            key = f"model.layers.{layer}.{name}"
            delta = adapter.delta(layer, name, torch.device("cpu"))
            ours = before[key] if delta is None else before[key] + delta
            assert (delta is not None) == name.startswith(("self_attn.q_proj", "mlp.down_proj"))
            torch.testing.assert_close(ours, merged[key], atol=1e-5, rtol=1e-5)
