"""Embeddings: the rows of a table, picked by number; their columns are channels.

The rows are the vocabulary and stay. A column that is the same in all rows is a constant; in a bag
rows are added up or averaged, or there are none, and only 0 stays what it is.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.dataflow.rules import Call, Flow, OpRule, register
from fxprune.dataflow.values import Barrier, State, Value, as_value, flatten, unknown, zeros_of


def embedding_flow(call: Call) -> Flow:
    """Give out the columns of the table, all of whose rows stay."""
    return _flow(call, lambda constants: constants)


def bag_flow(call: Call) -> Flow:
    """Give out the columns of a table some of whose rows are taken together."""
    return _flow(call, zeros_of)


def resize_embedding(call: Call) -> None:
    """Tell the module how many columns it has left."""
    module: Any = call.module
    if module is not None:
        module.embedding_dim = module.weight.shape[1]


def _flow(call: Call, through: Callable[[Tensor], Tensor]) -> Flow:
    table = call.state("weight") if call.module is not None else call.argument(1, "weight")
    if not isinstance(table, State):
        raise Barrier("its table is computed")
    if (call.argument(3, "max_norm") if call.module is None else _max_norm(call)) is not None:
        raise Barrier("it rescales rows by their length over all columns")
    columns, reason = table.axis(1), "it picks rows by number"
    shape = [1] * (len(call.tensor_spec().shape) - 1) + [-1]
    constants = through(_constants(call, table))
    keeps = [(table.axis(0), reason)]
    for argument in flatten((call.args, call.kwargs)):
        if isinstance(argument, (Value, State)) and argument is not table:
            keeps.append((as_value(argument).tags, reason))
    return Flow(call.output(columns.reshape(shape), constants.reshape(shape)), keeps=keeps)


def _constants(call: Call, table: State) -> Tensor:
    """Return the number a column has in every row, NaN where rows differ."""
    if call.generic:
        return unknown(table.axis(1))
    rows = table.known()
    return torch.where((rows == rows[:1]).all(0), rows[0], torch.nan)


def _max_norm(call: Call) -> Any:
    return getattr(call.module, "max_norm", None)


register(OpRule("embedding", embedding_flow, resize=resize_embedding), nn.Embedding, F.embedding)
register(
    OpRule("embedding_bag", bag_flow, resize=resize_embedding), nn.EmbeddingBag, F.embedding_bag
)
