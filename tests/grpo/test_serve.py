"""A served export: the trainer's own prompt and answers through the OpenAI API, guarded, closed where it must be."""

import http.client
import json
import shutil

import pytest
import soundfile
from safetensors.torch import load_file, save_file

from grpo.answer import ask, listener, main
from grpo.config import ConfigError
from grpo.export import main as export_main
from grpo.rollout.serve import TOKEN, Process, ServerError, choose_token
from grpo.serve import NAME, launch, messages, request
from tests.conftest import make_clip
from tests.grpo.vllm_engines import needs_vllm

CHOICES = ["Speech", "Music", "Rain"]


@pytest.fixture(scope="module")
def out(checkpoint, tmp_path_factory):
    """An export whose special tokens are never likely: our sampler bans them, the OpenAI API's does not."""
    folder = tmp_path_factory.mktemp("serve")
    shutil.copytree(checkpoint, folder / "base")
    tensors = load_file(folder / "base" / "model.safetensors")
    from grpo.policy import Policy
    from tests.conftest import make_prompt

    policy = Policy(str(checkpoint), None, prompt=make_prompt())
    tensors["thinker.lm_head.weight"][policy.banned_ids] = 0
    save_file(tensors, folder / "base" / "model.safetensors", metadata={"format": "pt"})
    assert export_main([str(folder / "base"), str(folder / "out"), "--prompt", "card"]) == 0
    return folder / "out"


def test_nobody_else_is_let_in_without_a_token(out, monkeypatch):
    monkeypatch.delenv(TOKEN, raising=False)
    with pytest.raises(ServerError, match=TOKEN):
        choose_token("0.0.0.0", None)
    assert len(choose_token("127.0.0.1", None)) > 20


@needs_vllm
def test_the_command_line_of_a_server_for_users(out, tmp_path):
    one = launch(out, token="t")
    words, env = " ".join(one.command(8000)), one.environment()
    assert "--enable-scale-out" not in words and "--worker-extension-cls" not in words
    assert "--middleware grpo.rollout.serve.TokenGuard" in words and "--allowed-media-domains none.invalid" in words
    assert "t" not in one.command(8000) and env["VLLM_SERVER_DEV_MODE"] == "0" and env[TOKEN] == "t"
    with pytest.raises(ConfigError, match="is no export"):
        launch(tmp_path, token="t")


@needs_vllm
@pytest.mark.slow
def test_served_answers_are_the_trainers(out, tmp_path, monkeypatch, capsys):
    one = launch(out, token="secret", port=None, max_num_seqs=8, kv_cache_gib=0.05)
    process = Process(one, tmp_path / "log")
    clip = make_clip(3, 1.3)
    soundfile.write(tmp_path / "clip.wav", clip.samples, clip.hz, subtype="FLOAT")
    ours = listener(out, max_tokens=24)
    question = ask(tmp_path / "clip.wav", "What is heard?", CHOICES)
    here = next(ours.answers([question]))
    process.start()
    try:
        process.wait(900)
        body = {"model": NAME, "messages": messages(ours.policy.prompt, question, clip), "max_tokens": 24,
                "return_token_ids": True, "logprobs": True}  # fmt: skip
        there = request(process.url, body, "secret")
        encoded = ours.policy.encode(question, clip)
        assert there["prompt_token_ids"] == encoded.prompt_ids.tolist()  # the one prompt, audio slots and all
        assert there["choices"][0]["message"]["content"] == here["completion"]  # greedy without being asked to

        monkeypatch.setenv(TOKEN, "secret")
        words = [str(tmp_path / "clip.wav"), "What is heard?", "--choices", *CHOICES, "--model", str(out)]
        main([*words, "--max-tokens", "24", "--server", process.url, "--json"])
        row = json.loads(capsys.readouterr().out)
        assert row["prompt_hash"] == here["prompt_hash"] == ours.prompt_hash
        assert all(row[k] == here[k] for k in ("completion", "state", "tokens"))

        with pytest.raises(ConfigError, match="401"):
            request(process.url, body, "wrong")
        far = [{"role": "user", "content": [{"type": "audio_url", "audio_url": {"url": "http://127.0.0.1:9/x.wav"}}]}]
        with pytest.raises(ConfigError, match="allowed domains"):
            request(process.url, body | {"messages": far}, "secret")
        for route in ("collective_rpc", "pause", "update_weights", "reset_prefix_cache", "inference/v1/generate"):
            connection = http.client.HTTPConnection("127.0.0.1", process.port, timeout=20)
            connection.request("POST", f"/{route}", "{}", {"Authorization": "Bearer secret"})
            assert connection.getresponse().status in (403, 404, 405), route
    finally:
        process.stop()
    with pytest.raises(ConfigError, match="does not answer"):
        request(process.url, {}, "secret")
