"""The evaluation's page: it loads nothing, escapes everything, says what the rows say, and draws what lies beside them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import pytest
import torch
from html_audit import Audit

from wslfast.errors import WslfastError
from wslfast.measure.reconstruction import collapse
from wslfast.measure.results import KEY, Unit, from_csv, read_results, to_csv, write_tables
from wslfast.page import analysis, drawing, headline, published, report, tables
from wslfast.page.html import number

pytest.importorskip("matplotlib")
RECONSTRUCTED = (
    "agreement", "agreement_others", "agreement_margin", "identified", "accuracy_original", "accuracy_reconstructed", "accuracy_change",
    "l2_masked", "explained_variance", "softmax_l2",
)  # fmt: skip


def _unit(zoo: str, variant: str, seed: int, kind: str, level: float, **facts: Any) -> Unit:
    """A unit whose every figure can be told from the others'."""
    metrics: dict[str, Any] = {}
    tables: dict[str, Any] = {}
    g = torch.Generator().manual_seed(seed)
    if kind in ("run", "code", "model"):
        metrics |= {name: (level + i / 100, level + i / 100, 0.05) for i, name in enumerate(RECONSTRUCTED)}
        values = torch.rand(6, len(RECONSTRUCTED), generator=g).tolist()
        tables["models"] = [{"model": j, "epoch": 1, **dict(zip(RECONSTRUCTED, row))} for j, row in enumerate(values)]
    if kind != "model":
        metrics |= dict.fromkeys(("probe_r2", "probe_r2_ggap", "probe_r2_epoch", "probe_r2_whole"), (level, level, 0.1))
    if kind in ("run", "code"):
        metrics |= dict.fromkeys(
            ("generated_accuracy", "novelty", "novelty_reconstruction", "diversity", "latent_share"), (level, level, 0.1)
        )
        if kind == "code":
            metrics["latent_share"] = (0.72, 0.72, None)  # no larger than the runs beside it
        tables["samplings"] = [
            {
                "sampler": s,
                "bandwidth": h,
                "select": "none",
                "main": int(h == 0.1),
                "test_acc": level,
                "novelty": 2 * level,
                "diversity": 1.0,
                "diversity_disagreement": 0.1,
                "novelty_behavior": 0.1,
            }
            for s, h in (("joint", 0.1), ("joint", 0.3), ("uniform", None))
        ]
        tables["samples"] = [
            {"set": w, "model": j, "epoch": e, "test_acc": level} for w, e in (("generated", 0), ("finetuned", 1)) for j in range(4)
        ]
        tables["latents"] = [
            {"split": s, "test_acc": level, "x": float(j), "y": float(-j), "share_x": 0.6, "share_y": 0.2}
            for j in range(3)
            for s in ("train", "test")
        ]
        tables["curves"] = [{"step": s, "loss": 1 / s, "structural": 1 / s} for s in (1, 2, 3)]
    if kind == "zoo":
        metrics = {"accuracy_anchors": (0.9, 0.9, 0.01), "diversity": (12.0, 12.0, 1.0), "best_original": (0.95, 0.95, None)}
        tables["samples"] = [{"set": "anchors", "model": j, "test_acc": 0.9} for j in range(4)]
    return Unit(zoo, variant, seed, kind, "f", facts, metrics, tables)


ZOO_FACTS: dict[str, Any] = {
    "dataset": "digits", "image_shape": [1, 28, 28], "classes": 10, "images": [1200, 200, 397], "images_used": 300, "models": 60,
    "architecture": "cnn", "parameters": 2464, "checkpoints": {"train": 100, "test": 20}, "checkpoints_used": {"train": 100, "test": 12},
    "epochs": [2, 3, 5],
}  # fmt: skip


def _folder(path: Path, *, name: str = "S+B", zoos: tuple[str, ...] = ("digits",), facts: dict[str, Any] | None = None) -> Path:
    units = []
    for zoo in zoos:
        units += [
            _unit(zoo, "zoo", 0, "zoo", 0.9, **ZOO_FACTS),
            _unit(zoo, name, 0, "run", 0.712, losses="S+B", beta=0.1, gamma=0.0, criterion="mse", steps=100, lr=0.001, start="linear"),
            _unit(zoo, name, 1, "run", 0.732, losses="S+B", beta=0.1, gamma=0.0, criterion="mse", steps=100, lr=0.001, start="linear"),
            _unit(zoo, "S", 0, "run", 0.513, losses="S", beta=1.0, gamma=0.0, steps=100, lr=0.001, start="linear"),
            _unit(zoo, f"{name}-zero-layer", 0, "run", 0.614, losses="S+B", beta=0.1, gamma=0.0, baseline="zero-layer"),
            _unit(zoo, "linear-metric-55", 0, "code", 0.815, baseline="closed form"),
            _unit(zoo, "best-zoo-model", 0, "model", 0.216),
            _unit(zoo, "weight-statistics", 0, "features", 0.417),
        ]
    write_tables(
        path, units, {"machine": "two cores", "versions": "wslfast 0", "date": "2026-01-01", "protocol": {"models": 12}, **(facts or {})}
    )
    return path


def _page(folder: Path) -> str:
    return report(folder).read_text()


def _page_of(folder: Path) -> str:
    """Drawn from the folder as it is."""
    return report(folder).read_text()


def _text(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", re.sub(r"<(svg|style).*?</\1>", " ", page, flags=re.DOTALL)))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made and not rendered, which takes longer than all the rest."""
    monkeypatch.setattr(drawing, "to_svg", lambda figure: "<svg></svg>")


def test_the_page_loads_nothing_and_is_well_formed(tmp_path: Path) -> None:
    page = _page(_folder(tmp_path, zoos=("digits", "fashion")))
    audit = Audit(page)
    assert not audit.open
    first = (
        "72.2 % of images on digits (75.2 % identified; structure alone 51.3 %; best closed form 81.5 %; 6 test networks, a small sample)"
    )
    assert f"originals: {first} and 72.2 % of images on fashion" in _text(page)
    assert all(link.startswith(("#", "data:image/png")) for link in audit.loads)
    assert not {"script", "link", "iframe", "img"} & set(audit.tags)
    assert not re.search(r"https?:|@import|url\((?!#)", page)
    assert "default-src 'none'" in page
    # a zoo: overview, histograms, probes, generation, map, curves; and one figure against beta
    assert audit.tags.count("svg") == 2 * 6 + 1
    assert page.count("<h1>") == 1


def test_every_name_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>&\"$x^2$"
    page = _page(_folder(tmp_path, name=evil, zoos=(evil,), facts={"machine": evil, "date": evil}))
    assert "<script" not in page
    assert "script" not in Audit(page).tags
    assert page.count("&lt;script&gt;") > 10


def test_tables_say_what_the_rows_say(tmp_path: Path, undrawn: None) -> None:
    text = _text(_page(_folder(tmp_path)))
    assert (
        "On digits, reconstructions by “S+B” agree with their originals on 72.2 % of images at 72 % of the numbers (75.2 % identified, 6 test networks, a small sample)"
        in text
    )  # mean of two seeds
    assert "; by “S”, without behavior, on 51.3 %; the best closed-form code, “linear-metric-55”, on 81.5 %." in text
    assert "S+B S+B, beta 0.1, mse, 100 steps; 2 seeds" in text
    assert "72.2 ± 1.4" in text  # over seeds
    assert "51.3 ± 5.0" in text  # over models, where there is one seed
    assert "60 cnn networks of 2,464 parameters" in text
    assert "test 12 of 20" in text
    assert text.count("kernel density, whole latents bandwidth 0.1 ") == 1  # of the first seed alone
    assert "two cores" in text
    assert "Trained" in text
    assert "The same without transformer blocks" in text
    assert not re.search(r"\bnan\b|\binf\b|None", text)


def test_reconstructions_that_are_not_finite_are_counted(tmp_path: Path, undrawn: None) -> None:
    folder = _folder(tmp_path)
    with (folder / "rows.csv").open("a") as file:
        file.write("digits,linear-metric-55,0,non_finite,2,2,\ndigits,S,0,non_finite,0,0,\n")
    text = _text(report(folder).read_text())
    assert text.count("not finite") == 1
    assert "closed form; 2 reconstructions not finite: wrong everywhere" in text


def test_dollar_signs_are_not_mathematics(tmp_path: Path) -> None:
    page = _page(_folder(tmp_path, name="cost $5 {x$"))
    assert page.count("cost $5 {x$") > 10
    assert "mathdefault" not in page


def test_the_same_rows_give_the_same_page_and_matplotlibs_state_is_left_alone(tmp_path: Path) -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    folder = _folder(tmp_path)
    assert _page(folder) == report(folder, page=tmp_path / "again.html").read_text()
    assert dict(mpl.rcParams) == before


def test_odd_logs_latents_and_models(tmp_path: Path) -> None:
    """What is undefined is left out of a figure, many points become a bitmap inside it, and one model draws as well as many."""
    nan = float("nan")
    odd = _unit("z", "S", 0, "run", 0.5, losses="S")
    curve = [{"step": 1, "loss": nan}, {"step": 2, "loss": 0.0}, {"step": 3, "loss": "x"}, {"step": 4, "loss": 1e9}]
    latents = [{"split": "test", "test_acc": nan, "x": x, "y": 0.0, "share_x": 1.0, "share_y": nan} for x in (nan, 1.0, 1.0, 1.0)]
    one = [{"model": 0, "epoch": None, **dict.fromkeys(RECONSTRUCTED, nan), "agreement": 0.5}]
    tables = {**odd.tables, "curves": curve, "latents": latents, "models": one}
    write_tables(tmp_path, [replace(odd, tables=tables)], {})
    page = _page(tmp_path)
    assert not Audit(page).open
    assert "total loss" in page
    assert "Latent map" in page
    many = [{**latents[1], "x": float(i), "y": float(i % 7), "test_acc": i / 4000} for i in range(4000)]
    write_tables(tmp_path, [replace(odd, tables={**tables, "latents": many, "curves": curve[:1]})], {})
    page = _page(tmp_path)
    assert len(page) < 1_000_000
    assert "data:image/png" in page
    assert all(link.startswith(("#", "data:image/png")) for link in Audit(page).loads)
    assert "total loss" not in page


def test_notes_of_a_study_are_at_the_foot_of_its_page(tmp_path: Path, undrawn: None) -> None:
    assert "<dt>rates</dt><dd>1 &amp; 2</dd>" in _page(_folder(tmp_path, facts={"notes": {"rates": "1 & 2"}}))


def test_the_page_draws_and_measures_nothing() -> None:
    """Its modules import no torch, and of what is measured only rows, what they mean, and goals."""
    package = Path(analysis.__file__).parent
    for path in package.glob("*.py"):
        imports = re.findall(r"^\s*(?:from|import) ([\w.]+)", path.read_text(), flags=re.MULTILINE)
        assert "torch" not in {name.partition(".")[0] for name in imports}, path
        assert {name for name in imports if name.startswith("..")} <= {
            "..files",
            "..errors",
            "..measure",
            "..measure.results",
            "..measure.goals",
            "..training.hooks",  # who else is told of the page
            *(("..zoo", "..zoo.reading") if path.name == "card.py" else ()),  # a zoo's card is drawn from its manifest
        }


def test_new_models_are_shown_where_only_rows_are_left(tmp_path: Path, undrawn: None) -> None:
    folder = _folder(tmp_path)
    for table in ("models", "samples", "samplings", "latents", "curves"):
        (folder / f"{table}.csv").unlink()
    text = _text(_page(folder))
    assert "zoo: anchors the best training models" in text
    assert "Latent map" not in text


def test_new_models_that_are_all_broken_have_no_distance_and_no_place_in_the_figure(tmp_path: Path, undrawn: None) -> None:
    folder = _folder(tmp_path)
    for table, column in (("samplings", "novelty"), ("samples", "test_acc")):
        rows = from_csv(folder / f"{table}.csv")
        (folder / f"{table}.csv").write_text(to_csv([{**row, column: None} for row in rows], KEY))
    text = _text(_page(folder))
    assert "Every sampler" in text
    assert "kernel density, whole latents bandwidth 0.1 71.2" in text


def test_the_best_model_is_that_of_all_runs_of_one_objective(tmp_path: Path) -> None:
    """The first run's stood for all; a run whose losses are not known had none."""
    units = [Unit("digits", "zoo", 0, "zoo", "", {"classes": 10}, {"best_original": (0.95, 0.95, None)})]
    for variant, losses, value in (("a", "S+B", 0.51), ("b", "S+B", 0.91), ("mine", "", 0.33)):
        units.append(Unit("digits", variant, 0, "run", "", {"losses": losses}, {"best_reconstructed": (value, value, None)}))
    write_tables(tmp_path, units, {})
    text = _text(tables.best_table(read_results(tmp_path)))
    assert "reconstructed, S+B 91.0" in text
    assert "reconstructed, mine 33.0" in text


def test_the_papers_figures_are_tinted_and_told_apart(tmp_path: Path, undrawn: None) -> None:
    page = _page(_folder(tmp_path))
    tinted = re.findall(r'<td class="paper">([^<]*)</td>', page)
    for table in (published.AGREEMENT,):
        assert {f"{100 * v:.1f}" for three in table.values() for v in three if v is not None} <= set(tinted)
    assert {f"{v:.2f}" for v in published.PROBE_ACCURACY["C+S+B"] if v is not None} <= set(tinted)
    assert {"23.3", "1.50", "91.0", "71.4"} <= set(tinted)
    assert "on its zoos of SVHN, CIFAR-10 and EuroSAT" in _text(page)
    plain = re.sub(r'<t[dh][^>]*paper"[^>]*>[^<]*</t[dh]>', "", page)
    assert "CIFAR-10</t" not in plain  # nowhere outside the tint


def test_a_run_whose_name_begins_like_the_zoos_is_not_shown_as_the_zoo(tmp_path: Path) -> None:
    units = [_unit("digits", "zoo", 0, "zoo", 0.9, **ZOO_FACTS), _unit("digits", "zoo-ae", 0, "run", 0.3, losses="S+B", beta=0.1)]
    write_tables(tmp_path, units, {})
    text = _text(tables.side_by_side(read_results(tmp_path), "diversity", published.DIVERSITY, number, extra={"zoo": "zoo"}))
    assert "zoo 12.0 23.3" in text
    assert "zoo-ae (S+B) 0.30 " in text


def test_goals_are_met_or_missed_in_words(tmp_path: Path, undrawn: None) -> None:
    text = _text(_page(_folder(tmp_path, facts={"goals": True})))
    assert "Where we stand" in text
    # shares above 55 % do not count; S alone is below
    assert re.search(r"Agreement at least 95 % of images missed 51\.3 % S ", text)
    assert re.search(r"missed 0\.51 against 0\.42 S: mean token ", text)  # better, but within the spread of 0.1


def test_a_collapse_that_gains_accuracy_keeps_none(tmp_path: Path, undrawn: None) -> None:
    folder = _folder(tmp_path, facts={"goals": True})
    rows = (folder / "rows.csv").read_text().splitlines(keepends=True)
    changed = [("digits,S,0,accuracy_change,0.35,0.35,0.05\n" if r.startswith("digits,S,0,accuracy_change") else r) for r in rows]
    assert changed != rows
    others = [r for r in changed if "accuracy_change," not in r or ",S,0," in r]
    (folder / "rows.csv").write_text("".join(others))
    assert re.search(r"median change within 1 point missed \+35\.0 points S ", _text(_page_of(folder)))


def _with_margin(folder: Path, variants: str, margin: float) -> str:
    """The page's text once these variants' margins are that."""
    rows = (folder / "rows.csv").read_text()
    (folder / "rows.csv").write_text(
        re.sub(rf"(digits,(?:{variants}),\d,agreement_margin,).*", lambda m: f"{m[1]}{margin},{margin},", rows)
    )
    return _text(_page_of(folder))


def test_a_collapse_is_called_one_and_is_nobodys_best(tmp_path: Path, undrawn: None) -> None:
    text = _with_margin(_folder(tmp_path), "S.B", 0.004)
    words = escape(collapse(0.004))
    assert text.count(words) == 1  # in its row
    assert "S+B, beta 0.1, mse, 100 steps; 2 seeds; " + words in text
    assert "On digits, reconstructions by “S” agree with their originals on 51.3 % of images" in text
    text = _with_margin(tmp_path, "S|linear-metric-55", 0.004)
    fallen = "On digits, “S+B” has collapsed: its reconstructions agree with other models' originals (73.2 % of images) as much as"
    assert escape(fallen) in text
    assert text.count(words) == 3  # in their rows


def test_a_collapse_reaches_no_goal(tmp_path: Path, undrawn: None) -> None:
    folder = _folder(tmp_path, facts={"goals": True})
    rows = (folder / "rows.csv").read_text()
    (folder / "rows.csv").write_text(
        re.sub(r"(digits,S,0,(agreement|latent_share),).*", r"\g<1>0.5,0.5,", rows).replace(
            "S,0,agreement,0.5,0.5", "S,0,agreement,0.99,0.99"
        )
    )
    assert "at least 95 % of images met 99.0 % S " in _text(_page_of(folder))
    assert "at least 95 % of images –" in _with_margin(folder, "S", 0.0)


def test_the_goal_at_40_per_cent_is_against_the_metric_code(tmp_path: Path, undrawn: None) -> None:
    folder = _folder(tmp_path, facts={"goals": True})
    more = [("adaptive-40", 0.83), ("linear-metric-40", 0.72), ("adaptive-55", 0.99)]
    with (folder / "rows.csv").open("a") as file:
        for variant, value in more:
            share = int(variant[-2:]) / 100
            file.write(f"digits,{variant},0,agreement,{value},{value},0.1\ndigits,{variant},0,latent_share,{share},{share},\n")
    facts = json.loads((folder / "report.json").read_text())
    facts["variants"] += [{"zoo": "digits", "variant": v, "seed": 0, "kind": "code"} for v, _ in more]
    (folder / "report.json").write_text(json.dumps(facts))
    assert re.search(r"10 points above the metric code met 83\.0 against 72\.0 % adaptive-40 ", _text(_page_of(folder)))


def test_names_inside_figures_are_one_figures_own(tmp_path: Path) -> None:
    page = _page(_folder(tmp_path))
    names = re.findall(r'\bid="([^"]+)"', page)
    assert len(names) == len(set(names))
    for link in re.findall(r'xlink:href="#([^"]+)"|url\(#([^)]+)\)', page):
        assert (link[0] or link[1]) in set(names)


def test_rows_alone_make_a_page(tmp_path: Path, undrawn: None) -> None:
    (tmp_path / "rows.csv").write_text(
        "zoo,variant,seed,metric,median,mean,spread\ndigits,A,0,agreement,0.5,0.5,\ndigits,A,1,agreement,0.7,0.7,0.1\n"
    )
    page = _page(tmp_path)
    assert not Audit(page).open
    assert "60.0" in _text(page)
    (tmp_path / "rows.csv").write_text("zoo,variant,seed,metric,median,mean,spread\n")
    assert "Nothing was evaluated yet." in _page(tmp_path)


ABLATION = [
    {"zoo": "digits", "variant": f"beta-{b}", "seed": s, "metric": m, "median": b, "mean": b + s / 100, "spread": 0.1, "ablation": "beta",
     "axis": "beta", "value": b}
    for b in (0.0, 0.1, 1.0) for s in (0, 1, 2) for m in ("agreement", "accuracy_change", "l2_masked")
]  # fmt: skip
WORDS = [
    {**row, "ablation": "queries", "axis": "query_set", "value": f"q{row['value']}", "variant": f"<b>{row['value']}"} for row in ABLATION
]


def test_ablations_beside_the_rows_are_shown(tmp_path: Path) -> None:
    write_tables(tmp_path, [], {})
    assert analysis.ablations(read_results(tmp_path)) == ""
    (tmp_path / "ablations.csv").write_text(to_csv(ABLATION + WORDS, ("zoo", "variant", "seed")))
    page = _page(tmp_path)
    audit = Audit(page)
    assert not audit.open
    assert audit.tags.count("svg") == 2
    text = _text(page)
    assert "beta, digits" in text
    assert "11.0 ± 1.0" in text  # mean and deviation over three seeds
    assert "of the change in accuracy the median" in text
    assert "&lt;b&gt;0.1" in page
    assert "<b>0.1" not in page


def test_gradients_beside_the_rows_are_shown(tmp_path: Path) -> None:
    write_tables(tmp_path, [], {})
    rows: list[dict[str, Any]] = [
        {
            "zoo": "digits",
            "variant": "S+B",
            "seed": 0,
            "metric": m,
            "median": 0.5,
            "mean": 0.5,
            "spread": 0.1,
            "direction": d,
            "magnitude": g,
            "models": 4,
        }
        for d in ("random", "top")
        for g in (0.01, 0.1, 1.0)
        for m in ("loss", "quadratic", "ratio", "accuracy", "agreement")
    ]
    rows.append({"zoo": "digits", "variant": "S+B", "seed": 0, "metric": "effective_rank", "median": 12.3, "mean": 12.3, "spread": 1.0})
    (tmp_path / "gradients.csv").write_text(to_csv(rows, ("zoo", "variant", "seed")))
    (tmp_path / "gradients.json").write_text(json.dumps({"models": []}))
    page = _page(tmp_path)
    assert Audit(page).tags.count("svg") == 1
    assert "effective rank 12.3" in _text(page)
    assert "mathdefault" not in page


def test_a_headline_for_what_there_is(tmp_path: Path) -> None:
    write_tables(tmp_path, [_unit("z", "S", 0, "run", 0.5, losses="S")], {})
    assert (
        headline(read_results(tmp_path))
        == "On z, reconstructions by “S” agree with their originals on 50.0 % of images at 50 % of the numbers (53.0 % identified, 6 test networks, a small sample)."
    )


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    folder = _folder(tmp_path)
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(WslfastError, match=r"pip install 'wslfast\[plot\]'"):
        report(folder)
