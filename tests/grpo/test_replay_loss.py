"""Recorded steps: what is written is read back, and replaying it gives the live loss and gradient."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from grpo import record, replay_loss
from grpo import replay as replay_step
from grpo.advantage import group_mean, group_std, opo
from grpo.batch import Completion, Group, LossInputs, needs, pad_rows, quantile
from grpo.lossdocs import ROOT, built
from grpo.record import RecordError
from grpo.replay_loss import Arm, ReplayError, cosines, replay
from tests.conftest import make_clip, make_question

QUESTIONS, COPIES = 4, 3


def loss(name):
    return built(ROOT / "conf" / "loss" / f"{name}.yaml")


class Alone:
    """What the record needs of an engine on one rank."""

    rank = 0

    def gathered(self):
        import contextlib

        return contextlib.nullcontext()


@pytest.fixture
def recorded(policy, tmp_path):
    """(run folder, the parts) of one step with made-up completions, rewards and log-probs, split over two ranks."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    groups = []
    for b in range(QUESTIONS):
        prompt = policy.encode(make_question("q" * (b + 1)), make_clip(b, 0.4 + 0.2 * b))
        completions = []
        for g in range(COPIES):
            n = 2 + (5 * b + 3 * g) % 9
            ids = tuple(torch.randint(0, 250, (n,), generator=generator).tolist())
            completions.append(Completion(ids, tuple((-4 - normal(n).abs()).tolist()), "", b == g, 7))
        groups.append(Group(prompt, tuple(completions)))
    with torch.no_grad():
        micro = [policy.prepare([group]) for group in groups]
        now = [policy(one) for one in micro]
        with policy.reference():
            ref = [policy(one)[0] for one in micro]
    component_NR = torch.stack([(normal(12) > 0).float(), normal(12)], 1)
    component_NR[3:6] = component_NR[3]  # a question whose rewards are all equal
    reward_BG = (component_NR @ torch.tensor([1.0, 0.5])).view(QUESTIONS, COPIES)

    def whole(parts):
        return pad_rows([row for part in parts for row in part])

    old = [logp + 0.05 * normal(*logp.shape) for logp, _ in now]  # as if the policy had moved since
    parts = record.parts(groups, reward_BG=reward_BG, component_NR=component_NR, advantage_BG=group_std(reward_BG),
                         logp_NT=whole([p for p, _ in now]), old_logp_NT=whole(old),
                         entropy_NT=whole([h for _, h in now]), ref_logp_NT=whole(ref))  # fmt: skip
    record.save_adapter(tmp_path, 5, policy, Alone())
    record.write(tmp_path, 5, parts, seed=3, micro=[[1, 1], [1, 1]], names=["right", "nice"],
                 weights=[1.0, 0.5], decode=policy.decode, facts={"grad_norm": 0.25})  # fmt: skip
    return tmp_path, parts


def direct(policy, kept, objective):
    """Loss and gradient as the loop computes them: LossInputs by hand, `backward` through the model."""
    asked = needs(objective)
    masks = [torch.tensor([[t < len(c.token_ids) and not (asked.mask_truncated and c.truncated)
                            for t in range(p.logp_GT.shape[1])] for c in p.group.completions])
             for p in kept]  # fmt: skip
    cut = None
    if asked.entropy_quantile is not None:
        cut = quantile([p.entropy_GT[m] for p, m in zip(kept, masks, strict=True)], asked.entropy_quantile)
    policy.zero_grad()
    total = 0.0
    for p, mask in zip(kept, masks, strict=True):
        logp, entropy = policy(policy.prepare([p.group]), asked.entropy_gradient)
        sampler = pad_rows([c.sampler_logp for c in p.group.completions], mask.shape[1])
        out = objective(LossInputs(
            logp, p.old_logp_GT, sampler, p.ref_logp_GT if asked.reference else None, entropy, p.advantage_G, mask,
            float(sum(m.sum() for m in masks)), float(QUESTIONS * COPIES), group_size=COPIES, n_micro_batches=4.0,
            entropy_cut=cut))  # fmt: skip
        out.loss.backward()
        total += out.loss.item()
    return total, torch.cat([p.grad.flatten() for p in policy.parameters() if p.requires_grad])


def test_a_record_is_read_back_as_it_was(recorded, policy):
    folder, parts = recorded
    got = record.read(record.step_folder(folder, 5))
    assert (got.step, got.seed, got.ranks, got.micro, got.group_size) == (5, 3, (2, 2), ((1, 1), (1, 1)), COPIES)
    for group, part in zip(got.groups, parts, strict=True):
        assert torch.equal(group.prompt.mel, part.group.prompt.mel)
        assert torch.equal(group.prompt.prompt_ids, part.group.prompt.prompt_ids)
        assert [replace(c, text="", sampler_logp=()) for c in part.group.completions] == [
            replace(c, sampler_logp=()) for c in group.completions
        ]
    for b, part in enumerate(parts):
        rows, width = slice(b * COPIES, (b + 1) * COPIES), part.logp_GT.shape[1]
        for name in ("logp", "old_logp", "ref_logp", "entropy"):
            assert torch.equal(getattr(got, f"{name}_NT")[rows, :width], getattr(part, f"{name}_GT")), name
        assert torch.equal(got.advantage_N[rows], part.advantage_G)
    assert got.facts == {"grad_norm": 0.25} and got.weights_R.tolist() == [1.0, 0.5]
    lengths = [len(c.token_ids) for g in got.groups for c in g.completions]
    assert got.mask(False).sum(-1).tolist() == lengths
    assert got.mask(True).sum(-1).tolist() == [0 if n % 4 == 0 and n < 12 else k for n, k in enumerate(lengths)]
    said = json.loads((record.step_folder(folder, 5) / "step.json").read_text())
    assert "".join(said["token_texts"][0]) and not list((folder / "rollouts").glob(".tmp*"))


def test_micro_batches_are_those_of_the_run(recorded):
    got = record.read(record.step_folder(recorded[0], 5))
    assert got.micro_batches() == [(0, range(1)), (0, range(1, 2)), (1, range(2, 3)), (1, range(3, 4))]
    assert replace(got, micro=((2,), (2,))).micro_batches() == [(0, range(2)), (1, range(2, 4))]
    assert replace(got, micro=((3, 1),)).micro_batches() == [(0, range(3)), (0, range(3, 4))]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "step.json").unlink(), "step.json is missing; recorded: step-000005"),
        (lambda f: (f / "tensors.safetensors").write_bytes(b"\x08" * 40), "cannot be read"),
        (lambda f: change(f, "format", 9), "is of format 9, this version reads 2"),
        (lambda f: change(f, "micro", [[2], [1]]), "do not fit together"),
        (lambda f: change(f, "ids", ["a"]), "do not fit together"),
    ],
)
def test_a_broken_record_is_one_clear_line(recorded, spoil, words):
    folder = record.step_folder(recorded[0], 5)
    spoil(folder)
    with pytest.raises(RecordError, match=words):
        record.read(folder)


def change(folder, key, value):
    said = json.loads((folder / "step.json").read_text())
    (folder / "step.json").write_text(json.dumps(said | {key: value}))


def test_a_step_that_was_not_recorded_says_so(tmp_path):
    with pytest.raises(RecordError, match="no step of this run was recorded"):
        record.read(record.step_folder(tmp_path, 1))


def test_parts_that_are_not_those_of_the_ranks_are_refused(recorded):
    with pytest.raises(RecordError, match=r"4 questions, but the ranks hold \[2, 1\]"):
        record.write(recorded[0], 6, recorded[1], seed=0, micro=[[2], [1]], names=[], weights=[], decode=str)


@pytest.mark.parametrize(
    "name",
    ["grpo", "dr_grpo", "bnpo", "gspo", "cispo", "vespo", "group_mean", "high_entropy", "off_policy_mask", "tis",
     "entropy_bonus"],
)  # fmt: skip
def test_loss_and_gradient_are_those_of_a_backward_through_the_model(recorded, policy, name):
    folder, parts = recorded
    arm = Arm(name, loss(name), None)
    if name == "off_policy_mask":
        arm.loss.mask_truncated = True
    others = [Arm("other", loss("dapo"), group_std), Arm("last", loss("luspo"), group_mean)]
    results, _ = replay(record.read(record.step_folder(folder, 5)), policy, [*others[:1], arm, *others[1:]])
    value, gradient = direct(policy, parts, loss(name) if name != "off_policy_mask" else arm.loss)
    assert results[1].loss == pytest.approx(value, abs=1e-6)
    assert gradient.norm() > 1e-3 and (results[1].gradient - gradient).abs().max() <= 1e-6


def test_weights_of_a_token_mean_are_the_advantages_times_the_ratio(recorded, policy):
    got = record.read(record.step_folder(recorded[0], 5))
    got = replace(got, old_logp_NT=got.logp_NT)
    (plain,), worst = replay(got, policy, [Arm("gpg", loss("gpg"), None)])
    assert worst < 1e-5
    expected = got.advantage_N[:, None].expand_as(got.logp_NT).masked_fill(~got.mask(False), 0.0)
    assert torch.allclose(plain.weight_NT, expected, atol=1e-5)
    w = expected[got.mask(False)].double()
    figures = plain.figures
    assert figures["silent"] == pytest.approx((w == 0).double().mean().item()) and figures["silent"] > 0.1
    assert figures["mean |w|"] == pytest.approx(w.abs().mean().item(), abs=1e-5)
    assert figures["effective"] == pytest.approx((w.abs().sum() ** 2 / (len(w) * (w**2).sum())).item(), abs=1e-5)


def test_other_advantages_come_from_the_recorded_rewards(recorded, policy):
    got = record.read(record.step_folder(recorded[0], 5))
    reward_BG = got.reward_N.view(QUESTIONS, COPIES)
    tokens_BG = got.mask(False).sum(-1).view(QUESTIONS, COPIES)
    for function, expected in [(group_mean, group_mean(reward_BG)), (opo, opo(reward_BG, tokens_BG=tokens_BG))]:
        again = replace(got, advantage_N=expected.flatten())
        (a,), _ = replay(got, policy, [Arm("x", loss("gpg"), function)])
        (b,), _ = replay(again, policy, [Arm("x", loss("gpg"), None)])
        assert torch.equal(a.gradient, b.gradient) and a.gradient.any()


def test_kl_in_the_reward_moves_the_advantages(recorded, policy):
    got = record.read(record.step_folder(recorded[0], 5))
    objective = loss("kl_in_reward")
    penalty = objective.kl_penalty(got.old_logp_NT, got.ref_logp_NT, got.mask(False)).view(QUESTIONS, COPIES)
    by_hand = replace(got, advantage_N=group_std(got.reward_N.view(QUESTIONS, COPIES) - penalty).flatten())
    (a,), _ = replay(got, policy, [Arm("x", objective, group_std)])
    (b,), _ = replay(by_hand, policy, [Arm("x", objective, None)])
    (c,), _ = replay(got, policy, [Arm("x", objective, None)])
    assert torch.equal(a.gradient, b.gradient) and not torch.equal(a.gradient, c.gradient)


def test_a_reference_that_the_run_did_not_need_is_computed(recorded, policy):
    got = record.read(record.step_folder(recorded[0], 5))
    (a,), _ = replay(got, policy, [Arm("grpo", loss("grpo"), None)])
    (b,), _ = replay(replace(got, ref_logp_NT=None), policy, [Arm("grpo", loss("grpo"), None)])
    assert a.metrics["kl"] > 1e-4 and (a.gradient - b.gradient).abs().max() < 1e-6


def test_cosines_by_hand():
    def of(*g):
        return replay_loss.Replayed("x", 0.0, {}, torch.zeros(1, 1), torch.ones(1, 1).bool(), torch.tensor(g))

    got = cosines([of(1.0, 0.0), of(1.0, 1.0), of(-2.0, 0.0), of(0.0, 0.0)])
    assert got[0, :3].tolist() == pytest.approx([1.0, 2**-0.5, -1.0]) and got[3].isnan().all()


def test_a_plain_function_can_stand_in_for_an_objective(recorded, policy):
    def mine(x):
        inner = loss("grpo")(x)
        return replace(inner, metrics={})

    results, _ = replay(record.read(record.step_folder(recorded[0], 5)), policy,
                        [Arm("mine", mine, None), Arm("grpo", loss("grpo"), None)])  # fmt: skip
    assert torch.equal(results[0].gradient, results[1].gradient)


# ---------------------------------------------------------------- arms and the command, on a real run

RUN = ["debug=one_step", "tracking=none", "max_tokens=40", "generations=6", "model.tiny.warm_start.steps=60",
       "updates=2", "micro_tokens=200", "questions=4", "model.lora.dropout=0.05", "loss=dapo",
       "loss.surrogate.clip_high=0.3", "beta=0.05", "save_rollouts=2", "rollout.correction=truncate"]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with step 2 recorded from the real loop, and live.safetensors: the gradient of its first update."""
    work = tmp_path_factory.mktemp("recorded")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    worker = Path(__file__).with_name("record_worker.py")
    done = subprocess.run([sys.executable, str(worker), "outputs/r", *RUN, f"cache={work}/.cache"], cwd=work, env=env,
                          capture_output=True, text=True, timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return work / "outputs" / "r"


def test_the_replayed_gradient_is_the_live_one(run):
    """With dropout, two micro-batches and two updates: 1e-6 against what DeepSpeed held after the first backward."""
    folder = record.step_folder(run, 2)
    arms, missing = replay_loss.arms(run, [])
    assert missing is None and [a.name for a in arms] == ["dapo (this run)"] and arms[0].advantage is None
    got, policy = record.read(folder), replay_loss.load_policy(run, folder / "adapter")
    (own,), worst = replay(got, policy, arms)
    assert worst < 1e-5 and own.loss == pytest.approx(got.facts["loss"], abs=1e-6)
    live = load_file(run / "live.safetensors")
    names = [n for n, p in policy.named_parameters() if p.requires_grad]
    expected = torch.cat([live[n].flatten() for n in names])
    assert expected.norm() > 1e-4 and (own.gradient - expected).abs().max() <= 1e-6
    assert own.figures["grad norm"] == pytest.approx(got.facts["grad_norm"], rel=1e-4)
    assert torch.allclose(got.advantage_N.view(4, -1), group_std(got.reward_N.view(4, -1)), atol=1e-6)


def test_the_command_compares_ten_losses(run, capsys):
    names = "grpo,dr_grpo,bnpo,gspo,cispo,sapo,vespo,luspo,high_entropy"
    replay_loss.main([str(run), "--step", "2", f"loss={names}"])
    out = capsys.readouterr().out
    assert "log π is the recorded one within" in out and "NOT the same policy" not in out
    assert "gradient norm of the run's own loss" in out
    rows = list(csv.DictReader((run / "replay-step-000002.csv").open()))
    assert [r["arm"] for r in rows] == ["dapo (this run)", *names.split(",")]
    assert all(float(r["grad norm"]) > 0 for r in rows)
    assert float(rows[0]["cosine to dapo (this run)"]) == pytest.approx(1.0)
    assert (run / "replay-step-000002.png").read_bytes()[:4] == b"\x89PNG"


def test_arms_are_combinations_and_only_the_run_itself_has_its_overrides(run):
    arms, _ = replay_loss.arms(run, ["loss=dapo,grpo", "advantage=group_std,group_mean"])
    assert [a.name for a in arms] == ["dapo (this run)", "dapo advantage=group_std", "dapo advantage=group_mean",
                                      "grpo advantage=group_std", "grpo advantage=group_mean"]  # fmt: skip
    assert all("sampler" in a.loss.weights for a in arms)  # rollout.correction, as in the run
    highs = [a.loss.surrogate.keywords["clip_high"] for a in arms]
    assert highs == [0.3, 0.28, 0.28, 0.2, 0.2] and arms[3].loss.beta == 0.05
    again, _ = replay_loss.arms(run, ["loss=grpo,dapo", "loss.surrogate.clip_high=0.3"])
    assert [a.name for a in again] == ["dapo loss.surrogate.clip_high=0.3 (this run)",
                                       "grpo loss.surrogate.clip_high=0.3"]  # fmt: skip
    by_experiment, _ = replay_loss.arms(run, ["experiment=dr_grpo,rloo"])
    assert [a.name for a in by_experiment] == ["dapo (this run)", "dr_grpo", "rloo"]


def test_another_adapter_gives_other_ratios(run, tmp_path, capsys):
    policy = replay_loss.load_policy(run, record.step_folder(run, 2) / "adapter")
    for name, p in policy.named_parameters():
        if "lora_B" in name:
            p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    policy.save_adapter(tmp_path / "moved")
    replay_loss.main([str(run), "--step", "2", "--adapter", str(tmp_path / "moved"), "--to", str(tmp_path / "x.png")])
    (row,) = csv.DictReader((tmp_path / "x.csv").open())
    assert float(row["ratio/max"]) > 1.05 and "within" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--step", "3"], "step-000003/step.json is missing; recorded: step-000002"),
        (["--step", "2", "loss=grppo"], "loss=grppo: there is no such choice"),
        (["--step", "2", "temperature=2"], "temperature=2: a recorded step is looked at with another loss"),
        (["--step", "2", "+loss.betta=1"], "did you mean 'beta'"),
        (["--step", "2", "--model", "nowhere"], "the base model nowhere is not here: name it with --model"),
        (["--step", "2", "--adapter", "nowhere"], "nowhere holds no adapter that can be read"),
    ],
)
def test_mistakes_are_one_clear_line(run, words, message):
    with pytest.raises(SystemExit) as stopped:
        replay_loss.main([str(run), *words])
    assert str(stopped.value).startswith("error: ") and message in str(stopped.value)


def test_a_loss_outside_the_repository(run, tmp_path, capsys):
    (tmp_path / "loss").mkdir()
    grpo = (ROOT / "conf" / "loss" / "grpo.yaml").read_text()
    (tmp_path / "loss" / "mine.yaml").write_text(grpo.replace("sequence_mean", "token_mean"))
    arms, _ = replay_loss.arms(run, ["loss=mine"], tmp_path)
    assert [a.name for a in arms] == ["dapo (this run)", "mine"]
    assert arms[1].loss.aggregate.func.__name__ == "token_mean"


def test_a_loss_that_is_composed_otherwise_by_now_is_left_out(run, tmp_path):
    copy = tmp_path / "copy"
    (copy / ".hydra").mkdir(parents=True)
    (copy / ".hydra" / "overrides.yaml").write_text((run / ".hydra" / "overrides.yaml").read_text())
    cfg = OmegaConf.load(run / "config.yaml")
    cfg.loss.surrogate.clip_high = 0.5
    OmegaConf.save(cfg, copy / "config.yaml")
    arms, missing = replay_loss.arms(copy, ["loss=dapo"])
    assert [a.name for a in arms] == ["dapo"] and arms[0].advantage is not None
    assert "loss of" in missing and "composed differently now" in missing
    (copy / ".hydra" / "overrides.yaml").write_text("['+x={_target_: os.getcwd}']")
    with pytest.raises(ReplayError, match="_target_"):
        replay_loss.arms(copy, [])


def test_the_report_reads_the_record(recorded):
    from grpo.report.samples import Budget, _tokens

    folder, parts = recorded
    figures, note = _tokens(folder, 5, COPIES, COPIES, Budget())
    assert note is None and all(f is not None for f in figures)
    lengths = [len(c.token_ids) for c in parts[1].group.completions]
    assert [len(f["t"]) for f in figures] == [len(f["ratio"]) for f in figures] == lengths
    expected = (parts[1].logp_GT[0] - parts[1].old_logp_GT[0])[: lengths[0]].exp()
    assert figures[0]["ratio"] == pytest.approx(expected.tolist(), rel=1e-3)


# ---------------------------------------------------------------- the step itself: python -m grpo.replay


def test_a_step_is_made_again_stage_by_stage(run, capsys):
    assert replay_step.main([str(run), "--step", "2"]) == 0
    out = capsys.readouterr().out
    got = record.read(record.step_folder(run, 2))
    assert out.count("question  ") == 4 and all(f"question  {g.prompt.id}: " in out for g in got.groups)
    assert f"{got.facts['loss']:.8g}" in out and f"{got.facts['grad_norm']:.8g}" in out
    assert "accuracy" in out and out.count("the same") == 4 and "DIFFERS" not in out
    assert "samples.jsonl has 0 of 24 completions: left out" in out  # this run has none


def test_a_record_that_was_changed_is_found_out(run, capsys):
    tensors, cfg = record.step_folder(run, 2) / "tensors.safetensors", run / "config.yaml"
    before, config = tensors.read_bytes(), cfg.read_text()
    changed = load_file(tensors)
    changed["reward_N"][0] += 1
    changed["old_logp_NT"][0, 0] -= 1
    try:
        save_file(changed, tensors)
        one = record.read(tensors.parent).groups[1].prompt.id
        assert replay_step.main([str(run), "--step", "2", "--question", one]) == 1
        out = capsys.readouterr().out
        odd = {line.split("  ")[0] for line in out.splitlines() if line.endswith("DIFFERS")}
        assert {"advantages", "log π_old"} <= odd
        assert out.count("question  ") == 1
        save_file(load_file(tensors) | {"advantage_N": torch.full((24,), float("nan"))}, tensors)
        assert replay_step.main([str(run), "--step", "2"]) == 1 and "inf apart" in capsys.readouterr().out
        tensors.write_bytes(before)
        cfg.write_text(config.replace("clip_high: 0.3", "clip_high: 0.4"))
        assert replay_step.main([str(run), "--step", "2"]) == 0
        out = capsys.readouterr().out
        assert "loss of" in out and "composed differently now: left out" in out
    finally:
        tensors.write_bytes(before), cfg.write_text(config)


def test_what_cannot_be_replayed_is_one_line(run):
    for words, told in (["--step", "3"], "recorded: step-000002"), (["--step", "2", "--question", "x"], "step 2 asked"):
        with pytest.raises(SystemExit, match=told):
            replay_step.main([str(run), *words])
