"""One step of a run again: its questions, completions, rewards, advantages and loss, each recomputed and compared.

    python -m grpo.replay RUN --step N [--question ID] [--config-dir DIR] [--model PATH]

Takes a step that `save_rollouts` kept, or that was kept because its loss was not finite (grpo/record.py), and the lines
of samples.jsonl. Rewards and advantages are those of the run's configuration, composed again; the loss and its gradient
come from the recorded adapter. What differs from the record is said, and gives exit status 1. Other losses on the same
step: `python -m grpo.replay_loss`.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from grpo.record import Record, RecordError, read, step_folder
from grpo.replay_loss import ReplayError, advantages_of, arms, composed_again, gap, load_policy, replay


@dataclass(frozen=True)
class Check:
    """A number of the record, made again."""

    name: str
    recorded: str
    again: str
    same: bool

    def __str__(self) -> str:
        return f"{self.name:<14}{self.recorded:<24}{self.again:<24}{'the same' if self.same else 'DIFFERS'}"


def rows_of(run: Path, step: int) -> list[dict]:
    """The step's lines of samples.jsonl; none where it was not logged."""
    try:
        with (run / "samples.jsonl").open(encoding="utf-8") as file:
            return [row for row in map(json.loads, file) if row["step"] == step]
    except FileNotFoundError:
        return []


def texts_of(folder: Path) -> list[str]:
    """Completions as they stand in the record, without markers of their end."""
    said = json.loads((folder / "step.json").read_text(encoding="utf-8"))
    return ["".join(tokens) for tokens in said["token_texts"]]


def scored_again(rewards, rows: Sequence[dict]) -> torch.Tensor:
    """[N, R]: what the reward functions give the texts now; NaN where one fails."""
    contexts = [{"answer": row["choices"].index(row["gold"]), "choices": tuple(row["choices"]),
                 "question": row["question"], "n_tokens": row["tokens"], "truncated": row["truncated"]}
                for row in rows]  # fmt: skip
    return torch.tensor(rewards.score([row["completion"] for row in rows], contexts=contexts).components)


def compared(record: Record, run: Path, rows: Sequence[dict], config_dir: Path | None,
             model: str | None) -> Iterator[Check | str]:  # fmt: skip
    """Every stage of the step made again from the one before; lines of text stand for what cannot be.

    Raises ReplayError where it cannot go on.
    """
    from grpo.config import build

    cfg, odd = composed_again(run, config_dir, ("rewards", "advantage"))
    if "rewards" in odd:
        yield "rewards       composed differently now: left out"
    elif len(rows) != len(record.reward_N):
        yield f"rewards       samples.jsonl has {len(rows)} of {len(record.reward_N)} completions: left out"
    else:
        again = scored_again(build(cfg.rewards, "rewards"), rows)
        differ = sum(gap(a, b) > 1e-5 for a, b in zip(again, record.component_NR, strict=True))
        yield Check("rewards", f"{again.numel()} numbers", f"{differ} completions differ", not differ)
    chosen, missing = arms(run, [], config_dir)
    if missing or "advantage" in odd:
        yield f"the rest      {missing or 'the advantage composed differently now: left out'}"
        return
    (own,) = chosen
    again = advantages_of(replace(own, advantage=build(cfg.advantage, "advantage")), record, record.ref_logp_NT)
    apart = gap(again, record.advantage_N)
    yield Check("advantages", f"{again.numel()} numbers", f"{apart:.1e} apart", apart <= 1e-5)
    policy = load_policy(run, step_folder(run, record.step) / "adapter", model)
    exact = all(p.dtype == torch.float32 for p in policy.parameters())
    if (state := record.facts.get("entropy_state")) and getattr(own.loss, "entropy", None) is not None:
        own.loss.entropy.load_state(state)
    (result,), worst = replay(record, policy, [own])
    n = int(record.mask(False).sum())
    yield Check("log π_old", f"{n} tokens", f"{worst:.1e} apart", worst <= (1e-3 if exact else 0.05))
    for name, again in (("loss", result.loss), ("grad norm", result.figures["grad norm"])):
        if (live := record.facts.get(name.replace(" ", "_"))) is not None:
            live, finite = float(live), math.isfinite(float(live)) and math.isfinite(again)
            same = math.isclose(live, again, rel_tol=1e-4 if exact else 0.05, abs_tol=1e-6) if finite else (
                math.isfinite(live) == math.isfinite(again))  # fmt: skip
            yield Check(name, f"{live:.8g}", f"{again:.8g}", same)


def batch_text(record: Record, rows: Sequence[dict], texts: Sequence[str], names: Sequence[str],
               only: str | None, width: int) -> str:  # fmt: skip
    """The step's questions with their completions, what each earned and its advantage."""
    lines, g = [], record.group_size
    for b, group in enumerate(record.groups):
        if only not in (None, group.prompt.id):
            continue
        mine = rows[b * g : (b + 1) * g] if len(rows) == len(texts) else []
        lines.append(f"\nquestion  {group.prompt.id}: {len(group.prompt.prompt_ids)} prompt tokens, "
                     f"{group.prompt.mel.shape[1] / 100:.2f} s of sound")  # fmt: skip
        if mine:
            row = mine[0]
            cut = f" from {row['start'] or 0:g} s to {row['end']:g} s" if row.get("end") else ""
            options = "  ".join(f"{chr(65 + i)}. {c}" for i, c in enumerate(row["choices"]))
            lines += [f"          {row['question']}", f"          {options}   (right: {row['gold']})",
                      f"          {row['audio']}{cut}"]  # fmt: skip
        head = f"   #  reward  advantage  {'  '.join(names)}  tokens  π/π_sampler"
        lines.append(head)
        for i in range(g):
            n = b * g + i
            mask_T = record.mask(False)[n]
            drift = (record.old_logp_NT[n] - record.sampler_logp_NT[n])[mask_T].exp()
            parts = "  ".join(f"{v:>{len(name)}.2f}" for name, v in zip(names, record.component_NR[n].tolist(),
                                                                       strict=True))  # fmt: skip
            span = f"{drift.min():.3f} to {drift.max():.3f}" if len(drift) else "-"
            cut = " cut" if group.completions[i].truncated else ""
            lines.append(f"  {i:>2}  {record.reward_N[n]:>6.2f}  {record.advantage_N[n]:>+9.3f}  {parts}  "
                         f"{int(mask_T.sum()):>6}{cut}  {span}")  # fmt: skip
            text = mine[i]["completion"] if mine else texts[n]
            lines += textwrap.wrap(text, width - 6, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    from grpo.config import one_line_errors

    parser = argparse.ArgumentParser(prog="python -m grpo.replay", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder with recorded steps")
    parser.add_argument("--step", type=int, required=True, help="which recorded step, counted as in metrics.jsonl")
    parser.add_argument("--question", metavar="ID", help="show this question only")
    parser.add_argument("--model", help="the base model, where it is not where the adapter says")
    parser.add_argument("--config-dir", type=Path, help="folder with YAMLs of your own, as for grpo.train")
    given = parser.parse_args(arguments)
    folder = step_folder(given.run, given.step)
    with one_line_errors():
        try:
            record = read(folder)
            ids = [group.prompt.id for group in record.groups]
            if given.question not in (None, *ids):
                sys.exit(f"error: --question {given.question}: step {given.step} asked {', '.join(ids)}")
            rows, said = rows_of(given.run, given.step), json.loads((folder / "step.json").read_text(encoding="utf-8"))
        except RecordError as error:
            sys.exit(f"error: {error}")
        found: list[Check | str] = []
        try:
            for check in compared(record, given.run, rows, given.config_dir, given.model):
                found.append(check)
        except ReplayError as error:  # what was recorded can be shown all the same
            found.append(f"not made again: {error}")
    print(f"{given.run} step {record.step}: {len(ids)} questions x {record.group_size} completions, "
          f"weights of version {record.groups[0].completions[0].version}")  # fmt: skip
    width = min(shutil.get_terminal_size().columns, 120)
    print(batch_text(record, rows, texts_of(folder), said["rewards"]["names"], given.question, width))
    print(f"\n{'':14}{'recorded':<24}{'made again':<24}")
    print("\n".join(map(str, found)))
    return int(any(isinstance(check, Check) and not check.same for check in found))


if __name__ == "__main__":
    sys.exit(main())
