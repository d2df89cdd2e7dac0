"""Computes the gradient of one fixed GRPO step in several ways; run by test_engine.py, alone or under torchrun.

python gradient_worker.py CHECKPOINT OUT VARIANTS_JSON
"""

import gc
import json
import sys
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from grpo.batch import Completion, Group, LossInputs, pad_rows
from grpo.engine import Engine, start_distributed, zero_config
from grpo.loop import loss_mask
from grpo.loss import aggregate, kl, ratio, surrogate
from grpo.loss.objective import Objective
from grpo.policy import Policy
from tests.conftest import LORA, make_clip, make_prompt, make_question

QUESTIONS, COPIES = 4, 3
FULL = r"model\..*|lm_head\..*"
TOWER = r"(audio_tower|model)\.layers\.\d+\.self_attn\.(q|v)_proj"


def fixed_groups(policy):
    """4 questions x 3 completions of unequal length, two of them truncated; log-probs of old made up."""
    generator = torch.Generator().manual_seed(0)
    groups = []
    for b in range(QUESTIONS):
        prompt = policy.encode(make_question("q" * (b + 1)), make_clip(b, 0.4 + 0.2 * b))
        completions = []
        for g in range(COPIES):
            n = 2 + (5 * b + 3 * g) % 9
            ids = tuple(torch.randint(0, 250, (n,), generator=generator).tolist())
            old = tuple((-4 - torch.rand(n, generator=generator)).tolist())
            completions.append(Completion(ids, old, "", b == g, 0))
        groups.append(Group(prompt, tuple(completions)))
    return groups


def another_reference(engine):
    """The reference held for whole weights, moved away from the policy."""
    generator = torch.Generator().manual_seed(2)
    engine.hold_reference()
    with engine.gathered():
        whole = {n: p.detach().clone() for n, p in engine.trainable.items()}
    for name, p in engine.trainable.items():
        moved = whole[name] + 0.01 * torch.randn(whole[name].shape, generator=generator)
        engine.anchor[name].copy_(engine._cut(p, moved))


def census(engine):
    """Bytes of this rank's weights, gradients and optimizer (master weights and states), tensor by tensor."""
    inner, stage = engine.deepspeed.optimizer, engine.stage
    weights = [p.ds_tensor if stage == 3 else p for p in engine.policy.parameters()]
    if stage < 2:
        grads = [p.grad for p in engine.trainable.values() if p.grad is not None]
    else:
        kept = inner.averaged_gradients.values() if stage == 2 else [[inner.grad_partitions_flat_buffer]]
        grads = [g for group in kept if group for g in group]
    states = [v for state in engine.optimizer.state.values() for v in state.values() if v.dim()]
    return {"weights": weights, "gradients": grads, "optimizer": engine._parts + states}


def nbytes(tensors):
    return float(sum(t.nbytes for t in tensors))


def build(checkpoint, *, stage, pad="right", layout="shared", checkpointing=False, clip=1e9, sgd=None, full=False,
          offload=False, dtype="float32", tower=False, at_once=None):  # fmt: skip
    zero = zero_config(stage=stage, clip=clip, dtype=dtype, world=torch.distributed.get_world_size(), offload=offload)
    if at_once:
        zero["zero_optimization"]["sub_group_size"] = at_once
    lora = LORA | {"targets": TOWER, "audio_tower": True} if tower else LORA
    policy = Policy(checkpoint, None if full else lora, full=FULL, prompt=make_prompt(), forward=layout, dtype=dtype,
                    gradient_checkpointing=checkpointing, zero3=zero if stage == 3 else None)  # fmt: skip
    policy.pad = pad
    generator = torch.Generator().manual_seed(1)
    for name, p in policy.named_parameters():
        if "lora_B" in name:  # not zero, so that A has a gradient too
            p.data = 0.1 * torch.randn(p.shape, generator=generator).to(p.dtype)
    # lr=99: what counts is the one given to step. eps: rounding of a gradient that is almost 0 is no step
    engine = Engine(policy, partial(torch.optim.SGD, lr=99.0) if sgd else partial(torch.optim.AdamW, lr=99.0, eps=1e-3),
                    zero)  # fmt: skip
    assert len(engine._parts) > 2 or not at_once, [p.numel() for p in engine._parts]
    if full:
        another_reference(engine)
    policy.train()
    return engine


def backward(engine, advantage, *, micro, aggregated="sequence_mean", extra=0.0, cuts=None):
    """Loss, and the largest gap between reference and policy. `cuts`: where each rank's questions begin."""
    cuts = cuts or [r * QUESTIONS // engine.world for r in range(engine.world + 1)]
    mine = range(cuts[engine.rank], cuts[engine.rank + 1])
    objective = Objective(
        beta=0.04, ratio=ratio.token, surrogate=partial(surrogate.clipped, clip_low=0.2, clip_high=0.2), kl=kl.k3,
        aggregate=partial(getattr(aggregate, aggregated), **({"length": 12} if aggregated == "constant" else {})),
        mask_truncated=True,
    )  # fmt: skip
    everything = fixed_groups(engine.policy)
    n_tokens = float(loss_mask(everything, True).sum())
    total = gap = 0.0
    for i in range(0, len(mine), micro):
        groups = [everything[b] for b in mine[i : i + micro]]
        batch = engine.policy.prepare(groups)
        with torch.no_grad(), engine.reference():
            ref, _ = engine(batch)
        logp, entropy = engine(batch)
        old = pad_rows([c.sampler_logp for g in groups for c in g.completions])
        first = mine[i] * COPIES
        out = objective(LossInputs(logp, old, old, ref, entropy, advantage[first : first + len(old)],
                                   loss_mask(groups, True), n_tokens, float(QUESTIONS * COPIES)))  # fmt: skip
        engine.backward(out.loss + extra, last=i + micro >= len(mine))
        total += out.loss.item()
        gap = max(gap, (ref - logp).abs().max().item())
    return total, gap


def whole_weights(engine, prefix):
    with engine.gathered():
        return {f"{prefix}/{n}": p.detach().float().clone() for n, p in engine.trainable.items()}


SOUND = torch.linspace(-1.5, 2.0, QUESTIONS * COPIES)


def gradients(checkpoint, *, stage, micro, aggregated="sequence_mean", sgd=None, poisoned=False, cuts=None, **how):
    engine = build(checkpoint, stage=stage, sgd=sgd, **how)
    advantage = SOUND * (float("nan") if poisoned is True else 1.0)
    # "loss": it is infinite, and its gradient is not
    total, gap = backward(engine, advantage, micro=micro, aggregated=aggregated, cuts=cuts,
                          extra=float("inf") if poisoned == "loss" else 0.0)  # fmt: skip
    grads = engine.gradients()
    held = {k: nbytes(v) for k, v in census(engine).items() if k != "optimizer"}
    try:
        norm = engine.step(sgd or 1e-3)
    except FloatingPointError:
        norm = -1.0
    held["optimizer"] = nbytes(census(engine)["optimizer"])
    weights = whole_weights(engine, "after")
    if poisoned:  # the step after it
        backward(engine, SOUND, micro=micro)
        engine.step(1e-3)
        weights |= whole_weights(engine, "next")
    loss, rank = engine.reduce({"loss": total})["loss"], engine.rank
    return {
        **grads,
        **weights,
        "loss": torch.tensor([loss], dtype=torch.float64),
        "bytes": torch.tensor([held[k] for k in ("weights", "gradients", "optimizer")], dtype=torch.float64),
        "gap": torch.tensor([gap]),
        "norm": torch.tensor([norm], dtype=torch.float64),
        "ranks": torch.tensor(engine.gather([rank] * (rank + 1))),
        "ends": torch.tensor([engine.reduce({"rank": float(rank)}, how)["rank"] for how in ("min", "max", "sum")]),
    }


def resumed(checkpoint, *, stage, micro, taken=2, **how):
    """Weights and trainer state one step after a break: without it, and with it after `taken` steps.

    The ranks hold what the optimizer keeps in different orders, as a state_dict from anywhere may leave it.
    """

    def step(engine):
        backward(engine, SOUND, micro=micro)
        engine.step(1e-3)

    def now(engine, prefix):
        return whole_weights(engine, prefix) | {f"{prefix}/{k}": v for k, v in engine.state().items()}

    engine = build(checkpoint, stage=stage, **how)
    for _ in range(taken):
        step(engine)
    buffers = {f"buffer/{n}": b.clone() for n, b in engine.policy.named_buffers()}
    state = [{k: v.clone() for k, v in engine.state().items()}]
    torch.distributed.broadcast_object_list(state)
    step(engine)
    found = now(engine, "straight")
    engine = build(checkpoint, stage=stage, **how)
    engine.load_state(state[0])
    if engine.rank:
        for part, held in list(engine.optimizer.state.items()):
            engine.optimizer.state[part] = dict(reversed(held.items()))
    step(engine)
    return found | now(engine, "resumed") | buffers


def main(checkpoint, out, variants):
    rank, world = start_distributed()
    # ZeRO-3 last: its configuration lives on in the process and would partition the weights of a later plain model.
    for name, variant in sorted(json.loads(variants).items(), key=lambda item: item[1]["stage"]):
        result = (resumed if variant.pop("resume", False) else gradients)(checkpoint, **variant)
        if rank == 0:
            save_file({k: v.contiguous() for k, v in result.items()}, Path(out) / f"{world}-{name}.safetensors")
        gc.collect()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
