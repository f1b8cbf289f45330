"""Sizes at which an exported model may be another: those that no longer answer as the example did.

`if x.shape[0] > 4:` is answered once, while a model is exported, and its file does the same at
every size, without an error. The exporter notes every such answer, as it does those that operators
need; a size that has another answer shows whether the file is still the model there.
"""

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fxprune.deployment.onnx_signature import Flat, Sizes
from fxprune.user_models.inputs import Inputs

# Every size is looked at below the first, larger ones up to the second in steps, and those that a
# relation names.
EVERY, LONGEST, STEP = 128, 2048, 32
# How many elements the inputs may have: as many times the example's, or so many.
GROWN = 64
ELEMENTS = 2**20
# So many of the sizes that have another answer are run, of the nearest so many.
TRIES = 2
NEAREST = 64


@dataclass
class Answers:
    """What held of the open sizes while a model was exported, as sympy's relations of their names.

    found: of the last export; one that failed may be followed by another.
    """

    sizes: Sizes
    names: Sequence[str]
    found: list[Any] = field(default_factory=list[Any])

    def others(self) -> list[dict[str, int]]:
        """Return open sizes that answer otherwise, a few for every answer."""
        example = self.sizes.of_example(self.names)
        most = max(GROWN * self._elements(example), ELEMENTS)
        tried: list[dict[str, int]] = []
        for relation in self.found:
            other = [
                chosen
                for chosen in _candidates(example, relation)
                if not _holds(relation, chosen) and self._elements(chosen) <= most
            ][:NEAREST]
            # Where no other answer changes, nothing else keeps the model from running.
            other.sort(key=self._changed)
            tried += [chosen for chosen in other[:TRIES] if chosen not in tried]
        return tried

    def hold_at(self, inputs: Inputs) -> bool:
        """Tell whether the model was exported with the answers it gives on `inputs`."""
        chosen = replace(self.sizes, inputs=inputs).of_example(self.names)
        return not self._changed(chosen)

    def _changed(self, chosen: Mapping[str, int]) -> int:
        return sum(not _holds(relation, chosen) for relation in self.found)

    def _elements(self, chosen: Mapping[str, int]) -> int:
        return sum(math.prod(shape) for shape in self.sizes.shapes(self.names, chosen))


@contextmanager
def noted(flat: Flat, sizes: Sizes) -> Generator[Answers]:
    """Note the answers that exporting a model depends on, while it is exported."""
    answers = Answers(sizes, flat.input_names)
    dims = sizes.dims(flat.input_names)
    names: dict[Any, str] = {}

    def begin(_: Any, tensors: tuple[Tensor, ...]) -> None:
        names.clear()
        for tensor, opened in zip(tensors, dims, strict=True):
            symbolic = {dim: name for dim, name in opened.items() if _is_symbolic(tensor, dim)}
            names.update({_node(tensor, dim).expr: name for dim, name in symbolic.items()})

    def end(_: Any, tensors: tuple[Tensor, ...], __: Any) -> None:
        open_ = [(t, dim) for t in tensors for dim in range(t.ndim) if _is_symbolic(t, dim)]
        if names and open_:
            answers.found = [*_relations(_node(*open_[0]).shape_env, names)]

    hooks = [flat.register_forward_pre_hook(begin), flat.register_forward_hook(end)]
    try:
        yield answers
    finally:
        for hook in hooks:
            hook.remove()


def _is_symbolic(tensor: Tensor, dim: int) -> bool:
    return isinstance(tensor.shape[dim], torch.SymInt)


def _node(tensor: Tensor, dim: int) -> Any:
    size: Any = tensor.shape[dim]
    return size.node


def _relations(shape_env: Any, names: Mapping[Any, str]) -> Iterator[Any]:
    """Yield what a shape environment holds for true of sizes, in their names."""
    import sympy  # takes long, and the exporter has imported it by now

    own = {symbol: sympy.Symbol(name, integer=True) for symbol, name in names.items()}
    told = [one.expr for one in shape_env.deferred_runtime_asserts.get(None, ())]
    told += [guard.expr for guard in shape_env.guards]
    told += [sympy.Eq(*pair, evaluate=False) for pair in shape_env.replacements.items()]
    for symbol in names:
        bounds = shape_env.var_to_range.get(symbol)
        if bounds is not None and isinstance(bounds.upper, sympy.Integer):
            told.append(sympy.Le(symbol, bounds.upper))
        if bounds is not None and isinstance(bounds.lower, sympy.Integer):
            told.append(sympy.Ge(symbol, bounds.lower))
    for relation in dict.fromkeys(told):
        if relation.free_symbols and relation.free_symbols <= own.keys():
            yield relation.xreplace(own)


def _holds(relation: Any, chosen: Mapping[str, int]) -> bool:
    import sympy

    values = {s: sympy.Integer(chosen[s.name]) for s in relation.free_symbols}
    return relation.xreplace(values) != sympy.false


def _candidates(example: Mapping[str, int], relation: Any) -> list[dict[str, int]]:
    """Return sizes to look among, nearest to the example's first.

    One is other than there, or those of a map are other and the same.
    """
    import sympy

    asked = {symbol.name for symbol in relation.free_symbols}
    named = {int(n) + more for n in relation.atoms(sympy.Integer) for more in (-1, 0, 1)}
    sizes = {*range(1, EVERY), *range(EVERY, LONGEST + 1, STEP)}
    sizes |= {size for size in named if 0 < size <= LONGEST}
    found = [{**example, name: size} for name in asked for size in sizes]
    if len(asked) > 1:
        found += [{**example, **dict.fromkeys(asked - {"batch"}, size)} for size in sizes]

    def distance(chosen: Mapping[str, int]) -> float:
        return sum(abs(math.log(chosen[name] / max(size, 1))) for name, size in example.items())

    return sorted(found, key=distance)
