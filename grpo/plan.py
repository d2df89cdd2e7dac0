"""What a run needs, before it is started: `python -m grpo.plan [experiment=NAME] [placement=NAME] [key=value ...]`.

Memory of a rank and of an engine, bytes of a sync, tokens, operations and seconds of a step, from the shapes of the
model alone: no GPU, no weights. The forward pass is made on torch's meta device, and what autograd would keep of it is
counted. What is assumed (lengths, utilisation) is printed with the table. docs/plan.md says how it was checked.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from grpo.attention import Prefix
from grpo.batch import needs
from grpo.config import ConfigError, build_objective, composed, one_line_errors, settings, zero_stage
from grpo.engine import LIVE, REDUCE_BUCKET, STEP_AT_ONCE
from grpo.logprob import LOGITS_AT_ONCE
from grpo.sync.names import group_of
from grpo.sync.traffic import OMNI_7B, Shape

# bytes, bfloat16 operations a second, bytes a second: the makers' data sheets, dense
DEVICES = {"a100": (80e9, 312e12, 2.0e12), "h100": (80e9, 989e12, 3.35e12), "h200": (141e9, 989e12, 4.8e12)}
AUDIO = "audio_tower"


@dataclass(frozen=True)
class Given:
    """What a config does not say."""

    prompt: int = 420  # tokens of a prompt, its sound included
    seconds: float = 10.0  # of a clip
    completion: int = 150  # tokens of a completion
    utilisation: float = 0.35  # of a device's operations in an update; of its memory's speed in decoding
    device: str = "h100"


def weights_of(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of the policy; the audio tower's together under one name."""
    h, found = shape.hidden, {"model.embed_tokens.weight": (shape.vocab, shape.hidden)}
    for layer in (f"model.layers.{i}" for i in range(shape.layers)):
        for name, size in shape.matrices().items():
            module = f"{layer}.{'self_attn' if name[1:] == '_proj' else 'mlp'}.{name}"
            found[f"{module}.weight"] = size
            if name in ("q_proj", "k_proj", "v_proj"):
                found[f"{module}.bias"] = size[:1]
        found |= {f"{layer}.input_layernorm.weight": (h,), f"{layer}.post_attention_layernorm.weight": (h,)}
    return found | {"model.norm.weight": (h,), "lm_head.weight": (shape.vocab, h), AUDIO: (shape.audio_weights(),)}


def trained_of(shape: Shape, lora: Mapping | None, full: str | None) -> dict[str, int]:
    """Numbers in each weight that is trained, by name: the adapter's, or those that `full` names."""
    names = weights_of(shape)
    if lora is None:
        return {n: torch.Size(s).numel() for n, s in names.items() if n != AUDIO and re.fullmatch(full or "", n)}
    hit = {n.removesuffix(".weight"): s for n, s in names.items()
           if len(s) == 2 and re.fullmatch(lora["targets"], n.removesuffix(".weight"))}  # fmt: skip
    return {f"{n}.lora": lora["r"] * sum(s) for n, s in hit.items()}


def synced_of(shape: Shape, lora: Mapping | None, full: str | None, itemsize: int) -> dict[str, int]:
    """Bytes of one sync for each strategy that the config allows."""
    names, trained = weights_of(shape), trained_of(shape, lora, full)
    modules = {
        m for n in trained for m in group_of(n.removesuffix(".lora").removesuffix(".weight").removesuffix(".bias"))
    }
    whole = sum(torch.Size(s).numel() for n, s in names.items() if n.rpartition(".")[0] in modules)
    counts = {"full": whole, "full, first": shape.all_weights()}
    if lora is not None:
        counts = {"adapter": sum(trained.values()), "delta": sum(trained.values())} | counts
    return {name: count * itemsize for name, count in counts.items()}


# ---------------------------------------------------------------- what a forward pass keeps


@dataclass(frozen=True)
class Micro:
    """One forward/backward: `groups` groups of a prompt and `copies` completions each."""

    groups: int
    copies: int
    prompt: int
    completion: int
    shared: bool = True  # model.forward

    @property
    def tokens(self) -> int:
        prompts = 1 if self.shared else self.copies
        return self.groups * (prompts * self.prompt + self.copies * self.completion)


class Counted(Prefix):
    """Stands for the attention of a packed row: keeps what the kernels would keep, computes nothing."""

    def __init__(self, micro: Micro, flex: bool):
        self.micro, self.flex = micro, flex

    def __call__(self, query, key, value, scale):
        m, (_, heads, length, d) = self.micro, query.shape
        if self.flex:
            kept = [(heads, length)]  # float32 in both: the softmax's normaliser
        elif not m.shared:  # keys and values for every head
            kept = [(heads, length)] + [(heads * length * d,)] * 2
        else:  # and again, the prompt's too, for every completion
            own = m.groups * m.copies * heads * d
            kept = [(heads, length)] + [(own * (m.prompt + m.completion),)] * 2 \
                + [(heads * length * d,)] * 2 + [(own * m.completion,)]  # fmt: skip
        return _Attend.apply(query, key, value, kept, self.flex).transpose(1, 2)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, kept, flex):
        out = torch.empty_like(query)  # what follows gets it in another order: a tensor of its own
        more = [query.new_empty(kept[0], dtype=torch.float32), *(query.new_empty(size) for size in kept[1:])]
        ctx.save_for_backward(query, *([key, value] if flex else []), out, *more)
        return torch.empty_like(query)

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError


def kept_bytes(shape: Shape, lora: Mapping | None, full: str | None, *, dtype: str, micro: Micro, flex: bool,
               checkpointing: bool) -> int:  # fmt: skip
    """Bytes that autograd keeps between forward and backward of one micro-batch."""
    from grpo.policy import on_meta

    thinker = on_meta(shape, lora, full, dtype)
    weights = {p.untyped_storage()._cdata for p in thinker.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = tensor  # held, so that no other storage takes its place
        return tensor

    scored = micro.groups * micro.copies * micro.completion
    with torch.device("meta"):
        fixed = not thinker.model.embed_tokens.weight.requires_grad
        embeds = torch.empty(1, micro.tokens, shape.hidden, dtype=getattr(torch, dtype), requires_grad=not fixed)
        positions = torch.empty(3, 1, micro.tokens, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            hidden = thinker.model(inputs_embeds=embeds, attention_mask={"full_attention": Counted(micro, flex)},
                                   position_ids=positions, use_cache=False).last_hidden_state  # fmt: skip
            rows = hidden.flatten(0, 1)[torch.empty(scored, dtype=torch.long)]
            thinker.lm_head(rows, (torch.empty(scored, dtype=torch.long), 1.0, [], False))
    total = sum(t.untyped_storage().nbytes() for t in kept.values())
    if not checkpointing:
        return total
    return total // shape.layers + shape.layers * micro.tokens * shape.hidden * embeds.element_size()


# ---------------------------------------------------------------- the plan


@dataclass
class Plan:
    """Figures of one run. Bytes are of one trainer rank, unless a name says otherwise."""

    facts: dict[str, str] = field(default_factory=dict)
    trainer: dict[str, float] = field(default_factory=dict)
    host: dict[str, float] = field(default_factory=dict)
    engine: dict[str, float] = field(default_factory=dict)
    synced: dict[str, float] = field(default_factory=dict)
    step: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def states(shape: Shape, lora: Mapping | None, full: str | None, *, stage: int, ranks: int, dtype: str,
           reference: bool = False) -> dict[str, float]:  # fmt: skip
    """Bytes of weights, gradients, optimizer and held reference on one rank, as DeepSpeed keeps them with AdamW.

    `stage`: DeepSpeed's own, of `zero_stage`.
    """
    size = 2 if dtype == "bfloat16" else 4
    trained = sum(trained_of(shape, lora, full).values())
    every = shape.all_weights() + (trained if lora is not None else 0)
    shards = {name: ranks if stage >= at else 1 for name, at in (("optimizer", 1), ("gradients", 2), ("weights", 3))}
    master = 0 if stage == 0 else 4  # a float32 copy that is stepped; stage 0 steps the weights themselves
    return {
        "weights": every * size / shards["weights"],
        "gradients": trained * (4 if stage > 1 else size) / shards["gradients"],
        "optimizer": trained * (master + 8) / shards["optimizer"],
        "reference held": trained * size / shards["weights"] if reference and lora is None else 0,
    }


def step_space(shape: Shape, lora: Mapping | None, full: str | None, *, stage: int, ranks: int, gpu: bool,
               offload: bool = False) -> float:  # fmt: skip
    """Bytes that come and go in AdamW's step on one rank: roots of the second moments, in stage 3 a copy of gradients.

    With `offload` they are the host's, whose gradients need no copy.
    """
    each = trained_of(shape, lora, full).values()
    if stage == 3:
        at_once = min(sum(each), STEP_AT_ONCE * ranks + max(each)) / ranks
    elif stage:
        at_once = sum(each) / ranks
    else:  # torch steps one weight after the other on a CPU, all together on a GPU
        at_once = sum(each) if gpu else max(each)
    return 4 * at_once * ((1 if gpu and not offload else 2) + (stage == 3 and not offload))


def work_space(shape: Shape, lora: Mapping | None, full: str | None, *, stage: int, ranks: int, dtype: str,
               micro: Micro, gpu: bool, checkpointing: bool, live: int = LIVE,
               offload: bool = False) -> dict[str, float]:  # fmt: skip
    """Bytes that come and go in one update on a rank. Not all are there at once: together they are an upper bound.

    The optimizer's step comes after the passes, and counts as far as it needs more; with `offload` it is the host's.
    """
    size, found = (2 if dtype == "bfloat16" else 4), {}
    if stage == 3:
        biggest = max(torch.Size(shape_).numel() for shape_ in weights_of(shape).values())
        # DeepSpeed receives the parts in one buffer and joins them in another
        found["gathered weights"] = (min(shape.all_weights(), live + biggest) + biggest) * size
    found["activations"] = kept_bytes(shape, lora, full, dtype=dtype, micro=micro, flex=gpu,
                                      checkpointing=checkpointing)  # fmt: skip
    scored = micro.groups * micro.copies * micro.completion
    found["logits chunk"] = 3 * 4 * min(LOGITS_AT_ONCE, scored * shape.vocab)
    if not offload:
        more = step_space(shape, lora, full, stage=stage, ranks=ranks, gpu=gpu) - sum(found.values())
        found |= {"optimizer's step, beyond these": more} if more > 0 else {}
    if stage > 1:  # and, in stage 3, a copy that is cut into the ranks' parts
        trained = sum(trained_of(shape, lora, full).values())
        found["gradient buckets"] = min(REDUCE_BUCKET, trained) * 4 * (2 if stage == 3 else 1)
    return found


def plan(cfg: DictConfig, shape: Shape, given: Given) -> Plan:
    """The figures for a composed config. Raises ConfigError for an unknown device or an uneven share."""
    if given.device not in DEVICES:
        raise ConfigError(f"--device {given.device}: known are {', '.join(DEVICES)}")
    s, place = settings(cfg), cfg.get("placement") or {}
    ranks = place.get("ranks", 1)
    s.check_ranks(ranks)
    lora = None if cfg.model.lora is None else {k: v for k, v in OmegaConf.to_container(cfg.model.lora).items()}
    full, dtype = cfg.model.get("full"), cfg.model.dtype
    stage = zero_stage(cfg.engine.stage, dtype)
    size, room = (2 if dtype == "bfloat16" else 4), DEVICES[given.device]
    reference = needs(build_objective(cfg)).reference
    shared = cfg.model.forward == "shared"
    one = Micro(1, s.generations, given.prompt, given.completion, shared)
    mine = s.questions // ranks
    groups = mine if s.micro_tokens is None else max(1, min(mine, s.micro_tokens // one.tokens))
    micro = Micro(groups, s.generations, given.prompt, given.completion, shared)
    trained = sum(trained_of(shape, lora, full).values())
    every = weights_of(shape)
    out = Plan()

    out.facts = {
        "model": f"{cfg.model.name}: {shape.all_weights():,} weights, {trained:,} trained, {dtype}",
        "placement": f"{place.get('name', 'none')}: {ranks} training rank(s), ZeRO-{stage}"
                     f"{' on the host' if cfg.engine.offload else ''}; {place.get('serving', 'no engine of its own')}",
        "assumed": f"prompt {given.prompt} tokens, clip {given.seconds:g} s, completion {given.completion} of at most "
                   f"{s.max_tokens} tokens, {given.utilisation:.0%} of one {given.device}",
        "micro-batch": f"{groups} group(s) of {s.generations} completions, {micro.tokens:,} tokens, "
                       f"{-(-mine // groups)} a step and rank",
    }  # fmt: skip

    # ---------------------------------------------------------------- memory
    fixed = states(shape, lora, full, stage=stage, ranks=ranks, dtype=dtype, reference=reference)
    (out.host if cfg.engine.offload else out.trainer).update({k: v for k, v in fixed.items() if v})
    out.trainer |= work_space(shape, lora, full, stage=stage, ranks=ranks, dtype=dtype, micro=micro, gpu=True,
                              checkpointing=cfg.model.gradient_checkpointing, live=cfg.engine.get("live", LIVE),
                              offload=cfg.engine.offload)  # fmt: skip
    if cfg.engine.offload:
        out.host["optimizer's step"] = step_space(shape, lora, full, stage=stage, ranks=ranks, gpu=True, offload=True)
    out.host["audio cache, at most"] = cfg.audio_cache.memory_gib * 2**30
    token_kv = 2 * shape.layers * shape.kv_heads * shape.head_dim * size
    engines = place.get("engines", ranks)
    asked = -(-s.questions // engines)
    out.engine["weights"] = shape.all_weights() * size / place.get("tensor_parallel", 1)
    out.engine["keys and values of a step"] = token_kv * asked * (given.prompt + s.generations * given.completion)
    out.engine["the same at max_tokens"] = token_kv * asked * (given.prompt + s.generations * s.max_tokens)
    if "kv_cache_gib" in cfg.rollout:
        budget = cfg.rollout.kv_cache_gib
        share = room[0] * cfg.rollout.gpu_memory - out.engine["weights"]
        out.engine["room for keys and values"] = share if budget is None else budget * 2**30
    out.synced = synced_of(shape, lora, full, size)

    # ---------------------------------------------------------------- work
    n = s.questions * s.generations
    packed = s.questions // groups * micro.tokens if s.questions >= groups else micro.tokens
    out.step = {"completions": n, "tokens sampled": n * given.completion, "tokens of the update": packed * s.updates}
    matrices = sum(torch.Size(z).numel() for k, z in every.items() if len(z) == 2 and k.startswith("model.layers"))
    context = 4 * shape.layers * shape.heads * shape.head_dim * (given.prompt + given.completion) / 2
    forward = packed * (2 * matrices + context) + 2 * n * given.completion * shape.vocab * shape.hidden
    passes = 1 + (1 if lora is not None else 2) + bool(cfg.model.gradient_checkpointing)
    sound = s.questions * given.seconds * 50 * 2 * shape.audio_weights()
    out.step["operations of the update"] = forward * passes * s.updates + sound
    out.step["operations of the reference"] = forward if reference else 0
    prefill = s.questions * given.prompt * 2 * matrices + sound
    out.step["operations of the rollout"] = prefill + n * given.completion * 2 * (matrices + shape.vocab * shape.hidden)
    speed = room[1] * given.utilisation
    # Decoding reads all weights once a token, whatever the number of completions; operations where those take longer.
    tp = place.get("tensor_parallel", 1)
    reading = s.max_tokens * (matrices + shape.vocab * shape.hidden) * size / (room[2] * given.utilisation * tp)
    out.seconds = {
        "rollout": max(reading, out.step["operations of the rollout"] / (speed * engines * tp)),
        "reference": out.step["operations of the reference"] / (speed * ranks),
        "update": out.step["operations of the update"] / (speed * ranks),
    }
    out.seconds["step, one after the other"] = sum(out.seconds.values())
    out.seconds["hours of the run"] = out.seconds["step, one after the other"] * s.steps / 3600
    return out


def table(p: Plan, room: float) -> str:
    """The plan to be read."""
    gib = 2**30
    lines = [f"{k:<12}{v}" for k, v in p.facts.items()]

    def block(title: str, rows: Mapping[str, float], total: str | None = None) -> None:
        lines.append(f"\n{title}")
        lines.extend(f"  {k:<34}{v / gib:>10.2f} GiB" for k, v in rows.items())
        if total:
            lines.append(f"  {total:<34}{sum(rows.values()) / gib:>10.2f} GiB")

    block("memory of a training rank", p.trainer, f"together (of {room / gib:.0f})")
    block("memory of its host", p.host, "together")
    block("memory of a rollout engine, a GPU", p.engine)
    lines.append("\nbytes of a sync, to each engine")
    lines += [f"  {k:<34}{v:>18,.0f}" for k, v in p.synced.items()]
    lines.append("\nwork of a step")
    lines += [f"  {k:<34}{v:>14.3g}" if v >= 1e9 else f"  {k:<34}{v:>14,.0f}" for k, v in p.step.items()]
    lines.append("\nseconds at that utilisation, evaluation, data and syncs apart")
    lines += [f"  {k:<34}{v:>14.2f}" for k, v in p.seconds.items()]
    return "\n".join(lines)


def shape_of(cfg: DictConfig) -> Shape:
    """Sizes of the configured model: of a checkpoint's config.json, or those of the 7B model by its name.

    Raises ConfigError where neither is known.
    """
    path = cfg.model.path
    if path is None:
        found = sorted(Path(cfg.cache).glob("tiny-*/config.json"))
        if not found:
            raise ConfigError(f"the tiny model is made by the first run, and {cfg.cache} holds none yet: plan another "
                              f"(experiment=audsemthinker_qa_grpo), or train first")  # fmt: skip
        return read_shape(found[0])
    if (Path(path) / "config.json").exists():
        return read_shape(Path(path) / "config.json")
    if str(path) == "Qwen/Qwen2.5-Omni-7B":
        return OMNI_7B
    raise ConfigError(f"model.path={path} is no folder with a config.json: its sizes are not known here")


def read_shape(file: Path) -> Shape:
    said = json.loads(file.read_text())
    said = said.get("thinker_config", said)
    text, audio = said["text_config"], said["audio_config"]
    heads = text["num_attention_heads"]
    return Shape(
        hidden=text["hidden_size"], layers=text["num_hidden_layers"], heads=heads,
        kv_heads=text["num_key_value_heads"], head_dim=text.get("head_dim") or text["hidden_size"] // heads,
        intermediate=text["intermediate_size"], vocab=text["vocab_size"], audio_layers=audio["encoder_layers"],
        audio_hidden=audio["d_model"], audio_intermediate=audio["encoder_ffn_dim"], mel_bins=audio["num_mel_bins"],
    )  # fmt: skip


def main(words: list[str] | None = None) -> None:
    default = Given()
    parser = argparse.ArgumentParser("python -m grpo.plan", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("overrides", nargs="*", help="as of grpo.train: experiment=NAME placement=NAME key=value")
    parser.add_argument("--prompt", type=int, default=default.prompt, help="tokens of a prompt with its sound")
    parser.add_argument("--seconds", type=float, default=default.seconds, help="of a clip")
    parser.add_argument("--completion", type=int, default=default.completion, help="tokens of a completion, on average")
    parser.add_argument("--utilisation", type=float, default=default.utilisation)
    parser.add_argument("--device", default=default.device, help=", ".join(DEVICES))
    args = parser.parse_args(words)
    with one_line_errors():
        cfg = composed(args.overrides)
        OmegaConf.resolve(cfg)
        given = Given(args.prompt, args.seconds, args.completion, args.utilisation, args.device)
        print(table(plan(cfg, shape_of(cfg), given), DEVICES[given.device][0]))


if __name__ == "__main__":
    main()
