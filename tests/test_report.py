"""The page: it loads nothing, escapes everything, says what the summary says, and stands odd data."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from html_audit import Audit

from wslfast.errors import WslfastError
from wslfast.measure import Reconstruction, Variant, write_report

pytest.importorskip("matplotlib")


def _comparison(k: int = 9, seed: int = 0, **counts: int) -> Reconstruction:
    g = torch.Generator().manual_seed(seed)
    a, b, c, d = (torch.rand(k, generator=g, dtype=torch.float64) for _ in range(4))
    others = c / 2 if k > 1 else torch.full((k,), math.nan, dtype=torch.float64)
    identified = (d > 0.5).double() if k > 1 else others
    counts = {"images": 597, "non_finite": 0, "non_finite_original": 0} | counts
    return Reconstruction(a, b, b - a, c, others, c - others, identified, 3 + d, d, 1 - d, d, d, d / 2, **counts)


def _curve(keys: tuple[str, ...] = ("loss", "structural")) -> list[dict[str, Any]]:
    return [{"step": s, "lr": 1e-3, **{key: 1 / (s + i) for i, key in enumerate(keys)}} for s in (1, 10, 20, 30)]


def _variants() -> list[Variant]:
    parts = ("loss", "structural", "behavioral", "contrastive")
    return [
        Variant("structure", _comparison(seed=1), _curve(), 1350, 0.548),
        Variant("structure+behavior", _comparison(seed=2), _curve(parts), 1350, 0.548, "lr 5e-4"),
        Variant("linear", _comparison(seed=3, non_finite=2, non_finite_original=1), None, 1346, 0.546),
    ]


def _write(path: Path, **change: Any) -> str:
    arguments: dict[str, Any] = {"title": "demo", "headline": "It works.", "variants": _variants(), "facts": {"machine": "2 cores"}}
    return write_report(path / "report.html", **(arguments | change)).read_text(encoding="utf-8")


def test_the_page_loads_nothing_and_is_well_formed(tmp_path: Path) -> None:
    page = _write(tmp_path, latents=torch.randn(20, 8), latent_accuracy=torch.rand(20), latent_groups=["train", "test"] * 10)
    audit = Audit(page)
    assert not audit.open
    assert all(link.startswith(("#", "data:image/png")) for link in audit.loads)
    assert not {"script", "link", "iframe", "img"} & set(audit.tags)
    assert not re.search(r"https?:|@import|url\((?!#)", page)
    assert "default-src 'none'" in page
    assert audit.tags.count("svg") == 6
    assert audit.tags.count("h1") == 1
    assert page.count("<!DOCTYPE") == 1
    assert "<?xml" not in page
    assert "<metadata" not in page


def test_every_text_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>&\"$x^2$"
    variant = Variant(evil, _comparison(), _curve(), 10, 0.5, evil)
    page = _write(
        tmp_path, title=evil, headline=evil, variants=[variant], facts={evil: evil}, latents=torch.randn(6, 2), latent_groups=[evil] * 6
    )
    assert "<script" not in page
    assert "script" not in Audit(page).tags
    assert page.count("&lt;script&gt;") >= 8


def test_dollar_signs_are_not_mathematics(tmp_path: Path) -> None:
    variants = [Variant(name, _comparison(), _curve(), 1, 0.1) for name in ("cost $5 {x", "a$b_{$")]
    page = _write(tmp_path, variants=variants)
    assert page.count("cost $5 {x") >= 4
    assert page.count("a$b_{$") >= 4


def test_the_table_says_what_the_summary_says(tmp_path: Path) -> None:
    variants = _variants()
    page = _write(tmp_path, variants=variants)
    for variant in variants:
        s = variant.comparison.summary()
        assert f"{100 * s['agreement']:.1f}" in page
        assert f"{100 * s['accuracy_original']:.1f} → {100 * s['accuracy_reconstructed']:.1f}" in page
        assert f"{100 * s['accuracy_change']:+.1f}".replace("-", "−") in page
        assert f"{s['l2_masked']:.2f}" in page
        assert f"{variant.latent_numbers:,}" in page
    assert "55 % of weights" in page
    assert "lr 5e-4" in page
    assert "2 cores" in page
    assert "2 of 9 reconstructions not finite: wrong everywhere" in page
    assert "1 model left out" in page
    assert "9 held-out models" in page
    assert "597 test images" in page
    assert not re.search(r"\bnan\b|\binf\b|None", re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL))


def test_one_model_and_undefined_metrics(tmp_path: Path) -> None:
    alone = Variant("alone", _comparison(k=1), None, 3, 0.5)
    page = _write(tmp_path, variants=[alone], latents=torch.zeros(1, 4), latent_accuracy=torch.zeros(1))
    assert "–" in page
    assert "Latent map" not in page
    assert "Training" not in page
    everything_undefined = Reconstruction(*[torch.full((3,), math.nan, dtype=torch.float64)] * 13, 10, 0, 3)
    Audit(_write(tmp_path, variants=[Variant("nothing", everything_undefined, [], 3, 0.5)]))


def test_many_variants_wrap_and_keep_their_colours(tmp_path: Path) -> None:
    page = _write(tmp_path, variants=[Variant(f"v{i}", _comparison(seed=i), None, 3, 0.5) for i in range(9)])
    assert Audit(page).tags.count("svg") == 4


def test_odd_logs_and_latents(tmp_path: Path) -> None:
    curve: list[dict[str, Any]] = [
        {"step": 1, "loss": math.nan},
        {"step": 2, "loss": 0.0},
        {"event": "resumed"},
        {"step": 3, "loss": "x"},
        {"step": 4, "loss": 1e9},
    ]
    latents = torch.randn(5, 1)
    latents[0] = math.nan
    page = _write(
        tmp_path,
        variants=[Variant("odd", _comparison(), curve, 3, 0.5)],
        latents=latents,
        latent_accuracy=torch.tensor([0.1, math.nan, 0.3, 0.4, 0.5]),
    )
    assert "Latent map" in page
    assert "total loss" in page
    constant = _write(tmp_path, variants=_variants()[:1], latents=torch.ones(5, 3), latent_accuracy=torch.full((5,), math.nan))
    assert "Latent map" in constant


def test_many_points_become_a_bitmap_inside_the_page(tmp_path: Path) -> None:
    page = _write(tmp_path, variants=[Variant("large", _comparison(k=4000), None, 3, 0.5)])
    assert len(page) < 1_000_000
    assert all(link.startswith(("#", "data:image/png")) for link in Audit(page).loads)


def test_the_same_data_give_the_same_page(tmp_path: Path) -> None:
    variants = _variants()[:1]
    assert _write(tmp_path / "a", variants=variants) == _write(tmp_path / "b", variants=variants)


def test_matplotlib_is_imported_only_to_draw_and_its_state_is_left_alone(tmp_path: Path) -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    _write(tmp_path, variants=_variants()[:1])
    assert dict(mpl.rcParams) == before


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(WslfastError, match=r"pip install 'wslfast\[plot\]'"):
        _write(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variants": []}, "variants: expected at least one Variant"),
        ({"variants": _variants()[:1] * 2}, "expected distinct names"),
        ({"latents": torch.zeros(3)}, r"latents: expected \[k, d\]"),
        ({"latents": torch.zeros(3, 2), "latent_accuracy": torch.zeros(2)}, r"latent_accuracy: expected \[3\]"),
        ({"latents": torch.zeros(3, 2), "latent_groups": ["a"]}, "latent_groups: expected 3 names"),
    ],
    ids=["none", "twice", "1-d", "accuracy", "groups"],
)
def test_wrong_inputs(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(WslfastError, match=message):
        _write(tmp_path, **change)
