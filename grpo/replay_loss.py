"""Many losses on one recorded step, without generating anything: what would each have done to the policy?

    python -m grpo.replay_loss RUN --step N loss=grpo,dapo,mine [advantage=NAME] [key=value ...] [--config-dir DIR]

Takes the step that `save_rollouts=true` kept (grpo/record.py), recomputes its log-probabilities once, with the adapter
as it was before the update, and gives every loss its own backward pass. Prints a table and draws a picture:

    loss            the step's loss
    grad norm       before clipping, over all trained weights
    clip low, high  share of tokens where the clip takes the gradient (CISPO: where it bounds the weight)
    weight          w = -∂L/∂log π · (tokens of the step): what stands before a token's ∇log π, KL term included;
                    for a plain token mean without KL this is A·ρ
    silent          share of tokens with w = 0
    effective       (Σ|w|)² / (n Σw²): the share of tokens that effectively count, 1 when all weigh the same
    cosine          between the gradients of two losses: 1 the same direction, 0 unrelated

Commas make arms, as in a multirun: `loss=grpo,dapo beta=0,0.1` are four. The run's own loss, exactly as it was
configured, comes first. All other arms take their advantages from the recorded rewards. At the recorded weights every
ratio π/π_old is 1; `--adapter FOLDER`, such as a later step's, looks at the same completions from another policy.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from grpo.advantage import advantages
from grpo.batch import LossInputs, needs, quantile
from grpo.metrics import Accumulator
from grpo.record import Record, RecordError, read, step_folder
from grpo.rollout import sample_seed


@dataclass(frozen=True)
class Arm:
    """One loss to look at. `advantage` is None for the loss of the run itself: it has the recorded advantages."""

    name: str
    loss: Callable
    advantage: Callable | None


@dataclass(frozen=True)
class Replayed:
    """What a loss makes of the step."""

    name: str
    loss: float
    metrics: dict[str, float]  # of the loss itself, over the step's tokens
    weight_NT: Tensor  # -∂L/∂log π times the step's tokens
    mask_NT: Tensor
    gradient: Tensor  # over all trained weights, flat, in the order of policy.named_parameters()

    @property
    def figures(self) -> dict[str, float | None]:
        """One row of the table."""
        w = self.weight_NT[self.mask_NT].double()
        size, squares, n = w.abs().sum().item(), w.square().sum().item(), max(len(w), 1)
        return {
            "loss": self.loss, "grad norm": self.gradient.double().norm().item(),
            "clip low": self.metrics.get("clip_ratio/low_mean"),
            "clip high": self.metrics.get("clip_ratio/high_mean", self.metrics.get("cispo_clip_ratio")),
            "mean |w|": size / n, "max |w|": w.abs().max().item() if len(w) else 0.0,
            "silent": (w == 0).double().mean().item() if len(w) else 1.0,
            "effective": size**2 / (n * squares) if squares else 0.0,
        }  # fmt: skip


# ---------------------------------------------------------------- the work


def replay(record: Record, policy, arms: Sequence[Arm], *, dropout: bool = True) -> tuple[list[Replayed], float]:
    """Evaluate every arm on the recorded step under the policy's present weights.

    Micro-batches, order and dropout masks are those of the run (`dropout=False`: none), so that the gradient of the
    run's own loss is the live one. One forward pass serves all arms; each has a backward pass of its own.
    Returns the arms' results and the largest |log π - recorded log π_old|.
    """
    ref_NT = _reference(record, policy) if any(needs(arm.loss).reference for arm in arms) else None
    plans = [_plan(arm, record, ref_NT) for arm in arms]
    trained = [p for p in policy.parameters() if p.requires_grad]
    gradients = [[torch.zeros_like(p, dtype=torch.float32) for p in trained] for _ in arms]
    losses, tokens = [0.0] * len(arms), [Accumulator() for _ in arms]
    weights = [torch.zeros_like(record.logp_NT) for _ in arms]
    with_entropy = any(needs(arm.loss).entropy_gradient for arm in arms)
    worst, g = 0.0, record.group_size
    training = policy.training
    policy.train(dropout)
    with torch.random.fork_rng(devices=[policy.device] if policy.device.type == "cuda" else []):
        for questions, micro in _micro_batches(record, policy, seeded=True):
            rows = slice(questions[0] * g, (questions[-1] + 1) * g)
            logp_NT, entropy_NT = policy(micro, with_entropy)
            width = logp_NT.shape[1]
            old_NT = record.old_logp_NT[rows, :width].to(logp_NT.device)
            mask_NT = record.mask(False)[rows, :width]
            worst = max(worst, gap(logp_NT.detach().cpu()[mask_NT], old_NT.cpu()[mask_NT]))
            for a, (arm, plan) in enumerate(zip(arms, plans, strict=True)):
                leaf_NT, spread_of_NT = (t.detach().requires_grad_() for t in (logp_NT, entropy_NT))
                x = plan(rows, width, leaf_NT, spread_of_NT, old_NT)
                out = arm.loss(x)
                losses[a] += out.loss.item()
                tokens[a].add(out.metrics, x.mask_NT)
                if not out.loss.requires_grad:
                    continue
                by_logp, by_entropy = torch.autograd.grad(out.loss, [leaf_NT, spread_of_NT], allow_unused=True,
                                                          materialize_grads=True)  # fmt: skip
                weights[a][rows, :width] = -by_logp.cpu() * x.n_tokens
                outputs, cotangents = [logp_NT], [by_logp]
                if entropy_NT.requires_grad:
                    outputs, cotangents = [logp_NT, entropy_NT], [by_logp, by_entropy]
                if any(c.any() for c in cotangents):
                    parts = torch.autograd.grad(outputs, trained, cotangents, retain_graph=a + 1 < len(arms),
                                                allow_unused=True, materialize_grads=True)  # fmt: skip
                    for total, part in zip(gradients[a], parts, strict=True):
                        total += part
    policy.train(training)
    alone = SimpleNamespace(reduce=lambda values, how="sum": dict(values))
    return [
        Replayed(arm.name, losses[a], tokens[a].result(alone), weights[a], record.mask(needs(arm.loss).mask_truncated),
                 torch.cat([t.flatten() for t in gradients[a]]).cpu())
        for a, arm in enumerate(arms)
    ], worst  # fmt: skip


def gap(a: Tensor, b: Tensor) -> float:
    """Largest difference; NaN beside NaN is none, beside a number it is infinite. 0 of nothing."""
    apart = (a.double() - b.double()).abs()
    apart[(a.isnan() & b.isnan()) | (a == b)] = 0  # the latter: infinities
    return apart.nan_to_num(nan=math.inf).max().item() if apart.numel() else 0.0


def _micro_batches(record: Record, policy, *, seeded: bool = False):
    """(questions, what the policy prepared of them) of every micro-batch, split as in the run."""
    of = None
    for rank, questions in record.micro_batches():
        if seeded and rank != of:
            torch.manual_seed(sample_seed(record.seed, record.step - 1, "dropout", rank))
        of = rank
        yield questions, policy.prepare([record.groups[b] for b in questions])


@torch.no_grad()
def _reference(record: Record, policy) -> Tensor:
    """Recorded reference log-probs [N, T]; those of the model without its adapter where the run needed none."""
    if record.ref_logp_NT is not None:
        return record.ref_logp_NT
    ref_NT, g, training = torch.zeros_like(record.logp_NT), record.group_size, policy.training
    policy.eval()
    with policy.reference():
        for questions, micro in _micro_batches(record, policy):
            logp_NT, _ = policy(micro)
            ref_NT[questions[0] * g : (questions[-1] + 1) * g, : logp_NT.shape[1]] = logp_NT.cpu()
    policy.train(training)
    return ref_NT


def advantages_of(arm: Arm, record: Record, ref_NT: Tensor | None) -> Tensor:
    """[N], of the recorded rewards, as the arm's advantage makes them; KL off the rewards where its loss wants that."""
    asked, reward_BG = needs(arm.loss), record.reward_N.view(-1, record.group_size)
    mask_NT = record.mask(asked.mask_truncated)
    if asked.kl_in_reward:
        reward_BG = reward_BG - arm.loss.kl_penalty(record.old_logp_NT, ref_NT, mask_NT).view_as(reward_BG)
    return advantages(
        arm.advantage, reward_BG, component_BGR=record.component_NR.view(*reward_BG.shape, -1),
        weights_R=record.weights_R, tokens_BG=mask_NT.sum(-1).view(reward_BG.shape),
    ).flatten()  # fmt: skip


def _plan(arm: Arm, record: Record, ref_NT: Tensor | None) -> Callable[..., LossInputs]:
    """What of LossInputs is the same in all micro-batches, for this arm; called with what is not."""
    asked = needs(arm.loss)
    mask_NT = record.mask(asked.mask_truncated)
    advantage_N = record.advantage_N if arm.advantage is None else advantages_of(arm, record, ref_NT)
    cut = None
    if asked.entropy_quantile is not None:
        known = record.facts.get("entropy_cut") if arm.advantage is None else None
        cut = quantile([record.entropy_NT[mask_NT]], asked.entropy_quantile) if known is None else known

    def inputs(rows: slice, width: int, logp_NT: Tensor, entropy_NT: Tensor, old_NT: Tensor) -> LossInputs:
        def here(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[rows, :width].to(logp_NT.device)

        return LossInputs(
            logp_NT, old_NT, here(record.sampler_logp_NT), here(ref_NT) if asked.reference else None, entropy_NT,
            advantage_N[rows].to(logp_NT.device), here(mask_NT), float(mask_NT.sum()), float(len(mask_NT)),
            group_size=record.group_size, n_micro_batches=float(len(record.micro_batches())), entropy_cut=cut,
        )  # fmt: skip

    return inputs


def cosines(results: Sequence[Replayed]) -> Tensor:
    """[A, A] cosines between the arms' gradients; NaN beside a gradient of 0."""
    stacked = torch.stack([r.gradient.double() for r in results])
    size = stacked.norm(dim=1)
    return stacked @ stacked.T / (size[:, None] * size[None])


# ---------------------------------------------------------------- arms from a run folder and words


class ReplayError(ValueError):
    """What was asked for cannot be replayed: one line that says why."""


def arms(run: Path, words: Sequence[str], config_dir: Path | None = None) -> tuple[list[Arm], str | None]:
    """The run's own loss and those that the words ask for; and why the run's own is missing, where it is.

    Composed from conf/ and `config_dir` with the overrides the run was started with; nothing is built from its files.
    Raises ReplayError or grpo.config.ConfigError, and what Hydra raises for a choice that there is not.
    """
    from hydra import initialize_config_module

    with initialize_config_module("conf", version_base="1.3"):
        return _arms(Path(run), words, config_dir)


def _arms(run: Path, words: Sequence[str], config_dir: Path | None) -> tuple[list[Arm], str | None]:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    from grpo.config import build, build_objective, check_call, check_targets

    before = overrides_of(run)
    saved = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
    parser = OverridesParser.create()
    given = parser.parse_overrides(list(words))
    for o in given:
        if o.key_or_group.split(".")[0].lstrip("+~") not in ("loss", "advantage", "experiment", "beta"):
            raise ReplayError(f"{o.input_line}: a recorded step is looked at with another loss, advantage, beta or "
                              f"experiment; all else was decided when it was recorded")  # fmt: skip
    keys = {o.key_or_group for o in given}
    replaced = keys | ({"loss", "advantage"} if "experiment" in keys else set())
    kept = [
        line for line, o in zip(before, parser.parse_overrides(before), strict=True)
        if not any(o.key_or_group == k or o.key_or_group.startswith(f"{k}.") for k in replaced)
    ]  # fmt: skip
    choices = [
        [f"{o.input_line.partition('=')[0]}={v}" for v in o.sweep_string_iterator()] if o.is_sweep_override()
        else [o.input_line] for o in given
    ]  # fmt: skip
    own, label = _composed(before, config_dir)
    plain = {group: OmegaConf.to_container(own[group]) for group in ("loss", "advantage")}
    odd = [group for group in plain if plain[group] != saved.get(group)]
    missing = f"{' and '.join(odd)} of {run} composed differently now: left out" if odd else None
    found: list[Arm] = []

    def built(cfg, group: str, *positional: str):
        check_targets(cfg[group], group)
        if group == "loss":
            return build_objective(cfg)
        from grpo.advantage import declared

        made = build(cfg[group], group)
        check_call(group, partial(made, **dict.fromkeys(declared(made))), *positional)
        return made

    for combination in itertools.product(*choices) if given else []:
        cfg, _ = _composed([*kept, *combination], config_dir)
        swept = [text.split("=", 1)[1] if text.startswith(("loss=", "experiment=")) else text for text in combination]
        mine = not odd and all(OmegaConf.to_container(cfg[group]) == plain[group] for group in plain)
        name = " ".join(swept) + (" (this run)" if mine else "")
        arm = Arm(name, built(cfg, "loss"), None if mine else built(cfg, "advantage", "reward_BG"))
        found = [arm, *found] if mine else [*found, arm]
    if not odd and not any(arm.advantage is None for arm in found):
        found.insert(0, Arm(f"{label} (this run)", built(own, "loss"), None))
    return found, missing


def overrides_of(run: Path) -> list[str]:
    """What the run was started with. Raises ReplayError where it is no run, or names code in its overrides."""
    from omegaconf import OmegaConf

    for name in ("config.yaml", ".hydra/overrides.yaml"):
        if not (run / name).exists():
            raise ReplayError(f"{run}/{name} is missing: is {run} a run folder?")
    before = [str(o) for o in OmegaConf.load(run / ".hydra" / "overrides.yaml")]
    if any("_target_" in o for o in before):
        raise ReplayError(f"{run} was started with an override of a _target_: put that into a YAML of your own")
    return before


def composed_again(run: Path, config_dir: Path | None, groups: Sequence[str]):
    """(the run's config composed from conf/ and `config_dir`, those of `groups` that differ from what it was then)."""
    from hydra import initialize_config_module
    from omegaconf import OmegaConf

    before = overrides_of(run)
    with initialize_config_module("conf", version_base="1.3"):
        cfg, _ = _composed(before, config_dir)
    saved = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
    return cfg, {group for group in groups if OmegaConf.to_container(cfg[group]) != saved.get(group)}


def _composed(overrides: Sequence[str], config_dir: Path | None):
    """(resolved config, name of the loss) of conf/train.yaml with these overrides."""
    from hydra import compose
    from omegaconf import OmegaConf

    path = [] if config_dir is None else [f"hydra.searchpath=['file://{Path(config_dir).resolve()}']"]
    whole = compose("train", [*path, *overrides], return_hydra_config=True)
    label = whole.hydra.runtime.choices.loss
    cfg = OmegaConf.masked_copy(whole, [k for k in whole if k != "hydra"])
    OmegaConf.resolve(cfg)
    return cfg, label


def load_policy(run: Path, folder: Path, model: str | None = None):
    """The policy of a run with the adapter in `folder` (peft's layout), as config.yaml describes it.

    `model` takes the place of the checkpoint that the adapter names. Raises ReplayError where there is none.
    """
    from huggingface_hub.errors import HFValidationError
    from omegaconf import OmegaConf
    from safetensors.torch import load_file

    from grpo.policy import Policy

    cfg = OmegaConf.load(Path(run) / "config.yaml")
    lora = weights = None
    if cfg.model.lora is None:
        model = str(folder)
    else:
        try:
            model = model or json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
            weights = load_file(folder / "adapter_model.safetensors")
        except (OSError, ValueError, KeyError) as error:
            raise ReplayError(f"{folder} holds no adapter that can be read ({error})") from error
        lora = OmegaConf.to_container(cfg.model.lora) | {"seed": 0}
    try:
        policy = Policy(
            model, lora, full=cfg.model.get("full"), prompt=None, dtype=cfg.model.dtype, temperature=cfg.temperature,
            device="cuda" if torch.cuda.is_available() else "cpu", forward=cfg.model.forward,
            gradient_checkpointing=cfg.model.gradient_checkpointing, attention=cfg.model.attention,
        )  # fmt: skip
    except (OSError, HFValidationError) as error:
        raise ReplayError(f"the base model {model} is not here: name it with --model ({error})") from error
    if weights is not None:
        policy.load_adapter(weights)
    return policy


# ---------------------------------------------------------------- what is shown


def table(results: Sequence[Replayed]) -> str:
    """Figures of each arm, and the cosines between their gradients."""
    names = [r.name for r in results]
    wide = max(len("loss"), *map(len, names))
    heads = list(results[0].figures)
    lines = [" " * wide + "".join(f"{h:>11}" for h in heads)]
    for r in results:
        cells = (f"{'-' if v is None else f'{v:.4g}':>11}" for v in r.figures.values())
        lines.append(f"{r.name:<{wide}}" + "".join(cells))
    lines += ["", "cosine between gradients" if len(results) > 1 else ""]
    if len(results) > 1:
        lines.append(" " * wide + "".join(f"{a + 1:>8}" for a in range(len(results))))
        for a, row in enumerate(cosines(results).tolist()):
            lines.append(f"{names[a]:<{wide}}" + "".join(f"{v:>8.3f}" for v in row) + f"   {a + 1}")
    return "\n".join(lines).rstrip()


def write_csv(results: Sequence[Replayed], path: Path) -> None:
    """The table as CSV: one row an arm, its figures, its own metrics, the cosine to every arm."""
    similar = cosines(results).tolist()
    metrics = sorted({name for r in results for name in r.metrics})
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["arm", *results[0].figures, *metrics, *(f"cosine to {r.name}" for r in results)])
        for r, row in zip(results, similar, strict=True):
            out.writerow([r.name, *r.figures.values(), *(r.metrics.get(m) for m in metrics), *row])


def draw(results: Sequence[Replayed], path: Path) -> None:
    """Four panels: weights sorted by size, weights by place in the completion, gradient norms, cosines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (by_size, by_place, norms, similar) = plt.subplots(1, 4, figsize=(19, 4.2), constrained_layout=True)
    colours = plt.get_cmap("tab20").colors
    for a, r in enumerate(results):
        style = {"color": colours[a % 20], "lw": 1.3, "ls": "-" if a < 20 else ":", "label": r.name}
        w = r.weight_NT[r.mask_NT].abs().sort(descending=True).values
        by_size.plot([100 * (i + 0.5) / max(len(w), 1) for i in range(len(w))], w.tolist(), **style)
        counted = r.mask_NT.sum(0)
        mean = (r.weight_NT.abs() * r.mask_NT).sum(0) / counted.clamp_min(1)
        by_place.plot([t + 1 for t in range(len(mean)) if counted[t]], mean[counted > 0].tolist(), **style)
    by_size.set(title="weights |w| of the tokens, largest first", xlabel="% of the tokens", yscale="symlog")
    by_place.set(title="mean |w| by place in the completion", xlabel="token", yscale="symlog")
    places = range(len(results))
    names = [r.name for r in results]
    norms.barh(places, [r.figures["grad norm"] for r in results], color=[colours[a % 20] for a in places])
    norms.set(title="gradient norm, and the colours", yticks=list(places), yticklabels=names)
    norms.invert_yaxis()
    if all(r.figures["grad norm"] > 0 for r in results):
        norms.set_xscale("log")
    table_AA = cosines(results)
    similar.imshow(table_AA, vmin=-1, vmax=1, cmap="RdBu")
    similar.set(title="cosine between gradients", xticks=list(places), yticks=list(places), yticklabels=names)
    similar.set_xticklabels(names, rotation=90)
    for a, b in itertools.product(places, places):
        value = table_AA[a, b].item()
        dark = abs(value) > 0.6
        similar.text(b, a, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white" if dark else "black")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    from grpo.config import one_line_errors

    parser = argparse.ArgumentParser(prog="python -m grpo.replay_loss", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder with recorded steps")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="loss=a,b,c advantage=... beta=... loss.x=...")
    parser.add_argument("--step", type=int, required=True, help="which recorded step, counted as in metrics.jsonl")
    parser.add_argument("--adapter", type=Path, help="look from the policy with this adapter instead of the recorded")
    parser.add_argument("--model", help="the base model, where it is not where the adapter says")
    parser.add_argument("--config-dir", type=Path, help="folder with YAMLs of your own, as for grpo.train")
    parser.add_argument("--to", type=Path, metavar="PNG", help="the picture (default: RUN/replay-step-NNNNNN.png)")
    given = parser.parse_intermixed_args(arguments)
    folder = step_folder(given.run, given.step)
    with one_line_errors():
        try:
            record = read(folder)
            chosen, missing = arms(given.run, given.words, given.config_dir)
            policy = load_policy(given.run, given.adapter or folder / "adapter", given.model)
        except (RecordError, ReplayError) as error:
            sys.exit(f"error: {error}")
    for arm in chosen:
        state = record.facts.get("entropy_state")
        if arm.advantage is None and state and getattr(arm.loss, "entropy", None) is not None:
            arm.loss.entropy.load_state(state)
    began = time.perf_counter()
    results, worst = replay(record, policy, chosen, dropout=given.adapter is None)
    seconds = time.perf_counter() - began
    print(f"{given.run} step {record.step}: {len(record.groups)} questions x {record.group_size} completions, "
          f"{int(record.mask(False).sum())} tokens, under {len(chosen)} losses in {seconds:.1f} s")  # fmt: skip
    if given.adapter is None:
        print(f"log π is the recorded one within {worst:.1e}"
              + ("" if worst < 0.05 else ": NOT the same policy; another base model, or other code?"))  # fmt: skip
        for r in results:
            if r.name.endswith("(this run)") and "grad_norm" in record.facts:
                print(f"gradient norm of the run's own loss {r.figures['grad norm']:.6g}, "
                      f"when it was live {record.facts['grad_norm']:.6g}")  # fmt: skip
    if missing:
        print(f"note: {missing}")
    print(f"\n{table(results)}\n")
    picture = given.to or given.run / f"replay-step-{given.step:06d}.png"
    draw(results, picture)
    write_csv(results, picture.with_suffix(".csv"))
    print(f"written   {picture} and {picture.with_suffix('.csv').name}")


if __name__ == "__main__":
    main()
