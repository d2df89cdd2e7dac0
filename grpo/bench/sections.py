"""The sections of docs/performance.md: each a function whose docstring is its heading and explanation, and which yields
lines as they are measured."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from grpo.bench.loss import loss_stage, step_stage
from grpo.bench.ranks import Case, measured, model, planned
from grpo.bench.timing import median, peak_memory, ratio, side_by_side
from grpo.bench.update import Bench, Shape
from grpo.engine import LIVE
from grpo.logprob import chosen_and_entropy, tempered
from grpo.lossdocs import ROOT, built
from grpo.sync.traffic import OMNI_7B

HEAD = """# Performance

Written by `make bench` on {machine}. Every line compares things that ran in turns in one process; ratios are
medians of the rounds with the least and the most. An update is what follows a rollout: reference forward, policy
forward and backward. The model has 7B's proportions at hidden size 512 with 6 layers (audio tower and vocabulary a
tenth of the layers' work each) and random weights. What a GPU does: `make bench-gpu`.
"""
MIB = 2**20


@dataclass
class Setting:
    """Where and how to measure. The model is built when a section first wants it."""

    cache: Path
    gpu: bool
    rounds: int

    @cached_property
    def bench(self) -> Bench:
        if not self.gpu:
            return Bench(self.cache / "bench-512", Shape())
        of = OMNI_7B
        tower = {"d_model": of.audio_hidden, "encoder_layers": of.audio_layers, "encoder_attention_heads": 20,
                 "encoder_ffn_dim": of.audio_intermediate}  # fmt: skip
        seven = Shape(of.hidden, of.layers, of.heads, of.kv_heads, of.intermediate, of.vocab, tower)
        return Bench(self.cache / "random-7b", seven, device="cuda", dtype="bfloat16", checkpointing=True)


def forward(s: Setting) -> Iterator[str]:
    """A prompt once for all of its completions

    `shared` against `separate` (a row a completion, clips heard once) and against `usual` (each row hears its clip, in
    policy and reference: what a trainer without either does). tokens: the ratio of the tokens alone, k(P+C) / (P+kC).
    """
    sizes = [(400, 100, 6), (400, 100, 16), (400, 50, 6), (400, 200, 6), (250, 100, 6), (800, 100, 6), (400, 100, 2)]
    for prompt, completion, k in sizes:
        groups = [s.bench.group(0, prompt, completion, k)]
        seconds = side_by_side({how: s.bench.step(groups, how) for how in ("shared", "separate", "usual")}, s.rounds)
        tokens = k * (prompt + completion) / (prompt + k * completion)
        first, second = (ratio(seconds[how], seconds["shared"]) for how in ("separate", "usual"))
        yield (f"k={k:<3} prompt={prompt} completion={completion:<4} separate/shared {first}   usual/shared {second}   "
               f"tokens {tokens:.2f}x   shared {median(seconds['shared']):.2f} s")  # fmt: skip


def memory(s: Setting) -> Iterator[str]:
    """Memory of an update

    Peak beyond weights and what is there before. `micro_tokens` bounds it whatever the number of groups: one at a time.
    """
    for k in (6, 16):
        groups = [s.bench.group(0, 400, 100, k)]
        peak = {how: peak_memory(s.bench.step(groups, how)) for how in ("shared", "separate")}
        yield (f"k={k:<3} prompt=400 completion=100  shared {peak['shared'] / MIB:.0f} MiB, separate "
               f"{peak['separate'] / MIB:.0f} MiB: {peak['separate'] / peak['shared']:.2f}x")  # fmt: skip
    groups = [s.bench.group(i, 400, 100, 6) for i in range(8)]
    peaks = [peak_memory(s.bench.step(groups[:n], at_once=1)) / MIB for n in (1, 2, 4, 8)]
    yield f"groups 1, 2, 4, 8 with micro_tokens=1000: {', '.join(f'{p:.0f}' for p in peaks)} MiB"


def ideal(s: Setting) -> Iterator[str]:
    """Against the least that these tokens can cost

    `plain` is transformers' own causal forward and backward over as many tokens in short rows, with as many log-probs.
    """
    for k, rows in ((6, 2), (16, 4)):
        groups, tokens = [s.bench.group(0, 400, 100, k)], 400 + 100 * k
        seconds = side_by_side(
            {"shared": s.bench.step(groups), "plain": s.bench.plain(tokens, rows, 100 * k)}, s.rounds
        )
        yield f"k={k:<3} {tokens} tokens  shared/plain {ratio(seconds['shared'], seconds['plain'])}"


def audio(s: Setting) -> Iterator[str]:
    """A clip heard once

    An update whose clips were heard in the rollout, against one that hears each once, and once for every row and pass.
    """
    groups = [s.bench.group(0, 400, 100, 6)]
    update = s.bench.step(groups)

    def kept():
        clear, s.bench.policy.audio_cache.clear = s.bench.policy.audio_cache.clear, lambda: None
        update()
        s.bench.policy.audio_cache.clear = clear

    seconds = side_by_side({"kept": kept, "once": update, "each row": s.bench.step(groups, "usual"),
                            "separate": s.bench.step(groups, "separate")}, s.rounds)  # fmt: skip
    yield f"heard once/kept {ratio(seconds['once'], seconds['kept'])}"
    yield f"rows that each hear their clip/rows that share it {ratio(seconds['each row'], seconds['separate'])}"


def logits(s: Setting) -> Iterator[str]:
    """Log-probabilities without all the logits

    600 tokens, hidden 512: values, entropy and gradient in chunks of 64, against all [600, V] logits and autograd.
    """
    generator = torch.Generator().manual_seed(0)
    device = s.bench.policy.device
    hidden = torch.randn(600, 512, generator=generator).to(device)
    for vocabulary in (32_000, 152_064):
        weight = 0.05 * torch.randn(vocabulary, 512, generator=generator).to(device)
        ids = torch.randint(0, vocabulary, (600,), generator=generator).to(device)

        def whole(weight=weight, ids=ids):
            h = hidden.clone().requires_grad_()
            logp = tempered(h @ weight.T, 1.0, ())
            with torch.no_grad():
                _ = -(logp.exp() * logp).sum(-1)
            logp.gather(-1, ids[:, None]).sum().backward()

        def chunked(weight=weight, ids=ids):
            chosen_and_entropy(hidden.clone().requires_grad_(), weight, ids, 1.0, (), False, 64)[0].sum().backward()

        seconds = side_by_side({"whole": whole, "chunked": chunked}, s.rounds)
        peak = {name: peak_memory(work) for name, work in (("whole", whole), ("chunked", chunked))}
        yield (f"V={vocabulary:<7} time whole/chunked {ratio(seconds['whole'], seconds['chunked'])}   memory "
               f"{peak['whole'] / MIB:.0f} MiB / {peak['chunked'] / MIB:.0f} MiB")  # fmt: skip


def maths(s: Setting) -> Iterator[str]:
    """Advantage, loss and metrics

    Their share of the cheapest step there can be: log-probs and entropy of B=2, k=6, T=256, V=152,064 and back.
    """
    device = s.bench.policy.device
    for name in ("grpo", "dapo", "gspo", "vespo"):
        loss = built(ROOT / "conf" / "loss" / f"{name}.yaml")
        seconds = side_by_side({"loss": loss_stage(loss, device), "step": step_stage(device)}, s.rounds)
        share = ratio(seconds["loss"], seconds["step"])
        yield f"{name:<6} {share.median:.2%} ({share.least:.2%} to {share.most:.2%}) of {median(seconds['step']):.2f} s"


def growth(s: Setting) -> Iterator[str]:
    """Growth

    Time when one size doubles; in brackets the growth of the operations needed (prompt once, and attention's own).
    """
    base = {"groups": 1, "prompt": 400, "completion": 100, "k": 8}
    for what in base:
        grown = base | {what: 2 * base[what]}
        work, counts = {}, []
        for name, size in (("base", base), ("grown", grown)):
            groups = [s.bench.group(i, size["prompt"], size["completion"], size["k"]) for i in range(size["groups"])]
            work[name] = s.bench.step(groups)
            counts.append(size["groups"] * sum(s.bench.shape.operations(size["prompt"], size["completion"], size["k"])))
        seconds = side_by_side(work, s.rounds)
        yield (f"{what:<10} {base[what]} -> {grown[what]:<4} {ratio(seconds['grown'], seconds['base'])}   "
               f"[{counts[1] / counts[0]:.2f}x]")  # fmt: skip


def stages(s: Setting) -> Iterator[str]:
    """A whole step

    With this model, 2 questions x 6 completions of 100 tokens, rollouts by transformers. `loop` is all that is
    not hearing, generating, forward, backward or the optimizer: data, packing, rewards, advantages, loss, metrics.
    """
    questions, copies, completion = 2, 6, 100
    with tempfile.TemporaryDirectory() as folder:
        words = [s.bench.policy.thinker.name_or_path, folder, questions, copies, completion, s.rounds + 2]
        done = subprocess.run(
            [sys.executable, "-m", "grpo.bench.overhead", *map(str, words)], capture_output=True, text=True
        )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    steps = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")][2:]
    middle = {key: statistics.median(step[key] for step in steps) for key in steps[0]}
    yield f"prompts of {middle['prompt']:.0f} tokens, completions of {middle['length']:.0f}, {len(steps)} steps"
    for key in ("rollout", "reward", "data", "update", "sync"):
        yield f"{key:<8} {middle[f'time/{key}']:.3f} s   {middle[f'time/{key}'] / middle['step']:.1%} of a step"
    shares = [(step["step"] - step["model"]) / step["step"] for step in steps]
    yield (f"loop     {statistics.median(shares):.2%} of a step ({min(shares):.2%} to {max(shares):.2%}) is neither "
           f"model nor optimizer")  # fmt: skip


def zero(s: Setting) -> Iterator[str]:
    """Memory of a rank under ZeRO

    Peak of the worst rank in an optimizer step, beyond the libraries, against what grpo.plan says of it. A model of 389
    MiB in float32, a group of 6 completions a rank; `live`: weights that may stay gathered. Not on the page.
    """
    folder = s.cache / "bench-768"
    model(folder)
    cases = [Case(stage, n, full=full, live=LIVE if stage < 3 else 0)
             for full in (False, True) for stage in (0, 2, 3) for n in (1, 2, 4)]  # fmt: skip
    cases += [Case(3, 2), Case(0, 1, checkpointing=True), Case(3, 2, checkpointing=True, live=0),
              Case(0, 1, groups=2, prompt=400, completion=100)]  # fmt: skip
    for c in cases:
        peak, said = max(rank["peak"] for rank in measured(folder, c)), planned(folder, c)
        more = f" live={c.live:.0e}" * (c.stage == 3) + " checkpointing" * c.checkpointing
        more += f" {c.groups} x {c.prompt}+6x{c.completion}" * (c.groups > 1)
        yield (f"ZeRO-{c.stage} {c.ranks} rank(s) {'whole' if c.full else 'LoRA':<6} measured {peak / MIB:5.0f} MiB  "
               f"planned {said / MIB:5.0f}  planned/measured {said / peak:.2f}{more}")  # fmt: skip


SECTIONS: dict[str, Callable[[Setting], Iterator[str]]] = {
    f.__name__: f for f in (forward, memory, ideal, audio, logits, maths, growth, stages)
}  # fmt: skip
ASKED = {"zero": zero}  # only where asked for
