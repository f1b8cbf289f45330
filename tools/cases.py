"""Cases for fuzzing: a network and what is taken from it, drawn from a number; simpler ones."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tools import steps as steps
from tools.networks import WRITERS, Network, Step

MIXING = ("mix_and_activate",) * 7 + ("residual",) * 2 + ("conv", "activation", "relu")
INPUTS = (("map",),) * 5 + (("vector",), ("last",), ("map", "map"), ("vector", "map"))


@dataclass(frozen=True)
class Surgery:
    """What is taken from a model: by gates or by zeros, which share of what, and a seed."""

    how: str = "gates"
    share: float = 0.5
    linearise: bool = False
    seed: int = 0


def draw(number: int) -> tuple[Network, Surgery]:
    """Return case `number`; every second step mixes, so that there is something to take away."""
    chance = random.Random(number)

    def step(names: Sequence[str]) -> Step:
        picks = tuple(chance.randrange(60) for _ in range(5))
        return Step(chance.choice(names), chance.choice((0, 0, 0, 1, 2, 3)), picks)

    steps = [step(MIXING)]
    for _ in range(chance.randint(1, 8)):
        steps.append(step([*MIXING, *WRITERS]))
        steps += [step(MIXING)] if chance.random() < 0.5 else []
    network = Network(chance.choice(INPUTS), tuple(steps), chance.random() < 0.7, number)
    share = chance.choice((0.2, 0.3, 0.4, 0.5, 0.5, 0.7, 1.0))
    how = chance.choice(("gates", "gates", "zeros"))
    if chance.random() < 0.25:
        places = range(chance.randint(1, 3))
        more = tuple(Step("", chance.randrange(60), (chance.randrange(60),)) for _ in places)
        network = replace(network, training=more)
    return network, Surgery(how, share, chance.random() < 0.5, number)


def simpler(network: Network, surgery: Surgery) -> Iterator[tuple[Network, Surgery]]:
    """Yield cases that are one choice simpler."""
    steps = network.steps
    for place in reversed(range(len(steps))):
        yield replace(network, steps=(*steps[:place], *steps[place + 1 :])), surgery
    for place, step in enumerate(steps):
        for simple in _simpler_steps(step):
            yield replace(network, steps=(*steps[:place], simple, *steps[place + 1 :])), surgery
    for place in range(len(network.training)):
        left = (*network.training[:place], *network.training[place + 1 :])
        yield replace(network, training=left), surgery
    if len(network.inputs) > 1:
        yield replace(network, inputs=network.inputs[:1]), surgery
    if surgery.linearise:
        yield network, replace(surgery, linearise=False)


def _simpler_steps(step: Step) -> Iterator[Step]:
    if step.name in ("mix_and_activate", "residual"):
        yield Step("linear", step.stream, step.picks[:1])
    if step.stream:
        yield replace(step, stream=0)
    if step.picks:
        yield replace(step, picks=step.picks[:-1])
    for place, number in enumerate(step.picks):
        if number:
            yield replace(step, picks=(*step.picks[:place], 0, *step.picks[place + 1 :]))
