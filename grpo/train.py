"""Entry point: `python -m grpo.train [key=value ...]`: composes the config, checks it, runs. See `--help`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from grpo.multirun import register, result, todo
from grpo.signals import install


def guard_packages() -> None:
    """`data`, `rewards` and `conf` are common names: make sure that ours, beside `grpo`, are the ones imported."""
    import conf
    import data
    import rewards

    home = Path(__file__).resolve().parent.parent
    for package in (data, rewards, conf):
        found = Path(package.__file__ or next(iter(package.__path__))).resolve()
        if home not in found.parents:
            sys.exit(f"the package {package.__name__!r} was imported from {found}, not from {home}: start from another "
                     f"folder, or rename what shadows it")  # fmt: skip


@hydra.main(config_path="pkg://conf", config_name="train", version_base="1.3")
def run(cfg: DictConfig) -> float | None:
    stopping = install()  # anew: a launcher may have set handlers of its own
    # Imported here: --help and --cfg answer without waiting for torch.
    from grpo.config import ConfigError, RunError, Unfinished, check_targets
    from grpo.display import Display
    from grpo.rollout import RolloutError
    from grpo.sync.names import SyncError

    folder, one_of_many = Path(HydraConfig.get().runtime.output_dir), HydraConfig.get().mode.name == "MULTIRUN"
    display = Display(int(os.environ.get("RANK", 0)), cfg.log.every)
    try:
        OmegaConf.resolve(cfg)
        check_targets(cfg)
        if cfg.dry_run:
            from grpo.dryrun import dry_run

            return dry_run(cfg, display)
        if one_of_many and (cfg := todo(cfg, folder)) is None:
            return display.say(f"{folder.name} is finished: nothing to do") or result(folder)
        from grpo.run import Run

        summary = Run(cfg, folder, display).train()
        return summary["accuracy/final"] if summary else stopping.leave()  # what a sweeper (Optuna) looks at
    except (ConfigError, RunError, RolloutError, SyncError) as error:
        display.stop()
        queued = isinstance(error, Unfinished) and "submitit" in HydraConfig.get().launcher.get("_target_", "")
        if one_of_many and not queued:
            raise  # the other jobs go on; this one is listed as failed
        print(f"error: {error}", file=sys.stderr)
        sys.exit(getattr(error, "status", 1))


def main() -> None:
    from grpo.config import one_line_errors, run_name

    install(), guard_packages()
    OmegaConf.register_new_resolver("run_name", run_name)
    register()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra's short form hides where a real fault was
    with one_line_errors():
        run()


if __name__ == "__main__":
    main()
