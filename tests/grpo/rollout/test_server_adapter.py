"""A real vLLM server that takes LoRA adapters: parity after each hot-loaded one, and after a restart."""

import os
import signal

import pytest

from grpo.policy import Policy
from grpo.rollout import Sampling
from grpo.rollout.hf import HFRollout
from grpo.rollout.server import VLLMServer
from grpo.sync.adapter import Adapter
from tests.conftest import OneRank, make_clip, make_prompt, make_question
from tests.grpo.rollout.test_server_vllm import LORA, TEMPERATURE, children, gap, ids, turn

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def policy(checkpoint):
    return Policy(checkpoint, LORA, prompt=make_prompt(), temperature=TEMPERATURE).eval()


@pytest.fixture(scope="module")
def rollout(policy):
    engine = VLLMServer(policy, max_model_len=512, max_num_seqs=64, kv_cache_gib=0.1, timeout=900, start_timeout=1800,
                        adapters=True)  # fmt: skip
    yield engine
    engine.close()


def test_parity_after_each_adapter_and_after_a_restart(policy, rollout):
    prompts = [policy.encode(make_question(f"question {i}"), make_clip(i, 0.3 + 0.4 * i)) for i in range(3)]
    turn(policy, 0, 0.0)
    assert gap(policy, rollout.generate(prompts, 2, Sampling(12))) <= 1e-5
    sync, hf = Adapter(policy, OneRank(policy), rollout, probe_every=5), HFRollout(policy)
    worst = 0.0
    for version in range(1, 21):
        turn(policy, version)
        receipt = sync.push(version, rollout.generate(prompts[:1], 2, Sampling(8)))
        groups = rollout.generate(prompts, 3, Sampling(12, seed=1, step=version))
        worst = max(worst, gap(policy, groups))
        assert worst <= 1e-5, f"adapter {version}"
        assert {c.version for g in groups for c in g.completions} == {receipt.version}
        greedy = Sampling(12, greedy=True)
        assert ids(rollout.generate(prompts, 1, greedy)) == ids(hf.generate(prompts, 1, greedy))
    print(f"Adapter: max |dlogp| {worst:.2g}, {receipt.bytes} bytes a sync")
    sampling = Sampling(12, seed=9)
    calm = rollout.generate(prompts, 3, sampling)
    os.kill(children(rollout.servers[0].process.keeper.pid)[0], signal.SIGKILL)
    again = rollout.generate(prompts, 3, sampling)
    assert rollout.restarts == 1 and ids(again) == ids(calm) and gap(policy, again) <= 1e-5
