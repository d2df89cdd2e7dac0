"""`make bench`: every claim about speed as a ratio, measured side by side here; `make bench-gpu`: at 7B shapes.

python -m grpo.bench                       all sections but the last two, and docs/performance.md
python -m grpo.bench forward growth        some of them, printed only
python -m grpo.bench zero                  memory of a rank by ZeRO stage and ranks, against grpo.plan (minutes)
python -m grpo.bench engines --rounds 1    whole runs of every rollout engine (minutes)
python -m grpo.bench --gpu                 the update and whole runs at 7B's shapes with random weights
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "performance.md"
CACHE = Path(".cache").absolute()


def machine() -> str:
    """What the numbers were measured on."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return (f"{model}, {torch.get_num_threads()} of {os.cpu_count()} cores, float32, "
            f"Python {platform.python_version()}, torch {torch.__version__}, "
            f"transformers {version('transformers')}")  # fmt: skip


def main() -> None:
    from grpo.bench.sections import ASKED, SECTIONS, Setting

    known = [*SECTIONS, *ASKED, "engines"]
    parser = argparse.ArgumentParser(prog="python -m grpo.bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(known)}; default: {', '.join(SECTIONS)}")
    parser.add_argument("--gpu", action="store_true", help="random weights of Qwen2.5-Omni-7B's size, on this GPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="of each run (engines)")
    parser.add_argument("--skip", type=int, default=3, help="first steps of each run, which also fill caches (engines)")
    parser.add_argument("--only", nargs="*", help="cases by name (engines)")
    args, overrides = parser.parse_known_args()
    overrides += [word for word in args.sections if "=" in word]
    asked = [word for word in args.sections if "=" not in word]
    if odd := [word for word in [*asked, *overrides] if word not in known and "=" not in word]:
        parser.error(f"there is no section {odd[0]!r}: {', '.join(known)}")
    if args.gpu:
        import torch

        if not torch.cuda.is_available():
            return print("skipped: no CUDA device here. `make bench` measures small shapes on a CPU")
    elif "OMP_NUM_THREADS" not in os.environ or os.environ["OMP_NUM_THREADS"] != "1":
        # One core: what is compared is work, not how well it spreads. Read when torch is loaded.
        os.execve(sys.executable, [sys.executable, "-m", "grpo.bench", *sys.argv[1:]],
                  os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    setting = Setting(CACHE, gpu=args.gpu, rounds=args.rounds)
    print(machine(), flush=True)
    text = [f"{title}\n\n{body}" for title, body in written(SECTIONS | (ASKED if asked else {}), asked, setting)]
    if "engines" in asked or args.gpu:
        from grpo.bench import runs

        cases = runs.GPU if args.gpu else runs.HERE
        if odd := [name for name in args.only or () if name not in cases]:
            parser.error(f"there is no case {odd[0]!r}: {', '.join(cases)}")
        cases = {name: words for name, words in cases.items() if not args.only or name in args.only}
        shared = [f"steps={args.steps}", *runs.LONG, *(runs.real(CACHE) if args.gpu else [])]
        print(runs.table(runs.measure(cases, [*shared, *overrides], rounds=args.rounds, skip=args.skip)))
    elif not asked:
        PAGE.write_text(page("\n\n".join(text)))
        print(f"written   {PAGE}")


def written(sections: dict[str, Callable], asked: list[str], setting) -> Iterator[tuple[str, str]]:
    """(heading with its explanation, lines) of each section; lines are printed as they come."""
    for name, section in sections.items():
        if asked and name not in asked:
            continue
        title, _, words = section.__doc__.strip().partition("\n")
        lines = []
        print(f"\n{title}", flush=True)
        for line in section(setting):
            print(f"  {line}", flush=True)
            lines.append(f"    {line}")
        yield f"## {title}\n\n" + "\n".join(line.strip() for line in words.strip().splitlines()), "\n".join(lines)


def page(text: str) -> str:
    from grpo.bench.sections import HEAD

    return HEAD.format(machine=machine()) + "\n" + text + "\n"


if __name__ == "__main__":
    main()
