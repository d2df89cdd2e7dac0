"""Fine-tuning by example: what is taught, that its loss is the whole step's mean, resuming, and where GRPO goes on."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import soundfile
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from data import manifest
from grpo.config import ConfigError, RunError, run_name
from grpo.display import Display
from grpo.sft import Fine, Taught, target
from rewards.format import format
from tests.conftest import make_clip, make_question

SPEC = {"tags": ["think", "semantic_elements", "answer"], "letters": True, "missing": None}
TEXTS = {"thinking": "It barks.", "semantic_elements": "dog"}
if not OmegaConf.has_resolver("run_name"):
    OmegaConf.register_new_resolver("run_name", run_name)


def test_what_is_taught():
    q = make_question("q", **TEXTS)
    text = target(q, **SPEC)
    assert text == "<think>It barks.</think>\n<semantic_elements>dog</semantic_elements>\n<answer>B. rain</answer>"
    assert format(text) == 1.0
    assert target(q, **SPEC | {"letters": False}).endswith("<answer>rain</answer>")
    bare = make_question("q", thinking=" ", semantic_elements="dog")
    assert target(bare, **SPEC) is None
    assert target(bare, **SPEC | {"tags": ["answer"]}) == "<answer>B. rain</answer>"
    assert "<think>x</think>" in target(bare, **SPEC | {"missing": {"think": "x"}})


def test_rows_without_a_target_are_counted_and_too_many_refused(policy):
    odd = {1: {}, 2: TEXTS | {"thinking": "so " * 400}}
    questions = [make_question(f"q{i}", **odd.get(i, TEXTS)) for i in range(4)]
    taught = Taught(questions, policy, max_tokens=200, max_bad_fraction=0.5, **SPEC)
    assert [q.id for q in taught.questions] == ["q0", "q3"] and sum(taught.left_out.values()) == 2
    ids = taught.ids(questions[0])
    assert ids[-1] in policy.stop_ids and policy.decode(ids) == target(questions[0], **SPEC)
    turned = questions[0].shuffled(0, 1)
    assert turned.answer != 1 and "<answer>B. rain" not in policy.decode(taught.ids(turned))  # the letter that is shown
    with pytest.raises(ConfigError, match=r"2 of 4 training questions have no target .*longer than max_tokens"):
        Taught(questions, policy, max_tokens=200, max_bad_fraction=0.4, **SPEC)
    special = [make_question(f"q{i}", **TEXTS | {"thinking": "<|im_start|>"}) for i in range(4)]
    with pytest.raises(ConfigError, match="holds a special token"):
        Taught(special, policy, max_tokens=200, max_bad_fraction=0.4, **SPEC)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    root = tmp_path_factory.mktemp("rows")
    questions = []
    for i in range(10):
        clip = make_clip(i)
        soundfile.write(root / f"{i}.wav", clip.samples, clip.hz)
        questions.append(make_question(f"q{i}", audio=root / f"{i}.wav", answer=i % 4, **TEXTS))
    for name, part in (("train", questions[:8]), ("held", questions[8:])):
        manifest.write(root / f"{name}.jsonl", part, root)
    return root


def fine(checkpoint, rows, folder, *words):
    with initialize_config_module("conf", version_base="1.3"):
        cfg = compose("sft", [
            f"model.path={checkpoint}", "data=manifest", f"data.train.path={rows}/train.jsonl",
            f"data.eval.path={rows}/held.jsonl", "questions=4", "micro_tokens=150", "max_tokens=100", "tracking=none",
            "target.missing=null", "optim.schedule.lr=0.01", "epochs=3", "eval.every=3", *words,
        ])  # fmt: skip
    del cfg.name, cfg.cache
    OmegaConf.resolve(cfg)
    folder.mkdir(exist_ok=True)
    return Fine(cfg, folder, Display())


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "step_time"} for row in rows]


def test_a_run_learns_and_resumes_to_the_same(checkpoint, rows, tmp_path):
    summary = fine(checkpoint, rows, tmp_path / "a").train()
    whole = metrics(tmp_path / "a")
    assert summary["steps"] == 6 and [r["step"] for r in whole] == list(range(7))  # 3 epochs of 8 questions, 4 a step
    assert whole[-1]["loss"] < 0.8 * whole[1]["loss"] and whole[-1]["epoch"] == 3
    fine(checkpoint, rows, tmp_path / "b", "stop_at=2").train()
    fine(checkpoint, rows, tmp_path / "b", "resume=true").train()
    assert metrics(tmp_path / "b") == whole
    with pytest.raises(ConfigError, match="resume=true, but questions differ"):
        fine(checkpoint, rows, tmp_path / "b", "resume=true", "questions=2").train()
    with pytest.raises(ConfigError, match="already holds a run"):
        fine(checkpoint, rows, tmp_path / "b").train()

    # grpo.export takes it like any run, and what GRPO then starts from is what was taught
    from grpo.export import export
    from grpo.load import find, open_policy, prompt_of
    from grpo.predict import predict
    from grpo.rollout import Sampling
    from grpo.rollout.hf import HFRollout

    found = find(tmp_path / "a", "last")
    assert (found.step, found.max_tokens) == (6, 100)
    export(found, tmp_path / "out", prompt=prompt_of(found))
    again = fine(tmp_path / "out", rows, tmp_path / "c")
    asked, sampling = again.heldout, Sampling(40, greedy=True)
    tuned = HFRollout(open_policy(found, prompt_of(found)))
    said = [a.text for a in predict(asked, again.encode, tuned, sampling=sampling)]
    assert said == [a.text for a in predict(asked, again.encode, again.rollout, sampling=sampling)]


def test_the_gradient_does_not_depend_on_micro_batches(checkpoint, rows, tmp_path):
    def gradients(budget):
        run = fine(checkpoint, rows, tmp_path / str(budget), f"micro_tokens={budget}")
        kept = {}

        def keep(rate):
            kept.update(run.engine.gradients())
            return 0.0

        run.engine.step = keep
        loss = run.step(0)["loss"]
        return loss, kept

    (one, first), (whole, second) = gradients(1), gradients("null")
    assert one == pytest.approx(whole, abs=1e-6) and first.keys() == second.keys()
    assert any(g.abs().max() > 1e-4 for g in first.values())
    for name in first:
        assert torch.allclose(first[name], second[name], atol=1e-6), name


def test_what_an_update_can_fail_by_is_one_line(checkpoint, rows, tmp_path, monkeypatch):
    run = fine(checkpoint, rows, tmp_path / "c", "micro_tokens=null")

    def fails(error):
        def backward(*args, **kwargs):
            raise error

        monkeypatch.setattr(run.engine, "backward", backward)
        run.step(0)

    with pytest.raises(
        RunError, match=r"rank 0 ran out of memory in step 1 \(micro_tokens=null\): .*micro_tokens=\d+$"
    ):
        fails(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RunError, match=r"step 1: the gradient norm is nan.*resume=true"):
        fails(FloatingPointError("the gradient norm is nan: the step was not taken"))
    with pytest.raises(RuntimeError, match="expected scalar type"):
        fails(RuntimeError("expected scalar type Float"))


def test_a_clip_that_cannot_be_read_gives_its_place_away(checkpoint, rows, tmp_path):
    run = fine(checkpoint, rows, tmp_path / "d", "data.max_bad_fraction=0.2")
    broken = run.sampler.batch(0)[1]
    moved = replace(broken, audio=tmp_path / "gone.wav")
    run.sampler.questions = [moved if q.id == broken.id else q for q in run.sampler.questions]
    groups = run._groups(0)
    assert len(groups) == 4 and broken.id not in {g.prompt.id for g in groups}
    assert run.quarantined == {broken.id: "missing"}
    more = [q.id for q in run.taught.questions if q.id != broken.id][:2]
    run.engine = SimpleNamespace(gather=lambda items: [(name, "missing", "gone") for name in more])
    with pytest.raises(RuntimeError, match="more than data"):
        run._groups(0)
