"""One training run over the processes that torchrun starts: joining them, sharding a model, sums over ranks.

Without torchrun all of it is the run of one rank: sums are what is summed, tensors are whole.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

from schemas.errors import OpdError
from train.batch import Batch
from train.layers import layers
from train.policy import UnitLogps, unit_logps


@contextmanager
def processes() -> Iterator[None]:
    """Be one rank of the group that torchrun started, over nccl on GPUs and gloo elsewhere; alone without torchrun.

    An exception ends all ranks: the rank that it came to first raises it, the others leave without a word.
    """
    if not dist.is_torchelastic_launched():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, place, count = next(rendezvous("env://"))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=place, world_size=count)
    try:
        yield
    except BaseException:
        # The group is left as it is: to close it could mean to wait for ranks that wait for this one. torchrun ends them.
        if store.add("failed", 1) > 1:
            raise SystemExit(1) from None
        raise
    dist.destroy_process_group()


def rank() -> int:
    """This process' place; rank 0 writes, prints and exports."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def ranks_here() -> int:
    """How many of them share this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if dist.is_initialized() else 1


def local_rank() -> int:
    """This process' place among those of its machine."""
    return int(os.environ["LOCAL_RANK"]) if dist.is_initialized() else 0


@contextmanager
def together() -> Iterator[None]:
    """What each rank does a part of: nobody goes on before all have, and an OpdError of one is raised on all."""
    failed: OpdError | None = None
    try:
        yield
    except OpdError as error:
        failed = error
    told = [str(failed) if failed else None] * ranks()
    if dist.is_initialized():
        dist.all_gather_object(told, told[0])
    if failed:
        raise failed
    if first := next(filter(None, told), None):
        raise OpdError(first)


def gather(values: Sequence[float]) -> torch.Tensor:
    """The same figures of every rank: n numbers -> float64 (ranks, n) on the CPU; n at least 1."""
    own = torch.tensor(values, dtype=torch.float64)
    if not dist.is_initialized():
        return own[None]
    own = own.cuda() if torch.cuda.is_available() else own
    out = own.new_empty(ranks() * len(values))
    dist.all_gather_into_tensor(out, own)
    return out.view(ranks(), len(values)).cpu()


def wait_for_all() -> None:
    """Go on once every rank is here."""
    gather([0.0])


def sum_gradients(parameters: Iterable[torch.Tensor]) -> None:
    """Replace each gradient by its sum over ranks.

    By hand, once a step, instead of DistributedDataParallel's hooks: those count one backward pass per rank, and here ranks
    may have different numbers of micro-batches, or none. FSDP has summed those of sharded parameters already. A parameter
    without gradient on every rank keeps none.
    """
    whole = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
    if ranks() == 1 or not whole:
        return
    has = torch.tensor([p.grad is not None for p in whole], dtype=torch.int32, device=whole[0].device)
    dist.all_reduce(has, dist.ReduceOp.MAX)
    pending = []
    for parameter, somewhere in zip(whole, has.tolist(), strict=True):
        if somewhere:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            pending.append(dist.all_reduce(parameter.grad, async_op=True))
    for one in pending:
        one.wait()


def shard(model: Any) -> None:
    """Spread a model's parameters over all ranks, in place (FSDP2): each layer for itself, the rest together.

    Gradients are summed over ranks, not averaged, in float32. Raises OpdError without torchrun.
    """
    if not dist.is_initialized():
        raise OpdError("--parallel fsdp spreads a model over processes; start them with torchrun")
    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (ranks(),))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for module in (*layers(model), model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # a factor of 1 is else one more operation that gloo lacks
    # Body and head are called one by one, never the model itself, and the gathering hangs on its forward methods.
    model.unit_logps = MethodType(unit_logps, model)
    register_fsdp_forward_method(model, "unit_logps")


def is_sharded(model: Any) -> bool:
    """Whether `shard` was here: then every rank must run as many forward and backward passes as the others."""
    return isinstance(model, FSDPModule)


def student_logps(model: Any, batch: Batch, stop: torch.Tensor) -> UnitLogps:
    """`unit_logps` of a model, sharded or not."""
    found: UnitLogps = model.unit_logps(batch, stop) if is_sharded(model) else unit_logps(model, batch, stop)
    return found


def idle_pass(model: Any, stop: torch.Tensor) -> None:
    """A forward and a backward pass that add nothing, for a rank that has fewer micro-batches than another."""
    one, none = torch.zeros(1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    figures = {name: none for name in Batch.__dataclass_fields__ if name not in ("responses", "cand_id", "cand_logp")}
    token = {"ids": one[None], "mask": one[None] + 1, "rows": one, "targets": one, "token_unit": one}
    candidates = {"cand_id": none[:, None], "cand_logp": none[:, None].float()}
    empty = Batch(**{**figures, **token, **candidates}, responses=())
    (0 * student_logps(model, empty.to(model.device), stop).token.sum()).backward()


def full(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, sharded or not; every rank must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def piece(tensor: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """What of a tensor lies here, and at which index of the whole one it begins."""
    if not isinstance(tensor, DTensor):
        return tensor, [0] * tensor.dim()
    (chunk,) = tensor.__create_chunk_list__()  # what torch.distributed.checkpoint asks of any tensor
    return tensor.to_local(), list(chunk.offsets)


def like(whole: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A copy of a whole tensor where `other` lies, and sharded as it is: of no more than lies here."""
    if isinstance(other, DTensor):
        local, begin = piece(other)
        part = whole[tuple(slice(a, a + n) for a, n in zip(begin, local.shape, strict=True))]
        part = part.to(local.device, copy=True, memory_format=torch.contiguous_format)
        return DTensor.from_local(
            part, other.device_mesh, other.placements, run_check=False, shape=other.shape, stride=other.stride()
        )
    return whole.to(other.device, copy=True)
