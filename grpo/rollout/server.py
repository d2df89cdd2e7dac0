"""Rollouts by vLLM servers in processes of their own: started by us, or given by URL; several share the questions.

What makes it safe to lean on a server that may die, hang or lie:

- Every question is one request and is asked until it has one whole, checked answer. Its seed is a function of its name,
  so asking again, or asking another server, gives the same completions: nothing is lost, nothing doubled.
- Every push of weights is kept until the next one is complete. A server that comes back empty is brought to the current
  version by repeating the push; servers name the version in each completion, and a wrong one is not accepted.
- A server of ours that died, or that failed twice, is started anew on the same port; one given by URL is left out
  until it answers again. After `tries` failures of one question: RolloutError, with what was seen last.

Rank 0 starts, feeds and mends the servers; every rank asks for its own questions. While another rank still pushes, the
servers name the old version and a rank waits.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import io
import json
import logging
import math
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import soundfile
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from grpo.batch import Completion, Encoded, Group
from grpo.rollout import Done, RolloutError, Sampling, check_prompt, group_seed, ignore, lora_rank, one_slot
from grpo.rollout.serve import TOKEN, Launch, Process, ServerError, answers, choose_token, exchange_folder
from grpo.signals import STOPPING
from grpo.sync.broadcast import store as meeting_place

logger = logging.getLogger(__name__)
GENERATE = "/inference/v1/generate"  # token ids in, token ids out
NEVER = -1e30  # added to a logit: probability exactly 0 after the softmax, and JSON has no infinity


class Fault(Exception):
    """One request failed in a way that may pass. `hung`: no answer in time, so that only a restart helps."""

    def __init__(self, what: str, *, hung: bool = False):
        super().__init__(what)
        self.hung = hung


class Stale(Fault):
    """The server is well but holds other weights than we asked for."""


class Raised(Fault):
    """A method of the worker extension raised: where the server is still well, it would raise again."""


@dataclass
class Push:
    """One message to every server's workers, kept so that it can be repeated to a server that starts empty."""

    serial: int
    method: str | None  # of the worker extension; None: the end of a version (`version`, `audio_changed`)
    arguments: Mapping
    file: Path | None = None  # the tensors, safetensors
    adapter: str | None = None  # name under which to load the file's folder as a LoRA adapter as well
    asked: set[int] = field(default_factory=set)  # servers to which it was sent, with or without an answer
    once: bool = False  # it cannot be repeated: what it carried is gone
    weights: bool = False  # it changes them
    results: dict[int, list] = field(default_factory=dict)  # server -> one result a worker


class Server:
    """One server as a client sees it: where it is, what it has been sent, whether it can be asked."""

    def __init__(self, index: int, url: str, token: str | None, connections: int, timeout: float,
                 process: Process | None = None):  # fmt: skip
        self.index, self.url, self.token, self.process, self.timeout = index, url.rstrip("/"), token, process, timeout
        self.lock = threading.RLock()  # of all that changes the server: pushing to it, mending it
        self.life = 0  # counts its restarts: who saw an older life fail has nothing to mend any more
        self.applied = -1  # serial of the last push it took
        self.up = True
        self.changing = False  # it was sent a part of a version
        self.adapter: str | None = None  # name of the one it holds
        self._connections = connections
        self.connect()

    def connect(self) -> None:
        """Forget old connections: those to a server that died are broken."""
        # 2 s: an idle connection is dropped before the server does it (after 5), perhaps under a request
        limits = httpx.Limits(max_connections=self._connections, max_keepalive_connections=self._connections,
                              keepalive_expiry=2.0)  # fmt: skip
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        # trust_env=False: a proxy in the environment is not for servers nearby
        self.client = httpx.Client(base_url=self.url, headers=headers, limits=limits, trust_env=False)

    def request(self, method: str, route: str, body: Mapping | None = None) -> dict:
        """One exchange of JSON objects. Raises Fault where trying again may help, RolloutError where it will not."""
        seconds = self.timeout if method == "POST" else min(self.timeout, 30.0)
        where = f"{self.url}{route}"
        try:
            reply = self.client.request(method, route, json=body,
                                        timeout=httpx.Timeout(seconds, connect=min(seconds, 10.0)))  # fmt: skip
            empty = not reply.content
        except (httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            raise Fault(f"{where}: {type(error).__name__}") from error
        except httpx.TimeoutException as error:
            raise Fault(f"{where} did not answer within {seconds:g} s", hung=True) from error
        except (httpx.HTTPError, RuntimeError) as error:  # RuntimeError: its client was replaced meanwhile
            raise Fault(f"{where}: {type(error).__name__} {error}") from error
        if reply.status_code >= 500 and "collective_rpc method failed" in reply.text:
            raise Raised(error_text(reply))
        if reply.status_code in (408, 425, 429) or reply.status_code >= 500:
            raise Fault(f"{where} answered {reply.status_code}: {error_text(reply)}")
        if reply.status_code in (401, 403):
            raise RolloutError(f"{where} answered {reply.status_code}: {error_text(reply)}; is {TOKEN} the token it "
                               f"was started with?")  # fmt: skip
        if reply.status_code == 404:
            raise RolloutError(f"{where}: no such route; start the server as docs/rollout-server.md says")
        if reply.status_code >= 400:
            raise RolloutError(f"{where} answered {reply.status_code}: {error_text(reply)}")
        if route not in (GENERATE, "/weight_info", "/collective_rpc") and (empty or reply.text[0] != "{"):
            return {}  # some say "Success: ..." or nothing
        try:
            answer = reply.json()
        except ValueError as error:
            raise Fault(f"{where} sent something that is not JSON: {reply.text[:80]!r}") from error
        if not isinstance(answer, dict):
            raise Fault(f"{where} sent {type(answer).__name__} instead of an object")
        return answer

    @property
    def healthy(self) -> bool:
        """Whether it answers within a time that a busy machine may need too."""
        return answers(self.url, self.token, min(self.timeout, 30.0))

    def weight_version(self) -> str:
        return str(self.request("GET", "/weight_info").get("weight_version"))

    def apply(self, push: Push, tag: Callable[[int | str], str]) -> None:
        """Repeat `push` on this server. Caches are emptied before the version is named: a named version is usable."""
        if push.method is None:
            self._reset("/reset_prefix_cache")
            if push.arguments["audio_changed"]:
                self._reset("/reset_mm_cache")
                self._reset("/reset_encoder_cache")
            self.request("POST", "/update_weight_version", {"new_version": tag(push.arguments["version"])})
            self.changing = False
        else:
            if push.once and self.index in push.asked:
                raise RolloutError(f"{self.url} lost its weights, and a broadcast cannot be repeated: go on from a "
                                   f"checkpoint, or use sync.transport=direct")  # fmt: skip
            push.asked.add(self.index)
            if push.weights and not self.changing:  # an answer that spans the change names both, and is refused
                self.request("POST", "/update_weight_version", {"new_version": tag("changing")})
                self.changing = True
            arguments = dict(push.arguments)
            if push.file is not None and self.process is not None:
                arguments["path"] = str(push.file)
            elif push.file is not None:
                arguments["data"] = base64.b64encode(push.file.read_bytes()).decode()
            answer = self.request("POST", "/collective_rpc", {"method": push.method, "kwargs": arguments})
            push.results[self.index] = answer.get("results", [])
        if push.adapter is not None:
            self._load_adapter(push.adapter, push.file.parent)
        self.applied = push.serial

    def _load_adapter(self, name: str, folder: Path) -> None:
        """Make the adapter in `folder` known as `name`, in place of the one before. A repeated call changes nothing."""
        try:
            self.request("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        except RolloutError as error:
            if "already been loaded" not in str(error):
                raise
        if self.adapter not in (None, name):
            with contextlib.suppress(RolloutError):  # a server that was restarted never had it
                self.request("POST", "/v1/unload_lora_adapter", {"lora_name": self.adapter})
        self.adapter = name

    def _reset(self, route: str) -> None:
        for _ in range(20):  # vLLM declines while it still frees the blocks of a finished request
            if self.request("POST", route, {}).get("success", True):
                return
            time.sleep(0.1)
        raise Fault(f"{self.url}{route}: its blocks are still in use", hung=True)


def error_text(reply: httpx.Response) -> str:
    """What an error reply says, in one line."""
    try:
        answer = reply.json()
        error = answer.get("error", answer.get("detail", answer)) if isinstance(answer, dict) else answer
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except ValueError:
        text = reply.text
    return " ".join(text.split())[:400]


class VLLMServer:
    """See the module.

    Args:
        start: start `count` servers on this machine, on `port`, `port` + 1, ... or on free ports; else use `urls`.
        token: of the servers; for servers of our own on loopback a fresh one is made.
        timeout: seconds for one question's completions; a server that takes longer counts as hung.
        start_timeout: seconds for a server to start, and for another rank to finish its push.
        tries: times a question is asked before the run stops.
        backoff: seconds before the second try, doubled each time up to 10.
        inflight: questions asked at once of each server.
        log: folder for the servers' own output; null keeps it for error messages only.
        adapters: the servers take LoRA adapters (for sync=adapter).
        biased_sampling: allow top_p, top_k and min_p although the importance ratio is then wrong.
    The rest is `serve.Launch`'s, for servers that we start.
    Raises ServerError when a server cannot be started or reached.
    """

    every_rank = False  # rank 0 pushes, for all

    def __init__(self, policy, *, start: bool = True, urls: Sequence[str] = (), count: int = 1, port: int | None = None,
                 token: str | None = None, timeout: float = 300, start_timeout: float = 600, tries: int = 4,
                 backoff: float = 0.5, inflight: int = 64, log: str | None = None, host: str = "127.0.0.1",
                 max_model_len: int = 4096, max_num_seqs: int = 256, kv_cache_gib: float | None = 1.0,
                 gpu_memory: float = 0.9, gpus: str | int | None = None, tensor_parallel: int = 1,
                 adapters: bool = False, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0,
                 biased_sampling: bool = False, arguments: Sequence[str] = ()):  # fmt: skip
        self.filters = {"top_p": top_p, "top_k": top_k, "min_p": min_p}
        if self.filters != {"top_p": 1.0, "top_k": 0, "min_p": 0.0} and not biased_sampling:
            raise ServerError(f"{self.filters}: these cut the sampler's distribution but not the trainer's, so that "
                              f"the importance ratio is wrong; if that is wanted: biased_sampling=true")  # fmt: skip
        if bool(urls) == start:
            raise ServerError("give either rollout.start=true or the rollout.urls of running servers with "
                              "rollout.start=false")  # fmt: skip
        if min(count, tries, inflight) < 1:
            raise ServerError("rollout.count, rollout.tries and rollout.inflight must be at least 1")
        self.policy, self.timeout, self.start_timeout, self.tries = policy, timeout, start_timeout, tries
        self.backoff, self.inflight, self.adapters = backoff, inflight, adapters
        self._version, self.model = 0, None
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.exchange = exchange_folder(shared=start) if self.rank == 0 else None
        self.restarts = self.faults = 0  # of this rank's view, for metrics
        self._serial, self._current, self._pending = -1, [], []  # pushes of the version held, and of the next one
        self._closed, self._stop = False, threading.Event()
        self._banned, self._stops = frozenset(policy.banned_ids), frozenset(policy.stop_ids)
        self.servers: list[Server] = []
        self.run = secrets.token_hex(4)  # names this run on the servers: another trainer's version 7 is not ours
        self.store = None  # of several ranks
        atexit.register(self.close)
        known, failure = None, None
        if self.rank == 0:
            try:
                if start:
                    launch = {
                        "host": host, "token": choose_token(host, token), "max_model_len": max_model_len,
                        "max_num_seqs": max_num_seqs, "kv_cache_gib": kv_cache_gib, "gpu_memory": gpu_memory,
                        "tensor_parallel": tensor_parallel, "arguments": tuple(arguments),
                        "lora_rank": lora_rank(policy.model.peft_config["default"].r) if adapters else 0,
                    }  # fmt: skip
                    self._start(launch, count, port, log, gpus_of_each(gpus, count, tensor_parallel))
                else:
                    self._reach(urls, token)
                    self.call("bridge_reset", weights=True)  # an earlier run may have left its weights
                self.refresh(0, audio_changed=not start)
                self.model = None  # version 0 is the checkpoint itself
                known = [server.url for server in self.servers], self.token, self.run
            except Exception as error:  # told to the other ranks, which wait for us
                failure = error
                self.close()
        if self.world > 1:
            # Through it the others tell rank 0 of a server that only they see fail: `life` of each server, `complaint`.
            host = os.environ.get("MASTER_ADDR", "127.0.0.1")
            if self.rank == 0:
                self.store = meeting_place(host, 0, master=True)
                for server in self.servers:
                    self.store.set(f"life/{server.index}", "0")
            agreed = [known, None if failure is None else str(failure), self.store and self.store.port]
            dist.broadcast_object_list(agreed)
            known, told, port_of_store = agreed
            failure = failure or (ServerError(f"rank 0: {told}") if told else None)
        if failure is not None:
            raise failure
        urls, self.token, self.run = known
        if self.rank:
            self.store = meeting_place(host, port_of_store)
            self.servers = [self._server(i, url) for i, url in enumerate(urls)]
        elif self.world > 1:  # rank 0 may be waiting for the others in a collective when a server of theirs dies
            threading.Thread(target=self._watch, name="vllm-servers", daemon=True).start()

    def _start(self, launch: Mapping, count: int, port: int | None, log: str | None,
               gpus: Sequence[str | None]) -> None:  # fmt: skip
        """Rank 0: start `count` servers and wait for all of them."""
        self.token = launch["token"]
        path, dtype = self.policy.thinker.name_or_path, str(self.policy.thinker.dtype).removeprefix("torch.")
        logs = Path(log) if log else self.exchange
        logs.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            one = Launch(model=str(path), dtype=dtype, port=None if port is None else port + i,
                         exchange=str(self.exchange), gpus=gpus[i], **launch)  # fmt: skip
            process = Process(one, logs / f"vllm-{i}.log")
            self.servers.append(self._server(i, process.url, process))
            process.start()
        for server in self.servers:
            server.process.wait(self.start_timeout)

    def _reach(self, urls: Sequence[str], token: str | None) -> None:
        """Rank 0: servers that somebody else started. At least one must answer now."""
        self.token = token or os.environ.get(TOKEN)
        self.servers = [self._server(i, url) for i, url in enumerate(urls)]
        if not any(server.healthy for server in self.servers):
            raise ServerError(f"no server answers at {', '.join(urls)}: start them, or use rollout.start=true")

    def _server(self, index: int, url: str, process: Process | None = None) -> Server:
        return Server(index, url, self.token, self.inflight, self.timeout, process)

    @property
    def version(self) -> int:
        """Of the weights that completions are to be sampled with. Ranks other than 0 set it after a push."""
        return self._version

    @version.setter
    def version(self, version: int) -> None:
        self._version = version
        self.model = f"policy-{version}" if self.adapters else None  # name of the adapter to sample through

    # ---------------------------------------------------------------- completions

    def generate(self, prompts: Sequence[Encoded], copies: int, sampling: Sampling,
                 done: Done = ignore) -> list[Group]:  # fmt: skip
        """`copies` completions of each prompt, sampled with the weights of `self.version`.

        One request a question with n = copies: prompt and audio are encoded once, and vLLM gives copy i the seed
        s + i. Greedy completions carry the log-probs of temperature 1, all that vLLM reports for them.
        Raises RolloutError after `tries` failures, or at once where the server's prompt differs from the trainer's.
        """
        n = 1 if sampling.greedy else copies  # vLLM refuses greedy copies: they are all the same
        asked = [self._question(prompt, self._sampling(prompt, n, sampling)) for prompt in prompts]

        def read(i: int, answer: Mapping) -> Group:
            group = self._group(prompts[i], answer, n, sampling.max_tokens)
            group = group if n == copies else Group(group.prompt, group.completions * copies)
            done(i, group)
            return group

        return self._all(asked, read, [f"question {p.id}" for p in prompts])

    def score(self, groups: Sequence[Group]) -> list[list[list[float]]]:
        """Log-probs [B][G][T] of given completions under the servers' weights, as its sampler would report them.

        One request of one token for each position: the very path of sampling, with its caches. (vLLM's prompt_logprobs
        know neither temperature nor banned ids, and go round the prefix cache whose staleness a probe should see.)
        """
        asked, owner = [], []
        # The answer lists as many as were asked for, the sampled one first: asked for once, ours would be cut off.
        for b, group in enumerate(groups):
            base = self._question(group.prompt, self._common() | {"max_tokens": 1, "logprobs": 2, "n": 1, "seed": 0})
            for g, completion in enumerate(group.completions):
                for t, token in enumerate(completion.token_ids):
                    asked.append(base | {
                        "token_ids": base["token_ids"] + list(completion.token_ids[:t]), "return_token_ids": False,
                        "sampling_params": base["sampling_params"] | {"logprob_token_ids": [token] * 2},
                    })  # fmt: skip
                    owner.append((b, g, token))
        values = self._all(asked, lambda i, answer: score_of(owner[i][2], answer),
                           [f"scoring question {groups[b].prompt.id}" for b, _, _ in owner])  # fmt: skip
        scores = [[[] for _ in group.completions] for group in groups]
        for (b, g, _), value in zip(owner, values, strict=True):
            scores[b][g].append(value)
        return scores

    def _common(self) -> dict:
        """Sampling parameters of every request. Those that would bias the ratio are off, and said to be off."""
        return {
            "temperature": self.policy.temperature, **self.filters, "repetition_penalty": 1.0,
            "logit_bias": {str(i): NEVER for i in self.policy.banned_ids}, "stop_token_ids": list(self.policy.stop_ids),
            "logprobs": 0, "detokenize": False,
        }  # fmt: skip

    def _sampling(self, prompt: Encoded, copies: int, s: Sampling) -> dict:
        if s.greedy:
            return self._common() | {"n": copies, "max_tokens": s.max_tokens, "temperature": 0.0}
        return self._common() | {"n": copies, "max_tokens": s.max_tokens, "seed": group_seed(s.seed, s.step, prompt.id)}

    def _question(self, prompt: Encoded, sampling: Mapping) -> dict:
        """Body of one request: the prompt with ONE audio placeholder, and the waveform as float32 WAV, losslessly."""
        model = {} if self.model is None else {"model": self.model}
        body = {"return_token_ids": True, "sampling_params": dict(sampling), **model}
        if prompt.mel is None:  # a prompt without audio
            return body | {"token_ids": prompt.prompt_ids.tolist()}
        if prompt.samples is None:
            raise RolloutError(f"question {prompt.id}: no waveform, which this engine sends with the prompt")
        wav = io.BytesIO()
        hz = self.policy.processor.feature_extractor.sampling_rate
        soundfile.write(wav, prompt.samples, hz, format="WAV", subtype="FLOAT")
        ids = one_slot(prompt, self.policy.thinker.config.audio_token_id)
        url = f"data:audio/wav;base64,{base64.b64encode(wav.getvalue()).decode()}"
        return body | {"token_ids": ids, "content_parts": [{"type": "audio_url", "url": url}]}

    def _group(self, prompt: Encoded, answer: Mapping, copies: int, max_tokens: int) -> Group:
        """A checked answer as a Group. Raises Fault for what cannot be an answer, RolloutError for another prompt."""
        theirs, choices = answer.get("prompt_token_ids"), answer.get("choices")
        if not isinstance(theirs, list) or not isinstance(choices, list):
            raise Fault("an answer without prompt ids or choices")
        try:
            check_prompt(prompt, theirs)
        except ValueError as error:
            raise RolloutError(str(error)) from error
        if len(choices) != copies:
            raise Fault(f"{len(choices)} completions instead of {copies}")
        try:
            choices = sorted(choices, key=lambda c: c["index"])
            if [c["index"] for c in choices] != list(range(copies)):
                raise Fault("completions that are not numbered one by one")
            return Group(prompt, tuple(self._completion(prompt, c, max_tokens) for c in choices))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise Fault(f"an answer of another form: {type(error).__name__} {error}") from error

    def _completion(self, prompt: Encoded, choice: Mapping, max_tokens: int) -> Completion:
        ids = tuple(int(t) for t in choice["token_ids"])
        content = choice["logprobs"]["content"]
        logp = tuple(float(entry["logprob"]) for entry in content)
        held = sorted({str(span["version"]) for span in choice["weight_versions"] or ()})
        if held != [self._tag(self.version)]:
            raise Stale(f"completions of weights {', '.join(held) or 'without a name'}, not {self._tag(self.version)}")
        if not ids or [entry["token_id"] for entry in content] != list(ids) or not all(map(math.isfinite, logp)):
            raise Fault("log-probs that do not belong to the tokens, or are not finite")
        if choice["finish_reason"] not in ("stop", "length"):
            raise Fault(f"a completion that ended by {choice['finish_reason']!r}")
        truncated = ids[-1] not in self._stops
        if not self._stops.isdisjoint(ids[:-1]) or len(ids) > max_tokens:
            raise Fault("a completion that goes on behind its end")
        if truncated and len(ids) < max_tokens:
            raise RolloutError(
                f"question {prompt.id}: a completion was cut at {len(ids)} of {max_tokens} tokens: raise "
                f"rollout.max_model_len above {len(prompt.prompt_ids)} + {max_tokens}"
            )
        if not self._banned.isdisjoint(ids):
            raise Fault("a completion with a banned id")
        return Completion(ids, logp, self.policy.decode(ids), truncated, self.version)

    # ---------------------------------------------------------------- asking until it is answered

    def _all(self, bodies: Sequence[Mapping], read: Callable, names: Sequence[str]) -> list:
        """`read(i, answer)` of each body's answer, in order; the questions are spread over the servers."""
        if not bodies:
            return []
        self._stop.clear()
        for server in self.servers if self.rank == 0 else ():
            if not server.up and server.healthy:  # one given by URL is back
                self._push_to(server)
        pool = ThreadPoolExecutor(min(len(bodies), self.inflight * len(self.servers)))
        waits = True
        try:
            futures = [pool.submit(self._one, i, body, read, names[i]) for i, body in enumerate(bodies)]
            return [future.result() for future in futures]
        except BaseException:
            self._stop.set()  # those still waiting for their next try need not have it
            waits = not STOPPING  # nor those that are being answered, when the run has no time
            raise
        finally:
            pool.shutdown(wait=waits, cancel_futures=True)

    def _one(self, i: int, body: Mapping, read: Callable, name: str):
        """One question, asked until there is an answer that `read` accepts, at most `tries` times."""
        seen: list[str] = []
        for attempt in range(self.tries):
            if attempt and self._stop.wait(min(self.backoff * 2 ** (attempt - 1), 10.0)):
                break
            server = self._choose(i + attempt)
            life = server.life
            try:
                if self.rank == 0 and server.applied != self._serial:
                    self._bring(server)
                return read(i, server.request("POST", GENERATE, body))
            except (Fault, ServerError) as fault:
                seen.append(f"{server.url}: {fault}" if server.url not in str(fault) else str(fault))
                self.faults += 1
                logger.warning("rollout server, %s, try %d of %d: %s", name, attempt + 1, self.tries, seen[-1])
                if self._stop.is_set():
                    break
                try:
                    self._mend(server, life, fault, again=attempt > 0)
                except (Fault, ServerError) as error:
                    seen.append(str(error))
        last = " | ".join(seen[-3:])
        raise RolloutError(f"{name}: no answer after {self.tries} tries (rollout.tries). Last seen: {last}")

    def _choose(self, turn: int) -> Server:
        """A server that holds the current version. Rank 0 brings it there; another rank waits until one is there."""
        servers = [server for server in self.servers if server.up] or self.servers
        servers = servers[turn % len(servers) :] + servers[: turn % len(servers)]
        if self.rank == 0:
            return servers[0]
        end = time.monotonic() + self.start_timeout
        while True:
            for server in servers:
                try:
                    if server.applied != self.version:
                        server.life = int(self.store.get(f"life/{server.index}"))
                        if server.weight_version() == self._tag(self.version):
                            server.applied = self.version  # here: the version last seen on it
                except Fault as fault:  # rank 0 sees for itself that one died, and mends it
                    if fault.hung:
                        self.store.set(f"complaint/{server.index}", str(server.life))
                if server.applied == self.version:
                    return server
            if time.monotonic() > end or self._stop.wait(0.1):
                raise RolloutError(f"no server came to version {self.version} within {self.start_timeout:g} s")

    def _mend(self, server: Server, life: int, fault: Exception, *, again: bool) -> None:
        """After a fault seen in `life`: restart it, bring it to the current version, or leave it out for now."""
        if self.rank:
            server.applied = -1  # look again what it holds, and wait if need be
            if getattr(fault, "hung", False) or (again and not isinstance(fault, Stale)):
                self.store.set(f"complaint/{server.index}", str(life))
            return
        with server.lock:
            if server.life != life or self._closed:
                return  # another thread did it meanwhile
            dead = getattr(fault, "hung", False) or (again and not isinstance(fault, Stale)) or not server.healthy
            if server.process is not None and (dead or not server.process.alive):
                self.restarts += 1
                why = "" if server.process.alive else f"; it said: {server.process.reason()}"
                logger.warning("rollout server %s is started anew: %s%s", server.url, fault, why)
                server.process.stop()
                server.applied = -1
                server.process.start()
                server.process.wait(self.start_timeout)
                server.life += 1
                if self.store is not None:
                    self.store.set(f"life/{server.index}", str(server.life))
                server.connect()
            elif dead:
                logger.warning("rollout server %s is left out until it answers again: %s", server.url, fault)
                server.up, server.applied = False, -1  # it may come back empty
                return
            elif server.weight_version() != self._tag(self.version):  # unless another thread has brought it there
                server.applied = -1
            self._bring(server)

    def _bring(self, server: Server) -> None:
        """Send a server what it has not had: after a restart all that makes up the current version."""
        with server.lock:
            for push in [*self._current, *self._pending]:
                if push.serial > server.applied:
                    server.apply(push, self._tag)
            server.up = True

    def _watch(self) -> None:
        """Rank 0 of several: mend what died or what others complain of, even while this rank waits in a collective."""
        while not self._closed:
            for server in self.servers:
                life = server.life  # read first: whoever restarts it meanwhile has made it another life
                wrong = server.process is not None and not server.process.alive
                if self.store.check([key := f"complaint/{server.index}"]):
                    wrong |= int(self.store.get(key)) == life
                    self.store.delete_key(key)
                if wrong and not self._closed:
                    try:
                        self._mend(server, life, Fault("seen by another rank", hung=True), again=True)
                    except (Fault, ServerError, RolloutError):
                        time.sleep(self.backoff)  # whoever asks it next will say so
            time.sleep(0.2)

    def _tag(self, version: int | str) -> str:
        """Name of a version on the servers: of this run, so that two trainers cannot share one by mistake."""
        return f"{self.run}/{version}"

    # ---------------------------------------------------------------- weights

    def call(self, method: str, *, once: bool = False, weights: bool = False, **arguments) -> list:
        """A method of the worker extension on every worker of every server. Rank 0 only. Returns all their results.

        With `once` it is not repeated to a server that comes back empty: RolloutError instead. `weights`: it changes
        them, so that no answer is accepted until `refresh`.
        """
        return self._push(method, arguments, None, once=once, weights=weights)

    def send(self, method: str, tensors: Mapping[str, Tensor], **arguments) -> list:
        """The same with tensors: as a file in shared memory (`path`) or, for servers by URL, as base64 (`data`)."""
        return self._push(method, arguments, self._write(tensors), weights=True)

    def load_adapter(self, version: int, tensors: Mapping[str, Tensor], config: Mapping) -> list:
        """Sample from now on through this LoRA adapter. Only for servers that we started: they load it by path.

        Two steps: the worker extension takes the tensors and answers whether each name found its module (vLLM itself
        would ignore a wrong one without a word), then vLLM's own route makes the adapter known under a fresh name.
        """
        if any(server.process is None for server in self.servers):
            raise RolloutError("sync=adapter needs servers of our own (rollout.start=true); by URL use sync=delta")
        file = self._write(tensors)
        (file.parent / "adapter_config.json").write_text(json.dumps(dict(config)))
        # The extension's id is out of the way of those that vLLM's route counts up from 1.
        arguments = {"version": version, "id": 2**30 + version, "config": dict(config)}
        return self._push("bridge_adapter", arguments, file, adapter=f"policy-{version}", weights=True)

    def _write(self, tensors: Mapping[str, Tensor]) -> Path:
        """Tensors as a file in a folder of its own; kept until the push after this one is complete."""
        file = self.exchange / str(self._serial + 1) / "adapter_model.safetensors"
        file.parent.mkdir()
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, file)
        return file

    def refresh(self, version: int, *, audio_changed: bool) -> None:
        """End of a push: caches are emptied, and the servers hold `version`. Rank 0 only."""
        self._push(None, {"version": version, "audio_changed": audio_changed}, None)
        old, self._current, self._pending = self._current, self._pending, []
        for push in old:
            if push.file is not None:
                shutil.rmtree(push.file.parent, ignore_errors=True)
        self.version = version

    def _push(self, method: str | None, arguments: Mapping, file: Path | None, adapter: str | None = None, *,
              once: bool = False, weights: bool = False) -> list:  # fmt: skip
        """To every server that is up; one that fails is mended and gets all it lacks. At least one must take it."""
        self._serial += 1
        push = Push(self._serial, method, arguments, file, adapter, once=once, weights=weights)
        self._pending.append(push)
        with ThreadPoolExecutor(len(self.servers)) as pool:
            failed = [error for error in pool.map(self._push_to, self.servers) if error]
        if len(push.results if method else [s for s in self.servers if s.applied == push.serial]) == 0:
            raise RolloutError(f"no server took {method or 'the new version'}: {' | '.join(failed)}")
        return [result for _, results in sorted(push.results.items()) for result in results]

    def _push_to(self, server: Server) -> str | None:
        """Returns why it failed for good, or None."""
        error = "it is left out"
        for attempt in range(self.tries):
            life = server.life
            if not server.up and not server.healthy:
                return f"{server.url}: {error}"
            try:
                return self._bring(server)
            except (Fault, ServerError) as fault:
                error = str(fault)
                self.faults += 1
                logger.warning("rollout server %s did not take weights, try %d: %s", server.url, attempt + 1, error)
                time.sleep(0.5 if isinstance(fault, Raised) else 0.0)  # a dying engine is not known as dead at once
                if isinstance(fault, Raised) and server.healthy:
                    raise RolloutError(f"{server.url}: {fault}") from fault
                try:
                    self._mend(server, life, fault, again=attempt > 0)
                except (Fault, ServerError) as worse:
                    error = str(worse)
                time.sleep(min(self.backoff * 2**attempt, 10.0))
        server.up, server.applied = False, -1
        return error

    def close(self) -> None:
        """Stop the servers that we started. Safe to call twice, and called when the interpreter ends."""
        if self._closed:
            return
        self._closed = True
        self._stop.set()
        for server in self.servers:
            if server.process is not None:
                with server.lock:
                    server.process.stop()
            server.client.close()
        if self.exchange is not None:
            shutil.rmtree(self.exchange, ignore_errors=True)
        atexit.unregister(self.close)


def gpus_of_each(gpus: str | int | None, count: int, each: int) -> list[str | None]:
    """The devices of `count` servers, `each` to one: "1,2,3,4" for two of two is "1,2" and "3,4".

    Raises ServerError when there are too few.
    """
    if gpus is None:
        return [None] * count
    names = [name.strip() for name in str(gpus).split(",")]
    if len(names) < count * each:
        raise ServerError(f"rollout.gpus={gpus} names {len(names)} GPUs, but {count} servers (rollout.count) of {each} "
                          f"(rollout.tensor_parallel) need {count * each}")  # fmt: skip
    return [",".join(names[i * each : (i + 1) * each]) for i in range(count)]


def score_of(token: int, answer: Mapping) -> float:
    """Log-prob of the asked token in a one-token answer. Raises Fault for what is not one."""
    try:
        entry = answer["choices"][0]["logprobs"]["content"][0]
        return next(e["logprob"] for e in [entry, *entry["top_logprobs"]] if e["token_id"] == token)
    except (KeyError, IndexError, TypeError, StopIteration) as error:
        raise Fault(f"a score of another form: {type(error).__name__} {error}") from error
