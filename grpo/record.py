"""Steps kept on disk: all that a loss saw in one optimizer step, so that it can be evaluated again without a rollout.

RUN/rollouts/step-000100/step.json            ids, token texts, rewards' names, how the step was split, what came of it
                         tensors.safetensors  per token [N, T] and completion [N]; prompts and spectrograms
                         adapter/             peft's layout: the policy as it was BEFORE the step's updates (without
                                              an adapter a whole model: grpo/weights.py)

Steps count from 1, as in metrics.jsonl. A record is written under a temporary name, then renamed. The base model is not
in it: adapter_config.json names it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from grpo.batch import Completion, Encoded, Group, pad_rows
from grpo.weights import save_policy

FORMAT = 2
PER_TOKEN = ("logp_NT", "old_logp_NT", "sampler_logp_NT", "entropy_NT")  # and ref_logp_NT where there was one


class RecordError(ValueError):
    """A record is missing, of another format, or does not fit together: names the file and what is wrong."""


@dataclass(frozen=True)
class Part:
    """What one rank keeps of one question: T is the longest of its G completions, zeros behind shorter ones."""

    group: Group
    reward_G: Tensor  # as the reward functions gave it: before any KL penalty; NaN where one failed
    component_GR: Tensor
    advantage_G: Tensor
    logp_GT: Tensor  # at the last update of the rollout
    old_logp_GT: Tensor  # at the first
    entropy_GT: Tensor  # at the first
    ref_logp_GT: Tensor | None


@dataclass(frozen=True)
class Record:
    """One step read back. N = B*G completions question by question, all ranks', T tokens, zeros on the right."""

    step: int  # from 1
    seed: int  # of the run
    groups: tuple[Group, ...]  # without texts
    micro: tuple[tuple[int, ...], ...]  # questions of each forward/backward, of each rank
    reward_N: Tensor
    component_NR: Tensor
    weights_R: Tensor
    advantage_N: Tensor
    logp_NT: Tensor
    old_logp_NT: Tensor
    sampler_logp_NT: Tensor
    entropy_NT: Tensor
    ref_logp_NT: Tensor | None
    facts: Mapping = field(
        default_factory=dict
    )  # loss, grad_norm, entropy_cut, entropy_state: where the loop knew them

    @property
    def group_size(self) -> int:
        return len(self.groups[0].completions)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Questions of each rank, in order."""
        return tuple(map(sum, self.micro))

    def micro_batches(self) -> list[tuple[int, range]]:
        """(rank, questions) of every forward/backward, as the run split the step."""
        out, first = [], 0
        for rank, sizes in enumerate(self.micro):
            for size in sizes:
                out.append((rank, range(first, first + size)))
                first += size
        return out

    def mask(self, mask_truncated: bool) -> Tensor:
        """[N, T] bool: each completion's tokens with its stop token; none of a truncated one if those are masked."""
        rows = [[not (mask_truncated and c.truncated)] * len(c.token_ids) for g in self.groups for c in g.completions]
        return pad_rows(rows, self.logp_NT.shape[1], dtype=torch.bool)


def step_folder(run: Path, step: int) -> Path:
    return Path(run) / "rollouts" / f"step-{step:06d}"


# ---------------------------------------------------------------- writing


def parts(groups: Sequence[Group], *, reward_BG: Tensor, component_NR: Tensor, advantage_BG: Tensor,
          logp_NT: Tensor, old_logp_NT: Tensor, entropy_NT: Tensor, ref_logp_NT: Tensor | None,
          ) -> list[Part]:  # fmt: skip
    """This rank's questions as they go into the record, copied to the CPU; rows [N, T] in the order of `groups`."""
    rows = {"logp_GT": logp_NT, "old_logp_GT": old_logp_NT, "entropy_GT": entropy_NT, "ref_logp_GT": ref_logp_NT}
    rows = {name: None if of is None else of.detach().float().cpu() for name, of in rows.items()}
    out, first = [], 0
    for b, group in enumerate(groups):
        n = len(group.completions)
        width = max(len(c.token_ids) for c in group.completions)
        tokens = {name: None if of is None else of[first : first + n, :width].clone() for name, of in rows.items()}
        own = [t[b].detach().clone().cpu() for t in (reward_BG, advantage_BG)]
        out.append(Part(group, own[0], component_NR[first : first + n].clone().cpu(), own[1], **tokens))
        first += n
    return out


def save_adapter(run: Path, step: int, policy, engine) -> None:
    """Keep the policy as it is BEFORE the updates of `step` (from 1). Every rank must call; `write` completes it."""
    folder = _temporary(step_folder(run, step))
    if engine.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "adapter").mkdir(parents=True)
    save_policy(policy, engine, folder / "adapter")


def write(run: Path, step: int, kept: Sequence[Part], *, seed: int, micro: Sequence[Sequence[int]],
          names: Sequence[str], weights: Sequence[float], decode: Callable[[Sequence[int]], str],
          facts: Mapping = {}) -> Path:  # fmt: skip
    """Write the record of `step` (from 1) beside the adapter that `save_adapter` left. One rank calls, with all parts.

    Args:
        micro: questions of each forward/backward of each rank; kept are those of rank 0, then of rank 1, ...
        names, weights: of the rewards, [R].
        decode: token ids -> text, for the report.
        facts: of Record.facts; plain JSON.
    Returns the folder. Raises RecordError if the parts are not those of `micro`.
    """
    if sum(map(sum, micro)) != len(kept):
        raise RecordError(f"step {step}: {len(kept)} questions, but the ranks hold {[sum(m) for m in micro]}")
    completions = [c for p in kept for c in p.group.completions]
    width = max(len(c.token_ids) for c in completions)
    prompts = [p.group.prompt for p in kept]
    tensors = {
        "token_ids_NT": pad_rows([c.token_ids for c in completions], width, dtype=torch.long),
        "mask_NT": pad_rows([[True] * len(c.token_ids) for c in completions], width, dtype=torch.bool),
        "sampler_logp_NT": pad_rows([c.sampler_logp for c in completions], width),
        "reward_N": torch.cat([p.reward_G for p in kept]).float(),
        "component_NR": torch.cat([p.component_GR for p in kept]).float(),
        "advantage_N": torch.cat([p.advantage_G for p in kept]).float(),
        "prompt_ids": torch.cat([p.prompt_ids for p in prompts]),
        "prompt_lengths_B": torch.tensor([len(p.prompt_ids) for p in prompts]),
        "mel": torch.cat([p.mel for p in prompts], dim=1),
        "frames_B": torch.tensor([p.mel.shape[1] for p in prompts]),
    }
    for name in ("logp", "old_logp", "entropy", "ref_logp"):
        values = [getattr(p, f"{name}_GT") for p in kept]
        if all(v is not None for v in values):
            tensors[f"{name}_NT"] = pad_rows([row for v in values for row in v], width)
    final, temporary = step_folder(run, step), _temporary(step_folder(run, step))
    temporary.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, temporary / "tensors.safetensors")
    (temporary / "step.json").write_text(json.dumps({
        "format": FORMAT, "step": step, "seed": seed, "group_size": len(kept[0].group.completions),
        "micro": [list(sizes) for sizes in micro], "ids": [p.id for p in prompts],
        "clip_sha256": [p.clip_sha256 for p in prompts], "truncated": [c.truncated for c in completions],
        "version": completions[0].version, "rewards": {"names": list(names), "weights": list(weights)},
        "facts": dict(facts), "token_texts": [[decode([i]) for i in c.token_ids] for c in completions],
    }, ensure_ascii=False) + "\n", encoding="utf-8", errors="replace")  # fmt: skip
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    return final


def _temporary(final: Path) -> Path:
    return final.with_name(f".tmp-{final.name}")


# ---------------------------------------------------------------- reading


def read(folder: Path) -> Record:
    """The record in RUN/rollouts/step-NNNNNN. Raises RecordError where it is not whole."""
    folder = Path(folder)
    try:
        said = json.loads((folder / "step.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "tensors.safetensors")
    except FileNotFoundError as error:
        others = sorted(p.name for p in folder.parent.glob("step-*")) if folder.parent.is_dir() else []
        there = f"; recorded: {', '.join(others[:3])}{' ... ' + others[-1] if len(others) > 3 else ''}" if others else (
            "; no step of this run was recorded (save_rollouts=true)")  # fmt: skip
        raise RecordError(f"{error.filename or folder} is missing{there}") from error
    except Exception as error:  # a half file, or another kind of file
        raise RecordError(f"{folder} cannot be read: {type(error).__name__}: {error}") from error
    if said.get("format") != FORMAT:
        raise RecordError(f"{folder}/step.json is of format {said.get('format')}, this version reads {FORMAT}")
    try:
        return _assemble(said, tensors)
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        raise RecordError(f"{folder}: its parts do not fit together ({type(error).__name__}: {error})") from error


def _assemble(said: dict, tensors: dict[str, Tensor]) -> Record:
    g, n = said["group_size"], len(said["ids"]) * said["group_size"]
    odd = [k for k, v in tensors.items() if k.endswith(("_N", "_NT", "_NR")) and len(v) != n]
    if odd or sum(map(sum, said["micro"])) != len(said["ids"]):
        raise ValueError(f"{len(said['ids'])} questions x {g} completions, but {odd[0] if odd else 'ranks'} differs")
    ids = tensors["prompt_ids"].split(tensors["prompt_lengths_B"].tolist())
    mels = tensors["mel"].split(tensors["frames_B"].tolist(), dim=1)
    prompts = [Encoded(*p) for p in zip(said["ids"], ids, mels, said["clip_sha256"], strict=True)]
    lengths = tensors["mask_NT"].sum(-1).tolist()
    completions = [
        Completion(tuple(t[:k].tolist()), tuple(p[:k].tolist()), "", cut, said["version"])
        for t, p, k, cut in zip(tensors["token_ids_NT"], tensors["sampler_logp_NT"], lengths, said["truncated"],
                                strict=True)
    ]  # fmt: skip
    return Record(
        said["step"], said["seed"],
        tuple(Group(p, tuple(completions[b * g : (b + 1) * g])) for b, p in enumerate(prompts)),
        tuple(map(tuple, said["micro"])), tensors["reward_N"], tensors["component_NR"],
        torch.tensor(said["rewards"]["weights"]), tensors["advantage_N"], *(tensors[name] for name in PER_TOKEN),
        tensors.get("ref_logp_NT"), said["facts"],
    )  # fmt: skip
