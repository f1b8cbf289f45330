"""Steps on tokens: attention in several spellings, contractions, recurrences."""

from tools.networks import Draft, Pick, Refused, writer


@writer
def attention(draft: Draft, x: str, pick: Pick) -> str:
    """Attend, with one head or two."""
    tokens = _tokens(draft, x)
    inner = pick([4, 8])
    layer = draft.layer(
        f"nn.Linear({draft.channels(tokens)}, {3 * inner}{pick(['', ', bias=False'])})"
    )
    whole = draft.let(f"{layer}({tokens})", "last")
    spelling = pick([_one_head, _split_heads, _heads_at_once])
    mixed = spelling(draft, whole, inner, pick)
    layer = draft.layer(f"nn.Linear({inner}, {draft.channels(tokens)})")
    out = draft.let(f"{layer}({mixed})", "last")
    return pick([out, draft.let(f"{out} + {tokens}", "last")])


@writer
def torch_attention(draft: Draft, x: str, pick: Pick) -> str:
    """Attend by torch's own layers."""
    tokens = _tokens(draft, x)
    width = draft.channels(tokens)
    heads = 2 if width % 2 == 0 else 1
    if pick([True, False]):
        layer = draft.layer(f"nn.MultiheadAttention({width}, {heads}, batch_first=True)")
        return draft.let(f"{layer}({tokens}, {tokens}, {tokens})[0]", "last")
    options = pick(["", ", norm_first=True", ", activation='gelu'"])
    layer = draft.layer(
        f"nn.TransformerEncoderLayer({width}, {heads}, 6, batch_first=True{options})"
    )
    return draft.let(f"{layer}({tokens})", "last")


@writer
def recurrence(draft: Draft, x: str, pick: Pick) -> str:
    tokens = _tokens(draft, x)
    kind = pick(["LSTM", "GRU", "RNN"])
    options = pick(["", ", bidirectional=True", ", num_layers=2"])
    layer = draft.layer(f"nn.{kind}({draft.channels(tokens)}, 4, batch_first=True{options})")
    return draft.let(f"{layer}({tokens})[0]", "last")


@writer
def contraction(draft: Draft, x: str, pick: Pick) -> str:
    """Multiply by a parameter, or by another stream."""
    tokens = _tokens(draft, x)
    matrix = draft.layer(f"nn.Parameter(torch.randn({draft.channels(tokens)}, {pick([4, 6])}))")
    forms = ["{x} @ {m}", "torch.einsum('nlc,cd->nld', {x}, {m})", "torch.matmul({x}, {m})"]
    forms += ["{x} @ {x}.transpose(1, 2) @ {x}", "torch.bmm({x}.transpose(1, 2), {x})"]
    forms += ["torch.einsum('nlc,nkc->nlk', {x}, {x})", "torch.tensordot({x}, {m}, 1)"]
    return draft.let(pick(forms).format(x=tokens, m=matrix), "last")


def _tokens(draft: Draft, x: str) -> str:
    if draft.kinds[x] == "map":
        x = draft.let(f"{x}.flatten(2).transpose(1, 2)", "last")
    if draft.kinds[x] != "last" or len(draft.shape(x)) != 3:
        raise Refused
    return x


def _one_head(draft: Draft, whole: str, inner: int, pick: Pick) -> str:
    query, key, value = (f"{whole}.chunk(3, -1)[{place}]" for place in range(3))
    forms = [
        f"F.scaled_dot_product_attention({query}, {key}, {value})",
        f"({query} @ {key}.transpose(1, 2) / {inner**0.5}).softmax(-1) @ {value}",
        f"torch.bmm(torch.bmm({query}, {key}.transpose(1, 2)), {value})",
    ]
    return draft.let(pick(forms), "last")


def _split_heads(draft: Draft, whole: str, inner: int, pick: Pick) -> str:
    n, length = f"{whole}.shape[0]", f"{whole}.shape[1]"
    query, key, value = (
        f"{whole}.split({inner}, -1)[{place}].view({n}, {length}, 2, {inner // 2}).transpose(1, 2)"
        for place in range(3)
    )
    forms = [
        f"F.scaled_dot_product_attention({query}, {key}, {value})",
        f"({query} @ {key}.transpose(-2, -1)).softmax(-1) @ {value}",
    ]
    return draft.let(f"({pick(forms)}).transpose(1, 2).reshape({n}, {length}, {inner})", "last")


def _heads_at_once(draft: Draft, whole: str, inner: int, pick: Pick) -> str:
    n, length = f"{whole}.shape[0]", f"{whole}.shape[1]"
    shaped = f"{whole}.reshape({n}, {length}, 3, 2, {inner // 2}).permute(2, 0, 3, 1, 4)"
    parts = pick([f"{shaped}.unbind(0)", f"{shaped}"])
    query, key, value = (f"{parts}[{place}]" for place in range(3))
    mixed = f"F.scaled_dot_product_attention({query}, {key}, {value})"
    return draft.let(f"{mixed}.transpose(1, 2).flatten(2)", "last")
