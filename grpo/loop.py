"""One GRPO iteration from top to bottom: question -> rollout -> reward -> advantage -> loss -> step -> sync.

No variant is named here. What is optimised stands in grpo/loss/objective.py; what a loss may see in grpo/batch.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from grpo.batch import Group, LossInputs, pad_rows
from grpo.metrics import Accumulator, group_metrics
from grpo.rollout import sample_seed


def loss_mask(groups: Sequence[Group], mask_truncated: bool) -> torch.Tensor:
    """[N, T] bool: each completion's tokens up to and with its stop token; none of a masked truncated one."""
    rows = [[not (mask_truncated and c.truncated)] * len(c.token_ids) for g in groups for c in g.completions]
    return pad_rows(rows, dtype=torch.bool)


def step(run, step: int) -> tuple[dict[str, float], list[dict], list[Group]]:
    """One rollout and its optimizer updates.

    Returns the step's metrics, for each completion a record of what it earned, and this rank's groups for the sync.
    """
    s, engine, policy, clock = run.settings, run.engine, run.policy, run.clock
    device = policy.device

    # ---------------------------------------------------------------- questions and rollout
    questions, groups = run.rollouts.take(step)

    # ---------------------------------------------------------------- rewards
    with clock("reward"):
        scores = run.rewards.score(
            [c.text for g in groups for c in g.completions],
            contexts=[
                {"answer": q.answer, "choices": q.choices, "question": q.question, "n_tokens": len(c.token_ids),
                 "truncated": c.truncated}
                for q, g in zip(questions, groups, strict=True) for c in g.completions
            ],
        )  # fmt: skip
        component_NR = torch.tensor(scores.components)
        reward_BG = torch.tensor(scores.total).view(len(groups), s.generations)
        failed_B1 = ~reward_BG.isfinite().all(1, keepdim=True)  # a reward that raised is not a reward of 0

    # ---------------------------------------------------------------- advantage
    reward_BG = reward_BG.masked_fill(failed_B1, 0.0)
    advantage_BG = run.advantage(reward_BG).masked_fill(failed_B1, 0.0)

    # ---------------------------------------------------------------- updates
    with clock("update"):
        n_tokens, n_sequences = _denominators(groups, run.objective.mask_truncated, engine)
        audio = policy.encode_audio([g.prompt for g in groups])
        size = s.micro_questions
        starts = range(0, len(groups), size)
        old: list = [None] * len(starts)
        ref: list = [None] * len(starts)
        tokens, loss_sum = Accumulator(), 0.0
        torch.manual_seed(sample_seed(s.seed, step, "dropout", engine.rank))  # a resumed run draws the same masks
        for update in range(s.updates):
            policy.train()
            for m, i in enumerate(starts):
                micro, sound = groups[i : i + size], audio[i : i + size]
                mask_NT = loss_mask(micro, run.objective.mask_truncated).to(device)
                if run.objective.needs_reference and ref[m] is None:
                    ref[m] = _reference(engine, policy, micro, sound)
                logp_NT, entropy_NT = engine(micro, sound)
                if old[m] is None:
                    old[m] = logp_NT.detach()
                sampler_NT = pad_rows([c.sampler_logp for g in micro for c in g.completions]).to(device)
                out = run.objective(
                    LossInputs(logp_NT, old[m], sampler_NT, ref[m], entropy_NT,
                               advantage_BG[i : i + size].reshape(-1).to(device), mask_NT, n_tokens, n_sequences)
                )  # fmt: skip
                engine.backward(out.loss)
                if update == 0:
                    tokens.add({**out.metrics, **_mismatch(old[m], sampler_NT)}, mask_NT)
                    loss_sum += out.loss.item()
                if m < len(starts) - 1:
                    engine.end_micro_batch()
            learning_rate = run.schedule(step, s.steps)
            grad_norm = engine.step(learning_rate)

    run.version += 1
    metrics = group_metrics(
        groups, reward_BG, component_NR, run.rewards.names, len({f.index for f in scores.failures}), engine
    )
    metrics |= tokens.result(engine) | engine.reduce({"loss": loss_sum})
    metrics |= {"grad_norm": grad_norm, "learning_rate": learning_rate}
    run.tokens += int(engine.reduce({"n": sum(len(g.prompt.prompt_ids) for g in groups)})["n"] + n_tokens)
    return metrics, _samples(step, questions, groups, scores, advantage_BG, run.rewards.names), groups


def sync(run, groups: Sequence[Group]) -> dict[str, float]:
    """Bring the rollout engine to the policy's weights; returns what the receipt says. `groups` are for its probe."""
    run.rollouts.settle()
    with run.clock("sync"):
        metrics = run.sync.push(run.version, groups).metrics()
    if hasattr(run.rollout, "restarts"):
        metrics |= run.engine.reduce({"rollout/restarts": float(run.rollout.restarts),
                                      "rollout/faults": float(run.rollout.faults)})  # fmt: skip
    return metrics


def _denominators(groups: Sequence[Group], mask_truncated: bool, engine) -> tuple[float, float]:
    """Tokens in the loss and completions of the whole optimizer step: over all micro-batches and ranks."""
    mask_NT = loss_mask(groups, mask_truncated)
    counts = engine.reduce({"tokens": float(mask_NT.sum()), "sequences": float(len(mask_NT))})
    return counts["tokens"], counts["sequences"]


@torch.no_grad()
def _reference(engine, policy, groups: Sequence[Group], audio) -> torch.Tensor:
    """Reference log-probs [N, T]: the same model with its adapter (and dropout) off."""
    policy.eval()
    with policy.reference():
        logp_NT, _ = engine(groups, audio)
    policy.train()
    return logp_NT


def _mismatch(old_NT: torch.Tensor, sampler_NT: torch.Tensor) -> dict[str, torch.Tensor]:
    """How far the sampler's log-probs are from the trainer's, per token."""
    gap_NT = (old_NT - sampler_NT).abs()
    ratio_NT = (old_NT - sampler_NT).exp()
    prefix, ratio = "sampling/sampling_logp_difference", "sampling/importance_sampling_ratio"
    return {f"{prefix}/mean": gap_NT, f"{prefix}/max": gap_NT,
            f"{ratio}/mean": ratio_NT, f"{ratio}/min": ratio_NT, f"{ratio}/max": ratio_NT}  # fmt: skip


def _samples(step, questions, groups, scores, advantage_BG, names) -> list[dict]:
    """One record a completion, for samples.jsonl."""
    rows = []
    for b, (question, group) in enumerate(zip(questions, groups, strict=True)):
        for g, completion in enumerate(group.completions):
            n = b * len(group.completions) + g
            rows.append({
                "step": step + 1, "id": question.id, "question": question.question, "choices": list(question.choices),
                "gold": question.gold, "sample": g, "completion": completion.text, "truncated": completion.truncated,
                "tokens": len(completion.token_ids), "rewards": dict(zip(names, scores.components[n], strict=True)),
                "reward": scores.total[n], "advantage": advantage_BG[b, g].item(),
                "clip_sha256": group.prompt.clip_sha256, "version": completion.version,
            })  # fmt: skip
    return rows
