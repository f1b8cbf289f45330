"""Which tensors lie in one memory, as a tensor and its views do."""

from torch import Tensor


def storage_of(tensor: Tensor) -> int:
    """Return what tensors of one memory have in common; one without (sparse) has its own id."""
    try:
        return tensor.untyped_storage()._cdata  # fake tensors have no data_ptr
    except (RuntimeError, NotImplementedError, ValueError):  # sparse, or not made yet
        return id(tensor)


def share_memory(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors lie in one memory."""
    return storage_of(one) == storage_of(other)
