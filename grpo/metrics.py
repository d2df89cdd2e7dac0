"""Every metric of a run by the field's names: what it means, in one table, and how it is reduced."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from grpo.batch import Group, LossInputs
from grpo.collect import Earned
from rewards.accuracy import choice
from rewards.tags import parse

# name (or family) -> meaning. docs/metrics.md is this table.
MEANING = {
    "reward": "weighted sum of the reward components, mean over the step's completions (without those that failed)",
    "reward_std": "std of the reward within a group (sample std), mean over groups",
    "frac_reward_zero_std": "share of groups whose completions all have the same reward: they teach nothing",
    "frac_groups_trained": "share of groups that were computed on: those without advantage rest where the loss says \
nothing of them (beta=0); per-token metrics are of the others",
    "frac_all_right": "share of groups whose completions are all right by the reward `accuracy`",
    "frac_all_wrong": "share of groups of which none is",
    "rewards/<name>/mean": "one reward component before its weight, mean over completions",
    "rewards/<name>/std": "the component's std over the step's completions",
    "rewards/failed": "completions whose reward raised or was not a number; their group gets advantage 0",
    "completions/mean_length": "tokens per completion, stop token included (also min_length, max_length)",
    "completions/mean_terminated_length": "the same of those that ended by themselves (also \
min_terminated_length, max_terminated_length)",
    "completions/clipped_ratio": "share of completions cut by the length limit",
    "answers/<letter>": "share of completions whose answer is this option; answers/none: names no option",
    "gold/<letter>": "share of questions whose right option this is",
    "dynamic_sampling/rounds": "rollouts that the step took; dynamic_sampling/kept: share of all groups asked whose \
rewards differ; dynamic_sampling/reward: mean reward of all completions asked, those not trained on included",
    "kl": "KL estimate against the reference per token, mean over the step's tokens; absent when beta is 0",
    "entropy": "entropy of the next-token distribution in nats, mean over the step's tokens",
    "ratio/mean": "importance ratio π/π_old (also ratio/max, ratio/min); 1 at the first update of a rollout",
    "clip_ratio/low_mean": "share of tokens where the lower clip binds (A < 0); clip_ratio/high_mean: the upper, \
clip_ratio/region_mean: either",
    "sampling/sampling_logp_difference/mean": "gap from log π_old to log π_sampler (also max): 0 when sync is exact",
    "sampling/importance_sampling_ratio/mean": "π_old/π_sampler per token (also min, max)",
    "sampling/kl_k3": "k3 estimate of KL(sampler, trainer) per token",
    "sampling/effective_sample_size": "mean(w)²/mean(w²), w = π/π_sampler: the share of tokens that really count",
    "entropy_coefficient": "weight of an adaptive entropy bonus",
    "kl_penalty/mean": "KL taken off a completion's reward (kl_in=reward), mean over completions",
    "weights/<name>/mean": "weight on the policy term (`sampler`: rollout.correction); weights/<name>/masked: zeros",
    "sync/probe_error": "largest gap in log-prob between engine and trainer after a sync (on its turn), in nats",
    "sync/bytes": "sent to each rollout engine by the step's sync; sync/changed: weight matrices it gave values for",
    "rollout/faults": "answers of rollout servers refused so far; rollout/restarts: times one was started anew",
    "loss": "the step's loss; near 0 on-policy, its gradient is not",
    "grad_norm": "gradient norm before clipping; null where it was not finite and the step was skipped",
    "nonfinite_steps": "steps skipped so far because loss or gradient was not finite",
    "learning_rate": "of the step",
    "num_tokens": "prompt and completion tokens processed so far",
    "epoch": "questions asked so far divided by the training questions",
    "quarantined": "training questions left out because their clip could not be read",
    "accuracy/heldout": "greedy accuracy on the held-out questions (evaluation steps only)",
    "bench/<name>": "the same, strict, on a benchmark of `bench` (a slice with eval.questions)",
    "step_time": "seconds for the step; time/<stage> its parts",
    "tokens_per_second": "prompt and completion tokens that the step processed, over step_time; all ranks together",
}


def mismatch(x: LossInputs) -> dict[str, Tensor]:
    """How far the sampler's log-probs are from the trainer's, per token, under the field's names.

    `sampling/weight_mean` and `sampling/weight_square_mean` are those of w = π_θ/π_sampler: Accumulator.result makes
    the effective sample size of them.
    """
    gap_NT = x.old_logp_NT.detach() - x.sampler_logp_NT
    held_NT = gap_NT.clamp(-20, 20)
    ratio_NT = held_NT.exp()
    weight_NT = (x.logp_NT.detach() - x.sampler_logp_NT).clamp(-20, 20).exp()
    difference, ratio = "sampling/sampling_logp_difference", "sampling/importance_sampling_ratio"
    return {f"{difference}/mean": gap_NT.abs(), f"{difference}/max": gap_NT.abs(), f"{ratio}/mean": ratio_NT,
            f"{ratio}/min": ratio_NT, f"{ratio}/max": ratio_NT, "sampling/kl_k3": ratio_NT - 1 - held_NT,
            "sampling/weight_mean": weight_NT, "sampling/weight_square_mean": weight_NT.square()}  # fmt: skip


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
                known = self.extremes.get(name, -float("inf"))
                self.extremes[name] = largest if math.isnan(largest) or largest > known else known
            else:
                self.sums[name] = self.sums.get(name, 0.0) + values.sum().item()

    def result(self, engine) -> dict[str, float]:
        sums = engine.reduce(self.sums)
        count = max(sums.pop("count"), 1.0)
        extremes = engine.reduce(self.extremes, "max")
        out = {n: s / count for n, s in sums.items()}
        mean, square = (out.pop(f"sampling/weight_{name}", 0.0) for name in ("mean", "square_mean"))
        if square:
            out["sampling/effective_sample_size"] = mean**2 / square
        return out | {n: (v if n.endswith("/max") else -v) for n, v in extremes.items()}


def group_metrics(groups: Sequence[Group], reward_BG: Tensor, component_NR: Tensor, names: Sequence[str],
                  engine) -> dict[str, float]:  # fmt: skip
    """Rewards and lengths over all ranks. `component_NR`: components before weighting; NaN where a reward failed."""
    completions = [c for g in groups for c in g.completions]
    lengths = torch.tensor([len(c.token_ids) for c in completions], dtype=torch.float64)
    ended = lengths[torch.tensor([not c.truncated for c in completions])]
    failed = (~component_NR.isfinite()).any(1).sum().item()
    rewarded = reward_BG[reward_BG.isfinite()]
    whole_BG = reward_BG[reward_BG.isfinite().all(1)]  # where a reward failed, nothing is known of the group's spread
    spread_B = whole_BG.std(1) if len(whole_BG) and whole_BG.shape[1] > 1 else torch.zeros(len(whole_BG))
    equal_B = (whole_BG == whole_BG[:, :1]).all(1)
    known = component_NR.double().nan_to_num(0.0)
    sums = {"n": len(lengths), "b": len(groups), "reward": rewarded.double().sum().item(),
            "rewarded": len(rewarded), "whole": len(whole_BG),
            "reward_std": spread_B.double().sum().item(), "frac_reward_zero_std": equal_B.double().sum().item(),
            "length": lengths.sum().item(), "ended": len(ended), "ended_length": ended.sum().item(),
            "failed": failed}  # fmt: skip
    for r, name in enumerate(names):
        sums |= {f"1/{name}": known[:, r].sum().item(), f"2/{name}": known[:, r].square().sum().item(),
                 f"0/{name}": component_NR[:, r].isfinite().double().sum().item()}  # fmt: skip
    if "accuracy" in names:
        right_BG = known[:, list(names).index("accuracy")].view_as(reward_BG) > 0.5
        sums |= {"all_right": right_BG.all(1).sum().item(), "all_wrong": (~right_BG.any(1)).sum().item()}
    s = engine.reduce({name: float(value) for name, value in sums.items()})
    nothing = torch.tensor([float("inf")], dtype=torch.float64)
    ends = engine.reduce({"max": lengths.max().item(), "min": -lengths.min().item(),
                          "ended_max": torch.cat([ended, -nothing]).max().item(),
                          "ended_min": -torch.cat([ended, nothing]).min().item()}, "max")  # fmt: skip
    out = {"reward": s["reward"] / max(s["rewarded"], 1),
           "reward_std": s["reward_std"] / max(s["whole"], 1),
           "frac_reward_zero_std": s["frac_reward_zero_std"] / max(s["whole"], 1), "rewards/failed": s["failed"],
           "completions/mean_length": s["length"] / s["n"], "completions/min_length": -ends["min"],
           "completions/max_length": ends["max"],
           "completions/clipped_ratio": (s["n"] - s["ended"]) / s["n"]}  # fmt: skip
    if s["ended"]:
        out |= {"completions/mean_terminated_length": s["ended_length"] / s["ended"],
                "completions/min_terminated_length": -ends["ended_min"],
                "completions/max_terminated_length": ends["ended_max"]}  # fmt: skip
    if "accuracy" in names:
        out |= {f"frac_{name}": s[name] / s["b"] for name in ("all_right", "all_wrong")}
    for name in names:
        n = max(s[f"0/{name}"], 1.0)
        mean = s[f"1/{name}"] / n
        out[f"rewards/{name}/mean"] = mean
        out[f"rewards/{name}/std"] = max(s[f"2/{name}"] / n - mean**2, 0.0) ** 0.5
    return out


def answer_metrics(earned: Sequence[Earned], engine) -> dict[str, float]:
    """Which options are answered, and which are right: a policy that has collapsed to one letter shows here."""
    rows = engine.gather([
        (e.question.answer, len(e.question.choices), [answered(c.text, e.question) for c in e.group.completions])
        for e in earned
    ])  # fmt: skip
    given = [letter for _, _, letters in rows for letter in letters]
    out = {"answers/none": given.count(None) / len(given)}
    for i in range(max(n for _, n, _ in rows)):
        out[f"answers/{chr(ord('A') + i)}"] = given.count(i) / len(given)
        out[f"gold/{chr(ord('A') + i)}"] = sum(gold == i for gold, _, _ in rows) / len(rows)
    return out


def answered(text: str, question) -> int | None:
    """Index of the option that a completion's first answer block names, None where it names none."""
    return choice(next(iter(parse(text).blocks["answer"]), None), question.choices)


def as_markdown() -> str:
    """docs/metrics.md: `python -m grpo.metrics > docs/metrics.md`."""
    rows = "\n".join(f"| `{name}` | {meaning} |" for name, meaning in MEANING.items())
    return f"# Metrics\n\nOne line a step in `metrics.jsonl`, and in wandb.\n\n| name | meaning |\n|---|---|\n{rows}"


if __name__ == "__main__":
    print(as_markdown())
