"""Gates beside sharded weights (FSDP2): whole on every rank, with gradients averaged over all.

Gates are clipped, counted and compared as one vector; and they are few. So `fully_shard` is told to
leave them alone, and a hook does for their gradients what it does for those of the weights.
"""

import torch.distributed as dist
from torch import Tensor, nn

from fxprune.errors import GateError, require_module
from fxprune.gating.gates import Gates, gate_owners


def replicate_gates(
    gated: nn.Module, process_group: dist.ProcessGroup | None = None
) -> set[nn.Parameter]:
    """Keep the gates whole on every rank, their gradients averaged; return them.

        fully_shard(gated, ignored_params=fxprune.replicate_gates(gated))

    process_group: the ranks that share a model, all if not given. Call it once, before
    `fully_shard`; in `DistributedDataParallel` there is no need.
    """

    def average(gate: Tensor) -> None:
        # What earlier backward passes left is the same everywhere, and so its own average.
        if gate.grad is not None:
            dist.all_reduce(gate.grad, group=process_group)
            gate.grad.div_(dist.get_world_size(process_group))

    found = {gate for gates in gate_owners(gated) for gate in gates.parameters()}
    for gate in found:
        gate.register_post_accumulate_grad_hook(average)
    return found


def require_whole_gates(gates: Gates) -> None:
    """Raise `GateError` if gates are sharded: what clips them would not reach the shards."""
    if any(map(_is_shard, gates.parameters())):
        raise GateError(
            "the gates are sharded over ranks, where they cannot be clipped; shard the model by "
            "fully_shard(gated, ignored_params=fxprune.replicate_gates(gated))"
        )


def require_whole(model: nn.Module) -> None:
    """Raise `GateError` if a model's parameters are shards, which surgery cannot cut."""
    require_module(model)
    name = next((name for name, p in model.named_parameters() if _is_shard(p)), None)
    if name is not None:
        raise GateError(
            f"{name} is sharded over ranks; gather the weights by torch.distributed.checkpoint."
            "state_dict.get_model_state_dict(gated, options=StateDictOptions(full_state_dict=True))"
            ", load them into what fxprune.instrument(model) returns anew, and take that"
        )


def is_sharded(model: nn.Module) -> bool:
    """Tell whether parameters of a model are shards."""
    return any(map(_is_shard, model.parameters()))


def _is_shard(tensor: Tensor) -> bool:
    return type(tensor).__name__ == "DTensor"  # its import takes long, and most never shard
