"""What the nodes of a growing graph are on the example inputs: sizes and types, never numbers.

They run on fake tensors, which have shapes and no data, in a fake copy of the model: so what
depends on a tensor's numbers has no value here, by construction, and nothing of the user's changes.
"""

import copy
import logging
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import Context
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from fxprune.errors import one_line


class UnknownValueError(Exception):
    """What a node is cannot be told from sizes and types; says why."""


class ExampleValues(fx.Interpreter):
    """The values of the nodes of `graph`, which is being made of `root`.

    inputs: the example input of every placeholder. held: by name, the tensors that the model held
    before it was traced: a forward may have put something traced in the place of one.
    """

    def __init__(
        self,
        root: nn.Module,
        graph: fx.Graph,
        inputs: Mapping[fx.Node, Any],
        held: Mapping[str, Any],
    ) -> None:
        # With an environment of shapes what depends on data has a rank, and sizes nobody knows.
        self.mode = FakeTensorMode(
            allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True
        )
        with FakeCopyMode(self.mode):
            fake_root = copy.deepcopy(root).eval()
        super().__init__(fake_root, garbage_collect_values=False, graph=graph)
        self.growing, self.root, self.inputs, self.held = graph, root, inputs, held
        self.failures: dict[fx.Node, str] = {}

    def of(self, node: fx.Node) -> Any:
        """Return the value of a node, its tensors fake; raise `UnknownValueError`."""
        with self.mode, torch.no_grad(), _unlogged():
            for one in reversed([*takewhile(self._is_new, reversed(self.growing.nodes))]):
                # In a context of its own: a model that is being traced may gather what parts give.
                Context().run(self._run, one)
        if node in self.failures:
            raise UnknownValueError(self.failures[node])
        return self.env[node]

    def _is_new(self, node: fx.Node) -> bool:
        return node not in self.env and node not in self.failures

    def _run(self, node: fx.Node) -> None:
        causes = [self.failures[n] for n in node.all_input_nodes if n in self.failures]
        if causes:
            self.failures[node] = causes[0]
            return
        try:
            given = node in self.inputs
            self.env[node] = self._given(self.inputs[node]) if given else self.run_node(node)
        except Exception as error:  # whatever it is, this node has no value
            self.failures[node] = f"{node.name}: {one_line(error)}"

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Read a parameter of the fake copy, or what the trace has added to the model since."""
        if hasattr(self.root, target) and not hasattr(self.module, target):
            return self._constant(getattr(self.root, target))
        value = super().get_attr(target, args, kwargs)
        return self._faked(self.held[target]) if isinstance(value, fx.Proxy) else value

    def _given(self, value: Any) -> Any:
        """Return an input to be written to at will: an object (a cache) takes in fakes."""
        with FakeCopyMode(self.mode):
            return pytree.tree_map_only(
                lambda leaf: not isinstance(leaf, Tensor), copy.deepcopy, self._faked(value)
            )

    def _constant(self, value: Any) -> Any:
        """Return what the trace added as a fake; of one number, which never changes, with it."""
        fake = self._faked(value)
        if isinstance(value, Tensor) and value.numel() == 1:
            fake.constant = value
        return fake

    def _faked(self, value: Any) -> Any:
        return pytree.tree_map_only(Tensor, self.mode.from_tensor, value)


@contextmanager
def _unlogged() -> Generator[None]:
    """Keep torch from logging the traceback of an operator that has no value here."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before
