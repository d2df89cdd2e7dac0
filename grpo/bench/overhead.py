"""How long a step of the real loop spends in the model, and in all else: run by `grpo.bench stages` as a process.

    python -m grpo.bench.overhead MODEL FOLDER QUESTIONS COPIES COMPLETION STEPS      prints one JSON object a step

The model's: hearing clips, generating, forward and backward passes, the optimizer's step. The rest is the loop's.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import soundfile
from omegaconf import OmegaConf

from grpo import loop
from grpo.config import composed
from grpo.display import Display
from grpo.run import Run

SECONDS = 10  # of each clip: 250 audio tokens


def write_data(folder: Path, name: str, count: int) -> Path:
    """A manifest of noise clips."""
    rng, manifest = np.random.default_rng(count), folder / f"{name}.jsonl"
    with manifest.open("w") as file:
        for i in range(count):
            soundfile.write(folder / f"{name}{i}.wav", 0.1 * rng.standard_normal(16000 * SECONDS), 16000)
            file.write(json.dumps({"id": f"{name}{i}", "audio": f"{name}{i}.wav", "question": "What is heard?",
                                   "choices": ["rain", "dog"], "answer": 0}) + "\n")  # fmt: skip
    return manifest


class Watch:
    """Adds up the time within the calls that it wraps, once where they are nested."""

    def __init__(self):
        self.spent, self.inside = 0.0, False

    def wrap(self, owner, name: str) -> None:
        call = getattr(owner, name)

        def timed(*args, **kwargs):
            if self.inside:
                return call(*args, **kwargs)
            self.inside, start = True, time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.inside = False
                self.spent += time.perf_counter() - start

        setattr(owner, name, timed)


def main(model: str, folder: str, questions: str, copies: str, completion: str, steps: str) -> None:
    folder = Path(folder)
    train, held = write_data(folder, "train", int(questions) * int(steps)), write_data(folder, "eval", 1)
    cfg = composed([
        "model=qwen2_5_omni_7b", f"model.path={model}", "model.dtype=float32", "model.lora.dropout=0",
        "model.gradient_checkpointing=false", "data=manifest", f"data.train.path={train}",
        f"data.eval.path={held}", f"questions={questions}", f"generations={copies}", f"max_tokens={completion}",
        f"steps={steps}", "tracking=none", "beta=0.01",
        f"prompt.instruction={'word ' * 110}",
    ])  # fmt: skip
    OmegaConf.resolve(cfg)
    run = Run(cfg, folder / "run", Display(1, 10**9))
    watch = Watch()
    for owner, names in ((run.policy, ("generate", "_hear")), (run.engine, ("backward", "step")),
                         (run.engine.deepspeed, ("forward",))):  # fmt: skip
        for name in names:
            watch.wrap(owner, name)
    for step in range(int(steps)):
        watch.spent, start = 0.0, time.perf_counter()
        metrics, _, groups = loop.step(run, step)
        loop.sync(run, groups)
        seconds = time.perf_counter() - start
        print(json.dumps({"step": seconds, "model": watch.spent, "length": metrics["completions/mean_length"],
                          "prompt": len(groups[0].prompt.prompt_ids)} | run.clock.take()), flush=True)  # fmt: skip
    run.encode.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
