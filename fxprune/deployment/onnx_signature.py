"""What an ONNX file shows of a model: tensors in, tensors out, their names and open dims.

Arguments and outputs may be nested in Python; in ONNX they are flat, and named after the arguments
of forward and the keys of what it returns. Open dims are those that hold for any number.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.user_models.cases import GROWTH, inputs_of_shapes, random_inputs, spatial_dims
from fxprune.user_models.inputs import Inputs, copied, leading_size, opened, tensors_of

# A dynamic batch is tried at 1, which torch.export treats apart, and at a size it did not see.
BATCHES = (1, 3)


class Flat(nn.Module):
    """A model as ONNX knows one: tensors in, tensors out, all with names.

    What is no tensor is a constant among the inputs, and left out among the outputs.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.model = model
        self.leaves, self.spec = pytree.tree_flatten(inputs)
        self.input_names = _input_names(model, inputs)
        outputs = self.run_model(tensors_of(copied(inputs)))  # a model may overwrite its inputs
        self.output_names = _output_names(outputs, self.input_names)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors of the model's output, in their order."""
        return tuple(tensors_of(self.run_model(tensors)))

    def run_model(self, tensors: Sequence[Tensor]) -> Any:
        """Return the model's output as it is, for the tensors among its inputs."""
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return self.model(*args, **kwargs)


@dataclass(frozen=True)
class Sizes:
    """Which dims of the inputs stay open, and the inputs that prove it."""

    inputs: Inputs
    batch: bool
    size: bool

    def dims(self, names: Sequence[str]) -> tuple[dict[int, str], ...]:
        """Return the open dims of every tensor, by name; `names` are those of the tensors."""
        leading = leading_size(self.inputs)
        dims: list[dict[int, str]] = []
        for name, tensor in zip(names, tensors_of(self.inputs), strict=True):
            batched = self.batch and tensor.ndim > 0 and len(tensor) == leading
            spatial = spatial_dims(tensor) if self.size else range(0)
            opened = {0: "batch"} if batched else {}
            dims.append(opened | {dim: f"{name}_{dim}" for dim in spatial})
        return tuple(dims)

    def of_example(self, names: Sequence[str]) -> dict[str, int]:
        """Return what the open dims are on the example, by name."""
        tensors = zip(tensors_of(self.inputs), self.dims(names), strict=True)
        return {name: t.shape[dim] for t, opened in tensors for dim, name in opened.items()}

    def inputs_at(self, names: Sequence[str], chosen: Mapping[str, int]) -> Inputs:
        """Return inputs whose open dims, by name, are as chosen."""
        return inputs_of_shapes(self.inputs, self.shapes(names, chosen), seed=0)

    def shapes(self, names: Sequence[str], chosen: Mapping[str, int]) -> list[tuple[int, ...]]:
        """Return the shapes of all tensors where the open dims, by name, are as chosen."""
        tensors = zip(tensors_of(self.inputs), self.dims(names), strict=True)
        return [
            tuple(chosen[opened[d]] if d in opened else n for d, n in enumerate(tensor.shape))
            for tensor, opened in tensors
        ]

    def example(self) -> Inputs:
        """Return inputs to trace with: torch.export takes a batch of one for a constant."""
        if self.batch and leading_size(self.inputs) == 1:
            return random_inputs(self.inputs, seed=0, batch=2)
        return self.inputs

    def cases(self) -> dict[str, Inputs]:
        """Return inputs to compare torch and onnxruntime on."""
        batches = BATCHES if self.batch and leading_size(self.inputs) is not None else ()
        cases = {"example": self.inputs}
        cases |= {f"batch {n}": random_inputs(self.inputs, seed=n, batch=n) for n in batches}
        if self.size:
            cases[f"size +{GROWTH}"] = random_inputs(self.inputs, seed=0, growth=GROWTH)
        if len(cases) == 1 and self._are_blank():
            cases["random"] = random_inputs(self.inputs, seed=0)
        return cases

    def _are_blank(self) -> bool:
        """Tell whether every input is of one number, on which many models are the same."""
        tensors = [t for t in tensors_of(self.inputs) if t.is_floating_point() and t.numel() > 1]
        return bool(tensors) and all(bool((t == t.flatten()[0]).all()) for t in tensors)


def _input_names(model: nn.Module, inputs: Inputs) -> tuple[str, ...]:
    """Name the tensors of `inputs` after the arguments of forward that they are, or are part of."""
    leaves, spec = pytree.tree_flatten(inputs)
    args, kwargs = pytree.tree_unflatten(range(len(leaves)), spec)
    signature = inspect.signature(model.forward)
    arguments = dict(signature.bind(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments |= arguments.pop(parameter.name, {})
    paths = {place: path for path, place in pytree.tree_flatten_with_path(arguments)[0]}
    names: list[str] = []
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            names.append(_free(_name(paths[place]), names, "_input"))
    return tuple(names)


def _output_names(outputs: Any, taken: Sequence[str]) -> tuple[str, ...]:
    names: list[str] = []
    for path, leaf in pytree.tree_flatten_with_path(opened(outputs))[0]:
        if not isinstance(leaf, Tensor):
            continue
        named = _name(path) and not isinstance(path[0], pytree.SequenceKey)
        name = _name(path) if named else "_".join(("output", _name(path))).rstrip("_")
        names.append(_free(name, (*taken, *names), "_output"))
    return tuple(names)


def _free(name: str, taken: Sequence[str], ending: str) -> str:
    while name in taken:
        name += ending
    return name


def _name(path: Sequence[Any]) -> str:
    """Join the keys, indices and fields of a path into a nested structure."""
    return "_".join(str(key).strip("[].'") for key in path)
