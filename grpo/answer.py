"""Ask a model about sounds: `python -m grpo.answer clip.wav "What is heard?" --choices Speech Music Rain Silence`.

Prints the thought, the semantic elements, the answer and the option that it names; --json one JSON object instead; with
--manifest every row of a manifest, a line each into --out, going on where an interrupted run stopped.

A clip longer than the model's window (300 s for Qwen2.5-Omni) is cut into equal parts that fit. Each is asked alone and
the option named by most parts is the answer (the earliest of those that tie); all parts are shown. Nothing is cut off.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from string import ascii_uppercase

from data.audio import ClipError, check_header, load
from data.manifest import read as read_manifest
from data.question import Question
from grpo.config import ConfigError
from grpo.evaluate import keep_whole
from grpo.load import find, newest_run, open_policy, prompt_of
from grpo.predict import Answer, predict, prompt_hash
from grpo.rollout import Sampling

MIN_SECONDS = 0.03  # below, Qwen2.5-Omni gets no audio token
LONGEST = 4 * 3600  # seconds of a clip; more is a mistake rather than a recording


class Listener:
    """A model that answers, greedily, with its own prompt. `window`: seconds that it hears at once."""

    def __init__(self, policy, *, max_tokens: int, name: str, window: float | None = None, batch: int = 8):
        from grpo.rollout.hf import HFRollout

        self.policy, self.name, self.batch = policy, name, batch
        self.rollout, self.sampling = HFRollout(policy), Sampling(max_tokens, greedy=True)
        self.window = float(window or policy.processor.feature_extractor.chunk_length)
        self.prompt_hash = prompt_hash(policy)

    def answers(self, questions: Iterable[Question]) -> Iterator[dict]:
        """A record for each question, in order. What cannot be heard is a record too (state audio error)."""
        waiting: list[tuple[Question, list[Question] | str]] = []
        for question in questions:
            try:
                waiting.append((question, parts(question, self.window)))
            except ClipError as error:
                waiting.append((question, f"{error.reason}: {error}"))
            if sum(len(p) for _, p in waiting if isinstance(p, list)) >= self.batch:
                yield from self._together(waiting)
                waiting = []
        yield from self._together(waiting)

    def _together(self, waiting) -> Iterator[dict]:
        asked = [part for _, found in waiting if isinstance(found, list) for part in found]
        said = iter(predict(asked, self._encode, self.rollout, sampling=self.sampling, batch=self.batch))
        for question, found in waiting:
            if isinstance(found, str):
                heard = [Answer(question, "audio error", problem=found)]
            else:
                heard = [next(said) for _ in found]
            yield record(question, heard) | {"model": self.name, "prompt_hash": self.prompt_hash}

    def _encode(self, part: Question):
        clip = load(
            part.audio,
            span=part.span,
            start=part.start,
            end=part.end,
            min_seconds=MIN_SECONDS,
            max_seconds=self.window + 0.1,
        )
        return self.policy.encode(part, clip)


def listener(model: str | Path, *, checkpoint="best", processor=None, prompt=None, dtype=None, max_tokens=None,
             window=None, batch=8) -> Listener:  # fmt: skip
    """A Listener for whatever `model` names (grpo/load.py). Raises ConfigError."""
    found = find(model, checkpoint, processor)
    policy = open_policy(found, prompt_of(found, prompt), dtype=dtype)
    name = str(model) if found.step is None else f"{model} step {found.step}"
    return Listener(policy, max_tokens=max_tokens or found.max_tokens or 512, name=name, window=window, batch=batch)


def ask(audio: str | Path, text: str, choices: Sequence[str]) -> Question:
    """A question without a known answer. Raises ConfigError for choices that cannot be lettered."""
    choices = tuple(c.strip() for c in choices)
    if not 2 <= len(choices) <= len(ascii_uppercase) or not all(choices):
        raise ConfigError(f"{len(choices)} choices: 2 to 26 are needed, none of them empty")
    if len({c.casefold() for c in choices}) < len(choices):
        raise ConfigError("two choices have the same text")
    if any("\n" in c or "<|" in c for c in choices) or "<|" in text or not text.strip():
        raise ConfigError("the question must not be empty, choices have no line breaks, neither holds chat tokens (<|)")
    return Question(str(audio), Path(audio).resolve(), text, choices, -1)


def parts(question: Question, window: float) -> list[Question]:
    """The question about each part of its clip that fits into `window` seconds: itself where the whole does.

    Raises ClipError where the header already says that the clip cannot be used.
    """
    info = check_header(question.audio, span=question.span, start=question.start, end=question.end,
                        min_seconds=MIN_SECONDS, max_seconds=LONGEST)  # fmt: skip
    first = question.start or 0.0
    last = info.duration if question.end is None else min(question.end, info.duration)
    count = math.ceil((last - first) / window - 1e-6)
    if count <= 1:
        return [question]
    edges = [first + (last - first) * i / count for i in range(count + 1)]
    return [replace(question, id=f"{question.id}@{i}", start=edges[i], end=edges[i + 1]) for i in range(count)]


def record(question: Question, heard: Sequence[Answer]) -> dict:
    """What is printed of one question: of a clip in parts, the option that most parts name."""
    votes = Counter(a.choice for a in heard if a.choice is not None)
    chosen = max(votes, key=votes.__getitem__) if votes else None  # of equals the one named first
    shown = next((a for a in heard if a.choice == chosen and a.state != "audio error"), heard[0])
    row = {
        "id": question.id, "audio": str(question.audio), "start": question.start, "end": question.end,
        "question": question.question, "choices": list(question.choices),
        "think": shown.think, "semantic_elements": shown.semantic_elements, "answer": shown.answer,
        "option": None if chosen is None else question.choices[chosen],
        "letter": None if chosen is None else ascii_uppercase[chosen], "index": chosen,
        "state": shown.state, "completion": shown.text, "tokens": sum(a.tokens for a in heard),
        "problem": shown.problem,
    }  # fmt: skip
    if len(heard) > 1:
        row["parts"] = [{"start": round(a.question.start, 3), "end": round(a.question.end, 3), "state": a.state,
                         "option": None if a.choice is None else question.choices[a.choice], "think": a.think,
                         "semantic_elements": a.semantic_elements, "answer": a.answer, "problem": a.problem}
                        for a in heard]  # fmt: skip
    return row


def show(row: Mapping) -> str:
    """A record for people."""
    lines = [f"think     {row['think'] or '-'}", f"elements  {row['semantic_elements'] or '-'}",
             f"answer    {row['answer'] or '-'}"]  # fmt: skip
    option = f"{row['letter']}. {row['option']}" if row["option"] is not None else f"none ({row['state']})"
    lines.append(f"option    {option}")
    if row["problem"]:
        lines.append(f"problem   {row['problem']}")
    for part in row.get("parts", []):
        lines.append(f"  {part['start']:.0f} to {part['end']:.0f} s: {part['option'] or part['state']}")
    return "\n".join(lines)


def batch(listener: Listener, manifest: Path, out: Path) -> int:
    """Answer every row of a manifest into `out`, a line each; rows that `out` holds already are not asked again.

    Returns the number of rows that have no option. Raises ConfigError for a manifest with bad rows.
    """
    if out.resolve() == manifest.resolve():
        raise ConfigError(f"--out {out} is the manifest itself: give another file")
    try:
        questions = read_manifest(manifest, hidden=True)
    except ValueError as error:  # a file without a row
        raise ConfigError(str(error)) from error
    if questions.problems:
        p = questions.problems[0]
        raise ConfigError(f"{len(questions.problems)} rows of {manifest} are bad, the first: line {p.line} {p.reason}: "
                          f"{p.message}. See all with `python -m data.check {manifest}`")  # fmt: skip
    done = keep_whole(out)
    if odd := {(r.get("model"), r.get("prompt_hash")) for r in done.values()} - {(listener.name, listener.prompt_hash)}:
        raise ConfigError(f"{out} holds answers of {next(iter(odd))[0]}: give another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8") as file:
        for row in listener.answers([q for q in questions if q.id not in done]):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            done[row["id"]] = row
    return sum(done[q.id]["option"] is None for q in questions)


def arguments(parser: argparse.ArgumentParser) -> None:
    """The words that choose a model, shared by answer, demo and serve."""
    parser.add_argument(
        "--model", help="run folder, export, checkpoint or hub name (default: the newest run in outputs/)"
    )
    parser.add_argument("--checkpoint", default="best", help="of a run: best, last or a step (default: best)")
    parser.add_argument("--processor", help="where the processor is, if the model comes without")
    parser.add_argument("--prompt", help="a name of conf/prompt, for a model that does not say its prompt (card)")
    parser.add_argument("--dtype", help="float32 or bfloat16 (default: as trained)")
    parser.add_argument("--max-tokens", type=int, help="length limit of an answer (default: as trained, else 512)")


def chosen(args: argparse.Namespace, window: float | None = None) -> Listener:
    """The Listener that the shared words ask for."""
    model = args.model or newest_run()
    print(f"model     {model}", file=sys.stderr)
    return listener(model, checkpoint=args.checkpoint, processor=args.processor, prompt=args.prompt, dtype=args.dtype,
                    max_tokens=args.max_tokens, window=window)  # fmt: skip


def main(words: list[str] | None = None) -> int:
    """Run the command; returns the exit code: 1 where an answer names no option."""
    parser = argparse.ArgumentParser("python -m grpo.answer", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("audio", nargs="?", help="wav, flac, ogg or mp3")
    parser.add_argument("question", nargs="?")
    parser.add_argument("--choices", nargs="+", metavar="TEXT", help="two to 26 options, without letters")
    parser.add_argument("--manifest", type=Path, help="ask every row of a manifest instead")
    parser.add_argument("--out", type=Path, help="file of JSON lines for --manifest")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--window", type=float, help="seconds heard at once (default: the model's)")
    parser.add_argument("--server", metavar="URL", help="ask a server of `python -m grpo.serve` instead")
    arguments(parser)
    args = parser.parse_args(words)
    for word, value in (("--max-tokens", args.max_tokens), ("--window", args.window)):
        if value is not None and not value > 0:
            parser.error(f"{word} must be above 0, got {value}")
    try:
        if args.manifest:
            if args.audio or args.choices or not args.out or args.server:
                parser.error("--manifest goes with --out and without a clip, choices and --server")
            return int(batch(chosen(args, args.window), args.manifest, args.out) > 0)
        if not (args.audio and args.question and args.choices):
            parser.error("give a clip, a question and --choices, or --manifest and --out")
        question = ask(args.audio, args.question, args.choices)
        if args.server:
            from grpo.serve import ask_server

            row = ask_server(args.server, args.model, question, max_tokens=args.max_tokens)
        else:
            row = next(chosen(args, args.window).answers([question]))
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(row, ensure_ascii=False) if args.json else show(row))
    return int(row["option"] is None)


if __name__ == "__main__":
    sys.exit(main())
