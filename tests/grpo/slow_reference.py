"""The published formulas written a second time, with Python loops over floats: independent of grpo/loss and torch."""

from math import exp, sqrt


def group_std(rewards, eps=1e-4, ddof=1):
    """(r - mean) / (std + eps) for one group (a list)."""
    mean = sum(rewards) / len(rewards)
    std = sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - ddof))
    return [(r - mean) / (std + eps) for r in rewards]


def token_objective(logp, old, ref, advantage, *, low, high, beta):
    """Per-token loss -min(ρA, clip(ρ)A) + β k3 of one token."""
    ratio = exp(logp - old)
    bounded = min(max(ratio, 1 - low), 1 + high)
    surrogate = min(ratio * advantage, bounded * advantage)
    d = logp - ref
    return -surrogate + beta * (exp(-d) + d - 1)


def loss(logp, old, ref, advantage, mask, *, low=0.2, high=0.2, beta=0.01, aggregate="sequence_mean", length=None):
    """Loss of whole steps given as lists of lists (completions of unequal length are masked)."""
    per_sequence, tokens, total = [], 0, 0.0
    for i, row in enumerate(logp):
        values = [
            token_objective(row[t], old[i][t], ref[i][t], advantage[i], low=low, high=high, beta=beta)
            for t in range(len(row))
            if mask[i][t]
        ]
        per_sequence.append(sum(values) / len(values) if values else 0.0)
        tokens += len(values)
        total += sum(values)
    if aggregate == "sequence_mean":
        return sum(per_sequence) / len(per_sequence)
    if aggregate == "token_mean":
        return total / max(tokens, 1)
    return total / (len(logp) * length)
