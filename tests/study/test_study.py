"""The evaluation of several runs: what is measured, what is kept, and that nothing is computed twice."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tolerances import FP32, FP32_DEEP, FP32_ROUNDING

from wslfast import Population, TrainConfig, WslfastError, build_zoo, load_zoo, page, train
from wslfast.measure import behavior_statistics, embeddings, probe
from wslfast.measure.evaluation import BASELINES, linear_baselines, reconstruct
from wslfast.measure.results import HEADER, read_results, read_unit, unit_path
from wslfast.study import units
from wslfast.study.loaded_zoo import LoadedZoo, Protocol
from wslfast.study.protocol import discriminative, generative, measure_originals
from wslfast.study.study import _mixed, _variant, make_units, study
from wslfast.study.trained import trained
from wslfast.study.units import TABLE, Inputs, reserved
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
    monkeypatch.setattr(page, "render", lambda results: "a page")


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
    found, zoo = read_results(results), LoadedZoo(root / "zoo", TINY)
    code = load_run(root / "S").autoencoder
    rebuilt = reconstruct(code, zoo.test.weights)
    images, labels = zoo.data.test_images, zoo.data.test_labels
    assert len(images) == 20
    before, after = (oracle_outputs(w, images, zoo.architecture).argmax(-1) for w in (zoo.test.weights, rebuilt))
    value = lambda metric, variant="S": found.value("stripes.npz", variant, metric)[0]  # noqa: E731
    assert value("agreement") == pytest.approx(float((before == after).double().mean()), abs=FP32)
    assert value("accuracy_reconstructed") == pytest.approx(float((after == labels).double().mean()), abs=FP32)
    assert value("l2_masked") == pytest.approx(float((rebuilt - zoo.test.weights).double().norm(dim=1).mean()), rel=FP32)
    models = found.table("models", "stripes.npz", "S")
    assert [r["model"] for r in models] == list(zoo.test.properties["model"])
    assert [r["agreement"] for r in models] == pytest.approx((before == after).double().mean(1).tolist(), abs=FP32)
    r2 = probe({s: embeddings(code, p.weights) for s, p in zoo.splits.items()}, {s: p.column("test_acc") for s, p in zoo.splits.items()})
    assert value("probe_r2") == pytest.approx(r2["test"], rel=FP32_DEEP)
    # what decoded networks answer on training images: through torch.func here
    shown = zoo.data.train_images[:: -(-len(zoo.data.train_images) // TINY.probe_images)]
    answers = {s: oracle_outputs(reconstruct(code, p.weights), shown, zoo.architecture) for s, p in zoo.splits.items()}
    consensus = answers["train"].double().softmax(-1).mean(0)
    features = {s: behavior_statistics(y, consensus) for s, y in answers.items()}
    r2 = probe(features, {s: p.column("test_acc") for s, p in zoo.splits.items()})
    assert value("probe_r2_decoded") == pytest.approx(r2["test"], rel=1e-2, abs=1e-3)
    # the nearest zoo model stands in the place of each, and its distance is the smallest there is
    distance = torch.cdist(zoo.test.weights.double(), zoo.train.weights.double()).amin(1).mean()
    assert value("l2_masked", "nearest-zoo-model") == pytest.approx(float(distance), rel=FP32)
    # one model for every other: no margin but by chance, identified as one of all models
    assert abs(value("agreement_margin", "best-zoo-model")) < 0.35
    best = int(zoo.train.column("val_acc").argmax())
    everybody = oracle_outputs(zoo.train.weights[best : best + 1], images, zoo.architecture).argmax(-1)
    assert value("agreement", "best-zoo-model") == pytest.approx(float((before == everybody).double().mean()), abs=FP32)


def test_a_broken_model_is_not_typical(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answers are no classes, and in particular not the first class, which most others give."""
    classes = torch.tensor([[-1] * 5, [0, 0, 0, 0, 1], [0, 0, 0, 1, 0], [1, 0, 0, 0, 0], [0, 0, 1, 1, 1]])
    monkeypatch.setattr(units, "classes_of", lambda *_: classes)
    zoo = SimpleNamespace(
        train=SimpleNamespace(weights=None), data=SimpleNamespace(val_images=None), architecture=SimpleNamespace(num_classes=2), test=[None]
    )
    assert units._typical_row(zoo).tolist() != [0]  # type: ignore[arg-type]


def test_the_typical_model_agrees_most_with_the_others(root: Path, results: Path) -> None:
    zoo = LoadedZoo(root / "zoo", TINY)
    val = oracle_outputs(zoo.train.weights, zoo.data.val_images, zoo.architecture).argmax(-1)
    agreement = [sum(float((a == b).double().mean()) for b in val) for a in val]
    typical = max(range(len(val)), key=lambda j: agreement[j])
    test = oracle_outputs(zoo.train.weights[typical : typical + 1], zoo.data.test_images, zoo.architecture).argmax(-1)
    own = oracle_outputs(zoo.test.weights, zoo.data.test_images, zoo.architecture).argmax(-1)
    found = read_results(results).value("stripes.npz", "typical-zoo-model", "agreement")[0]
    assert found == pytest.approx(float((own == test).double().mean()), abs=FP32)


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
        patch.setattr(units, "linear_baselines", killed)
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


@pytest.mark.parametrize(
    ("folder", "variant"),
    [
        ("S+B-seed1", "S+B"), ("S+B-s2", "S+B"), ("S+B_s3", "S+B"), ("S+Bseed4", "S+B"), ("S+B/seed5", "S+B"), ("S+B/s6", "S+B"),
        ("layers4", "layers4"), ("steps500", "steps500"), ("views-2", "views-2"), ("S", "S"),
    ],
)  # fmt: skip
def test_a_seed_is_told_from_a_setting_by_the_name_of_the_folder(folder: str, variant: str) -> None:
    assert _variant(Path("runs") / folder) == variant


def test_it_is_said_where_runs_of_one_variant_have_other_settings(root: Path) -> None:
    run = load_run(root / "S+B-seed0")
    other = replace(run, config=replace(run.config, seed=1, lr=2 * run.config.lr))
    assert _mixed([("S+B", run), ("S+B", other), ("S", run)]) == {"S+B": ["lr"]}
    assert _mixed([("S+B", run), ("S+B", replace(run, config=replace(run.config, seed=1)))]) == {}


def test_a_code_is_sampled_whichever_call_came_first(root: Path, tmp_path: Path, undrawn: None) -> None:
    zoo = LoadedZoo(root / "zoo", TINY)
    share = load_run(root / "S").autoencoder.latent_numbers / zoo.architecture.num_weights
    few = replace(TINY, shares=(share,), refine_steps=0)
    make_units(Inputs(LoadedZoo(root / "zoo", few), [], ()), tmp_path / "out", lambda _: None)
    name = f"linear-{round(100 * share)}"
    unit = read_unit(unit_path(tmp_path / "out", "stripes.npz", name, 0))
    assert unit is not None
    assert "generated_accuracy" not in unit.metrics
    _said(root, tmp_path / "out", ["S"], protocol=few)
    assert read_results(tmp_path / "out").value("stripes.npz", name, "generated_accuracy")
    # once it was sampled, a call that needs no samples finds it
    said: list[str] = []
    make_units(Inputs(LoadedZoo(root / "zoo", few), [], ()), tmp_path / "out", said.append)
    assert all("there already" in line for line in said)


def test_names_are_reserved_by_the_table_itself(results: Path) -> None:
    found = read_results(results)
    for variant in found.variants("stripes.npz"):
        assert reserved(variant) == (variant not in ("S", "S+B")), variant
        rows = [family for family in TABLE if family.reserves(variant) and family.name != "{run}"]
        assert {family.kind for family in rows} <= {found.about("stripes.npz", variant)["kind"]}
    assert reserved("linear-metric-40-refined")
    assert reserved("untrained-96x2-64")
    assert not any(map(reserved, ("linear-start", "linear-4x", "my-zoo", "zoo2", "S+B", "refined", "zero-layer")))


def test_a_run_of_the_study_itself_is_trained_once_and_to_its_end(root: Path, tmp_path: Path) -> None:
    config = replace(load_run(root / "S").config, out=str(tmp_path / "run"), steps=4, checkpoint_every=1)
    train(config, stop=lambda step: step == 2)
    said: list[str] = []
    run = trained(config, said.append, "training")
    assert (run.step, said) == (4, ["training"])
    whole = trained(replace(config, out=str(tmp_path / "whole")), said.append, "training")
    same = zip(run.autoencoder.parameters(), whole.autoencoder.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)  # it went on from its checkpoint
    assert trained(config, said.append, "training").step == 4
    assert len(said) == 2
    with pytest.raises(WslfastError, match=r"holds a run of other settings \(lr 0.0005, not 0.0001\)"):
        trained(replace(config, lr=1e-4), said.append, "training")


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


def test_probe_spread_is_that_of_resampled_models(root: Path) -> None:
    zoo = LoadedZoo(root / "zoo", replace(TINY, models=100))
    features = {s: p.weights[:, :4] for s, p in zoo.splits.items()}
    value = discriminative(zoo, features)["probe_r2"]
    assert value[0] == value[1]
    assert value[2] is not None
    assert value[2] > 0
    # a probe that is always right has no spread
    certain = {s: p.column("test_acc").unsqueeze(1) for s, p in zoo.splits.items()}
    perfect = discriminative(zoo, certain)["probe_r2"]
    assert perfect[0] == pytest.approx(1, abs=1e-3)
    assert perfect[2] == pytest.approx(0, abs=1e-3)


def test_the_bandwidth_is_the_widest_that_keeps_validation_accuracy(root: Path) -> None:
    zoo = LoadedZoo(root / "zoo", TINY)
    codes = linear_baselines(zoo.train, zoo.data, 400)
    assert tuple(codes) == BASELINES
    code = codes["linear-metric"]
    metrics, tables = generative(zoo, code, full=False)
    joint = [r for r in tables["samplings"] if r["sampler"] == "joint"]
    assert [r["bandwidth"] for r in joint] == [0.05, 0.5]
    assert sum(r["main"] for r in joint) == 1
    chosen = next(r for r in joint if r["main"])
    assert metrics["generated_bandwidth"][0] == chosen["bandwidth"]
    assert metrics["generated_accuracy"][1] == chosen["test_acc"]
    lenient, _ = generative(LoadedZoo(root / "zoo", replace(TINY, tolerance=1.0)), code, full=False)
    assert lenient["generated_bandwidth"][0] == 0.5
    strict, _ = generative(LoadedZoo(root / "zoo", replace(TINY, tolerance=-1.0)), code, full=False)
    assert strict["generated_bandwidth"][0] == 0.05


def test_a_zoo_without_validation_accuracy_gets_it_from_the_images(root: Path, tmp_path: Path) -> None:
    zoo = load_zoo(root / "zoo")
    bare = Population(zoo.architecture, zoo.weights, {n: c for n, c in zoo.properties.items() if n in ("model", "epoch", "test_acc")})
    save_zoo(bare, tmp_path / "zoo", splits=zoo.properties["split"], provenance=read_manifest(root / "zoo").provenance)
    imported, own = LoadedZoo(tmp_path / "zoo", TINY), LoadedZoo(root / "zoo", TINY)
    value = own.train.column("val_acc")
    assert torch.allclose(value[imported.anchors], value[own.anchors], atol=0.09)  # a tie may fall either way
    assert "probe_r2_ggap" not in discriminative(imported, {s: p.weights[:, :4] for s, p in imported.splits.items()})


def test_the_zoo_unit_is_the_originals(root: Path) -> None:
    unit = measure_originals(LoadedZoo(root / "zoo", TINY))
    zoo = load_zoo(root / "zoo", "train")
    value = zoo.column("val_acc")
    best = value.argsort(descending=True, stable=True)[: round(0.3 * len(zoo))]
    for name in ("model", "epoch"):  # the checkpoints by what the zoo calls them, as in every other table
        assert [r[name] for r in unit.tables["samples"]] == [zoo.properties[name][row] for row in best.tolist()]
    pairs = torch.pdist(zoo.weights[best].double())
    assert unit.metrics["diversity"][1] == pytest.approx(float(pairs.mean()), rel=FP32_ROUNDING)


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
