"""Before a job without network: what is fetched, what is refused, what is said to be missing."""

import pytest
from omegaconf import OmegaConf

from grpo.config import ConfigError
from grpo.fetch import WANTED, fetch, fetch_model


def hub(folder, files, asked):
    """Stands in for huggingface_hub.snapshot_download: a snapshot with `files`; notes how it was asked."""

    def download(name, **how):
        asked.append((name, how))
        snapshot = folder / "snapshots" / "abc123"
        snapshot.mkdir(parents=True)
        for file in files:
            (snapshot / file).write_bytes(b"0" * 1000)
        return str(snapshot)

    return download


def test_the_named_revision_is_fetched_and_nothing_that_runs(tmp_path):
    asked = []
    line = fetch_model("some/model", "abc123", hub(tmp_path, ["model.safetensors", "config.json"], asked))
    assert asked == [("some/model", {"revision": "abc123", "allow_patterns": WANTED})]
    assert f"commit abc123; in the run: model.path={tmp_path}/snapshots/abc123" in line
    assert not [p for p in WANTED if p.endswith((".py", ".bin", ".pt", ".pth", "*")) and p != "LICENSE*"]


def test_a_model_without_safetensors_and_a_hub_that_refuses(tmp_path):
    with pytest.raises(ConfigError, match="has no safetensors"):
        fetch_model("some/model", None, hub(tmp_path, ["config.json"], []))

    def refuse(*_, **__):
        raise OSError("no such\nrepository")

    with pytest.raises(ConfigError, match=r"model\.path=some/model: no such repository"):
        fetch_model("some/model", None, refuse)


def test_what_needs_no_network_asks_for_none(tmp_path):
    for path in (None, str(tmp_path)):
        assert "nothing to fetch" in fetch_model(path, None, None)


def test_missing_manifests_are_named_with_the_command_that_makes_them(tmp_path, capsys):
    (tmp_path / "train.jsonl").touch()
    data = {"train": {"path": str(tmp_path / "train.jsonl")}, "eval": {"path": str(tmp_path / "valid.jsonl")}}
    lacking = fetch(OmegaConf.create({"model": {"path": None}, "data": data}), None, None)
    assert len(lacking) == 1 and "valid.jsonl" in lacking[0] and "data.prepare" in lacking[0]
    assert lacking[0] in capsys.readouterr().out
    assert fetch(OmegaConf.create({"model": {"path": None}, "data": {"train": {"count": 8}}}), None, None) == []
