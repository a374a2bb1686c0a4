"""Lab `attn.flash_tiles`: the bytes that attention moves when it writes its scores out, and when it works by tiles."""

from __future__ import annotations

from collections.abc import Mapping

from sihe.apps.coach.labs.attention import exponent
from sihe.apps.coach.labs.ranks import run_ranks
from sihe.apps.coach.labs.types import Axis, Column, Measurement, Series, Table
from sihe.apps.coach.schema import Text

_ITEM_BYTES = 4  # float32
_MIB = 2**20
_SHORTEST = 256


def measure(parameters: Mapping[str, int | float], *, limit_s: float) -> Measurement:
    """Counts the traffic of one head at lengths that double up to `longest`, with tiles of `tile` rows and twice."""
    longest, head_dim, tile = (int(parameters[key]) for key in ("longest", "head-dim", "tile"))
    lengths = sequence_lengths(longest)
    (found,) = run_ranks(
        "sihe.apps.coach.labs.flash_tiles_ranks:traffic",
        {"lengths": lengths, "head_dim": head_dim, "tile": tile},
        world_size=1,
        limit_s=limit_s,
        threads=2,
    )
    return Measurement(
        values={
            "plain-measured": found["plain_bytes"][-1] / _MIB,
            "plain-modelled": plain_bytes(longest, head_dim) / _MIB,
            "tiled-measured": found["tiled_bytes"][-1] / _MIB,
            "tiled-modelled": tiled_bytes(longest, head_dim, tile) / _MIB,
            "saving": found["plain_bytes"][-1] / found["tiled_bytes"][-1],
            "doubled-saving": found["tiled_bytes"][-1] / found["doubled_bytes"][-1],
            "fast": found["fast_bytes"][-1] / 1024,
            "doubled-fast": found["doubled_fast_bytes"][-1] / 1024,
            "scores": longest * longest * _ITEM_BYTES / _MIB,
            "tiled-exponent": exponent(lengths, found["tiled_bytes"]),
            "difference": found["difference"],
        },
        tables=(_table(lengths, found),),
        series=(
            _series("plain", Text(zh="写出分数", en="Scores written out"), lengths, found["plain_bytes"]),
            _series("tiled", Text(zh="分块", en="By tiles"), lengths, found["tiled_bytes"]),
            _series("doubled", Text(zh="分块，块大一倍", en="By tiles twice as tall"), lengths, found["doubled_bytes"]),
        ),
    )


def plain_bytes(tokens: int, head_dim: int) -> int:
    """Traffic of one head that writes scores and probabilities out: (4·T² + 4·T·d)·b."""
    return (4 * tokens * tokens + 4 * tokens * head_dim) * _ITEM_BYTES


def tiled_bytes(tokens: int, head_dim: int, tile: int) -> int:
    """Traffic of one head by square tiles: queries and results once, keys and values once a tile that sees them.

    With n = T / tile it is (2·T·d + tile·d·n·(n + 1))·b, for T that is a multiple of the tile.
    """
    tiles = tokens // tile
    return (2 * tokens * head_dim + tile * head_dim * tiles * (tiles + 1)) * _ITEM_BYTES


def sequence_lengths(longest: int) -> list[int]:
    """Lengths that double up to `longest`."""
    lengths = [_SHORTEST]
    while lengths[-1] * 2 <= longest:
        lengths.append(lengths[-1] * 2)
    return lengths


def _table(lengths: list[int], found: Mapping[str, list[float]]) -> Table:
    return Table(
        key="traffic",
        title=Text(zh="一个头搬运的字节", en="Bytes moved for one head"),
        columns=(
            Column(label=Text(zh="长度", en="Length")),
            Column(label=Text(zh="写出分数", en="Written out"), unit="MiB", provenance="measured"),
            Column(label=Text(zh="分块", en="Tiles"), unit="MiB", provenance="measured"),
            Column(label=Text(zh="块大一倍", en="Taller tiles"), unit="MiB", provenance="measured"),
            Column(label=Text(zh="片上内存", en="Fast memory"), unit="KiB", provenance="measured"),
        ),
        rows=tuple(
            (
                length,
                round(found["plain_bytes"][index] / _MIB, 3),
                round(found["tiled_bytes"][index] / _MIB, 3),
                round(found["doubled_bytes"][index] / _MIB, 3),
                round(found["fast_bytes"][index] / 1024, 1),
            )
            for index, length in enumerate(lengths)
        ),
    )


def _series(key: str, label: Text, lengths: list[int], moved: list[float]) -> Series:
    return Series(
        key=key,
        chart="traffic",
        label=label,
        x=Axis(label=Text(zh="长度", en="Length"), log=True),
        y=Axis(label=Text(zh="搬运的字节", en="Bytes moved"), unit="MiB", log=True),
        provenance="measured",
        points=tuple((float(length), size / _MIB) for length, size in zip(lengths, moved, strict=True)),
    )
