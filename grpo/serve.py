"""Serve an export by vLLM's OpenAI-compatible server: `python -m grpo.serve --model OUT`, or `make serve`.

On loopback with a fresh token, which is printed; GRPO_SERVER_TOKEN in the environment chooses it, and --host elsewhere
wants it. Every route is guarded, the ones that change weights are off, sounds are taken as data URIs only (a server
that fetches addresses for strangers reaches what they cannot), and answers are greedy unless a request says otherwise.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import signal
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import soundfile

from data.audio import ClipError, load
from data.question import Clip, Question
from grpo.config import ConfigError
from grpo.load import PROMPT_FILE, find, prompt_of
from grpo.rollout.serve import TOKEN, Launch, Process, ServerError, choose_token

NAME = "policy"  # under which the server knows the model
LONGEST = 8192  # tokens of prompt and answer


def messages(prompt, question: Question, clip: Clip) -> list[dict]:
    """The chat that the trainer would make of a question, as the OpenAI API wants it: the sound as base64 WAV."""
    wav = io.BytesIO()
    soundfile.write(wav, clip.samples, clip.hz, format="WAV", subtype="FLOAT")  # lossless
    sound = f"data:audio/wav;base64,{base64.b64encode(wav.getvalue()).decode()}"
    heard = {"type": "audio_url", "audio_url": {"url": sound}}
    return [
        turn | {"content": [heard if part["type"] == "audio" else part for part in turn["content"]]}
        for turn in prompt.messages(question)
    ]


def request(url: str, body: Mapping, token: str | None, seconds: float = 300) -> dict:
    """POST to /v1/chat/completions. Raises ConfigError with what the server says."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    asked = urllib.request.Request(f"{url.rstrip('/')}/v1/chat/completions", json.dumps(body).encode(), headers)
    try:  # no proxy: the server is near
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(asked, timeout=seconds) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as error:
        said = " ".join(error.read(2000).decode(errors="replace").split())
        hint = f"; is {TOKEN} the token it was started with?" if error.code == 401 else ""
        raise ConfigError(f"{url} answered {error.code}: {said}{hint}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{url} does not answer: {error}") from error


def ask_server(url: str, model: str | Path | None, question: Question, *, max_tokens: int | None = None) -> dict:
    """A record as of grpo.answer, from a server. `model`: the export that it serves, whose prompt is asked with.

    Clips are not cut in parts here: one longer than the model's window is refused.
    """
    from grpo.answer import MIN_SECONDS, record
    from grpo.predict import Answer, read

    if model is None:
        raise ConfigError("--server needs --model as well: the export that is served, for its prompt")
    found = find(model)
    prompt, said = prompt_of(found), json.loads((Path(model) / PROMPT_FILE).read_text())
    try:
        clip = load(question.audio, start=question.start, end=question.end, min_seconds=MIN_SECONDS)
    except ClipError as error:
        return record(question, [Answer(question, "audio error", problem=f"{error.reason}: {error}")])
    body = {"model": NAME, "messages": messages(prompt, question, clip), "temperature": 0,
            "max_tokens": max_tokens or found.max_tokens or 512}  # fmt: skip
    said_by = request(url, body, os.environ.get(TOKEN))
    answer = said_by["choices"][0]
    heard = read(
        question,
        answer["message"]["content"] or "",
        truncated=answer["finish_reason"] == "length",
        tokens=said_by["usage"]["completion_tokens"],
    )
    return record(question, [heard]) | {"model": str(model), "prompt_hash": said["prompt_hash"]}


def launch(folder: Path, *, token: str, host: str = "127.0.0.1", port: int = 8000, dtype: str | None = None,
           max_model_len: int | None = None, max_num_seqs: int = 32, kv_cache_gib: float | None = None,
           gpu_memory: float = 0.9) -> Launch:  # fmt: skip
    """How to start the server of an export. Raises ConfigError for what is no export.

    max_model_len: None for LONGEST, or all that the model has positions for.
    """
    if not (folder / PROMPT_FILE).exists():
        raise ConfigError(f"{folder} is no export (without {PROMPT_FILE}): `python -m grpo.export RUN OUT` writes one")
    config = json.loads((folder / "config.json").read_text())
    positions = config["thinker_config"]["text_config"]["max_position_embeddings"]
    arguments = ("--override-generation-config", '{"temperature":0.0}')
    arguments += ("--allowed-media-domains", "none.invalid")  # data URIs only: no address is ever of this domain
    return Launch(model=str(folder), dtype=dtype or config.get("dtype", "auto"), token=token, host=host, port=port,
                  max_model_len=max_model_len or min(LONGEST, positions), max_num_seqs=max_num_seqs,
                  kv_cache_gib=kv_cache_gib, gpu_memory=gpu_memory, arguments=arguments, rollouts=False)  # fmt: skip


def main(words: list[str] | None = None) -> int:
    """Run the command until it is interrupted; returns the exit code."""
    parser = argparse.ArgumentParser("python -m grpo.serve", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--model", type=Path, required=True, help="an export's folder")
    parser.add_argument("--host", default="127.0.0.1", help=f"another than loopback needs {TOKEN} in the environment")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--dtype", help="default: as stored")
    parser.add_argument("--max-model-len", type=int, help=f"prompt (25 tokens a second of sound) + answer; default: "
                        f"{LONGEST}, or fewer where the model has fewer positions")  # fmt: skip
    parser.add_argument("--kv-cache-gib", type=float, help="memory for keys and values (default: 1 on a CPU)")
    parser.add_argument("--gpu-memory", type=float, default=0.9, help="share of the GPU's memory")
    parser.add_argument("--log", type=Path, help="file for the server's output (default: a temporary one)")
    parser.add_argument("--start-timeout", type=float, default=600)
    args = parser.parse_args(words)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    log = args.log or Path(tempfile.mkstemp(prefix="grpo-serve-", suffix=".log")[1])
    try:
        from grpo.rollout.serve import has_gpu

        token = choose_token(args.host, None)
        memory = args.kv_cache_gib if args.kv_cache_gib is not None or has_gpu() else 1.0
        process = Process(launch(args.model, token=token, host=args.host, port=args.port, dtype=args.dtype,
                                 max_model_len=args.max_model_len, kv_cache_gib=memory,
                                 gpu_memory=args.gpu_memory), log)  # fmt: skip
        process.start()
    except (ConfigError, ServerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        print(f"starting  {args.model} (log: {log})", flush=True)
        process.wait(args.start_timeout)
        print(f"serving   {process.url}/v1 as model {NAME!r}\n"
              f"token     export {TOKEN}={token}\n"
              f"try       python -m grpo.answer clip.wav \"What is heard?\" --choices Speech Music "
              f"--model {args.model} --server {process.url}", flush=True)  # fmt: skip
        process.keeper.wait()
        print(f"error: the server ended: {process.reason()}", file=sys.stderr)
        return 1
    except ServerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    finally:
        process.stop()


if __name__ == "__main__":
    sys.exit(main())
