"""The published code beside ``wslfast.sane`` on the same tensors: values, their difference, and the time of each.

``WSLFAST_SANE_SRC=clone python -m benchmarks.drop_in`` prints the tables of docs/published.md. Both sides of a row run in turns in
one process (training steps: one side after the other); the fastest of the repetitions counts. ``--cpu`` takes CPU time in place of wall
time (for a shared machine, with ``--threads 1``); ``--quick`` leaves the step of 64 models and 256 queries out.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor

import wslfast
from wslfast import sane
from wslfast.permutation import random_views
from wslfast.population import unstack
from wslfast.sane import multizoo, package_sane, rebasin

from . import published_code

ARCHITECTURES = {"CNN": wslfast.Architecture.cnn(), "CNN3": wslfast.Architecture.cnn3(), "LeNet5": wslfast.Architecture.lenet5()}
SPECS = {"CNN": "zoo_cnn_permutation_spec", "CNN3": "zoo_cnn_large_permutation_spec", "LeNet5": "zoo_lenet_permutation_spec"}
HEAD = "| item | their value | ours | relative difference | their time | ours | ratio |\n|---|---|---|---|---|---|---|"
LOSSES = ("l2", "cross_entropy", "distillation")
PAPER = {
    "seed": 2020, "device": "cpu", "training::precision": "amp", "ae:i_dim": 289, "ae:lat_dim": 64, "ae:max_positions": [500, 50, 100],
    "ae:d_model": 256, "ae:nhead": 8, "ae:num_layers": 8, "optim::lr": 1e-5, "optim::wd": 3e-9, "training::windowsize": 93,
    "training::gamma": 0.05, "training::beta": 0.1, "training::temperature": 0.1,
}  # fmt: skip


class Row(NamedTuple):
    """One item on both sides; values are scalars that stand for the whole."""

    item: str
    theirs: float
    ours: float
    their_seconds: float
    our_seconds: float

    @property
    def difference(self) -> float:
        return abs(self.theirs - self.ours) / max(abs(self.theirs), 1e-30)

    def line(self) -> str:
        times = f"{1e3 * self.their_seconds:.4g} ms | {1e3 * self.our_seconds:.4g} ms | {self.their_seconds / self.our_seconds:.2f}x"
        return f"| {self.item} | {self.theirs:.7g} | {self.ours:.7g} | {self.difference:.1e} | {times} |"


def compare(item: str, theirs: Callable[[], Any], ours: Callable[[], Any], repeats: int, clock: Callable[[], float]) -> Row:
    """Run both in turns from the same seed; the value is of the last run."""
    values: list[float] = [0.0, 0.0]
    seconds = [float("inf")] * 2
    for repetition in range(repeats):
        for side, run in enumerate((theirs, ours)):
            torch.manual_seed(repetition)
            start = clock()
            value = run()
            seconds[side] = min(seconds[side], clock() - start)
            values[side] = float(value)
    return Row(item, *values, *seconds)


def case(name: str, k: int) -> tuple[dict[str, Tensor], dict[str, Any], Tensor, Tensor, Tensor]:
    """A checkpoint and params of a zoo, and tokens, mask and positions of k / 2 models in two views each."""
    arch = ARCHITECTURES[name]
    weights = arch.initial_weights(["kaiming_uniform"] * (k // 2), list(range(k // 2)))
    views = torch.cat([weights, random_views(weights, arch, torch.Generator().manual_seed(0))])
    x, mask, positions = wslfast.TokenLayout(arch, 256 if name == "LeNet5" else 0).tokenize(views)
    params = {"model::type": name, "model::channels_in": arch.input_shape[0], "model::nlin": "relu", "model::dropout": 0}
    checkpoint = {n: v[0] for n, v in unstack(weights[:1], arch).items()}
    return checkpoint, params, x, mask.expand_as(x), positions.int().expand(k, -1, -1)


# -- rows --------------------------------------------------------------------------------------------------------------


def behavior_rows(package: str, k: int, n: int) -> Iterator[tuple[str, Callable[[], float], Callable[[], float]]]:
    """The behavior loss alone, forward and backward, on every network it knows."""
    theirs = published_code.module(package, "models.def_loss")
    for name in ARCHITECTURES:
        checkpoint, params, x, mask, p = case(name, k)
        for loss in LOSSES:
            runs = []
            for kind in (theirs.DistillationLoss, sane.DistillationLoss):
                made = kind(checkpoint, params, n_queries=n, loss=loss)
                made.scale = 1.0

                def run(made: Any = made, x: Tensor = x, mask: Tensor = mask, p: Tensor = p) -> float:
                    y = (1.05 * x + 0.01).requires_grad_()
                    value = made(y, x, mask, p)["loss_recon"]
                    value.backward()
                    return value.item()

                runs.append(run)
            yield f"`DistillationLoss` {loss}, {name}, {k} models, {n} queries", runs[0], runs[1]


class _Ours:
    """What takes the place of a package's names: a module of ours, and ``wslfast.sane`` for the rest."""

    def __init__(self, package: str) -> None:
        self._modules = ({"SANE": package_sane, "mzsane": multizoo}.get(package, sane), sane)

    def __getattr__(self, name: str) -> Any:
        return next(getattr(m, name) for m in self._modules if hasattr(m, name))


def part_rows(package: str) -> Iterator[tuple[str, Callable[[], float], Callable[[], float]]]:
    """Tokens, permutations, structure, contrast, autoencoder, probe."""
    loss, tokens = published_code.module(package, "models.def_loss"), published_code.module(package, "datasets.dataset_auxiliaries")
    basin, ours = published_code.module(package, "git_re_basin.git_re_basin"), _Ours(package)
    paper, multi = package == "shrp", package == "mzsane"
    for name in ARCHITECTURES:
        checkpoint, _, x, mask, p = case(name, 16)
        size = x.shape[2]
        other = {n: v[0] for n, v in unstack(ARCHITECTURES[name].initial_weights(["kaiming_uniform"], [99]), ARCHITECTURES[name]).items()}
        sides = [
            (tokens, getattr(basin, SPECS[name], getattr(sane, SPECS[name]))(), basin),  # SANE has no spec of LeNet-5
            (ours, getattr(sane, SPECS[name])(), sane),
        ]
        for title, run in (
            ("tokenize_checkpoint", lambda s, c=checkpoint, d=size: s[0].tokenize_checkpoint(c, d)[0].square().sum()),
            ("tokens_to_checkpoint", lambda s, c=checkpoint, x=x, p=p: _squares(s[0].tokens_to_checkpoint(x[0], p[0], c))),
            ("apply_permutation", lambda s, c=checkpoint: _permuted(s, c)),
            ("weight_matching", lambda s, c=checkpoint, o=other: _matched(s, c, o)),
        ):
            yield f"`{title}` {name}", *(lambda s=s, run=run: run(s) for s in sides)  # type: ignore[misc]
    _, _, x, mask, p = case("CNN3", 16)
    z = torch.randn(16, 30)
    for reduction in ("mean", "sum"):
        pair = [m.MaskedReconLoss(reduction, *([True] if multi else [])) for m in (loss, ours)]
        for made in pair:
            made.scale = 1.0
        more = (p,) if paper else ()
        title = f"`MaskedReconLoss` {reduction}{', standardised' if multi else ''}"
        yield title, *(lambda m=m, more=more: m(1.1 * x + 0.01, x, mask, *more)["loss_recon"] for m in pair)  # type: ignore[misc]
        yield f"its `rsq` ({reduction})", *(lambda m=m, more=more: m(1.1 * x + 0.01, x, mask, *more)["rsq"] for m in pair)  # type: ignore[misc]
    for title in ("NT_Xent", "NT_Xent_pos"):
        pair = [getattr(m, title)(8, 0.1) for m in (loss, ours)]
        for made in pair:
            made.scale = 1.0
        yield f"`{title}`", *(lambda m=m: m(z[:8], z[8:]) for m in pair)  # type: ignore[misc]
    if not paper:
        return
    for kind in ("pytorch", "gpt2"):
        config = PAPER | {"ae:transformer_type": kind}
        encoders = []
        for make in (published_code.module(package, "models.def_AE").AE, sane.AE):
            torch.manual_seed(1)
            encoders.append(make(config))
        yield f"`AE` {kind}, training, 8 models, forward and backward", *(lambda m=m: _both(m, x[:8], p[:8]) for m in encoders)  # type: ignore[misc]
    learners = (published_code.module(package, "models.def_downstream_module").DownstreamTaskLearner(), sane.DownstreamTaskLearner())
    learners[0].device = torch.device("cpu")
    features, noise = torch.randn(400, 64), torch.randn(400)
    target = features[:, 0] + 0.5 * features[:, 1] + 0.1 * noise
    split = [a for s in (slice(0, 300), slice(300, 350), slice(350, 400)) for a in (features[s], target[s].tolist())]
    yield "probe, R2 on test", *(lambda m=m: m.compute_closed_form_solution(*split)[1] for m in learners)  # type: ignore[misc]


def _squares(checkpoint: dict[str, Tensor]) -> Tensor:
    return torch.stack([v.square().sum() for v in checkpoint.values()]).sum()


def _matched(side: tuple[Any, Any, Any], reference: dict[str, Tensor], checkpoint: dict[str, Tensor]) -> float:
    return rebasin.objective(side[1], reference, checkpoint, side[2].weight_matching(side[1], reference, checkpoint))


def _permuted(side: tuple[Any, Any, Any], checkpoint: dict[str, Tensor]) -> Tensor:
    spec = side[1]
    perm = {p: torch.arange(checkpoint[axes[0][0]].shape[axes[0][1]]).flip(0).float() for p, axes in spec.perm_to_axes.items()}
    moved = side[2].apply_permutation(spec, perm, checkpoint)
    weights = torch.cat([v.flatten() for v in moved.values()])
    return (weights * torch.arange(len(weights)).sin()).sum()


def _both(model: Any, x: Tensor, p: Tensor) -> float:
    model.train()
    model.zero_grad()
    _, y, projection = model(x, p)
    total = (y - x).square().mean() + projection.square().mean()
    total.backward()
    gradient = sum(q.grad.square().sum() for q in model.parameters() if q.grad is not None)
    return float(total.detach() + gradient)


def step(package: str, k: int, n: int, steps: int, clock: Callable[[], float]) -> tuple[Row, list[str]]:
    """Training steps of the published module, as it is and under ``patched()``; and where the time of each goes."""
    module = published_code.module(package, "models.def_AE_module")
    checkpoint, params, x, mask, p = case("CNN3", 2 * k)
    batch = (x[:k], mask[:k], p[:k], x[k:], mask[k:], p[k:])
    config = PAPER | {"trainset::batchsize": k, "training::n_queries_distillation": n}
    shares, results = [], []
    for route in ("as published", "patched"):
        with sane.patched() if route == "patched" else contextlib.nullcontext():
            with contextlib.redirect_stdout(io.StringIO()):
                made = module.AEModule(config, checkpoint, params)
            made.model.train()
            seconds, value = float("inf"), 0.0
            spent = {"behavior loss": 0.0, "whole objective": 0.0}
            _timed(made.criterion.loss_recon.distillation_loss, spent, "behavior loss", clock)
            for i in range(steps):
                spent |= dict.fromkeys(spent, 0.0)
                torch.manual_seed(i)
                start = clock()
                loss = float(made.train_step(*batch)["loss/loss"].detach())
                took = clock() - start
                # later ones differ more and more: Adam divides gradients that are rounding by their own size
                value = loss if i < 2 else value
                if took < seconds:
                    seconds, forward = took, spent["behavior loss"]
            gradient = _behavior_backward(made, batch, clock)
            share = (forward + gradient) / seconds
            shares.append(f"| {k} x 2, {n} queries, {route} | {1e3 * seconds:.4g} ms | {share:.0%} | {1 - share:.0%} |")
            results.append((value, seconds))
    (a, s), (b, t) = results
    return Row(f"training step, {k} models x 2 views, {n} queries (loss of step 2)", a, b, s, t), shares


def _timed(part: Any, spent: dict[str, float], name: str, clock: Callable[[], float]) -> None:
    inner = part.forward

    def forward(*arguments: Any) -> Any:
        start = clock()
        out = inner(*arguments)
        spent[name] += clock() - start
        return out

    part.forward = forward


def _behavior_backward(made: Any, batch: tuple[Tensor, ...], clock: Callable[[], float]) -> float:
    """Time of the behavior loss's own backward pass."""
    x, mask, p = (torch.cat([batch[i], batch[i + 3]]) for i in range(3))
    y = (1.05 * x).requires_grad_()
    value = made.criterion.loss_recon.distillation_loss(y, x, mask, p)["loss_recon"]
    start = clock()
    value.backward()
    return clock() - start


def state_row(package: str) -> str:
    """``state.pt`` written by either side and read by the other."""
    module = published_code.module(package, "models.def_AE_module")
    checkpoint, params, x, mask, p = case("CNN3", 4)
    config = PAPER | {"ae:d_model": 32, "ae:num_layers": 1, "trainset::batchsize": 2, "training::n_queries_distillation": 4}
    with TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        theirs, ours = module.AEModule(config, checkpoint, params), sane.AEModule(config, checkpoint, params)
        for source, target, name in ((theirs, ours, "a"), (ours, theirs, "b")):
            source.train_step(x[:2], mask[:2], p[:2], x[2:], mask[2:], p[2:])
            source.save_model(Path(folder) / name)
            target.load_model(Path(folder) / name)
            equal = all(torch.equal(u, v) for u, v in zip(source.model.state_dict().values(), target.model.state_dict().values()))
            if not equal:
                raise AssertionError("state.pt: not the same model")
    return "`state.pt`: theirs read by ours, ours by theirs (model and optimiser): equal"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drop_in", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cpu", action="store_true", help="CPU time in place of wall time")
    parser.add_argument("--quick", action="store_true", help="no step of 64 models and 256 queries")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")  # the published code calls what torch has renamed since
    clock = time.process_time if arguments.cpu else time.perf_counter
    packages = published_code.available()
    if not packages:
        parser.exit(1, f"{published_code.VARIABLE} has to name a clone: of HSG-AIML/ICLR_WSL_2025-Structure_is_not_enough, say\n")
    print(f"torch {torch.__version__}, {arguments.threads} threads, {'CPU' if arguments.cpu else 'wall'} time")
    for package in ("SANE", "shrp", "mzsane"):
        if package in packages:
            print(f"\nPackage `{package}`\n\n{HEAD}")
            for item, theirs, ours in part_rows(package):
                print(compare(item, theirs, ours, arguments.repeats, clock).line(), flush=True)
            if package == "shrp":
                _paper(arguments, clock)
    if published_code.SECOND in packages:
        from . import sane2

        sane2.tables(arguments.repeats, clock, arguments.quick)


def _paper(arguments: argparse.Namespace, clock: Callable[[], float]) -> None:
    """The rows that only the paper's package has: the behavioral loss, whole training steps, states."""
    for item, theirs, ours in behavior_rows("shrp", 16, 64):
        print(compare(item, theirs, ours, arguments.repeats, clock).line(), flush=True)
    shares = []
    for k, n, steps in ((8, 64, arguments.repeats), *(() if arguments.quick else ((64, 256, 2),))):
        row, lines = step("shrp", k, n, steps, clock)
        shares += lines
        print(row.line(), flush=True)
    print("\n| step | time | behavior loss | autoencoder and the rest |\n|---|---|---|---|", *shares, sep="\n")
    print(f"\n{state_row('shrp')}")


if __name__ == "__main__":
    main()
