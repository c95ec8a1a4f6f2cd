"""The extension that kernels/bindings.cpp defines; kl_gpu/native.py says what its arguments are."""

from collections.abc import Sequence

_Side = tuple[int, int, int, int, float]
_Valid = tuple[int, int, int]
_Sizes = tuple[int, int, int, int]
_Target = tuple[int, int, int, int]
_Scales = tuple[int, int]
_Beside = tuple[bool, int, int, int, int, int]
_Pair = tuple[_Side, _Side, _Valid, _Sizes, str, float, bool, _Scales]
_Complement = tuple[_Side, _Valid, _Sizes, int, int, _Scales]
_Units = tuple[float, int]

def isa() -> str: ...
def supported_isas() -> str: ...
def value(
    of: _Pair,
    value: int,
    stats: int,
    /,
) -> None: ...
def gradient(
    of: _Pair,
    stats: int,
    row_scale: int,
    to_a: _Target,
    to_b: _Target,
    /,
) -> None: ...
def value_and_gradient(
    of: _Pair,
    row_scale: int,
    value: int,
    stats: int,
    to_a: _Target,
    to_b: _Target,
    /,
) -> None: ...
def value_and_beside(
    of: _Pair,
    more: _Beside,
    value: int,
    stats: int,
    /,
) -> None: ...
def gradient_with_labels(
    of: _Pair,
    more: _Beside,
    stats: int,
    row_scale: int,
    to_a: _Target,
    to_b: _Target,
    /,
) -> None: ...
def value_and_gradient_and_beside(
    of: _Pair,
    more: _Beside,
    row_scale: int,
    value: int,
    stats: int,
    to_a: _Target,
    to_b: _Target,
    /,
) -> None: ...
def formula_sums(
    of: _Pair,
    stats: int,
    out: int,
    /,
) -> None: ...
def token_stats(
    of: _Pair,
    tokens: int,
    out: int,
    sums: int,
    /,
) -> None: ...
def complement(
    of: _Complement,
    entropy: bool,
    rest_lse: int,
    rest_entropy: int,
    stats: int,
    /,
) -> None: ...
def complement_gradient(
    of: _Complement,
    stats: int,
    grad_picked: int,
    grad_rest_lse: int,
    grad_rest_entropy: int,
    to: _Target,
    /,
) -> None: ...
def shard_states(
    stats: int, wide: bool, units: _Units, rows: int, inside: list[int], out: int, /
) -> bool: ...
def merge_shards(found: int, shards: int, rows: int, n: int, out: int, /) -> bool: ...
def whole_row_stats(
    local: int,
    wide: bool,
    units: _Units,
    rows: int,
    formula: str,
    log_a: int,
    ratio: int,
    sums: int,
    out: int,
    /,
) -> None: ...
def elementary(which: int, x: int, y: int, n: int, /) -> None: ...
def prefer_huge_pages(data: int, size: int, /) -> None: ...
def kept_tensor(shape: Sequence[int], strides: Sequence[int], dtype: int, /) -> object: ...
def limit_idle_bytes(size: int, /) -> None: ...
def release_idle_blocks() -> None: ...
def kept_use() -> tuple[int, int, int]: ...
def probe_read(a: int, b: int, size: int, threads: int, /) -> int: ...
def probe_write(a: int, b: int, to: int, size: int, threads: int, /) -> None: ...
