"""One iteration with stand-ins for all but the maths: what the loss is given, in which order, and what is kept."""

import math
from contextlib import contextmanager, nullcontext
from functools import partial
from math import exp
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from data.audio import ClipError
from grpo import loop
from grpo.advantage import group_mean
from grpo.batch import Completion, Encoded, Group, moves_without_advantage, pad_rows
from grpo.collect import Earned
from grpo.loading import Loader
from grpo.loss import aggregate, kl, ratio, surrogate
from grpo.loss.objective import Objective
from grpo.rollout import Sampling
from grpo.rollout.lag import Rollouts, load_questions
from grpo.sync import Receipt
from rewards.weighted import Failure
from tests.conftest import make_question

# Tokens of groups 0 and 1, and of 2 and 3: with their prompts 25 each. Groups in a micro-batch -> micro_tokens
TOKENS = {1: 1, 2: 25, 4: None}
# Tokens of the two completions of questions 0 to 3 (4 to 7 repeat them), and those that the length limit cut.
LENGTHS = [(3, 1), (2, 5), (4, 4), (1, 2)]
CUT = {(1, 1), (2, 0)}


class Policy(torch.nn.Module):
    """One weight w: token id i has log-prob -w(i + 1)/10, and -(i + 1)/20 with the adapter off."""

    device = torch.device("cpu")

    def __init__(self, dropout):
        super().__init__()
        self.w, self.dropout = torch.nn.Parameter(torch.tensor(1.0)), dropout
        self.name, self.passes = "policy", []

    def encode_audio(self, prompts):
        return [f"sound of {p.id}" for p in prompts]

    def tokens_of(self, group):
        return len(group.prompt.prompt_ids) + sum(len(c.token_ids) for c in group.completions)

    def prepare(self, groups, audio):
        assert audio == self.encode_audio([g.prompt for g in groups])
        return groups

    def forward(self, groups, entropy_gradient=False):
        self.passes.append((self.name, self.training, [g.prompt.id for g in groups]))
        ids = pad_rows([c.token_ids for g in groups for c in g.completions])
        mask = pad_rows([[1.0] * len(c.token_ids) for g in groups for c in g.completions])
        w = self.w if self.name == "policy" else torch.tensor(0.5)
        return functional.dropout(-w * (ids + 1) / 10 * mask, self.dropout, self.training), 0.5 * mask

    @contextmanager
    def reference(self):
        self.name = "reference"
        yield
        self.name = "policy"


class Engine:
    """One of two ranks that hold the same numbers: sums double, extrema stay. Plain gradient descent."""

    world = 2

    def __init__(self, policy, rank):
        self.policy, self.rank, self.calls = policy, rank, []

    def __call__(self, *args):
        return self.policy(*args)

    def backward(self, loss, *, last):
        self.calls.append("last backward" if last else "backward")
        loss.backward()

    def step(self, lr):
        self.calls.append(f"step {lr:g}")
        norm = self.policy.w.grad.abs().item()
        with torch.no_grad():
            self.policy.w -= lr * self.policy.w.grad
        self.policy.w.grad = None
        return norm

    def reduce(self, values, how="sum"):
        return {k: v * (2 if how == "sum" else 1) for k, v in values.items()}

    def gather(self, items):
        return list(items) * self.world

    def together(self, call, error):
        return call()

    def reference(self):
        return self.policy.reference()


class Rollout:
    """Completion g of question b has the token ids b, b + 1, ...; the sampler gave each a log-prob of -0.25."""

    version = 0

    def generate(self, prompts, copies, sampling, done):
        self.sampling = sampling
        groups = [Group(p, tuple(self._one(int(p.id) % 4, g) for g in range(copies))) for p in prompts]
        for place in reversed(range(len(groups))):  # whichever is whole first
            done(place, groups[place])
        return groups

    def _one(self, b, g):
        n = LENGTHS[b][g]
        return Completion(tuple(range(b, b + n)), (-0.25,) * n, f"{b}{g}", (b, g) in CUT, self.version)


class Rewards:
    """The second completion of each group earns 1, the first nothing; the reward of those in `raising` failed."""

    names, weights, raising = ("second",), (1.0,), ()

    def __init__(self):
        self.contexts = {}  # of each group

    def check(self, failures, n):
        self.checked = list(failures), n

    def score(self, texts, contexts):
        self.contexts[texts[0][0]] = contexts
        total = [float("nan") if t in self.raising else float(t[1]) for t in texts]
        failures = [Failure(i, "second", "ValueError: no") for i, t in enumerate(texts) if t in self.raising]
        return SimpleNamespace(components=[[r] for r in total], total=total, failures=failures)


class Watched(Objective):
    """GRPO's objective, which keeps what it was given."""

    def __call__(self, x):
        self.seen.append(x)
        return super().__call__(x)


class Run(SimpleNamespace):
    """The first of two ranks, with 8 questions a step; `unreadable` ids have clips that cannot be read."""

    def _encode(self, question):
        if question.id in self.unreadable:
            raise ClipError("silent", question.id, "no sound")
        return Encoded(question.id, torch.zeros(7, dtype=torch.long), torch.zeros(1, 1), f"sha {question.id}")

    def quarantine(self, failed):
        self.quarantined |= {name: reason for name, reason, _ in failed}


def make_run(*, beta=0.1, mask_truncated=False, updates=1, micro=2, rank=0, dropout=0.0, unreadable=()):
    policy = Policy(dropout)
    clipped = partial(surrogate.clipped, clip_low=0.2, clip_high=0.2)
    objective = Watched(beta=beta, ratio=ratio.token, surrogate=clipped, kl=kl.k3,
                        aggregate=aggregate.sequence_mean, mask_truncated=mask_truncated)  # fmt: skip
    objective.seen, pushed = [], []
    rest = not moves_without_advantage(objective)
    objective.seen.clear()
    asked = [make_question(str(i), answer=2) for i in range(10)]
    run = Run(
        settings=SimpleNamespace(questions=8, generations=2, micro_tokens=TOKENS[micro], updates=updates, max_tokens=5,
                                 seed=3, steps=10, save_rollouts=False, dynamic_sampling_rounds=1,
                                 dynamic_sampling_by="reward"),
        sampler=SimpleNamespace(batch=lambda step, bad: [q for q in asked if q.id not in bad][:8]),
        policy=policy, engine=Engine(policy, rank), rollout=Rollout(), rewards=Rewards(), objective=objective,
        advantage=group_mean, schedule=lambda step, steps: (step + 1) / steps, clock=lambda stage: nullcontext(),
        sync=SimpleNamespace(push=lambda version, groups: pushed.append((version, groups)) or Receipt("none", version)),
        pushed=pushed, version=0, tokens=0, idle_groups_rest=rest, quarantined={},
        unreadable=unreadable, waiting=nullcontext,
    )  # fmt: skip
    run.encode, run.rollouts = Loader(run._encode, keep=20, workers=0), Rollouts(run, lag=0)
    return run


def test_denominators_count_the_whole_step():
    # a rank has 4 + 7 + 8 + 3 = 22 tokens in 8 completions; two of them, of 5 and 4 tokens, were cut
    for mask_truncated, tokens in [(False, 22), (True, 13)]:
        run = make_run(mask_truncated=mask_truncated)
        loop.step(run, 0)
        assert [(x.n_tokens, x.n_sequences) for x in run.objective.seen] == [(2 * tokens, 16)] * 2
        assert sum(x.mask_NT.sum().item() for x in run.objective.seen) == tokens
    assert [x.mask_NT.sum(1).tolist() for x in run.objective.seen] == [[3, 1, 2, 0], [0, 4, 1, 2]]


def test_micro_batches_change_nothing():
    results = []
    for micro in (1, 2, 4):
        run = make_run(micro=micro, updates=2)
        results.append(loop.step(run, 0)[0] | {"w": run.policy.w.item()})
    assert results[0] == pytest.approx(results[1], rel=1e-5) and results[0] == pytest.approx(results[2], rel=1e-5)
    assert results[0]["w"] != 1.0


def test_order_of_an_iteration():
    run = make_run(updates=2)
    metrics, _, groups = loop.step(run, 4)
    assert run.version == 1 and run.pushed == []
    loop.sync(run, groups)
    assert run.rollout.sampling == Sampling(max_tokens=5, seed=3, step=4)
    assert run.engine.calls == ["backward", "last backward", "step 0.5"] * 2
    assert metrics["learning_rate"] == 0.5 and run.pushed == [(1, groups)]
    assert run.tokens == 2 * (4 * 7 + 22)


def test_reference_is_asked_once_without_dropout_and_not_at_all_when_beta_is_zero():
    first, second = ["0", "1"], ["2", "3"]
    run = make_run(updates=2)
    loop.step(run, 0)
    assert run.policy.passes == [
        ("reference", False, first), ("reference", False, second), ("policy", True, first), ("policy", True, second),
        ("policy", True, first), ("policy", True, second),
    ]  # fmt: skip
    assert torch.equal(run.objective.seen[2].ref_logp_NT, run.objective.seen[0].ref_logp_NT)
    run = make_run(beta=0)
    loop.step(run, 0)
    assert {name for name, *_ in run.policy.passes} == {"policy"} and run.objective.seen[0].ref_logp_NT is None


def test_old_log_probs_are_those_of_the_first_update():
    run = make_run(updates=3, dropout=0.5)
    loop.step(run, 0)
    for m, x in enumerate(run.objective.seen):
        assert torch.equal(x.old_logp_NT, run.objective.seen[m % 2].logp_NT)
        assert not x.old_logp_NT.requires_grad and x.logp_NT.requires_grad
    assert not torch.equal(run.objective.seen[2].logp_NT, run.objective.seen[0].logp_NT)


def test_dropout_is_a_function_of_seed_step_and_rank():
    def drawn(seed=3, step=0, rank=0):
        run = make_run(dropout=0.5, rank=rank)
        run.settings.seed = seed
        loop.step(run, step)
        return [x.logp_NT.tolist() for x in run.objective.seen]

    base = drawn()
    torch.rand(5)  # whatever else uses the global generator
    assert drawn() == base
    assert base not in (drawn(seed=4), drawn(step=1), drawn(rank=1))  # rank 1 has the same tokens


def test_rewards_hear_of_their_own_completion():
    run = make_run()
    _, rows, _ = loop.step(run, 0)
    assert [r["reward"] for r in rows] == [r["rewards"]["second"] for r in rows] == [0, 1] * 4
    contexts = [c for _, group in sorted(run.rewards.contexts.items()) for c in group]
    assert [c["n_tokens"] for c in contexts] == [3, 1, 2, 5, 4, 4, 1, 2]
    assert [i for i, c in enumerate(contexts) if c["truncated"]] == [3, 4] and {c["answer"] for c in contexts} == {2}
    assert [(r["id"], r["sample"], r["completion"], r["tokens"]) for r in rows[2:4]] == [
        ("1", 0, "10", 2), ("1", 1, "11", 5),
    ]  # fmt: skip
    assert (rows[3]["step"], rows[3]["reward"], rows[3]["advantage"], rows[3]["truncated"]) == (1, 1.0, 0.5, True)


def test_samples_name_the_option_that_was_answered():
    """As the accuracy reward reads it: an option's text may hold < or a tag's name, and none is null."""
    said = ["<answer>B</answer>", "<answer>below <5 s</answer>", "<answer>d) x</answer>", "<answer>5 s", "nothing"]
    completions = tuple(Completion((1,), (0.0,), text, False, 0) for text in said)
    group = Group(Encoded("q", torch.zeros(1, dtype=torch.long), torch.zeros(1, 1), "sha"), completions)
    question = make_question("q", choices=("below <5 s", "5 s", "above >5 s", "d"))
    earned = [Earned(question, group, [[0.0]] * 5, [0.0] * 5)]
    rows = loop._samples(0, earned, torch.zeros(1, 5), ["accuracy"])
    assert [r["answered"] for r in rows] == [1, 0, None, None, None]


def test_a_failed_reward_takes_its_group_out():
    run = make_run()
    run.rewards.raising = ("10",)
    run.advantage = lambda reward_BG: reward_BG - 0.5  # one that does not give 0 where rewards are equal
    metrics, rows, _ = loop.step(run, 0)
    given = torch.cat([x.advantage_N for x in run.objective.seen]).tolist()
    assert given == [-0.5, 0.5, 0, 0, -0.5, 0.5, -0.5, 0.5] == [r["advantage"] for r in rows]
    assert metrics["rewards/failed"] == 2 and metrics["rewards/second/mean"] == pytest.approx(4 / 7)
    # a step's failures are weighed against all its completions, over both ranks; a failed one is no reward of 0
    assert run.rewards.checked == (["question 1, completion 0, second: ValueError: no"] * 2, 16)
    assert metrics["reward"] == pytest.approx(4 / 7) and metrics["frac_reward_zero_std"] == 0


def test_groups_without_advantage_are_not_computed_where_the_loss_is_silent_about_them():
    def trained(**changes):
        run = make_run(**changes)
        run.rewards.raising = ("00", "20", "30")  # their groups get advantage 0
        metrics, *_ = loop.step(run, 0)
        return [ids for name, _, ids in run.policy.passes if name == "policy"], metrics, run.policy.w.item()

    rested, metrics, w = trained(beta=0.0)
    assert rested == [["1"]] and metrics["frac_groups_trained"] == 1 / 4
    everything, metrics, _ = trained(beta=0.1)
    assert everything == [["0", "1"], ["2", "3"]] and metrics["frac_groups_trained"] == 1
    run = make_run(beta=0.0)
    run.rewards.raising, run.idle_groups_rest = ("00", "20", "30"), False
    loop.step(run, 0)
    assert run.policy.w.item() == pytest.approx(w, abs=1e-7) and w != 1.0
    assert [x.n_tokens for x in run.objective.seen] == [44, 44]


def test_a_rank_whose_groups_are_all_without_advantage_still_takes_part():
    run = make_run(beta=0.0)
    run.rewards.raising = ("00", "10", "20", "30")
    metrics, *_ = loop.step(run, 0)
    assert [ids for *_, ids in run.policy.passes] == [["0"]] and run.policy.w.item() == 1.0
    assert run.engine.calls == ["last backward", "step 0.1"] and metrics["loss"] == 0


@pytest.mark.parametrize(
    ("rests", "fails_at", "kept"),
    [(False, 0, True), (True, 0, False), (False, 1, False)],  # a group was not computed; the weights had moved
)
def test_a_step_that_is_not_finite_is_recorded_where_the_record_is_whole(monkeypatch, rests, fails_at, kept):
    run, made, steps = make_run(beta=0.0, updates=2), [], []
    run.rewards.raising, run.idle_groups_rest, run.folder = ("00", "20", "30"), rests, None

    def step(learning_rate):
        steps.append(learning_rate)
        if len(steps) > fails_at:
            raise FloatingPointError
        return 1.0

    run.engine.step = step
    monkeypatch.setattr(loop.record, "save_adapter", lambda *_: made.append("adapter"))
    monkeypatch.setattr(loop.record, "parts", lambda *_, **__: [])
    monkeypatch.setattr(loop.record, "write", lambda *_, **__: made.append("record"))
    run.rewards.weights, run.policy.decode = (1.0,), None
    metrics, *_ = loop.step(run, 0)
    assert made == (["adapter", "record"] if kept else []) and len(steps) == fails_at + 1
    assert math.isnan(metrics["grad_norm"])


def test_completions_of_other_weights_are_refused():
    run = make_run()
    run.rollout.version = 7  # the run holds version 0
    with pytest.raises(RuntimeError, match=r"version \{7\}, expected 0"):
        loop.step(run, 0)


def test_an_unreadable_clip_is_replaced_and_ranks_share_the_step():
    run = make_run(unreadable=("1", "8"))
    questions, prompts = load_questions(run, 0)
    assert [q.id for q in questions] == [p.id for p in prompts] == ["0", "2", "3", "4"]
    assert run.quarantined == {"1": "silent"}
    assert [q.id for q in load_questions(make_run(rank=1), 0)[0]] == ["4", "5", "6", "7"]


def test_the_loss_is_the_sum_of_the_shares():
    run = make_run()
    metrics, *_ = loop.step(run, 0)
    shares = [Objective.__call__(run.objective, x).loss.item() for x in run.objective.seen]
    assert metrics["loss"] == pytest.approx(2 * sum(shares)) and min(shares) > 0  # two micro-batches on two ranks


def test_token_metrics_are_those_of_the_first_update():
    # log-probs are -0.1 (token id 0) to -0.6 (id 5), the sampler's are -0.25: gaps from -0.35 to 0.15
    metrics, *_ = loop.step(make_run(), 0)
    name = "sampling/importance_sampling_ratio"
    assert metrics["sampling/sampling_logp_difference/max"] == pytest.approx(0.35)
    assert metrics[f"{name}/min"] == pytest.approx(exp(-0.35)) and metrics[f"{name}/max"] == pytest.approx(exp(0.15))
    assert metrics["entropy"] == 0.5 and metrics["ratio/max"] == metrics["ratio/min"] == 1
    more, *_ = loop.step(make_run(updates=2), 0)
    assert {k: v for k, v in more.items() if k != "grad_norm"} == {k: v for k, v in metrics.items() if k != "grad_norm"}
