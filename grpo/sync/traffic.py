"""How many bytes a sync moves, from the shapes of a model alone: `python -m grpo.sync.traffic` for Qwen2.5-Omni-7B.

A test compares it with what real syncs of the tiny model report, byte for byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from grpo.sync.names import group_of


@dataclass(frozen=True)
class Shape:
    """Sizes of a Thinker, by their names in its config."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    audio_layers: int
    audio_hidden: int
    audio_intermediate: int
    mel_bins: int = 128

    def matrices(self) -> dict[str, tuple[int, int]]:
        """The projections of one decoder layer: (out, in)."""
        q, kv, h, m = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.hidden, self.intermediate
        return {"q_proj": (q, h), "k_proj": (kv, h), "v_proj": (kv, h), "o_proj": (h, q),
                "gate_proj": (m, h), "up_proj": (m, h), "down_proj": (h, m)}  # fmt: skip

    def weights(self, projection: str) -> int:
        """Of one projection; q, k and v have biases."""
        rows, columns = self.matrices()[projection]
        return rows * columns + (rows if projection in ("q_proj", "k_proj", "v_proj") else 0)

    def audio_weights(self) -> int:
        """Of the audio tower: two convolutions, its layers (k has no bias), norm, projection, two marker embeddings."""
        d, f = self.audio_hidden, self.audio_intermediate
        layer = 4 * d * d + 3 * d + 2 * d * f + f + d + 4 * d
        return 3 * self.mel_bins * d + d + 3 * d * d + d + self.audio_layers * layer + 2 * d \
            + d * self.hidden + self.hidden + 2 * self.hidden  # fmt: skip

    def all_weights(self) -> int:
        """What an audio-only engine holds: language model (head not tied to the embedding) and audio tower."""
        layer = sum(self.weights(p) for p in self.matrices()) + 2 * self.hidden
        return self.layers * layer + self.hidden + 2 * self.vocab * self.hidden + self.audio_weights()


# huggingface.co/Qwen/Qwen2.5-Omni-7B, config.json, thinker_config
OMNI_7B = Shape(hidden=3584, layers=28, heads=28, kv_heads=4, head_dim=128, intermediate=18944, vocab=152064,
                audio_layers=32, audio_hidden=1280, audio_intermediate=5120)  # fmt: skip


def sync_bytes(shape: Shape, targets: Sequence[str], r: int, itemsize: int = 2) -> dict[str, int]:
    """Bytes of one sync for each strategy. `targets`: projections with LoRA of rank r, in every layer."""
    lora = shape.layers * sum(r * sum(shape.matrices()[target]) for target in targets)
    sent = {member for target in targets for member in group_of(f"layer.{target}")}
    groups = shape.layers * sum(shape.weights(member.removeprefix("layer.")) for member in sent)
    counts = {"adapter": lora, "delta": lora, "full": groups, "full, first": shape.all_weights()}
    return {name: count * itemsize for name, count in counts.items()}


if __name__ == "__main__":
    for name, size in sync_bytes(OMNI_7B, ["q_proj", "v_proj"], r=8).items():
        print(f"{name:12} {size:>15,} bytes")
