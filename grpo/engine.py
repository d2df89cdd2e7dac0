"""Backward, reduce, clip and step: the only door to DeepSpeed.

One place knows what DeepSpeed divides by. Losses arrive as shares of the whole step's loss (grpo/loss/aggregate.py), so
shares must be SUMMED over micro-batches and ranks; DeepSpeed averages over ranks, which `backward` undoes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it had to guess

import deepspeed
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from grpo.config import zero_stage
from grpo.watch import WATCH

# The shared-memory collectives need a compiler at run time and change no number; gloo is enough on CPU.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

REDUCE_BUCKET = 50_000_000  # gradients that travel at once
STEP_AT_ONCE = 50_000_000  # weights of a rank that stage 3 steps at once: as many, and the last of them whole
LIVE = 1_000_000_000


def start_distributed(watch: Mapping[str, float] | None = None) -> tuple[int, int]:
    """Join the process group of torchrun, or make one of a single process. Returns (rank, world size).

    `watch`: the limits of grpo/watch.py, by which the ranks look after each other.
    """
    store = None
    if "RANK" not in os.environ:
        store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)  # on a port that it finds for itself
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(store.port))  # fmt: skip
    if torch.cuda.is_available():  # before anything is made there: else every rank works on the first GPU
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        # What bounds the waiting is the watch, which knows for whom, and does not count what a suspended job sleeps.
        limit = timedelta(seconds=24 * 3600 if watch else 1800)
        if store is not None:
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=limit)
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=limit)
    rank, world = dist.get_rank(), dist.get_world_size()
    if watch:
        WATCH.start(rank, world, **watch)
    return rank, world


def stop_distributed() -> None:
    """Part from the other ranks once all have come here: a gloo thread alive at exit may abort its process."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
        WATCH.stop()
        dist.barrier()  # rank 0 may hold the store
        dist.destroy_process_group()


def zero_config(*, stage: int, clip: float, dtype: str, world: int, offload: bool = False, live: int = LIVE) -> dict:
    """DeepSpeed's configuration. Every default that changes numbers is set on purpose.

    `stage`: `engine.stage`, of which `zero_stage` makes DeepSpeed's. `offload`: weights and optimizer state wait in the
    host's memory, and the optimizer steps there. ValueError below stage 3. `live`: weights that stage 3 may leave
    gathered, for their next use.
    """
    if offload and stage != 3:
        raise ValueError(f"engine.offload is for stage 3, got stage {stage}: use engine=zero3_offload")
    stage = zero_stage(stage, dtype)
    host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # `backward` says which is the last of a step: their number varies
        "train_batch_size": world,
        "gradient_clipping": clip,  # 0: none
        "prescale_gradients": False,  # dividing before the sum would round twice
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's own AdamW also where it steps on the host: the same numbers
        "fp16": {"enabled": False},
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": False,  # one order of sums
            "reduce_bucket_size": REDUCE_BUCKET,  # memory, not results; the default's is 2 GB
            "sub_group_size": STEP_AT_ONCE,  # memory: two to three times that in float32; the default's is 4 GB
            # DeepSpeed's own linear shifts bf16 log-probs by 1e-2, away from the rollout engine's.
            "memory_efficient_linear": False,
            # 0: also small tensors are really partitioned, so that tests on tiny models exercise what 7B does.
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": live,
            "stage3_max_reuse_distance": live,
            "stage3_prefetch_bucket_size": min(live // 10, REDUCE_BUCKET),
            **({"offload_param": host, "offload_optimizer": host} if offload else {}),
        },
        # Gradients of micro-batches and ranks add up in float32: in bfloat16 (the default with it) a sum of many loses
        # what each further one adds.
        **({"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"} if stage > 1 else {}),
    }


def _pack(tensor: Tensor):
    """A gathered weight is not kept for the backward pass, only where it comes from.

    A linear layer saves its weight transposed: autograd would hold every gathered weight until the backward pass, and
    with them the whole model on each rank.
    """
    weight = tensor if tensor._base is None else tensor._base
    if not hasattr(weight, "ds_id"):
        return tensor
    return weight, tensor.size(), tensor.stride(), tensor.storage_offset() - weight.storage_offset()


def _unpack(kept) -> Tensor:
    """DeepSpeed has gathered a module's weights again when its backward pass asks for them."""
    if isinstance(kept, Tensor):
        return kept
    weight, size, stride, offset = kept
    return weight.data.as_strided(size, stride, weight.storage_offset() + offset)


class Engine:
    """A policy under DeepSpeed with AdamW.

    Args:
        optimizer: partial of a torch optimizer, called with the trainable parameters.
        stage: ZeRO stage 0-3.
        clip: gradient norm above which gradients are scaled down.
    """

    def __init__(self, policy: nn.Module, optimizer: Callable, config: Mapping):
        self.policy, self.config = policy, dict(config)
        zero = self.config["zero_optimization"] = dict(config["zero_optimization"])
        self.stage = zero["stage"]
        self.clip = config["gradient_clipping"]
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.trainable = {n: p for n, p in policy.named_parameters() if p.requires_grad}
        # Of the reference, where it is not the model with its adapter off: this rank's part of each trained weight.
        self.anchor: dict[str, Tensor] | None = None
        self.begun = 0  # optimizer steps, of which the last may have broken off half-way
        self.refreshed = False  # since the start, whose weights the checkpoint that is trained holds
        # No larger than what is trained: of an adapter that is a few megabytes.
        trained = sum(getattr(p, "ds_numel", p.numel()) for p in self.trainable.values())
        zero["reduce_bucket_size"] = min(zero["reduce_bucket_size"], trained)
        self.optimizer = optimizer(list(self.trainable.values()))
        self.deepspeed, *_ = deepspeed.initialize(
            model=policy,
            optimizer=self.optimizer,
            model_parameters=list(self.trainable.values()),
            config=dict(self.config),
        )

    def __call__(self, *args):
        """Forward of the policy, through the hooks that gather ZeRO-3's partitions."""
        WATCH.moved()
        if self.stage < 3:
            return self.deepspeed(*args)
        with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
            return self.deepspeed(*args)

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Add the gradient of this rank's share of the step's loss. All ranks make equally many calls a step.

        Of a loss that is not finite it is NaN.
        """
        WATCH.moved()
        self.deepspeed.set_gradient_accumulation_boundary(last)
        # A loss that is not finite may have a finite gradient: made NaN, it is refused by `step`, on all ranks.
        sound = torch.where(loss.detach().isfinite(), 1.0, float("nan"))
        self.deepspeed.backward(loss * sound * self.world, scale_wrt_gas=False)

    def gradients(self) -> dict[str, Tensor]:
        """Whole gradients by parameter name, before clipping; after the last backward of a step, on all ranks."""
        return {n: safe_get_full_grad(p).detach().float().clone() for n, p in self.trainable.items()}

    def step(self, lr: float) -> float:
        """Clip, step, zero the gradients. Returns the gradient norm before clipping.

        Raises FloatingPointError, on all ranks and with nothing changed, if the norm is not finite.
        """
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        norm = None
        if self.stage == 0:  # DeepSpeed would step, and tell afterwards
            norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in self.trainable.values()])).item()
        if norm is None or math.isfinite(norm):
            self.begun += 1
            self.deepspeed.step()  # with a norm that is not finite, it skips the step by itself
        norm = float(self.deepspeed.get_global_grad_norm()) if norm is None else norm
        if not math.isfinite(norm):
            self.forget()  # DeepSpeed forgets its own; these would go into the next step's
            raise FloatingPointError(f"the gradient norm is {norm}: the step was not taken")
        return norm

    def forget(self) -> None:
        """Drop the gradients of a step that is not taken. Above stage 0, DeepSpeed holds more of a broken one."""
        for p in self.trainable.values():
            p.grad = None

    # ---------------------------------------------------------------- between ranks

    def reduce(self, values: Mapping[str, float], how: str = "sum") -> dict[str, float]:
        """Sum, max or min of each value over the ranks, in float64. The same keys must be given on every rank."""
        if self.world == 1:
            return dict(values)
        WATCH.moved()
        keys = sorted(values)  # in one order on all ranks
        packed = torch.tensor([values[k] for k in keys], dtype=torch.float64, device=self.deepspeed.device)
        dist.all_reduce(packed, op=getattr(dist.ReduceOp, how.upper()))
        reduced = dict(zip(keys, packed.tolist(), strict=True))
        return {k: reduced[k] for k in values}

    def gather(self, items: list) -> list:
        """The ranks' lists joined in rank order, on every rank."""
        if self.world == 1:
            return list(items)
        WATCH.moved()
        parts: list = [None] * self.world
        dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def together(self, call: Callable, error: type[Exception]):
        """What `call()` returns. An `error` of one rank is raised on all: none waits in a collective for it."""
        result, failed = None, []
        try:
            result = call()
        except error as mine:
            failed = [f"rank {self.rank}: {mine}" if self.world > 1 else str(mine)]
        if failed := self.gather(failed):
            raise error(failed[0])
        return result

    def gathered(self, parameters: Sequence[nn.Parameter] | None = None, *, write: bool = False):
        """Context in which `parameters` (default: all trainable) are whole on every rank (a no-op below ZeRO-3).

        With `write`, what rank 0 put into them is kept.
        """
        parameters = list(self.trainable.values()) if parameters is None else list(parameters)
        return deepspeed.zero.GatheredParameters(
            parameters, modifier_rank=0 if write else None, enabled=self.stage == 3
        )

    # ---------------------------------------------------------------- the reference policy

    @contextmanager
    def reference(self):
        """Context in which the model is the reference: its adapter off, or as at the last `hold_reference`.

        Raises RuntimeError where neither makes one.
        """
        if self.anchor is None:
            if not self.policy.has_adapter:
                raise RuntimeError("no reference policy: without an adapter its weights must be held (hold_reference)")
            with self.policy.reference():
                yield
            return
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def hold_reference(self) -> None:
        """Keep a frozen copy of the trained weights as the reference; each rank a copy of its own part."""
        self.anchor = {n: self._part(p).detach().clone() for n, p in self.trainable.items()}

    def refresh_reference(self) -> None:
        """Make the policy of this moment the reference from now on (TR-DPO, arXiv 2404.09656: the hard update)."""
        self.hold_reference()
        self.refreshed = True

    def _part(self, p: nn.Parameter) -> Tensor:
        """What this rank keeps of a weight: a flat part under ZeRO-3, else all of it."""
        return p.ds_tensor if self.stage == 3 else p

    def _swap(self) -> None:
        """Exchange policy and reference where they lie: no third copy, nothing between ranks."""
        if self.stage == 3:  # what is still gathered is of the weights that go
            for p in self.trainable.values():
                if p.data.numel():
                    p.partition()
        for name, p in self.trainable.items():
            part = self._part(p)
            part.data, self.anchor[name].data = self.anchor[name].data, part.data

    def _cut(self, p: nn.Parameter, whole: Tensor) -> Tensor:
        """This rank's part of a whole weight or state, shaped as `_part`."""
        if self.stage < 3:
            return whole
        size = p.ds_tensor.numel()
        padded = torch.nn.functional.pad(whole.flatten(), (0, size * self.world - whole.numel()))
        return padded[self.rank * size : (self.rank + 1) * size]

    def _whole(self, p: nn.Parameter, part: Tensor) -> Tensor:
        """The inverse of `_cut`; every rank calls."""
        if self.stage < 3:
            return part
        parts = [torch.empty_like(part, device=self.deepspeed.device) for _ in range(self.world)]
        dist.all_gather(parts, part.to(self.deepspeed.device).contiguous())
        return torch.cat(parts)[: p.ds_numel].view(p.ds_shape)

    # ---------------------------------------------------------------- trainer state

    def state(self) -> dict[str, Tensor]:
        """Float32 master weights (`NAME/master`), optimizer state (`NAME/exp_avg`, ...) and, once refreshed, the
        reference (`NAME/reference`), whole, on the CPU of rank 0; empty on the others.

        The same at every stage and on any number of ranks; every rank must call. One weight is whole at a time.
        """
        tensors: dict[str, Tensor] = {}

        def keep(key: str, whole: Tensor) -> None:
            if self.rank == 0:
                tensors[key] = whole.detach().to("cpu", copy=True).contiguous()

        for name, p in self.trainable.items():
            keep(f"{name}/master", safe_get_full_fp32_param(p) if self._parts else p)
            held = self.optimizer.state[self._parts[0] if self._parts else p]
            for key, value in sorted(held.items()):  # in one order on all ranks: together they make a whole one
                keep(f"{name}/{key}", safe_get_full_optimizer_state(p, key) if self._parts and value.dim() else value)
            if self.refreshed:
                keep(f"{name}/reference", self._whole(p, self.anchor[name]))
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave, under whatever stage and number of ranks that was.

        Raises ValueError if the trainable parameters are others.
        """
        first = next(iter(self.trainable))
        if odd := sorted(self.trainable.keys() ^ {k.rpartition("/")[0] for k in tensors}):
            raise ValueError(f"the trainer state does not fit the model: {len(odd)} weights differ, first {odd[0]!r}")
        keys = sorted({k.rpartition("/")[2] for k in tensors if k.startswith(f"{first}/")} - {"master", "reference"})
        counts = [k for k in keys if not tensors[f"{first}/{k}"].dim()]  # such as the steps taken: one value for all
        # torch makes the state at the first step only: of a run that has not had one, there is none
        for part in (self._parts or self.trainable.values()) if keys else ():
            self.optimizer.state[part] = {
                k: tensors[f"{first}/{k}"].clone() if k in counts else torch.zeros_like(part) for k in keys
            }
        if keys and self._parts and self.stage < 3:  # DeepSpeed does it once only
            self.deepspeed.optimizer._lazy_init_hp_params_optimizer_state()
        for name, p in self.trainable.items():
            self._put(p, "master", tensors[f"{name}/master"])
            for key in (k for k in keys if k not in counts):
                self._put(p, key, tensors[f"{name}/{key}"])
            self._part(p).data.copy_(self._cut(p, tensors[f"{name}/master"]))
        self.refreshed = f"{first}/reference" in tensors
        if self.refreshed:
            self.hold_reference()
            for name, p in self.trainable.items():
                self.anchor[name].copy_(self._cut(p, tensors[f"{name}/reference"]))

    @property
    def _parts(self) -> list[Tensor]:
        """The flat float32 partitions that DeepSpeed steps in place of the parameters; none at stage 0."""
        for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
            if hasattr(self.deepspeed.optimizer, name):
                return list(getattr(self.deepspeed.optimizer, name))
        return []

    def _put(self, p: Tensor, key: str, whole: Tensor) -> None:
        """Write this rank's part of a whole master weight or optimizer state."""
        whole = whole.to(self.deepspeed.device)
        if not self._parts:
            (p.data if key == "master" else self.optimizer.state[p][key]).copy_(whole)
        elif self.stage < 3:
            safe_set_full_fp32_param(p, whole) if key == "master" else safe_set_full_optimizer_state(p, whole, key)
        else:
            part = self._cut(p, whole)  # DeepSpeed's own setter of whole tensors forgets that the last part is padded
            safe_set_local_fp32_param(p, part) if key == "master" else safe_set_local_optimizer_state(p, part, key)
