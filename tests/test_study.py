"""The evaluation of several runs: what is measured, what is kept, and that nothing is computed twice."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wslfast import Population, TrainConfig, WslfastError, build_zoo, load_zoo, train
from wslfast.measure import behavior_statistics, embeddings, probe
from wslfast.measure.evaluation import BASELINES, linear_baselines, reconstruct
from wslfast.measure.results import HEADER, Unit, from_csv, read_results, read_unit, to_csv, unit_path, write_tables, write_unit
from wslfast.study import study as module
from wslfast.study.loaded_zoo import Bench, Protocol
from wslfast.study.protocol import discriminative, generative, zoo_unit
from wslfast.study.study import report, study
from wslfast.testing import oracle_outputs
from wslfast.training import load_run
from wslfast.zoo import read_manifest, save_zoo

pytest.importorskip("matplotlib")
TINY = Protocol(
    shares=(),
    models=8,
    train_models=40,
    images=20,
    samples=5,
    bandwidths=(0.05, 0.5),
    finetune_epochs=1,
    finetune_images=40,
    map_models=30,
    refine_steps=4,
    refine_images=16,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zoo on noisy stripes, and three short runs: S, and S+B with two seeds."""
    root = tmp_path_factory.mktemp("study")
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 120)
    stripes = np.stack([np.sin(np.outer(np.ones(28), np.arange(28)) * (c + 1) / 2) for c in range(3)])
    np.savez(root / "stripes.npz", images=(stripes[labels] + 0.5 * rng.normal(size=(120, 28, 28))).astype(np.float32), labels=labels)
    build_zoo(root / "stripes.npz", root / "zoo", models=14, epochs=3, split=(0.6, 0.2, 0.2))
    sizes: dict[str, Any] = {
        "queries": 8,
        "batch_size": 4,
        "d_model": 16,
        "heads": 2,
        "layers": 1,
        "steps": 2,
        "log_every": 1,
        "gamma": 0.0,
    }
    for name, beta, seed in (("S", 1.0, 0), ("S+B-seed0", 0.1, 0), ("S+B-seed1", 0.1, 1)):
        train(TrainConfig(zoo=str(root / "zoo"), out=str(root / name), beta=beta, seed=seed, **sizes))
    return root


@pytest.fixture(scope="module")
def results(root: Path) -> Path:
    study(root / "zoo", [root / "S", root / "S+B-seed0", root / "S+B-seed1"], root / "out", protocol=TINY)
    return root / "out"


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing the page takes longer than all that these tests look at."""
    monkeypatch.setattr(module, "render", lambda results: "a page")


def _said(root: Path, out: Path, runs: list[str], **options: Any) -> list[str]:
    said: list[str] = []
    study(root / "zoo", [root / r for r in runs], out, on_stage=said.append, **{"protocol": TINY, "zero_layer": False, **options})
    return said


def test_every_variant_and_metric_is_there(results: Path) -> None:
    found = read_results(results)
    assert list(found.rows[0]) == list(HEADER)
    zoo = "stripes.npz"
    assert {r["zoo"] for r in found.rows} == {zoo}
    assert found.variants(zoo, "run") == ["S", "S+B", "S+B-zero-layer", "S-zero-layer"]
    assert {v.rpartition("-")[0] for v in found.variants(zoo, "code")} == {"linear", "linear-views", "linear-metric", "adaptive"}
    assert set(found.variants(zoo, "model")) == {"nearest-zoo-model", "best-zoo-model", "typical-zoo-model"}
    features = {"raw-weights", "weight-statistics", "behavior-statistics", "behavior-statistics-drawn"}
    assert features < set(found.variants(zoo, "features"))
    wanted = {
        "agreement",
        "agreement_others",
        "identified",
        "accuracy_original",
        "accuracy_reconstructed",
        "accuracy_change",
        "l2_masked",
        "explained_variance",
        "softmax_l2",
        "output_l2",
        "behavior_mse",
        "probe_r2",
        "probe_r2_ggap",
        "probe_r2_epoch",
        "probe_r2_decoded",
        "probe_r2_decoded_drawn",
        "diversity",
        "diversity_matched",
        "diversity_behavior",
        "novelty",
        "novelty_reconstruction",
        "novelty_behavior",
        "generated_accuracy",
        "finetuned_accuracy",
        "latent_numbers",
    }
    have = {
        (r["variant"], r["seed"]): {x["metric"] for x in found.rows if (x["variant"], x["seed"]) == (r["variant"], r["seed"])}
        for r in found.rows
    }
    assert all(wanted <= have["S+B", seed] for seed in (0, 1))
    assert len(found.value(zoo, "S+B", "agreement")) == 2
    sizes = [found.value(zoo, v, "latent_numbers")[0] for v in ("S", "S-zero-layer", *found.variants(zoo, "code"))]
    assert max(sizes) <= 1.01 * min(sizes)  # baselines of equal latent size
    assert not found.value(zoo, "S+B-zero-layer", "finetuned_accuracy")
    assert {r["sampler"] for r in found.table("samplings", zoo, "S+B-zero-layer")} == {"joint"}
    assert {"joint", "token", "individual", "uniform", "neighbours"} == {r["sampler"] for r in found.table("samplings", zoo, "S")}
    assert found.about(zoo, "S+B-zero-layer")["layers"] == 0
    assert found.about(zoo, "S+B-zero-layer")["steps"] == found.about(zoo, "S+B")["steps"]


def test_rows_say_what_the_pieces_give(root: Path, results: Path) -> None:
    found, bench = read_results(results), Bench(root / "zoo", TINY)
    code = load_run(root / "S").autoencoder
    rebuilt = reconstruct(code, bench.test.weights)
    images, labels = bench.data.test_images, bench.data.test_labels
    assert len(images) == 20
    before, after = (oracle_outputs(w, images, bench.architecture).argmax(-1) for w in (bench.test.weights, rebuilt))
    value = lambda metric, variant="S": found.value("stripes.npz", variant, metric)[0]  # noqa: E731
    assert value("agreement") == pytest.approx(float((before == after).double().mean()), abs=1e-5)
    assert value("accuracy_reconstructed") == pytest.approx(float((after == labels).double().mean()), abs=1e-5)
    assert value("l2_masked") == pytest.approx(float((rebuilt - bench.test.weights).double().norm(dim=1).mean()), rel=1e-5)
    models = found.table("models", "stripes.npz", "S")
    assert [r["model"] for r in models] == list(bench.test.properties["model"])
    assert [r["agreement"] for r in models] == pytest.approx((before == after).double().mean(1).tolist(), abs=1e-5)
    r2 = probe(
        {s: embeddings(code, p.weights) for s, p in bench.splits.items()}, {s: p.column("test_acc") for s, p in bench.splits.items()}
    )
    assert value("probe_r2") == pytest.approx(r2["test"], rel=1e-4)
    # what decoded networks answer on training images: through torch.func here
    shown = bench.data.train_images[:: -(-len(bench.data.train_images) // TINY.probe_images)]
    answers = {s: oracle_outputs(reconstruct(code, p.weights), shown, bench.architecture) for s, p in bench.splits.items()}
    consensus = answers["train"].double().softmax(-1).mean(0)
    features = {s: behavior_statistics(y, consensus) for s, y in answers.items()}
    r2 = probe(features, {s: p.column("test_acc") for s, p in bench.splits.items()})
    assert value("probe_r2_decoded") == pytest.approx(r2["test"], rel=1e-2, abs=1e-3)
    # the nearest zoo model stands in the place of each, and its distance is the smallest there is
    distance = torch.cdist(bench.test.weights.double(), bench.train.weights.double()).amin(1).mean()
    assert value("l2_masked", "nearest-zoo-model") == pytest.approx(float(distance), rel=1e-5)
    # one model for every other: no margin but by chance, identified as one of all models
    assert abs(value("agreement_margin", "best-zoo-model")) < 0.35
    best = int(bench.train.column("val_acc").argmax())
    everybody = oracle_outputs(bench.train.weights[best : best + 1], images, bench.architecture).argmax(-1)
    assert value("agreement", "best-zoo-model") == pytest.approx(float((before == everybody).double().mean()), abs=1e-5)


def test_the_typical_model_agrees_most_with_the_others(root: Path, results: Path) -> None:
    bench = Bench(root / "zoo", TINY)
    val = oracle_outputs(bench.train.weights, bench.data.val_images, bench.architecture).argmax(-1)
    agreement = [sum(float((a == b).double().mean()) for b in val) for a in val]
    typical = max(range(len(val)), key=lambda j: agreement[j])
    test = oracle_outputs(bench.train.weights[typical : typical + 1], bench.data.test_images, bench.architecture).argmax(-1)
    own = oracle_outputs(bench.test.weights, bench.data.test_images, bench.architecture).argmax(-1)
    found = read_results(results).value("stripes.npz", "typical-zoo-model", "agreement")[0]
    assert found == pytest.approx(float((own == test).double().mean()), abs=1e-5)


def test_nothing_is_computed_twice_until_its_checkpoint_changes(root: Path, tmp_path: Path, undrawn: None) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(root / "S", runs / "S")
    shutil.copytree(root / "S+B-seed0", runs / "S+B-seed0")
    first = _said(root, tmp_path / "out", [str(runs / "S")])
    assert not any("there already" in s for s in first)
    rows = (tmp_path / "out" / "rows.csv").read_text()
    again = _said(root, tmp_path / "out", [str(runs / "S")])
    assert all("there already" in s for s in again)
    assert len(again) == len(first)
    assert (tmp_path / "out" / "rows.csv").read_text() == rows
    # another run comes beside it
    more = _said(root, tmp_path / "out", [str(runs / "S+B-seed0")])
    assert [s for s in more if "there already" not in s] == ["stripes.npz: S+B, seed 0"]
    assert {"S", "S+B"} <= set(read_results(tmp_path / "out").variants("stripes.npz", "run"))
    # a changed checkpoint is measured again, and that alone
    shutil.copy(root / "S+B-seed0" / "checkpoint" / "state.pt", runs / "S" / "checkpoint" / "state.pt")
    changed = _said(root, tmp_path / "out", [str(runs / "S")])
    assert [s for s in changed if "there already" not in s] == ["stripes.npz: S, seed 0"]
    # so is everything under another protocol
    assert not any("there already" in s for s in _said(root, tmp_path / "out", [str(runs / "S")], protocol=replace(TINY, images=10)))


def test_a_killed_evaluation_goes_on(root: Path, tmp_path: Path, undrawn: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(module, "linear_baselines", killed)
        with pytest.raises(Killed):
            _said(root, tmp_path / "out", ["S"])
    assert not (tmp_path / "out" / "rows.csv").exists()
    said = _said(root, tmp_path / "out", ["S"])
    assert "stripes.npz: S, seed 0: there already" in said
    half = next((tmp_path / "out" / "units").glob("*S-0*.json"))
    half.write_text(half.read_text()[:100])  # a unit that is not whole is none
    assert "stripes.npz: S, seed 0" in _said(root, tmp_path / "out", ["S"])


def test_zoos_stand_side_by_side_and_are_not_mixed_up(root: Path, results: Path, tmp_path: Path, undrawn: None) -> None:
    shutil.copytree(results, tmp_path / "out")
    build_zoo(root / "stripes.npz", tmp_path / "zoo2", models=8, epochs=2, seed=1, split=(0.5, 0.25, 0.25))
    with pytest.raises(WslfastError, match=r"results of another zoo called 'stripes\.npz'"):
        study(tmp_path / "zoo2", [root / "S"], tmp_path / "out", protocol=TINY)
    shutil.copy(root / "stripes.npz", tmp_path / "stripes.npz")
    study(tmp_path / "zoo2", [root / "S"], tmp_path / "out", protocol=TINY, name="second", zero_layer=False)
    assert {r["zoo"] for r in read_results(tmp_path / "out").rows} == {"stripes.npz", "second"}


@pytest.mark.parametrize(
    ("runs", "words"), [([], "at least one"), (["S", "S"], "distinct"), (["nowhere"], "no checkpoint")], ids=["none", "twice", "missing"]
)
def test_wrong_runs(root: Path, tmp_path: Path, runs: list[str], words: str) -> None:
    with pytest.raises(WslfastError, match=words):
        study(root / "zoo", [root / r for r in runs], tmp_path / "out", protocol=TINY)
    assert not (tmp_path / "out").exists()


def test_runs_that_would_take_each_others_place_are_refused(root: Path, tmp_path: Path) -> None:
    for name in ("other/S+B-seed7", "zoo", "linear-40"):  # the first was trained with seed 0, as S+B-seed0 was
        shutil.copytree(root / "S+B-seed0", tmp_path / name)
    for runs, words in (
        ([root / "S+B-seed0", tmp_path / "other" / "S+B-seed7"], r"S\+B, seed 0 more than once"),
        ([tmp_path / "zoo"], "zoo: the page calls baselines so"),
        ([tmp_path / "linear-40"], "linear-40: the page calls"),
    ):
        with pytest.raises(WslfastError, match=words):
            study(root / "zoo", runs, tmp_path / "out", protocol=TINY)
    assert not (tmp_path / "out").exists()


def test_a_code_is_sampled_whichever_call_came_first(root: Path, tmp_path: Path, undrawn: None) -> None:
    share = load_run(root / "S").autoencoder.latent_numbers / Bench(root / "zoo", TINY).architecture.num_weights
    few = replace(TINY, shares=(share,), refine_steps=0)
    first = _work(root, tmp_path / "out", few)
    first.codes(round(share * first.bench.architecture.num_weights), new=False)
    name = f"linear-{round(100 * share)}"
    unit = read_unit(unit_path(tmp_path / "out", "stripes.npz", name, 0))
    assert unit is not None
    assert "generated_accuracy" not in unit.metrics
    _said(root, tmp_path / "out", ["S"], protocol=few)
    assert read_results(tmp_path / "out").value("stripes.npz", name, "generated_accuracy")
    said = _said(root, tmp_path / "out", ["S"], protocol=few)
    assert all("there already" in line for line in said)


def test_what_was_measured_with_other_sizes_is_left_off_the_page(root: Path, tmp_path: Path, undrawn: None) -> None:
    _said(root, tmp_path / "out", ["S"])
    said = _said(root, tmp_path / "out", ["S+B-seed0"], protocol=replace(TINY, models=4))
    assert "stripes.npz: left out, as they were measured with other sizes: S" in said
    assert read_results(tmp_path / "out").variants("stripes.npz", "run") == ["S+B"]


def test_a_model_that_overflows_is_no_feature_and_no_anchor(root: Path, tmp_path: Path, undrawn: None) -> None:
    zoo = load_zoo(root / "zoo")
    weights = zoo.weights.clone()
    splits = zoo.properties["split"]
    for split in ("train", "test"):
        row = splits.index(split)
        weights[row] = 9000 * weights[row].sign()
    record = {**read_manifest(root / "zoo").provenance}
    save_zoo(Population(zoo.architecture, weights, zoo.properties), tmp_path / "zoo", splits=splits, provenance=record)
    study(tmp_path / "zoo", [root / "S"], tmp_path / "out", protocol=replace(TINY, models=100), zero_layer=False)
    found = read_results(tmp_path / "out")
    (name,) = (v for v in found.variants("stripes.npz", "code") if v.startswith("adaptive"))
    assert found.value("stripes.npz", name, "probe_r2_whole")
    assert found.value("stripes.npz", name, "non_finite") == [1]


def _work(root: Path, out: Path, protocol: Protocol) -> Any:
    return module._Work(Bench(root / "zoo", protocol), out, lambda _: None)


def test_probe_spread_is_that_of_resampled_models(root: Path) -> None:
    bench = Bench(root / "zoo", replace(TINY, models=100))
    features = {s: p.weights[:, :4] for s, p in bench.splits.items()}
    value = discriminative(bench, features)["probe_r2"]
    assert value[0] == value[1]
    assert value[2] is not None
    assert value[2] > 0
    # a probe that is always right has no spread
    certain = {s: p.column("test_acc").unsqueeze(1) for s, p in bench.splits.items()}
    perfect = discriminative(bench, certain)["probe_r2"]
    assert perfect[0] == pytest.approx(1, abs=1e-3)
    assert perfect[2] == pytest.approx(0, abs=1e-3)


def test_the_bandwidth_is_the_widest_that_keeps_validation_accuracy(root: Path) -> None:
    bench = Bench(root / "zoo", TINY)
    codes = linear_baselines(bench.train, bench.data, 400)
    assert tuple(codes) == BASELINES
    code = codes["linear-metric"]
    metrics, tables = generative(bench, code, full=False)
    joint = [r for r in tables["samplings"] if r["sampler"] == "joint"]
    assert [r["bandwidth"] for r in joint] == [0.05, 0.5]
    assert sum(r["main"] for r in joint) == 1
    chosen = next(r for r in joint if r["main"])
    assert metrics["generated_bandwidth"][0] == chosen["bandwidth"]
    assert metrics["generated_accuracy"][1] == chosen["test_acc"]
    lenient, _ = generative(Bench(root / "zoo", replace(TINY, tolerance=1.0)), code, full=False)
    assert lenient["generated_bandwidth"][0] == 0.5
    strict, _ = generative(Bench(root / "zoo", replace(TINY, tolerance=-1.0)), code, full=False)
    assert strict["generated_bandwidth"][0] == 0.05


def test_a_zoo_without_validation_accuracy_gets_it_from_the_images(root: Path, tmp_path: Path) -> None:
    zoo = load_zoo(root / "zoo")
    bare = Population(zoo.architecture, zoo.weights, {n: c for n, c in zoo.properties.items() if n in ("model", "epoch", "test_acc")})
    save_zoo(bare, tmp_path / "zoo", splits=zoo.properties["split"], provenance=read_manifest(root / "zoo").provenance)
    bench = Bench(tmp_path / "zoo", TINY)
    assert torch.allclose(
        bench.train.column("val_acc"), load_zoo(root / "zoo", "train").column("val_acc"), atol=0.09
    )  # a tie may fall either way
    assert "probe_r2_ggap" not in discriminative(bench, {s: p.weights[:, :4] for s, p in bench.splits.items()})


def test_the_zoo_unit_is_the_originals(root: Path) -> None:
    bench = Bench(root / "zoo", TINY)
    unit = zoo_unit(bench)
    zoo = load_zoo(root / "zoo", "train")
    value = zoo.column("val_acc")
    best = value.argsort(descending=True, stable=True)[: round(0.3 * len(zoo))]
    assert [r["model"] for r in unit.tables["samples"]] == best.tolist()
    pairs = torch.pdist(zoo.weights[best].double())
    assert unit.metrics["diversity"][1] == pytest.approx(float(pairs.mean()), rel=1e-6)


# -- tables --------------------------------------------------------------------------------------------------------------


def test_tables_come_back_as_they_were(tmp_path: Path) -> None:
    rows = [
        {"zoo": "1", "variant": "2.5", "seed": 3, "metric": "x", "a": 0.1, "b": None},
        {"zoo": "1", "variant": 'a,"b"', "seed": 4, "c": "n/a"},
    ]
    (tmp_path / "t.csv").write_text(to_csv(rows, ("zoo", "variant", "seed")))
    back = from_csv(tmp_path / "t.csv")
    assert back[0] == {"zoo": "1", "variant": "2.5", "seed": 3, "metric": "x", "a": 0.1, "b": None, "c": None}
    assert back[1] == {"zoo": "1", "variant": 'a,"b"', "seed": 4, "metric": None, "a": None, "b": None, "c": "n/a"}
    assert to_csv([{"zoo": "z", "v": float("nan")}], ("zoo",)) == "zoo,v\nz,\n"


def test_units_are_whole_or_not_there(tmp_path: Path) -> None:
    unit = Unit("a/b", "x y", 1, "run", "f", {"k": [1, None]}, {"m": (1.0, float("nan"), None)}, {"models": [{"v": 1}]})
    write_unit(tmp_path, unit)
    path = unit_path(tmp_path, *unit.key)
    back = read_unit(path)
    assert back is not None
    assert back.metrics == {"m": [1.0, None, None]}
    assert (back.key, back.facts) == (unit.key, unit.facts)
    assert unit_path(tmp_path, "a_b", "x y", 1) != path  # names that look alike are kept apart
    for text in ("", "{", "[]", '{"schema": 99}', json.dumps({"schema": 1, "zoo": "z"}), json.dumps({"schema": 1, "what": 2})):
        path.write_text(text)
        assert read_unit(path) is None


def test_a_folder_without_results_or_with_damaged_ones(tmp_path: Path) -> None:
    with pytest.raises(WslfastError, match="no results here"):
        report(tmp_path)
    write_tables(tmp_path, [Unit("z", "v", 0, "run", "f", {}, {"agreement": (0.5, 0.5, 0.1)})], {})
    assert report(tmp_path).is_file()
    (tmp_path / "rows.csv").write_text("zoo,variant\na,b\n")
    with pytest.raises(WslfastError, match=r"columns .* are missing"):
        report(tmp_path)
    write_tables(tmp_path, [Unit("z", "v", 0, "run", "f", {}, {"agreement": (0.5, 0.5, 0.1)})], {})
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(WslfastError, match="not JSON"):
        report(tmp_path)


@pytest.mark.slow
def test_closed_form_codes_also_stand_at_sizes_of_their_own(root: Path, tmp_path: Path) -> None:
    found = read_results(_page_at(root, tmp_path, (0.3, 0.6)))
    weights = found.value("stripes.npz", "S", "latent_numbers")[0] / found.value("stripes.npz", "S", "latent_share")[0]
    for share in (0.3, 0.6):
        codes = [v for v in found.variants("stripes.npz", "code") if v.endswith(f"-{round(100 * share)}")]
        assert {v.rpartition("-")[0] for v in codes} == {"linear", "linear-views", "linear-metric", "adaptive"}
        refined = [v for v in found.variants("stripes.npz", "refined") if v.endswith(f"-{round(100 * share)}-refined")]
        assert {v.split(f"-{round(100 * share)}")[0] for v in refined} == {"linear-metric", "adaptive"}
        assert all(found.value("stripes.npz", v, "latent_numbers")[0] == pytest.approx(share * weights, rel=0.01) for v in codes + refined)
        assert all(found.value("stripes.npz", v, "agreement") for v in refined)


def _page_at(root: Path, out: Path, shares: tuple[float, ...]) -> Path:
    study(root / "zoo", [root / "S"], out, protocol=replace(TINY, shares=shares), zero_layer=False)
    return out
