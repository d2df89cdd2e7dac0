"""A few optimizer steps with an engine beside each rank, for each strategy; run by test_ranks.py."""

import json
import sys
from functools import partial
from pathlib import Path

import torch

from grpo.engine import Engine, start_distributed, zero_config
from grpo.rollout import Sampling
from grpo.sync.adapter import Adapter
from grpo.sync.delta import Delta
from grpo.sync.full import Full
from tests.conftest import make_clip, make_question
from tests.grpo.vllm_engines import gap, make_engine, make_policy

STRATEGIES = {"adapter": Adapter, "delta": Delta, "full": Full}
QUESTIONS, COPIES, STEPS = 4, 2, 4


def steps(checkpoint, strategy: str, stage: int) -> list[dict]:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    zero = zero_config(stage=stage, clip=1e9, dtype="float32", world=world)
    policy = make_policy(checkpoint, zero3=zero if stage == 3 else None)
    # A large eps: Adam would else blow rounding in gradients near zero up to whole steps, of either sign.
    engine = Engine(policy, partial(torch.optim.AdamW, lr=1e-2, eps=1e-3, weight_decay=0.0), zero)
    rollout = make_engine(policy, adapters=strategy == "adapter")
    sync = STRATEGIES[strategy](policy, engine, rollout, probe_every=1)
    share = QUESTIONS // world
    mine = [policy.encode(make_question(f"q{i}"), make_clip(i, 0.8)) for i in range(rank * share, (rank + 1) * share)]
    history = []
    for version in range(1, STEPS + 1):
        groups = rollout.generate(mine, COPIES, Sampling(10, step=version))
        sampled = [[list(c.token_ids) for c in g.completions] for g in groups]
        n_tokens = engine.reduce({"n": sum(len(ids) for group in sampled for ids in group)})["n"]
        logp_NT, _ = engine(policy.prepare(groups))
        sign_N1 = torch.tensor([1.0, -1.0] * share)[:, None]
        loss = (sign_N1 * logp_NT).sum() / n_tokens
        engine.backward(loss)
        engine.step(1e-2)
        receipt = sync.push(version, groups)
        with torch.no_grad():
            fresh = rollout.generate(mine, COPIES, Sampling(10, step=100 + version))
            worst = gap(engine_as_policy(engine, policy), fresh)
        history.append({
            "tokens": engine.gather(sampled), "loss": engine.reduce({"loss": loss.item()})["loss"],
            "gap": engine.reduce({"gap": worst}, "max")["gap"], "probe": receipt.probe_error,
            "keys": receipt.keys, "bytes": receipt.bytes,
        })  # fmt: skip
    rollout.close()
    return history


def engine_as_policy(engine, policy):
    """The policy's forward through the hooks that gather ZeRO-3's partitions."""

    class Through:
        prepare = staticmethod(policy.prepare)

        def __call__(self, batch):
            return engine(batch)

    return Through()


def main(checkpoint, out, stage):
    rank, world = start_distributed()
    result = {name: steps(checkpoint, name, int(stage)) for name in STRATEGIES}
    if rank == 0:
        (Path(out) / f"{world}.json").write_text(json.dumps(result))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
