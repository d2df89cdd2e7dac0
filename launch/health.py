"""Wait until servers answer: `python -m launch.health --pid PID URL ...`. Exit 1 when they do not, or PID ends first.

With the token in GRPO_SERVER_TOKEN, as grpo/rollout/serve.py asks; called by launch/templates/servers.sh.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import urllib.request
from collections.abc import Sequence


def healthy(url: str, token: str | None) -> bool:
    request = urllib.request.Request(f"{url}/health", headers={"Authorization": f"Bearer {token}"} if token else {})
    try:  # no proxy: servers are near
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=5) as reply:
            return reply.status == 200
    except (OSError, ValueError):
        return False


def alive(pid: int) -> bool:
    """Whether a process is there, and more than a corpse that nobody has looked at."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait(urls: Sequence[str], *, pid: int | None, seconds: float, token: str | None) -> str | None:
    """None once all answer; else why they will not."""
    end, waiting = time.monotonic() + seconds, list(urls)
    while waiting := [url for url in waiting if not healthy(url, token)]:
        if pid is not None and not alive(pid):
            return "the servers ended while starting: their output is above"
        if time.monotonic() > end:
            return f"no answer from {', '.join(waiting)} within {seconds:g} s"
        time.sleep(0.5)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("urls", nargs="+", metavar="URL")
    parser.add_argument("--pid", type=int, help="of what starts them")
    parser.add_argument("--seconds", type=float, default=900)
    given = parser.parse_args()
    token = os.environ.get("GRPO_SERVER_TOKEN")
    if why := wait(given.urls, pid=given.pid, seconds=given.seconds, token=token):
        sys.exit(f"error: {why}")


if __name__ == "__main__":
    main()
