"""One real step of the real loop, recorded from outside, and its live gradient; run by test_replay_loss.py.

python record_worker.py FOLDER CACHE OVERRIDE...
"""

import sys
from pathlib import Path

import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from safetensors.torch import save_file

from grpo import loop, record
from grpo.config import run_name
from grpo.display import Display
from grpo.run import Run, write_provenance


class Spy:
    """The objective, remembering what it was given."""

    def __init__(self, inner):
        self.inner, self.seen = inner, []

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __call__(self, x):
        self.seen.append(x)
        return self.inner(x)


def main(folder, *overrides):
    folder = Path(folder)
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(OmegaConf.to_yaml(list(overrides)))
    OmegaConf.register_new_resolver("run_name", run_name)
    with initialize_config_module("conf", version_base="1.3"):
        cfg = compose("train", list(overrides))
    OmegaConf.resolve(cfg)
    run = Run(cfg, folder, Display(0, 1))
    write_provenance(cfg, folder, run.dataset.fingerprint, 0)
    loop.step(run, 0)  # so that the adapter's B is not zero any more

    kept, norms = {}, []
    generate, score, take = run.rollout.generate, run.rewards.score, run.engine.step
    run.rollout.generate = lambda *a: kept.setdefault("groups", generate(*a))
    run.rewards.score = lambda *a, **k: kept.setdefault("scores", score(*a, **k))
    run.objective = spy = Spy(run.objective)

    def step(lr):
        if not norms:
            kept["gradient"] = run.engine.gradients()
        norms.append(take(lr))
        return norms[-1]

    run.engine.step = step
    record.save_adapter(folder, 2, run.policy, run.engine)
    metrics, _ = loop.step(run, 1)
    first = spy.seen[: len(spy.seen) // run.settings.updates]
    last = spy.seen[-len(first) :]
    groups, scores = kept["groups"], kept["scores"]
    shape = (len(groups), -1)
    parts = record.parts(
        groups, reward_BG=torch.tensor(scores.total).view(shape), component_NR=torch.tensor(scores.components),
        advantage_BG=torch.cat([x.advantage_N for x in first]).view(shape),
        logp=[x.logp_NT for x in last], old_logp=[x.old_logp_NT for x in first],
        entropy=[x.entropy_NT for x in first],
        ref_logp=None if first[0].ref_logp_NT is None else [x.ref_logp_NT for x in first],
    )  # fmt: skip
    record.write(
        folder, 2, parts, seed=cfg.seed, ranks=[len(groups)], micro_questions=cfg.micro_questions,
        names=run.rewards.names, weights=run.rewards.weights, decode=run.policy.decode,
        facts={"loss": metrics["loss"], "grad_norm": norms[0]},
    )  # fmt: skip
    save_file({k: v.contiguous() for k, v in kept["gradient"].items()}, folder / "live.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
