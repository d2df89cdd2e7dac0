"""One of two trainer ranks with a server between them: run by test_server.py, prints its rank's view as JSON."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from grpo.policy import Policy
from grpo.rollout import Sampling, serve
from grpo.rollout.server import VLLMServer
from tests.conftest import LORA, make_clip, make_prompt, make_question

checkpoint, fake, known, how = sys.argv[1:]
serve.Launch.command = lambda self, port: [sys.executable, fake, str(port), known]
dist.init_process_group("gloo")
rank = dist.get_rank()
policy = Policy(checkpoint, LORA, prompt=make_prompt())
prompts = [policy.encode(make_question(f"q{i}"), make_clip(i, 0.3 + 0.1 * i)) for i in range(4)]
mine = prompts[rank * 2 : rank * 2 + 2]
engine = VLLMServer(policy, timeout=10.0, backoff=0.05, tries=6)
answers = []
for step in range(3):
    dist.barrier()  # as Rollouts.settle: no push while another rank still samples with the version before
    if rank == 0:
        engine.send("load", {"w": torch.full((2,), float(step))}, version=step + 1)
        engine.refresh(step + 1, audio_changed=False)
    engine.version = step + 1  # no barrier: the other rank may ask before the push has arrived
    if step == 1 and how != "calm":
        if rank == 0:  # it has nothing to ask; only the other rank meets the fault, while this one waits for it
            keeper = engine.servers[0].process.keeper.pid
            server = int(Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()[0])
            os.kill(server, signal.SIGKILL if how == "kill" else signal.SIGSTOP)
        dist.barrier()
        if rank == 1:
            answers.append([c.token_ids for g in engine.generate(mine, 2, Sampling(6, 0, step)) for c in g.completions])
        dist.barrier()
        if rank == 0:
            answers.append([c.token_ids for g in engine.generate(mine, 2, Sampling(6, 0, step)) for c in g.completions])
    else:
        answers.append([c.token_ids for g in engine.generate(mine, 2, Sampling(6, 0, step)) for c in g.completions])
dist.barrier()
print(json.dumps({"rank": rank, "answers": answers, "restarts": engine.restarts}), flush=True)
engine.close()
dist.barrier()
dist.destroy_process_group()  # a gloo thread alive at exit may abort its process
