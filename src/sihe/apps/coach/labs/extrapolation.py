"""Lab `pos.extrapolation`: decoders that differ in their positions alone, trained short and read long."""

from __future__ import annotations

from collections.abc import Mapping

from sihe.apps.coach.labs.ranks import run_ranks
from sihe.apps.coach.labs.types import Axis, Column, Measurement, Series, Table
from sihe.apps.coach.map import CONTENT
from sihe.apps.coach.schema import Text

KINDS = ("learned", "sinusoidal", "relative", "rope", "alibi", "none")
_LABELS = {
    "learned": Text(zh="学习的绝对位置", en="Learned, absolute"),
    "sinusoidal": Text(zh="正弦绝对位置", en="Sinusoidal, absolute"),
    "relative": Text(zh="相对偏置（分桶）", en="Relative buckets"),
    "rope": Text(zh="RoPE", en="RoPE"),
    "alibi": Text(zh="ALiBi", en="ALiBi"),
    "none": Text(zh="没有位置", en="None"),
    "rope-scaled": Text(zh="RoPE，位置压缩，未再训练", en="RoPE, positions squeezed, not trained again"),
}


def measure(parameters: Mapping[str, int | float], *, limit_s: float) -> Measurement:
    """Trains one decoder for each of `KINDS` on windows of `trained` bytes and evaluates it on up to 8 times that."""
    trained, steps = int(parameters["trained"]), int(parameters["steps"])
    lengths = [trained, 2 * trained, 4 * trained, 8 * trained]
    chapters = sorted((CONTENT / "handbook" / "en").glob("*.md"))
    shares = run_ranks(
        "sihe.apps.coach.labs.extrapolation_ranks:losses",
        {
            "files": [str(chapter) for chapter in chapters],
            "kinds": list(KINDS),
            "lengths": lengths,
            "steps": steps,
        },
        world_size=2,
        limit_s=limit_s,
        threads=1,
    )
    losses: dict[str, list[float]] = {kind: found for share in shares for kind, found in share.items()}
    losses = {kind: losses[kind] for kind in _LABELS}
    values = {f"{kind}-growth": found[-1] - found[0] for kind, found in losses.items()}
    return Measurement(
        values={
            **values,
            "rope-short": losses["rope"][0],
            "alibi-short": losses["alibi"][0],
            "none-short": losses["none"][0],
            "rope-double": losses["rope"][1] - losses["rope"][0],
        },
        tables=(_table(lengths, losses),),
        series=tuple(_series(kind, lengths, found) for kind, found in losses.items()),
    )


def _table(lengths: list[int], losses: Mapping[str, list[float]]) -> Table:
    return Table(
        key="losses",
        title=Text(zh="窗口末尾的损失", en="Loss at the end of a window"),
        columns=(
            Column(label=Text(zh="位置编码", en="Positions")),
            *(
                Column(label=Text(zh=f"{length} 字节", en=f"{length} bytes"), unit="nats", provenance="measured")
                for length in lengths
            ),
        ),
        rows=tuple((_LABELS[kind].en, *(round(loss, 3) for loss in found)) for kind, found in losses.items()),
    )


def _series(kind: str, lengths: list[int], losses: list[float]) -> Series:
    return Series(
        key=kind,
        chart="loss",
        label=_LABELS[kind],
        x=Axis(label=Text(zh="窗口长度", en="Length of the window"), unit="bytes", log=True),
        y=Axis(label=Text(zh="末尾的损失", en="Loss at its end"), unit="nats"),
        provenance="measured",
        points=tuple((float(length), loss) for length, loss in zip(lengths, losses, strict=True)),
    )
