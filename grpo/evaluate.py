"""Ask a model the questions of benchmarks: `python -m grpo.evaluate model=... bench=mmau_mini,mmar`. See `--help`.

evaluations/NAME/evaluation.json           model, prompt, decoding, versions: what the numbers depend on
                 metrics.json, table.md    both rules, intervals, groups, states, probes, McNemar
                 BENCH/predictions.jsonl   a line an item, always (BENCH/silent.jsonl, ... of the probes)
                 BENCH/submission.*        the official file, of a manifest that data.prepare made
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from grpo.train import guard_packages

TYPES = {
    "weights": str, "checkpoint": str | int, "processor": str | None, "base": bool, "dtype": str | None,
    "attention": str, "think_words": int | None, "max_tokens": int | None, "temperature": float,
    "seed": int, "batch": int, "limit": int | None, "permutations": int, "against": str | None, "resume": bool,
    "name": str | None,
}  # fmt: skip


def evaluate(cfg: DictConfig, folder: Path, display) -> dict:
    """One evaluation from a composed conf/evaluate.yaml. Returns what metrics.json holds.

    Raises ConfigError for a mistake in the configuration, RolloutError where the engine cannot answer.
    """
    from grpo.benchmark import benchmarks
    from grpo.checkpoint import write_json
    from grpo.config import ConfigError, build
    from grpo.load import find, prompt_of
    from grpo.probes import PROBES, plain, variants
    from grpo.scores import permuted, summary, table

    _check(cfg)
    benches = benchmarks(cfg.get("bench"))
    if not benches:
        raise ConfigError("bench=NAME[,NAME...] must name at least one of conf/bench")
    if odd := [p for p in cfg.probes if p not in PROBES]:
        raise ConfigError(f"probes: {odd[0]!r} is not one of {', '.join(PROBES)}")
    found = find(cfg.weights, cfg.checkpoint, cfg.processor)
    prompt = build(cfg.prompt, "prompt") if cfg.get("prompt") else prompt_of(found, words=cfg.think_words)
    others = {b.name: _against(cfg.against, b.name) for b in benches}
    asker = Asker(cfg, found, prompt, benches[0], display)
    try:
        settings = asker.settings(benches)
        _begin(folder, settings, cfg.resume)
        results = {}
        for bench in benches:
            questions, clip = asker.slice(bench.questions), bench.clip
            asked = plain(questions, clip)
            rows = asker.ask(bench, asked, folder / bench.name)
            figures = {"note": _note(bench, cfg.limit), **summary(rows), "probes": {}, "against": {}}
            for probe in cfg.probes:
                runs = [asker.ask(bench, v, folder / bench.name) for v in
                        variants(probe, questions, clip, seed=cfg.seed, permutations=cfg.permutations)]  # fmt: skip
                figures["probes"][probe] = permuted([rows, *runs]) if probe == "permuted" else summary(runs[0])
            figures["against"] = _compare(rows, others[bench.name])
            if cfg.limit is None:
                submit(folder / bench.name, questions, rows)
            results[bench.name] = figures
    finally:
        asker.close()
    metrics = {"settings": settings, "benches": results}
    write_json(folder / "metrics.json", metrics)
    text = "\n".join(line for name, figures in results.items() for line in table(name, figures))
    (folder / "table.md").write_text(f"# {settings['model']}\n\n{text}", encoding="utf-8")
    display.say(f"{text}\nwritten   {folder}: metrics.json table.md */predictions.jsonl")
    return metrics


class Asker:
    """A model behind a rollout engine, and the settings that its answers depend on."""

    def __init__(self, cfg: DictConfig, found, prompt, bench, display):
        from grpo.config import build, engine_keys
        from grpo.load import open_policy
        from grpo.onerank import OneRank
        from grpo.rollout import Sampling

        self.cfg, self.found, self.display = cfg, found, display
        greedy = cfg.temperature == 0
        self.policy = open_policy(found, prompt, dtype=cfg.dtype, attention=cfg.attention, lora=not cfg.base,
                                  temperature=1.0 if greedy else cfg.temperature)  # fmt: skip
        self.sampling = Sampling(cfg.max_tokens or found.max_tokens or 512, seed=cfg.seed, greedy=greedy)
        adapted = hasattr(self.policy.model, "peft_config")
        engine = engine_keys(cfg.rollout)
        if hasattr(hydra.utils.get_object(engine._target_), "every_rank"):  # an engine with weights of its own
            refuse_bare(found.base)
            if not adapted:
                engine.adapters = False
        self.rollout = build(engine, "rollout", policy=self.policy)
        try:
            if adapted and hasattr(self.rollout, "every_rank"):
                sync = build(cfg.sync, "sync", policy=self.policy, engine=OneRank(self.policy), rollout=self.rollout)
                sync.push(1)
                first = [self.policy.encode(q, bench.clip(q)) for q in bench.questions[:1]]
                sync.probe(self.rollout.generate(first, 1, Sampling(16, greedy=True)))  # does it hold the adapter?
        except BaseException:
            self.rollout.close()
            raise

    def close(self) -> None:
        self.rollout.close()

    def slice(self, questions: Sequence) -> list:
        from grpo.predict import spread

        return spread(questions, self.cfg.limit)

    def settings(self, benches: Sequence) -> dict:
        """All that the numbers depend on, and what made them."""
        from importlib.metadata import version

        from grpo.predict import prompt_hash

        cfg, s = self.cfg, self.sampling
        return self.found.identity | {
            "adapter_on": hasattr(self.policy.model, "peft_config"), "prompt_hash": prompt_hash(self.policy),
            "think_words": cfg.think_words if cfg.think_words is not None else (self.found.prompt or {}).get("words"),
            "decoding": {"greedy": s.greedy, "temperature": float(cfg.temperature), "max_tokens": s.max_tokens,
                         "top_p": 1.0, "top_k": 0, "beams": 1, "seed": cfg.seed},
            "dtype": str(self.policy.thinker.dtype).removeprefix("torch."), "attention": cfg.attention,
            "engine": type(self.rollout).__name__, "limit": cfg.limit, "permutations": cfg.permutations,
            "benches": {b.name: {"manifest": str(b.path), "sha256": b.sha256, "rule": b.rule} for b in benches},
            "versions": {n: version(n) for n in ("torch", "transformers", "peft")},
        }  # fmt: skip

    def ask(self, bench, variant, folder: Path) -> list[dict]:
        """The rows of one way of asking, in the benchmark's order. Rows that are on disk already are kept."""
        from grpo.predict import predict

        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{variant.name}.jsonl"
        done = keep_whole(path)
        orders = {q.id: list(o) for q, o in zip(variant.questions, variant.orders, strict=True)}
        todo = [q for q in variant.questions if q.id not in done]
        if variant.name == "always_a":
            answers: Iterator = (_first(q) for q in todo)
        else:

            def encode(question):
                return self.policy.encode(question, variant.clip(question))

            answers = predict(todo, encode, self.rollout, sampling=self.sampling, batch=self.cfg.batch)
        self.display.start(f"{bench.name} {variant.name}", len(variant.questions), len(done))
        right = sum(bool(row["strict"]) for row in done.values())
        with path.open("a", encoding="utf-8") as file:
            for answer in answers:
                row = done[answer.question.id] = row_of(bench, answer, orders[answer.question.id])
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
                right += row["strict"]
                self.display.update(len(done), {"strict": right / len(done)})
        self.display.stop()
        rows = [done[q.id] for q in variant.questions]
        if self.cfg.limit is None:
            rows += bad_rows(bench)
        write_lines(path, rows)
        return rows


def row_of(bench, answer, order: Sequence[int]) -> dict:
    """A line of predictions.jsonl. `chosen` and `gold` count in the manifest's order, the letters in the shown one."""
    from data.scoring import official

    q = answer.question
    text, hidden = official_text(answer, bench.rule), q.answer is None  # kept by the benchmark to itself
    return {
        "id": q.id, "bench": bench.name, "audio": str(q.audio), "start": q.start, "end": q.end,
        "clip_sha256": answer.clip_sha256, "question": q.question, "choices": list(q.choices), "order": list(order),
        "completion": answer.text, "think": answer.think, "semantic_elements": answer.semantic_elements,
        "answer": answer.answer, "prediction": text, "state": answer.state,
        "chosen": None if answer.choice is None else order[answer.choice],
        "letter": None if answer.choice is None else ascii_uppercase[answer.choice],
        "gold": None if hidden else order[q.answer], "gold_letter": None if hidden else ascii_uppercase[q.answer],
        "strict": answer.right,
        "official": not hidden and official(text, q.choices, q.answer, bench.rule),
        "official_verbatim": not hidden and official(answer.answer or "", q.choices, q.answer, bench.rule),
        "hidden": hidden,
        "tokens": answer.tokens, "prompt_tokens": answer.prompt_tokens, "truncated": answer.truncated,
        "problem": answer.problem, "meta": facts(q),
    }  # fmt: skip


def facts(question) -> dict:
    """What a benchmark says of an item beside the question: its groups, and its own `meta`."""
    said = {"task": question.task, "source": question.source, "difficulty": question.difficulty,
            "category": question.category, "sub-category": question.subcategory}  # fmt: skip
    meta = {k: v for k, v in (question.meta or {}).items() if k != "row"}  # as published: in the manifest already
    return meta | {k: v for k, v in said.items() if v is not None}


def official_text(answer, rule: str) -> str:
    """What the official scorer is given: the chosen option's bare text, or its letter where the rule reads letters."""
    from data.scoring import LETTERED

    if rule in LETTERED and answer.choice is not None:
        return ascii_uppercase[answer.choice]
    return answer.bare


def submit(folder: Path, questions: Sequence, rows: Sequence[Mapping]) -> Path | None:
    """Write the official file where the manifest keeps each published row (`meta.row`, by data.prepare); else None."""
    from data.submission import FORMATS, Prediction, write

    names = {q.benchmark for q in questions}
    name = next(iter(names), None)
    if len(names) != 1 or name not in FORMATS or not all("row" in (q.meta or {}) for q in questions):
        return None
    asked = {q.id for q in questions}
    said = {row["id"]: Prediction(row["chosen"], row["answer"] or "", row["think"] or "") for row in rows
            if row["id"] in asked}  # fmt: skip
    path = folder / f"submission.{FORMATS[name].kind}"
    write(path, questions, said)
    return path


def refuse_bare(base: str) -> None:
    """Raise ConfigError for a checkpoint that vLLM does not load: a Thinker without the full model's config."""
    from grpo.config import ConfigError

    config = Path(base) / "config.json"
    if config.exists() and json.loads(config.read_text()).get("model_type") == "qwen2_5_omni_thinker":
        raise ConfigError(f"{base} is a bare Thinker, which vLLM does not load: `python -m grpo.export {base} OUT` "
                          f"writes it in the full layout")  # fmt: skip


def keep_whole(path: Path) -> dict[str, dict]:
    """The whole lines of a file of predictions by id; the last is taken away where a kill cut it off.

    Raises ConfigError, and leaves the file as it is, where it holds anything else.
    """
    from grpo.config import ConfigError

    if not path.exists():
        return {}
    *whole, _ = path.read_bytes().split(b"\n")
    rows = [_line(raw) for raw in whole]
    if None in rows:
        raise ConfigError(f"line {rows.index(None) + 1} of {path} is no prediction: another file, or a damaged one; "
                          f"give another name, or move it away")  # fmt: skip
    kept = {row["id"]: row for row in rows if row["state"] != "bad row"}
    write_lines(path, kept.values())
    return kept


def _line(raw: bytes) -> dict | None:
    """A line of a file of predictions; None if it is something else."""
    try:
        row = json.loads(raw)
    except (ValueError, RecursionError):  # ValueError: half a character too
        return None
    return row if isinstance(row, dict) and {"id", "state"} <= row.keys() else None


def write_lines(path: Path, rows) -> None:
    """JSON lines under a temporary name, then renamed."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(temporary, path)


def _first(question):
    from grpo.predict import Answer

    return Answer(question, "ok", 0, answer=question.choices[0])


def bad_rows(bench) -> list[dict]:
    """The rows that could not be asked, as wrong answers. Each under an id of its own: theirs may be the fault."""
    taken = Counter([q.id for q in bench.questions] + [p.id for p in bench.problems])
    return [_bad_row(bench, p, p.id if p.id and taken[p.id] == 1 else f"line {p.line}") for p in bench.problems]


def _bad_row(bench, problem, name: str) -> dict:
    empty = dict.fromkeys(("audio", "start", "end", "question", "think", "semantic_elements", "answer", "chosen",
                           "letter", "gold", "gold_letter"))  # fmt: skip
    return empty | {
        "id": name, "bench": bench.name, "clip_sha256": "", "choices": [], "order": [],
        "completion": "", "prediction": "", "state": "bad row", "strict": False, "official": False,
        "official_verbatim": False, "tokens": 0, "prompt_tokens": 0, "truncated": False, "hidden": False,
        "problem": f"{problem.file}:{problem.line} {problem.reason}: {problem.message}", "meta": {},
    }  # fmt: skip


def _note(bench, limit: int | None) -> str:
    asked = len(bench.questions) + len(bench.problems)
    some = min(limit or asked, len(bench.questions))
    parts = [f"A slice of {some} of {asked} items: not the benchmark's number."] if limit else []
    if bench.items and asked != bench.items:
        parts.append(f"The manifest has {asked} items, the official release {bench.items}.")
    if hidden := sum(q.answer is None for q in bench.questions):
        parts.append(f"{hidden} answers are withheld by the benchmark: predicted, not scored.")
    if bench.problems:
        counted = "are not in the slice" if limit else "count as wrong"
        parts.append(f"{len(bench.problems)} rows could not be used; they {counted}.")
    return " ".join([*parts, f"Manifest {bench.sha256[:12]}, official rule {bench.rule}."])


def _against(folder: str | None, bench: str) -> list[dict] | None:
    """The other run's rows of the same benchmark. Raises ConfigError where it has none."""
    from grpo.config import ConfigError

    if folder is None:
        return None
    path = Path(folder) / bench / "predictions.jsonl"
    if not path.exists():
        raise ConfigError(f"against={folder}: {path} does not exist")
    rows = [_line(raw) for raw in path.read_bytes().split(b"\n") if raw]
    if None in rows:
        raise ConfigError(f"against={folder}: line {rows.index(None) + 1} of {path} is no prediction: let that run end")
    return rows


def _compare(rows: Sequence[Mapping], other: Sequence[Mapping] | None) -> dict:
    from grpo.scores import paired

    return {} if other is None else {rule: paired(rows, other, rule) for rule in ("strict", "official")}


def _begin(folder: Path, settings: dict, resume: bool) -> None:
    """Write evaluation.json; refuse to mix answers of other settings. Raises ConfigError."""
    from grpo.checkpoint import write_json
    from grpo.config import ConfigError

    path = folder / "evaluation.json"
    if path.exists():
        if not resume:
            raise ConfigError(f"{folder} already holds an evaluation: choose another name=, or continue it with "
                              f"resume=true")  # fmt: skip
        before = json.loads(path.read_text())
        if odd := sorted(
            k for k in settings if k != "versions" and before.get(k) != json.loads(json.dumps(settings[k]))
        ):
            raise ConfigError(f"resume=true, but {', '.join(odd)} differ from {path}: give the same words as before, "
                              f"or another name=")  # fmt: skip
    write_json(path, settings)


def _check(cfg: DictConfig) -> None:
    from grpo.config import ConfigError, check_targets, check_type

    if cfg.weights is None:
        raise ConfigError("model=... must name a model: outputs/NAME of a run, an export, a checkpoint or a hub name")
    check_targets(cfg)
    for key, hint in TYPES.items():
        check_type(key, cfg[key], hint)
    for key, least in {"batch": 1, "permutations": 1, "limit": 1, "max_tokens": 1, "temperature": 0}.items():
        if cfg[key] is not None and cfg[key] < least:
            raise ConfigError(f"{key} must be at least {least}, got {cfg[key]}")


def lists(words: Sequence[str]) -> list[str]:
    """`bench=a,b` as `bench=[a,b]`: benchmarks are asked together, where Hydra would take commas for a sweep.

    And `model=` as `weights=`: for Hydra `model` is the group of conf/model, which says what to train.
    """
    words = [f"bench=[{w[6:]}]" if w.startswith("bench=") and not w.startswith("bench=[") else w for w in words]
    return [f"weights={w[6:]}" if w.startswith("model=") else w for w in words]


def evaluation_name(name: str | None) -> str:
    """The folder's name: as given, else the time of day."""
    return str(name) if name else time.strftime("%Y-%m-%d_%H-%M-%S")


@hydra.main(config_path="pkg://conf", config_name="evaluate", version_base="1.3")
def run(cfg: DictConfig) -> float | None:
    from grpo.config import ConfigError
    from grpo.display import Display
    from grpo.rollout import RolloutError
    from grpo.sync.names import SyncError

    display = Display(0, cfg.log.every)
    try:
        OmegaConf.resolve(cfg)
        metrics = evaluate(cfg, Path(HydraConfig.get().runtime.output_dir), display)
    except (ConfigError, RolloutError, SyncError) as error:
        display.stop()
        if HydraConfig.get().mode.name == "MULTIRUN":
            raise
        sys.exit(f"error: {error}")
    shares = [figures["total"]["strict"]["accuracy"] for figures in metrics["benches"].values()]
    return sum(shares) / len(shares)


def main(call: Callable = run) -> None:
    from grpo.config import one_line_errors

    guard_packages()
    OmegaConf.register_new_resolver("evaluation_name", evaluation_name)
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    sys.argv[1:] = lists(sys.argv[1:])
    with one_line_errors("evaluate"):
        call()


if __name__ == "__main__":
    main()
