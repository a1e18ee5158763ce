"""Where attention heads and MLP channels lie in the tensors of a layer.

A part is a KV group (a key/value head with the query heads that share it) or an MLP channel. It owns rows of
the linear layers that read the hidden state and columns of the linear layer that writes it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from mkaq.arch.arch import READ_BY_ATTENTION, READ_BY_MLP, Arch, Role
from mkaq.arch.config import Sizes


@dataclass(frozen=True)
class Parts:
    """One kind of part in a decoder layer.

    Attributes:
        count: The number of parts.
        norm: The norm before the readers.
        readers: For each linear layer that reads, the spans of the parts in it: (first row, rows per part).
        writer: The linear layer that writes.
        width: Columns of the writer per part.
    """

    count: int
    norm: str
    readers: Mapping[str, tuple[tuple[int, int], ...]]
    writer: str
    width: int


def attention_parts(arch: Arch, sizes: Sizes) -> Parts:
    """The KV groups of a layer."""
    query = sizes.heads // sizes.kv_heads * sizes.head_dim
    rows = {Role.QUERY: query, Role.KEY: sizes.head_dim, Role.VALUE: sizes.head_dim}
    readers = _spans(arch, {role: rows[role] for role in READ_BY_ATTENTION}, sizes.kv_heads)
    writer = arch.linear_of(Role.ATTENTION_OUTPUT).name
    return Parts(sizes.kv_heads, arch.attention_norm, readers, writer, query)


def mlp_parts(arch: Arch, sizes: Sizes) -> Parts:
    """The MLP channels of a layer."""
    readers = _spans(arch, dict.fromkeys(READ_BY_MLP, 1), sizes.intermediate)
    return Parts(sizes.intermediate, arch.mlp_norm, readers, arch.linear_of(Role.DOWN).name, 1)


def _spans(arch: Arch, rows: Mapping[Role, int], count: int) -> Mapping[str, tuple[tuple[int, int], ...]]:
    """The spans of `count` parts in the linear layers that have a role in `rows` (role: rows per part)."""
    spans: dict[str, tuple[tuple[int, int], ...]] = {}
    for linear in arch.linears:
        start = 0
        for role in linear.roles:
            if role in rows:
                spans[linear.name] = (*spans.get(linear.name, ()), (start, rows[role]))
                start += count * rows[role]
    return spans
