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


def gradients(
    checkpoint,
    *,
    stage,
    micro,
    pad="right",
    layout="shared",
    checkpointing=False,
    aggregated="sequence_mean",
    clip=1e9,
    sgd=None,
    poisoned=False,
):
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    share = QUESTIONS // world
    zero = zero_config(stage=stage, clip=clip, dtype="float32", world=world)
    policy = Policy(checkpoint, LORA, prompt=make_prompt(), forward=layout, gradient_checkpointing=checkpointing,
                    zero3=zero if stage == 3 else None)  # fmt: skip
    policy.pad = pad
    generator = torch.Generator().manual_seed(1)
    for name, p in policy.named_parameters():
        if "lora_B" in name:  # not zero, so that A has a gradient too
            p.data = 0.1 * torch.randn(p.shape, generator=generator)
    # lr=99: what counts is the one given to step
    engine = Engine(policy, partial(torch.optim.SGD if sgd else torch.optim.AdamW, lr=99.0), zero)
    objective = Objective(
        beta=0.04, ratio=ratio.token, surrogate=partial(surrogate.clipped, clip_low=0.2, clip_high=0.2), kl=kl.k3,
        aggregate=partial(getattr(aggregate, aggregated), **({"length": 12} if aggregated == "constant" else {})),
        mask_truncated=True,
    )  # fmt: skip
    everything = fixed_groups(policy)
    n_tokens = float(loss_mask(everything, True).sum())
    advantage = torch.linspace(-1.5, 2.0, QUESTIONS * COPIES) * (float("nan") if poisoned else 1.0)
    mine = range(rank * share, (rank + 1) * share)
    policy.train()

    def backward(advantage):
        total = 0.0
        for i in range(0, share, micro):
            groups = [everything[b] for b in mine[i : i + micro]]
            batch = policy.prepare(groups)
            with torch.no_grad(), policy.reference():
                ref, _ = engine(batch)
            logp, entropy = engine(batch)
            old = pad_rows([c.sampler_logp for g in groups for c in g.completions])
            first = mine[i] * COPIES
            out = objective(LossInputs(logp, old, old, ref, entropy, advantage[first : first + len(old)],
                                       loss_mask(groups, True), n_tokens, float(QUESTIONS * COPIES)))  # fmt: skip
            engine.backward(out.loss, last=i + micro == share)
            total += out.loss.item()
        return total

    total = backward(advantage)
    grads = engine.gradients()
    try:
        norm = engine.step(sgd or 1e-3)
    except FloatingPointError:
        norm = -1.0
    with engine.gathered():
        weights = {f"after/{n}": p.detach().clone() for n, p in engine.trainable.items()}
    if poisoned:  # the step after it
        backward(torch.linspace(-1.5, 2.0, QUESTIONS * COPIES))
        engine.step(1e-3)
        with engine.gathered():
            weights |= {f"next/{n}": p.detach().clone() for n, p in engine.trainable.items()}
    loss = engine.reduce({"loss": total})["loss"]
    return {
        **grads,
        **weights,
        "loss": torch.tensor([loss], dtype=torch.float64),
        "norm": torch.tensor([norm], dtype=torch.float64),
        "ranks": torch.tensor(engine.gather([rank] * (rank + 1))),
        "ends": torch.tensor([engine.reduce({"rank": float(rank)}, how)["rank"] for how in ("min", "max", "sum")]),
    }


def main(checkpoint, out, variants):
    rank, world = start_distributed()
    # ZeRO-3 last: its configuration lives on in the process and would partition the weights of a later plain model.
    for name, variant in sorted(json.loads(variants).items(), key=lambda item: item[1]["stage"]):
        result = gradients(checkpoint, **variant)
        if rank == 0:
            save_file({k: v.contiguous() for k, v in result.items()}, Path(out) / f"{world}-{name}.safetensors")
        gc.collect()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
