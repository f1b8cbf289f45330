"""Which of torch's classes and functions are of one kind: convolutions, batch norms, sums."""

import operator
from typing import Any

import torch
from torch import fx, nn

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Linear, *CONVS, *TRANSPOSED)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
SUMS = (operator.add, torch.add, "add")
PRODUCTS = (operator.mul, torch.mul, "mul")
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Identity)
# What marks, in a node's `meta`, a call that gives back what it was given outside of training.
PASSES = "passes_in_evaluation"
# What marks a function that overwrote its first argument before it was made an ordinary one.
OVERWROTE = "overwrote"
# What computes in a graph.
CALLS = ("call_module", "call_function", "call_method")
# What augmented arithmetic on a buffer is traced as.
IN_PLACE = ("add_", "sub_", "mul_", "div_")
# What gives a tensor that gets no gradient by what is done with it.
DETACHING: tuple[Any, ...] = (torch.detach, "detach", "detach_")
# How torch.fx names the attributes it makes for tensors that a traced forward came with.
MADE_BY_TRACING = "_tensor_constant"
# What asks a tensor for anything but its numbers.
QUESTIONS = {"size", "dim", "ndimension", "numel", "nelement", "is_floating_point"}
FORMS = {"shape", "ndim", "dtype", "device", "layout", "requires_grad", "is_cuda", "is_nested"}


def overwritten(node: fx.Node) -> fx.Node:
    """Return what augmented arithmetic was done on: the node itself if it is none."""
    while node.op == "call_method" and node.target in IN_PLACE:
        first = node.args[0]
        assert isinstance(first, fx.Node)
        node = first
    return node


def asks_form(node: fx.Node) -> bool:
    """Tell whether an operator asks a tensor for its form only: its sizes, its type, its place."""
    if node.target is getattr:
        return node.args[1] in FORMS
    asked = node.op == "call_method" and node.target in QUESTIONS
    return asked or node.target is torch.numel
