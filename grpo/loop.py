"""One GRPO iteration from top to bottom: question -> rollout -> reward -> advantage -> loss -> step -> sync.

No variant is named here. What is optimised stands in grpo/loss/objective.py; what a loss may see in grpo/batch.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite, nan

import torch
from torch import Tensor

from grpo import record
from grpo.advantage import advantages
from grpo.batch import Group, LossInputs, needs, pad_rows, quantile
from grpo.collect import Earned, collect
from grpo.metrics import Accumulator, answer_metrics, answered, group_metrics, mismatch
from grpo.micro import frozen, micro_batches
from grpo.rollout import sample_seed


def loss_mask(groups: Sequence[Group], mask_truncated: bool) -> torch.Tensor:
    """[N, T] bool: each completion's tokens up to and with its stop token; none of a masked truncated one."""
    rows = [[not (mask_truncated and c.truncated)] * len(c.token_ids) for g in groups for c in g.completions]
    return pad_rows(rows, dtype=torch.bool)


def step(run, step: int, collected=None) -> tuple[dict[str, float], list[dict], list[Group]]:
    """One rollout, or what `collect` made of it, and its optimizer updates.

    Returns the step's metrics, for each completion a record of what it earned, and this rank's groups for the sync.
    """
    s, engine, policy, clock = run.settings, run.engine, run.policy, run.clock
    device, need = policy.device, needs(run.objective)

    # ---------------------------------------------------------------- questions, rollout, rewards
    earned, sampling = collected or collect(run, step)
    groups = [e.group for e in earned]
    component_NR = torch.tensor([row for e in earned for row in e.components])
    reward_BG = torch.tensor([e.totals for e in earned])  # NaN where a reward raised, which is not a reward of 0

    # ---------------------------------------------------------------- the policy before the update
    with clock("update"):
        micro = micro_batches(engine, policy, groups, s.micro_tokens)
        mask_NT = loss_mask(groups, need.mask_truncated).to(device)
        sampler_NT = pad_rows([c.sampler_logp for g in groups for c in g.completions]).to(device)
        ref_NT = frozen(engine, policy, micro, mask_NT.shape, reference=True)[0] if need.reference else None
        entropy_cut, penalty_BG = None, torch.zeros_like(reward_BG)
        if need.kl_in_reward or need.entropy_quantile is not None:
            now_NT, entropy_NT = frozen(engine, policy, micro, mask_NT.shape)
            if need.kl_in_reward:
                penalty_BG = run.objective.kl_penalty(now_NT, ref_NT, mask_NT).view_as(reward_BG).cpu()
            if need.entropy_quantile is not None:
                entropy_cut = quantile(engine.gather([entropy_NT[mask_NT].cpu()]), need.entropy_quantile)

    # ---------------------------------------------------------------- advantage: of the whole step, over all ranks
    advantage_BG = _advantages(run, groups, reward_BG - penalty_BG, component_NR, need.mask_truncated)
    advantage_N = advantage_BG.flatten().to(device)

    # ---------------------------------------------------------------- updates
    with clock("update"):
        idle_B = (advantage_BG == 0).all(1)
        if run.idle_groups_rest and engine.reduce({"idle": float(idle_B.any())}, "max")["idle"]:  # on any rank
            micro = micro_batches(engine, policy, groups, s.micro_tokens, idle_B)
        counts = engine.reduce({"tokens": float(mask_NT.sum()), "sequences": float(reward_BG.numel()),
                                "micro": float(len(micro)),
                                "trained": float(sum(len(m.questions) for m in micro))})  # fmt: skip
        recording = s.save_rollouts and (step + 1) % s.save_rollouts == 0
        if recording:
            record.save_adapter(run.folder, step + 1, policy, engine)
        old_NT, entropy_NT, last_NT = (torch.zeros_like(sampler_NT) for _ in range(3))
        tokens, loss_sum, norms = Accumulator(), 0.0, []
        torch.manual_seed(sample_seed(s.seed, step, "dropout", engine.rank))  # a resumed run draws the same masks
        for update in range(s.updates):
            policy.train()
            for m in micro:
                logp, entropy = engine(m.prepared, need.entropy_gradient)
                at = m.rows_n[:, None], torch.arange(m.width, device=device)
                last_NT[at] = logp.detach()
                if update == 0:
                    old_NT[at], entropy_NT[at] = logp.detach(), entropy.detach()
                x = LossInputs(
                    logp, old_NT[at], sampler_NT[at], None if ref_NT is None else ref_NT[at], entropy,
                    advantage_N[m.rows_n], mask_NT[at], n_tokens=counts["tokens"], n_sequences=counts["sequences"],
                    group_size=s.generations, n_micro_batches=counts["micro"], entropy_cut=entropy_cut,
                )  # fmt: skip
                out = run.objective(x)
                engine.backward(out.loss, last=m is micro[-1])
                if update == 0:
                    tokens.add({**out.metrics, **mismatch(x)}, x.mask_NT)
                    loss_sum += out.loss.item()
            learning_rate = run.schedule(step, s.steps)
            try:
                norms.append(engine.step(learning_rate))
            except FloatingPointError:  # on all ranks alike, and nothing was changed: the run decides whether to go on
                norms.append(nan)
                break
        # For grpo.replay_loss: where no weight has moved yet and every group was computed (Run sees to the next step).
        if not isfinite(norms[-1]) and not recording and len(norms) == 1 and counts["trained"] == s.questions:
            recording = True
            record.save_adapter(run.folder, step + 1, policy, engine)

    run.version += 1
    metrics = sampling | group_metrics(groups, reward_BG, component_NR, run.rewards.names, engine)
    metrics |= answer_metrics(earned, engine) | tokens.result(engine) | engine.reduce({"loss": loss_sum})
    metrics |= {"grad_norm": norms[-1], "learning_rate": learning_rate,
                "frac_groups_trained": counts["trained"] / s.questions}  # fmt: skip
    if need.kl_in_reward:
        metrics["kl_penalty/mean"] = engine.reduce({"sum": penalty_BG.sum().item()})["sum"] / counts["sequences"]
    facts = {"loss": metrics["loss"], "grad_norm": norms[0], "entropy_cut": entropy_cut}  # of the first update
    if bonus := getattr(run.objective, "entropy", None):
        facts["entropy_state"] = bonus.state()
        metrics["entropy_coefficient"] = bonus.coefficient
        if isfinite(metrics["entropy"]):
            bonus.update(metrics["entropy"])
    if recording:
        kept = engine.gather(record.parts(
            groups, reward_BG=reward_BG, component_NR=component_NR, advantage_BG=advantage_BG, logp_NT=last_NT,
            old_logp_NT=old_NT, entropy_NT=entropy_NT, ref_logp_NT=ref_NT,
        ))  # fmt: skip
        split = engine.gather([[len(m.questions) for m in micro]])
        if engine.rank == 0:
            record.write(run.folder, step + 1, kept, seed=s.seed, micro=split, names=run.rewards.names,
                         weights=run.rewards.weights, decode=policy.decode, facts=facts)  # fmt: skip
    return metrics, _samples(step, earned, advantage_BG, run.rewards.names), groups


def sync(run, groups: Sequence[Group]) -> dict[str, float]:
    """Bring the rollout engine to the policy's weights; returns what the receipt says. `groups` are for its probe."""
    run.rollouts.settle()
    with run.clock("sync"):
        metrics = run.sync.push(run.version, groups).metrics()
    if hasattr(run.rollout, "restarts"):
        metrics |= run.engine.reduce({"rollout/restarts": float(run.rollout.restarts),
                                      "rollout/faults": float(run.rollout.faults)})  # fmt: skip
    return metrics


def _advantages(run, groups: Sequence[Group], reward_BG: Tensor, component_NR: Tensor, mask_truncated: bool) -> Tensor:
    """This rank's A_BG. The function sees the questions of all ranks: its statistics are of the whole step."""
    engine, (b, g) = run.engine, reward_BG.shape
    tokens_BG = loss_mask(groups, mask_truncated).sum(1).view(b, g).float()
    rows = engine.gather(list(zip(reward_BG, component_NR.view(b, g, -1), tokens_BG, strict=True)))
    reward, component, tokens = (torch.stack(column) for column in zip(*rows, strict=True))
    whole = advantages(run.advantage, reward, component_BGR=component, tokens_BG=tokens,
                       weights_R=torch.tensor(run.rewards.weights))  # fmt: skip
    return whole[engine.rank * b : (engine.rank + 1) * b] if engine.world > 1 else whole


def _samples(step: int, earned: Sequence[Earned], advantage_BG: Tensor, names: Sequence[str]) -> list[dict]:
    """One record a completion, for samples.jsonl."""
    return [
        {"step": step + 1, "id": q.id, "audio": str(q.audio), "start": q.start, "end": q.end, "question": q.question,
         "choices": list(q.choices), "gold": q.gold, "sample": g, "completion": c.text, "truncated": c.truncated,
         "answered": answered(c.text, q), "tokens": len(c.token_ids),
         "rewards": dict(zip(names, e.components[g], strict=True)), "reward": e.totals[g],
         "advantage": advantage_BG[b, g].item(), "clip_sha256": e.group.prompt.clip_sha256, "version": c.version}
        for b, e in enumerate(earned) for q in [e.question] for g, c in enumerate(e.group.completions)
    ]  # fmt: skip
