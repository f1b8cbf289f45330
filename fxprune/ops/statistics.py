"""Operators that take all channels together, so that one that is 0 still counts.

A removed channel would change a mean, a variance or a softmax's sum: they keep their channels, and
say so.
"""

import torch
import torch.nn.functional as F
from torch import nn

from fxprune.rules import Call, Flow, OpRule, register
from fxprune.values import Barrier


def refuse_normalisation(call: Call) -> Flow:
    """Keep all channels: they enter the statistics."""
    raise Barrier("it normalises over channels, where a removed one would still count")


def refuse_comparison(call: Call) -> Flow:
    """Keep all channels: they are compared or added up."""
    raise Barrier("it compares or adds up channels, where a removed one would still count")


register(
    OpRule("normalisation", refuse_normalisation),
    *(nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm),
    *(nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d),
    *(F.layer_norm, F.group_norm, F.rms_norm, F.local_response_norm, F.normalize),
    *(F.softmax, F.log_softmax, F.softmin),
    *(torch.softmax, torch.log_softmax, torch.layer_norm, torch.group_norm, torch.rms_norm),
    *("softmax", "log_softmax"),
)
register(
    OpRule("comparison", refuse_comparison),
    *(torch.cumsum, torch.sort, torch.argsort, torch.topk, torch.argmax),
    *("cumsum", "sort", "argsort", "topk", "argmax"),
)
