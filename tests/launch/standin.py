"""Stands in for `python -m grpo.train` where only the contract with the batch script is tested: `pace` seconds a step.

Every rank counts to `steps`, hashing as it goes; told to stop it keeps its state and exits with 75; resume goes on.
"""

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

if "--cfg" in sys.argv:
    sys.exit(0)
words = dict(word.split("=", 1) for word in sys.argv[1:])
rank, told = int(os.environ["RANK"]), []
for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
    signal.signal(number, lambda *_: told.append(1))

run = Path("outputs", words["name"])
run.mkdir(parents=True, exist_ok=True)
file, resume = run / f"state-{rank}.json", words.get("resume") == "true"
if file.exists() and not resume:
    sys.exit("error: there is a run already")
state = json.loads(file.read_text()) if file.exists() else {"step": 0, "hash": "", "legs": 0}
state["legs"] += 1
about = {"words": sys.argv[1:], "env": dict(os.environ)}
(run / f"about-{rank}.json").write_text(json.dumps(about))


def save():
    new = file.with_suffix(".new")
    new.write_text(json.dumps(state))
    new.replace(file)


while state["step"] < int(words["steps"]):
    time.sleep(float(words.get("pace", 0.1)))
    state["step"] += 1
    state["hash"] = hashlib.sha256(f"{state['hash']} {state['step']} {rank}".encode()).hexdigest()
    if state["step"] % 10 == 0 or told:
        save()
    if told:
        sys.exit(75)
if "fail" in words:
    sys.exit(int(words["fail"]))
save()
