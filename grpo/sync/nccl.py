"""sync=full between GPUs by vLLM's own NCCL weight transfer, fed from ZeRO-3 a layer at a time. A door to vllm.

For a server on another GPU: rank 0 broadcasts to the server's workers, nothing passes through host memory. An engine in
the trainer's process needs none of this: it is given the tensors themselves.

WRITTEN AGAINST vLLM 0.32's interface, NOT YET RUN: it needs two GPUs. Only `Source` is tested, on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo


class Source(WeightSource):
    """A trainer's weights, one layer gathered at a time. All ranks iterate in lockstep: gathering is a collective."""

    def __init__(self, engine, layers: Sequence[Sequence]):
        self.engine, self.layers = engine, layers  # grpo.sync.full.Weight by layer

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(w.name, w.base.dtype, tuple(getattr(w.base, "ds_shape", w.base.shape)))
                for layer in self.layers for w in layer]  # fmt: skip

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for layer in self.layers:
            with self.engine.gathered([p for weight in layer for p in weight.parameters]):
                # Copies: the sender packs them into buffers that outlive the gathered layer.
                tensors = {weight.name: weight.tensor().clone() for weight in layer}
            yield from tensors.items()


class Broadcast:
    """The trainer's end. `rollout.weight_client()` talks to one server started with a weight-transfer backend of nccl.

    Every rank builds one and calls `send`; rank 0 is the sender.
    """

    def __init__(self, engine, rollout, *, address: str, port: int):
        if not hasattr(rollout, "weight_client"):
            raise ValueError(
                "transport=nccl wants a rollout engine that offers vLLM's weight transfer (a weight_client)"
            )
        workers = len(rollout.call("bridge_version")) if engine.rank == 0 else 0
        self.source = Source(engine, [])
        info = NCCLTrainerInitInfo(address, port, world_size=1 + workers, rank=engine.rank)
        client = rollout.weight_client() if engine.rank == 0 else None
        self.transfer = WeightTransferTrainerFactory.trainer_init(info, client=client, source=self.source)

    def send(self, layers: Sequence[Sequence]) -> None:
        """Start, update and finish one weight update with these layers, fused groups whole."""
        self.source.layers = layers
        self.transfer.send_weights()
