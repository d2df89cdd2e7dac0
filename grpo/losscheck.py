"""What to run before spending GPU hours on a loss of your own: `python -m grpo.losscheck loss=mine --config-dir .`

    python -m grpo.losscheck loss=NAME [key=value ...] [baseline=grpo] [picture=losscheck.png] [--config-dir DIR]

The loss is composed as `grpo.train` composes it, so `loss.beta=0` and the like work too. Each check runs on made-up
log-probabilities in float64, in seconds, without a model. Prints a table of pass and FAIL with what a failure means,
draws the loss beside the baseline, and exits with 1 if a check failed.
"""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from grpo.batch import LossInputs, LossOutputs

Loss = Callable[[LossInputs], LossOutputs]
TWO_DIMENSIONAL = ("logp_NT", "old_logp_NT", "sampler_logp_NT", "ref_logp_NT", "entropy_NT", "mask_NT")


# ---------------------------------------------------------------- made-up steps


def made_up(loss: Loss, seed: int = 0, *, questions: int = 4, group: int = 3, width: int = 7, spread: float = 0.3,
            dtype=torch.float64, on_policy: bool = False) -> LossInputs:  # fmt: skip
    """One optimizer step of random numbers, N = questions x group rows of 0 to `width` tokens.

    `spread` is the std of the differences between the four kinds of log-probability; `on_policy` makes them all equal.
    """
    generator = torch.Generator().manual_seed(seed)
    n = questions * group

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    lengths = torch.randint(0, width + 1, (n,), generator=generator)
    lengths[0] = width
    lengths[1::5] = 0
    mask_NT = torch.arange(width)[None] < lengths[:, None]
    logp_NT = -2 - normal(n, width).abs()
    old, sampler, ref = (logp_NT.clone() if on_policy else logp_NT + spread * normal(n, width) for _ in range(3))
    entropy_NT = 3 * torch.rand(n, width, generator=generator, dtype=torch.float64).to(dtype)
    x = LossInputs(logp_NT, old, sampler, ref, entropy_NT, normal(n), mask_NT, float(mask_NT.sum()), float(n),
                   group_size=group, n_micro_batches=1.0)  # fmt: skip
    x = replace(x, **{k: getattr(x, k).masked_fill(~mask_NT, 0.0) for k in TWO_DIMENSIONAL[:-1]})
    return with_entropy_cut(loss, x)


def with_entropy_cut(loss: Loss, x: LossInputs) -> LossInputs:
    """x with the quantile of its own entropies that the loss asks for, as the loop would find it."""
    quantile = getattr(loss, "entropy_quantile", None)
    if quantile is None or not x.mask_NT.any():
        return replace(x, entropy_cut=None if quantile is None else 0.0)
    return replace(x, entropy_cut=float(torch.quantile(x.entropy_NT.detach()[x.mask_NT].double(), quantile)))


def gradient(loss: Loss, x: LossInputs, parts: Sequence[Sequence[int]] | None = None) -> tuple[Tensor, float]:
    """Gradient by logp_NT and value of the loss, summed over micro-batches of the rows in `parts`."""
    by_logp_NT, _, value = both_gradients(loss, x, parts)
    return by_logp_NT, value


def both_gradients(
    loss: Loss, x: LossInputs, parts: Sequence[Sequence[int]] | None = None
) -> tuple[Tensor, Tensor, float]:
    """Gradients [N, T] by logp_NT and by entropy_NT, and the value, summed over micro-batches as in `gradient`."""
    logp_NT = x.logp_NT.detach().clone().requires_grad_()
    entropy_NT = x.entropy_NT.detach().clone().requires_grad_()
    total = torch.zeros((), dtype=x.logp_NT.dtype)
    parts = parts or [range(len(logp_NT))]
    whole = replace(x, logp_NT=logp_NT, entropy_NT=entropy_NT, n_micro_batches=float(len(parts)))
    for part in parts:
        rows = list(part)
        taken = {k: v[rows] for k, v in vars(whole).items() if torch.is_tensor(v)}
        total = total + loss(replace(whole, **taken)).loss
    total.backward()
    found = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in (logp_NT, entropy_NT)]
    return *found, total.item()


# ---------------------------------------------------------------- the checks


class Failed(Exception):
    """The check found something; its text says what, in numbers."""


class NotAsked(Exception):
    """The check does not apply to this loss; its text says why."""


def shapes(loss: Loss) -> str:
    for sizes in ({}, {"width": 1}, {"questions": 1, "group": 2}, {"group": 1}):
        x = made_up(loss, **sizes)
        leaf = replace(x, logp_NT=x.logp_NT.requires_grad_(), entropy_NT=x.entropy_NT.requires_grad_())
        out = loss(leaf)
        if not isinstance(out, LossOutputs):
            raise Failed(f"returned {type(out).__name__}, not LossOutputs")
        if out.loss.shape != () or not out.loss.isfinite():
            raise Failed(f"the loss is {out.loss.detach().tolist()} of shape {list(out.loss.shape)}: one number is due")
        named = {"per_token_NT": out.per_token_NT, **out.metrics}
        for name, value in named.items():
            if value.shape != x.mask_NT.shape:
                raise Failed(f"{name} has shape {list(value.shape)} instead of {list(x.mask_NT.shape)} [N, T]")
            if value.requires_grad:
                raise Failed(f"{name} carries a gradient: .detach() it, or it keeps the whole graph alive")
            if not value[x.mask_NT].isfinite().all():
                raise Failed(f"{name} is not finite")
    return f"{len(named) - 1} metrics"


def purity(loss: Loss) -> str:
    x = made_up(loss, 1)
    before = {k: v.clone() for k, v in vars(x).items() if torch.is_tensor(v)}
    first, second = loss(x).loss, loss(x).loss
    changed = [k for k, v in before.items() if not torch.equal(v, getattr(x, k))]
    if changed:
        raise Failed(f"writes into {', '.join(changed)}")
    if not torch.equal(first, second):
        raise Failed(f"two calls on the same step give {first.item():.6g} and {second.item():.6g}")
    return "same inputs, same loss"


def masks(loss: Loss) -> str:
    x = made_up(loss, 2)
    expected, value = gradient(loss, x)
    generator = torch.Generator().manual_seed(2)
    for size in (1.0, 10.0):
        garbage = {k: -size * torch.rand(x.mask_NT.shape, generator=generator).double() for k in TWO_DIMENSIONAL[:-1]}
        got, other = gradient(
            loss, replace(x, **{k: torch.where(x.mask_NT, getattr(x, k), garbage[k]) for k in garbage})
        )
        if not _close(torch.tensor(other), torch.tensor(value)) or not _close(got, expected):
            raise Failed(f"other numbers at masked positions change the loss from {value:.6g} to {other:.6g} "
                         f"and its gradient by {_gap(got, expected):.2g}")  # fmt: skip
    return "garbage outside the mask has no effect"


def padding(loss: Loss) -> str:
    x = made_up(loss, 3)
    expected, value = gradient(loss, x)
    wide = {k: torch.nn.functional.pad(getattr(x, k), (0, 5)) for k in TWO_DIMENSIONAL}
    got, other = gradient(loss, replace(x, **wide))
    if not _close(torch.tensor(other), torch.tensor(value)) or not _close(got[:, : x.mask_NT.shape[1]], expected):
        raise Failed(f"5 columns of padding change the loss from {value:.6g} to {other:.6g}")
    return "padding has no effect"


def extremes(loss: Loss) -> str:
    for dtype in (torch.float32, torch.float64):
        for shift in (-500.0, -60.0, 60.0, 500.0):
            for name in ("old_logp_NT", "sampler_logp_NT", "ref_logp_NT"):
                x = made_up(loss, 4, dtype=dtype)
                x = replace(x, **{name: torch.where(x.mask_NT, getattr(x, name) + shift, 0.0)})
                got, value = gradient(loss, x)
                if not got.isfinite().all() or value != value or abs(value) == float("inf"):
                    raise Failed(f"{name} off by {shift:g} nats ({dtype}): loss {value}, "
                                 f"{int((~got.isfinite()).sum())} gradients not finite")  # fmt: skip
    return "finite at ratios of e^±500"


def gradients(loss: Loss) -> str:
    worst = 0.0
    for seed, spread in ((5, 0.02), (6, 0.5)):
        x = made_up(loss, seed, spread=spread)
        exact, _ = gradient(loss, x)
        for i, t in x.mask_NT.nonzero()[:: max(int(x.mask_NT.sum()) // 8, 1)].tolist():
            # Two readings: what .detach() cut off held constant, as backward sees it; and everything moving.
            gap = min(abs(exact[i, t].item() - _difference(loss, x, i, t, hold)) for hold in (True, False))
            size = max(1.0, exact[i, t].abs().item())
            worst = max(worst, gap / size)
            if gap > 1e-5 * size:
                raise Failed(f"token ({i}, {t}): backward gives {exact[i, t].item():.6g}, differences "
                             f"{_difference(loss, x, i, t, True):.6g}")  # fmt: skip
    return f"worst difference {worst:.1e}"


def micro_batches(loss: Loss) -> str:
    if not getattr(loss, "invariant", True):
        raise NotAsked("its aggregate says of itself that it depends on the split")
    x = made_up(loss, 7)
    expected, value = gradient(loss, x)
    g = x.group_size
    for parts in ([[*range(6)], [*range(6, 12)]], [[*range(b * g, (b + 1) * g)] for b in (3, 0, 2, 1)]):
        got, other = gradient(loss, x, parts)
        if not _close(torch.tensor(other), torch.tensor(value)) or not _close(got, expected):
            raise Failed(f"{len(parts)} micro-batches give {other:.6g}, one gives {value:.6g}")
    return "2 and 4 micro-batches equal 1"


def order(loss: Loss) -> str:
    x = made_up(loss, 8)
    expected, value = gradient(loss, x)
    rows = [8, 6, 7, 0, 2, 1, 11, 10, 9, 4, 3, 5]  # questions change places, and completions within each
    got, other = gradient(loss, replace(x, **{k: v[rows] for k, v in vars(x).items() if torch.is_tensor(v)}))
    if not _close(torch.tensor(other), torch.tensor(value)) or not _close(got, expected[rows]):
        raise Failed(f"another order of the completions gives {other:.6g} instead of {value:.6g}")
    return "order has no effect"


def direction(loss: Loss) -> str:
    x = made_up(loss, 9, on_policy=True)
    sign_N = torch.tensor([1.0, -1.0] * 6, dtype=torch.float64)
    got, _ = gradient(loss, replace(x, advantage_N=sign_N))
    push_N = -(got * x.mask_NT).sum(-1) * sign_N  # above 0: descending the loss moves log p(completion) the right way
    wrong = push_N < -1e-9
    if wrong.any():
        raise Failed(f"{int(wrong.sum())} of 12 completions move the wrong way: a step down the loss makes better "
                     f"completions less likely or worse ones more likely")  # fmt: skip
    if not (push_N[sign_N > 0] > 1e-9).any() or not (push_N[sign_N < 0] > 1e-9).any():
        raise Failed("no gradient for completions of one sign of the advantage (is the surrogate detached?)")
    return "better completions become likelier, worse ones less"


def stillness(loss: Loss) -> str:
    x = made_up(loss, 10)
    nothing = replace(x, mask_NT=torch.zeros_like(x.mask_NT), n_tokens=0.0)
    got, value = gradient(loss, nothing)
    if value != 0 or got.any():
        raise Failed(f"with every token masked the loss is {value} and the gradient {got.abs().max().item():.2g}")
    if getattr(_inner(getattr(loss, "kl", None)), "zero_only_on_average", False):
        return "0 where every token is masked; its KL term has noise elsewhere, by its own mark"
    still = replace(x, advantage_N=torch.zeros_like(x.advantage_N), ref_logp_NT=x.logp_NT)
    got, value = gradient(loss, still)
    if got.abs().max() > 1e-12:
        raise Failed(f"advantages of 0 on the reference policy leave a gradient of {got.abs().max().item():.2g}")
    return "no advantage and no distance to the reference: no gradient"


def reference(loss: Loss) -> str:
    if not getattr(loss, "needs_reference", True) or getattr(loss, "kl_in", "loss") == "reward":
        raise NotAsked("no KL term in the loss")
    if getattr(_inner(getattr(loss, "kl", None)), "zero_only_on_average", False):
        raise NotAsked("the KL term pulls on average only, by its own mark")
    x = made_up(loss, 11, on_policy=True)
    x = replace(x, advantage_N=torch.zeros_like(x.advantage_N))
    for gap in (0.3, -0.3):
        got, _ = gradient(loss, replace(x, ref_logp_NT=torch.where(x.mask_NT, x.logp_NT - gap, 0.0)))
        if not (got[x.mask_NT] * gap > 0).all():
            raise Failed(f"log π - log π_ref = {gap}: the gradient does not pull back towards the reference")
    return "pulls towards the reference from both sides"


def bandit(loss: Loss) -> str:
    start, end = play_bandit(loss)
    if not end > start + 0.3:
        raise Failed(f"reward {start:.2f} at the start, {end:.2f} at the end")
    return f"reward {start:.2f} -> {end:.2f}"


@dataclass(frozen=True)
class Check:
    """One row of the table. `run` returns a remark, or raises Failed or NotAsked."""

    name: str
    run: Callable[[Loss], str]
    meaning: str  # of a failure, for someone who has not written this file


CHECKS = (
    Check("shapes", shapes, "the loop needs one number and [N, T] values to log: LossOutputs in grpo/batch.py"),
    Check("purity", purity, "a loss that changes its inputs or draws random numbers cannot be replayed or resumed"),
    Check("masks", masks, "tokens after the stop token would be trained on: apply x.mask_NT before any sum over T"),
    Check("padding", padding, "it depends on the longest completion beside it: divide by x.mask_NT.sum(-1), not by T"),
    Check("extremes", extremes, "one outlier token would turn all weights into nan: clamp log-ratios before exp"),
    Check("gradients", gradients, "backward is not the derivative of forward (a hand-written backward? a jump?)"),
    Check("micro-batches", micro_batches, "results depend on memory settings: divide by x.n_tokens or x.n_sequences"),
    Check("order", order, "completions influence each other by their place in the batch"),
    Check("direction", direction, "it unlearns, or learns nothing: check its sign (it is maximised) and .detach()"),
    Check("stillness", stillness, "it moves the policy where there is nothing to learn"),
    Check("reference", reference, "the KL term pushes the policy away from the reference, or nowhere: check its sign"),
    Check("bandit", bandit, "it did not learn in a game in which GRPO learns within a second"),
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    check: Check
    status: str  # "pass", "FAIL" or "-"
    remark: str


def run_checks(loss: Loss) -> list[Outcome]:
    """All checks, in order; an exception inside the loss is a failure of the check that met it."""
    outcomes = []
    for check in CHECKS:
        try:
            status, remark = "pass", check.run(loss)
        except NotAsked as reason:
            status, remark = "-", str(reason)
        except Failed as finding:
            status, remark = "FAIL", str(finding)
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            status = "FAIL"
            remark = f"{type(error).__name__}: {error} ({Path(frame.filename).name}, line {frame.lineno})"
        outcomes.append(Outcome(check, status, remark))
    return outcomes


def table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as text, a failure followed by what it means."""
    lines = []
    for o in outcomes:
        lines.append(f"{o.check.name:<14} {o.status:<5} {o.remark}")
        if o.status == "FAIL":
            lines.append(f"{'':<14} {'':<5} means: {o.check.meaning}")
    return "\n".join(lines)


# ---------------------------------------------------------------- a game of a second


def play_bandit(loss: Loss, *, steps: int = 120, seed: int = 0) -> tuple[float, float]:
    """Mean reward at the start and at the end of 120 GRPO steps on a table of logits, two updates each.

    4 questions, 3 positions, 5 tokens, completions of 1 to 3 tokens; reward: the share of right tokens. Chance: 0.2.
    """
    generator = torch.Generator().manual_seed(seed)
    questions, group, width, vocabulary = 4, 8, 3, 5
    logits = torch.zeros(questions, width, vocabulary, requires_grad=True)
    start = logits.detach().log_softmax(-1)
    right = torch.randint(0, vocabulary, (questions, width), generator=generator)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    rows = torch.arange(questions).repeat_interleave(group)
    means = []

    def chosen(table_QTV, ids_NT):
        return table_QTV[rows].gather(-1, ids_NT[..., None])[..., 0]

    for _ in range(steps):
        with torch.no_grad():
            probs_NTV = logits.softmax(-1)[rows]
            ids_NT = torch.multinomial(probs_NTV.flatten(0, 1), 1, generator=generator).view(-1, width)
            lengths = torch.randint(1, width + 1, (len(rows), 1), generator=generator)
            mask_NT = torch.arange(width)[None] < lengths
            reward_N = ((ids_NT == right[rows]) & mask_NT).sum(-1) / lengths[:, 0]
            means.append(reward_N.mean().item())
            old_NT, ref_NT = chosen(logits.log_softmax(-1), ids_NT), chosen(start, ids_NT)
            if getattr(loss, "kl_in", "loss") == "reward" and loss.needs_reference:
                reward_N = reward_N - loss.kl_penalty(old_NT, ref_NT, mask_NT)
            reward_BG = reward_N.view(questions, group)
            advantage_BG = (reward_BG - reward_BG.mean(1, keepdim=True)) / (reward_BG.std(1, keepdim=True) + 1e-4)
        for _ in range(2):
            logp_QTV = logits.log_softmax(-1)
            entropy_NT = -(logp_QTV.exp() * logp_QTV).sum(-1)[rows]
            x = LossInputs(chosen(logp_QTV, ids_NT), old_NT, old_NT, ref_NT, entropy_NT, advantage_BG.flatten(),
                           mask_NT, float(mask_NT.sum()), float(len(rows)), group_size=group,
                           n_micro_batches=1.0)  # fmt: skip
            optimizer.zero_grad()
            loss(with_entropy_cut(loss, x)).loss.backward()
            optimizer.step()
        if getattr(loss, "entropy", None) is not None:
            loss.entropy.update(entropy_NT.detach()[mask_NT].mean().item())
    return sum(means[:5]) / 5, sum(means[-5:]) / 5


# ---------------------------------------------------------------- tools


def _inner(function):
    return getattr(function, "func", function)


def _gap(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def _close(a: Tensor, b: Tensor) -> bool:
    return bool(torch.isclose(a, b, rtol=1e-9, atol=1e-11).all())


class _Constants(TorchFunctionMode):
    """Remembers, in the order of calls, every result that carried no gradient; then gives those back while inputs move.

    So finite differences see what backward sees: everything behind .detach() or no_grad stands still.
    """

    def __init__(self):
        super().__init__()
        self.results, self.at, self.replaying = [], 0, False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        place, self.at = self.at, self.at + 1
        if self.replaying and place < len(self.results) and self.results[place] is not None:
            return self.results[place][0]
        result = func(*args, **(kwargs or {}))
        if not self.replaying:
            moving = torch.is_tensor(result) and result.requires_grad
            several = isinstance(result, tuple | list) and any(torch.is_tensor(r) and r.requires_grad for r in result)
            self.results.append(None if moving or several or result is None else (result,))
        return result


def _difference(loss: Loss, x: LossInputs, i: int, t: int, hold: bool, step: float = 1e-6) -> float:
    """(L(log p + h) - L(log p - h)) / 2h for one token; with `hold`, constants of the computation keep their values."""

    def at(shift):
        logp_NT = x.logp_NT.detach().clone()
        logp_NT[i, t] += shift
        return replace(x, logp_NT=logp_NT.requires_grad_(), entropy_NT=x.entropy_NT.detach().clone().requires_grad_())

    points = [at(0.0), at(step), at(-step)]
    if not hold:
        return (loss(points[1]).loss.item() - loss(points[2]).loss.item()) / (2 * step)
    constants, values = _Constants(), []
    for point in points:
        constants.at = 0
        with constants:
            out = loss(point)
        values.append(out.loss.item())
        constants.replaying = True
    return (values[1] - values[2]) / (2 * step)


# ---------------------------------------------------------------- command


def check(cfg, baseline: str, picture: Path) -> int:
    """Build the configured loss, run the checks, print the table and draw the picture. Returns the exit code."""
    from hydra import compose
    from omegaconf import OmegaConf

    from grpo.config import build, check_call, check_targets
    from grpo.loss.formula import describe
    from grpo.lossplot import side_by_side

    OmegaConf.resolve(cfg)
    check_targets(cfg.loss, "loss")
    loss = build(cfg.loss, "loss")
    for piece, positional in getattr(loss, "calls", {}).items():
        check_call(f"loss.{piece}", getattr(loss, piece), *positional)
    print(loss.describe() if hasattr(loss, "describe") else describe(loss), end="\n\n")
    outcomes = run_checks(loss)
    print(table(outcomes))
    other = build(compose("train", [f"loss={baseline}"]).loss, "loss")
    start, end = play_bandit(other)
    print(f"\nfor comparison, the bandit with loss={baseline}: reward {start:.2f} -> {end:.2f}")
    try:
        side_by_side({"this loss": loss, baseline: other}, picture)
        print(f"picture: {picture}")
    except Exception as error:
        print(f"no picture: {type(error).__name__}: {error}")
    failed = [o.check.name for o in outcomes if o.status == "FAIL"]
    print(f"\n{len(failed)} of {len(outcomes)} checks failed: {', '.join(failed)}" if failed else "\nall checks passed")
    return 1 if failed else 0


def main() -> None:
    if {"-h", "--help"} & set(sys.argv[1:]):
        sys.exit(__doc__)
    import hydra
    from omegaconf import OmegaConf

    from grpo.config import ConfigError, run_name
    from grpo.train import guard_packages

    guard_packages()
    OmegaConf.register_new_resolver("run_name", run_name, replace=True)
    own = {"baseline": "grpo", "picture": "losscheck.png"}
    rest = []
    for word in sys.argv[1:]:
        match = re.fullmatch(r"\+*(baseline|picture)=(.+)", word)
        if match:
            own[match[1]] = match[2]
        else:
            rest.append(word)
    # No run folder: this command leaves the picture behind and nothing else. Overrides first: argparse takes them from
    # one place only.
    rest.sort(key=lambda word: word.startswith("-") or not ("=" in word or word.startswith("~")))
    sys.argv[1:] = ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none", *rest]

    @hydra.main(config_path="pkg://conf", config_name="train", version_base="1.3")
    def run(cfg) -> None:
        try:
            sys.exit(check(cfg, own["baseline"], Path(own["picture"])))
        except ConfigError as error:
            sys.exit(f"error: {error}")

    run()


if __name__ == "__main__":
    main()
