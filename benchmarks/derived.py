"""What rows amount to: ratios, growth, the bars the project holds itself to, and where somebody else is faster."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from . import ceilings
from .losses import FORWARD
from .providers import OURS
from .recording import GIVEN, RECOMPUTED, Row
from .token_coding import DECODE, ENCODE
from .training_step import WHOLE
from .zoo_building import OURS as ZOO_OURS
from .zoo_building import VARIANT as ZOO

HAND_WRITTEN = ("vmap", "vmap-compiled", "grouped", "unfold-bmm", "loop", "loop-channels-last", "loop-cudagraph")


class Rows:
    """The rows of one device, by what they measured; ``clock`` is the metric that its times are compared by.

    Each argument holds the rows of one suite. Suites have losses and weights of their own, and run at other times: what relates rows of
    several shapes stays within one of them.
    """

    def __init__(self, *suites: Iterable[Row]) -> None:
        self.suites = [list(rows) for rows in suites]
        self.all = [row for rows in self.suites for row in rows]
        self.cuda = any(row.metric == "gpu_ms" for row in self.all)
        self.clock = "gpu_ms" if self.cuda else "wall_ms"
        self._by_key = {row.key: row for row in self.all}

    def get(
        self,
        provider: str,
        net: str,
        k: int,
        n: int,
        variant: str = GIVEN,
        precision: str = "highest",
        direction: str = "loss+gradient",
        metric: str | None = None,
    ) -> float | None:
        """A median, or None."""
        row = self._by_key.get((provider, net, k, n, direction, precision, metric or self.clock, variant))
        return None if row is None else row.value

    def best(self, providers: Sequence[str], *where: object, **how: object) -> tuple[str, float] | None:
        """The fastest of some providers."""
        found = {name: self.get(name, *where, **how) for name in providers}  # type: ignore[arg-type]
        times = {name: value for name, value in found.items() if value is not None}
        return min(times.items(), key=lambda item: item[1]) if times else None

    def timed(self, direction: str = "loss+gradient", suite: Sequence[Row] | None = None) -> list[Row]:
        """Rows of the device's clock that hold a number; all of them, or those of one suite."""
        rows = self.all if suite is None else suite
        return [r for r in rows if r.metric == self.clock and r.direction == direction and r.value is not None]


def zoo_rows(rows: Rows) -> list[Row]:
    """Rows of zoo building that hold a number. Their clock is the host's on every device."""
    return [r for r in rows.all if r.direction == "zoo" and r.metric == "wall_ms" and r.variant == ZOO and r.value is not None]


def by_device(*suites: Iterable[Row]) -> dict[str, Rows]:
    """Rows of each device, in the order they first come; each argument holds those of one suite."""
    devices: dict[str, dict[int, list[Row]]] = {}
    for number, rows in enumerate(suites):
        for row in rows:
            devices.setdefault(row.device, {}).setdefault(number, []).append(row)
    return {device: Rows(*some.values()) for device, some in devices.items()}


@dataclass(frozen=True)
class Bar:
    """A number the project holds itself to. ``obtained`` None: not measured here."""

    what: str
    bar: float
    moonshot: float
    obtained: float | None
    unit: str = "x"
    at_most: bool = False
    detail: str = ""

    @property
    def verdict(self) -> str:
        """met | moonshot | missed | not measured."""
        if self.obtained is None:
            return "not measured"
        sign = -1 if self.at_most else 1
        if sign * self.obtained >= sign * self.moonshot:
            return "met, moonshot too"
        return "met" if sign * self.obtained >= sign * self.bar else "missed"


def _ratio(slow: float | None, fast: float | None) -> float | None:
    return slow / fast if slow and fast else None


def growth(rows: Rows, provider: str, net: str, n: int, precision: str, low: int, high: int) -> dict[int, float]:
    """Milliseconds a model at each k from ``low`` to ``high``."""
    line = (provider, net, n, precision, GIVEN)
    mine = [r for r in rows.timed() if (r.provider, r.architecture, r.n, r.precision, r.variant) == line]
    found = {r.k: r.value / r.k for r in mine if r.value and low <= r.k <= high}
    return dict(sorted(found.items()))


def _spread(per_model: dict[int, float], low: int, high: int) -> tuple[float | None, str]:
    """The largest departure from the time per model at ``low``, in per cent, and at which k."""
    if low not in per_model or high not in per_model:
        return None, ""
    far = max(per_model, key=lambda k: abs(per_model[k] / per_model[low] - 1))
    return 100 * abs(
        per_model[far] / per_model[low] - 1
    ), f"at k={far}: {per_model[far] / per_model[low]:.3f} of the time per model at k={low}"


def cpu_bars(rows: Rows) -> list[Bar]:
    """Every CPU bar."""
    found, ours = [], "wslfast-torch"
    for k, n, bars in ((64, 256, ((7, 10), (9, 14))), (32, 128, ((5, 8), (6, 10)))):
        published = rows.get("published", "cnn3", k, n, RECOMPUTED)
        for variant, (bar, moonshot) in zip((RECOMPUTED, GIVEN), bars, strict=True):
            obtained = _ratio(published, rows.get(ours, "cnn3", k, n, variant))
            found.append(Bar(f"CNN3 k={k} n={n}, {variant}: against the published loss", bar, moonshot, obtained))
    for variant in (RECOMPUTED, GIVEN):
        best = rows.best(("loop", "loop-channels-last"), "cnn3", 64, 256, variant)
        obtained = _ratio(best[1] if best else None, rows.get(ours, "cnn3", 64, 256, variant))
        what = f"CNN3 k=64 n=256, {variant}: against the best hand-written loop"
        found.append(Bar(what, 1.1, 1.5, obtained, detail=best[0] if best else ""))
    zoo = zoo_rows(rows)
    for net in ("cnn3", "cnn", "lenet5"):
        times = {r.provider: (r.value, r.k) for r in zoo if r.architecture == net}
        pair = [times.get(name, (None, 0)) for name in ("one-after-another", ZOO_OURS)]
        found.append(
            Bar(
                f"{net}: zoo building against one network after another",
                3,
                5,
                _ratio(pair[0][0], pair[1][0]),
                detail=f"k={pair[1][1]}" if pair[1][0] else "",
            )
        )
    per_model = growth(rows, ours, "cnn3", 64, "highest", 64, 2048)
    spread, detail = _spread(per_model, 64, 2048)
    return [*found, Bar("CNN3 n=64, k from 64 to 2,048: departure from linear growth", 10, 5, spread, "%", True, detail)]


def gpu_bars(rows: Rows) -> list[Bar]:
    """Every GPU bar that its ratios can be told of on any GPU, and the milliseconds, which were set for an H100."""
    found = []
    for precision, bar, moonshot in (("fp16", 12, 8), ("tf32", 20, 14)):
        best = rows.best(OURS, "cnn3", 1024, 256, GIVEN, precision)
        where = f"CNN3 k=1024 n=256 {precision}"
        mine, name = (best[1], best[0]) if best else (None, "")
        found.append(Bar(f"{where}: milliseconds (the bar is an H100's)", bar, moonshot, mine, "ms", True, name))
        recomputed = rows.best(OURS, "cnn3", 1024, 256, RECOMPUTED, precision)
        published = rows.get("published", "cnn3", 1024, 256, RECOMPUTED, precision)
        detail = recomputed[0] if recomputed else ""
        obtained = _ratio(published, recomputed[1] if recomputed else None)
        found.append(Bar(f"{where}: against the published loss, targets recomputed", 10, 20, obtained, detail=detail))
        peer = rows.best(HAND_WRITTEN, "cnn3", 1024, 256, GIVEN, precision)
        found.append(
            Bar(
                f"{where}: against the best torch peer, targets given",
                4,
                8,
                _ratio(peer[1] if peer else None, mine),
                detail=peer[0] if peer else "",
            )
        )
    device = rows.all[0].device
    ceiling, _ = ceilings.of(rows.all, "fp16", device)
    rate = max((rows.get(name, "cnn3", 1024, 256, GIVEN, "fp16", metric="flops") or 0.0 for name in OURS), default=0.0)
    share = 100 * rate / ceiling if ceiling and rate else None
    found.append(Bar("CNN3 k=1024 n=256 fp16: share of the measured product's FLOP/s", 16, 25, share, "%"))
    for name, memory, launches in (("wslfast-triton-layerwise", (30, 15), (16, 8)), ("wslfast-triton-network", (2, 1), (16, 3))):
        peak = rows.get(name, "cnn3", 4096, 256, GIVEN, "fp16", metric="peak_mb")
        found.append(Bar(f"CNN3 k=4096 fp16, {name}: extra memory", *memory, None if peak is None else peak / 1e3, "GB", True))
        count = rows.get(name, "cnn3", 1024, 256, GIVEN, "fp16", metric="launches")
        found.append(Bar(f"CNN3 k=1024 fp16, {name}: launches", *launches, count, "launches", True))
        spread, detail = _spread(growth(rows, name, "cnn3", 256, "tf32", 64, 16384), 64, 16384)
        found.append(Bar(f"CNN3 n=256 tf32, {name}: time per pair, k from 64 to 16,384", 20, 5, spread, "%", True, detail))
    phases = [r for r in rows.all if r.direction == "step" and r.variant.startswith("phase ") and r.value is not None]
    total = sum(r.value or 0.0 for r in phases)
    behavior = sum(r.value or 0.0 for r in phases if r.variant == "phase loss")
    share = 100 * behavior / total if total else None
    found.append(Bar("CNN3 k=128: behavioral loss' share of a whole training step", 25, 10, share, "%", True))
    zoo = {r.provider: r.value for r in zoo_rows(rows) if r.architecture == "cnn3"}
    obtained = _ratio(zoo.get("one-after-another"), zoo.get(ZOO_OURS))
    return [*found, Bar("1,200 CNN3, one epoch, against one network after another", 20, 50, obtained)]


def bars(rows: Rows) -> list[Bar]:
    """The bars of a device."""
    return gpu_bars(rows) if rows.cuda else cpu_bars(rows)


def peers_ahead(rows: Rows) -> list[tuple[Row, Row, float]]:
    """(the fastest peer's row, the fastest of ours, how many times faster the peer is) wherever a peer is faster: loss and gradient,
    forward passes, building a zoo, and tokens."""
    shapes: dict[tuple[object, ...], list[Row]] = {}
    for direction in ("loss+gradient", "forward"):
        for row in rows.timed(direction):
            if row.variant in (GIVEN, RECOMPUTED, FORWARD, ENCODE, DECODE):
                shapes.setdefault(row.key[1:], []).append(row)
    for row in zoo_rows(rows):
        shapes.setdefault(row.key[1:], []).append(row)
    fastest: Callable[[list[Row]], Row | None] = lambda some: min(some, key=lambda r: r.value or 0.0, default=None)  # noqa: E731
    ours, found = (*OURS, "wslfast"), []
    for some in shapes.values():
        mine, peer = fastest([r for r in some if r.provider in ours]), fastest([r for r in some if r.provider not in ours])
        if mine and peer and mine.value and peer.value and peer.value < mine.value:
            found.append((peer, mine, mine.value / peer.value))
    return sorted(found, key=lambda item: -item[2])


def against(rows: Rows, row: Row) -> float | None:
    """How many times as long as the fastest of ours on the same shape."""
    best = rows.best(OURS, *row.key[1:4], row.variant, row.precision, row.direction)
    return _ratio(row.value, best[1] if best else None)


def rates(rows: Rows, row: Row) -> Row | None:
    """The row of FLOP/s that belongs to a row of milliseconds."""
    key = replace(row, metric="flops").key
    return next((r for r in rows.all if r.key == key), None)


def whole_steps(rows: Rows) -> list[Row]:
    """Rows of the training step, the whole first."""
    return sorted((r for r in rows.all if r.direction == "step" and r.value is not None), key=lambda r: r.variant != WHOLE)
