"""Makes the environment: `python3 launch/setup.py [--extra cpu|gpu|auto] [--venv .venv]`, or `make setup`.

A virtual environment, the locked packages (requirements/EXTRA.txt), this project as an editable install, and a look
whether all of it imports. pip is run as you configured it: mirrors, proxies and wheel folders are yours to name.
Standard library only, and nothing newer than Python 3.7, so that an old Python can still say what is wrong.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from launch import cpu_wheels  # noqa: E402  (as a script, only this folder was on the path)

WANTED = (3, 11)
BUILD_TOOLS = ("setuptools", "hatchling", "packaging", "pathspec", "pluggy", "tomlkit", "trove-classifiers")

# Imports what a run needs, then prints one line. Modules that are part of the project are tried when they are there.
VERIFY = """
import importlib, logging, os, sys, warnings
warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
import torch, torchaudio, torchvision, transformers, peft, soundfile, hydra, wandb, deepspeed
from transformers import Qwen2_5OmniProcessor, Qwen2_5OmniThinkerForConditionalGeneration
from vllm import LLM
import vllm
for name in ("data", "rewards", "conf", "launch", "grpo"):
    if os.path.isdir(os.path.join(sys.argv[1], name)):
        module = importlib.import_module(name)
        assert module.__file__.startswith(sys.argv[1] + os.sep), f"{name} was imported from {module.__file__}"
named = [torch, transformers, peft, deepspeed, vllm, torchaudio, wandb]
print("python " + sys.version.split()[0], *(f"{m.__name__} {m.__version__}" for m in named), sep=", ")
"""

REMEDIES = (
    (
        r"(No matching distribution found for|satisfies the requirement) torch==\S+\+cpu",
        "pip found no CPU build of torch. Point it at PyTorch's CPU wheel index with PIP_EXTRA_INDEX_URL, or with\n"
        "PIP_FIND_LINKS at a folder that holds the wheel. For a machine with an NVIDIA GPU: make setup EXTRA=gpu.",
    ),
    (
        r"DO NOT MATCH THE HASHES",
        "a package is not the file that was locked: the index that pip uses serves something else under its name.",
    ),
    (
        r"No space left on device",
        "the disk is full: the CPU set takes 3 GB, the GPU set about 15 GB. TMPDIR moves pip's scratch files.",
    ),
    (
        r"ensurepip is not available|No module named '?(ensurepip|venv)",
        "this Python lacks venv: install the package python3.11-venv.",
    ),
    (
        r"(?i)name resolution|max retries exceeded|timed out|connection (refused|reset)|ProxyError|SSLError",
        "the package index could not be reached: see the network, HTTPS_PROXY, and PIP_INDEX_URL if you use a mirror.",
    ),
    (
        r"No matching distribution found for",
        "the lock is for Linux on x86_64 with glibc 2.28 or newer, and needs an index with all public packages.",
    ),
    (
        r"command '?\S*(gcc|g\+\+|cc)'? failed|No such file or directory: '(gcc|cc|g\+\+)'",
        "a C compiler is needed: gcc and g++.",
    ),
)


class SetupError(Exception):
    """Something that the user can put right; the message says how."""


def find_python(path: str | None = None, running: tuple[int, ...] = tuple(sys.version_info[:2])) -> str:
    """An interpreter of the wanted version: the running one, else one on `path` (PATH)."""
    if tuple(running) == WANTED:
        return getattr(
            sys, "_base_executable", sys.executable
        )  # not a virtual environment's: it may be the one to replace
    for name in ("python3.11", "python3"):
        found = shutil.which(name, path=path)
        if found and interpreter_version(found) == WANTED:
            return found
    raise SetupError(
        "Python 3.11 is needed: this is {}.{}, and no python3.11 is on PATH.\n".format(*running)
        + "Install it (packages python3.11 and python3.11-venv, or pyenv, conda, uv), or name it: make setup PYTHON=..."
    )


def interpreter_version(python: str | Path) -> tuple[int, ...] | None:
    """(major, minor) of an interpreter, None if it does not run."""
    try:
        command = [python, "-c", "import sys; print(*sys.version_info[:2])"]
        answer = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return tuple(int(n) for n in answer.stdout.split()) if answer.returncode == 0 else None


def choose_extra(wish: str, path: str | None = None) -> str:
    """`auto` is gpu where nvidia-smi lists a GPU, else cpu."""
    if wish != "auto":
        return wish
    smi = shutil.which("nvidia-smi", path=path)
    if smi is None:
        return "cpu"
    listed = subprocess.run([smi, "-L"], capture_output=True, text=True)
    return "gpu" if listed.returncode == 0 and "GPU " in listed.stdout else "cpu"


def locked(lock: str) -> dict[str, str]:
    """The lock file's entries, name -> text with version and hashes."""
    entries = re.split(r"\n(?=[A-Za-z0-9])", "\n" + lock)
    return {entry.split("==")[0].strip(): entry.strip() + "\n" for entry in entries if "==" in entry.split("\n")[0]}


def remedy(log: str) -> str:
    """What probably helps, from the words in the log; empty if it says nothing known."""
    return next((advice for pattern, advice in REMEDIES if re.search(pattern, log)), "")


class Steps:
    """Numbered steps with their seconds; what commands print goes to a log file, whose end is shown if one fails."""

    def __init__(self, total: int, log: Path):
        self.total, self.log, self.number, self.start = total, log, 0, time.perf_counter()

    def begin(self, words: str):
        self.number, self.words, self.began = self.number + 1, words, time.perf_counter()
        self.show("")

    def show(self, tail: str):
        """Writes the line anew on a terminal; elsewhere only its beginning and its end are written."""
        if sys.stdout.isatty():
            print(f"\r\x1b[K[{self.number}/{self.total}] {self.words}{tail}", end="", flush=True)
        elif not tail:
            print(f"[{self.number}/{self.total}] {self.words}", end="", flush=True)

    def end(self, note: str = ""):
        if sys.stdout.isatty():
            self.show("")
        print(f"{note}, {time.perf_counter() - self.began:.0f} s", flush=True)

    def run(self, *command: str | Path, env: dict[str, str] | None = None, count: tuple[str, int] | None = None) -> str:
        """Runs a command and returns its last line. `count`: first word of the lines to count, and how many are due."""
        tail, seen = deque(maxlen=400), 0
        with self.log.open("a") as log:
            log.write(f"\n$ {' '.join(map(str, command))}\n")
            log.flush()
            process = subprocess.Popen(
                [str(word) for word in command],
                cwd=str(ROOT),
                env={**os.environ, **(env or {})},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
            for line in process.stdout:
                log.write(line)
                tail.append(line)
                if count and line.startswith(count[0]):
                    seen += 1
                    self.show(f" {seen}/{count[1]}")
        if process.wait():
            text = "".join(tail)
            advice = remedy(text)
            raise SetupError(
                "".join(list(tail)[-15:]).rstrip()
                + f"\n\nStep {self.number} failed: {self.words}. All of its output: {self.log}"
                + (f"\nLikely remedy: {advice}" if advice else "")
            )
        return tail[-1].strip() if tail else ""


def make_environment(venv: Path, extra: str):
    """Everything, in order. The stamp comes last: a set-up that was stopped halfway is begun again."""
    python, stamp, log = venv / "bin" / "python", venv / ".stamp", venv / "setup.log"
    base = find_python()
    lock = locked((ROOT / "requirements" / f"{extra}.txt").read_text())

    fit = stamp.exists() and stamp.read_text().strip() == extra and interpreter_version(python) == WANTED
    if venv.exists() and not fit:  # half made, of the other kind, or of a Python that is gone
        if any(venv.iterdir()) and not log.exists():
            raise SetupError(f"{venv} exists and was not made by this set-up: remove it, or choose another with --venv")
        for child in venv.iterdir():
            if child.is_symlink() or child.is_file():
                if child != log:  # stays: it tells that the folder is ours, should this be stopped halfway too
                    child.unlink()
            else:
                shutil.rmtree(str(child))
    venv.mkdir(parents=True, exist_ok=True)
    if stamp.exists():
        stamp.unlink()
    log.write_text("")
    steps = Steps(5, log)
    pip = [python, "-m", "pip", "--no-input", "install", "--no-deps", "--no-compile", "--progress-bar", "off"]
    env = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore", "PYTHONWARNINGS": "ignore"}

    steps.begin(f"virtual environment in {venv.name}/")
    if not fit:
        steps.run(base, "-m", "venv", venv)
    steps.end()

    steps.begin(f"{len(lock)} packages of requirements/{extra}.txt")
    tools = venv / "build-tools.txt"  # first the tools that build the packages which come as source
    tools.write_text("".join(lock[name] for name in BUILD_TOOLS if name in lock))
    steps.run(*pip, "-r", tools, env=env)
    everything = (
        venv / "requirements.txt"
    )  # torch first: a pip that cannot find it says so before it downloads the rest
    everything.write_text("".join(lock[name] for name in sorted(lock, key=lambda name: name != "torch")))
    steps.run(*pip, "--no-build-isolation", "-r", everything, env=env, count=("Collecting", len(lock)))
    steps.end()

    steps.begin("this project, editable")
    steps.run(*pip, "--no-build-isolation", "-e", ROOT, env=env)
    steps.end()

    steps.begin("torchaudio and torchvision")
    packages = Path(steps.run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"))
    mended = cpu_wheels.mend(packages, *cpu_wheels.probe(python))
    steps.end(" mended for a torch without CUDA" if mended else " left as they are")

    steps.begin("everything imports")
    path = f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}"  # DeepSpeed looks for ninja there
    versions = steps.run(python, "-c", VERIFY, ROOT, env={**env, "VLLM_LOGGING_LEVEL": "ERROR", "PATH": path})
    steps.end()

    stamp.write_text(extra + "\n")
    print(versions)
    print(f"ready in {time.perf_counter() - steps.start:.0f} s")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extra", choices=("auto", "cpu", "gpu"), default="auto", help="auto: what nvidia-smi says")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="folder of the environment (default: .venv)")
    args = parser.parse_args()
    try:
        make_environment(args.venv.absolute(), choose_extra(args.extra))
    except SetupError as error:
        sys.exit(f"\n{error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped: the next set-up begins anew")


if __name__ == "__main__":
    main()
