"""Two steps of the real loop, the second recorded, and the gradient of its first update; for test_replay_loss.py.

python record_worker.py FOLDER OVERRIDE...
"""

import sys
from pathlib import Path

from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from safetensors.torch import save_file

from grpo import loop
from grpo.config import run_name
from grpo.display import Display
from grpo.run import Run, write_provenance


def main(folder, *overrides):
    folder = Path(folder)
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(OmegaConf.to_yaml(list(overrides)))
    OmegaConf.register_new_resolver("run_name", run_name)
    with initialize_config_module("conf", version_base="1.3"):
        cfg = compose("train", list(overrides))
    OmegaConf.resolve(cfg)
    run = Run(cfg, folder, Display(0, 1))
    write_provenance(cfg, folder, run.dataset.fingerprint, 0, 1)
    _, _, groups = loop.step(run, 0)  # so that the adapter's B is not zero any more
    loop.sync(run, groups)

    live, take = {}, run.engine.step

    def step(lr):
        live.update({} if live else run.engine.gradients())
        return take(lr)

    run.engine.step = step
    loop.step(run, 1)
    save_file({k: v.contiguous() for k, v in live.items()}, folder / "live.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
