"""The package ``sane`` 2.x beside what takes its place: values and times of each replaced name, and runs of its own trainer.

Run by ``python -m benchmarks.drop_in`` where ``WSLFAST_SANE_SRC`` names a clone of HSG-AIML/WeightCLIP, in an environment with what that
package needs.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import operator
import tempfile
from collections.abc import Callable, Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import wslfast
from wslfast import sane
from wslfast.sane import rebasin, v2
from wslfast.sane.v2.layout import layout_of, signature_of
from wslfast.sane.v2.surface import TABLE

from . import published_code
from .drop_in import HEAD, Row, compare

CNN3 = {
    "model::type": "CNN3", "model::channels_in": 3, "model::o_dim": 10, "model::nlin": "relu", "model::dropout": 0.0,
    "model::init_type": "kaiming_uniform",
}  # fmt: skip
SLIM = {**CNN3, "model::type": "ResNet18Slim", "model::width_mult": 0.125}
SIZES = {"CNN3": 201, "ResNet18Slim": 288}
SPECS = {"CNN3": "zoo_cnn_large_permutation_spec", "ResNet18Slim": "zoo_resnet18slim_permutation_spec"}
Side = Callable[[], Any]


def pair(name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The published function or method of a name, and ours."""
    path, attribute = name.rsplit(".", 1)
    try:
        holder = published_code.module(published_code.SECOND, path)
    except ModuleNotFoundError:
        module, _, kind = path.rpartition(".")
        holder = getattr(published_code.module(published_code.SECOND, module), kind)
    theirs, ours = getattr(holder, attribute), TABLE[name][1]
    if attribute == "apply_permutation":
        return theirs, ours
    return theirs, lambda *arguments: ours(*arguments, original=theirs)


def _squares(value: Any) -> float:
    if isinstance(value, Tensor):
        return float(value.double().square().sum())
    if isinstance(value, dict):
        return sum(map(_squares, value.values()))
    return sum(map(_squares, value))


def _networks(config: dict[str, Any], k: int) -> list[Any]:
    build = published_code.module(published_code.SECOND, "data.datasets.zoo_dataset_models").get_model
    made = []
    for seed in range(k):
        torch.manual_seed(seed)
        made.append(build(config).eval())
    return made


# -- tokens ------------------------------------------------------------------------------------------------------------


def token_rows(k: int, config: dict[str, Any]) -> Iterator[tuple[str, Side, Side]]:
    """Both tokenizers on k checkpoints of one network."""
    tokenizers = published_code.module(published_code.SECOND, "data.tokenizers")
    kind = str(config["model::type"])
    states = [m.state_dict() for m in _networks(config, min(k, 40))]
    states = [copy.deepcopy(states[j % len(states)]) for j in range(k)]
    title = f"{k:,} {kind}"
    cut, join = pair("data.tokenizers.base.SANETokenizer.tokenize"), pair("data.tokenizers.base.SANETokenizer.detokenize")
    for name in ("Dense", "Sparse"):
        for mode in ("full_model", "layer_wise"):
            made = getattr(tokenizers, f"{name}Tokenizer")(tokensize=SIZES[kind], mode=mode, reference_statedict=states[0])
            whole = mode == "full_model"
            yield f"`{name}Tokenizer` {mode}, tokenize, {title}", *(lambda f=f, t=made, w=whole: _cut(f, t, states, w) for f in cut)  # type: ignore[misc]
            pieces = [cut[0](made, state) for state in states]
            yield (
                f"`{name}Tokenizer` {mode}, detokenize, {title}",
                *(lambda f=f, t=made, w=whole, x=pieces: _join(f, t, x, w) for f in join),
            )  # type: ignore[misc]
            if not whole:
                continue
            yield (
                f"{name} tokens of {title}, all at once (`tokenize_all`)",
                lambda f=cut[0], t=made: _cut(f, t, states, True),
                lambda t=made: float(v2.tokenize_all(t, states).tokens[-1].square().sum()),
            )
            layout = layout_of(name.lower(), SIZES[kind], signature_of(states[0]))
            rows = layout.rows_of(states)
            yield (
                f"{name} tokens of {title}, from rows of weights",
                lambda f=cut[0], t=made: _cut(f, t, states, True),
                lambda layout=layout, rows=rows: float(layout.tokenize(rows).tokens[-1].square().sum()),
            )


def _cut(f: Callable[..., Any], tokenizer: Any, states: list[Any], whole: bool) -> float:
    last = None
    for state in states:
        last = f(tokenizer, state)
    assert last is not None
    return float(last[0].square().sum()) if whole else float(sum(part[0].square().sum() for part in last))


def _join(f: Callable[..., Any], tokenizer: Any, pieces: list[Any], whole: bool) -> float:
    last: dict[str, Tensor] = {}
    for piece in pieces:
        last = f(tokenizer, *piece) if whole else f(tokenizer, piece)
    return _squares(last)


# -- permutations ------------------------------------------------------------------------------------------------------


def permutation_rows(config: dict[str, Any], matched: int) -> Iterator[tuple[str, Side, Side]]:
    """Weight matching, aligning and permuted views."""
    kind = str(config["model::type"])
    basin = published_code.module(published_code.SECOND, "utils.git_re_basin")
    augmentation = published_code.module(published_code.SECOND, "data.checkpoint.checkpoint_augmentation")
    checkpoint = published_code.module(published_code.SECOND, "data.checkpoint").Checkpoint
    spec = getattr(basin, SPECS[kind])()
    models = _networks(config, matched + 1)
    reference, states = models[0].state_dict(), [m.state_dict() for m in models[1:]]
    title = f"`weight_matching`, {matched} {kind} to one reference"
    yield title, *(lambda f=f: _matched(f, spec, reference, states) for f in pair("utils.git_re_basin.weight_matching"))  # type: ignore[misc]
    perm = basin.weight_matching(spec, reference, states[0])
    yield (
        f"`apply_permutation`, {kind}",
        *(lambda f=f: _squares(f(spec, perm, states[0])) for f in pair("utils.git_re_basin.apply_permutation")),
    )  # type: ignore[misc]
    one = checkpoint(models[1], {"eval_results": {"test_acc": 0.5}})
    views = augmentation.PermutationAugmentation(spec, 10)
    aligner = augmentation.CheckpointAligner(spec, checkpoint(models[0]))
    home = "data.checkpoint.checkpoint_augmentation"
    for name, made in (("PermutationAugmentation", views), ("CheckpointAligner", aligner)):
        sides = pair(f"{home}.{name}.forward")
        yield f"`{name}`{' of 10 views' if made is views else ''}, {kind}", *(lambda f=f, m=made: _weighted(f(m, one)) for f in sides)  # type: ignore[misc]


def _matched(f: Callable[..., Any], spec: Any, reference: Any, states: list[Any]) -> float:
    return sum(rebasin.objective(spec, reference, state, f(spec, reference, state)) for state in states)


def _weighted(checkpoints: list[Any]) -> float:
    """A number that depends on the order of weights."""
    row = torch.cat([v.double().flatten() for v in checkpoints[-1].model.state_dict().values()])
    return float((row * torch.arange(len(row), dtype=torch.float64).sin()).sum())


# -- losses ------------------------------------------------------------------------------------------------------------


def loss_rows() -> Iterator[tuple[str, Side, Side]]:
    """The masked loss with every normalisation, forward and backward, its R squared, and the contrast."""
    losses = published_code.module(published_code.SECOND, "loss")
    torch.manual_seed(0)
    mask = torch.rand(64, 118, 201) < 0.45
    x, z = torch.randn(64, 118, 201) * mask, torch.randn(64, 118, 128)
    for normalize in (None, "batch", "window", "token"):
        made = losses.MSEReconstructionLoss(normalize=normalize)
        for key in ("loss", "loss_mse_reconstruction_rsq") if normalize == "batch" else ("loss",):
            title = (
                f"`MSEReconstructionLoss` normalize={normalize}, 64 networks, forward and backward{' (its rsq)' if 'rsq' in key else ''}"
            )
            sides = pair("loss.reconstruction.MSEReconstructionLoss.forward")
            yield title, *(lambda f=f, m=made, k=key: _loss(f, m, {"x": x, "mask": mask, "z": z}, 1.05 * x + 0.02, k) for f in sides)  # type: ignore[misc]
    contrast = losses.NTXentLoss()
    one, two = torch.randn(64, 30), torch.randn(64, 30)
    sides = pair("loss.contrastive.NTXentLoss.forward")
    yield "`NTXentLoss`, 64 networks, forward and backward", *(lambda f=f: _contrast(f, contrast, one, two) for f in sides)  # type: ignore[misc]


def _loss(f: Callable[..., Any], loss: Any, tensors: dict[str, Tensor], x_hat: Tensor, key: str) -> float:
    leaf = x_hat.requires_grad_()
    leaf.grad = None
    out = f(loss, tensors | {"x_hat": leaf})
    out["loss"].backward()
    assert leaf.grad is not None
    return float(out[key].detach()) + (float(leaf.grad.square().sum()) if key == "loss" else 0.0)


def _contrast(f: Callable[..., Any], loss: Any, one: Tensor, two: Tensor) -> float:
    leaf = one.clone().requires_grad_()
    out = f(loss, {"z_p_i": leaf, "z_p_j": two})["loss"]
    out.backward()
    assert leaf.grad is not None
    return float(out.detach()) + float(leaf.grad.square().sum())


def behavior_rows(k: int, n: int) -> Iterator[tuple[str, Side, Side]]:
    """Their package has no behavioral loss: its tokenizer and its modules, one after another, against ours. Then the whole call against
    ``batched_behavioral_loss`` on rows."""
    sparse = published_code.module(published_code.SECOND, "data.tokenizers").SparseTokenizer
    for config, size, count in ((CNN3, 201, k), (SLIM, 288, max(2, k // 16))):
        models = _networks(config, count)
        tokenizer = sparse(tokensize=size, mode="full_model", reference_statedict=models[0].state_dict())
        x, mask, p = (torch.stack(part) for part in zip(*(tokenizer.tokenize(m.state_dict()) for m in models)))
        loss = v2.BehavioralLoss(zoo=models[0], input_shape=(3, 32, 32), n_queries=n, statistics="reference")
        queries = torch.rand(n, 3, 32, 32)
        title = f"{count} {config['model::type']}, {n} queries"
        parts = x, mask, p, queries
        yield (
            f"behavioral loss on sparse tokens, {title}, forward and backward (theirs: a loop over modules)",
            lambda m=models[0], t=tokenizer, parts=parts: _looped(m, t, *parts),
            lambda loss=loss, parts=parts: _behaved(loss, *parts),
        )
        if config is SLIM:
            conditioned = v2.BehavioralLoss(zoo=models[0], input_shape=(3, 32, 32), n_queries=n, statistics="queries")
            yield (
                f"the same, running statistics those of each original on the queries, {title}",
                lambda m=models[0], t=tokenizer, parts=parts: _looped(m, t, *parts, conditioned=True),
                lambda loss=conditioned, parts=parts: _behaved(loss, *parts),
            )
        if config is CNN3:
            arch = wslfast.Architecture.from_module(models[0], (3, 32, 32))
            layout = layout_of("sparse", size, signature_of(models[0].state_dict()))
            yield (
                f"the same, forward (theirs: `batched_behavioral_loss` on rows), {title}",
                lambda a=arch, la=layout, parts=parts: _on_rows(a, la, parts[0], parts[3]),
                lambda loss=loss, parts=parts: _on_tokens(loss, *parts),
            )


def _on_rows(architecture: wslfast.Architecture, layout: Any, x: Tensor, queries: Tensor) -> float:
    rows = layout.detokenize(1.05 * x + 0.002), layout.detokenize(x)
    return float(wslfast.batched_behavioral_loss(*rows, queries, architecture))


def _on_tokens(loss: Any, x: Tensor, mask: Tensor, p: Tensor, queries: Tensor) -> float:
    return float(loss.values([(x, 1.05 * x + 0.002, mask, p)], queries)[0].mean())


def _looped(module: Any, tokenizer: Any, x: Tensor, mask: Tensor, p: Tensor, queries: Tensor, conditioned: bool = False) -> float:
    leaf = (1.05 * x + 0.002).requires_grad_()
    total = leaf.new_zeros(())
    for j in range(len(x)):
        state, mine = (tokenizer.detokenize(tokens[j], mask[j], p[j]) for tokens in (x, leaf))
        with torch.no_grad():
            if conditioned:
                mine = mine | _condition(module, state, queries)
                state = state | {name: value for name, value in mine.items() if "running" in name}
            wanted = torch.func.functional_call(module, state, (queries,))
        found = torch.func.functional_call(module, mine, (queries,))
        total = total + (found - wanted).square().sum(1).mean() / 2
    (total / len(x)).backward()
    assert leaf.grad is not None
    return float(total.detach() / len(x)) + float(leaf.grad.norm())


def _condition(module: Any, state: Any, queries: Tensor) -> dict[str, Tensor]:
    """The running statistics of a decoded network on the queries: one pass in training mode, as the published scripts do."""
    kept = {name: value.clone() for name, value in state.items()}
    norms = {name: part for name, part in module.named_modules() if isinstance(part, torch.nn.BatchNorm2d)}
    numbers: dict[Any, int] = {}
    for part in norms.values():
        part.train().momentum = 1.0
    hooks = [p.register_forward_pre_hook(lambda p, given: numbers.update({p: given[0][:, 0].numel()})) for p in norms.values()]
    torch.func.functional_call(module, kept, (queries,))
    for hook in hooks:
        hook.remove()
    for name, part in norms.items():
        part.eval()
        kept[f"{name}.running_var"] *= (numbers[part] - 1) / numbers[part]  # what is kept is unbiased
    return {name: value for name, value in kept.items() if "running" in name}


def _behaved(loss: Any, x: Tensor, mask: Tensor, p: Tensor, queries: Tensor) -> float:
    leaf = (1.05 * x + 0.002).requires_grad_()
    value = loss.values([(x, leaf, mask, p)], queries)[0].mean()
    value.backward()
    assert leaf.grad is not None
    return float(value.detach()) + float(leaf.grad.norm())


# -- zoos and the trainer ----------------------------------------------------------------------------------------------


def write_zoo(folder: Path, models: int, epochs: tuple[int, ...] = (40, 41)) -> None:
    """A zoo of CNN3 as the package's scripts leave one: networks at random, with results of no meaning."""
    for seed, model in enumerate(_networks(CNN3, models)):
        trial = folder / f"NN_tune_trainable_seed={seed}"
        trial.mkdir(parents=True)
        (trial / "params.json").write_text(json.dumps({"lr": 1e-3, "weight_decay": 1e-4, **CNN3}))
        lines = (json.dumps({"epoch": e, "test_acc": 0.5, "train_loss": 1.0}) + "\n" for e in range(max(epochs) + 1))
        (trial / "result.json").write_text("".join(lines))
        for epoch in epochs:
            place = trial / f"checkpoint_{epoch:06d}"
            place.mkdir()
            torch.save(model.state_dict(), place / "checkpoints")


def loading_rows(zoo: Path) -> Iterator[tuple[str, Side, Side]]:
    """A checkpoint from disk, the filter that looks at it, and a stored window."""
    data = published_code.module(published_code.SECOND, "data.datasets.zoo_dataset").ZooDataset(str(zoo), [40])
    sides = pair("data.datasets.zoo_dataset.ZooDataset.__getitem__")
    yield (
        f"`ZooDataset[i]`, {len(data)} CNN3",
        *(lambda f=f: sum(_squares(f(data, j).model.state_dict()) for j in range(len(data))) for f in sides),
    )  # type: ignore[misc]
    info = published_code.module(published_code.SECOND, "data.checkpoint").parseCheckpointInfo(str(zoo), [40])
    keep = published_code.module(published_code.SECOND, "data.checkpoint.checkpoint_filters").WeightMagnitudeCheckpointFilter(100.0)
    sides = pair("data.checkpoint.checkpoint_filters.WeightMagnitudeCheckpointFilter.__call__")
    yield f"`WeightMagnitudeCheckpointFilter`, {len(info)} CNN3", *(lambda f=f: float(sum(f(keep, one) for one in info)) for f in sides)  # type: ignore[misc]
    window = zoo.parent / "window.pt"
    torch.save((torch.randn(11, 118, 201), torch.ones(11, 118, 201, dtype=torch.bool), torch.zeros(11, 118, 3, dtype=torch.int32)), window)
    cache = published_code.module(published_code.SECOND, "data.cache").DiskCache(zoo.parent)
    sides = pair("data.cache.disk_cache.DiskCache._load_from_disk")
    yield "`DiskCache`, one window of 11 views", *(lambda f=f: _squares(f(cache, window)[0]) for f in sides)  # type: ignore[misc]


def config_of(zoo: Path, cache: Path, views: int) -> dict[str, Any]:
    """A config of the package's contrastive trainer, small enough for a CPU."""
    return {
        "device": "cpu", "seed": 7, "epochs": 3, "monitor_memory": False, "validation_frequency": 1, "view_1_canon": True,
        "max_grad_norm": 1.0,
        "mask_probability": 0.0, "additive_noise": 0.0, "multiplicative_noise": 0.0,
        "optimizer": {"class": "AdamW", "lr": 1e-3}, "scheduler": {"class": "OneCycleLR"},
        "loss": {"class": "GammaContrastReconLoss", "gamma": 0.05, "normalize": "batch"},
        "model": {
            "input_dim": 201, "latent_dim": 32, "n_tokens": "auto", "max_positions": "auto", "decoder": "symmetric",
            "encoder": {
                "architecture": "transformer", "transformer_type": "gpt", "d_model": 64, "nhead": 4, "num_layers": 2, "dropout": 0.0,
                "position_embedding": "learned",
            },
            "projector": {"architecture": "mlp", "projection_dim": 30, "hidden_layers_dim": [30]}, "embedder": {"architecture": "average"},
        },
        "data": {
            "split": {"train": 0.7, "val": 0.15, "test": 0.15}, "splitter": "RandomSplitter", "batch_size": 16, "num_workers": 0,
            "drop_last": False, "prefetch_factor": 2, "pin_memory": False,
            "checkpoints_dataset": {
                "root_dir": str(zoo), "epoch_idx": [40, 41], "drop_nan": True, "max_absolute_weight": 100, "max_checkpoints": None,
                "augmentations": {"align": True, "num_permutations": views, "permutation_spec": SPECS["CNN3"]},
            },
            "tokenizer": {"tokenizer_class": "sparse", "mode": "full_model", "tokensize": 201, "device": "cpu", "padding": "zero"},
            "tokens_dataset": {
                "window_size": 118, "num_windows_per_model": 1, "pad_windows": True, "allow_overlapping_windows": False,
                "window_distribution_strategy": "consecutive", "cache_dir": str(cache),
            },
        },
    }  # fmt: skip


PHASES = ("zoo and tokens", "batches from disk", "autoencoder, forward", "loss, forward", "backward and optimiser")


def train(config: dict[str, Any], clock: Callable[[], float]) -> tuple[list[float], dict[str, float]]:
    """Losses of every epoch of their trainer, and seconds by phase and in all."""
    trainer = published_code.module(published_code.SECOND, "trainer").SANEContrastiveTrainer()
    spent = dict.fromkeys(PHASES, 0.0)
    start = clock()
    inner = trainer._load_data
    trainer._load_data = lambda: _timed(inner, spent, PHASES[0], clock)
    trainer.setup(copy.deepcopy(config))
    _watch(trainer.sane_ae, "forward", spent, PHASES[2], clock)
    _watch(trainer.loss_fn, "forward", spent, PHASES[3], clock)
    step = clock()
    losses = []
    for name in ("trainset", "valset", "testset"):
        _watch(getattr(trainer, name)._disk_cache, "get", spent, PHASES[1], clock)
    before = dict(spent)
    for _ in range(config["epochs"]):
        out = trainer.step()
        losses += [float(out["loss"]), float(out["loss_val"])]
    epochs = clock() - step
    inside = sum(spent[phase] - before[phase] for phase in PHASES[1:4])
    spent[PHASES[4]] = epochs - inside
    return losses, spent | {"setup": step - start, "epochs": epochs}


def _timed(run: Callable[..., Any], spent: dict[str, float], phase: str, clock: Callable[[], float], *arguments: Any, **named: Any) -> Any:
    start = clock()
    try:
        return run(*arguments, **named)
    finally:
        spent[phase] += clock() - start


def _watch(thing: Any, method: str, spent: dict[str, float], phase: str, clock: Callable[[], float]) -> None:
    inner = getattr(thing, method)
    object.__setattr__(thing, method, lambda *a, **kw: _timed(inner, spent, phase, clock, *a, **kw))


def trainer_lines(folder: Path, models: int, views: int, clock: Callable[[], float], repeats: int) -> tuple[list[str], float]:
    """Their trainer as it is and patched, 3 epochs on the same zoo; rows of the table, and the largest relative difference of a loss."""
    zoo = folder / f"trainer_{models}"
    write_zoo(zoo, models)
    results: dict[str, list[Any]] = {"as published": [], "patched": []}
    for repetition in range(repeats):
        for route, kept in results.items():
            with sane.patched() if route == "patched" else contextlib.nullcontext(), contextlib.redirect_stdout(io.StringIO()):
                kept.append(train(config_of(zoo, folder / f"{route}_{models}_{repetition}", views), clock))
    lines = []
    for route, runs in results.items():
        best = {key: min(seconds[key] for _, seconds in runs) for key in runs[0][1]}
        parts = " | ".join(f"{best[phase]:.2f} s" for phase in PHASES)
        lines.append(f"| {2 * models} checkpoints, {views} views, {route} | {best['setup'] + best['epochs']:.2f} s | {parts} |")
    pairs = zip(results["as published"][0][0], results["patched"][0][0])
    return lines, max(abs(a - b) / abs(a) for a, b in pairs)


# -- all of it ---------------------------------------------------------------------------------------------------------


def rows(zoo: Path, quick: bool) -> Iterator[tuple[str, Side, Side]]:
    """Every item."""
    yield from token_rows(50 if quick else 1000, CNN3)
    yield from token_rows(5 if quick else 20, SLIM)
    yield from permutation_rows(CNN3, 10 if quick else 200)
    yield from permutation_rows(SLIM, 2 if quick else 5)
    yield from loss_rows()
    yield from behavior_rows(16 if quick else 64, 32 if quick else 64)
    yield from loading_rows(zoo)


def worst_objective(models: int = 200) -> tuple[float, int]:
    """The largest loss of objective, relative, of any of the models by our matching, and how many permutations differ at all."""
    basin = published_code.module(published_code.SECOND, "utils.git_re_basin")
    spec = getattr(basin, SPECS["CNN3"])()
    networks = _networks(CNN3, models + 1)
    reference, worst, differ = networks[0].state_dict(), 0.0, 0
    theirs, ours = pair("utils.git_re_basin.weight_matching")
    for j, network in enumerate(networks[1:]):
        found = []
        for side in (theirs, ours):
            torch.manual_seed(j)
            found.append(side(spec, reference, network.state_dict()))
        values = [rebasin.objective(spec, reference, network.state_dict(), perm) for perm in found]
        worst = max(worst, (values[0] - values[1]) / abs(values[0]))
        differ += any(not torch.equal(found[0][p], found[1][p]) for p in found[0])
    return worst, differ


def tables(repeats: int, clock: Callable[[], float], quick: bool) -> None:
    """Print the tables of ``sane`` 2.x."""
    logging.disable(logging.WARNING)
    print(f"\nPackage `sane` 2.x\n\n{HEAD}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_zoo(folder / "zoo", 20)
        for item, theirs, ours in rows(folder / "zoo", quick):
            print(compare(item, theirs, ours, repeats, clock).line(), flush=True)
        worst, differ = worst_objective(20 if quick else 200)
        print(f"\nWeight matching of {20 if quick else 200} CNN3: {differ} permutations differ, largest loss of objective {worst:.1e}")
        print(f"\n| run of their trainer, 3 epochs | in all | {' | '.join(PHASES)} |\n|{'---|' * (2 + len(PHASES))}")
        found = [trainer_lines(folder, models, views, clock, 1 if quick else 2) for models, views in ((10, 3),) if quick] or [
            trainer_lines(folder, models, views, clock, 2) for models, views in ((24, 5), (48, 10))
        ]
        print(*reduce(operator.add, (lines for lines, _ in found)), sep="\n")
        print(f"\nLargest relative difference of a loss, of any epoch, between the two: {max(d for _, d in found):.1e}")
    logging.disable(logging.NOTSET)


__all__ = ["Row", "rows", "tables", "train", "trainer_lines", "worst_objective", "write_zoo"]
