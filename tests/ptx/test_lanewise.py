"""Every operation on single lanes against NumPy, on random numbers and on those at the types' ends."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.ptx.operations import LANEWISE
from tests.ptx.snippets import lanewise

N = 400
FLOATS = {"f32": np.float32, "f64": np.float64}


def integers(kind: str, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    dtype = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{int(kind[1:]) // 8}")
    limits = np.iinfo(dtype)
    ends = [limits.min, limits.max, 0, 1, limits.max // 2, limits.max // 2 + 1]
    small = generator.integers(0, 40, N // 2)
    wide = generator.integers(limits.min, limits.max, N - N // 2, dtype, endpoint=True)
    found = np.concatenate([small.astype(dtype), wide])
    generator.shuffle(found)
    found[: len(ends)] = np.array(ends, dtype)[generator.permutation(len(ends))]
    return found


def floats(kind: str, seed: int) -> np.ndarray:
    """Logit-like numbers, random bits, and what is special: infinities, NaN, zeros, subnormal numbers."""
    generator = np.random.default_rng(seed)
    dtype = FLOATS[kind]
    tiny = np.finfo(dtype).tiny
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0, tiny / 4, -tiny / 2, tiny, np.finfo(dtype).max]
    bits = generator.integers(0, 2 ** (8 * dtype().itemsize), N // 4, f"u{dtype().itemsize}").view(dtype)
    found = np.concatenate([(3 * generator.standard_normal(N - len(bits))).astype(dtype), bits])
    generator.shuffle(found)
    # Each of them beside each other where two sources take two seeds.
    found[: len(special) ** 2] = (
        np.tile(special, len(special)) if seed % 2 else np.repeat(special, len(special))
    )
    return found


def values(kind: str, seed: int) -> np.ndarray:
    if kind == "p":
        return np.random.default_rng(seed).integers(0, 2, N).astype(np.uint32)
    return floats(kind, seed) if kind in FLOATS else integers(kind, seed)


def check(name: str, want: np.ndarray, *sources: np.ndarray) -> None:
    got = lanewise(name, *sources)
    assert got.dtype == want.dtype, name
    assert len(set(want.tolist())) > 1, f"{name}: one answer for everything tells nothing"
    np.testing.assert_array_equal(got, want, err_msg=name)
    if got.dtype.kind == "f":
        number = ~np.isnan(want)
        np.testing.assert_array_equal(np.signbit(got[number]), np.signbit(want[number]), err_msg=name)


def wrapped(exact: list[int], dtype: np.dtype) -> np.ndarray:
    bits = 8 * dtype.itemsize
    return np.array([x % 2**bits for x in exact], f"u{dtype.itemsize}").view(dtype)


INTEGER = {
    "add": lambda a, b, bits: a + b,
    "sub": lambda a, b, bits: a - b,
    "mul.lo": lambda a, b, bits: a * b,
    "min": lambda a, b, bits: min(a, b),
    "max": lambda a, b, bits: max(a, b),
    "and": lambda a, b, bits: a & b,
    "or": lambda a, b, bits: a | b,
    "xor": lambda a, b, bits: a ^ b,
}


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("name", INTEGER)
def test_integers(name: str, kind: str) -> None:
    a, b = integers(kind, 0), integers(kind, 1)
    full = f"{name}.b{kind[1:]}" if name in ("and", "or", "xor") else f"{name}.{kind}"
    result = LANEWISE[full].result
    dtype = a.dtype if result == kind else np.dtype(f"u{a.itemsize}")
    want = [INTEGER[name](x, y, int(kind[1:])) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    check(full, wrapped(want, dtype), a, b)


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_divisions_truncate(kind: str) -> None:
    a, b = integers(kind, 0), integers(kind, 1)
    b[b == 0] = 7
    b[(a == np.iinfo(a.dtype).min) & (b == a.dtype.type(-1 & np.iinfo(a.dtype).max))] = 7
    exact = [
        (abs(x) // abs(y)) * (1 if (x < 0) == (y < 0) else -1)
        for x, y in zip(a.tolist(), b.tolist(), strict=True)
    ]
    check(f"div.{kind}", wrapped(exact, a.dtype), a, b)
    rests = [x - q * y for x, q, y in zip(a.tolist(), exact, b.tolist(), strict=True)]
    check(f"rem.{kind}", wrapped(rests, a.dtype), a, b)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_shifts_beyond_the_width(bits: int) -> None:
    by = np.random.default_rng(2).integers(0, 80, N).astype(np.uint32)
    u, s = integers(f"u{bits}", 0), integers(f"s{bits}", 0)
    pairs = list(zip(u.tolist(), by.tolist(), strict=True))
    check(f"shl.b{bits}", wrapped([x << n for x, n in pairs], u.dtype), u, by)
    check(f"shr.u{bits}", wrapped([x >> n for x, n in pairs], u.dtype), u, by)
    signed = [x >> min(n, bits) for x, n in zip(s.tolist(), by.tolist(), strict=True)]
    check(f"shr.s{bits}", wrapped(signed, s.dtype), s, by)


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32"])
def test_wide_products(kind: str) -> None:
    a, b = integers(kind, 0), integers(kind, 1)
    wide = f"{kind[0]}{2 * int(kind[1:])}"
    c = integers(wide, 3)
    product = [x * y for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    check(f"mul.wide.{kind}", wrapped(product, c.dtype), a, b)
    check(
        f"mad.wide.{kind}",
        wrapped([x + y for x, y in zip(product, c.tolist(), strict=True)], c.dtype),
        a,
        b,
        c,
    )
    if kind.endswith("32"):
        check(f"mul.hi.{kind}", wrapped([x >> 32 for x in product], a.dtype), a, b)
        lowest = [x + int(y) for x, y in zip(product, b.tolist(), strict=True)]
        check(f"mad.lo.{kind}", wrapped(lowest, np.dtype("u4")), a, b, b)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_single_integers(bits: int) -> None:
    u, s = integers(f"u{bits}", 0), integers(f"s{bits}", 1)
    check(f"not.b{bits}", ~u, u)
    check(f"neg.s{bits}", wrapped([-x for x in u.tolist()], u.dtype), u)
    check(f"abs.s{bits}", wrapped([abs(x) for x in s.tolist()], s.dtype), s)


def test_bits_of_words() -> None:
    a, b, c = (integers("u32", n) for n in range(3))
    words = a.tolist()
    check("popc.b32", np.array([x.bit_count() for x in words], np.uint32), a)
    check("clz.b32", np.array([32 - x.bit_length() for x in words], np.uint32), a)
    check("brev.b32", np.array([int(f"{x:032b}"[::-1], 2) for x in words], np.uint32), a)
    halves = (a.view(np.uint16) + b.view(np.uint16)).view(np.uint32)
    check("add.s16x2", halves, a, b)
    both = [(y << 32) | x for x, y in zip(words, b.tolist(), strict=True)]
    turned = [(x << (n & 31)) >> 32 for x, n in zip(both, c.tolist(), strict=True)]
    check("shf.l.wrap.b32", wrapped(turned, a.dtype), a, b, c)
    check(
        "shf.r.wrap.b32",
        wrapped([x >> (n & 31) for x, n in zip(both, c.tolist(), strict=True)], a.dtype),
        a,
        b,
        c,
    )


def test_bytes_are_chosen() -> None:
    a, b, c = (integers("u32", n) for n in range(3))
    pool = np.stack([a, b], -1).view(np.uint8)  # [N, 8], the lowest byte of a first
    want = np.zeros((N, 4), np.uint8)
    for n in range(4):
        choice = (c >> (4 * n)) & 15
        byte = np.take_along_axis(pool, (choice & 7)[:, None].astype(np.int64), 1)[:, 0]
        want[:, n] = np.where(choice & 8, np.where(byte & 128, 255, 0), byte)
    check("prmt.b32", want.view(np.uint32)[:, 0], a, b, c)


def test_fields_are_extracted() -> None:
    a = integers("u32", 0)
    position, length = (np.random.default_rng(n).integers(0, 40, N).astype(np.uint32) for n in range(2))
    where = list(zip(a.tolist(), position.tolist(), length.tolist(), strict=True))
    check("bfe.u32", np.array([(x >> p) & (2**n - 1) for x, p, n in where], np.uint32), a, position, length)
    signed = []
    for x, p, n in where:
        top = 0 if n == 0 else (x >> min(p + n - 1, 31)) & 1
        field = (x >> p) & (2 ** min(n, max(32 - p, 0)) - 1)
        signed.append(field - (top << min(n, max(32 - p, 0))))
    check("bfe.s32", wrapped(signed, np.dtype("i4")), a.view(np.int32), position, length)


COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("name", COMPARE)
def test_integers_are_compared(name: str, kind: str) -> None:
    a, b = integers(kind, 0), integers(kind, 1)
    b[::7] = a[::7]
    check(f"setp.{name}.{kind}", COMPARE[name](a, b).astype(np.uint32), a, b)
    if name in ("eq", "ne"):
        check(f"setp.{name}.b{kind[1:]}", COMPARE[name](a, b).astype(np.uint32), a, b)


def compared(name: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """As PTX names comparisons of floats: plain ones are false beside NaN, those ending in u true."""
    with np.errstate(invalid="ignore"):
        nan = np.isnan(a) | np.isnan(b)
        if name in ("num", "nan"):
            return (nan == (name == "nan")).astype(np.uint32)
        plain = COMPARE[name[:2]](a, b)
        return np.where(nan, len(name) == 3, plain).astype(np.uint32)


FLOAT_COMPARISONS = [*COMPARE, *(f"{name}u" for name in COMPARE), "num", "nan"]


@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize("name", FLOAT_COMPARISONS)
def test_floats_are_compared(name: str, kind: str) -> None:
    a, b = floats(kind, 0), floats(kind, 1)
    check(f"setp.{name}.{kind}", compared(name, a, b), a, b)
    if kind == "f32":
        check(f"setp.{name}.ftz.f32", compared(name, flushed(a), flushed(b)), a, b)


def narrow(kind: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Raw 16-bit numbers, and what they are."""
    raw = np.random.default_rng(seed).integers(0, 2**16, N).astype(np.uint16)
    raw[:8] = (0, 0x8000, 0x7C00, 0xFC00, 0x7F80, 0xFF80, 0x7FFF, 1)
    if seed:
        raw[::3] = np.roll(raw, 1)[::3]
    wide = (
        (raw.astype(np.uint32) << 16).view(np.float32)
        if kind == "bf16"
        else raw.view(np.float16).astype(np.float32)
    )
    return raw, wide


@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize("name", FLOAT_COMPARISONS)
def test_halves_are_compared_alone_and_packed(name: str, kind: str) -> None:
    (a, wide_a), (b, wide_b) = narrow(kind, 0), narrow(kind, 1)
    b[::5], wide_b[::5] = a[::5], wide_a[::5]
    want = compared(name, wide_a, wide_b)
    check(f"setp.{name}.{kind}", want, a, b)
    words = [x.view(np.uint32) for x in (a, b)]
    check(f"setp.{name}.{kind}x2.low", want[::2], *words)
    check(f"setp.{name}.{kind}x2.high", want[1::2], *words)


def flushed(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize("name", ["add", "sub", "mul", "div.rn"])
def test_float_arithmetic(name: str, kind: str) -> None:
    a, b = floats(kind, 0), floats(kind, 1)
    make = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div.rn": np.divide}[name]
    with np.errstate(all="ignore"):
        check(f"{name}.{kind}", make(a, b), a, b)
        if kind == "f32" and "." not in name:
            check(f"{name}.ftz.f32", flushed(make(flushed(a), flushed(b))), a, b)


def exact_fma(a: float, b: float, c: float, digits: int) -> float:
    mpmath = pytest.importorskip("mpmath")
    if not all(map(math.isfinite, (a, b, c))):
        with np.errstate(all="ignore"):
            return float(np.float64(a) * np.float64(b) + np.float64(c))
    with mpmath.workprec(3000):
        whole = mpmath.mpf(a) * mpmath.mpf(b) + mpmath.mpf(c)
    with mpmath.workprec(digits):
        return float(+whole)


@pytest.mark.parametrize(("kind", "digits"), [("f32", 24), ("f64", 53)])
def test_fma_rounds_once(kind: str, digits: int) -> None:
    generator = np.random.default_rng(0)
    a, b = (generator.standard_normal(N).astype(FLOATS[kind]) for _ in range(2))
    # What a·b leaves behind where c takes its leading digits off.
    c = (-a * b * (1 + generator.integers(-3, 4, N) * np.finfo(FLOATS[kind]).eps)).astype(FLOATS[kind])
    a[:3], b[:3], c[:3] = (np.inf, np.inf, 1), (0, 2, 2), (1, -np.inf, np.nan)
    want = np.array(
        [exact_fma(*xs, digits) for xs in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)], FLOATS[kind]
    )
    with np.errstate(invalid="ignore"):
        assert (want != a * b + c).any(), "two roundings would pass"
    check(f"fma.rn.{kind}", want, a, b, c)


@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize("name", ["max", "min"])
def test_extremes_of_nan_and_zeros(name: str, kind: str) -> None:
    a, b = floats(kind, 0), floats(kind, 1)
    make = {"max": (np.fmax, np.maximum), "min": (np.fmin, np.minimum)}[name]
    for full, function in zip((f"{name}.{kind}", f"{name}.NaN.{kind}"), make, strict=True):
        want = function(a, b)
        zeros = (a == 0) & (b == 0)
        negative = (np.signbit(a) & np.signbit(b)) if name == "max" else (np.signbit(a) | np.signbit(b))
        want[zeros] = np.where(negative[zeros], -0.0, 0.0)
        check(full, want, a, b)


@pytest.mark.parametrize("kind", FLOATS)
def test_single_floats(kind: str) -> None:
    a = floats(kind, 0)
    with np.errstate(all="ignore"):
        check(f"abs.{kind}", np.abs(a), a)
        check(f"neg.{kind}", -a, a)
        check(f"rcp.rn.{kind}", 1 / a, a)
        check(f"sqrt.rn.{kind}", np.sqrt(a), a)


@pytest.mark.parametrize("kind", ["f32", "f64", "b16", "b32", "b64"])
def test_values_are_selected_and_moved(kind: str) -> None:
    pool = kind if kind in FLOATS else f"u{kind[1:]}"
    a, b, c = values(pool, 0), values(pool, 1), values("p", 2)
    check(f"selp.{kind}", np.where(c == 1, a, b), a, b, c)
    raw = a.view(f"u{a.itemsize}")
    check(f"mov.{kind}", raw, raw)


def test_flushing_of_inputs_and_results() -> None:
    with np.errstate(all="ignore"):
        a, b, c = (floats("f32", n) * np.float32(2.0**-70) for n in (2, 3, 4))
        x, y = flushed(a), flushed(b)
        check("abs.ftz.f32", np.abs(x), a)
        check("neg.ftz.f32", -x, a)
        for name, make in {"max": np.fmax, "min": np.fmin}.items():
            positive = [np.abs(u) + np.float32(2e-38) for u in (a, b)]
            check(f"{name}.ftz.f32", make(*positive), *positive)
        # Products that are exact in float64 and sums that are not small beside them.
        large = c * np.float32(2.0**75)
        whole = (x.astype(np.float64) * y + flushed(large)).astype(np.float32)
        finite = np.isfinite(whole) & (np.abs(large) > 2.0**-20)
        got = lanewise("fma.rn.ftz.f32", a, b, large)
        np.testing.assert_array_equal(got[finite], whole[finite])
        assert finite.sum() > N / 3
        assert (lanewise("mul.ftz.f32", a, b)[:200] == 0).sum() > (a * b == 0)[:200].sum()
        for mode, make in ROUND.items():
            check(f"cvt.{mode}.ftz.f32.f32", make(flushed(floats("f32", 0))), floats("f32", 0))


def test_predicates() -> None:
    a, b = values("p", 0), values("p", 1)
    for name, make in {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}.items():
        check(f"{name}.pred", make(a, b), a, b)
    check("not.pred", 1 - a, a)


ROUND = {"rni": np.rint, "rmi": np.floor, "rpi": np.ceil, "rzi": np.trunc}


@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize("mode", ROUND)
def test_floats_to_whole_numbers(mode: str, kind: str) -> None:
    a = floats(kind, 0)
    a[200:220] = np.arange(20) / 2 - 5  # ties
    check(f"cvt.{mode}.{kind}.{kind}", ROUND[mode](a), a)
    limits = np.iinfo(np.int32)
    whole = np.clip(np.nan_to_num(ROUND[mode](a).astype(np.float64)), limits.min, limits.max).astype(np.int32)
    whole[np.isnan(a)] = 0 if kind == "f32" else limits.min
    check(f"cvt.{mode}.s32.{kind}", whole, a)


@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize("integer", ["s32", "u32", "s64", "u64"])
def test_integers_to_floats(integer: str, kind: str) -> None:
    a = integers(integer, 0)
    check(f"cvt.rn.{kind}.{integer}", a.astype(FLOATS[kind]), a)


def test_floats_to_floats() -> None:
    wide, plain = floats("f64", 0), floats("f32", 0)
    with np.errstate(all="ignore"):
        check("cvt.rn.f32.f64", wide.astype(np.float32), wide)
    check("cvt.f64.f32", plain.astype(np.float64), plain)


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_halves_to_floats(kind: str) -> None:
    raw, wide = narrow(kind, 0)
    check(f"cvt.f32.{kind}", wide, raw)
    with np.errstate(invalid="ignore"):
        check(f"cvt.f64.{kind}", wide.astype(np.float64), raw)


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_floats_to_halves(kind: str) -> None:
    torch = pytest.importorskip("torch")
    a, b = floats("f32", 0), floats("f32", 1)
    # Ties between two neighbours, which go to the even one.
    a[200:232] = (1 + (2 * np.arange(32) + 1) / 2 ** (8 if kind == "bf16" else 11)).astype(np.float32)
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16

    def rounded(x: np.ndarray) -> np.ndarray:
        found = torch.from_numpy(x).to(dtype).view(torch.int16).numpy().view(np.uint16).copy()
        found[np.isnan(x)] = 0x7FFF
        return found

    check(f"cvt.rn.{kind}.f32", rounded(a), a)
    both = (rounded(a).astype(np.uint32) << 16) | rounded(b)
    check(f"cvt.rn.{kind}x2.f32", both, a, b)
    if kind == "f16":
        # Rounded once: by way of float32 this one would be even.
        wide = floats("f64", 0)
        wide[200] = 1 + 2**-11 + 2**-40
        with np.errstate(over="ignore"):
            want = np.where(np.isnan(wide), np.uint16(0x7FFF), wide.astype(np.float16).view(np.uint16))
        check("cvt.rn.f16.f64", want, wide)


@pytest.mark.parametrize("of", ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("to", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_integers_to_integers(to: str, of: str) -> None:
    a = integers(of, 0)
    held = a if a.itemsize > 1 else a.astype(np.uint8).astype(np.uint16)  # bytes lie in 16-bit registers
    dtype = np.dtype(f"{'i' if to[0] == 's' else 'u'}{int(to[1:]) // 8}")
    got = lanewise(f"cvt.{to}.{of}", held)
    np.testing.assert_array_equal(got, wrapped([int(x) for x in a.tolist()], dtype))


APPROXIMATE = {
    "ex2.approx.ftz.f32": (lambda x: np.exp2(x), (-30, 30), 2),
    "lg2.approx.ftz.f32": (lambda x: np.log2(x), (1e-3, 1e3), None),
    "div.full.f32": (lambda x, y: x / y, (0.1, 10), 2),
}


@pytest.mark.parametrize("name", APPROXIMATE)
@pytest.mark.parametrize("error", ["none", "up", "down", "hashed"])
def test_approximations_reach_their_documented_errors_and_no_further(name: str, error: str) -> None:
    function, (low, high), ulps = APPROXIMATE[name]
    generator = np.random.default_rng(0)
    sources = [generator.uniform(low, high, N).astype(np.float32) for _ in LANEWISE[name].sources]
    exact = function(*(x.astype(np.float64) for x in sources))
    got = lanewise(name, *sources, error=error).astype(np.float64)
    ulp = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
    # log2: 2^-22.6, absolute within (0.5, 2), relative elsewhere.
    bound = (
        ulps * ulp if ulps else 2**-22.6 * np.where((sources[0] > 0.5) & (sources[0] < 2), 1, np.abs(exact))
    )
    share = (got - exact) / bound
    slack = 0.5 * (ulp / bound)  # of the rounding to float32
    assert (np.abs(share) <= (0 if error == "none" else 1) + slack + 1e-9).all()
    if error == "up":
        assert (share * (1 if ulps else np.sign(exact) ** (bound != 2**-22.6)) > 0.6).all()
    if error == "down":
        assert (share * (1 if ulps else np.sign(exact) ** (bound != 2**-22.6)) < -0.6).all()
    if error == "hashed":
        assert share.max() > 0.8
        assert share.min() < -0.8
        assert len(np.unique(np.round(2 * share))) >= 5


def test_approximations_of_special_numbers() -> None:
    special = np.array([0, -0.0, np.inf, -np.inf, np.nan, 3, 1e-40, 1], np.float32)
    np.testing.assert_array_equal(
        lanewise("ex2.approx.ftz.f32", special, error="up"),
        np.array([1, 1, np.inf, 0, np.nan, 8, 1, 2], np.float32),
    )
    np.testing.assert_array_equal(
        lanewise("lg2.approx.ftz.f32", special, error="none"),
        np.array([-np.inf, -np.inf, np.inf, np.nan, np.nan, np.log2(np.float32(3)), -np.inf, 0], np.float32),
    )


def test_gross_reciprocals_have_upper_halves_alone() -> None:
    a = floats("f64", 0)
    got = lanewise("rcp.approx.ftz.f64", a)
    assert (got.view(np.uint64)[~np.isnan(got)] & 0xFFFFFFFF == 0).all()
    usual = np.isfinite(a) & (np.abs(a) > 1e-300) & (np.abs(a) < 1e300)
    np.testing.assert_allclose(got[usual], 1 / a[usual], rtol=2**-19)
    assert np.isinf(got[a == 0]).all()
