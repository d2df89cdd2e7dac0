"""`dry_run=true`: checks everything about a run that does not need its hardware, in about a minute on any machine.

Config -> every piece built; data -> validated; prompt -> printed; token counts -> against the limits; one rollout with
rewards, advantages and one optimizer step on a tiny model in place of the configured one.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from omegaconf import DictConfig, OmegaConf, open_dict

from grpo.config import ConfigError, zero_stage
from grpo.display import Display


def dry_run(cfg: DictConfig, display: Display) -> None:
    """Raise ConfigError if the run could not work; print what was checked otherwise."""
    from hydra import compose

    from grpo import loop
    from grpo.run import Run

    tiny = compose("train", return_hydra_config=False)  # our own defaults: the tiny model and the synthetic data
    small = cfg.copy()
    with open_dict(small):
        wanted = cfg.model.name
        small.model = OmegaConf.merge(tiny.model, {"lora": cfg.model.lora, "full": cfg.model.get("full")})
        small.model.tiny.warm_start.steps = 20
        small.engine, small.placement = tiny.engine, None
        small.questions = min(cfg.questions, 2)
        small.steps, small.resume, small.cache = 1, False, cfg.cache
        missing = _missing_manifests(cfg)
        if missing:
            small.data = OmegaConf.merge(tiny.data, {"train": {"count": 64}, "eval": {"count": 16}})
    display.say(f"config    composed and checked: {wanted}, ZeRO-{zero_stage(cfg.engine.stage, cfg.model.dtype)}, "
                f"{cfg.questions} questions x {cfg.generations} completions")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        run = Run(small, Path(folder), display)
        if missing:
            display.say(f"data      NOT HERE: {', '.join(missing)}; synthetic questions stand in below")
        else:
            display.say(f"data      {len(run.dataset.train)} training and {len(run.dataset.eval)} held-out questions, "
                        f"{run.dataset.left_out}")  # fmt: skip
        questions = run.dataset.readable[:32]
        lengths = [len(run.encode(q).prompt_ids) for q in questions]
        text = "\n".join(
            p["text"] for m in run.policy.prompt.messages(questions[0]) for p in m["content"] if "text" in p
        )
        display.say("prompt    " + text.replace("\n", "\n          "))
        display.say(f"tokens    prompts {min(lengths)} to {max(lengths)} (25 a second; text by the tiny tokenizer), "
                    f"completions up to {cfg.max_tokens}")  # fmt: skip
        display.say(run.header())
        metrics, rows, _ = loop.step(run, 0)
        if not all(value == value for value in metrics.values()):
            raise ConfigError(f"the step gave a metric that is not a number: {metrics}")
        display.samples(0, rows[: min(4, cfg.generations)])
    display.say("dry run   passed: rollout, rewards, advantages, one optimizer step on a tiny model"
                + ("; the data still has to be put in place" if missing else ""))  # fmt: skip


def _missing_manifests(cfg: DictConfig) -> list[str]:
    """Manifest files that the config names and this machine lacks."""
    paths = [cfg.data[split].get("path") for split in ("train", "eval")]
    return [str(path) for path in paths if path is not None and not Path(path).exists()]
