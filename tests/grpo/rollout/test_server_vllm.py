"""The real thing: a vLLM server on this CPU, fed by delta and full syncs, killed in mid-batch, asked without a token.

One server for the whole module; it is killed and restarted by the last tests.
"""

import contextlib
import os
import random
import signal
import threading
import time
from pathlib import Path

import httpx
import pytest
import torch

from grpo.policy import Policy
from grpo.rollout import Sampling
from grpo.rollout.hf import HFRollout
from grpo.rollout.serve import Launch, Process, ServerError
from grpo.rollout.server import RolloutError, VLLMServer
from grpo.sync.delta import Delta
from grpo.sync.full import Full
from tests.conftest import LORA, OneRank, make_clip, make_prompt, make_question

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]
LORA = LORA | {"targets": r"model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"}
TEMPERATURE = 1.3


@pytest.fixture(scope="module")
def policy(checkpoint):
    return Policy(checkpoint, LORA, prompt=make_prompt(), temperature=TEMPERATURE).eval()


@pytest.fixture(scope="module")
def prompts(policy):
    return [policy.encode(make_question(f"question {i}"), make_clip(i, 0.3 + 0.4 * i)) for i in range(4)]


@pytest.fixture(scope="module")
def rollout(policy):
    engine = VLLMServer(policy, max_model_len=512, max_num_seqs=64, kv_cache_gib=0.1, timeout=900, start_timeout=1800)
    yield engine
    engine.close()


def turn(policy, seed: int, size: float = 0.1) -> None:
    """New values for every A and B, far from the last ones."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in policy.named_parameters():
        if "lora_" in name:
            p.data = size * torch.randn(p.shape, generator=generator)


@torch.no_grad()
def gap(policy, groups, scores=None) -> float:
    """Largest difference of the sampler's (or the given) log-probs to the trainer's."""
    logp_NT, _ = policy(policy.prepare(groups))
    theirs = [c.sampler_logp for g in groups for c in g.completions]
    theirs = theirs if scores is None else [row for group in scores for row in group]
    return max(abs(a - b) for row, other in zip(logp_NT.tolist(), theirs, strict=True) for a, b in zip(row, other))  # noqa: B905


def ids(groups):
    return [[c.token_ids for c in g.completions] for g in groups]


def test_before_any_push_it_samples_from_the_checkpoint(policy, prompts, rollout):
    turn(policy, 0, 0.0)
    groups = rollout.generate(prompts, 4, Sampling(16, seed=1))
    assert [len(g.completions) for g in groups] == [4] * 4 and gap(policy, groups) <= 1e-5
    assert len({c.token_ids for g in groups for c in g.completions}) > 12


@pytest.mark.parametrize("strategy", [Delta, Full])
def test_parity_after_each_of_twenty_syncs(strategy, policy, prompts, rollout):
    sync = strategy(policy, OneRank(policy), rollout, probe_every=5)
    hf, worst, version = HFRollout(policy), 0.0, rollout.version
    before = ids(rollout.generate(prompts, 2, Sampling(12, greedy=True)))
    for i in range(20):
        turn(policy, version + i + 1)
        receipt = sync.push(version + i + 1, rollout.generate(prompts[:1], 2, Sampling(8)))
        sampling = Sampling(12, seed=5, step=i)
        groups = rollout.generate(prompts, 3, sampling)
        worst = max(worst, gap(policy, groups))
        assert worst <= 1e-5, f"sync {i}"
        assert {c.version for g in groups for c in g.completions} == {receipt.version}
        greedy = ids(rollout.generate(prompts, 1, Sampling(12, greedy=True)))
        assert greedy == ids(hf.generate(prompts, 1, Sampling(12, greedy=True)))
        assert greedy != before
        assert receipt.probe_error is None or receipt.probe_error <= 1e-5
        before = greedy
    print(f"{strategy.__name__}: max |dlogp| {worst:.2g}, {receipt.bytes} bytes a sync")


def test_parity_of_weights_that_were_broadcast(policy, prompts, rollout):
    sync = Full(policy, OneRank(policy), rollout, transport="broadcast", probe_every=1)
    receipts = []
    for _ in range(3):
        turn(policy, 300 + rollout.version)
        receipts.append(sync.push(rollout.version + 1, rollout.generate(prompts[:1], 2, Sampling(8))))
        assert gap(policy, rollout.generate(prompts, 3, Sampling(12, step=rollout.version))) <= 1e-5
        assert receipts[-1].probe_error <= 1e-5
    assert receipts[0].bytes > receipts[1].bytes == receipts[2].bytes > 0  # all weights, then those that are trained
    Delta(policy, OneRank(policy), rollout, probe_every=0).push(rollout.version + 1)  # what can be repeated, for later


def test_score_of_given_completions(policy, prompts, rollout):
    groups = rollout.generate(prompts[:2], 2, Sampling(10, seed=3))
    assert gap(policy, groups, rollout.score(groups)) <= 1e-5


def test_banned_ids_are_never_sampled_and_have_no_mass(policy, prompts, rollout):
    groups = rollout.generate(prompts, 32, Sampling(24, seed=2))
    sampled = {t for g in groups for c in g.completions for t in c.token_ids}
    assert not sampled & set(policy.banned_ids) and gap(policy, groups) <= 1e-5
    assert {c.truncated for g in groups for c in g.completions} <= {True, False}


def test_same_name_same_completions_whatever_else_is_asked(prompts, rollout):
    together = ids(rollout.generate(prompts, 3, Sampling(12, seed=7)))
    alone = [ids(rollout.generate([p], 3, Sampling(12, seed=7)))[0] for p in prompts]
    assert together == alone
    assert together != ids(rollout.generate(prompts, 3, Sampling(12, seed=8)))


def test_every_route_wants_the_token(rollout):
    url, token = rollout.servers[0].url, rollout.token
    with httpx.Client(base_url=url, trust_env=False, timeout=30) as anyone:
        right = {"Authorization": f"Bearer {token}"}
        paths = anyone.get("/openapi.json", headers=right).json()["paths"]
        assert {"/collective_rpc", "/update_weight_version", "/reset_prefix_cache", "/pause", "/health"} <= set(paths)
        for path, methods in paths.items():
            for method in methods:
                for headers in ({}, {"Authorization": "Bearer no"}):
                    assert anyone.request(method, path, headers=headers).status_code == 401, (method, path)
        for path in ("/metrics", "/docs", "/no/such/route"):
            assert anyone.get(path).status_code == 401
        assert anyone.options("/collective_rpc").status_code == 401
        assert anyone.get("/health", headers=right).status_code == 200


def test_a_wrong_token_is_said_to_be_wrong(policy, rollout):
    with pytest.raises(ServerError, match="no server answers"):
        VLLMServer(policy, start=False, urls=[rollout.servers[0].url], token="wrong")


def test_by_url_the_weights_travel_in_the_request(policy, prompts, rollout):
    by_url = VLLMServer(policy, start=False, urls=[rollout.servers[0].url], token=rollout.token)
    turn(policy, 100)
    Delta(policy, OneRank(policy), by_url, probe_every=0).push(1)
    assert gap(policy, by_url.generate(prompts, 2, Sampling(12))) <= 1e-5
    by_url.close()
    # its own trainer notices that somebody else wrote there, and repeats its last push
    Delta(policy, OneRank(policy), rollout, probe_every=0).push(rollout.version + 1)
    assert gap(policy, rollout.generate(prompts, 2, Sampling(12))) <= 1e-5


def test_a_prompt_that_differs_is_an_error_that_names_the_question(prompts, rollout):
    import dataclasses

    other = dataclasses.replace(prompts[0], samples=prompts[0].samples[:1600])
    with pytest.raises(RolloutError, match="question question 0: the rollout engine read another prompt"):
        rollout.generate([other], 2, Sampling(4))


# ---------------------------------------------------------------- killed in mid-batch


def children(pid: int) -> list[int]:
    """Process ids of all that a process started, nearest first."""
    found, todo = [], [pid]
    while todo:
        pid = todo.pop(0)
        with contextlib.suppress(OSError):  # it may end while we look
            for task in Path(f"/proc/{pid}/task").iterdir():
                todo += [int(p) for p in (task / "children").read_text().split()]
        found.append(pid)
    return found[1:]


@pytest.mark.parametrize("victim", ["api", "engine"])
def test_killed_in_mid_batch_it_comes_back_with_the_same_weights_and_answers(victim, policy, prompts, rollout):
    turn(policy, 200)
    Delta(policy, OneRank(policy), rollout, probe_every=0).push(rollout.version + 1)
    sampling = Sampling(200, seed=11)
    calm = rollout.generate(prompts, 8, sampling)
    start = time.monotonic()  # of the second: nothing is new to it
    assert ids(rollout.generate(prompts, 8, sampling)) == ids(calm)
    usual = time.monotonic() - start
    restarts, old = rollout.restarts, children(rollout.servers[0].process.keeper.pid)
    names = {pid: Path(f"/proc/{pid}/comm").read_text().strip() for pid in old}
    target = old[0] if victim == "api" else next(pid for pid, name in names.items() if "EngineCor" in name)
    after = random.Random(victim).uniform(0.1, 0.4) * usual
    killer = threading.Timer(after, os.kill, (target, signal.SIGKILL))
    killer.start()
    groups = rollout.generate(prompts, 8, sampling)
    killer.join()
    assert rollout.restarts == restarts + 1, "it was killed too late to matter"
    assert ids(groups) == ids(calm)
    assert {c.version for g in groups for c in g.completions} == {rollout.version}
    assert gap(policy, groups) <= 1e-5
    for pid in old:
        assert not Path(f"/proc/{pid}").exists() or " Z " in Path(f"/proc/{pid}/stat").read_text()


def test_a_kv_cache_that_is_too_small_says_what_to_do(checkpoint, tmp_path, rollout):
    rollout.close()  # one server at a time
    launch = Launch(model=str(checkpoint), dtype="float32", token="t", max_model_len=2048, kv_cache_gib=0.0001)
    process = Process(launch, tmp_path / "log")
    process.start()
    with pytest.raises(ServerError) as error:
        process.wait(1800)
    assert "raise rollout.kv_cache_gib" in str(error.value).splitlines()[0]
