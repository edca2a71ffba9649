"""EleutherAI's lm-evaluation-harness on the live modified model, whatever its recipe does.

The harness asks, our engine answers: depth, scales and parallel layers need no transformers module. Prompts
and scores are those of the harness's own `hf` model over an exported checkpoint. The package is imported when
the suite is asked; a task of one's own is YAML that may call Python, and is run as code.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch

from engine.generation import Completion, Engine, Request
from errors import FrankenError, first_line, nearest
from planning.asked import check_installed
from suites.base import Protocol, Suite, finite

MAX_GEN_TOKENS = 256  # of a reply where the task says nothing, as the harness has it


@functools.lru_cache(maxsize=4)
def _found(include_path: str | None, include_defaults: bool) -> Any:
    try:
        made: Any = import_module("lm_eval.tasks").TaskManager
        return made(include_path=include_path, include_defaults=include_defaults)
    except Exception as e:  # YAML of somebody else
        raise FrankenError(f"lm-eval: {first_line(e)}") from e


def task_manager(tasks: Sequence[str], include_path: str | None) -> Any:
    """What finds these tasks: in the folder alone where all are single tasks of it, because the harness's own
    are thousands of files. Raises FrankenError for a folder that cannot be looked through."""
    own = _found(include_path, False) if include_path else None
    return own if own and set(tasks) <= set(own.all_subtasks) else _found(include_path, True)


def check_tasks(tasks: Sequence[str], include_path: str | None) -> None:
    """Raises FrankenError for a name that is no task, group, tag or pattern of some. A file's path is none of
    them: what may run code is named by --include-path."""
    manager = task_manager(tasks, include_path)
    for task in tasks:
        if not manager.match_tasks([task]):
            hint = nearest(task, manager.all_tasks) or "; a folder of others is given by --include-path"
            raise FrankenError(f"--lm-eval: lm-eval has no task {task!r}{hint}")


class LmEval(Suite):
    """The tasks that `Protocol.harness` names."""

    def measure(self, engine: Engine, protocol: Protocol, replies: list[Completion]) -> dict:
        """{"version", "tasks", "limit", "results": {task: {metric: value}}, "n": {task: documents}}."""
        check_installed()
        asked = protocol.harness
        if asked is None:
            raise FrankenError("the suite lm_eval needs tasks: --lm-eval TASKS")
        lm_eval: Any = import_module("lm_eval")
        try:
            found = lm_eval.simple_evaluate(
                model=_model(engine, protocol.seed),
                tasks=list(asked.tasks),
                task_manager=task_manager(asked.tasks, asked.include_path),
                limit=asked.limit,
                bootstrap_iters=0,
                log_samples=False,
            )
        except (KeyError, ValueError, OSError) as e:  # an unknown task, data that is not there
            raise FrankenError(f"lm-eval: {first_line(e)}") from e
        assert found is not None, "only another process of several gives nothing"
        results = {
            str(task): {
                str(name).removesuffix(",none"): finite(value)
                for name, value in metrics.items()
                if isinstance(value, int | float) and "stderr" not in name and name != "sample_len"
            }
            for task, metrics in found["results"].items()
        }
        counts = {task: int(n["effective"]) for task, n in found.get("n-samples", {}).items()}
        return {
            "version": lm_eval.__version__,
            "tasks": list(asked.tasks),
            "limit": asked.limit,
            "results": results,
            "n": counts,
        }


def _model(engine: Engine, seed: int) -> Any:
    """The harness's model over our engine; made here, because its base class is the package's."""
    utils: Any = import_module("lm_eval.utils")
    base: Any = import_module("lm_eval.api.model").TemplateLM

    class OurEngine(base):
        tokenizer = engine.tokenizer

        @property
        def eot_token_id(self) -> int:
            return engine.tokenizer.eos_token_id

        @property
        def prefix_token_id(self) -> int:
            bos = engine.tokenizer.bos_token_id
            return self.eot_token_id if bos is None else bos

        @property
        def max_length(self) -> int:
            return engine.config.max_position_embeddings

        @property
        def tokenizer_name(self) -> str:
            return "frankenmodel"

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
            special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
            begins = engine.tokenizer.decode([self.prefix_token_id])
            if add_special_tokens is None and begins and string.startswith(begins):
                special = {"add_special_tokens": False}
            return engine.tokenizer.encode(string, **special)

        def _loglikelihood_tokens(self, requests, **kwargs) -> list[tuple[float, bool]]:
            return score(engine, [(context, target) for _, context, target in requests])

        def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
            totals = []
            for request in requests:
                windows = utils.get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
                pairs = [utils.make_disjoint_window(window) for window in windows]
                totals.append(sum(value for value, _ in score(engine, pairs)))
            return totals

        def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
            asked, ends = [], []
            for k, request in enumerate(requests):
                text, wanted = request.args[0], dict(request.args[1])
                until = wanted.get("until") or []
                ends.append([until] if isinstance(until, str) else list(until))
                budget = int(wanted.get("max_gen_toks") or wanted.get("max_new_tokens") or MAX_GEN_TOKENS)
                prompt = self.tok_encode(text)[-(self.max_length - budget) :]
                temperature = float(wanted.get("temperature") or 0.0) if wanted.get("do_sample") else 0.0
                top_p = float(wanted.get("top_p") or 1.0)
                asked.append(Request(f"lm_eval-{k}", tuple(prompt), budget, temperature, top_p, seed=seed))
            usual, engine.stop_ids = engine.stop_ids, engine.own_stops  # the harness would not stop at others
            try:
                completions = engine.complete(asked)
            finally:
                engine.stop_ids = usual
            written = []
            for completion, stops in zip(completions, ends, strict=True):
                text = completion.text
                for stop in stops:
                    text = text.split(stop)[0] if stop else text
                written.append(text)
            return written

    return OurEngine()


@torch.inference_mode()
def score(engine: Engine, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
    """For each (context, target): the target's log-probability (nats) and whether each of its tokens was the
    likeliest. Contexts that are too long lose their beginning."""
    longest = engine.config.max_position_embeddings
    whole = [tuple([*context, *target][-(longest + 1) :]) for context, target in pairs]
    results: list = [None] * len(pairs)

    def run(batch: list[int]) -> None:
        hidden = engine.prefill([whole[i][:-1] for i in batch])
        for row, i in enumerate(batch):
            target = torch.tensor(pairs[i][1], device=hidden.device)
            end = len(whole[i]) - 1
            logprobs = engine.logits(hidden[row, end - len(target) : end]).log_softmax(-1)
            target = target.to(logprobs.device)
            of_target = logprobs.gather(1, target[:, None])[:, 0]
            greedy = bool((logprobs.argmax(-1) == target).all())
            results[i] = float(of_target.double().sum()), greedy

    engine.in_batches([len(ids) - 1 for ids in whole], run)
    return results
