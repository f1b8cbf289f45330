"""The steps random networks are made of, a writer for each.

A writer appends lines to a draft and says of each where its channels lie. The first of the options
of a choice is the simplest: there a shrinking failure ends.
"""

from tools.networks import Draft, Pick, Refused, writer

ACTIVATIONS = (
    *("F.relu({})", "self.{}({})", "{}.tanh()", "F.gelu({})", "F.silu({})", "F.leaky_relu({}, 0.1)"),
    *("torch.sigmoid({})", "F.hardswish({})", "F.elu({})", "F.softplus({})", "F.relu6({})"),
    *("{}.relu()", "F.relu_({})", "F.relu({}, inplace=True)", "{}.clamp(min=0)", "F.mish({})"),
    *("F.hardsigmoid({})", "F.softsign({})", "torch.cos({})", "{}.abs()", "{}.square()"),
    *("{}.sigmoid_()", "F.celu({})", "F.selu({})", "{}.clamp(-0.5, 2)", "F.threshold({}, 0.1, 0.7)"),
)
ACTIVATION_LAYERS = (
    *("nn.ReLU()", "nn.ReLU(inplace=True)", "nn.Tanh()", "nn.Sigmoid()", "nn.GELU()", "nn.SiLU()"),
    *("nn.LeakyReLU(0.2)", "nn.Hardswish(inplace=True)", "nn.ELU()", "nn.Softplus()", "nn.PReLU()"),
    *("nn.Hardtanh(-1, 1)", "nn.ReLU6()", "nn.Mish()", "nn.Softshrink(0.1)"),
)


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
    layer = draft.layer(f"nn.Conv{rank}d({width}, {outs}, {form}, groups={_groups(groups, width, outs)})")
    return draft.let(f"{layer}({x})", "map")


@writer
def depthwise(draft: Draft, x: str, pick: Pick) -> str:
    _require(draft, x, "map")
    rank, width = len(draft.shape(x)) - 2, draft.channels(x)
    form = pick(["3", "3, padding=1", "1", "3, padding=1, bias=False"])
    outs = width * pick([1, 1, 2, 3])
    transposed = pick(["", "", "", "Transpose"])
    layer = draft.layer(f"nn.Conv{transposed}{rank}d({width}, {outs}, {form}, groups={width})")
    return draft.let(f"{layer}({x})", "map")


@writer
def transposed_conv(draft: Draft, x: str, pick: Pick) -> str:
    _require(draft, x, "map")
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
        if f"nn.{mixing}" in line and f"({width}," in line or "Norm" in line and f"({width}" in line
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
    fits = [line for line in draft.layers if f" = {mixing}" in line and f"({draft.channels(x)}," in line]
    if not fits:
        raise Refused
    other, text = pick(fits[::-1]).split(" = ", 1)
    layer = draft.layer(text)
    draft.own(f"{layer}.weight = {other}.weight")
    if pick([False, True]):
        draft.own(f"{layer}.bias = {other}.bias")
    return draft.let(f"{layer}({x})", draft.kinds[x])


@writer
def batch_norm(draft: Draft, x: str, pick: Pick) -> str:
    """Normalise by stored statistics."""
    rank = len(draft.shape(x)) - 2
    affine = pick(["", ", affine=False"])
    layer = draft.layer(f"nn.BatchNorm{max(rank, 1)}d({draft.shape(x)[1]}{affine})")
    return draft.let(f"{layer}({x})", draft.kinds[x])


@writer
def normalisation(draft: Draft, x: str, pick: Pick) -> str:
    """Normalise over channels, or over each map."""
    width, shape = draft.channels(x), draft.shape(x)
    rank = max(len(shape) - 2, 1)
    form = pick(
        [
            *(f"nn.LayerNorm({shape[-1]})", f"nn.GroupNorm({2 if width % 2 == 0 else 1}, {width})"),
            *(f"nn.InstanceNorm{rank}d({width})", f"nn.InstanceNorm{rank}d({width}, affine=True)"),
            f"nn.InstanceNorm{rank}d({width}, affine=True, track_running_stats=True)",
            f"nn.InstanceNorm{rank}d({width}, track_running_stats=True)",
            *(f"nn.RMSNorm({shape[-1]})", f"nn.GroupNorm({width}, {width})", "nn.Softmax(1)"),
        ]
    )
    layer = draft.layer(form)
    return draft.let(f"{layer}({x})", draft.kinds[x])


@writer
def reduction_over_channels(draft: Draft, x: str, pick: Pick) -> str:
    """Mix channels without a weight."""
    form = pick(
        [
            *("{x}.softmax({a})", "F.normalize({x}, dim={a})", "{x} - {x}.mean({a}, keepdim=True)"),
            *("{x} * {x}.amax({a}, keepdim=True)", "{x}.cumsum({a})", "{x}.sort({a})[0]"),
            "{x} * {x}.sum({a}, keepdim=True).tanh()",
        ]
    )
    return draft.let(form.format(x=x, a=draft.axis(x)), draft.kinds[x])


@writer
def activation(draft: Draft, x: str, pick: Pick) -> str:
    """Apply a nonlinearity, as module, function or method, perhaps in place."""
    form = pick(ACTIVATIONS)
    if not form.startswith("self"):
        return draft.let(form.format(x), draft.kinds[x])
    slopes = [f"nn.PReLU({draft.shape(x)[1]})"]
    layer = draft.layer(pick([*ACTIVATION_LAYERS, *slopes]))
    return draft.let(f"{layer}({x})", draft.kinds[x])


@writer
def relu(draft: Draft, x: str, pick: Pick) -> str:
    return draft.let(f"F.relu({x})", draft.kinds[x])


@writer
def pool(draft: Draft, x: str, pick: Pick) -> str:
    _require(draft, x, "map")
    rank = len(draft.shape(x)) - 2
    form = pick(
        [
            *("F.max_pool{r}d({x}, 2)", "F.avg_pool{r}d({x}, 2)", "F.adaptive_avg_pool{r}d({x}, 1)"),
            *("F.avg_pool{r}d({x}, 3, 1, 1)", "F.max_pool{r}d({x}, 3, 2, 1, ceil_mode=True)"),
            "F.avg_pool{r}d({x}, 3, 2, 1, False, False)",
            *("F.adaptive_max_pool{r}d({x}, 2)", "F.avg_pool{r}d({x}, 3, 2, 0, True)"),
        ]
    )
    return draft.let(form.format(r=rank, x=x), "map")


@writer
def border(draft: Draft, x: str, pick: Pick) -> str:
    """Pad space, or channels."""
    _require(draft, x, "map")
    rank, width = len(draft.shape(x)) - 2, draft.channels(x)
    modes = ("", ", value=0.3", ", mode='replicate'", ", mode='reflect'", ", mode='circular'")
    form = pick(["space", "space", "channels"])
    if form == "space":
        widths = ", ".join(["1"] * 2 * rank)
        return draft.let(f"F.pad({x}, ({widths}){pick(modes)})", "map")
    widths = ", ".join([*["0"] * 2 * rank, *pick([("0", "2"), ("1", "1"), (f"{width}", "0")])])
    return draft.let(f"F.pad({x}, ({widths}){pick(modes[:2])})", "map")


@writer
def resampling(draft: Draft, x: str, pick: Pick) -> str:
    _require(draft, x, "map")
    form = pick(["nearest'", "bilinear'", "bilinear', align_corners=True"])
    return draft.let(f"F.interpolate({x}, scale_factor=2, mode='{form})", "map")


@writer
def joined(draft: Draft, x: str, pick: Pick) -> str:
    """Join two streams of one shape element by element."""
    y = draft.partner(x, pick, lambda y: draft.shape(y) == draft.shape(x))
    form = pick(
        [
            *("{x} + {y}", "{x} * {y}", "{x} - {y}", "torch.maximum({x}, {y})", "{x}.add_({y})"),
            *("torch.where({x} > 0.3, {x}, {y})", "{x} + 0.5 * {y}", "{x}.mul_({y})"),
            *("torch.add({x}, {y}, alpha=0.5)", "{x} / ({y} * {y} + 1)", "{x} + {y}.detach()"),
        ]
    )
    return draft.let(form.format(x=x, y=y), draft.kinds[x])


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
def concatenated(draft: Draft, x: str, pick: Pick) -> str:
    axis = draft.axis(x)

    def fits(y: str) -> bool:
        mine, other = draft.shape(x), draft.shape(y)
        return len(mine) == len(other) and all(
            a == b for place, (a, b) in enumerate(zip(mine, other, strict=True)) if place != axis
        )

    y = draft.partner(x, pick, fits)
    form = pick(
        [
            *("torch.cat([{x}, {y}], {a})", "torch.cat(({y}, {x}, {x}), dim={a})"),
            "torch.stack([{x}, {y}], {a}).flatten({a}, {b})",
            "torch.stack([{x}, {y}], {b}).flatten({a}, {b})",
            *("torch.stack([{x}, {y}]).sum(0)", "torch.cat([{x}, {y}], 0)"),
        ]
    )
    return draft.let(form.format(x=x, y=y, a=axis, b=axis + 1), draft.kinds[x])


@writer
def taken_apart(draft: Draft, x: str, pick: Pick) -> str:
    """Take channels apart, and use one part or several."""
    axis, width = draft.axis(x), draft.channels(x)
    half = width // 2
    spelling = pick(
        [
            *("{x}.chunk(2, {a})", "torch.split({x}, {half}, {a})", "{x}.split([1, {rest}], {a})"),
            *("torch.chunk({x}, 2, dim={a})", "{x}.tensor_split(2, {a})"),
        ]
    ).format(x=x, a=axis, half=half, rest=width - 1)
    form = pick(
        [
            *("{s}[0]", "{s}[1]", "{s}[0] * {s}[1].sigmoid()", "torch.cat({s}[::-1], {a})"),
            *("F.glu({x}, {a})", "torch.cat([F.relu({s}[0]), {s}[1]], {a})", "{s}[0] + {s}[1]"),
        ]
    )
    return draft.let(form.format(s=spelling, x=x, a=axis), draft.kinds[x])


@writer
def sliced(draft: Draft, x: str, pick: Pick) -> str:
    width, kind = draft.channels(x), draft.kinds[x]
    bounds = pick([":2", "1:", f"{width // 2}:", ":-1", "::2", "1:3", f":{width}", "::-1", "[0, 1]"])
    if kind == "last":
        form = pick(["{x}[..., {b}]", "{x}[:, 1:]", "{x}[:, :, {b}]"])
    else:
        form = pick(["{x}[:, {b}]", "{x}[:, {b}, ...]", "{x}[:, {b}, 1:]", "{x}.narrow(1, 0, 2)"])
    return draft.let(form.format(x=x, b=bounds), kind)


@writer
def scaled(draft: Draft, x: str, pick: Pick) -> str:
    """Scale or shift by a raw parameter or buffer."""
    shape, axis = draft.shape(x), draft.axis(x)
    channels = [1] * len(shape)
    channels[axis] = shape[axis]
    shapes = [channels, channels[axis:], [1], [], shape[1:], [1, *shape[1:]], [1] * len(shape)]
    size = ", ".join(map(str, pick(shapes)))
    make = pick(["nn.Parameter(torch.randn({}))", "torch.rand({}) + 0.5", "torch.randn({}) + 0"])
    held = draft.layer(make.format(size or "()"))
    form = pick(["{x} * {h}", "{x} + {h}", "{h} - {x}", "{x} * {h}.exp()", "torch.mul({x}, {h})"])
    return draft.let(form.format(x=x, h=held), draft.kinds[x])


@writer
def shifted_by_numbers(draft: Draft, x: str, pick: Pick) -> str:
    forms = ["{x} + 1", "2 * {x}", "{x} / 3", "1 - {x}", "-{x}", "{x}.add_(0.5)", "{x} * 0"]
    forms += ["{x} / {x}.shape[1] ** 0.5", "{x}.mul(0.5)", "{x} ** 2"]
    return draft.let(pick(forms).format(x=x), draft.kinds[x])


@writer
def shuffled(draft: Draft, x: str, pick: Pick) -> str:
    """Shuffle channels, in either spelling."""
    _require(draft, x, "map")
    n, width, *space = draft.shape(x)
    if width % 2:
        raise Refused
    rest = ", ".join(f"{x}.shape[{place + 2}]" for place in range(len(space)))
    literal = ", ".join(map(str, space))
    form = pick(
        [
            "F.channel_shuffle({x}, 2)",
            "{x}.view({x}.shape[0], 2, {w}, {r}).transpose(1, 2).flatten(1, 2)",
            "{x}.reshape({x}.size(0), {w}, 2, {l}).transpose(1, 2).reshape(-1, {full}, {l})",
            "{x}.unflatten(1, (2, {w})).transpose(1, 2).flatten(1, 2)",
            "{x}.view({x}.size(0), {x}.size(1) // 2, 2, {r}).transpose(1, 2)"
            ".contiguous().view({x}.size(0), -1, {r})",
        ]
    )
    return draft.let(form.format(x=x, w=width // 2, r=rest, l=literal, full=width), "map")


@writer
def pixels(draft: Draft, x: str, pick: Pick) -> str:
    _require(draft, x, "map")
    return draft.let(pick(["F.pixel_shuffle({}, 2)", "F.pixel_unshuffle({}, 2)"]).format(x), "map")


@writer
def moved(draft: Draft, x: str, pick: Pick) -> str:
    """Flip or roll along channels or space."""
    axis = pick([draft.axis(x), draft.axis(x), 1, -1])
    form = pick(["{x}.flip({a})", "{x}.roll(1, {a})", "torch.roll({x}, 2, {a})"])
    return draft.let(form.format(x=x, a=axis), draft.kinds[x])


@writer
def permuted(draft: Draft, x: str, pick: Pick) -> str:
    """Move channels to the end, or back."""
    rank = len(draft.shape(x))
    if draft.kinds[x] == "map":
        order = ", ".join(map(str, (0, *range(2, rank), 1)))
        forms = [f"{x}.permute({order})", f"{x}.movedim(1, -1)", f"{x}.flatten(2).transpose(1, 2)"]
        return draft.let(pick(forms), "last")
    _require(draft, x, "last")
    order = ", ".join(map(str, (0, rank - 1, *range(1, rank - 1))))
    return draft.let(pick([f"{x}.permute({order})", f"{x}.movedim(-1, 1)"]), "map")


@writer
def flattened(draft: Draft, x: str, pick: Pick) -> str:
    """Make a vector of a map."""
    if draft.kinds[x] == "vector":
        raise Refused
    size = 1
    for length in draft.shape(x)[1:]:
        size *= length
    forms = ["{x}.flatten(1)", "{x}.reshape({x}.shape[0], -1)", "{x}.reshape(-1, {s})"]
    forms += ["torch.flatten({x}, 1)", "{x}.reshape({x}.size(0), {s})", "{x}.contiguous().view(3, -1)"]
    return draft.let(pick(forms).format(x=x, s=size), "vector")


@writer
def averaged(draft: Draft, x: str, pick: Pick) -> str:
    kind, rank = draft.kinds[x], len(draft.shape(x))
    if kind == "vector":
        raise Refused
    axes = tuple(range(2, rank)) if kind == "map" else tuple(range(1, rank - 1))
    form = pick(["{x}.mean({a})", "{x}.amax({a})", "{x}.sum({a})", "torch.mean({x}, dim={a})"])
    return draft.let(form.format(x=x, a=axes), "vector")


@writer
def unflattened(draft: Draft, x: str, pick: Pick) -> str:
    """Make a map of a vector."""
    _require(draft, x, "vector")
    width = draft.channels(x)
    if width % 2:
        forms = ["{x}[:, :, None, None]", "{x}.unsqueeze(2)", "{x}.view(-1, {w}, 1, 1)"]
    else:
        forms = ["{x}.view(-1, {h}, 2, 1)", "{x}.view({x}.shape[0], 2, {h}, 1)"]
        forms += ["{x}.unflatten(1, ({h}, 2))", "{x}[:, :, None, None].expand(-1, -1, 2, 2)"]
    return draft.let(pick(forms).format(x=x, w=width, h=width // 2), "map")


@writer
def squeeze_and_excite(draft: Draft, x: str, pick: Pick) -> str:
    _require(draft, x, "map")
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
def neutral(draft: Draft, x: str, pick: Pick) -> str:
    """Do nothing in evaluation."""
    forms = ["F.dropout({x}, 0.5, self.training)", "{x}.detach()", "{x}.clone()", "{x}.contiguous()"]
    form = pick([*forms, "nn.Dropout(0.3)", "nn.Dropout(0.3, inplace=True)", "nn.Identity()"])
    if form.startswith("nn"):
        return draft.let(f"{draft.layer(form)}({x})", draft.kinds[x])
    return draft.let(form.format(x=x), draft.kinds[x])


@writer
def overwritten(draft: Draft, x: str, pick: Pick) -> str:
    """Write into a part of a stream, and go on with either."""
    part = pick(["{x}[:, :1]", "{x}.chunk(2, 1)[0]", "{x}[:, 1:]", "{x}.view({x}.shape)", "{x}[:, :, :1]"])
    deed = pick(["relu_()", "mul_(0.5)", "add_(1)", "zero_()", "sigmoid_()", "clamp_(min=0)"])
    own = draft.let(pick(["{x} + 0", "{x}.relu()", "{x}"]).format(x=x), draft.kinds[x])
    shrunk = draft.let(f"{part.format(x=own)}.{deed}", draft.kinds[x])
    return pick([draft.let(f"{own} * 1", draft.kinds[x]), shrunk])


@writer
def mixed_along_another_axis(draft: Draft, x: str, pick: Pick) -> str:
    """Mix tokens, or columns, as a mixer does."""
    shape, kind = draft.shape(x), draft.kinds[x]
    if kind == "map":
        layer = draft.layer(f"nn.Linear({shape[-1]}, {pick([shape[-1], 4, 2])})")
        return draft.let(f"{layer}({x})", "map")
    _require(draft, x, "last")
    layer = draft.layer(f"nn.Linear({shape[-2]}, {pick([shape[-2], 4])})")
    middle = draft.let(f"{layer}({x}.transpose(-1, -2))", "map")
    again = draft.let(f"F.gelu({middle})", "map")
    return draft.let(f"{again}.transpose(-1, -2)", "last")


@writer
def broadcast(draft: Draft, x: str, pick: Pick) -> str:
    """Join a stream with one of other axes, or of one channel."""
    axis, rank, shape = draft.axis(x), len(draft.shape(x)), draft.shape(x)
    space = tuple(a for a in range(1, rank) if a != axis)
    forms = ["{x} * {x}.mean({a}, keepdim=True)", "{x} - {x}.amax({s}, keepdim=True)", "{x} * {x}.sum()"]
    forms += ["{x}.mean({a}, keepdim=True)", "{x} * {x}.mean({s}, keepdim=True)"]
    vectors = [y for y in draft.streams() if draft.shape(y) == (shape[0], shape[axis])]
    if draft.kinds[x] == "map" and vectors:
        y = pick(vectors)
        forms += [f"{{x}} + {y}" + "[:, :, None, None]"[: -1 - 6 * (4 - rank)] + "]"] * 4
    return draft.let(pick(forms).format(x=x, a=axis, s=space or (1,)), draft.kinds[x])


@writer
def repeated(draft: Draft, x: str, pick: Pick) -> str:
    """Repeat channels, or put them in another order."""
    axis, width, rank = draft.axis(x), draft.channels(x), len(draft.shape(x))
    times = ", ".join("2" if place == axis else "1" for place in range(rank))
    order = draft.layer(f"torch.arange({width}).flip(0)")
    forms = ["{x}.repeat({t})", "{x}.repeat_interleave(2, {a})", "torch.tile({x}, ({t}))"]
    forms += ["{x}.index_select({a}, {o})", "torch.cat([{x}, {x}], {a})", "{x}[:, {o}]"]
    return draft.let(pick(forms).format(x=x, t=times, a=axis, o=order), draft.kinds[x])


@writer
def batch_of_tokens(draft: Draft, x: str, pick: Pick) -> str:
    """Take every token for an example of its own, mix, and go back."""
    _require(draft, x, "last")
    flat = draft.let(pick(["{x}.flatten(0, -2)", "{x}.reshape(-1, {x}.shape[-1])"]).format(x=x), "vector")
    mixed = mix_and_activate(draft, flat, pick)
    sizes = ", ".join(f"{x}.shape[{place}]" for place in range(len(draft.shape(x)) - 1))
    return draft.let(f"{mixed}.view({sizes}, {pick(['-1', str(draft.channels(mixed))])})", "last")


@writer
def chosen(draft: Draft, x: str, pick: Pick) -> str:
    """Choose elements by a condition."""
    y = draft.partner(x, pick, lambda y: draft.shape(y) == draft.shape(x))
    forms = ["{x}.masked_fill({x} < 0.2, 0.5)", "torch.where({y} > 0.3, {x}, 0.0)", "torch.lerp({x}, {y}, 0.3)"]
    forms += ["torch.addcmul({x}, {y}, {y}, value=0.5)", "torch.minimum({x}, {y})", "{x} * ({y} > 0.3)"]
    forms += ["{x}.maximum({y})", "torch.where({x} > 0.3, {y}, torch.zeros_like({x}))", "{x}.clamp(max={y})"]
    return draft.let(pick(forms).format(x=x, y=y), draft.kinds[x])


@writer
def attention(draft: Draft, x: str, pick: Pick) -> str:
    """Attend, with one head."""
    _require(draft, x, "last")
    if len(draft.shape(x)) != 3:
        raise Refused
    width = draft.channels(x)
    layer = draft.layer(f"nn.Linear({width}, {3 * width})")
    whole = draft.let(f"{layer}({x})", "last")
    q, k, v = (f"{whole}.chunk(3, -1)[{place}]" for place in range(3))
    forms = [f"F.scaled_dot_product_attention({q}, {k}, {v})"]
    forms += [f"({q} @ {k}.transpose(1, 2) / {width**0.5}).softmax(-1) @ {v}"]
    forms += [f"torch.bmm(torch.bmm({q}, {k}.transpose(1, 2)), {v})"]
    return draft.let(pick(forms), "last")


@writer
def output(draft: Draft, x: str, pick: Pick) -> str:
    """Return a stream, though the network goes on."""
    draft.outputs.append(x)
    return x


def _groups(wanted: int, ins: int, outs: int) -> int:
    return wanted if ins % wanted == 0 and outs % wanted == 0 else 1


def _require(draft: Draft, x: str, kind: str) -> None:
    if draft.kinds[x] != kind:
        raise Refused
