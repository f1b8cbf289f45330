"""Random networks as data: a list of small steps, so that a failure shrinks to a few lines.

A step names a writer of `tools.steps` and holds the small numbers its choices are taken from. It
is written out as lines of Python, each tried on real tensors as it is written; a step that does not
fit where it stands is left out. What remains is the source of an ordinary module, which is also how
a network is printed: it can be pasted into a test.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

T = TypeVar("T")
NAMESPACE: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "Tensor": Tensor}
LARGEST = 4096  # elements of a tensor, and the most a number may grow to
BATCH = 3


@dataclass(frozen=True)
class Step:
    """What is done next: the writer, the stream it works on (0 is the newest), its choices."""

    name: str
    stream: int = 0
    picks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Network:
    """A network: kinds of its inputs, its steps, whether its outputs are mixed once more.

    training: what it does besides in training, each a step taken behind a line of the others.
    """

    inputs: tuple[str, ...]
    steps: tuple[Step, ...]
    head: bool = True
    seed: int = 0
    training: tuple[Step, ...] = ()


SHAPES = {"map": (BATCH, 3, 6, 6), "vector": (BATCH, 5), "last": (BATCH, 4, 6)}


class Pick:
    """Take choices from small numbers; the first option, for 0 or for none left, is simplest."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self.numbers = list(numbers)

    def __call__(self, options: Sequence[T]) -> T:
        number = self.numbers.pop(0) if self.numbers else 0
        return options[number % len(options)]


class Refused(Exception):
    """A step does not fit where it stands."""


@dataclass
class Draft:
    """A module being written: its lines, and what its names stand for on real tensors.

    kinds: where a stream has its channels: "map" (N, C, ...), "vector" (N, C), "last" (N, ..., C).
    """

    layers: list[str] = field(default_factory=list[str])
    lines: list[str] = field(default_factory=list[str])
    names: dict[str, Any] = field(default_factory=lambda: {**NAMESPACE, "self": nn.Module()})
    kinds: dict[str, str] = field(default_factory=dict[str, str])
    outputs: list[str] = field(default_factory=list[str])

    def shape(self, x: str) -> tuple[int, ...]:
        return tuple(self.names[x].shape)

    def axis(self, x: str) -> int:
        """Return the axis of a stream's channels."""
        return 1 if self.kinds[x] != "last" else len(self.shape(x)) - 1

    def channels(self, x: str) -> int:
        return self.shape(x)[self.axis(x)]

    def require(self, x: str, kind: str) -> None:
        """Refuse a stream of another kind."""
        if self.kinds[x] != kind:
            raise Refused

    def layer(self, text: str) -> str:
        """Give the module something of its own; return how to call it."""
        name = f"self.m{len(self.layers)}"
        value = eval(text, self.names)
        owner: nn.Module = self.names["self"]
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            owner.register_buffer(name[5:], value.double() if value.is_floating_point() else value)
            self.layers.append(f"self.register_buffer({name[5:]!r}, {text})")
        else:
            setattr(owner, name[5:], value)
            self.layers.append(f"{name} = {text}")
        owner.double().eval()
        return name

    def own(self, text: str) -> None:
        """Write a line for the constructor that makes nothing new."""
        exec(text, self.names)
        self.layers.append(text)

    def let(self, text: str, kind: str) -> str:
        """Write a line that gives a new stream; `Refused` if it does not run or leaves bounds."""
        name = f"x{len(self.lines)}"
        try:
            value = eval(text, self.names)
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
            raise Refused(str(error)) from error
        if not isinstance(value, Tensor) or not 0 < value.numel() <= LARGEST:
            raise Refused("no tensor, or too large a one")
        if value.is_floating_point() and not float(value.abs().max()) < LARGEST:
            raise Refused("its numbers grow too large")
        self.names[name], self.kinds[name] = value, kind
        self.lines.append(f"{name} = {text}")
        return name

    def streams(self) -> list[str]:
        """Return all streams, the newest first."""
        return list(self.kinds)[::-1]

    def partner(self, x: str, pick: Pick, fits: Callable[[str], bool]) -> str:
        """Return another stream that fits; `x` itself if there is none."""
        return pick([y for y in self.streams() if y != x and fits(y)] or [x])


Writer = Callable[[Draft, str, Pick], str]
WRITERS: dict[str, Writer] = {}


def writer(function: Writer) -> Writer:
    """Give a step its name."""
    WRITERS[function.__name__] = function
    return function


def write(network: Network) -> str:
    """Return the source of a network, a class `Net`."""
    draft = Draft()
    for place, kind in enumerate(network.inputs):
        draft.names[f"i{place}"] = example(network, BATCH)[place]
        draft.kinds[f"i{place}"] = kind
    with torch.no_grad():
        for step in network.steps:
            _take(draft, step)
        if not draft.lines:
            draft.let("F.relu(i0)", draft.kinds["i0"])
        for end in _ends(draft):
            if network.head:
                _take(draft, Step("linear", draft.streams().index(end)))
    outputs = list(dict.fromkeys([*draft.outputs, *_ends(draft)]))
    returned = outputs[0] if len(outputs) == 1 else f"({', '.join(outputs)})"
    lines = list(draft.lines)
    for step in network.training:
        lines = _in_training(draft, lines, step)
    if lines != draft.lines:
        lines.insert(0, "beside = []")
        lines += ["if self.training and beside:", f"    return {returned}, beside"]
    arguments = ", ".join(f"i{place}" for place in range(len(network.inputs)))
    return "\n".join(
        [
            "class Net(nn.Module):",
            "    def __init__(self):",
            "        super().__init__()",
            *(f"        {line}" for line in draft.layers),
            f"    def forward(self, {arguments}):",
            *(f"        {line}" for line in lines),
            f"        return {returned}",
        ]
    )


def _in_training(draft: Draft, lines: list[str], step: Step) -> list[str]:
    """Let a network do more in training, behind the line that makes one of its streams."""
    pick = Pick(step.picks)
    made = [place for place, line in enumerate(lines) if line.startswith("x")]
    place = made[step.stream % len(made)]
    name, _, text = lines[place].partition(" = ")
    if not draft.names[name].is_floating_point():
        return lines
    kind, channels = draft.kinds[name], draft.channels(name)
    head = f"nn.Linear({channels}, 2)"
    if kind == "map":
        head = f"nn.Conv{len(draft.shape(name)) - 2}d({channels}, 2, 1)"
    options = {
        "noise": f"{name} = {name} + 0.1 * torch.randn_like({name})",
        "factors": f"{name} = {name} * (1 + 0.1 * torch.randn_like({name}))",
        "scale": f"{name} = {name} * 1.5",
        "activation": f"{name} = torch.tanh({name})",
        "again": f"{name} = {name} + {text}",
        "flip": f"{name} = {name}.flip({draft.axis(name)})",
        "output": f"beside.append({name})",
        "head": f"beside.append(HEAD({name}))",
        "deep head": f"beside.append(HEAD(torch.relu({name})))",
        "absolute": f"{name} = {name}.abs()",
    }
    line = options[pick(sorted(options))]
    if "HEAD" in line:
        if kind == "map" and not 3 <= len(draft.shape(name)) <= 5:
            return lines
        line = line.replace("HEAD", draft.layer(head))
    return [*lines[: place + 1], "if self.training:", f"    {line}", *lines[place + 1 :]]


def _ends(draft: Draft) -> list[str]:
    """Return the streams nobody uses, the newest last: what is computed is looked at."""
    used = set(re.findall(r"\w+", " ".join(line.split(" = ", 1)[1] for line in draft.lines)))
    return [x for x in draft.kinds if x.startswith("x") and x not in used]


def _take(draft: Draft, step: Step) -> None:
    """Write a step; one that does not fit leaves the draft as it was."""
    streams = draft.streams()
    stream, known = streams[step.stream % len(streams)], len(draft.lines)
    layers = len(draft.layers)
    try:
        WRITERS[step.name](draft, stream, Pick(step.picks))
    except Refused:
        for place in range(known, len(draft.lines)):
            del draft.kinds[f"x{place}"]
        for place in range(layers, len(draft.layers)):
            if hasattr(draft.names["self"], f"m{place}"):
                delattr(draft.names["self"], f"m{place}")
        del draft.lines[known:]
        del draft.layers[layers:]


def build(source: str, seed: int) -> nn.Module:
    """Make the module of a source, float64, every number of which hides nothing."""
    names = dict(NAMESPACE)
    exec(compile(source, "<network>", "exec"), names)
    torch.manual_seed(seed)
    model: nn.Module = names["Net"]().double()
    for name, parameter in model.named_parameters():
        fan = parameter[0].numel() if parameter.dim() > 1 else 4
        parameter.data.normal_(0, fan**-0.5)
        owner = model.get_submodule(name.rpartition(".")[0])
        if name.endswith("weight") and isinstance(owner, nn.modules.batchnorm._NormBase):
            parameter.data.uniform_(0.5, 1.5)
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
        elif name.endswith("running_mean"):
            buffer.normal_(0, 0.3)
    return model


def example(network: Network, batch: int, size: int = 6) -> tuple[Tensor, ...]:
    """Return inputs of a network; `size` is that of maps, and that of sequences two less."""
    generator = torch.Generator().manual_seed(network.seed + 100 * batch + size)
    shapes = [(batch, *SHAPES[kind][1:]) for kind in network.inputs]
    sized = [{2: s, 3: (s[0], size - 2, s[-1]), 4: (*s[:2], size, size)}[len(s)] for s in shapes]
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64) for s in sized)
