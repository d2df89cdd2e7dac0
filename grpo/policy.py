"""The policy: Qwen2.5-Omni's Thinker with LoRA. The only door to transformers and peft (with grpo/tiny.py).

A group's prompt, its audio included, is computed once for all of its completions (grpo/packing.py, grpo/attention.py).
`forward="separate"` puts every completion in a row of its own with transformers' own attention: same numbers, more
work.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    GenerationConfig,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
)
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniRotaryEmbedding
from transformers.utils import logging as transformers_logging

from data.question import Clip
from grpo.attention import Prefix, block_mask
from grpo.audio_cache import AudioCache
from grpo.batch import Encoded, Group
from grpo.logprob import chosen_and_entropy, logits_of
from grpo.packing import Packed, pack

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


class Head(nn.Linear):
    """The vocabulary projection; with `of`, straight to the log-probabilities of given tokens (grpo/logprob.py).

    Within the module's own call, for there DeepSpeed's ZeRO-3 has its weights together.
    """

    def forward(self, hidden: Tensor, of: tuple | None = None) -> Tensor | tuple[Tensor, Tensor]:
        return logits_of(hidden, self.weight) if of is None else chosen_and_entropy(hidden, self.weight, *of)


def prefix_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """transformers' attention interface: packed rows by grpo/attention.py, all else as transformers does it."""
    if isinstance(attention_mask, Prefix):
        return attention_mask(query, key, value, scaling), None
    if isinstance(attention_mask, BlockMask):
        return flex_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


AttentionInterface.register("prefix", prefix_attention)
AttentionMaskInterface.register("prefix", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


@dataclass(frozen=True)
class Prepared:
    """A micro-batch laid out and embedded, on the policy's device: made once, for reference, policy and all updates.

    `embeds` is None where embeddings are trained: then every forward pass makes its own from `audio`.
    """

    packed: Packed
    mask: object  # of grpo/attention.py, or bool [R, L] of rows that hold one completion each
    audio: tuple[Tensor, ...]  # [tokens, H] of each row's prompts; empty where the audio tower is trained
    prompts: tuple[Encoded, ...]
    embeds: Tensor | None  # [R, L, H]


class Policy(nn.Module):
    """A Thinker checkpoint, its processor and a LoRA adapter, or weights of its own to train.

    Args:
        path: folder (or hub name) of a Qwen2.5-Omni checkpoint, full-Omni or Thinker layout.
        processor: where its processor is, if not in `path`: published Thinkers come with a tokenizer only.
        lora: r, alpha, dropout, targets (regex over the Thinker's module names) and `seed` of A's initial values;
            None adds no adapter.
        full: without an adapter, the weights that are trained (regex over the Thinker's parameter names); None: none.
        temperature: of sampling and of all log-probabilities.
        attention: of packed rows: `sdpa` (rectangles), `flex` (FlexAttention), `auto`: flex on a GPU, else sdpa.
        zero3: DeepSpeed's configuration when weights are to be partitioned while loading, else None.
        audio_cache: of the clips' embeddings, while the audio tower is frozen.
    Raises ValueError when a regex matches nothing, or `lora.targets` matches the audio tower while `lora.audio_tower`
    is false.
    """

    def __init__(self, path, lora: Mapping | None, *, prompt, full: str | None = None, dtype="float32", temperature=1.0,
                 device="cpu", gradient_checkpointing=False, forward="shared", attention="auto", zero3=None,
                 audio_cache: AudioCache | None = None, processor=None):  # fmt: skip
        super().__init__()
        for name, value, known in (("forward", forward, ("shared", "separate")),
                                   ("attention", attention, ("auto", "sdpa", "flex"))):  # fmt: skip
            if value not in known:
                raise ValueError(f"model.{name} must be one of {', '.join(known)}, got {value!r}")
        self.prompt, self.temperature, self.layout, self.pad = prompt, float(temperature), forward, "right"
        self.flex = attention == "flex" or (attention == "auto" and torch.device(device).type == "cuda")
        self.processor = Qwen2_5OmniProcessor.from_pretrained(processor or path)
        self.tokenizer = self.processor.tokenizer
        # Must outlive the model: from_pretrained reads it to load each weight already partitioned.
        self._zero3 = HfDeepSpeedConfig(dict(zero3)) if zero3 else None
        with no_holes() if zero3 else contextlib.nullcontext():
            thinker = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
                path, dtype=getattr(torch, dtype), attn_implementation="sdpa"
            ).requires_grad_(False)
        if zero3:
            exact_frequencies(thinker)
        thinker.visual = None  # never used: no images here, and no memory for them
        thinker.model.config._attn_implementation = "prefix"  # of the language model; the audio tower keeps sdpa
        thinker.lm_head.__class__ = Head
        if gradient_checkpointing:
            thinker.gradient_checkpointing_enable({"use_reentrant": False})
        self.model = thinker if lora is None else add_lora(thinker, **lora)
        if lora is None and full is not None:
            train_weights(thinker, full)
        self.path, self.processor_path = str(path), str(processor or path)
        self.to(device)

        config = thinker.generation_config
        stop = config.eos_token_id if config.eos_token_id is not None else self.tokenizer.eos_token_id
        self.stop_ids = sorted(stop if isinstance(stop, list | tuple) else [stop])
        # A sampled placeholder would ask the model for audio that does not exist: sampler and trainer both ban them.
        special = {i for i, t in self.tokenizer.added_tokens_decoder.items() if t.special}
        unused = range(len(self.tokenizer), thinker.config.get_text_config().vocab_size)
        self.banned_ids = sorted((special | set(unused)) - set(self.stop_ids))
        # Asked now: with its adapter off, a model trains nothing.
        self.tower_trained = any(p.requires_grad for p in thinker.audio_tower.parameters())
        self.audio_cache = AudioCache() if audio_cache is None else audio_cache

    @property
    def thinker(self) -> Qwen2_5OmniThinkerForConditionalGeneration:
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def has_adapter(self) -> bool:
        return hasattr(self.model, "peft_config")

    @property
    def device(self) -> torch.device:
        return self.thinker.lm_head.weight.device

    # ---------------------------------------------------------------- question -> tensors

    def encode(self, question, clip) -> Encoded:
        """Prompt ids and log-mel features of one question, equal to what the processor makes of the pair.

        The processor pads every clip to its chunk length (300 s, 15 MB); here one FFT window of zeros is enough for
        the same frames. Without a clip: the same prompt without its audio part.
        """
        messages, audio = self.prompt.messages(question), self.processor.audio_token
        if clip is None:
            silent = [m | {"content": [part for part in m["content"] if part["type"] != "audio"]} for m in messages]
            text = self.processor.apply_chat_template(silent, tokenize=False, add_generation_prompt=True)
            return Encoded(question.id, self.tokenizer(text, return_tensors="pt")["input_ids"][0], None, "")
        extractor = self.processor.feature_extractor
        if clip.hz != extractor.sampling_rate:
            raise ValueError(f"question {question.id}: clip at {clip.hz} Hz, the model wants {extractor.sampling_rate}")
        padded = -(-(len(clip.samples) + extractor.n_fft) // extractor.hop_length) * extractor.hop_length
        features = extractor(clip.samples, sampling_rate=clip.hz, padding="max_length", max_length=padded,
                             truncation=False, return_attention_mask=True, return_tensors="pt")  # fmt: skip
        frames = int(features["attention_mask"].sum())
        _, tokens = self.thinker.audio_tower._get_feat_extract_output_lengths(torch.tensor(frames))
        if int(tokens) < 1:
            raise ValueError(f"question {question.id}: a clip of {clip.seconds * 1000:.0f} ms gives no audio token")
        text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        if text.count(audio) != 1:
            raise ValueError(f"question {question.id}: the prompt holds {text.count(audio)} audio slots instead of one")
        ids = self.tokenizer(text.replace(audio, audio * int(tokens)), return_tensors="pt")["input_ids"][0]
        return Encoded(question.id, ids, features["input_features"][0, :, :frames], clip.sha256, clip.samples)

    def encode_silence(self, question) -> Encoded:
        """The question with a second of silence, where its clip cannot be read."""
        hz = self.processor.feature_extractor.sampling_rate
        return self.encode(question, Clip(np.zeros(hz, np.float32), hz))

    # ---------------------------------------------------------------- audio

    @torch.no_grad()
    def encode_audio(self, prompts: Sequence[Encoded]) -> list[Tensor]:
        """Audio embeddings [tokens, H] of each prompt, without gradient; a clip is embedded once while it is kept.

        Each on its own, so that its numbers do not depend on what else is asked for.
        """
        if any(p.mel is None for p in prompts):  # a prompt without audio has none
            none = torch.zeros(0, self.thinker.config.get_text_config().hidden_size, device=self.device)
            heard = iter(self.encode_audio([p for p in prompts if p.mel is not None]))
            return [none if p.mel is None else next(heard) for p in prompts]
        if self.tower_trained:  # what was kept is of other weights
            return self._hear_all(prompts)
        if self.audio_cache.folder and self.audio_cache.home is None:
            self.audio_cache.of(self._tower_fingerprint())
        kept = {p.clip_sha256: self.audio_cache.get(p.clip_sha256) for p in prompts}
        missing = [p for p in {p.clip_sha256: p for p in prompts}.values() if kept[p.clip_sha256] is None]
        for p, heard in zip(missing, self._hear_all(missing, prompts), strict=True):
            kept[p.clip_sha256] = heard
            self.audio_cache.put(p.clip_sha256, heard)
        return [kept[p.clip_sha256].to(self.device) for p in prompts]

    def _hear_all(self, prompts: Sequence[Encoded], batch: Sequence[Encoded] = ()) -> list[Tensor]:
        """What is heard of each prompt. All ranks must call: where a pass needs them all, each makes as many as the one
        that makes most, the first of `batch` (default: of the prompts) filling in."""
        others = self._most(len(prompts)) - len(prompts)  # before the first: who has none must not run ahead
        heard = [self._hear(p) for p in prompts]
        for _ in range(others):
            idle = self._hear((batch or prompts)[0])
            if idle.requires_grad:  # its backward pass needs all ranks, too: by a sum to which it adds nothing
                heard[0] = heard[0] + 0 * idle.sum()
        return heard

    def _hear(self, prompt: Encoded) -> Tensor:
        mel = prompt.mel[None].to(self.device)
        mask = torch.ones(1, mel.shape[2], dtype=torch.long, device=self.device)
        return self.thinker.get_audio_features(mel, mask).last_hidden_state

    def _most(self, count: int) -> int:
        """The largest `count` of all ranks where a forward pass needs them all (ZeRO-3 gathers the tower's weights)."""
        if self._zero3 is None or not torch.distributed.is_initialized():
            return count
        counts = torch.tensor([count], device=self.device)
        torch.distributed.all_reduce(counts, torch.distributed.ReduceOp.MAX)
        return int(counts)

    def _tower_fingerprint(self) -> str:
        """Names the tower by what it does to four seconds of noise, in this dtype on this kind of device: weights that
        ZeRO-3 has partitioned cannot be read."""
        generator = torch.Generator().manual_seed(0)
        mel = torch.randn(self.thinker.audio_tower.num_mel_bins, 400, generator=generator)
        with torch.no_grad():
            heard = self._hear(Encoded("noise", torch.zeros(0), mel, ""))
        kind = f"{self.thinker.dtype} {self.device.type} {tuple(heard.shape)}"
        return hashlib.sha256(kind.encode() + heard.float().cpu().numpy().tobytes()).hexdigest()[:16]

    def embed(self, ids_RL: Tensor, audio: Sequence[Tensor]) -> Tensor:
        """Token embeddings [R, L, H] with `audio` in the placeholders, in the order in which they come."""
        embeds = self.thinker.get_input_embeddings()(ids_RL)
        is_audio = ids_RL == self.thinker.config.audio_token_id
        return embeds.masked_scatter(is_audio[..., None], torch.cat(list(audio)).to(embeds.dtype))

    def _check(self, prompts: Sequence[Encoded], audio: Sequence[Tensor]) -> None:
        for p, sound in zip(prompts, audio, strict=True):
            if (slots := int((p.prompt_ids == self.thinker.config.audio_token_id).sum())) != len(sound):
                raise ValueError(f"question {p.id}: {slots} audio placeholders for {len(sound)} audio tokens")

    # ---------------------------------------------------------------- log-probabilities

    def tokens_of(self, group: Group) -> int:
        """What a group adds to the length of the rows."""
        prompts = 1 if self.layout == "shared" else len(group.completions)
        return prompts * len(group.prompt.prompt_ids) + sum(len(c.token_ids) for c in group.completions)

    def prepare(self, groups: Sequence[Group], audio: Sequence[Tensor] | None = None) -> Prepared:
        """Lay out a micro-batch. `audio`: what `encode_audio` gave for its prompts (None: asked for here)."""
        prompts, device = [g.prompt for g in groups], self.device
        audio = self.encode_audio(prompts) if audio is None else audio
        self._check(prompts, audio)
        if any(self.thinker.config.audio_token_id in c.token_ids for g in groups for c in g.completions):
            raise ValueError("a completion holds audio placeholders, for which there is no audio: the sampler must ban "
                             "the policy's banned_ids")  # fmt: skip
        flex = self.flex and self.layout == "shared"
        packed = pack([p.prompt_ids for p in prompts], [[c.token_ids for c in g.completions] for g in groups],
                      forward=self.layout, pad=self.pad, multiple=128 if flex else 1)  # fmt: skip
        if flex:
            mask = block_mask(packed.blocks, packed.ids_RL.shape[1], device)
        else:
            mask = Prefix(packed.blocks, device) if self.layout == "shared" else packed.mask_RL.to(device)
        packed = packed.to(device)
        order = packed.prompt_of_block
        fixed = not (self.tower_trained or self.thinker.get_input_embeddings().weight.requires_grad)
        with torch.no_grad():
            embeds = self.embed(packed.ids_RL, [audio[b] for b in order]) if fixed else None
        return Prepared(packed, mask, tuple(audio[b] for b in order), tuple(prompts[b] for b in order), embeds)

    def forward(self, batch: Prepared, entropy_gradient: bool = False) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of each completion token, [N, T] each, zeros behind each completion's end.

        The entropy carries a gradient only with `entropy_gradient`.

        Only hidden states that predict a completion token pass through the vocabulary projection.
        """
        packed, embeds = batch.packed, batch.embeds
        if embeds is None:
            audio = self._hear_all(batch.prompts) if self.tower_trained else batch.audio
            embeds = self.embed(packed.ids_RL, audio)
        hidden = self.thinker.model(
            inputs_embeds=embeds,
            attention_mask={"full_attention": batch.mask} if self.layout == "shared" else batch.mask,
            position_ids=packed.position_RL[None].expand(3, -1, -1),
            use_cache=False,
        ).last_hidden_state
        hidden_M = hidden.flatten(0, 1)[packed.predictor_M]
        of = packed.target_M, self.temperature, self.banned_ids, entropy_gradient
        logp_M, entropy_M = self.thinker.lm_head(hidden_M, of)
        lengths = torch.tensor(packed.lengths_N, device=self.device)
        mask_NT = torch.arange(max(packed.lengths_N), device=self.device)[None] < lengths[:, None]
        zeros = logp_M.new_zeros(mask_NT.shape)
        return zeros.masked_scatter(mask_NT, logp_M), zeros.masked_scatter(mask_NT, entropy_M)

    def reference(self):
        """Context in which the model is the reference policy: the same weights with the adapter off."""
        return self.model.disable_adapter() if hasattr(self.model, "disable_adapter") else contextlib.nullcontext()

    # ---------------------------------------------------------------- generation

    def generate(self, prompts: Sequence[Encoded], copies: int, choose, max_tokens: int) -> list[list[int]]:
        """`copies` completions of each prompt through transformers' generate; `choose(ids, logits)` decides tokens.

        `choose` maps logits [N, V] to scores whose argmax is taken, so that seeded sampling needs no global random
        state. Returns N token id lists, cut behind the first stop token.
        """
        length = max(len(p.prompt_ids) for p in prompts)
        ids = torch.zeros(len(prompts), length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, m, p in zip(ids, mask, prompts, strict=True):  # generate wants the padding on the left
            row[length - len(p.prompt_ids) :] = p.prompt_ids
            m[length - len(p.prompt_ids) :] = 1
        mask = mask.to(self.device)
        with torch.no_grad():
            audio = self.encode_audio(prompts)
            self._check(prompts, audio)
            embeds = self.embed(ids.to(self.device), audio)
            # The prompt is computed once per question, all but its last token; copies start from its keys and values.
            cache = DynamicCache(config=self.thinker.config.get_text_config())
            position = (mask.cumsum(-1) - 1).clamp_min(0)[None].expand(3, -1, -1)
            self.thinker.model(inputs_embeds=embeds[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache,
                               position_ids=position[..., :-1], use_cache=True)  # fmt: skip
            cache.batch_repeat_interleave(copies)
            self.thinker.rope_deltas = torch.zeros(len(ids) * copies, 1, dtype=torch.long, device=self.device)
            out = self.thinker.generate(
                inputs_embeds=embeds.repeat_interleave(copies, 0),
                attention_mask=mask.repeat_interleave(copies, 0),
                past_key_values=cache,
                logits_processor=[choose],
                # A config of our own: the checkpoint's may carry a repetition penalty or top-k, which bias the ratio.
                generation_config=GenerationConfig(
                    do_sample=False, max_new_tokens=max_tokens, eos_token_id=self.stop_ids,
                    pad_token_id=self.stop_ids[0],
                ),
            )  # fmt: skip
        return [self._cut(row) for row in out.tolist()]

    def _cut(self, ids: list[int]) -> list[int]:
        stop = next((t for t, i in enumerate(ids) if i in self.stop_ids), None)
        return ids if stop is None else ids[: stop + 1]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a completion without its stop token; other special tokens stay visible."""
        ids = list(ids[:-1] if ids and ids[-1] in self.stop_ids else ids)
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    # ---------------------------------------------------------------- adapter

    def adapter(self) -> dict[str, Tensor]:
        """LoRA tensors by peft's own names, detached, on the CPU."""
        return {k: v.detach().cpu().contiguous() for k, v in get_peft_model_state_dict(self.model).items()}

    def load_adapter(self, tensors: Mapping[str, Tensor]) -> None:
        """Put LoRA tensors back. Raises ValueError if any is missing, unknown or of another shape."""
        mine = {k: v.shape for k, v in get_peft_model_state_dict(self.model).items()}
        theirs = {k: v.shape for k, v in tensors.items()}
        if mine != theirs:
            odd = sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))
            raise ValueError(f"adapter does not fit the model: {len(odd)} tensors differ, first {odd[0]!r}")
        set_peft_model_state_dict(self.model, dict(tensors))

    def save_adapter(self, folder: Path) -> None:
        """peft's own layout (adapter_config.json + adapter_model.safetensors), loadable without this project."""
        self.model.save_pretrained(folder, safe_serialization=True)


def add_lora(thinker, *, r, alpha, dropout, targets, seed=0, audio_tower=False):
    """LoRA on the modules whose full name matches the regex `targets`; B starts at zero, so the policy starts as the
    reference.

    A bare suffix such as `q_proj` names the audio tower's attention too; that is an error unless `audio_tower` allows.
    """
    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, bias="none")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the same A on every rank
        model = get_peft_model(thinker, config, autocast_adapter_dtype=False)
    hit = model.base_model.targeted_module_names
    if (stray := [name for name in hit if name.startswith(("audio_tower", "visual"))]) and not audio_tower:
        raise ValueError(f"model.lora.targets={targets!r} also matches the audio tower ({stray[0]} and "
                         f"{len(stray) - 1} more); anchor it: 'model\\.layers\\.\\d+\\..*'")  # fmt: skip
    return model


@contextlib.contextmanager
def no_holes():
    """Large blocks go back to the system when freed. Under ZeRO-3 each weight is whole for a moment before its part is
    kept; in between them glibc's heap would keep holes as large as the model."""
    mallopt, threshold = getattr(ctypes.CDLL(None), "mallopt", None), -3  # M_MMAP_THRESHOLD; musl has none
    if mallopt is None:
        yield
        return
    mallopt(threshold, 2**18)
    try:
        yield
    finally:
        mallopt(threshold, 2**25)  # the largest to which it grows by itself: fast for activations


def exact_frequencies(thinker) -> None:
    """Rotary frequencies in float32. Where weights are partitioned while loading, DeepSpeed makes all that is computed
    meanwhile bfloat16 with them: 1,000 tokens on, a frequency that is off by 0.4 % points into another direction."""
    for module in thinker.modules():
        if isinstance(module, Qwen2_5OmniRotaryEmbedding):
            for name, exact in type(module)(module.config).named_buffers():
                getattr(module, name).data = exact


def train_weights(thinker, full: str) -> None:
    """Train the weights whose whole name matches the regex `full`. Raises ValueError if none does."""
    chosen = [p for name, p in thinker.named_parameters() if re.fullmatch(full, name)]
    if not chosen:
        raise ValueError(f"model.full={full!r} matches no weight of the model: 'model\\..*|lm_head\\..*' are those of "
                         f"the language model")  # fmt: skip
    for p in chosen:
        p.requires_grad_(True)


def on_meta(shape, lora: Mapping | None, full: str | None, dtype: str) -> nn.Module:
    """The language model of a Thinker of `shape` (grpo/sync/traffic.py), weightless, trained as given.

    For grpo/plan.py, which counts what its forward pass keeps.
    """
    text = dict(
        hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, vocab_size=shape.vocab,
        max_position_embeddings=32768, tie_word_embeddings=False,
        rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=_sections(shape.head_dim)),
    )  # fmt: skip
    small = dict(d_model=64, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=64, output_dim=shape.hidden)
    vision = dict(depth=1, hidden_size=64, intermediate_size=64, num_heads=2, fullatt_block_indexes=[0])
    config = Qwen2_5OmniThinkerConfig(text_config=text, audio_config=small, vision_config=vision)
    with torch.device("meta"):
        thinker = Qwen2_5OmniThinkerForConditionalGeneration(config).to(getattr(torch, dtype)).requires_grad_(False)
        thinker.visual = None
        thinker.model.config._attn_implementation = "prefix"
        thinker.lm_head.__class__ = Head
        if lora is not None:
            add_lora(thinker, **lora)
        elif full is not None:
            train_weights(thinker, full)
    return thinker.train()


def _sections(head_dim: int) -> list[int]:
    """Rotary sections of Qwen2.5-Omni's proportions, which add up to half a head."""
    quarter = head_dim // 8
    return [quarter, (head_dim // 2 - quarter) // 2, head_dim // 2 - quarter - (head_dim // 2 - quarter) // 2]
