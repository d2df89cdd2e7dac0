"""Servers on a node of their own are started as the run's words say; nothing is started here."""

import pytest
from hydra import compose, initialize_config_module

from grpo.config import ConfigError
from grpo.rollout.serve import TOKEN, ServerError
from grpo.rollout.standalone import launches
from tests.grpo.vllm_engines import needs_vllm

pytestmark = needs_vllm


def of(*words, count=2, host="10.0.0.2"):
    with initialize_config_module("conf", version_base="1.3"):
        cfg = compose("train", list(words))
    return launches(cfg, "/model", host=host, port=8000, count=count)


def test_ports_limits_and_gpus_follow_the_words(monkeypatch):
    monkeypatch.setenv(TOKEN, "secret")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    two = of("rollout=vllm_server", "rollout.max_model_len=512", "rollout.tensor_parallel=2")
    assert [(s.host, s.port, s.gpus, s.token) for s in two] == [("10.0.0.2", 8000, "0,1", "secret"),
                                                                ("10.0.0.2", 8001, "2,3", "secret")]  # fmt: skip
    assert {(s.model, s.dtype, s.max_model_len, s.lora_rank, s.exchange) for s in two} == {
        ("/model", "float32", 512, 0, None)
    }
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert [s.gpus for s in of("rollout=vllm_server")] == [None, None]


def test_without_a_token_nobody_is_let_in(monkeypatch):
    monkeypatch.delenv(TOKEN, raising=False)
    with pytest.raises(ServerError, match=TOKEN):
        of("rollout=vllm_server")


def test_what_cannot_be_served_from_another_node(monkeypatch):
    monkeypatch.setenv(TOKEN, "secret")
    with pytest.raises(ConfigError, match="for rollout=vllm_server"):
        of("rollout=hf")
    with pytest.raises(ConfigError, match="sync=delta"):
        of("rollout=vllm_server", "sync=adapter")
