"""Known sicknesses of a GRPO run in plain words, from the rows of metrics.jsonl alone.

`diagnose(rows)` may be called at any step of a run, and the report calls it once a run. Every check is a pure function
of the rows and of `Limits`; each compares the first and the last window of the run (a tenth of it, 5 to 50 steps) and
says nothing before it has enough rows. A healthy run of the main job, which ends with nearly every group all right,
low entropy and a KL of 0.1, must raise none of them: tests hold that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Rows = Sequence[Mapping[str, float | None]]


@dataclass(frozen=True)
class Limits:
    """Where a figure starts to be a finding. They are meant to be read and changed."""

    dead_beyond_right: float = 0.5  # share of groups without a reward difference that cannot all be all-right groups
    dead_at_all: float = 0.95  # share of such groups whatever the accuracy: next to nothing is learned
    solved: float = 0.9  # training accuracy above which little spread and little entropy are as they should be
    length_factor: float = 1.5  # completions this many times longer, or shorter, than at the start ...
    length_gain: float = 0.02  # ... while training accuracy rose by less than this
    kl: float = 0.5  # nats per token; healthy runs of the main job stay below 0.15
    mismatch_nats: float = 0.05  # mean |log pi - log sampler| per token; 16-bit engines show about 0.01
    mismatch_ratio: float = 0.1  # |mean pi/sampler - 1|
    entropy_left: float = 0.2  # share of the first entropy that is left ...
    entropy_gain: float = 0.1  # ... while training accuracy rose by less than this
    truncated: float = 0.2  # share of completions cut by the length limit
    letter_excess: float = 0.3  # share of one answer letter above its share among the gold answers
    letter_share: float = 0.6  # ... and at least this share of all answers
    no_option: float = 0.2  # share of whole completions whose answer names no option
    accuracy_drop: float = 0.15  # held-out accuracy below its best


@dataclass(frozen=True)
class Finding:
    """One sickness: `name` for code, `text` says what was seen with its numbers, `advice` what people try."""

    name: str
    text: str
    advice: str


def diagnose(rows: Rows, limits: Limits | None = None) -> list[Finding]:
    """All findings of a run so far, the gravest first. `rows`: metrics rows by step; the row of step 0 may be there."""
    limits = limits or Limits()
    steps = [row for row in rows if "reward" in row or "loss" in row]
    found = [check(steps if check is not accuracy_drop else rows, limits) for check in CHECKS]
    return [f for f in found if f]


# ---------------------------------------------------------------- one function a sickness


def not_a_number(rows: Rows, limits: Limits) -> Finding | None:
    """A loss, gradient or KL that is NaN or infinite (written as null)."""
    for row in rows:
        bad = [n for n in ("loss", "grad_norm", "kl", "entropy") if n in row and not _is_number(row[n])]
        if bad:
            times = sum(any(n in r and not _is_number(r[n]) for n in bad) for r in rows)
            return Finding(
                "not_a_number",
                f"{' and '.join(bad)} was not a number at step {row['step']:.0f} ({times} steps in all)",
                "lower the learning rate, look at ratio/max of the steps before, compute log-probabilities in float32",
            )
    return None


def letter_collapse(rows: Rows, limits: Limits) -> Finding | None:
    """One option is answered far more often than it is right: answers/<letter> against gold/<letter>."""
    letters = sorted({k.removeprefix("answers/") for r in rows[-1:] for k in r if k.startswith("answers/")} - {"none"})
    if len(rows) < 10:
        return None
    for letter in letters:
        share = _mean(rows, f"answers/{letter}", last=True)
        gold = _mean(rows, f"gold/{letter}", last=True)
        gold = 1 / max(len(letters), 2) if gold is None else gold
        if share is not None and share > limits.letter_share and share - gold > limits.letter_excess:
            return Finding(
                "letter_collapse",
                f"{share:.0%} of the answers are option {letter}, which is right in {gold:.0%} of the questions",
                "shuffle the options, raise the KL weight or the entropy bonus, check that the audio reaches the model",
            )
    return None


def no_option(rows: Rows, limits: Limits) -> Finding | None:
    """Answers that are none of the options, beyond the completions that were cut before they could answer."""
    none, cut = _mean(rows, "answers/none", last=True), _mean(rows, "completions/clipped_ratio", last=True)
    if len(rows) < 10 or none is None or none - (cut or 0.0) <= limits.no_option:
        return None
    return Finding(
        "no_option",
        f"{none:.0%} of the completions name no option in their answer"
        + (f" ({cut:.0%} were cut)" if (cut or 0.0) >= 0.005 else ""),
        "look at the answers in samples.jsonl, ask for the option's letter in the prompt, raise the format reward",
    )


def length_hacking(rows: Rows, limits: Limits) -> Finding | None:
    """Completions grow, or shrink, a lot while answers get no better."""
    first, last = _ends(rows, "completions/mean_length")
    gain = _gain(rows, "rewards/accuracy/mean")
    if len(rows) < 20 or first is None or gain is None or gain >= limits.length_gain or first <= 0:
        return None
    if max(last / first, first / max(last, 1e-9)) < limits.length_factor:
        return None
    reward = _gain(rows, "reward") or 0.0
    return Finding(
        "length_hacking",
        f"completions went from {first:.0f} to {last:.0f} tokens while training accuracy changed by {gain:+.3f}"
        + (f" and the reward by {reward:+.3f}: length is being rewarded, not listening" if reward > 0 else ""),
        "lower the weight of the length reward, use a loss that does not favour length (dr_grpo), punish overlong ends",
    )


def dead_groups(rows: Rows, limits: Limits) -> Finding | None:
    """Groups whose completions all earn the same teach nothing. Accuracy bounds how many can be all right, so what is
    beyond it is all wrong, or right and wrong with the same reward."""
    dead = _mean(rows, "frac_reward_zero_std", last=True)
    right = _mean(rows, "rewards/accuracy/mean", last=True)
    if len(rows) < 10 or dead is None:
        return None
    if right is not None and dead - right > limits.dead_beyond_right:
        return Finding(
            "dead_groups",
            f"{dead:.0%} of the groups have no reward difference, and with {right:.0%} right answers at least "
            f"{dead - right:.0%} of all groups are not even all right: they teach nothing",
            "raise the temperature or generations, use dynamic sampling, start from easier questions",
        )
    if dead > limits.dead_at_all:
        solved = right is not None and right >= limits.solved
        return Finding(
            "dead_groups",
            f"{dead:.0%} of the groups have no reward difference"
            + (f": with {right:.0%} right there is nothing left to learn from these questions" if solved else ""),
            "take harder questions" if solved else "raise the temperature or generations, use dynamic sampling",
        )
    return None


def kl_blowup(rows: Rows, limits: Limits) -> Finding | None:
    """The policy has gone far from its reference."""
    kl = _mean(rows, "kl", last=True)
    if len(rows) < 10 or kl is None or kl <= limits.kl:
        return None
    return Finding(
        "kl_blowup",
        f"KL to the reference is {kl:.2f} nats per token (a healthy run stays below {limits.kl:g})",
        "lower the learning rate, raise loss.beta, stop at the best held-out accuracy",
    )


def sampler_mismatch(rows: Rows, limits: Limits) -> Finding | None:
    """The rollout engine does not sample from the policy that is trained."""
    gap = _mean(rows, "sampling/sampling_logp_difference/mean", last=True)
    ratio = _mean(rows, "sampling/importance_sampling_ratio/mean", last=True)
    if len(rows) < 3:
        return None
    if (gap is None or gap <= limits.mismatch_nats) and (ratio is None or abs(ratio - 1) <= limits.mismatch_ratio):
        return None
    said = [f"log-probabilities differ by {gap:.3f} nats a token"] if gap is not None else []
    said += [f"the mean ratio is {ratio:.3f} instead of 1"] if ratio is not None else []
    return Finding(
        "sampler_mismatch",
        "the sampler and the trainer disagree: " + ", ".join(said),
        "check the weight sync and the temperature, sample in the trainer's dtype, correct with loss=tis or icepop",
    )


def entropy_collapse(rows: Rows, limits: Limits) -> Finding | None:
    """The policy stopped exploring before it became right. Low entropy of a policy that is right is no sickness."""
    first, last = _ends(rows, "entropy")
    gain, right = _gain(rows, "rewards/accuracy/mean"), _mean(rows, "rewards/accuracy/mean", last=True)
    if len(rows) < 20 or first is None or gain is None or first <= 0 or last >= limits.entropy_left * first:
        return None
    if gain >= limits.entropy_gain or right >= limits.solved:
        return None
    return Finding(
        "entropy_collapse",
        f"entropy fell from {first:.3f} to {last:.3f} nats a token while training accuracy changed by {gain:+.3f}",
        "raise clip_high, add an entropy bonus, lower the learning rate, raise the temperature",
    )


def truncation(rows: Rows, limits: Limits) -> Finding | None:
    """Many completions never reach their answer."""
    cut = _mean(rows, "completions/clipped_ratio", last=True)
    if len(rows) < 5 or cut is None or cut <= limits.truncated:
        return None
    return Finding(
        "truncation",
        f"{cut:.0%} of the completions are cut by the length limit before they end",
        "raise max_tokens, ask for shorter thoughts, use the soft overlong punishment",
    )


def accuracy_drop(rows: Rows, limits: Limits) -> Finding | None:
    """Held-out accuracy was better before."""
    points = [(r["step"], r["accuracy/heldout"]) for r in rows if _is_number(r.get("accuracy/heldout"))]
    if len(points) < 3:
        return None
    best = max(points, key=lambda p: p[1])
    now = sum(v for _, v in points[-2:]) / 2  # one evaluation is noisy
    if best[1] - now <= limits.accuracy_drop:
        return None
    return Finding(
        "accuracy_drop",
        f"held-out accuracy was {best[1]:.3f} at step {best[0]:.0f} and is {now:.3f} over the last two evaluations",
        "use the best checkpoint, lower the learning rate, look at the samples of the last steps",
    )


CHECKS: tuple[Callable[[Rows, Limits], Finding | None], ...] = (
    not_a_number, accuracy_drop, sampler_mismatch, kl_blowup, letter_collapse, no_option, entropy_collapse,
    length_hacking, dead_groups, truncation,
)  # fmt: skip


# ---------------------------------------------------------------- windows


def _is_number(value) -> bool:
    return value is not None and math.isfinite(value)


def _window(rows: Rows) -> int:
    return min(50, max(5, len(rows) // 10))


def _mean(rows: Rows, name: str, *, last: bool) -> float | None:
    """Mean over the window at the end (or the start) of the run; None when the metric is not there."""
    part = rows[-_window(rows) :] if last else rows[: _window(rows)]
    values = [r[name] for r in part if _is_number(r.get(name))]
    return sum(values) / len(values) if values else None


def _ends(rows: Rows, name: str) -> tuple[float | None, float | None]:
    first, last = _mean(rows, name, last=False), _mean(rows, name, last=True)
    return (None, None) if first is None or last is None else (first, last)


def _gain(rows: Rows, name: str) -> float | None:
    first, last = _ends(rows, name)
    return None if first is None else last - first
