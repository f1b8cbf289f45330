"""What is computed a second time for its backward, traced as what that backward is of.

    x = checkpoint(self.block, x, use_reentrant=True)     →     x = self.block(x)

Its forward runs without gradients, but is no block without them: they come by running it again, if
one of the tensors it is given needs a gradient. If none does, nothing inside gets any, and torch
warns; a graph does not depend on that.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointFunction

from fxprune.errors import TraceError
from fxprune.runtime.kinds import DETACHING
from fxprune.tracing.stand_ins import is_given_traced, standing_in
from fxprune.user_models.modules import has_hooks, submodule


@contextmanager
def computed_once(tracer: Any) -> Generator[None]:
    """Let what torch computes twice to save memory be traced, not its first run alone."""
    apply: Any = CheckpointFunction.apply

    def call(_: type, function: Any, preserve: bool, *given: Any) -> Any:
        if tracer.answering or not torch.is_grad_enabled() or not is_given_traced(given, {}):
            return apply(function, preserve, *given)
        _require_gradients(tracer.root, given)
        return function(*given)

    with standing_in((CheckpointFunction, "apply", classmethod(call))):
        yield


def _require_gradients(root: nn.Module, given: tuple[Any, ...]) -> None:
    """Raise `TraceError` unless gradients are sure to come by running a function again."""
    leaves = [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, fx.Proxy)]
    is_plain = all(any(leaf is one for one in given) for leaf in leaves)
    if not is_plain or not any(_needs_gradient(root, leaf.node) for leaf in leaves):
        raise TraceError(
            "it checkpoints with use_reentrant=True what is given no tensor that a parameter to be "
            "trained stands before, or lists of tensors: torch gives that gradients by what it is "
            "called with only; pass use_reentrant=False"
        )


def _needs_gradient(root: nn.Module, last: fx.Node) -> bool:
    """Tell whether something that is trained stands before a value."""
    met, waiting = {last}, [last]
    while waiting:
        node = waiting.pop()
        if node.target in DETACHING:
            continue
        if _is_trained(root, node):
            return True
        new = [one for one in node.all_input_nodes if one not in met]
        met.update(new)
        waiting += new
    return False


def _is_trained(root: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        module = submodule(root, str(node.target))
        return has_hooks(module) or any(p.requires_grad for p in module.parameters())
    if node.op != "get_attr":
        return False
    *owners, name = str(node.target).split(".")
    tensor: Any = getattr(submodule(root, ".".join(owners)), name)
    return isinstance(tensor, Tensor) and tensor.requires_grad
