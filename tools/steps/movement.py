"""Steps that move data: parts, orders, shapes."""

from tools.networks import Draft, Pick, Refused, writer


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
    bounds = pick(
        [":2", "1:", f"{width // 2}:", ":-1", "::2", "1:3", f":{width}", "::-1", "[0, 1]"]
    )
    if kind == "last":
        form = pick(["{x}[..., {b}]", "{x}[:, 1:]", "{x}[:, :, {b}]"])
    else:
        form = pick(["{x}[:, {b}]", "{x}[:, {b}, ...]", "{x}[:, {b}, 1:]", "{x}.narrow(1, 0, 2)"])
    return draft.let(form.format(x=x, b=bounds), kind)


@writer
def cut_to_length(draft: Draft, x: str, pick: Pick) -> str:
    """Add or multiply a table of places, cut to the length of the stream."""
    width, kind, long = draft.channels(x), draft.kinds[x], 12
    shape = draft.shape(x)
    if kind == "last" and len(shape) == 3:
        table, size = draft.layer(f"nn.Parameter(torch.randn({long}, {width}))"), f"{x}.shape[1]"
        forms = [
            *("{x} + {t}[:{n}]", "{x} * {t}[1:{n} + 1]", "{x} + {t}[{n} - 1]"),
            *("{x} + {t}.narrow(0, 2, {n})", "{x} + {t}.split([{n}, 12 - {n}])[0]"),
            "{x} * {t}[:{n}].sigmoid().roll({n}, 0)",
        ]
    elif kind == "map" and len(shape) == 4:
        table, size = draft.layer(f"nn.Parameter(torch.randn({width}, {long}))"), f"{x}.size(3)"
        forms = [
            *("{x} + {t}[:, :{n}].unsqueeze(1)", "{x} * {t}[:, {n} - 1].view(-1, 1, 1)"),
            "{x} * {t}.narrow(1, 1, {n})[:, None]",
        ]
    else:
        raise Refused
    return draft.let(pick(forms).format(x=x, t=table, n=size), kind)


@writer
def picked_beside(draft: Draft, x: str, pick: Pick) -> str:
    """Pick, or take apart, along an axis beside the channels, by numbers known at run time only."""
    axis = 2 if draft.kinds[x] == "map" else 1
    if len(draft.shape(x)) <= 1 + axis:
        raise Refused
    before = ":, " * axis
    forms = [
        "{x}[{b}torch.arange({n}).flip(0)]",
        "{x}.index_select({a}, torch.arange({n}) // 2)",
        "torch.zeros_like({x}).index_add({a}, torch.arange({n}) // 2, {x})",
        "torch.cat({x}.chunk(2, {a})[::-1], {a})",
        "torch.cat({x}.split([{n} // 2, {n} - {n} // 2], {a})[::-1], {a})",
    ]
    form = pick(forms).format(x=x, a=axis, n=f"{x}.shape[{axis}]", b=before)
    return draft.let(form, draft.kinds[x])


@writer
def transformed(draft: Draft, x: str, pick: Pick) -> str:
    """Go over frequencies, or differences, along an axis beside the channels."""
    axis = pick([2, -1]) if draft.kinds[x] == "map" else 1
    if len(draft.shape(x)) < 3:
        raise Refused
    forms = [
        *("torch.fft.rfft({x}, dim={a}).abs()", "torch.fft.fft({x}, dim={a}).real"),
        "torch.fft.irfft(torch.fft.rfft({x}, dim={a}) * 1j, {x}.shape[{a}], dim={a})",
        "torch.view_as_real(torch.fft.fftn({x}, dim=({a},))).sum(-1)",
        "torch.fft.ifft(torch.complex({x}, F.relu({x})), dim={a}).imag",
        *("({x} + 1j).abs()", "{x}.cummax({a})[0]", "torch.diff(F.relu({x}), dim={a})"),
    ]
    return draft.let(pick(forms).format(x=x, a=axis), draft.kinds[x])


@writer
def shuffled(draft: Draft, x: str, pick: Pick) -> str:
    """Shuffle channels, in either spelling."""
    draft.require(x, "map")
    _, width, *space = draft.shape(x)
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
    draft.require(x, "map")
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
    draft.require(x, "last")
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
    forms += [
        "torch.flatten({x}, 1)",
        "{x}.reshape({x}.size(0), {s})",
        "{x}.contiguous().view(3, -1)",
    ]
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
    draft.require(x, "vector")
    width = draft.channels(x)
    if width % 2:
        forms = ["{x}[:, :, None, None]", "{x}.unsqueeze(2)", "{x}.view(-1, {w}, 1, 1)"]
    else:
        forms = ["{x}.view(-1, {h}, 2, 1)", "{x}.view({x}.shape[0], 2, {h}, 1)"]
        forms += ["{x}.unflatten(1, ({h}, 2))", "{x}[:, :, None, None].expand(-1, -1, 2, 2)"]
    return draft.let(pick(forms).format(x=x, w=width, h=width // 2), "map")


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
def output(draft: Draft, x: str, pick: Pick) -> str:
    """Return a stream, though the network goes on."""
    draft.outputs.append(x)
    return x
