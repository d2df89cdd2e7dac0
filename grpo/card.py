"""The model card of an export, filled from its run: data, settings, scores, limits, licence, a snippet that runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from grpo.config import ConfigError
from grpo.load import Found
from grpo.scores import wilson

SNIPPET = """\
import soundfile, torch, torchaudio
from transformers import Qwen2_5OmniProcessor, Qwen2_5OmniThinkerForConditionalGeneration

MODEL, CLIP = {name!r}, "clip.wav"
QUESTION, CHOICES = "What is heard?", ["Speech", "Music", "Rain", "Silence"]
SYSTEM = {system!r}
INSTRUCTION = {instruction!r}

processor = Qwen2_5OmniProcessor.from_pretrained(MODEL)
model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(MODEL, dtype="auto").eval()
model.to("cuda" if torch.cuda.is_available() else "cpu")

wave, hz = soundfile.read(CLIP, dtype="float32", always_2d=True)
wave = torchaudio.functional.resample(torch.from_numpy(wave.mean(axis=1)), hz, 16000).numpy()
options = {options}
asked = [{{"type": "audio"}}, {{"type": "text", "text": INSTRUCTION + QUESTION + options}}]
chat = [{{"role": "user", "content": asked}}]
if SYSTEM:
    chat = [{{"role": "system", "content": [{{"type": "text", "text": SYSTEM}}]}}, *chat]
prompt = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
inputs = processor(text=prompt, audio=wave, sampling_rate=16000, return_tensors="pt").to(model.device, model.dtype)
ids = model.generate(**inputs, do_sample=False, max_new_tokens={max_tokens})
print(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""
OPTIONS = {
    "lines": r""""\nChoices:\n" + "\n".join(f"{chr(65 + i)}. {text}" for i, text in enumerate(CHOICES))""",
    "inline": r"""" " + " ".join(f"({chr(65 + i)}) {text}" for i, text in enumerate(CHOICES))""",
}


def card(found: Found, said: Mapping, *, name: str, dtype: str, scores: Sequence[Path] = (),
         licence: str | None = None) -> str:  # fmt: skip
    """Markdown with the hub's front matter. `said`: what prompt.json holds. Raises ConfigError for missing scores."""
    run, base = _run(found), found.origin or found.base
    results = [_scores(folder) for folder in scores]
    head = {
        "base_model": base, "library_name": "transformers", "pipeline_tag": "audio-text-to-text",
        "license": licence or "other", "tags": ["audio-question-answering", "grpo", "reasoning"],
    }  # fmt: skip
    prompt = said["prompt"]
    snippet = SNIPPET.format(name=name, system=prompt["system"], instruction=prompt["instruction"],
                             options=OPTIONS[prompt["options"]], max_tokens=said["max_tokens"] or 512)  # fmt: skip
    sections = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {name}",
        f"Answers multiple-choice questions about a sound clip as `<think>…</think> <semantic_elements>…"
        f"</semantic_elements> <answer>…</answer>`. Made from `{base}`"
        + (f" with GRPO ({'whole weights' if found.origin else 'LoRA, merged'}), checkpoint of step {found.step}."
           if found.step else "."),
        f"## Use\n\nNo remote code: the classes are transformers' own.\n\n```python\n{snippet}```",
        "The whole model (`config.json`, full-Omni layout without the talker) loads in transformers and in vLLM, "
        "`adapter/` with peft on the Thinker of the base model, `adapter-vllm/` as a LoRA module of vLLM. "
        f"Weights are {dtype}; prompt hash `{said['prompt_hash']}`.",
        f"## Data\n\n{run['data']}", f"## Training\n\n{run['settings']}",
        "## Scores\n\n" + "\n\n".join([run["scores"], *results]),
        "## Limits\n\n"
        "- It was trained to choose one of the given options: it does so also where none is right.\n"
        "- The thought is not proof of how the answer came about; look at the probes above, where there are any, "
        "for how much the sound matters.\n"
        "- Clips longer than those in training are outside what was measured.\n"
        "- The base model may have seen the questions of public benchmarks.",
        f"## Licence\n\n{licence or 'Not decided by the tool that wrote this card.'} The weights derive from "
        f"`{base}` and from the training data; the terms of both apply.",
    ]  # fmt: skip
    return "\n\n".join(sections) + "\n"


def _run(found: Found) -> dict[str, str]:
    """Data, settings and scores in words, from a run's own files; said to be unknown without a run."""
    if found.run is None:
        unknown = "Not known: this was exported from weights without a run."
        return {"data": unknown, "settings": unknown, "scores": "No scores of a run."}
    config = yaml.safe_load((found.run / "config.yaml").read_text())
    made = _json(found.run / "provenance.json") or {}
    data = made.get("data", {})
    counts = {key: ", ".join(f"{name} ({n})" for name, n in data.get(key, {}).items()) or "not stated"
              for key in ("license", "source")}  # fmt: skip
    lora = config["model"]["lora"]
    lines = [f"{data.get('train', '?')} training and {data.get('eval', '?')} held-out questions, fingerprint "
             f"`{made.get('data_fingerprint')}`, audio: {config['data'].get('audio', 'real')}. Sources: "
             f"{counts['source']}. Licences: {counts['license']}."]  # fmt: skip
    trained = (f"r {lora['r']}, alpha {lora['alpha']}, dropout {lora['dropout']} on `{lora['targets']}`" if lora else
               f"none: weights `{config['model']['full']}` were trained")  # fmt: skip
    settings = {
        "steps": config["steps"], "questions a step": config["questions"], "seed": config["seed"],
        "LoRA": trained,
        "learning rate": config["optim"]["schedule"]["lr"], "dtype": config["model"]["dtype"],
        "longest completion": config["max_tokens"],
    }  # fmt: skip
    if "generations" in config:
        settings |= {"completions a question": config["generations"], "KL weight": config["beta"],
                     "temperature": config["temperature"], "words of thought": config["think_words"],
                     "loss": f"`{config['loss']['_target_']}`"}  # fmt: skip
    versions = ", ".join(f"{k} {v}" for k, v in made.get("versions", {}).items())
    text = "\n".join(f"- {k}: {v}" for k, v in settings.items())
    summary = _json(found.run / "summary.json")
    scored = "The run has no summary: it did not end."
    if summary and "accuracy/final" in summary:
        n = summary["questions/heldout"]
        low, high = wilson(round(summary["accuracy/final"] * n), n)
        scored = (f"Held-out questions of the training data, greedy, n = {n}: {summary['accuracy/start']:.3f} before, "
                  f"{summary['accuracy/final']:.3f} at the end of the run (95 % {low:.3f} to {high:.3f}), best "
                  f"{summary['accuracy/best']:.3f}; chance {summary['accuracy/chance']:.3f}.")  # fmt: skip
    return {"data": "\n".join(lines), "settings": f"{text}\n- versions: {versions}", "scores": scored}


def _scores(folder: Path) -> str:
    table = Path(folder) / "table.md"
    metrics = _json(Path(folder) / "metrics.json")
    if metrics is None or not table.exists():
        raise ConfigError(f"--scores {folder}: no evaluation ended there (metrics.json, table.md)")
    said = metrics["settings"]
    decoding = ", ".join(f"{k} {v}" for k, v in said["decoding"].items())
    body = "\n".join(line.replace("## ", "### ", 1) if line.startswith("## ") else line
                     for line in table.read_text(encoding="utf-8").splitlines()[1:])  # fmt: skip
    return (f"Asked of `{said['model']}` (prompt hash `{said['prompt_hash']}`; {decoding}):\n{body}").strip()


def _json(path: Path) -> dict | None:
    return json.loads(path.read_text()) if path.exists() else None
