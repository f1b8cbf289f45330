"""Steps that keep channels apart: nonlinearities, norms, pools, borders, scales, joins."""

from tools.networks import Draft, Pick, writer

ACTIVATIONS = (
    *(
        "F.relu({})",
        "self.{}({})",
        "{}.tanh()",
        "F.gelu({})",
        "F.silu({})",
        "F.leaky_relu({}, 0.1)",
    ),
    *("torch.sigmoid({})", "F.hardswish({})", "F.elu({})", "F.softplus({})", "F.relu6({})"),
    *("{}.relu()", "F.relu_({})", "F.relu({}, inplace=True)", "{}.clamp(min=0)", "F.mish({})"),
    *(
        "F.hardsigmoid({})",
        "F.softsign({})",
        "torch.cos({})",
        "torch.sin(F.softsign({}))",  # of large numbers it is all rounding
        "{}.abs()",
        "{}.square()",
    ),
    *(
        "{}.sigmoid_()",
        "F.celu({})",
        "F.selu({})",
        "{}.clamp(-0.5, 2)",
        "F.threshold({}, 0.1, 0.7)",
    ),
)
ACTIVATION_LAYERS = (
    *("nn.ReLU()", "nn.ReLU(inplace=True)", "nn.Tanh()", "nn.Sigmoid()", "nn.GELU()", "nn.SiLU()"),
    *("nn.LeakyReLU(0.2)", "nn.Hardswish(inplace=True)", "nn.ELU()", "nn.Softplus()", "nn.PReLU()"),
    *("nn.Hardtanh(-1, 1)", "nn.ReLU6()", "nn.Mish()", "nn.Softshrink(0.1)"),
)


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
def pool(draft: Draft, x: str, pick: Pick) -> str:
    draft.require(x, "map")
    rank = len(draft.shape(x)) - 2
    form = pick(
        [
            *(
                "F.max_pool{r}d({x}, 2)",
                "F.avg_pool{r}d({x}, 2)",
                "F.adaptive_avg_pool{r}d({x}, 1)",
            ),
            *("F.avg_pool{r}d({x}, 3, 1, 1)", "F.max_pool{r}d({x}, 3, 2, 1, ceil_mode=True)"),
            "F.avg_pool{r}d({x}, 3, 2, 1, False, False)",
            *("F.adaptive_max_pool{r}d({x}, 2)", "F.avg_pool{r}d({x}, 3, 2, 0, True)"),
            *("F.lp_pool{r}d({x}, 2.0, 2)", "F.max_pool{r}d({x}, 2, return_indices=True)[0]"),
            "F.max_unpool{r}d(*F.max_pool{r}d({x}, 2, return_indices=True), 2)",
        ]
    )
    return draft.let(form.format(r=rank, x=x), "map")


@writer
def border(draft: Draft, x: str, pick: Pick) -> str:
    """Pad space, or channels."""
    draft.require(x, "map")
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
    draft.require(x, "map")
    form = pick(["nearest'", "bilinear'", "bilinear', align_corners=True"])
    return draft.let(f"F.interpolate({x}, scale_factor=2, mode='{form})", "map")


@writer
def sampled(draft: Draft, x: str, pick: Pick) -> str:
    """Read a map at places that are computed from a transform."""
    draft.require(x, "map")
    transform = draft.layer("torch.eye(2, 3) * 0.7 + 0.1")
    all_maps = f"{transform}.expand({x}.shape[0], 2, 3)"
    grid = f"F.affine_grid({all_maps}, {x}.size(), align_corners=False)"
    mode = pick(["", ", mode='nearest'", ", padding_mode='border'"])
    return draft.let(f"F.grid_sample({x}, {grid}{mode}, align_corners=False)", "map")


@writer
def along_space(draft: Draft, x: str, pick: Pick) -> str:
    """Sort, add up or measure along an axis beside the channels'."""
    axis, shape = draft.axis(x), draft.shape(x)
    others = [a for a, size in enumerate(shape) if size > 1 and a not in (0, axis)]
    forms = ["{x}.cumsum({s})", "{x}.sort({s}).values", "torch.topk({x}, 1, dim={s}).values"]
    forms += ["{x} - {x}.max({s}, keepdim=True).values", "{x} * {x}.var({s}, keepdim=True)"]
    forms += ["{x} + torch.std_mean({x}, {s}, keepdim=True)[0]", "{x}.cumprod({s})"]
    return draft.let(pick(forms).format(x=x, s=pick(others or [axis])), draft.kinds[x])


@writer
def crossed(draft: Draft, x: str, pick: Pick) -> str:
    """Join two vectors, each with each."""
    draft.require(x, "vector")
    y = draft.partner(x, pick, lambda y: draft.kinds[y] == "vector")
    sign = pick(["*", "*", "+"])
    end = pick([".sum(2)", ".sum(1)", ".flatten(1)", ".amax(2)"])
    return draft.let(f"({x}[:, :, None] {sign} {y}[:, None]){end}", "vector")


@writer
def made_of_sizes(draft: Draft, x: str, pick: Pick) -> str:
    """Join a stream with a tensor that is made of its sizes."""
    axis, rank = draft.axis(x), len(draft.shape(x))
    sizes = ", ".join(f"{x}.shape[{a}]" if a in (0, axis) else "1" for a in range(rank))
    made = pick(["torch.zeros({s})", "{x}.new_ones(({s}))", "torch.full(({s}), 0.5)"])
    form = pick(["{x} + {m}", "torch.maximum({x}, {m}.to({x}))", "{m} * {x}"])
    return draft.let(form.format(x=x, m=made.format(x=x, s=sizes)), draft.kinds[x])


@writer
def scaled_activation(draft: Draft, x: str, pick: Pick) -> str:
    """Scale and shift what a nonlinearity gives, by learnt numbers."""
    scale, shift = (draft.layer("nn.Parameter(torch.randn(1))") for _ in range(2))
    form = pick(["F.relu({x}) * {a} + {b}", "{b} + {a} * F.silu({x})", "{x}.tanh() + {b}"])
    return draft.let(form.format(x=x, a=scale, b=shift), draft.kinds[x])


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
def neutral(draft: Draft, x: str, pick: Pick) -> str:
    """Do nothing in evaluation."""
    forms = [
        "F.dropout({x}, 0.5, self.training)",
        "{x}.detach()",
        "{x}.clone()",
        "{x}.contiguous()",
    ]
    form = pick([*forms, "nn.Dropout(0.3)", "nn.Dropout(0.3, inplace=True)", "nn.Identity()"])
    if form.startswith("nn"):
        return draft.let(f"{draft.layer(form)}({x})", draft.kinds[x])
    return draft.let(form.format(x=x), draft.kinds[x])


@writer
def overwritten(draft: Draft, x: str, pick: Pick) -> str:
    """Write into a part of a stream, and go on with either."""
    part = pick(
        ["{x}[:, :1]", "{x}.chunk(2, 1)[0]", "{x}[:, 1:]", "{x}.view({x}.shape)", "{x}[:, :, :1]"]
    )
    deed = pick(["relu_()", "mul_(0.5)", "add_(1)", "zero_()", "sigmoid_()", "clamp_(min=0)"])
    own = draft.let(pick(["{x} + 0", "{x}.relu()", "{x}"]).format(x=x), draft.kinds[x])
    shrunk = draft.let(f"{part.format(x=own)}.{deed}", draft.kinds[x])
    return pick([draft.let(f"{own} * 1", draft.kinds[x]), shrunk])


@writer
def broadcast(draft: Draft, x: str, pick: Pick) -> str:
    """Join a stream with one of other axes, or of one channel."""
    axis, rank, shape = draft.axis(x), len(draft.shape(x)), draft.shape(x)
    space = tuple(a for a in range(1, rank) if a != axis)
    forms = [
        "{x} * {x}.mean({a}, keepdim=True)",
        "{x} - {x}.amax({s}, keepdim=True)",
        "{x} * {x}.sum()",
    ]
    forms += ["{x}.mean({a}, keepdim=True)", "{x} * {x}.mean({s}, keepdim=True)"]
    vectors = [y for y in draft.streams() if draft.shape(y) == (shape[0], shape[axis])]
    if draft.kinds[x] == "map" and vectors:
        y = pick(vectors)
        forms += [f"{{x}} + {y}" + "[:, :, None, None]"[: -1 - 6 * (4 - rank)] + "]"] * 4
    return draft.let(pick(forms).format(x=x, a=axis, s=space or (1,)), draft.kinds[x])


@writer
def chosen(draft: Draft, x: str, pick: Pick) -> str:
    """Choose elements by a condition."""
    y = draft.partner(x, pick, lambda y: draft.shape(y) == draft.shape(x))
    forms = [
        "{x}.masked_fill({x} < 0.2, 0.5)",
        "torch.where({y} > 0.3, {x}, 0.0)",
        "torch.lerp({x}, {y}, 0.3)",
    ]
    forms += [
        "torch.addcmul({x}, {y}, {y}, value=0.5)",
        "torch.minimum({x}, {y})",
        "{x} * ({y} > 0.3)",
    ]
    forms += [
        "{x}.maximum({y})",
        "torch.where({x} > 0.3, {y}, torch.zeros_like({x}))",
        "{x}.clamp(max={y})",
    ]
    return draft.let(pick(forms).format(x=x, y=y), draft.kinds[x])
