"""Every metric of a run by the field's names: what it means, in one table, and how it is reduced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from grpo.batch import Group

# name (or family) -> meaning. docs/metrics.md is this table.
MEANING = {
    "reward": "weighted sum of the reward components, mean over the step's completions",
    "reward_std": "std of the reward within a group (sample std), mean over groups",
    "frac_reward_zero_std": "share of groups whose completions all have the same reward: they teach nothing",
    "rewards/<name>/mean": "one reward component before its weight, mean over completions",
    "rewards/<name>/std": "the component's std over the step's completions",
    "rewards/failed": "completions whose reward raised or was not a number; their group gets advantage 0",
    "completions/mean_length": "tokens per completion, stop token included (also min_length, max_length)",
    "completions/clipped_ratio": "share of completions cut by the length limit",
    "kl": "KL estimate against the reference per token, mean over the step's tokens; absent when beta is 0",
    "entropy": "entropy of the next-token distribution in nats, mean over the step's tokens",
    "ratio/mean": "importance ratio π/π_old (also ratio/max, ratio/min); 1 at the first update of a rollout",
    "clip_ratio/low_mean": "share of tokens where the lower clip binds (A < 0); clip_ratio/high_mean: the upper",
    "sampling/sampling_logp_difference/mean": "gap from log π_old to log π_sampler (also max): 0 when sync is exact",
    "sampling/importance_sampling_ratio/mean": "π_old/π_sampler per token (also min, max)",
    "weights/<name>/mean": "weight on the policy term (`sampler`: rollout.correction); weights/<name>/masked: zeros",
    "sync/probe_error": "largest gap in log-prob between engine and trainer after a sync (on its turn), in nats",
    "sync/bytes": "sent to each rollout engine by the step's sync; sync/changed: weight matrices it gave values for",
    "rollout/faults": "answers of rollout servers refused so far; rollout/restarts: times one was started anew",
    "loss": "the step's loss; near 0 on-policy, its gradient is not",
    "grad_norm": "gradient norm before clipping",
    "learning_rate": "of the step",
    "num_tokens": "prompt and completion tokens processed so far",
    "epoch": "questions asked so far divided by the training questions",
    "quarantined": "training questions left out because their clip could not be read",
    "accuracy/heldout": "greedy accuracy on the held-out questions (evaluation steps only)",
    "step_time": "seconds for the step; time/<stage> its parts",
}


class Accumulator:
    """Exact reduction of per-token metrics over micro-batches and ranks: sums and counts, never means of means."""

    def __init__(self):
        self.sums: dict[str, float] = {}
        self.extremes: dict[str, float] = {}

    def add(self, metrics: Mapping[str, Tensor], mask_NT: Tensor) -> None:
        self.sums["count"] = self.sums.get("count", 0.0) + mask_NT.sum().item()
        for name, value_NT in metrics.items():
            values = value_NT[mask_NT].double()
            if name.endswith(("/max", "/min")):
                sign = 1.0 if name.endswith("/max") else -1.0
                largest = (sign * values).max().item() if len(values) else -float("inf")
                self.extremes[name] = max(self.extremes.get(name, -float("inf")), largest)
            else:
                self.sums[name] = self.sums.get(name, 0.0) + values.sum().item()

    def result(self, engine) -> dict[str, float]:
        sums = engine.reduce(self.sums)
        count = max(sums.pop("count"), 1.0)
        extremes = engine.reduce(self.extremes, "max")
        return {n: s / count for n, s in sums.items()} | {
            n: (v if n.endswith("/max") else -v) for n, v in extremes.items()
        }


def group_metrics(groups: Sequence[Group], reward_BG: Tensor, component_NR: Tensor, names: Sequence[str], failed: int,
                  engine) -> dict[str, float]:  # fmt: skip
    """Rewards and lengths over all ranks. `component_NR` are the components before weighting (NaN where one failed)."""
    lengths = torch.tensor([len(c.token_ids) for g in groups for c in g.completions], dtype=torch.float64)
    cut = sum(c.truncated for g in groups for c in g.completions)
    spread_B = reward_BG.std(1) if reward_BG.shape[1] > 1 else torch.zeros(len(reward_BG))
    equal_B = (reward_BG == reward_BG[:, :1]).all(1)
    known = component_NR.double().nan_to_num(0.0)
    sums = {"n": float(len(lengths)), "b": float(len(groups)), "reward": reward_BG.double().sum().item(),
            "reward_std": spread_B.double().sum().item(), "frac_reward_zero_std": equal_B.double().sum().item(),
            "length": lengths.sum().item(), "cut": float(cut), "failed": float(failed)}  # fmt: skip
    for r, name in enumerate(names):
        sums |= {f"1/{name}": known[:, r].sum().item(), f"2/{name}": known[:, r].square().sum().item(),
                 f"0/{name}": component_NR[:, r].isfinite().double().sum().item()}  # fmt: skip
    s = engine.reduce(sums)
    ends = engine.reduce({"max": lengths.max().item(), "min": -lengths.min().item()}, "max")
    out = {"reward": s["reward"] / s["n"], "reward_std": s["reward_std"] / s["b"],
           "frac_reward_zero_std": s["frac_reward_zero_std"] / s["b"], "rewards/failed": s["failed"],
           "completions/mean_length": s["length"] / s["n"], "completions/min_length": -ends["min"],
           "completions/max_length": ends["max"], "completions/clipped_ratio": s["cut"] / s["n"]}  # fmt: skip
    for name in names:
        n = max(s[f"0/{name}"], 1.0)
        mean = s[f"1/{name}"] / n
        out[f"rewards/{name}/mean"] = mean
        out[f"rewards/{name}/std"] = max(s[f"2/{name}"] / n - mean**2, 0.0) ** 0.5
    return out


def as_markdown() -> str:
    """docs/metrics.md: `python -m grpo.metrics > docs/metrics.md`."""
    rows = "\n".join(f"| `{name}` | {meaning} |" for name, meaning in MEANING.items())
    return f"# Metrics\n\nOne line a step in `metrics.jsonl`, and in wandb.\n\n| name | meaning |\n|---|---|\n{rows}"


if __name__ == "__main__":
    print(as_markdown())
