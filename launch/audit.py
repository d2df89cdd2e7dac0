"""Look the locked packages up among the known vulnerabilities: `python launch/audit.py [LOCK ...]`, or `make audit`.

By pip-audit, wherever it is installed (`pipx install pip-audit`): no dependency of this project. It asks PyPI, so it
needs a network. Exit code 0: nothing known; 1: something is; 3: it could not be asked, which is no result.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ("requirements/cpu.txt", "requirements/gpu.txt")
UNASKED = 3


def audit(lock: str) -> int:
    """Exit code for one lock file; prints what is known."""
    tool = shutil.which("pip-audit")
    if tool is None:
        print(f"NOT AUDITED {lock}: pip-audit is not installed here (pipx install pip-audit)", file=sys.stderr)
        return UNASKED
    # --no-deps with hashes: the lock as it is, nothing resolved and nothing installed
    words = [tool, "--requirement", str(ROOT / lock), "--no-deps", "--disable-pip", "--progress-spinner", "off"]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode == 0:
        print(f"audited   {lock}: no known vulnerability")
        return 0
    print(done.stdout, end="")
    if "known vulnerabilit" in done.stdout + done.stderr:
        print(done.stderr.strip(), file=sys.stderr)
        return 1
    last = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
    print(f"NOT AUDITED {lock}: {last}", file=sys.stderr)
    return UNASKED


def main(locks: list[str]) -> int:
    codes = [audit(lock) for lock in locks or LOCKS]
    return 1 if 1 in codes else max(codes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
