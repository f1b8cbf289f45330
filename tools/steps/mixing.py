"""Steps that mix channels: linear layers and convolutions in all forms, sharing weights or not."""

from tools.networks import Draft, Pick, Refused, writer
from tools.steps.elementwise import activation


@writer
def linear(draft: Draft, x: str, pick: Pick) -> str:
    """Mix channels by the simplest layer there is for a stream."""
    width, outs = draft.channels(x), pick([4, 6, 2, 8])
    bias = pick(["", ", bias=False"])
    if draft.kinds[x] == "map":
        rank = len(draft.shape(x)) - 2
        layer = draft.layer(f"nn.Conv{rank}d({width}, {outs}, 1{bias})")
    else:
        layer = draft.layer(f"nn.Linear({width}, {outs}{bias})")
    return draft.let(f"{layer}({x})", draft.kinds[x])


@writer
def mix_and_activate(draft: Draft, x: str, pick: Pick) -> str:
    return activation(draft, (conv if pick([False, True]) else linear)(draft, x, pick), pick)


@writer
def conv(draft: Draft, x: str, pick: Pick) -> str:
    """Mix a map's channels in a neighbourhood."""
    if draft.kinds[x] != "map":
        return linear(draft, x, pick)
    rank, width = len(draft.shape(x)) - 2, draft.channels(x)
    outs = pick([4, 6, 2, 8])
    form = pick(
        [
            *("3", "3, padding=1", "3, padding=1, bias=False", "3, padding=2, dilation=2"),
            *("3, stride=2, padding=1", "2", "3, padding='same', padding_mode='reflect'"),
            *("3, padding=1, padding_mode='circular'", "3, padding=1, padding_mode='replicate'"),
            *("3, padding='same'", "1, padding=1"),
        ]
    )
    groups = pick([1, 1, 1, 2, 3])
    layer = draft.layer(
        f"nn.Conv{rank}d({width}, {outs}, {form}, groups={_groups(groups, width, outs)})"
    )
    return draft.let(f"{layer}({x})", "map")


@writer
def depthwise(draft: Draft, x: str, pick: Pick) -> str:
    draft.require(x, "map")
    rank, width = len(draft.shape(x)) - 2, draft.channels(x)
    form = pick(["3", "3, padding=1", "1", "3, padding=1, bias=False"])
    outs = width * pick([1, 1, 2, 3])
    transposed = pick(["", "", "", "Transpose"])
    layer = draft.layer(f"nn.Conv{transposed}{rank}d({width}, {outs}, {form}, groups={width})")
    return draft.let(f"{layer}({x})", "map")


@writer
def transposed_conv(draft: Draft, x: str, pick: Pick) -> str:
    draft.require(x, "map")
    rank, width, outs = len(draft.shape(x)) - 2, draft.channels(x), pick([4, 6, 2, 8])
    form = pick(["2, 2", "1", "3, padding=1", "3, 2, output_padding=1", "2, 2, bias=False"])
    groups = _groups(pick([1, 1, 2]), width, outs)
    layer = draft.layer(f"nn.ConvTranspose{rank}d({width}, {outs}, {form}, groups={groups})")
    return draft.let(f"{layer}({x})", "map")


@writer
def functional_mixing(draft: Draft, x: str, pick: Pick) -> str:
    """Mix by a function and raw parameters."""
    width, outs = draft.channels(x), pick([4, 6, 2])
    biased = pick([True, False])
    bias = draft.layer(f"nn.Parameter(torch.randn({outs}))") if biased else "None"
    if draft.kinds[x] != "map":
        weight = draft.layer(f"nn.Parameter(torch.randn({outs}, {width}))")
        return draft.let(f"F.linear({x}, {weight}, {bias})", draft.kinds[x])
    rank = len(draft.shape(x)) - 2
    form = pick(["plain", "padded", "grouped", "depthwise", "transposed"])
    groups = {"grouped": _groups(2, width, outs), "depthwise": width}.get(form, 1)
    outs = width if form == "depthwise" else outs
    bias = bias if form != "depthwise" else "None"
    first, second = (width, outs) if form == "transposed" else (outs, width // groups)
    kernel = ", 3" * rank
    weight = draft.layer(f"nn.Parameter(torch.randn({first}, {second}{kernel}))")
    name = "conv_transpose" if form == "transposed" else "conv"
    padding = ", padding=1" if form == "padded" else ""
    ending = f", groups={groups}" if pick([True, False]) else ""
    ending = ending or (f", 1, 0, 1, {groups}" if groups > 1 and not padding else "")
    return draft.let(f"F.{name}{rank}d({x}, {weight}, {bias}{padding}{ending})", "map")


@writer
def again(draft: Draft, x: str, pick: Pick) -> str:
    """Call a layer there is a second time."""
    width = draft.channels(x)
    mixing = "Conv" if draft.kinds[x] == "map" else "Linear"
    layers = [
        line.split(" = ")[0]
        for line in draft.layers[::-1]
        if (f"nn.{mixing}" in line and f"({width}," in line)
        or ("Norm" in line and f"({width}" in line)
    ]
    if not layers:
        raise Refused
    return draft.let(f"{pick(layers)}({x})", draft.kinds[x])


@writer
def tied(draft: Draft, x: str, pick: Pick) -> str:
    """Use the weight of a layer there is, as it is or transposed."""
    width = draft.channels(x)
    if draft.kinds[x] == "map":
        raise Refused
    fits = [line for line in draft.layers[::-1] if f" = nn.Linear({width}," in line]
    turned = [line for line in draft.layers[::-1] if f", {width})" in line and "nn.Linear" in line]
    forms = [f"F.linear({x}, {line.split(' = ')[0]}.weight)" for line in fits]
    forms += [f"F.linear({x}, {line.split(' = ')[0]}.weight.t())" for line in turned]
    forms += [f"{x} @ {line.split(' = ')[0]}.weight" for line in turned]
    if not forms:
        raise Refused
    return draft.let(pick(forms), draft.kinds[x])


@writer
def sharing(draft: Draft, x: str, pick: Pick) -> str:
    """Mix by a layer of its own that holds the weight of another."""
    mixing = "nn.Conv" if draft.kinds[x] == "map" else "nn.Linear"
    fits = [
        line for line in draft.layers if f" = {mixing}" in line and f"({draft.channels(x)}," in line
    ]
    if not fits:
        raise Refused
    other, text = pick(fits[::-1]).split(" = ", 1)
    layer = draft.layer(text)
    draft.own(f"{layer}.weight = {other}.weight")
    if pick([False, True]):
        draft.own(f"{layer}.bias = {other}.bias")
    return draft.let(f"{layer}({x})", draft.kinds[x])


@writer
def computed(draft: Draft, x: str, pick: Pick) -> str:
    """Mix by a layer whose weight a norm computes."""
    norm = f"torch.nn.utils.parametrizations.{pick(['weight_norm', 'spectral_norm'])}"
    width, outs, kind = draft.channels(x), pick([4, 6, 2]), draft.kinds[x]
    rank = len(draft.shape(x)) - 2
    mixing = f"nn.Conv{rank}d({width}, {outs}, 3, padding=1)"
    mixing = mixing if kind == "map" else f"nn.Linear({width}, {outs})"
    return draft.let(f"{draft.layer(f'{norm}({mixing})')}({x})", kind)


@writer
def computed_in_the_forward(draft: Draft, x: str, pick: Pick) -> str:
    """Mix by a function of a weight that the forward computes of a layer's."""
    width, outs, kind = draft.channels(x), pick([4, 6, 2]), draft.kinds[x]
    rank = len(draft.shape(x)) - 2
    convolution = kind == "map"
    mixing = f"nn.Conv{rank}d({width}, {outs}, 3)" if convolution else f"nn.Linear({width}, {outs})"
    layer = draft.layer(mixing)
    forms = (
        "{w} * 1.5",
        "{w}.tanh()",
        "F.normalize({w}, dim=0)",
        "{w} - {w}.mean(1, keepdim=True)",
    )
    weight = pick(forms).format(w=f"{layer}.weight")
    given = f"{x}, {weight}, {layer}.bias{pick(['', ' * 0.5'])}"
    called = f"F.conv{rank}d({given}, padding=1)" if convolution else f"F.linear({given})"
    return draft.let(called, kind)


@writer
def residual(draft: Draft, x: str, pick: Pick) -> str:
    """Add a branch of the stream's own width to it."""
    width, kind = draft.channels(x), draft.kinds[x]
    rank = len(draft.shape(x)) - 2
    form = f"nn.Conv{rank}d({width}, {width}, 3, padding=1)"
    layer = draft.layer(form if kind == "map" else f"nn.Linear({width}, {width})")
    branch = activation(draft, draft.let(f"{layer}({x})", kind), pick)
    return draft.let(f"{x} + {branch}", kind)


@writer
def squeeze_and_excite(draft: Draft, x: str, pick: Pick) -> str:
    draft.require(x, "map")
    width, rank = draft.channels(x), len(draft.shape(x)) - 2
    axes = tuple(range(2, rank + 2))
    if pick([True, False]):
        down = draft.layer(f"nn.Conv{rank}d({width}, 4, 1)")
        up = draft.layer(f"nn.Conv{rank}d(4, {width}, 1)")
        pooled = draft.let(f"{x}.mean({axes}, keepdim=True)", "map")
        hidden = activation(draft, draft.let(f"{down}({pooled})", "map"), pick)
        return draft.let(f"{x} * {up}({hidden}).sigmoid()", "map")
    down, up = draft.layer(f"nn.Linear({width}, 4)"), draft.layer(f"nn.Linear(4, {width})")
    pooled = draft.let(f"{x}.mean({axes})", "vector")
    hidden = activation(draft, draft.let(f"{down}({pooled})", "vector"), pick)
    gate = draft.let(f"{up}({hidden}).sigmoid()", "vector")
    ones = ", 1" * rank
    return draft.let(f"{x} * {gate}.view({x}.shape[0], {width}{ones})", "map")


@writer
def mixed_along_another_axis(draft: Draft, x: str, pick: Pick) -> str:
    """Mix tokens, or columns, as a mixer does."""
    shape, kind = draft.shape(x), draft.kinds[x]
    if kind == "map":
        layer = draft.layer(f"nn.Linear({shape[-1]}, {pick([shape[-1], 4, 2])})")
        return draft.let(f"{layer}({x})", "map")
    draft.require(x, "last")
    layer = draft.layer(f"nn.Linear({shape[-2]}, {pick([shape[-2], 4])})")
    middle = draft.let(f"{layer}({x}.transpose(-1, -2))", "map")
    again = draft.let(f"F.gelu({middle})", "map")
    return draft.let(f"{again}.transpose(-1, -2)", "last")


@writer
def batch_of_tokens(draft: Draft, x: str, pick: Pick) -> str:
    """Take every token for an example of its own, mix, and go back."""
    draft.require(x, "last")
    flat = draft.let(
        pick(["{x}.flatten(0, -2)", "{x}.reshape(-1, {x}.shape[-1])"]).format(x=x), "vector"
    )
    mixed = mix_and_activate(draft, flat, pick)
    sizes = ", ".join(f"{x}.shape[{place}]" for place in range(len(draft.shape(x)) - 1))
    return draft.let(f"{mixed}.view({sizes}, {pick(['-1', str(draft.channels(mixed))])})", "last")


def _groups(wanted: int, ins: int, outs: int) -> int:
    return wanted if ins % wanted == 0 and outs % wanted == 0 else 1
