"""The policy: Qwen2.5-Omni's Thinker with LoRA. The only door to transformers and peft (with grpo/tiny.py).

One packed row holds a prompt (its audio embedded once) and one or all of its completions; a completion token sees the
prompt and the earlier tokens of its own completion, nothing else. `forward="shared"` puts a whole group in a row,
`forward="separate"` one completion a row: same numbers, more work.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MethodType

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    GenerationConfig,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerForConditionalGeneration,
)
from transformers.integrations import HfDeepSpeedConfig
from transformers.utils import logging as transformers_logging

from grpo.batch import Encoded, Group
from grpo.logprob import chosen_and_entropy

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


@dataclass(frozen=True)
class Packed:
    """Rows of prompt + completions, padded to one length L. `position` is the rotary position: all three axes agree."""

    ids_RL: Tensor
    segment_RL: Tensor  # 0 prompt, 1.. completion, -1 padding
    position_RL: Tensor
    predictor_M: Tensor  # flat index into R*L of the token that predicts each completion token, completions in order
    target_M: Tensor  # the predicted token ids
    lengths_N: tuple[int, ...]  # tokens of each completion
    row_of_prompt: tuple[int, ...]  # which prompt fills row r


def pack(prompts: Sequence[Tensor], completions: Sequence[Sequence[Sequence[int]]], *, forward="shared", pad="right"):
    """Lay prompts [P_b] and their completions (B lists of token id lists) out in rows. See `Packed`."""
    rows: list[tuple[int, list[Sequence[int]]]] = []
    for b, answers in enumerate(completions):
        rows += [(b, list(answers))] if forward == "shared" else [(b, [answer]) for answer in answers]
    length = max(len(prompts[b]) + sum(map(len, answers)) for b, answers in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    segment = torch.full_like(ids, -1)
    position = torch.zeros_like(ids)
    predictor, target, lengths = [], [], []
    for r, (b, answers) in enumerate(rows):
        size = len(prompts[b]) + sum(map(len, answers))
        start = 0 if pad == "right" else length - size
        cursor = start + len(prompts[b])
        ids[r, start:cursor] = prompts[b]
        segment[r, start:cursor] = 0
        position[r, start:cursor] = torch.arange(len(prompts[b]))
        last_of_prompt = r * length + cursor - 1
        for s, answer in enumerate(answers, start=1):
            end = cursor + len(answer)
            ids[r, cursor:end] = torch.as_tensor(answer, dtype=torch.long)
            segment[r, cursor:end] = s
            position[r, cursor:end] = len(prompts[b]) + torch.arange(len(answer))
            predictor += [last_of_prompt, *range(r * length + cursor, r * length + end - 1)][: len(answer)]
            target += list(answer)
            lengths.append(len(answer))
            cursor = end
    return Packed(
        ids, segment, position, torch.tensor(predictor, dtype=torch.long), torch.tensor(target, dtype=torch.long),
        tuple(lengths), tuple(b for b, _ in rows),
    )  # fmt: skip


def float32_head(lm_head: nn.Linear, hidden: Tensor) -> Tensor:
    """Logits [..., V] in float32 whatever the weights' dtype: rounded to bfloat16 they alone move a log-probability by
    0.03. The rollout engines do the same (MiniMax-M1, arXiv 2506.13585, section 3.2)."""
    return torch.nn.functional.linear(hidden.float(), lm_head.weight.float())


def attention_bias(segment_RL: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive attention mask [R, 1, L, L]: causal, prompt visible to all, completions blind to each other.

    Every position sees itself, so that a padding row has a finite softmax.
    """
    length = segment_RL.shape[1]
    index = torch.arange(length, device=segment_RL.device)
    causal = index[None, :] <= index[:, None]
    key, query = segment_RL[:, None, :], segment_RL[:, :, None]
    visible = causal & ((key == 0) | (key == query)) & (key >= 0)
    visible |= torch.eye(length, dtype=torch.bool, device=segment_RL.device)
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, float("-inf"))[:, None]


class Policy(nn.Module):
    """A Thinker checkpoint, its processor and a LoRA adapter.

    Args:
        path: folder (or hub name) of a Qwen2.5-Omni checkpoint, full-Omni or Thinker layout.
        processor: where its processor is, if not in `path`: published Thinkers come with a tokenizer only.
        lora: r, alpha, dropout, targets (regex over the Thinker's module names) and `seed` of A's initial values;
            None leaves the model as it is.
        temperature: of sampling and of all log-probabilities.
        zero3: DeepSpeed's configuration when weights are to be partitioned while loading, else None.
    Raises ValueError when the LoRA regex matches nothing, or matches the audio tower while `lora.audio_tower` is false.
    """

    def __init__(self, path, lora: Mapping | None, *, prompt, dtype="float32", temperature=1.0, device="cpu",
                 gradient_checkpointing=False, forward="shared", attention="sdpa", zero3=None,
                 processor=None):  # fmt: skip
        super().__init__()
        if forward not in ("shared", "separate"):
            raise ValueError(f"model.forward must be 'shared' or 'separate', got {forward!r}")
        self.prompt, self.temperature, self.layout, self.pad = prompt, float(temperature), forward, "right"
        self.processor = Qwen2_5OmniProcessor.from_pretrained(processor or path)
        self.tokenizer = self.processor.tokenizer
        # Must outlive the model: from_pretrained reads it to load each weight already partitioned.
        self._zero3 = HfDeepSpeedConfig(dict(zero3)) if zero3 else None
        thinker = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
            path, dtype=getattr(torch, dtype), attn_implementation=attention
        ).requires_grad_(False)
        thinker.visual = None  # never used: no images here, and no memory for them
        thinker.lm_head.forward = MethodType(float32_head, thinker.lm_head)
        if gradient_checkpointing:
            thinker.gradient_checkpointing_enable({"use_reentrant": False})
        self.model = thinker if lora is None else add_lora(thinker, **lora)
        self.to(device)

        config = thinker.generation_config
        stop = config.eos_token_id if config.eos_token_id is not None else self.tokenizer.eos_token_id
        self.stop_ids = sorted(stop if isinstance(stop, list | tuple) else [stop])
        # A sampled placeholder would ask the model for audio that does not exist: sampler and trainer both ban them.
        special = {i for i, t in self.tokenizer.added_tokens_decoder.items() if t.special}
        unused = range(len(self.tokenizer), thinker.config.get_text_config().vocab_size)
        self.banned_ids = sorted((special | set(unused)) - set(self.stop_ids))

    @property
    def thinker(self) -> Qwen2_5OmniThinkerForConditionalGeneration:
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

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

    def encode_audio(self, prompts: Sequence[Encoded]) -> list[Tensor]:
        """Audio embeddings [tokens, hidden] of each prompt, none without a clip. No gradient: the tower is frozen."""
        none = torch.zeros(0, self.thinker.config.get_text_config().hidden_size, device=self.device)
        if not (heard := [p for p in prompts if p.mel is not None]):
            return [none] * len(prompts)
        frames = torch.tensor([p.mel.shape[1] for p in heard])
        mel = torch.zeros(len(heard), heard[0].mel.shape[0], int(frames.max()))
        for row, p in zip(mel, heard, strict=True):
            row[:, : p.mel.shape[1]] = p.mel
        mask = (torch.arange(mel.shape[2])[None] < frames[:, None]).long()
        with torch.no_grad():
            out = self.thinker.get_audio_features(mel.to(self.device), mask.to(self.device)).last_hidden_state
        _, tokens = self.thinker.audio_tower._get_feat_extract_output_lengths(frames)
        parts = iter(out.split(tokens.tolist()))
        return [none if p.mel is None else next(parts) for p in prompts]

    def embed(self, ids_RL: Tensor, audio: Sequence[Tensor]) -> Tensor:
        """Token embeddings [R, L, H] with each row's audio put in its placeholders. `audio` has one entry a row."""
        embeds = self.thinker.get_input_embeddings()(ids_RL)
        is_audio = ids_RL == self.thinker.config.audio_token_id
        if wrong := [r for r, a in enumerate(audio) if int(is_audio[r].sum()) != len(a)]:
            raise ValueError(f"row {wrong[0]}: {int(is_audio[wrong[0]].sum())} audio placeholders for "
                             f"{len(audio[wrong[0]])} audio tokens")  # fmt: skip
        return embeds.masked_scatter(is_audio[..., None], torch.cat(list(audio)).to(embeds.dtype))

    # ---------------------------------------------------------------- log-probabilities

    def forward(self, groups: Sequence[Group], audio: Sequence[Tensor],
                entropy_gradient: bool = False) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Log-probability and entropy of each completion token, [N, T] each, zeros behind each completion's end.

        The entropy carries a gradient only with `entropy_gradient`.

        Only hidden states that predict a completion token pass through the vocabulary projection.
        """
        packed = pack([g.prompt.prompt_ids for g in groups], [[c.token_ids for c in g.completions] for g in groups],
                      forward=self.layout, pad=self.pad)  # fmt: skip
        device = self.device
        embeds = self.embed(packed.ids_RL.to(device), [audio[b] for b in packed.row_of_prompt])
        hidden = self.thinker.model(
            inputs_embeds=embeds,
            attention_mask=attention_bias(packed.segment_RL.to(device), embeds.dtype),
            position_ids=packed.position_RL.to(device)[None].expand(3, -1, -1),
            use_cache=False,
        ).last_hidden_state
        hidden_M = hidden.flatten(0, 1)[packed.predictor_M.to(device)]
        logp_M, entropy_M = chosen_and_entropy(
            self.thinker.lm_head(hidden_M),
            packed.target_M.to(device),
            self.temperature,
            self.banned_ids,
            entropy_gradient,
        )
        width = max(packed.lengths_N)
        mask_NT = torch.arange(width, device=device)[None] < torch.tensor(packed.lengths_N, device=device)[:, None]
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
            embeds = self.embed(ids.to(self.device), self.encode_audio(prompts))
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
