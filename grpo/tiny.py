"""A tiny Qwen2.5-Omni checkpoint, randomly initialised and deterministic: the real classes, processor and layout.

The folder has the full-Omni layout (a `Qwen2_5OmniConfig`, tensor names with the prefix `thinker.`), which is the one
that transformers and vLLM both load. With grpo/policy.py this is the only importer of transformers.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    Qwen2_5OmniConfig,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    WhisperFeatureExtractor,
)

from data.audio import ClipError
from grpo import warmstart
from grpo.config import ConfigError

# The special tokens of Qwen2.5-Omni, in its spelling.
NAMED = {
    "image_token": "<|IMAGE|>", "audio_token": "<|AUDIO|>", "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>", "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>",
}  # fmt: skip
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *NAMED.values()]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'audio' or part['type'] == 'input_audio' or part['type'] == 'audio_url' %}"
    "<|audio_bos|><|AUDIO|><|audio_eos|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Qwen2's split into words, numbers and punctuation before byte-pair merging.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int, filled: int = 0) -> Qwen2Tokenizer:
    """Byte-level BPE in Qwen2's form, trained on `texts`; made up to `filled` words that no text contains."""
    raw = Tokenizer(models.BPE())
    raw.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    raw.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    )
    state = json.loads(raw.to_str())["model"]
    state["vocab"] |= {f"filler{i}": i for i in range(len(state["vocab"]), filled)}
    tokenizer = Qwen2Tokenizer(
        vocab=state["vocab"], merges=[tuple(m) for m in state["merges"]],
        unk_token=None, bos_token=None, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=NAMED,
    )  # fmt: skip
    missing = [t for t in SPECIAL if tokenizer.convert_tokens_to_ids(t) is None]
    tokenizer.add_special_tokens({"additional_special_tokens": missing})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build(folder: Path, texts: Iterable[str], *, hidden=128, layers=2, audio_hidden=256, audio_layers=1, vocab_size=640,
          max_seconds=10, seed=0, filled=0) -> None:  # fmt: skip
    """Write a checkpoint into `folder`; same arguments, same bytes. ConfigError if hidden is no multiple of 32."""
    if hidden % 32:
        raise ConfigError(f"model.tiny.build.hidden must be a multiple of 32 (the head size), got {hidden}")
    tokenizer = train_tokenizer(texts, vocab_size, filled)
    ids = {t: tokenizer.convert_tokens_to_ids(t) for t in SPECIAL}
    extractor = WhisperFeatureExtractor(
        feature_size=128, sampling_rate=16000, hop_length=160, n_fft=400, chunk_length=max_seconds,
        return_attention_mask=True,
    )  # fmt: skip
    Qwen2_5OmniProcessor(
        image_processor=Qwen2VLImageProcessor(), video_processor=Qwen2VLVideoProcessor(), feature_extractor=extractor,
        tokenizer=tokenizer, chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip

    heads = hidden // 32
    config = Qwen2_5OmniThinkerConfig(
        audio_config=dict(num_mel_bins=128, encoder_layers=audio_layers, encoder_attention_heads=audio_hidden // 32,
                          encoder_ffn_dim=2 * audio_hidden, d_model=audio_hidden, output_dim=hidden, n_window=100,
                          max_source_positions=1500),
        vision_config=dict(depth=1, hidden_size=64, intermediate_size=64, num_heads=2, out_hidden_size=hidden,
                           fullatt_block_indexes=[0]),
        text_config=dict(vocab_size=-(-len(tokenizer) // 64) * 64, hidden_size=hidden, intermediate_size=2 * hidden,
                         num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=max(1, heads // 2),
                         max_position_embeddings=4096, tie_word_embeddings=False,
                         rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[4, 6, 6]),
                         bos_token_id=ids["<|endoftext|>"], eos_token_id=ids["<|im_end|>"],
                         pad_token_id=ids["<|endoftext|>"]),
        audio_token_index=ids["<|AUDIO|>"], image_token_index=ids["<|IMAGE|>"], video_token_index=ids["<|VIDEO|>"],
        audio_start_token_id=ids["<|audio_bos|>"], audio_end_token_id=ids["<|audio_eos|>"],
        vision_start_token_id=ids["<|vision_bos|>"], vision_end_token_id=ids["<|vision_eos|>"],
        user_token_id=ids["<|im_start|>"],
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5OmniThinkerForConditionalGeneration(config).float().eval()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.dim() >= 2:  # variance kept from layer to layer, so that the frozen tower passes sound on
                    p.normal_(0, 0.05 if "embed" in name else p[0].numel() ** -0.5)
    centre_audio(model, extractor, seed)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    save_full_omni(model, folder)


@torch.no_grad()
def centre_audio(
    model: Qwen2_5OmniThinkerForConditionalGeneration, extractor: WhisperFeatureExtractor, seed: int
) -> None:
    """Shift and scale the tower's projection so that its output has mean 0 and variance 1 over noise and plain tones.

    A data-dependent initialisation (as in LSUV, arXiv 1511.06422), blind to any label: a random tower's output is else
    one large constant vector with the sound as a small ripple on it.
    """
    rng = np.random.default_rng(seed)
    time = np.arange(16000) / 16000
    waves = [0.3 * rng.standard_normal(16000) for _ in range(12)]
    waves += [
        0.3 * np.sin(2 * np.pi * f * time) + 0.003 * rng.standard_normal(16000) for f in rng.uniform(200, 4000, 12)
    ]
    features = extractor([w.astype(np.float32) for w in waves], sampling_rate=16000, padding="longest",
                         return_attention_mask=True, return_tensors="pt")  # fmt: skip
    out = model.get_audio_features(features["input_features"], features["attention_mask"]).last_hidden_state
    projection = model.audio_tower.proj
    scale = (out - out.mean(0)).square().mean().rsqrt()
    projection.bias.copy_((projection.bias - out.mean(0)) * scale)
    projection.weight.mul_(scale)


def save_full_omni(model: Qwen2_5OmniThinkerForConditionalGeneration, folder: Path) -> None:
    """Write config and weights of a Thinker in the full-Omni layout."""
    folder = Path(folder)
    config = Qwen2_5OmniConfig(thinker_config=model.config.to_dict(), enable_audio_output=False).to_dict()
    config |= {"architectures": ["Qwen2_5OmniForConditionalGeneration"], "dtype": "float32"}
    for unused in ("talker_config", "token2wav_config"):
        config.pop(unused, None)
    (folder / "config.json").write_text(json.dumps(config, indent=1, default=str))
    model.generation_config.save_pretrained(folder)
    tensors = {f"thinker.{k}": v.contiguous() for k, v in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# Sizes of Qwen2.5-Omni-7B's Thinker, by their names in its config (huggingface.co/Qwen/Qwen2.5-Omni-7B).
SEVEN_B = {
    "text_config": dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
                        num_key_value_heads=4, vocab_size=152064, max_position_embeddings=32768,
                        rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24])),
    "audio_config": dict(d_model=1280, encoder_layers=32, encoder_attention_heads=20, encoder_ffn_dim=5120,
                         output_dim=3584),
    "vision_config": dict(out_hidden_size=3584),
}  # fmt: skip
FILLED = 151_643  # words of Qwen's tokenizer; the rest of the vocabulary is never sampled


def random_checkpoint(folder: Path, sizes: Mapping = SEVEN_B, filled: int = FILLED, dtype=torch.bfloat16) -> None:
    """A checkpoint of the true shapes with random weights, to measure speed and memory with; kept if it is there.

    Weights are written layer by layer (15 GB at full size). Its words are meaningless beyond the tiny tokenizer's.
    """
    folder = Path(folder)
    if (folder / "model.safetensors.index.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    build(folder, ["no words"], hidden=64, layers=1, audio_hidden=32, filled=filled)  # processor and tokenizer
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    for part, values in sizes.items():
        config["thinker_config"][part] |= values
    config["thinker_config"]["text_config"].pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")}))
    with torch.device("meta"):
        model = Qwen2_5OmniThinkerForConditionalGeneration(Qwen2_5OmniConfig.from_pretrained(folder).thinker_config)
    shards: dict[str, dict] = {}
    for name, tensor in model.state_dict().items():
        layer = re.match(r"(.*?\.\d+)\.", name)
        shards.setdefault(layer[1] if layer else "rest", {})[f"thinker.{name}"] = tensor.shape
    index, generator = {}, torch.Generator().manual_seed(0)
    for i, shapes in enumerate(shards.values()):
        file = f"model-{i:05d}.safetensors"
        made = {n: torch.randn(s, generator=generator).mul_(0.02).to(dtype) for n, s in shapes.items()}
        made |= {n: torch.ones(s, dtype=dtype) for n, s in shapes.items() if len(s) == 1 and n.endswith("norm.weight")}
        save_file(made, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(made, file)
    write = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(write))  # last: a half-made one is made anew


def corpus(questions: Iterable, prompt) -> list[str]:
    """What the tokenizer is trained on: the prompts and options of the data set, and the lessons of the warm start."""
    texts = [f"<think>{t}</think>\n<semantic_elements>{e}</semantic_elements>\n"
             for t in warmstart.THOUGHTS for e in warmstart.ELEMENTS]  # fmt: skip
    for question in questions:
        texts += [part["text"] for m in prompt.messages(question) for part in m["content"] if "text" in part]
        texts += [f"<answer>{choice}</answer>" for choice in question.choices]
    return texts


def prepared(cache: Path, spec: dict, dataset, prompt, *, report: Callable[[int, float], None]) -> Path:
    """Folder of a built and warm-started tiny model in `cache`; made once per (spec, texts).

    The warm start sees prompts and clips of the training questions but its answers are drawn at random.
    """
    from grpo.policy import Policy

    texts, seed = corpus(dataset.train[:500], prompt), spec["seed"]
    code = [Path(file).read_text() for file in (__file__, warmstart.__file__)]
    made_from = json.dumps([spec, texts, dataset.audio, *code])
    folder = Path(cache) / f"tiny-{hashlib.sha256(made_from.encode()).hexdigest()[:16]}"
    if folder.exists():
        return folder
    temporary = folder.with_name(f".{folder.name}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    build(temporary, texts, seed=seed, **spec["build"])
    policy = Policy(temporary, None, prompt=prompt)
    encoded: dict[str, object] = {}

    def encode(question):
        if question.id not in encoded:
            try:
                encoded[question.id] = policy.encode(question, dataset.clip(question))
            except ClipError:  # its answers are drawn at random: what is heard is no matter here
                encoded[question.id] = policy.encode_silence(question)
        return encoded[question.id]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        warmstart.warm_start(policy, dataset.train[:256], encode, **spec["warm_start"], seed=seed, report=report)
    weights = load_file(temporary / "model.safetensors")  # the policy has no vision tower: its weights stay as built
    weights |= {f"thinker.{k}": v.contiguous() for k, v in policy.thinker.state_dict().items()}
    save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
    try:
        os.replace(temporary, folder)
    except OSError:  # another process was faster: its bytes are the same
        shutil.rmtree(temporary)
    return folder
