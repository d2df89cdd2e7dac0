"""The published formulas written a second time, with Python loops over floats: independent of grpo/loss and torch.

Gradients come from dual numbers: a value and its derivative by each log-probability and entropy. A stop-gradient is
`float(x)`. Constants are those of the papers, restated here: a YAML whose number drifts fails.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

LIMIT = 20.0  # log-ratios in exponentials are held within this: the one departure that all formulas share


class Dual:
    """A float with its partial derivatives {variable: d value / d variable}."""

    def __init__(self, value, grad=None):
        self.value, self.grad = float(value), grad or {}

    def __float__(self):
        return self.value

    def chain(self, value, slope):
        return Dual(value, {k: slope * g for k, g in self.grad.items()})

    def __add__(self, other):
        if not isinstance(other, Dual):
            return Dual(self.value + other, self.grad)
        grad = dict(self.grad)
        for k, g in other.grad.items():
            grad[k] = grad.get(k, 0.0) + g
        return Dual(self.value + other.value, grad)

    def __mul__(self, other):
        if not isinstance(other, Dual):
            return self.chain(self.value * other, other)
        return self.chain(self.value * other.value, other.value) + other.chain(0.0, self.value)

    def __neg__(self):
        return self * -1.0

    def __sub__(self, other):
        return self + (-other)

    def __rsub__(self, other):
        return -self + other

    def __truediv__(self, number):
        return self * (1.0 / number)

    def __lt__(self, other):
        return self.value < float(other)

    def __gt__(self, other):
        return self.value > float(other)

    __radd__, __rmul__ = __add__, __mul__


def exp(x):
    return x.chain(math.exp(x.value), math.exp(x.value)) if isinstance(x, Dual) else math.exp(x)


def power(x, p):
    return x.chain(x.value**p, p * x.value ** (p - 1))


def sigmoid(x):
    s = 1 / (1 + math.exp(-x.value))
    return x.chain(s, s * (1 - s))


def clip(x, low, high):
    return x if low <= float(x) <= high else Dual(min(max(float(x), low), high))


def smaller(a, b):
    return b if float(b) < float(a) else a


def larger(a, b):
    return b if float(b) > float(a) else a


@dataclass
class Step:
    """One micro-batch as lists: numbers of completion i at token t, only those inside the mask."""

    logp: list[list[Dual]]
    old: list[list[float]]
    sampler: list[list[float]]
    ref: list[list[float]]
    entropy: list[list[Dual]]
    advantage: list[float]
    group_size: int
    entropy_cut: float | None = None
    history: Sequence[float] = ()  # mean entropies of the steps before this one

    @staticmethod
    def of(logp, old, sampler, ref, entropy, advantage, mask, group_size, entropy_cut=None, history=()):
        """From padded lists of lists; variables are called ("logp", i, t) and ("entropy", i, t)."""

        def kept(rows, name=None):
            return [
                [Dual(row[t], {(name, i, t): 1.0}) if name else row[t] for t in range(len(row)) if mask[i][t]]
                for i, row in enumerate(rows)
            ]

        return Step(kept(logp, "logp"), kept(old), kept(sampler), kept(ref), kept(entropy, "entropy"),
                    list(advantage), group_size, entropy_cut, history)  # fmt: skip

    def __len__(self):
        return len(self.logp)

    def gaps(self, i) -> list[Dual]:
        """log π_θ/π_old of completion i."""
        return [p - q for p, q in zip(self.logp[i], self.old[i], strict=True)]


# ---------------------------------------------------------------- policy term: one objective per token, to be maximised


def ratios(s, i):
    return [exp(clip(gap, -LIMIT, LIMIT)) for gap in s.gaps(i)]


def sequence_ratio(s, i):
    gaps = s.gaps(i)
    return exp(clip(sum(gaps, Dual(0.0)) / max(len(gaps), 1), -LIMIT, LIMIT))


def ppo_token(r, a, low, high):
    return smaller(r * a, clip(r, 1 - low, 1 + high) * a)


def ppo(low, high):
    return lambda s, i: [ppo_token(r, s.advantage[i], low, high) for r in ratios(s, i)]


def gspo(low, high):
    return lambda s, i: [ppo_token(sequence_ratio(s, i), s.advantage[i], low, high) for _ in s.logp[i]]


def gspo_token(low, high):
    def policy(s, i):
        level = float(sequence_ratio(s, i))
        return [ppo_token(level * exp(p - float(p)), s.advantage[i], low, high) for p in s.logp[i]]

    return policy


def dual_clip(low, high, c):
    def token(r, a):
        j = ppo_token(r, a, low, high)
        return larger(j, Dual(c * a)) if a < 0 else j

    return lambda s, i: [token(r, s.advantage[i]) for r in ratios(s, i)]


def two_sided(low, high, delta):
    def token(r, a):
        return smaller(smaller(r, Dual(delta)) * a, clip(r, 1 - low, 1 + high) * a)

    return lambda s, i: [token(r, s.advantage[i]) for r in ratios(s, i)]


def cispo(low, high):
    return lambda s, i: [
        min(max(float(r), low), high) * s.advantage[i] * p for r, p in zip(ratios(s, i), s.logp[i], strict=True)
    ]


def sapo(tau_pos, tau_neg):
    def token(r, a):
        tau = tau_pos if a > 0 else tau_neg
        return 4 / tau * a * sigmoid(tau * (r - 1.0))

    return lambda s, i: [token(r, s.advantage[i]) for r in ratios(s, i)]


def vespo(positive, negative):
    def policy(s, i):
        total = sum(min(max(float(gap), -LIMIT), LIMIT) for gap in s.gaps(i))
        w = math.exp(min(max(total, math.log(1e-8)), LIMIT))
        c1, c2 = positive if s.advantage[i] >= 0 else negative
        phi = w**c1 * math.exp(c2 * (1 - w))
        return [phi * s.advantage[i] * p for p in s.logp[i]]

    return policy


def reinforce(s, i):
    return [s.advantage[i] * p for p in s.logp[i]]


def gmpo(low, high):
    """Π_t |min(ρ_t A, clip(ρ_t, e^-low, e^high) A)|^(1/T) · sign A, with |A| taken out of the product."""

    def policy(s, i):
        a, n = s.advantage[i], max(len(s.logp[i]), 1)
        product = Dual(1.0)
        for r in ratios(s, i):
            kept = r
            if a > 0:
                kept = smaller(r, Dual(math.exp(high)))
            elif a < 0:
                kept = larger(r, Dual(math.exp(-low)))
            product = product * power(kept, 1 / n)
        return [a * product for _ in s.logp[i]]

    return policy


# ---------------------------------------------------------------- weights, KL, aggregation


def capped(number):
    return math.exp(min(max(number, -LIMIT), LIMIT))


def token_tis(cap):
    return lambda s, i: [min(capped(o - q), cap) for o, q in zip(s.old[i], s.sampler[i], strict=True)]


def sequence_tis(cap, mean_of_logs=False):
    def weights(s, i):
        total = sum(o - q for o, q in zip(s.old[i], s.sampler[i], strict=True))
        if mean_of_logs:
            total /= max(len(s.logp[i]), 1)
        return [min(capped(total), cap)] * len(s.logp[i])

    return weights


def icepop(low, high):
    def weight(gap):
        return capped(gap) if low <= capped(gap) <= high else 0.0

    return lambda s, i: [weight(o - q) for o, q in zip(s.old[i], s.sampler[i], strict=True)]


def sequence_icepop(low, high):
    def weights(s, i):
        product = capped(sum(o - q for o, q in zip(s.old[i], s.sampler[i], strict=True)))
        return [product if low <= product <= high else 0.0] * len(s.logp[i])

    return weights


def off_policy_mask(delta):
    def weights(s, i):
        drift = sum(q - float(p) for q, p in zip(s.sampler[i], s.logp[i], strict=True)) / max(len(s.logp[i]), 1)
        return [0.0 if s.advantage[i] < 0 and drift > delta else 1.0] * len(s.logp[i])

    return weights


def high_entropy(s, i):
    return [1.0 if float(h) >= s.entropy_cut else 0.0 for h in s.entropy[i]]


def k1(d, ratio):
    return d


def k2(d, ratio):
    return d * d / 2


def k3(d, ratio):
    d = clip(d, -LIMIT, LIMIT)
    return exp(-d) + d - 1.0


def k3_plus(d, ratio):
    return k2(d, ratio).chain(float(k3(d, ratio)), 1.0)


def k1_plus(d, ratio):
    return k2(d, ratio).chain(float(k1(d, ratio)), 1.0)


def k3_unbiased(d, ratio):
    return ratio * k3(d, ratio)


def fixed(coefficient):
    return lambda history: coefficient


def adaptive(target, delta, low, high):
    """Skywork-OR1: the level moves after every step; it acts if the last step's entropy was at or below the target."""

    def coefficient(history):
        level = 0.0
        for entropy in history:
            level = min(max(level + (delta if entropy <= target else -delta), low), high)
        return level if history and history[-1] <= target else 0.0

    return coefficient


def mean_of_means(rows, s, whole):
    return sum((sum(row, Dual(0.0)) / max(len(row), 1) for row in rows), Dual(0.0)) / whole["sequences"]


def mean_of_tokens(rows, s, whole):
    return sum((v for row in rows for v in row), Dual(0.0)) / max(whole["tokens"], 1)


def mean_of_sums(rows, s, whole):
    return sum((v for row in rows for v in row), Dual(0.0)) / whole["sequences"]


def over_length(length):
    return lambda rows, s, whole: mean_of_sums(rows, s, whole) / length


def mean_of_questions(rows, s, whole):
    total = Dual(0.0)
    for first in range(0, len(rows), s.group_size):
        tokens = [v for row in rows[first : first + s.group_size] for v in row]
        total = total + sum(tokens, Dual(0.0)) / max(len(tokens), 1)
    return total / (whole["sequences"] / s.group_size)


def mean_of_micro_batches(rows, s, whole):
    tokens = [v for row in rows for v in row]
    return sum(tokens, Dual(0.0)) / max(len(tokens), 1) / whole["micro_batches"]


@dataclass
class Variant:
    policy: Callable = field(default_factory=lambda: ppo(0.2, 0.2))
    aggregate: Callable = mean_of_means
    beta: float = 0.1  # `beta` of conf/train.yaml
    kl: Callable = k3
    weight: Callable | None = None
    bonus: Callable = field(default_factory=lambda: fixed(0.0))

    def __call__(self, s: Step, whole: dict[str, float]) -> Dual:
        """This micro-batch's share of the loss; `whole` counts sequences, tokens and micro_batches of the step."""
        rows, bonus = [], self.bonus(s.history)
        for i in range(len(s)):
            objective, ratio = self.policy(s, i), ratios(s, i)
            factor = self.weight(s, i) if self.weight else [1.0] * len(objective)
            row = []
            for t, j in enumerate(objective):
                value = -(factor[t] * j)
                if self.beta:
                    value = value + self.beta * self.kl(s.logp[i][t] - s.ref[i][t], ratio[t])
                row.append(value - bonus * s.entropy[i][t])
            rows.append(row)
        return self.aggregate(rows, s, whole)


LENGTH = 40  # max_tokens of conf/train.yaml, for Dr. GRPO
LOSSES = {
    "grpo": Variant(),
    "token_mean": Variant(aggregate=mean_of_tokens),
    "group_mean": Variant(aggregate=mean_of_questions),
    "bnpo": Variant(aggregate=mean_of_micro_batches),
    "dr_grpo": Variant(aggregate=over_length(LENGTH), beta=0.0),
    "dapo": Variant(ppo(0.2, 0.28), mean_of_tokens, beta=0.0),
    "gspo": Variant(gspo(3e-4, 4e-4), beta=0.0),
    "gspo_token": Variant(gspo_token(3e-4, 4e-4), beta=0.0),
    "gmpo": Variant(gmpo(0.4, 0.4), beta=0.0),
    "cispo": Variant(cispo(0.0, 5.0), mean_of_tokens, beta=0.0),
    "rloo": Variant(reinforce, mean_of_sums, beta=0.0),
    "reinforce_pp": Variant(aggregate=mean_of_tokens, kl=k2),
    "gpg": Variant(reinforce, mean_of_tokens, beta=0.0),
    "sapo": Variant(sapo(1.0, 1.05), beta=0.0),
    "luspo": Variant(gspo(2e-3, 2.5e-3), mean_of_sums, beta=0.0),
    "vespo": Variant(vespo((2.0, 3.0), (3.0, 2.0)), mean_of_tokens, beta=0.0),
    "dual_clip": Variant(dual_clip(0.2, 0.2, 3.0)),
    "two_sided": Variant(two_sided(0.2, 0.2, 4.0)),
    "tis": Variant(weight=token_tis(2.0)),
    "sequence_tis": Variant(weight=sequence_tis(3.0)),
    "icepop": Variant(weight=icepop(0.5, 5.0)),
    "off_policy_mask": Variant(weight=off_policy_mask(0.5)),
    "high_entropy": Variant(ppo(0.2, 0.28), mean_of_tokens, beta=0.0, weight=high_entropy),
    "entropy_bonus": Variant(bonus=fixed(0.001)),
    "entropy_adaptive": Variant(aggregate=mean_of_tokens, beta=0.0, bonus=adaptive(0.2, 0.005, 0.0, 1.0)),
    "k1": Variant(kl=k1),
    "k2": Variant(kl=k2),
    "k3_plus": Variant(kl=k3_plus),
    "k3_unbiased": Variant(kl=k3_unbiased),
    "kl_in_reward": Variant(beta=0.0),  # its KL term is no part of the loss
}
PIECES = {  # GRPO with a piece that no conf/loss/*.yaml has
    "k1_plus": Variant(kl=k1_plus),
    "sequence_icepop": Variant(weight=sequence_icepop(0.5, 5.0)),
    "sequence_tis_geometric": Variant(weight=sequence_tis(3.0, mean_of_logs=True)),
}


# ---------------------------------------------------------------- advantages: lists of groups of numbers


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def std(values: Sequence[float], ddof: int) -> float:
    if len(values) <= ddof:
        return 0.0
    return math.sqrt(sum((v - mean(values)) ** 2 for v in values) / (len(values) - ddof))


def equal(group):
    return all(r == group[0] for r in group)


def centred(group):
    return [0.0] * len(group) if equal(group) else [r - mean(group) for r in group]


def group_std(eps, ddof, single="zero"):
    def one(group):
        if len(group) == 1:
            return [group[0] / (1 + eps)] if single == "raw" else [0.0]
        return [c / (std(group, ddof) + eps) for c in centred(group)]

    return lambda s: [one(group) for group in s["reward"]]


def group_mean(s):
    return [centred(group) for group in s["reward"]]


def leave_one_out(s):
    def one(group, i):
        others = group[:i] + group[i + 1 :]
        return 0.0 if equal(group) or not others else group[i] - mean(others)

    return [[one(group, i) for i in range(len(group))] for group in s["reward"]]


def nemo(s):
    def one(group, i):
        others = group[:i] + group[i + 1 :]
        if equal(group) or not others:
            return 0.0
        spread = 0.0 if equal(others) else std(others, 1)
        return (group[i] - mean(others)) / (spread + 1e-6 if spread > 0 else 1.0)

    return [[one(group, i) for i in range(len(group))] for group in s["reward"]]


def maxrl(s):
    return [[c / mean(group) if mean(group) > 0 else 0.0 for c in centred(group)] for group in s["reward"]]


def opo(s):
    out = []
    for group, tokens in zip(s["reward"], s["tokens"], strict=True):
        if equal(group) or sum(tokens) == 0:
            out.append([0.0] * len(group))
            continue
        baseline = sum(n * r for n, r in zip(tokens, group, strict=True)) / sum(tokens)
        out.append([r - baseline for r in group])
    return out


def gpg(s):
    alive = sum(not equal(group) for group in s["reward"])
    return [[c * len(s["reward"]) / max(alive, 1) for c in centred(group)] for group in s["reward"]]


def batch_std(s):
    everything = [r for group in s["reward"] for r in group]
    if len(everything) < 2 or equal(everything):
        return [[0.0] * len(group) for group in s["reward"]]
    return [[c / (std(everything, 1) + 1e-4) for c in centred(group)] for group in s["reward"]]


def whitened(groups, tokens):
    """Each value repeated once per token, (v - mean) / sqrt(sample variance + 1e-8)."""
    long = [v for g, ns in zip(groups, tokens, strict=True) for v, n in zip(g, ns, strict=True) for _ in range(n)]
    flat = [v for g in groups for v in g]
    if len(long) < 2 or equal(flat):
        return [[0.0] * len(g) for g in groups]
    middle, variance = mean(long), std(long, 1) ** 2
    return [[(v - middle) / math.sqrt(variance + 1e-8) for v in g] for g in groups]


def reinforce_pp(s):
    return whitened(group_mean(s), s["tokens"])


def reinforce_pp_plain(s):
    return whitened(s["reward"], s["tokens"])


def per_reward(s, eps):
    total = [[0.0] * len(group) for group in s["reward"]]
    for c, w in enumerate(s["weights"]):
        parts = group_std(eps, 1)({"reward": [[row[c] for row in group] for group in s["component"]]})
        total = [[t + w * p for t, p in zip(ts, ps, strict=True)] for ts, ps in zip(total, parts, strict=True)]
    return total


def gdpo(s):
    total = per_reward(s, 1e-4)
    flat = [v for g in total for v in g]
    if len(flat) < 2 or equal(flat):
        return [[0.0] * len(g) for g in total]
    return [[(v - mean(flat)) / (std(flat, 1) + 1e-4) for v in g] for g in total]


def verl_gdpo(s):
    return whitened(per_reward(s, 1e-6), s["tokens"])


def pass_at_k(k, threshold):
    """By counting: every group of k completions earns 1 if one of them is right; normalised over all groups."""
    from itertools import combinations

    def one(right):
        groups = list(combinations(range(len(right)), k))
        earned = [float(any(right[i] for i in g)) for g in groups]
        spread = std(earned, 0) + 1e-6
        return [
            mean([(e - mean(earned)) / spread for e, g in zip(earned, groups, strict=True) if i in g])
            for i in range(len(right))
        ]

    return lambda s: [one([row[0] > threshold for row in group]) for group in s["component"]]


ADVANTAGES = {
    "group_std": group_std(1e-4, 1),
    "group_mean": group_mean,
    "leave_one_out": leave_one_out,
    "batch_std": batch_std,
    "reinforce_pp": reinforce_pp,
    "reinforce_pp_plain": reinforce_pp_plain,
    "gdpo": gdpo,
    "maxrl": maxrl,
    "opo": opo,
    "gpg": gpg,
    "pass_at_k": pass_at_k(4, 0.5),
    "trl_group_std": group_std(1e-4, 1),
    "trl_batch_std": batch_std,
    "verl_group_std": group_std(1e-6, 1, "raw"),
    "verl_gdpo": verl_gdpo,
    "openrlhf_group_std": group_std(1e-9, 1),
    "open_instruct_group_std": group_std(1e-8, 0),
    "grpo_zero_group_std": group_std(1e-4, 0),
    "slime_group_std": group_std(1e-6, 1),
    "areal_group_std": group_std(1e-5, 1),
    "nemo_leave_one_out": nemo,
}
