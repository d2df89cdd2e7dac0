"""Rollouts by vLLM inside the trainer's process: one engine beside each rank. One of two doors to vllm.

The engine holds weights of its own, which a strategy of grpo/sync keeps equal to the trainer's. What makes its
log-probabilities the trainer's:

- `processed_logprobs`: of the distribution that was sampled from, with temperature and bans, not of the raw logits;
- bans are a bias of -inf, so that a banned id has probability zero here as in grpo/logprob.py;
- logits are computed in float32, as in grpo/policy.py (`HEAD`);
- no top-p, top-k, min-p or penalty: they renormalise over survivors, which the trainer does not;
- the expanded prompt is compared id by id with the trainer's.

A group is one request with n=G: prompt and audio are computed once. Sample i has the seed s + i, where s is a function
of (run seed, step, question) only (`group_seed`).
"""

from __future__ import annotations

import gc
import importlib.util
import os
import random
from collections.abc import Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from grpo.batch import Completion, Encoded, Group
from grpo.rollout import HEAD, Done, RolloutError, Sampling, check_prompt, group_seed, ignore, lora_rank, one_slot


class VLLMRollout:
    """See the module.

    Args:
        max_model_len: longest prompt (audio tokens included) + completion, in tokens.
        max_num_seqs: completions decoded at once: memory and speed, not results.
        kv_cache_gib: memory for keys and values; null on a GPU: what `gpu_memory` leaves.
        gpu_memory: share of the GPU's memory that the engine may take (GPU only).
        sleep: give weights and key-value memory back while the trainer updates (GPU only).
        adapters: sample through LoRA adapters (for sync=adapter).
        biased_sampling: allow top_p, top_k and min_p although the importance ratio is then wrong.
        arguments: more arguments of vLLM's `LLM`.
    Raises ValueError, saying what to do, when vllm is missing, a biasing setting was not asked for by
    `biased_sampling`, or the key-value cache is too small.
    """

    every_rank = True

    def __init__(self, policy, *, max_model_len: int = 4096, max_num_seqs: int = 256, kv_cache_gib: float | None = 1.0,
                 gpu_memory: float = 0.4, sleep: bool = True, adapters: bool = False, mm_cache_gib: float = 1.0,
                 top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0, biased_sampling: bool = False,
                 arguments: Mapping | None = None):  # fmt: skip
        if importlib.util.find_spec("vllm") is None:
            raise ValueError("vllm is not installed: install this project with its extra cpu or gpu, or use rollout=hf")
        self.filters = {"top_p": top_p, "top_k": top_k, "min_p": min_p}
        if self.filters != {"top_p": 1.0, "top_k": 0, "min_p": 0.0} and not biased_sampling:
            raise ValueError(f"{self.filters}: these cut the sampler's distribution but not the trainer's, so that the "
                             f"importance ratio is wrong; if that is wanted, say biased_sampling=true")  # fmt: skip
        self.policy, self.version = policy, 0
        self.gpu = policy.device.type == "cuda"
        self.sleeps = sleep and self.gpu
        self.asleep: set[str] = set()
        self.audio_id = policy.thinker.config.audio_token_id
        self.adapter = None  # the LoRARequest of every request
        self.llm = None  # so that close() works if the next line raises
        ranks = int(os.environ.get("WORLD_SIZE", 1))
        dtype = str(policy.thinker.dtype).removeprefix("torch.")
        size = {} if kv_cache_gib is None else {"kv_cache_memory_bytes": int(kv_cache_gib * 2**30)}
        lora = {}
        if adapters:
            rank = lora_rank(policy.model.peft_config["default"].r)
            lora = {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 2, "max_lora_rank": rank}
        # A seeded request whose prompt is computed in two parts ends vLLM on a CPU: "Generator does not use offset".
        batches = {"enable_chunked_prefill": self.gpu, "max_num_batched_tokens": max(max_model_len, 8192)}
        batches = {name: value for name, value in batches.items() if name not in (arguments or {})}
        try:
            with _guest(self.gpu):
                from vllm import LLM

                self.llm = LLM(
                    model=policy.thinker.name_or_path, dtype=dtype, seed=0, max_model_len=max_model_len,
                    max_num_seqs=max_num_seqs, enforce_eager=not self.gpu, block_size=32, enable_prefix_caching=True,
                    logprobs_mode="processed_logprobs", generation_config="vllm", disable_log_stats=True,
                    limit_mm_per_prompt={"audio": 1, "image": 0, "video": 0}, mm_processor_cache_gb=mm_cache_gib,
                    gpu_memory_utilization=gpu_memory, enable_sleep_mode=self.sleeps,
                    worker_extension_cls="grpo.sync.worker.Bridge", hf_overrides=HEAD,
                    # A plain engine on one of several ranks waits for the others for ever.
                    distributed_executor_backend="external_launcher" if ranks > 1 else None,
                    **size, **lora, **batches, **dict(arguments or {}),
                )  # fmt: skip
        except ValueError as error:
            if "KV cache" in str(error) or "kv cache" in str(error) or "cache blocks" in str(error):
                raise ValueError(f"{str(error).splitlines()[0]} What to do: raise rollout.kv_cache_gib (or, with null, "
                                 f"rollout.gpu_memory), or lower rollout.max_model_len") from error  # fmt: skip
            raise

    # ---------------------------------------------------------------- sampling

    def generate(self, prompts: Sequence[Encoded], copies: int, sampling: Sampling,
                 done: Done = ignore) -> list[Group]:  # fmt: skip
        s, policy = sampling, self.policy
        settings = []
        for p in prompts:
            seed = None if s.greedy else group_seed(s.seed, s.step, p.id)
            settings.append(self._parameters(
                n=1 if s.greedy else copies, max_tokens=s.max_tokens, logprobs=0, seed=seed,
                stop_token_ids=policy.stop_ids, temperature=0.0 if s.greedy else policy.temperature,
            ))  # fmt: skip
        groups: list[Group | None] = [None] * len(prompts)
        for place, out in self._ask([self._request(p) for p in prompts], settings):
            groups[place] = self._group(prompts[place], out, copies, s)
            done(place, groups[place])
        if self.sleeps and not s.greedy:  # the update comes next; after an evaluation the next rollout does
            self.llm.sleep(level=1)
            self.asleep = {"weights", "kv_cache"}
        return groups

    def _group(self, p: Encoded, out, copies: int, s: Sampling) -> Group:
        """vLLM's answer to one question, checked."""
        check_prompt(p, out.prompt_token_ids)
        completions = []
        for answer in sorted(out.outputs, key=lambda o: o.index):
            ids = tuple(answer.token_ids)
            cut = bool(ids) and ids[-1] not in self.policy.stop_ids
            if answer.finish_reason not in ("stop", "length") or not ids or (cut and len(ids) < s.max_tokens):
                raise RolloutError(
                    f"question {p.id}: a completion ended by {answer.finish_reason!r} after {len(ids)} of "
                    f"{s.max_tokens} tokens: raise rollout.max_model_len above {len(p.prompt_ids)} + {s.max_tokens}"
                )
            logp = tuple(at[i].logprob for i, at in zip(ids, answer.logprobs, strict=True))
            completions.append(Completion(ids, logp, self.policy.decode(ids), cut, self.version))
        return Group(p, tuple(completions * (copies if s.greedy else 1)))  # vLLM takes no n>1 then

    def score(self, groups: Sequence[Group]) -> list[list[list[float]]]:
        """One request of one token per position: the log-prob of the given token where it would be sampled.

        vLLM's prompt log-probs would need one request per completion only, but know no temperature and no bans.
        """
        requests, settings = [], []
        for group in groups:
            start = one_slot(group.prompt, self.audio_id)
            for completion in group.completions:
                for t, token in enumerate(completion.token_ids):
                    requests.append(self._request(group.prompt, [*start, *completion.token_ids[:t]]))
                    settings.append(self._parameters(
                        n=1, max_tokens=1, logprob_token_ids=[token], seed=0, temperature=self.policy.temperature
                    ))  # fmt: skip
        answers = (out for _, out in sorted(self._ask(requests, settings), key=lambda pair: pair[0]))
        return [[[next(answers).outputs[0].logprobs[0][token].logprob for token in c.token_ids] for c in g.completions]
                for g in groups]  # fmt: skip

    def _request(self, prompt: Encoded, ids: list[int] | None = None) -> dict:
        if prompt.mel is None:  # a prompt without audio
            return {"prompt_token_ids": prompt.prompt_ids.tolist() if ids is None else ids}
        if prompt.samples is None:
            raise ValueError(f"question {prompt.id} carries no waveform: vLLM makes its own features from it")
        ids = one_slot(prompt, self.audio_id) if ids is None else ids
        return {"prompt_token_ids": ids, "multi_modal_data": {"audio": prompt.samples}}

    def _parameters(self, **settings):
        from vllm import SamplingParams

        # Not SamplingParams.from_optional: that one cuts a bias at -100.
        ban = dict.fromkeys(self.policy.banned_ids, float("-inf"))
        return SamplingParams(logit_bias=ban, detokenize=False, **self.filters, **settings)

    def _ask(self, requests: list[dict], settings: list):
        """(place, answer) of each request as soon as it is whole."""
        self._wake("weights", "kv_cache")
        engine = self.llm.llm_engine
        with _numbers_kept():
            names = self.llm.enqueue(requests, settings, use_tqdm=False, lora_request=self.adapter)
        places = {name.partition("-")[0]: place for place, name in enumerate(names)}  # behind it, letters by chance
        while places:
            with _numbers_kept():
                answers = [out for out in engine.step() if out.finished]
            for out in answers:
                yield places.pop(out.request_id), out

    def _wake(self, *tags: str) -> None:
        if wanted := self.asleep & set(tags):
            self.llm.wake_up(sorted(wanted))
            self.asleep -= wanted

    # ---------------------------------------------------------------- weights

    def call(self, method: str, **arguments) -> list:
        self._wake("weights")  # key-value memory stays free while weights are written
        return self.llm.collective_rpc(method, kwargs=arguments)

    def send(self, method: str, tensors: Mapping[str, Tensor], **arguments) -> list:
        return self.call(method, tensors=tensors, **arguments)  # one process: nothing is copied on the way

    def refresh(self, version: int, *, audio_changed: bool) -> None:
        if not self.llm.reset_prefix_cache():  # keys and values of the old weights
            raise RuntimeError("vLLM did not drop its prefix cache: is a request still running?")
        if audio_changed:
            # The scheduler's record and the worker's embeddings are dropped together; one alone is an
            # "Encoder cache miss" at the next question with the same clip.
            self.llm.llm_engine.reset_encoder_cache()
        self.version = version

    def load_adapter(self, version: int, tensors: Mapping[str, Tensor], config: Mapping) -> list:
        from vllm.lora.request import LoRARequest

        answers = self.send("bridge_adapter", tensors, version=version, id=version + 1, config=dict(config))
        # The name is part of the prefix cache's key. The path is never read: the worker holds this id already.
        self.adapter = LoRARequest(f"policy-{version}", version + 1, "in-memory")
        return answers

    def close(self) -> None:
        if self.llm is not None:
            # Not the engine's own shutdown, at once or when it is collected: that ends the trainer's process group.
            self.llm.llm_engine.engine_core._finalizer.detach()
            self.llm.llm_engine.model_executor.shutdown()
            self.llm = None
            gc.collect()


@contextmanager
def _guest(gpu: bool):
    """Start vLLM as a guest of the trainer's process: what it changes for all is put back."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process: tensors pass by reference
    os.environ.update(VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if not gpu:
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # compiling costs 20 s and wins nothing here
    set_num_threads = torch.set_num_threads
    try:
        with _numbers_kept():
            yield
    finally:
        torch.set_num_threads = set_num_threads  # vLLM puts a warning in its place


@contextmanager
def _numbers_kept():
    """vLLM seeds and draws from torch's, numpy's and Python's global generators, which are the trainer's."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        yield
    random.setstate(python), np.random.set_state(numpy)
