"""Whole runs of `python -m grpo.train` in processes of their own: same seed, resume, two ranks, errors, dry run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

from data.manifest import write as write_manifest
from data.sampler import Sampler
from data.synthetic import questions
from grpo.replay import main as replay
from grpo.rollout.serve import free_port
from tests.forked import forked
from tests.grpo.test_metrics import documented

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SMALL = [
    "steps=6", "questions=4", "generations=4", "micro_tokens=400", "eval.every=3", "checkpoint.every=2",
    "eval.batch=16",
    "data.train.count=64", "data.eval.count=16", "model.tiny.warm_start.steps=15", "model.tiny.build.audio_hidden=64",
    "max_tokens=24", "updates=2", "model.lora.dropout=0.05",
]  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


# In the environment of every run here: none may leave a trace.
SECRETS = {"WANDB_API_KEY": "5ec2e7a1" * 5, "HF_TOKEN": "hf_5ec2e7b2token", "GRPO_SERVER_TOKEN": "5ec2e7c3server"}
ENV = {**os.environ, **SECRETS, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore",
       "HF_HUB_OFFLINE": "1"}  # fmt: skip


def train(work, *overrides, ranks=1, ok=True, base=SMALL):
    done = forked("grpo.train", [*base, "tracking=none", *overrides], cwd=work, env=ENV, ranks=ranks)
    assert (done.returncode == 0) == ok, done.stdout[-3000:] + done.stderr[-4000:]
    return done


def lines(work, name, file="metrics.jsonl"):
    return [json.loads(line) for line in (work / "outputs" / name / file).read_text().splitlines()]


def timeless(rows):
    clock = ("step_time", "tokens_per_second")
    return [{k: v for k, v in row.items() if not k.startswith("time/") and k not in clock} for row in rows]


@pytest.fixture(scope="module")
def straight(work):
    done = train(work, "name=straight", "tracking=offline")
    return done.stdout


def test_a_run_folder_holds_what_is_promised(work, straight):
    folder = work / "outputs" / "straight"
    summary = json.loads((folder / "summary.json").read_text())
    for key in ("accuracy/start", "accuracy/final", "accuracy/chance", "steps", "seconds", "peak_memory_bytes"):
        assert isinstance(summary[key], int | float), key
    assert summary["accuracy/chance"] == 0.25 and summary["steps"] == 6
    metrics = lines(work, "straight")
    assert [row["step"] for row in metrics] == [0, 1, 2, 3, 4, 5, 6]
    for name in ("reward", "reward_std", "frac_reward_zero_std", "rewards/accuracy/mean", "rewards/format/std",
                 "completions/mean_length", "completions/clipped_ratio", "kl", "entropy", "clip_ratio/low_mean",
                 "clip_ratio/high_mean", "grad_norm", "learning_rate", "step_time", "time/rollout",
                 "sampling/importance_sampling_ratio/mean"):  # fmt: skip
        assert name in metrics[1], name
    assert [key for row in metrics for key in row if key != "step" and not documented(key)] == []
    samples = lines(work, "straight", "samples.jsonl")
    assert len(samples) == 6 * 4 * 4 and set(samples[0]["rewards"]) == {"accuracy", "format", "length"}
    assert (folder / "config.yaml").exists() and (folder / "curves.png").stat().st_size > 10_000
    assert (folder / "checkpoints" / "step-000006" / "adapter_model.safetensors").exists()
    assert list(folder.glob("wandb/offline-run-*"))


def test_no_secret_of_the_environment_is_written_or_printed(work, straight):
    written = [p for p in work.rglob("*") if p.is_file()]
    assert any(p.suffix == ".wandb" for p in written) and any(p.name == "provenance.json" for p in written)
    for name, secret in SECRETS.items():
        assert secret not in straight
        assert not [p for p in written if secret.encode() in p.read_bytes()], name


def test_the_run_prints_the_objective_first(straight):
    assert "minimise  mean over completions" in straight and "+ 0.1·" in straight
    assert "A = (r - mean(r)) / (std(r) + 0.0001)" in straight
    assert straight.index("minimise") < straight.index("held-out accuracy at the start")


def test_the_rows_of_a_group_share_one_question_and_one_clip(work, straight):
    samples = lines(work, "straight", "samples.jsonl")
    for i in range(0, len(samples), 4):
        group = samples[i : i + 4]
        assert len({(r["step"], r["id"], r["question"], r["clip_sha256"]) for r in group}) == 1
        assert [r["sample"] for r in group] == [0, 1, 2, 3]
    assert len({r["clip_sha256"] for r in samples}) > 10


def test_first_step_identities(work, straight):
    first = lines(work, "straight")[1]
    assert abs(first["kl"]) < 1e-9 or first["kl"] < 1e-3  # dropout of the adapter is the only difference
    assert first["ratio/mean"] == pytest.approx(1.0, abs=1e-6) and first["clip_ratio/high_mean"] == 0


def test_one_seed_one_run(work, straight):
    """Asking a benchmark as well changes nothing else; this one is the held-out questions themselves."""
    made = next(work.glob(".cache/synthetic/eval-*/manifest.jsonl"))
    train(work, "name=again", "bench=[heldout]", f"bench.heldout.path={made}")
    rows = lines(work, "again")
    assert [row.pop("bench/heldout", None) for row in rows] == [row.get("accuracy/heldout") for row in rows]
    assert timeless(rows) == timeless(lines(work, "straight"))
    assert lines(work, "again", "samples.jsonl") == lines(work, "straight", "samples.jsonl")


def test_another_seed_another_run(work, straight):
    train(work, "name=other", "seed=1", "steps=2")
    assert lines(work, "other", "samples.jsonl")[0] != lines(work, "straight", "samples.jsonl")[0]


@pytest.mark.parametrize("stop", [2, 5])
def test_stopped_and_resumed_equals_never_stopped(work, straight, stop):
    name = f"resumed-{stop}"
    train(work, f"name={name}", f"stop_at={stop}")
    metrics = work / "outputs" / name / "metrics.jsonl"
    with metrics.open("a") as file:  # what a killed run may leave: a line past the checkpoint, and half of another
        file.write(f'{{"step": {stop + 1}, "reward": 99}}\n{{"step": {stop + 2}, "rew')
    train(work, f"name={name}", "resume=true")
    assert timeless(lines(work, name)) == timeless(lines(work, "straight"))
    assert lines(work, name, "samples.jsonl") == lines(work, "straight", "samples.jsonl")


def told(work, name, number, ranks=1, *, words=(), sign=None):
    """Exit statuses and output of a run that gets a signal after its first step, or once the file `sign` is there; of
    several ranks the last one does."""
    env = {**ENV, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    command = [sys.executable, "-m", "grpo.train", *SMALL, "tracking=none", f"name={name}", *words]
    runs = [subprocess.Popen(command, cwd=work, env=env | {"RANK": str(r), "LOCAL_RANK": str(r)}, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for r in range(ranks)]  # fmt: skip
    metrics, end = work / "outputs" / name / "metrics.jsonl", time.monotonic() + 300
    there = sign.exists if sign else lambda: metrics.exists() and metrics.read_text().count("\n") > 1
    while not there() and time.monotonic() < end:
        time.sleep(0.01)
    runs[-1].send_signal(number)
    said = [run.communicate(timeout=300)[0] for run in runs]
    return [run.returncode for run in runs], said[0]


@pytest.mark.parametrize(("number", "ranks"), [(signal.SIGUSR1, 1), (signal.SIGTERM, 2)])
def test_told_to_stop_it_goes_on_to_the_same_end(work, straight, number, ranks):
    """With ranks=2 only the second is told: both stop at the same step, with status 75."""
    name = f"told-{ranks}"
    statuses, said = told(work, name, number, ranks)
    assert statuses == [75] * ranks and f"name={name} resume=true" in said
    left = json.loads((work / "outputs" / name / "checkpoints" / "last.json").read_text())["folder"]
    assert 1 <= int(left.removeprefix("step-")) < 6 and not (work / "outputs" / name / "summary.json").exists()
    if ranks == 1:
        train(work, f"name={name}", "resume=true")
        assert timeless(lines(work, name)) == timeless(lines(work, "straight"))
        assert lines(work, name, "samples.jsonl") == lines(work, "straight", "samples.jsonl")


@pytest.mark.parametrize("when", ["step=3", "evaluation=1"])
def test_told_to_stop_while_it_samples_it_waits_no_longer(work, straight, when):
    name = f"samples-{when.replace('=', '-')}"
    words = ["rollout._target_=tests.grpo.rollout.flaky.Flaky", f"+rollout.mended={work / name}", f"+rollout.{when}",
             "+rollout.hangs=true"]  # fmt: skip
    statuses, said = told(work, name, signal.SIGTERM, words=words, sign=work / name)  # which gives it 300 s, not 600
    assert statuses == [75] and "is not done" not in said
    assert [row["step"] for row in lines(work, name)] == ([0, 1, 2, 3] if when == "step=3" else [0, 1, 2])
    train(work, f"name={name}", *words, "resume=true")
    assert timeless(lines(work, name)) == timeless(lines(work, "straight"))
    assert lines(work, name, "samples.jsonl") == lines(work, "straight", "samples.jsonl")


def test_steps_that_are_not_finite_are_skipped_counted_and_kept(work, straight, monkeypatch):
    done = train(work, "name=nan", "loss.beta=inf", "max_nonfinite=2", ok=False)  # 0 * inf: every loss is no number
    assert "not finite 2 steps in a row" in done.stderr and "--step 2" in done.stderr
    rows = lines(work, "nan")[1:]
    assert [(row["nonfinite_steps"], row["grad_norm"]) for row in rows] == [(1, None), (2, None)]
    kept = [work / "outputs" / "nan" / "rollouts" / f"step-00000{step}" / "adapter" for step in (1, 2)]
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in kept)
    assert before and all(torch.equal(before[name], after[name]) for name in before)  # nothing was learned
    monkeypatch.chdir(work)
    assert replay(["outputs/nan", "--step", "2"]) == 0


def test_a_run_without_a_checkpoint_begins_anew(work):
    """So that one command line can be queued again and again, whatever came of it before."""
    done = train(work, "name=queued", "steps=1", "resume=true")
    assert "has no checkpoint yet: it begins anew" in done.stdout and len(lines(work, "queued")) == 2


def test_resume_with_other_settings_is_refused(work, straight):
    done = train(work, "name=straight", "resume=true", "loss.beta=0.5", ok=False)
    assert "error:" in done.stderr and "loss" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("when", ["step=3", "evaluation=1"])
def test_an_engine_that_gives_up_leaves_a_checkpoint_of_that_moment(work, straight, when):
    # at step 3 before its rollout; at evaluation 1 after the update of step 3, before its line in metrics.jsonl
    name = when.replace("=", "-")
    flaky = ["rollout._target_=tests.grpo.rollout.flaky.Flaky", f"+rollout.mended={work / name}", f"+rollout.{when}"]
    done = train(work, f"name={name}", *flaky, ok=False)
    text = done.stdout + done.stderr
    assert "error: the engine is gone" in text and f"name={name} resume=true" in text and "Traceback" not in text
    assert "checkpoint of step 3" in text
    assert [row["step"] for row in lines(work, name)] == ([0, 1, 2, 3] if when == "step=3" else [0, 1, 2])
    (work / name).touch()
    train(work, f"name={name}", *flaky, "resume=true")
    assert timeless(lines(work, name)) == timeless(lines(work, "straight"))
    assert lines(work, name, "samples.jsonl") == lines(work, "straight", "samples.jsonl")


def test_a_finished_run_is_not_overwritten(work, straight):
    done = train(work, "name=straight", ok=False)
    assert "already holds a run" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("engine", ["zero0", "zero2", "zero3"])
def test_two_ranks_make_the_same_run(work, straight, engine):
    name = f"ranks-{engine}"
    train(work, f"name={name}", f"engine={engine}", "model.lora.dropout=0", "steps=3", ranks=2)
    if not (work / "outputs" / "one-rank").exists():
        train(work, "name=one-rank", "model.lora.dropout=0", "steps=3")
    for a, b in zip(timeless(lines(work, name)), timeless(lines(work, "one-rank")), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], abs=2e-4, rel=1e-3), (a["step"], key)
    assert (
        lines(work, name, "samples.jsonl")[0]["completion"] == lines(work, "one-rank", "samples.jsonl")[0]["completion"]
    )


def test_zero3_on_two_ranks_resumes_bit_for_bit(work):
    common = ["engine=zero3", "model.lora.dropout=0", "steps=3"]
    if not (work / "outputs" / "ranks-zero3" / "summary.json").exists():
        train(work, *common, "name=ranks-zero3", ranks=2)
    train(work, *common, "name=z3-resumed", "stop_at=2", ranks=2)
    train(work, *common, "name=z3-resumed", "resume=true", ranks=2)
    assert timeless(lines(work, "z3-resumed")) == timeless(lines(work, "ranks-zero3"))
    assert lines(work, "z3-resumed", "samples.jsonl") == lines(work, "ranks-zero3", "samples.jsonl")
    ends = [work / "outputs" / n / "checkpoints/step-000003/trainer.safetensors" for n in ("z3-resumed", "ranks-zero3")]
    assert ends[0].read_bytes() == ends[1].read_bytes()


def test_clips_that_cannot_be_read_stop_no_rank_and_move_no_question(work):
    """One to train on turns out silent when its turn comes, and is gone at a resume; so does every held-out clip of
    rank 1, while rank 0 hears its own."""
    made = {}
    for split, count in (("train", 24), ("eval", 8)):
        made[split] = rows = questions(work / "clips", split=split, count=count).questions
        write_manifest(work / f"{split}.jsonl", rows, work)
    late = Sampler(made["train"], 4, 0).batch(2)[0]
    for question in [late, *made["eval"][1::2]]:
        soundfile.write(question.audio, np.zeros_like(soundfile.read(question.audio)[0]), 16000)
    common = [
        "data=manifest",
        f"data.train.path={work}/train.jsonl",
        f"data.eval.path={work}/eval.jsonl",
        "steps=3",
        "data.verify=header",
        "data.max_bad_fraction=0.1",
        "engine=zero3",
        "eval.batch=2",
        "rollout.batch=3",
    ]
    base = [word for word in SMALL if not word.startswith(("data.", "steps", "eval.batch"))]
    train(work, *common, "name=silent", ranks=2, base=base)
    assert [row["quarantined"] for row in lines(work, "silent") if "quarantined" in row] == [0, 0, 1]
    train(work, *common, "name=gone", "stop_at=2", ranks=2, base=base)
    late.audio.unlink()
    train(work, *common, "name=gone", "resume=true", ranks=2, base=base)
    assert timeless(lines(work, "gone")) == timeless(lines(work, "silent"))
    assert lines(work, "gone", "samples.jsonl") == lines(work, "silent", "samples.jsonl")


MOVES = [(("zero0", 1), ("zero3", 2)), (("zero3", 2), ("zero2", 1))]
if ranks := int(os.environ.get("GRPO_TEST_RANKS", 0)):
    MOVES += [(("zero2", 2), ("zero3", ranks)), (("zero3_offload", ranks), ("zero0", 2))]


@pytest.mark.parametrize(("before", "after"), MOVES)
def test_resume_on_other_ranks_and_another_stage(work, before, after):
    name = f"moved-to-{after[0]}-{after[1]}"
    common = [f"name={name}", "model.lora.dropout=0", "steps=3"]
    train(work, *common, f"engine={before[0]}", "stop_at=2", ranks=before[1])
    train(work, *common, f"engine={after[0]}", "resume=true", ranks=after[1])
    if not (work / "outputs" / "one-rank").exists():
        train(work, "name=one-rank", "model.lora.dropout=0", "steps=3")
    for a, b in zip(timeless(lines(work, name)), timeless(lines(work, "one-rank")), strict=True):
        for key in a:
            assert a[key] == pytest.approx(b[key], abs=2e-4, rel=1e-3), (a["step"], key)


LAB = ["loss=entropy_adaptive", "loss.beta=0.1", "loss.entropy.target=10", "loss.entropy.delta=0.01",
       "advantage=batch_std", "reference_every=2", "dynamic_sampling.rounds=2", "save_rollouts=2",
       "model.lora.dropout=0"]  # fmt: skip


@pytest.fixture(scope="module")
def lab(work):
    train(work, "name=lab", *LAB)
    return lines(work, "lab")


def test_a_renewed_reference_dynamic_sampling_and_a_bonus_with_memory(work, lab):
    kl, rounds, bonus = ([row[name] for row in lab[1:]] for name in ("kl", "dynamic_sampling/rounds",
                                                                     "entropy_coefficient"))  # fmt: skip
    # the metrics are those of the first update: KL is 0 in the first step and in each after a renewal
    assert [abs(k) < 1e-7 for k in kl] == [True, False] * 3
    assert max(rounds) > 1 and sorted(bonus) == bonus and bonus[0] < bonus[-1]
    assert json.loads((work / "outputs" / "lab" / "summary.json").read_text())["completions"] == sum(rounds) * 16
    samples = lines(work, "lab", "samples.jsonl")
    assert len(samples) == 6 * 16 and [key for row in lab for key in row if key != "step" and not documented(key)] == []
    kept = sorted(p.name for p in (work / "outputs" / "lab" / "rollouts").iterdir())
    assert kept == ["step-000002", "step-000004", "step-000006"]


def test_a_step_of_it_is_made_again_from_its_record(work, lab, capsys, monkeypatch):
    monkeypatch.chdir(work)
    assert replay(["outputs/lab", "--step", "4"]) == 0
    said = capsys.readouterr().out
    row = next(r for r in lines(work, "lab", "samples.jsonl") if r["step"] == 4)
    assert row["question"] in said and f"(right: {row['gold']})" in said and row["audio"] in said
    assert "0 completions differ" in said and said.count("the same") == 5


def test_all_of_it_survives_a_stop(work, lab):
    # after step 3 the reference is that of step 2 and the bonus has moved
    train(work, "name=lab-resumed", *LAB, "stop_at=3")
    train(work, "name=lab-resumed", *LAB, "resume=true")
    assert timeless(lines(work, "lab-resumed")) == timeless(lab)
    assert lines(work, "lab-resumed", "samples.jsonl") == lines(work, "lab", "samples.jsonl")


def test_all_of_it_is_the_same_on_two_ranks_under_zero3(work, lab):
    train(work, "name=lab-ranks", *LAB, "engine=zero3", "stop_at=4", ranks=2)
    for a, b in zip(timeless(lines(work, "lab-ranks")), timeless(lab[:5]), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], abs=2e-4, rel=1e-3), (a["step"], key)
    assert [r["id"] for r in lines(work, "lab-ranks", "samples.jsonl")] == [
        r["id"] for r in lines(work, "lab", "samples.jsonl")[: 4 * 16]
    ]


def test_a_multirun_ends_in_a_report_and_runs_only_what_is_missing(work):
    words, base = ["name=many", "steps=2", "loss=grpo,dr_grpo"], ["-m", *SMALL]
    done = train(work, *words, "micro_tokens=400,0", ok=False, base=base)
    folder = work / "multirun" / "many"
    assert "4 runs, 2 failed" in done.stdout and "micro_tokens must be at least 1" in done.stdout
    assert (folder / "report.html").exists()
    ran = {p: p.stat().st_mtime_ns for p in folder.glob("*/metrics.jsonl")}
    assert len(ran) == 2
    # paired by design: at the first step all arms answer the same questions with the same words
    one, two = (map(json.loads, (p.parent / "samples.jsonl").read_text().splitlines()[:16]) for p in ran)
    assert [(r["id"], r["completion"]) for r in one] == [(r["id"], r["completion"]) for r in two]
    train(work, *words, "micro_tokens=400,800", "resume=true", ok=False, base=base)  # the old failures are still there
    assert {p: p.stat().st_mtime_ns for p in ran} == ran and len(list(folder.glob("*/metrics.jsonl"))) == 4


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["stepz=3"], ["error: stepz: there is no such key; did you mean 'steps'?"]),
        (["+stepz=3"], ["error: stepz: there is no such key; did you mean 'steps'?"]),
        (["model=tinny"], ["error: model=tinny: there is no such choice; model can be ", "tiny"]),
        (["name=a/b"], ["error: name=a/b", "without slashes"]),
        (["encoded=-1"], ["error: encoded must be at least 0"]),
        (["data.train.kinds=99"], ["error: data: data.train: kinds=99, but there are 14"]),
        (["model.tiny.build.hidden=100"], ["error: model.tiny.build.hidden must be a multiple of 32"]),
        (["loss.beta=abc"], ["loss.beta must be float"]),
        (["steps=abc"], ["steps must be int"]),
        (["data=manifest", "data.train.path=nowhere.jsonl", "data.eval.path=nowhere.jsonl"], ["nowhere.jsonl"]),
        (["micro_tokens=0"], ["error: micro_tokens must be at least 1, or null, got 0"]),
        (["dynamic_sampling.rounds=0"], ["error: dynamic_sampling.rounds must be at least 1, got 0"]),
        (["dynamic_sampling.rounds=99"], ["rounds=99 x questions=4", "only 64 training questions"]),
        (["dynamic_sampling.by=acc"], ["dynamic_sampling.by=acc", "accuracy, format, length"]),
        (["dynamic_sampling.rounds=2", "rollout.lag=1"], ["dynamic_sampling", "rollout.lag=1"]),
        (["reference_every=5", "loss.beta=0"], ["reference_every=5", "no KL term"]),
    ],
)
def test_mistakes_are_one_clear_line(work, overrides, words):
    done = train(work, *overrides, ok=False, base=[] if "data=manifest" in overrides else SMALL)
    text = done.stdout + done.stderr
    assert all(word in text for word in words) and "Traceback" not in text, text


def test_help_reads_well(work):
    done = train(work, "--help")
    for word in ("steps", "seed", "experiment=", "data.audio", "resume=true", "audsemthinker_qa_grpo", "zero3"):
        assert word in done.stdout, word


def test_dry_run_of_the_published_experiment(work):
    done = train(work, "experiment=audsemthinker_qa_grpo", "dry_run=true", "generations=3", "max_tokens=40", base=[])
    assert "dry run   passed" in done.stdout and "25 words" in done.stdout and "NOT HERE" in done.stdout
