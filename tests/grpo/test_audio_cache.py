"""What was heard is kept within its bounds, and nothing that goes wrong with it can go wrong with a run."""

import os

import pytest
import torch

from grpo.audio_cache import AudioCache
from grpo.policy import Policy
from tests.conftest import LORA, make_clip, make_prompt, make_question


def sound(i, tokens=10):
    return torch.full((tokens, 8), float(i))


def test_the_least_recently_used_goes_first():
    cache = AudioCache(memory_gib=3 * sound(0).nbytes / 2**30)
    for i in range(3):
        cache.put(str(i), sound(i))
    cache.get("0")
    cache.put("3", sound(3))
    assert cache.get("1") is None and all(torch.equal(cache.get(i), sound(int(i))) for i in "023")
    cache.put("4", sound(4, tokens=1000))  # larger than all that may be kept
    assert cache.get("4") is None
    cache.clear()
    assert cache.get("0") is None


def test_the_folder_is_shared_named_by_the_tower_and_bounded(tmp_path):
    size = sound(0).nbytes
    first = AudioCache(folder=tmp_path, disk_gib=10 * size / 2**30)
    first.of("tower")
    for i in range(3):
        first.put(f"{i:04}", sound(i))
    second, other = (AudioCache(folder=tmp_path) for _ in range(2))
    second.of("tower"), other.of("another")
    assert torch.equal(second.get("0002"), sound(2)) and other.get("0002") is None
    for i in range(3, 30):
        first.put(f"{i:04}", sound(i))
    assert sum(f.stat().st_size for f in tmp_path.rglob("*.safetensors")) <= 10 * size
    assert torch.equal(AudioCache(folder=tmp_path).get("0029") or torch.zeros(0), torch.zeros(0))  # no tower named yet


@pytest.mark.parametrize(
    "spoil", [lambda f: f.write_bytes(b"half"), lambda f: f.unlink(), lambda f: f.write_bytes(b"")]
)
def test_what_cannot_be_read_is_not_there(tmp_path, spoil):
    cache = AudioCache(memory_gib=0, folder=tmp_path)
    cache.of("tower")
    cache.put("abcd", sound(1))
    spoil(next(tmp_path.rglob("*.safetensors")))
    assert cache.get("abcd") is None
    cache.put("abcd", sound(1))
    assert torch.equal(cache.get("abcd"), sound(1))


@pytest.mark.skipif(os.geteuid() == 0 and not os.path.exists("/dev/full"), reason="needs a device that is full")
def test_a_full_disk_costs_no_more_than_the_entry(tmp_path, monkeypatch):
    cache = AudioCache(memory_gib=0, folder=tmp_path)
    cache.of("tower")
    monkeypatch.setattr("grpo.audio_cache.save_file", lambda tensors, path: open("/dev/full", "wb").write(b"x" * 10**6))
    cache.put("abcd", sound(1))
    assert cache.get("abcd") is None and not list(tmp_path.rglob(".*.safetensors*"))


def test_a_policy_takes_from_disk_what_this_very_tower_heard_before(checkpoint, tmp_path):
    def heard(policy):
        prompt = policy.encode(make_question("q"), make_clip(3))
        calls = []
        hook = policy.thinker.audio_tower.register_forward_hook(lambda *_: calls.append(1))
        (embedding,) = policy.encode_audio([prompt])
        hook.remove()
        return embedding, len(calls)

    policies = [Policy(checkpoint, LORA, prompt=make_prompt(), audio_cache=AudioCache(folder=tmp_path))
                for _ in range(2)]  # fmt: skip
    (first, asked), (second, again) = map(heard, policies)
    assert (asked, again) == (1, 0) and torch.equal(first, second)
    plain, _ = heard(Policy(checkpoint, LORA, prompt=make_prompt()))
    assert torch.equal(plain, second)
    with torch.no_grad():
        policies[0].thinker.audio_tower.proj.weight[0, 0] += 0.01
    assert policies[0]._tower_fingerprint() != policies[1]._tower_fingerprint()
