"""Zoos of networks with batch norm, dropout and regression targets, against torch.optim on one module after another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerances import FP32, FP32_AMPLIFIED, FP32_DEEP
from torch import Tensor, nn

from wslfast import cli, engine
from wslfast.architecture import Architecture
from wslfast.errors import WslfastError
from wslfast.kernels.operations import training_graph
from wslfast.population import Population
from wslfast.zoo import Dataset, Grid, Signals, build_zoo, fitting, image_signals, load_zoo, unfinished
from wslfast.zoo.build import batch_generator, dropout_generator, fine_tune

SHAPE = (2, 9, 9)


class Masked(nn.Module):
    """Dropout that draws from a generator of its own: the twin of what a zoo's models draw."""

    def __init__(self, p: float, whole: bool = False) -> None:
        super().__init__()
        self.p, self.whole, self.generator = p, whole, torch.Generator()

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        shape = (*x.shape[:2], *(1,) * (x.ndim - 2)) if self.whole else x.shape
        return x * (torch.rand(shape, generator=self.generator) >= self.p).to(x) / (1 - self.p)


class Attention(nn.Module):
    """Two heads over the columns of a picture, with dropout on the shares."""

    def __init__(self, p: float, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.p, self.generator = p, generator
        self.inside, self.out = nn.Linear(18, 24), nn.Linear(72, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inside(x.flatten(1, 2).transpose(1, 2)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        if self.generator is None:
            made = F.scaled_dot_product_attention(q, k, v, dropout_p=self.p if self.training else 0.0)
        else:
            shares = (q @ k.transpose(-1, -2) / 2).softmax(-1)
            if self.training:
                shares = shares * (torch.rand(shares.shape, generator=self.generator) >= self.p).to(x) / (1 - self.p)
            made = shares @ v
        return self.out(made.transpose(1, 2).flatten(1))


def norms(drop: Callable[..., nn.Module]) -> nn.Module:
    """Convolutions and a linear layer without biases, which a norm behind them makes free to wander."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), drop(0.2, True), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 2, bias=False), nn.BatchNorm2d(6, momentum=0.3, affine=False), nn.Tanh(), nn.Flatten(), drop(0.4),
        nn.Linear(24, 7, bias=False), nn.BatchNorm1d(7, eps=1e-3), nn.ReLU(), nn.Linear(7, 5),
    )  # fmt: skip


def residual(drop: Callable[..., nn.Module]) -> nn.Module:
    """One block whose norm is run twice in a forward."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(2, 4, 3, bias=False)
            self.again, self.norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
            self.drop, self.out = drop(0.3), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(self.first(x)).relu()
            h = (h + self.norm(self.again(h))).relu()
            return self.out(self.drop(h.mean((2, 3))))

    return Block()


def multilayer(drop: Callable[..., nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(162, 12), nn.ReLU(), drop(0.25), nn.Linear(12, 5))


def torchs(p: float, whole: bool = False) -> nn.Module:
    return nn.Dropout2d(p) if whole else nn.Dropout(p)


NETWORKS = {"norms": norms, "residual": residual, "multilayer": multilayer}


@pytest.fixture(scope="module")
def data() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    parts: dict[str, Any] = {}
    for split, n in (("train", 38), ("val", 8), ("test", 20)):
        parts[f"{split}_labels"] = torch.randint(5, (n,), generator=generator)
        parts[f"{split}_images"] = torch.randn(n, *SHAPE, generator=generator) + parts[f"{split}_labels"].view(-1, 1, 1, 1) / 2
    return Dataset("made up", **parts, classes=5)


def grid(*seeds: int) -> Grid:
    return Grid(("default",), (1e-3, 4e-3), (0.0, 1e-2), seeds or (2, 5, 9, 13, 21, 34, 55, 89, 144, 233, 377, 610))


def close(actual: Population, row: int, module: nn.Module) -> None:
    expected = Population.from_state_dicts(actual.architecture, [module.state_dict()]).weights[0]
    torch.testing.assert_close(actual.weights[row], expected, atol=FP32_DEEP, rtol=FP32_DEEP)


@pytest.mark.parametrize("name", NETWORKS)
def test_models_are_what_torch_trains(data: Dataset, name: str) -> None:
    make = NETWORKS[name]
    architecture = Architecture.from_module(make(torchs), SHAPE, name)
    assert training_graph(architecture.graph) is not architecture.graph  # type: ignore[arg-type]
    zoo = build_zoo(data, architecture=architecture, models=5, epochs=2, keep=[0, 1, 2], grid=grid(), batch_size=16)
    for row in range(0, 15, 3):
        seed, lr, decay = (zoo.properties[key][row] for key in ("seed", "lr", "wd"))
        module = make(Masked)
        module.load_state_dict(zoo.state_dict(row))
        module.train()
        order, draws = batch_generator(seed), dropout_generator(seed)
        for part in module.modules():
            if isinstance(part, Masked):
                part.generator = draws
        optimizer = torch.optim.Adam(module.parameters(), lr=lr, weight_decay=decay)
        for epoch in (1, 2):
            for batch in torch.randperm(38, generator=order).split(16):  # the last has 6
                optimizer.zero_grad()
                F.cross_entropy(module(data.train_images[batch]), data.train_labels[batch]).backward()
                optimizer.step()
            close(zoo, row + epoch, module)
        module.eval()
        right = (module(data.test_images).argmax(-1) == data.test_labels).double().mean()
        assert zoo.column("test_acc")[row + 2] == pytest.approx(float(right), abs=0.051)  # a near-tie may fall the other way


def test_attention_drops_shares_of_each_models_own(data: Dataset) -> None:
    architecture = Architecture.from_module(Attention(0.3), SHAPE)
    weights = architecture.initial_weights(["default"] * 3, range(3))
    images, labels = data.train_images[:12], data.train_labels[:12].expand(3, 12)
    made = [torch.Generator().manual_seed(j) for j in range(3)]
    losses, gradient, statistics = engine.training_step(weights, images, labels, architecture, "cross_entropy", generators=made)
    assert not statistics
    for j in range(3):
        module = Attention(0.3, torch.Generator().manual_seed(j))
        module.load_state_dict(Population(architecture, weights).state_dict(j))
        loss = F.cross_entropy(module.train()(images), labels[j])
        loss.backward()
        torch.testing.assert_close(losses[j], loss.detach())
        expected = torch.cat([dict(module.named_parameters())[slot.name].grad.flatten() for slot in architecture.parameters])  # type: ignore[union-attr]
        torch.testing.assert_close(gradient[j], expected, atol=FP32, rtol=FP32_DEEP)


def test_networks_that_differ_in_training_mode_alone_are_kept_apart(data: Dataset) -> None:
    architectures = [Architecture.from_module(Attention(p), SHAPE) for p in (0.0, 0.3, 0.6)]
    assert architectures[0] == architectures[1] == architectures[2]
    weights = architectures[0].initial_weights(["default"], [0])
    images, labels = data.train_images[:12], data.train_labels[None, :12]
    losses = [
        float(engine.training_step(weights, images, labels, a, "cross_entropy", generators=[torch.Generator().manual_seed(0)])[0])
        for a in architectures
    ]
    assert len(set(losses)) == 3


def test_alpha_dropout_keeps_mean_and_variance(data: Dataset) -> None:
    module = nn.Sequential(nn.Flatten(), nn.AlphaDropout(0.3), nn.Linear(162, 5))
    architecture = Architecture.from_module(module, SHAPE)
    weights = architecture.initial_weights(["default"], [0])
    images, labels = data.train_images[:16], data.train_labels[:16].unsqueeze(0)
    _, gradient, _ = engine.training_step(
        weights, images, labels, architecture, "cross_entropy", generators=[torch.Generator().manual_seed(3)]
    )
    kept = torch.rand(16, 162, generator=torch.Generator().manual_seed(3)) >= 0.3
    low = -1.7580993408473766
    a = (0.7 + low**2 * 0.7 * 0.3) ** -0.5  # Klambauer et al. 2017, section 4
    x = a * torch.where(kept, images.flatten(1), low) - a * 0.3 * low
    row = weights[0].clone().requires_grad_()
    F.cross_entropy(F.linear(x, row[: 5 * 162].view(5, 162), row[5 * 162 :]), labels[0]).backward()
    torch.testing.assert_close(gradient[0], row.grad, atol=FP32, rtol=FP32_DEEP)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_trajectory_depends_on_its_own_cell_alone(data: Dataset, name: str) -> None:
    architecture = Architecture.from_module(NETWORKS[name](torchs), SHAPE)
    options: dict[str, Any] = {"architecture": architecture, "epochs": 1, "keep": [1], "batch_size": 16}
    together = build_zoo(data, models=12, grid=grid(), **options)
    for row in (0, 7, 11):
        seed, lr, decay = (together.properties[key][row] for key in ("seed", "lr", "wd"))
        alone = build_zoo(data, models=1, grid=Grid(("default",), (lr,), (decay,), (seed,)), **options)
        assert torch.equal(alone.weights[0], together.weights[row])
        assert dict(alone.properties) == {**{key: column[row : row + 1] for key, column in together.properties.items()}, "model": (0,)} | {
            "split": alone.properties["split"]
        }


# -- signals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [None, 10])
def test_representations_of_images_are_what_torch_fits(batch: int | None) -> None:
    images = torch.rand(4, 3, 5, 7, generator=torch.Generator().manual_seed(1))
    signals = image_signals(images, "patches")
    assert signals.train_inputs.shape == (35, 2)
    assert signals.count == 4
    assert torch.equal(signals.train_targets[2].T.view(3, 5, 7), images[2])
    zoo = build_zoo(signals, models=4, epochs=3, keep=[0, 3], batch_size=batch)
    assert zoo.architecture == Architecture.siren(2, out_features=3)
    assert zoo.properties["signal"] == (0, 0, 1, 1, 2, 2, 3, 3)
    for j in range(4):
        seed, lr = zoo.properties["seed"][2 * j], zoo.properties["lr"][2 * j]
        parameters = {key: value.requires_grad_() for key, value in zoo.state_dict(2 * j).items()}

        def run(x: Tensor, p: dict[str, Tensor] = parameters) -> Tensor:
            for i in range(3):
                x = F.linear(x, p[f"seq.{i}.weight"], p[f"seq.{i}.bias"])
                x = torch.sin(30 * x) if i < 2 else x
            return x

        optimizer, order = torch.optim.Adam(parameters.values(), lr=lr), batch_generator(seed)
        for _ in range(3):
            batches = [torch.arange(35)] if batch is None else torch.randperm(35, generator=order).split(batch)
            for chosen in batches:
                optimizer.zero_grad()
                F.mse_loss(run(signals.train_inputs[chosen]), signals.train_targets[j, chosen]).backward()
                optimizer.step()
        expected = torch.cat([p.detach().flatten() for p in parameters.values()])
        torch.testing.assert_close(zoo.weights[2 * j + 1], expected, atol=FP32_DEEP, rtol=FP32_AMPLIFIED)
        loss = F.mse_loss(run(signals.train_inputs), signals.train_targets[j])
        assert zoo.column("train_loss")[2 * j + 1] == pytest.approx(float(loss.detach()), rel=FP32_AMPLIFIED)


def train_alone(module: nn.Module, x: Tensor, y: Tensor, seed: int, epochs: int) -> None:
    """One model trained by torch.optim on one signal, in batches of 8."""
    optimizer, order = torch.optim.Adam(module.parameters(), lr=1e-2, weight_decay=0.1), batch_generator(seed)
    for _ in range(epochs):
        for chosen in torch.randperm(len(x), generator=order).split(8):
            optimizer.zero_grad()
            F.mse_loss(module(x[chosen]), y[chosen]).backward()
            optimizer.step()


class Features(nn.Module):
    """Random Fourier features, a buffer, below two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
        self.hidden, self.out = nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        angles = x @ self.frequencies
        return self.out(torch.tanh(self.hidden(torch.cat((angles.sin(), angles.cos()), -1))))


def test_regression_on_one_signal_and_a_buffer_that_nobody_trains() -> None:
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(30, 3, generator=generator), torch.randn(30, 2, generator=generator)
    signals = Signals("curve", x[:20], y[:20], test_inputs=x[20:], test_targets=y[20:])
    architecture = Architecture.from_module(Features(), (3,))
    assert architecture.untrained == {"frequencies"}
    zoo = build_zoo(
        signals,
        architecture=architecture,
        models=3,
        epochs=4,
        keep=[0, 4],
        grid=Grid(("default",), (1e-2,), (0.1,), (1, 2, 3)),
        batch_size=8,
    )
    for j in range(3):
        module = Features()
        module.load_state_dict(zoo.state_dict(2 * j))
        train_alone(module, x[:20], y[:20], zoo.properties["seed"][2 * j], epochs=4)
        close(zoo, 2 * j + 1, module)
        assert zoo.column("test_loss")[2 * j + 1] == pytest.approx(float(F.mse_loss(module(x[20:]), y[20:])), rel=FP32_DEEP)
    assert "val_loss" not in zoo.properties


class Partly(nn.Module):
    """Three layers: a frozen one, one that answers, and one that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.out, self.unused = nn.Linear(3, 4).requires_grad_(False), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.frozen(x)))


def test_what_is_frozen_or_unused_is_neither_trained_nor_decays() -> None:
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(20, 3, generator=generator), torch.randn(20, 2, generator=generator)
    architecture = Architecture.from_module(Partly(), (3,))
    assert architecture == Architecture.from_module(Partly().requires_grad_(), (3,))  # as networks they are the same
    options: dict[str, Any] = {
        "models": 2,
        "epochs": 2,
        "keep": [0, 2],
        "grid": Grid(("default",), (1e-2,), (0.1,), (1, 2)),
        "batch_size": 8,
    }
    zoo = build_zoo(Signals("curve", x, y), architecture=architecture, **options)
    for j in range(2):
        module = Partly()
        module.load_state_dict(zoo.state_dict(2 * j))
        train_alone(module, x, y, zoo.properties["seed"][2 * j], epochs=2)
        close(zoo, 2 * j + 1, module)
    all_frozen = Architecture.from_module(Partly().requires_grad_(False), (3,))  # made ready for use: not a wish to train nothing
    assert all_frozen.untrained == {"unused.weight", "unused.bias"}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"train_inputs": torch.zeros(4, 2), "train_targets": torch.zeros(5, 1)}, "train_targets"),
        ({"train_inputs": torch.zeros(4, 2).double(), "train_targets": torch.zeros(4, 1)}, "train_inputs: expected float32"),
        ({"train_inputs": torch.zeros(4, 2), "train_targets": torch.full((4, 1), torch.nan)}, "finite"),
        ({"train_inputs": torch.zeros(4, 2), "train_targets": torch.zeros(4, 1), "val_inputs": torch.zeros(2, 2)}, "val: expected"),
        (
            {"train_inputs": torch.zeros(4, 2), "train_targets": torch.zeros(3, 4, 1), "val_inputs": torch.zeros(2, 2),
             "val_targets": torch.zeros(2, 1)},
            "val_targets",
        ),
    ],
)  # fmt: skip
def test_signals_that_are_none(parts: dict[str, Tensor], message: str) -> None:
    with pytest.raises(WslfastError, match=message):
        Signals("wrong", **parts)


def test_a_zoo_wants_signals_that_fit() -> None:
    signals = image_signals(torch.rand(3, 1, 4, 4))
    with pytest.raises(WslfastError, match="at most 3, one per signal"):
        build_zoo(signals, models=4, epochs=1)
    with pytest.raises(WslfastError, match="expected targets"):
        build_zoo(signals, models=1, epochs=1, architecture=Architecture.siren(2, out_features=3))


# -- what cannot be trained ----------------------------------------------------------------------------------------------


class Depth(nn.Module):
    """Stochastic depth."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return x + (y * (torch.rand(len(x), 1) < 0.8) if self.training else y)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.LSTM(2, 3, 2, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cells(x.unflatten(1, (3, 2)))[0][:, -1]


class Two(Depth):
    def forward(self, x: Tensor) -> Any:
        return (self.inner(x), x) if self.training else self.inner(x)


class Fixed(Depth):
    """One that looks at its mode, and is deterministic in both."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * (2.0 if self.training else 1.0)


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (Depth(), r"random in training mode in another way than dropout \(rand\)"),
        (Recurrent(), "another way than dropout .lstm"),
        (Two(), "something other than one tensor"),
        (nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, momentum=None)), "without a momentum"),
        (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))), "computed from others"),
        (nn.Sequential(nn.Linear(6, 4), nn.RReLU()), "rrelu"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_cannot_be_trained_is_refused_in_one_sentence(module: nn.Module, why: str) -> None:
    architecture = Architecture.from_module(module, (6,))
    again = Architecture.from_dict(architecture.to_dict())
    signals = Signals("any", torch.zeros(4, 6), torch.zeros(4, *architecture.output_shape))
    for one in (architecture, again):  # a zoo's manifest knows as well
        with pytest.raises(WslfastError, match=why) as raised:
            build_zoo(signals, architecture=one, models=1, epochs=1)
        assert "cannot be trained" in str(raised.value)
        assert "\n" not in str(raised.value)


def test_a_forward_that_looks_at_its_mode_is_trained_as_it_is_in_training_mode() -> None:
    module = Fixed()
    architecture = Architecture.from_module(module, (6,))
    x, y = torch.randn(8, 6), torch.randn(1, 8, 6)
    weights = Population.from_state_dicts(architecture, [module.state_dict()]).weights
    losses, gradient, _ = engine.training_step(weights, x, y, architecture, "mse")
    loss = F.mse_loss(module.train()(x), y[0]) * 3  # the criterion is 1 / 2n of the sum over outputs
    loss.backward()
    torch.testing.assert_close(losses[0], loss.detach())
    torch.testing.assert_close(gradient[0, :36].view(6, 6), module.inner.weight.grad)


def test_a_batch_without_variance_is_named() -> None:
    module = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    signals = Signals("odd", torch.randn(9, 6), torch.randn(9, 1))
    with pytest.raises(WslfastError, match=r"has no variance.*other batches"):
        build_zoo(signals, architecture=Architecture.from_module(module, (6,)), models=2, epochs=1, batch_size=4)


def test_kernels_are_not_asked_for_what_they_have_not(data: Dataset) -> None:
    architecture = Architecture.from_module(multilayer(torchs), SHAPE)
    with pytest.raises(WslfastError, match="no dropout"):
        build_zoo(data, architecture=architecture, models=1, epochs=1, backend="triton")


def test_fine_tuning_goes_on_with_running_averages(data: Dataset) -> None:
    architecture = Architecture.from_module(norms(torchs), SHAPE)
    start = build_zoo(data, architecture=architecture, models=2, epochs=1, keep=[1], grid=grid())
    tuned = fine_tune(start, data, epochs=1)
    slot = architecture.slots["1.running_mean"]
    assert not torch.allclose(tuned.weights[1, slot.offset : slot.stop], start.weights[0, slot.offset : slot.stop])


# -- interrupted builds --------------------------------------------------------------------------------------------------


def interrupted(epoch: int) -> pytest.MonkeyPatch:
    """Ctrl-C in the second step of an epoch."""
    patch, steps, run = pytest.MonkeyPatch(), [0, 0], fitting._Run

    class Interrupted(run):  # type: ignore[misc,valid-type]
        def epoch(self, advance: Any) -> None:
            steps[0] += 1
            super().epoch(advance)

        def _step(self, *arguments: Any) -> Any:
            steps[1] += 1
            if steps[0] == epoch and steps[1] % 3 == 2:
                raise KeyboardInterrupt
            return super()._step(*arguments)

    patch.setattr(fitting, "_Run", Interrupted)
    return patch


@pytest.mark.parametrize("name", ["norms", "long"])
def test_an_interrupted_build_goes_on_from_its_last_epoch(
    data: Dataset, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = nn.Sequential(nn.Flatten(), nn.Linear(162, 100), nn.ReLU(), nn.Dropout(0.1), nn.Linear(100, 5))  # left to torch's fused Adam
    architecture = Architecture.from_module(norms(torchs) if name == "norms" else long, SHAPE)
    options: dict[str, Any] = {"architecture": architecture, "models": 4, "epochs": 4, "keep": [1, 2, 4], "grid": grid(), "batch_size": 16}
    whole = build_zoo(data, **options)
    patch = interrupted(4)
    with pytest.raises(KeyboardInterrupt):
        build_zoo(data, tmp_path, **options)
    patch.undo()
    with pytest.raises(WslfastError, match="an unfinished zoo is there"):
        build_zoo(data, tmp_path, **options)
    with pytest.raises(WslfastError, match=r"other settings \(batch_size\)"):
        build_zoo(data, tmp_path, resume=True, **{**options, "batch_size": 8})
    steps: list[int] = []
    train = fitting._Run.epoch
    monkeypatch.setattr(fitting._Run, "epoch", lambda self, advance: (steps.append(1), train(self, advance)))
    rest = build_zoo(data, tmp_path, resume=True, **options)
    assert len(steps) == 1, "three epochs of four were kept"
    assert torch.equal(rest.weights, whole.weights)
    assert dict(rest.properties) == dict(whole.properties)
    assert torch.equal(load_zoo(tmp_path).weights, whole.weights)
    assert not (tmp_path / unfinished.FILE).exists()


def test_a_damaged_state_is_told_from_a_sound_one(data: Dataset, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "architecture": Architecture.from_module(multilayer(torchs), SHAPE),
        "models": 2,
        "epochs": 2,
        "batch_size": 16,
    }
    patch = interrupted(2)
    with pytest.raises(KeyboardInterrupt):
        build_zoo(data, tmp_path, **options)
    patch.undo()
    file = tmp_path / unfinished.FILE
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    with pytest.raises(WslfastError, match="damaged"):
        build_zoo(data, tmp_path, resume=True, **options)
    assert len(build_zoo(data, tmp_path, overwrite=True, **options)) == 4
    with pytest.raises(WslfastError, match="resume: expected out="):
        build_zoo(data, resume=True, **options)


def test_from_the_shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    command = ["zoo", "build", "--architecture", "siren", "--models", "3", "--epochs", "3", "--out", str(tmp_path / "inr")]
    cli.main([*command, "--resume"])
    assert "9 rows, mean squared error" in capsys.readouterr().out
    zoo = load_zoo(tmp_path / "inr")
    assert zoo.architecture.output_shape == (1,)
    from wslfast.training.query_sets import query_images

    points = query_images("data", tmp_path / "inr", zoo)
    assert points.shape[1:] == (2,)
    assert float(points.min()) == -1
    assert float(points.max()) == 1
