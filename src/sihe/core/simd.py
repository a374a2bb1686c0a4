"""Vectors for Numba kernels: the few pieces of LLVM that Python loops cannot say.

A tile (the innermost loops of a kernel) is written here as instructions on vectors of 16 float32 or int32 lanes, so
that it needs no compiler on the user's machine and no library of intrinsics: LLVM splits the vectors where the
processor has narrower registers, and a tile asks `vectors_in_registers` how many it may keep. Only the product of bytes
has instructions of its own, by processor. Addresses are plain numbers: whoever calls a tile answers for what is there.
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

LANES = 16
I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
F32X16, I32X16, I16X16, I8X16 = (ir.VectorType(kind, LANES) for kind in (F32, I32, I16, I8))
I32X4 = ir.VectorType(I32, 4)
I32X8, I16X32, I8X32, I8X64 = (ir.VectorType(kind, n) for kind, n in ((I32, 8), (I16, 32), (I8, 32), (I8, 64)))

Value = Any  # an llvmlite value: the library has no types of its own
Emit = Callable[["Tile", list[Value]], None]


@cache
def features() -> frozenset[str]:
    """What the processor that Numba compiles for can do, by LLVM's names; `NUMBA_CPU_FEATURES` can make it less."""
    _, _, names = cpu_target.target_context.codegen().magic_tuple()
    found = {name[1:] for name in names.split(",") if name.startswith("+")}
    return frozenset(found | {"dotprod"} if _has_dotprod() else found)


_AT_HWCAP, _HWCAP_ASIMDDP = 16, 1 << 20  # Linux: include/uapi/linux/auxvec.h, arch/arm64/include/uapi/asm/hwcap.h


def _has_dotprod() -> bool:
    """Whether an ARM processor multiplies signed bytes four at a time (from ARMv8.2 on).

    Linux is asked, for LLVM does not report it: it knows it by the names of cores, which some virtual machines hide.
    """
    if not (_is_arm() and sys.platform.startswith("linux")):
        return False
    getauxval = ctypes.CDLL(None).getauxval
    getauxval.restype, getauxval.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
    return bool(getauxval(_AT_HWCAP) & _HWCAP_ASIMDDP)


def _is_arm() -> bool:
    return platform.machine() in ("aarch64", "arm64")


@cache
def vectors_in_registers() -> int:
    """How many vectors of 16 float32 the processor's registers hold."""
    if "avx512f" in features():
        return 32
    return 8 if "avx" in features() or _is_arm() else 4


ByteProduct = Literal["avx512-vnni", "avx-vnni", "avx2", "sdot", "plain"]
BYTE_PRODUCTS: dict[ByteProduct, frozenset[str]] = {
    "avx512-vnni": frozenset({"avx512f", "avx512vnni"}),
    "avx-vnni": frozenset({"avxvnni"}),
    "avx2": frozenset({"avx2"}),
    "sdot": frozenset({"dotprod"}),
    "plain": frozenset(),
}
"""The ways to multiply bytes, the fastest first, and what each needs: four products at a time are added in 32 bits
(VNNI, and ARM's SDOT), two in 16, or each is computed by itself."""
_SDOT = ".arch_extension dotprod\nsdot $0.4s, $1.16b, $2.16b"


@cache
def byte_product() -> ByteProduct:
    """The fastest way to multiply bytes that the processor has."""
    return next(way for way, needs in BYTE_PRODUCTS.items() if needs <= features())


def digest_of(*modules: ModuleType) -> str:
    """A digest of their sources, for functions that are compiled from several files and kept on disk.

    Numba keeps a compiled function by the file that it stands in and by the variables of its closure, and would take an
    old kernel for the present one where another file has changed: a digest in the closure tells them apart. So it does
    the kernels of processors that have one name for LLVM and multiply bytes differently; they may share the folder.
    """
    digest = hashlib.sha256(byte_product().encode())
    for module in modules:
        digest.update(Path(str(module.__file__)).read_bytes())
    return digest.hexdigest()


def tile(emit: Emit, arguments: str) -> Any:
    """An intrinsic whose body `emit` writes. `arguments` name its kinds: `i` a number or an address, `f` a float32."""
    kinds = [{"i": types.intp, "f": types.float32}[letter] for letter in arguments]

    def typed(_context: Any, *given: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, values: Any) -> Value:
            emit(Tile(builder), list(values))
            return context.get_dummy_value()

        assert len(given) == len(kinds)
        return types.void(*kinds), generate

    return _intrinsic(typed, len(kinds))


def _intrinsic(typed: Callable[..., Any], count: int) -> Any:
    """`typed` as an intrinsic of `count` arguments; numba reads their number off the function."""
    names = ", ".join(f"a{index}" for index in range(count))
    scope: dict[str, Any] = {"typed": typed}
    exec(f"def tile(context, {names}): return typed(context, {names})", scope)
    return intrinsic(scope["tile"])


def _operation(emit: Callable[[Any, list[Value]], Value], count: int, result: Any) -> Any:
    """An intrinsic of `count` numbers that gives one."""

    def typed(_context: Any, *_given: Any) -> Any:
        def generate(_inner: Any, builder: Any, _signature: Any, values: Any) -> Value:
            return emit(builder, list(values))

        return result(*[types.intp] * count), generate

    return _intrinsic(typed, count)


def _pointer(b: Any, address: Value) -> Value:
    return b.inttoptr(address, I64.as_pointer())


def _yield(b: Any, _given: list[Value]) -> Value:
    function = cgutils.get_or_insert_function(b.module, ir.FunctionType(I32, []), "sched_yield")  # type: ignore[no-untyped-call]
    return b.sext(b.call(function, []), I64)


def _sleep(b: Any, given: list[Value]) -> Value:
    function = cgutils.get_or_insert_function(b.module, ir.FunctionType(I32, [I32]), "usleep")  # type: ignore[no-untyped-call]
    return b.sext(b.call(function, [b.trunc(given[0], I32)]), I64)


def _c_call(name: str) -> Callable[[Any, list[Value]], Value]:
    def emit(b: Any, given: list[Value]) -> Value:
        function = cgutils.get_or_insert_function(b.module, ir.FunctionType(I32, [I64.as_pointer()]), name)  # type: ignore[no-untyped-call]
        return b.sext(b.call(function, [_pointer(b, given[0])]), I64)

    return emit


add_atomic = _operation(lambda b, v: b.atomic_rmw("add", _pointer(b, v[0]), v[1], "acq_rel"), 2, types.intp)
"""Adds to the int64 at an address, and gives what was there before; other threads see it whole."""
load_atomic = _operation(lambda b, v: b.load_atomic(_pointer(b, v[0]), "acquire", 8), 1, types.intp)
"""The int64 at an address, and with it all that was written before it."""
yield_core = _operation(_yield, 0, types.intp)
"""Lets another thread have the core."""
sleep_us = _operation(_sleep, 1, types.intp)
"""Lets the core go for so many microseconds."""
wait_semaphore = _operation(_c_call("sem_wait"), 1, types.intp)
"""Sleeps until the POSIX semaphore at an address is posted."""
post_semaphore = _operation(_c_call("sem_post"), 1, types.intp)
"""Wakes one thread that waits for the semaphore at an address."""


def _cast(kind: Any, llvm: Any) -> Any:
    return _operation(lambda b, v: b.inttoptr(v[0], llvm.as_pointer()), 1, types.CPointer(kind))  # type: ignore[no-untyped-call]


float32_at, int32_at, int64_at, uint16_at, int8_at = (
    _cast(kind, llvm)
    for kind, llvm in (
        (types.float32, F32),
        (types.int32, I32),
        (types.int64, I64),
        (types.uint16, I16),
        (types.int8, I8),
    )
)
"""An address as a pointer that can be indexed, to numbers of that kind."""


class _Memory:
    """What a tile writes to get at memory."""

    def __init__(self, builder: Any) -> None:
        self.b = builder

    def load(self, address: Value, kind: Any) -> Value:
        """What lies at `address`, aligned or not."""
        value = self.b.load(self.b.inttoptr(address, kind.as_pointer()))
        value.align = 1
        return value

    def prefetch(self, address: Value, *, to_write: bool = False, near: bool = True) -> None:
        """Asks for what lies at `address`, which may be anywhere; unless `near` into the second cache only."""
        kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
        function = self.b.module.declare_intrinsic("llvm.prefetch.p0", (), kind)
        given = (I32(int(to_write)), I32(3 if near else 2), I32(1))
        self.b.call(function, [self.b.inttoptr(address, I8.as_pointer()), *given])

    def store(self, value: Value, address: Value) -> None:
        """Puts `value` at `address`."""
        self.b.store(value, self.b.inttoptr(address, value.type.as_pointer())).align = 1

    def at(self, base: Value, *offsets: Value | int) -> Value:
        """An address so many bytes further."""
        for offset in offsets:
            if not isinstance(offset, int):
                base = self.b.add(base, offset)
            elif offset:
                base = self.b.add(base, I64(offset))
        return base

    def broadcast(self, address: Value, kind: Any) -> Value:
        """The one number at `address` in all lanes."""
        return self.splat(self.load(address, kind))

    def splat(self, value: Value) -> Value:
        """One number in all lanes."""
        one = self.b.insert_element(ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined), value, I32(0))
        zeros = ir.Constant(I32X16, [0] * LANES)
        return self.b.shuffle_vector(one, one, zeros)

    def widened(self, address: Value, kind: Any) -> Value:
        """16 numbers as float32. `kind` is that of one: `F32`, `I16` for bfloat16, `I8`."""
        if kind is F32:
            return self.load(address, F32X16)
        if kind is I16:
            bits = self.b.zext(self.load(address, I16X16), I32X16)
            return self.b.bitcast(self.b.shl(bits, self.constant(16, I32X16)), F32X16)
        return self.b.sitofp(self.b.sext(self.load(address, I8X16), I32X16), F32X16)

    def constant(self, number: float, kind: Any = F32X16) -> Value:
        """A number in all lanes."""
        return ir.Constant(kind, [number] * kind.count)

    def _call(self, name: str, result: Any, *values: Value) -> Value:
        kind = ir.FunctionType(result, [value.type for value in values])
        return self.b.call(self.b.module.declare_intrinsic(name, (), kind), list(values))


class _Products(_Memory):
    """What a tile writes to multiply bytes.

    AVX2 adds two products in 16 bits, where 255 * 127 twice would not fit. A tile takes signed bytes there, or small
    ones whose sums fit for several steps. ARM's product takes signed bytes only, and small ones are that too.
    """

    @property
    def takes_signed(self) -> bool:
        """Whether bytes above 127 are slow for `dot4`, or too large, and `dot4_signed` takes its place."""
        return byte_product() in ("avx2", "sdot")

    @property
    def adds_in_16_bits(self) -> bool:
        """Whether `dot4` is slow for small bytes as well, and `dot2` and `sum_pairs` take its place."""
        return byte_product() == "avx2"

    def dot4(self, total: Value, unsigned: Value, signed: Value) -> Value:
        """Each int32 lane plus the product of its four bytes, unsigned ones (on ARM up to 127) by signed ones."""
        if byte_product() == "avx512-vnni":
            return self._call("llvm.x86.avx512.vpdpbusd.512", I32X16, total, unsigned, signed)
        if byte_product() == "avx-vnni":
            return self._in_halves("llvm.x86.avx512.vpdpbusd.256", I32X8, I32X8, total, unsigned, signed)
        if byte_product() == "sdot":
            return self._sdot(total, unsigned, signed)
        for place in range(4):
            u = self.b.and_(self.b.lshr(unsigned, self.constant(8 * place, I32X16)), self.constant(0xFF, I32X16))
            s = self.b.ashr(self.b.shl(signed, self.constant(24 - 8 * place, I32X16)), self.constant(24, I32X16))
            total = self.b.add(total, self.b.mul(u, s))
        return total

    def dot4_signed(self, total: Value, one: Value, other: Value) -> Value:
        """Each int32 lane plus the product of its four bytes, all signed, those of `other` above -128 (AVX2, ARM)."""
        if byte_product() == "sdot":
            return self._sdot(total, one, other)
        size = self._call("llvm.abs.v64i8", I8X64, self.b.bitcast(one, I8X64), ir.IntType(1)(0))
        turned = self._in_halves("llvm.x86.avx2.psign.b", I8X32, I8X32, other, one)
        return self.b.add(total, self.sum_pairs(self._pairs(size, turned)))

    def dot2(self, total: Value, unsigned: Value, signed: Value) -> Value:
        """Each int16 lane plus the products of its two bytes, unsigned ones by signed ones; sums must fit (AVX2)."""
        return self.b.add(total, self._pairs(unsigned, signed))

    def sum_pairs(self, totals: Value) -> Value:
        """The sums of two neighbouring int16 lanes each, as int32 (AVX2)."""
        return self._in_halves("llvm.x86.avx2.pmadd.wd", I16X16, I32X8, totals, self.constant(1, I16X32))

    def _sdot(self, total: Value, one: Value, other: Value) -> Value:
        """An instruction for registers of 128 bits on all four quarters of vectors of 512.

        It is written as assembly: where LLVM does not know the core by its name it would end the process over the
        intrinsic (llvm.aarch64.neon.sdot.v4i32.v16i8).
        """
        binding.initialize_native_asmparser()
        code, quarters = ir.InlineAsm(ir.FunctionType(I32X4, [I32X4] * 3), _SDOT, "=w,w,w,0"), []
        for first in range(0, LANES, 4):
            lanes = ir.Constant(I32X4, list(range(first, first + 4)))
            quarters.append(self.b.call(code, [self.b.shuffle_vector(v, v, lanes) for v in (one, other, total)]))
        halves = [self.b.shuffle_vector(*quarters[at : at + 2], ir.Constant(I32X8, list(range(8)))) for at in (0, 2)]
        return self.b.shuffle_vector(*halves, ir.Constant(I32X16, list(range(LANES))))

    def _pairs(self, unsigned: Value, signed: Value) -> Value:
        return self._in_halves("llvm.x86.avx2.pmadd.ub.sw", I8X32, I16X16, unsigned, signed)

    def _in_halves(self, name: str, takes: Any, gives: Any, *values: Value) -> Value:
        """An instruction for registers of 256 bits on both halves of vectors of 512."""
        wide, halves = ir.VectorType(takes.element, 2 * takes.count), []
        for first in (0, takes.count):
            lanes = ir.Constant(ir.VectorType(I32, takes.count), list(range(first, first + takes.count)))
            whole = [self.b.bitcast(value, wide) for value in values]
            halves.append(self._call(name, gives, *[self.b.shuffle_vector(v, v, lanes) for v in whole]))
        return self.b.shuffle_vector(
            *halves, ir.Constant(ir.VectorType(I32, 2 * gives.count), list(range(2 * gives.count)))
        )


class Tile(_Products):
    """Writes the instructions of one tile."""

    # ---- control ---------------------------------------------------------------------------------------------------

    def variable(self, value: Value) -> Value:
        """A place for a value that a loop changes; LLVM keeps it in a register."""
        return cgutils.alloca_once_value(self.b, value)  # type: ignore[no-untyped-call]

    def get(self, place: Value) -> Value:
        """What a variable holds."""
        return self.b.load(place)

    def put(self, value: Value, place: Value) -> None:
        """Changes a variable."""
        self.b.store(value, place)

    @contextmanager
    def loop(self, count: Value) -> Iterator[Value]:
        """0, 1, …, count - 1."""
        with cgutils.for_range(self.b, count) as found:
            yield found.index

    # ---- arithmetic ------------------------------------------------------------------------------------------------

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a b + c, rounded once."""
        return self._call("llvm.fma.v16f32", a.type, a, b, c)

    def maximum(self, a: Value, b: Value) -> Value:
        """The larger of each pair of lanes."""
        return self.b.select(self.b.fcmp_ordered(">", a, b), a, b)

    def across(self, combine: Callable[[Value, Value], Value], value: Value) -> Value:
        """All lanes combined in pairs, then pairs of pairs, …: the result in every lane."""
        return self.across_each(combine, [value])[0]

    def across_each(self, combine: Callable[[Value, Value], Value], values: list[Value]) -> list[Value]:
        """The same for several vectors, side by side."""
        for distance in (8, 4, 2, 1):
            partners = ir.Constant(I32X16, [lane ^ distance for lane in range(LANES)])
            turned = [self.b.shuffle_vector(value, value, partners) for value in values]
            values = [combine(value, other) for value, other in zip(values, turned, strict=True)]
        return values

    def first(self, value: Value) -> Value:
        """The number in the first lane."""
        return self.b.extract_element(value, I32(0))

    def exp(self, x: Value) -> Value:
        """e to the x for x ≤ 0, to 2 in the last place: 2^n times a polynomial of the rest.

        Coefficients: Cephes, expf.c (Moshier, https://www.netlib.org/cephes/).
        """
        x = self.b.select(self.b.fcmp_ordered("<", x, self.constant(-87.0)), self.constant(-87.0), x)  # NaN stays
        # Added to a number, 1.5 * 2^23 rounds it, and leaves it as a whole number in the lowest bits.
        shifted = self.fma(x, self.constant(1.4426950408889634), self.constant(12582912.0))
        n = self.b.fsub(shifted, self.constant(12582912.0))
        rest = self.fma(n, self.constant(-0.693359375), x)
        rest = self.fma(n, self.constant(2.12194440e-4), rest)
        p = self.constant(1.9875691500e-4)
        for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
            p = self.fma(p, rest, self.constant(c))
        p = self.fma(p, self.b.fmul(rest, rest), self.b.fadd(rest, self.constant(1.0)))
        power = self.b.shl(self.b.bitcast(shifted, I32X16), self.constant(23, I32X16))
        power = self.b.add(power, self.constant(0x3F800000, I32X16))
        return self.b.fmul(p, self.b.bitcast(power, F32X16))

    def exp2(self, xs: list[Value]) -> list[Value]:
        """2 to each of the x ≤ 0, to 2 in the last place, all at once: none waits for another's result.

        Coefficients: Cephes, exp2f.c (Moshier, https://www.netlib.org/cephes/).
        """
        b, magic = self.b, self.constant(12582912.0)
        xs = [b.select(b.fcmp_ordered("<", x, self.constant(-126.0)), self.constant(-126.0), x) for x in xs]
        shifted = [b.fadd(x, magic) for x in xs]
        rests = [b.fsub(x, b.fsub(s, magic)) for x, s in zip(xs, shifted, strict=True)]
        powers = [self.constant(1.535336188319500e-4)] * len(xs)
        for c in (1.339887440266574e-3, 9.618437357674640e-3, 5.550332471162809e-2, 2.402264791363012e-1,
                  6.931472028550421e-1, 1.0):  # fmt: skip
            powers = [self.fma(p, rest, self.constant(c)) for p, rest in zip(powers, rests, strict=True)]
        wholes = [b.shl(b.bitcast(s, I32X16), self.constant(23, I32X16)) for s in shifted]
        wholes = [b.add(whole, self.constant(0x3F800000, I32X16)) for whole in wholes]
        return [b.fmul(p, b.bitcast(whole, F32X16)) for p, whole in zip(powers, wholes, strict=True)]
