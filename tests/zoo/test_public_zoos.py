"""The field's public zoos, each as small files of the exact format: read to the bit, answers as their own definitions give them."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tolerances import FP32, FP32_AMPLIFIED, FP32_DEEP, FP32_ROUNDING, FP32_SMALL
from torch import Tensor, nn

import wslfast
from wslfast import Architecture, WslfastError, load_zoo
from wslfast.zoo import dataset_of, import_zoo, load_parts, read_manifest

# -- Small CNN Zoo -------------------------------------------------------------------------------------------------------

LAYERS = [  # biases first, as the published layout.csv has them
    ("sequential/conv2d/bias:0", (16,)), ("sequential/conv2d/kernel:0", (3, 3, 1, 16)),
    ("sequential/conv2d_1/bias:0", (16,)), ("sequential/conv2d_1/kernel:0", (3, 3, 16, 16)),
    ("sequential/conv2d_2/bias:0", (16,)), ("sequential/conv2d_2/kernel:0", (3, 3, 16, 16)),
    ("sequential/dense/bias:0", (10,)), ("sequential/dense/kernel:0", (16, 10)),
]  # fmt: skip


def small_cnn_zoo(folder: Path, rows: int = 8, activations: tuple[str, ...] = ("relu", "tanh")) -> np.ndarray:
    folder.mkdir()
    sizes = [int(np.prod(shape)) for _, shape in LAYERS]
    assert sum(sizes) == 4970  # as its README says
    matrix = np.random.default_rng(0).normal(0, 0.2, (rows, 4970)).astype(np.float32)
    np.save(folder / "weights.npy", matrix)
    lines, at = ["varname,start_idx,end_idx,shape"], 0
    for (name, shape), size in zip(LAYERS, sizes, strict=True):
        lines.append(f'{name},{at},{at + size},"{shape}"')
        at += size
    (folder / "layout.csv").write_text("\n".join(lines) + "\n")
    head = "config.activation,config.b_init,config.dataset,config.dropout,config.l2reg,config.learning_rate,config.w_init,modeldir,step,"
    table = [head + "test_accuracy,test_loss,train_accuracy,train_loss"]
    for i in range(rows):
        activation = activations[i // 2 % len(activations)]
        table.append(f"{activation},zeros,mnist,0.5,1e-05,0.003,he_normal,/dir/{i // 2},{(0, 86)[i % 2]},0.{i}1,1.5,0.{i}3,1.25")
    with gzip.open(folder / "metrics.csv.gz", "wt") as file:
        file.write("\n".join(table) + "\n")
    return matrix


def keras(row: np.ndarray, x: Tensor, activation: str, padding: str) -> Tensor:
    """The published network out of its definition: cross-correlation with HWIO kernels, pixel by pixel, in float64."""
    parts, at = {}, 0
    for name, shape in LAYERS:
        size = int(np.prod(shape))
        parts[name.removeprefix("sequential/")] = row[at : at + size].astype(np.float64).reshape(shape)
        at += size
    h = x.double().permute(0, 2, 3, 1).numpy()
    for layer in ("conv2d", "conv2d_1", "conv2d_2"):
        kernel, bias = parts[f"{layer}/kernel:0"], parts[f"{layer}/bias:0"]
        if padding == "same":
            total = max((-(-h.shape[1] // 2) - 1) * 2 + 3 - h.shape[1], 0)
            h = np.pad(h, ((0, 0), (total // 2, total - total // 2), (total // 2, total - total // 2), (0, 0)))
        side = (h.shape[1] - 3) // 2 + 1
        out = np.zeros((len(h), side, side, kernel.shape[3]))
        for i, j in itertools.product(range(side), repeat=2):
            out[:, i, j] = np.tensordot(h[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3], kernel, 3) + bias
        h = np.maximum(out, 0) if activation == "relu" else np.tanh(out)
    return torch.from_numpy(h.mean((1, 2)) @ parts["dense/kernel:0"] + parts["dense/bias:0"])


@pytest.mark.parametrize("padding", ["valid", "same"])
def test_small_cnn_zoo(tmp_path: Path, padding: str) -> None:
    matrix = small_cnn_zoo(tmp_path / "src")
    done = import_zoo(tmp_path / "src", tmp_path / "zoo", padding=padding)
    assert (done.rows, done.models, dict(done.skipped)) == (8, 4, {})
    held, x = read_manifest(tmp_path / "zoo"), torch.randn(3, 1, 28, 28)
    assert held.properties["epoch"] == (0, 86) * 4
    assert held.properties["test_acc"] == tuple(float(f"0.{i}1") for i in range(8))
    assert held.properties["train_acc"] == tuple(float(f"0.{i}3") for i in range(8))
    assert (held.properties["lr"][0], held.properties["wd"][0], held.properties["init_type"][0]) == (0.003, 1e-5, "he_normal")
    assert (held.properties["dropout"][0], held.properties["train_loss"][0]) == (0.5, 1.25)
    assert all(a == b for a, b in zip(held.properties["split"][::2], held.properties["split"][1::2], strict=True))
    for label, part in load_parts(tmp_path / "zoo").items():
        which = "relu" if "relu" in label else "tanh"
        mine = [i for i in range(8) if ("relu", "tanh")[i // 2 % 2] == which]
        assert torch.equal(part.weights.sort(1).values, torch.from_numpy(matrix[mine]).sort(1).values)  # every number, to the bit
        expected = torch.stack([keras(matrix[i], x, which, padding) for i in mine])
        torch.testing.assert_close(
            wslfast.batched_forward(part.weights, x, part.architecture).double(), expected, rtol=FP32_DEEP, atol=FP32
        )
    assert import_zoo(tmp_path / "src", tmp_path / "last", epochs=[86]).rows == 4


def test_small_cnn_zoo_saw_pixels_from_minus_one_to_one(tmp_path: Path) -> None:
    small_cnn_zoo(tmp_path / "src", activations=("relu",))
    pixels = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels, labels=np.arange(20) % 10)
    import_zoo(tmp_path / "src", tmp_path / "zoo", dataset=tmp_path / "images.npz")
    arch = load_zoo(tmp_path / "zoo").architecture
    data = dataset_of(tmp_path / "zoo", arch)
    every = torch.cat([data.train_images, data.val_images, data.test_images])
    grey = torch.from_numpy(pixels).double().div(255).mul(2).sub(1).mean(3)
    assert arch.input_shape == (1, 32, 32)
    torch.testing.assert_close(
        every.double().flatten(1).sum(1).sort().values, grey.flatten(1).sum(1).sort().values, rtol=FP32_DEEP, atol=FP32_AMPLIFIED
    )


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda f: (f / "layout.csv").write_text("varname,start_idx,end_idx,shape\na/kernel:0,0,9,\"__import__('os')\"\n"), "shape"),
        (lambda f: (f / "layout.csv").write_text((f / "layout.csv").read_text().replace("(16, 10)", "(16, 11)")), "do not hold"),
        (lambda f: np.save(f / "weights.npy", np.array([{}], dtype=object)), "without pickle"),
        (lambda f: np.save(f / "weights.npy", np.zeros((7, 4970), np.float32)), "expected 7 rows"),
        (lambda f: (f / "metrics.csv.gz").write_bytes(b"\x1f\x8b\x08 no"), "cannot be read"),
        (lambda f: (f / "metrics.csv.gz").unlink(), "expected metrics.csv.gz"),
    ],
    ids=["code", "shape", "pickle", "rows", "damaged", "missing"],
)
def test_small_cnn_zoo_damaged(tmp_path: Path, spoil: Any, says: str) -> None:
    small_cnn_zoo(tmp_path / "src")
    spoil(tmp_path / "src")
    with pytest.raises(WslfastError, match=says):
        import_zoo(tmp_path / "src", tmp_path / "zoo")


# -- implicit representations --------------------------------------------------------------------------------------------


def dws(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """DWSNets' INR: sin(30 (W x + b)) twice, a linear layer, + 0.5."""
    for i in range(2):
        x = torch.sin(30.0 * F.linear(x, state[f"seq.{i}.weight"].double(), state[f"seq.{i}.bias"].double()))
    return F.linear(x, state["seq.2.weight"].double(), state["seq.2.bias"].double()) + 0.5


def inr_state(seed: int, names: tuple[str, ...], out: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [(2, 8), (8, 8), (8, out)]
    state = {}
    for name, (a, b) in zip(names, sizes, strict=True):
        state[f"{name}.weight"] = torch.randn(b, a, generator=generator) / 20
        state[f"{name}.bias"] = torch.randn(b, generator=generator) / 20
    return state


SEQ = ("seq.0", "seq.1", "seq.2")


def test_dwsnets_mnist(tmp_path: Path) -> None:
    states = {}
    for split, label, image in (("training", 7, 12), ("training", 0, 3), ("training", 2, 10_000), ("testing", 9, 4)):
        folder = tmp_path / "src" / f"mnist_png_{split}_{label}_{image}" / "checkpoints"
        folder.mkdir(parents=True)
        states[label] = inr_state(image, SEQ)
        torch.save(states[label], folder / "model_final.pth")
    import_zoo(tmp_path / "src", tmp_path / "zoo")
    zoo = load_zoo(tmp_path / "zoo")
    assert sorted(zip(zoo.properties["label"], zoo.properties["image"], strict=True)) == [(0, 3), (2, 10_000), (7, 12), (9, 4)]
    data = dataset_of(tmp_path / "zoo", zoo.architecture)
    axis = np.linspace(-1, 1, 28)
    grid = torch.from_numpy(np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2))  # numpy's order: x, the column, first
    torch.testing.assert_close(data.test_images.double(), grid, rtol=0, atol=FP32_SMALL)
    answers = wslfast.batched_forward(zoo.weights, data.test_images, zoo.architecture).double()
    for row, label in enumerate(zoo.properties["label"]):
        assert all(torch.equal(zoo.state_dict(row)[k], v) for k, v in states[label].items())
        torch.testing.assert_close(answers[row], dws(states[label], grid), rtol=FP32_DEEP, atol=FP32_DEEP)
    assert {s for s, label in zip(zoo.properties["split"], zoo.properties["label"], strict=True) if label == 9} == {"test"}
    assert data.provenance["peak"] == 1.0


def test_dwsnets_fashion_with_its_owners_split(tmp_path: Path) -> None:
    splits: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for folder, split, i in (("train", "train", 0), ("train", "val", 1), ("train", "train", 10), ("test", "test", 0)):
        (tmp_path / "src" / folder).mkdir(parents=True, exist_ok=True)
        label: Any = i % 10 if i else torch.tensor(5)
        torch.save({**inr_state(i + 7 * (folder == "test"), SEQ), "label": label}, tmp_path / "src" / folder / f"model_{i}.pth")
        splits[split].append(f"/home/somebody/fmnist_inrs/{folder}/model_{i}.pth")
    (tmp_path / "src" / "splits.json").write_text(json.dumps(splits))
    done = import_zoo(tmp_path / "src", tmp_path / "zoo")
    zoo = load_zoo(tmp_path / "zoo")
    known = {(n, s): v for n, s, v in zip(zoo.properties["image"], zoo.properties["split"], zoo.properties["label"], strict=True)}
    assert (done.rows, known) == (4, {(0, "train"): 5, (1, "val"): 1, (10, "train"): 0, (0, "test"): 5})


def test_dwsnets_splits_in_a_folder_below_and_of_files_called_alike(tmp_path: Path) -> None:
    """Every network's file is ``model_final.pth``; the table of splits names paths of another machine."""
    wanted = {3: "train", 14: "val", 15: "test", 92: "train"}
    splits: dict[str, dict[str, list[str]]] = {split: {"path": [], "label": []} for split in ("train", "val", "test")}
    for image, split in wanted.items():
        folder = tmp_path / "src" / "mnist-inrs" / f"mnist_png_training_4_{image}" / "checkpoints"
        folder.mkdir(parents=True)
        torch.save(inr_state(image, SEQ), folder / "model_final.pth")
        splits[split]["path"].append(f"/data/somebody/mnist-inrs/{folder.parent.name}/checkpoints/model_final.pth")
        splits[split]["label"].append("4")
    (tmp_path / "src" / "mnist-inrs" / "mnist_splits.json").write_text(json.dumps(splits))
    import_zoo(tmp_path / "src", tmp_path / "zoo")
    held = read_manifest(tmp_path / "zoo").properties
    assert dict(zip(held["image"], held["split"], strict=True)) == wanted


@pytest.mark.parametrize("out", [1, 3])
def test_nfn(tmp_path: Path, out: int) -> None:
    names, states = ("net.0.linear", "net.1.linear", "net.2"), {}
    for label, i in ((3, 0), (8, 1), (3, 2)):
        folder = tmp_path / "src" / f"randinit_test_{label}s"
        folder.mkdir(parents=True, exist_ok=True)
        states[i] = inr_state(i, names, out)
        torch.save(states[i], folder / f"net{i}.pth")
    import_zoo(tmp_path / "src", tmp_path / "zoo")
    zoo = load_zoo(tmp_path / "zoo")
    data = dataset_of(tmp_path / "zoo", zoo.architecture)
    axis = torch.linspace(-1, 1, 28 if out == 1 else 32, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)  # torch's order: the row first
    torch.testing.assert_close(data.test_images.double(), grid, rtol=0, atol=FP32_ROUNDING)
    answers = wslfast.batched_forward(zoo.weights, data.test_images, zoo.architecture).double()
    for row, i in enumerate(zoo.properties["image"]):
        s = {k: v.double() for k, v in states[i].items()}
        h = torch.sin(30 * F.linear(grid, s["net.0.linear.weight"], s["net.0.linear.bias"]))
        h = torch.sin(30 * F.linear(h, s["net.1.linear.weight"], s["net.1.linear.bias"]))
        torch.testing.assert_close(answers[row], F.linear(h, s["net.2.weight"], s["net.2.bias"]), rtol=FP32_DEEP, atol=FP32_DEEP)
    assert dict(zip(zoo.properties["image"], zoo.properties["label"], strict=True)) == {0: 3, 1: 8, 2: 3}


# -- CNN Wild Park -------------------------------------------------------------------------------------------------------


class DictConfig:
    """Stands for OmegaConf's: its class is not there when the file is read."""

    def __init__(self, content: Any) -> None:
        self.__dict__["_content"] = {k: _wrapped(v) for k, v in content.items()} if isinstance(content, dict) else [*map(_wrapped, content)]


class AnyNode:
    def __init__(self, value: Any) -> None:
        self._val = value


def _wrapped(value: Any) -> Any:
    return DictConfig(value) if isinstance(value, (dict, list)) else AnyNode(value)


def park_answers(state: dict[str, Tensor], config: dict[str, Any], x: Tensor) -> Tensor:
    """A network of the Wild Park out of its configuration, in float64."""
    functions: dict[str, Any] = {"relu": F.relu, "gelu": F.gelu, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "leaky_relu": F.leaky_relu}
    x, kept = x.double(), []
    for i in range(config["n_layers"]):
        weight, bias = state[f"layers.{i}.weight"].double(), state[f"layers.{i}.bias"].double()
        x = F.conv2d(x, weight, bias, config["stride"][i], config["padding"][i])
        if (source := config["residual"][i]) > -1:
            shared = min(config["channels"][source + 1], config["channels"][i + 1])
            x = x.clone()
            x[:, :shared] += kept[source][:, :shared]
        x = functions[config["activation"][i]](x)
        kept.append(x)
    return F.linear(x.mean((2, 3)), state["fc.weight"].double(), state["fc.bias"].double())


PARK = [
    {"n_layers": 3, "n_classes": 10, "channels": [3, 4, 8, 4], "kernel_size": [3, 5, 3], "stride": [1, 1, 1], "padding": [1, 2, 1],
     "residual": [-1, -1, 0], "activation": ["relu", "gelu", "tanh"]},
    {"n_layers": 2, "n_classes": 10, "channels": [3, 4, 4], "kernel_size": [3, 7], "stride": [1, 1], "padding": [1, 3],
     "residual": [-1, -1], "activation": ["leaky_relu", "sigmoid"]},
]  # fmt: skip


@pytest.mark.parametrize("wrapped", [False, True])
def test_cnn_wild_park(tmp_path: Path, wrapped: bool) -> None:
    torch.manual_seed(0)
    states = {}
    for number in range(4):
        config = PARK[number % 2]
        state = {}
        for i, (a, b) in enumerate(itertools.pairwise(config["channels"])):
            conv = nn.Conv2d(a, b, config["kernel_size"][i])
            state |= {f"layers.{i}.weight": conv.weight.detach(), f"layers.{i}.bias": conv.bias.detach()}  # type: ignore[union-attr]
        fc = nn.Linear(config["channels"][-1], 10)
        state |= {"fc.weight": fc.weight.detach(), "fc.bias": fc.bias.detach()}
        states[number] = state
        folder = tmp_path / "src" / f"NN_tune_trainable_{number}" / "checkpoint_000002"
        folder.mkdir(parents=True)
        last = {"test/acc": 0.1 * number, "test/loss": 2.0, "training_iteration": 2}
        saved = {"model": state, "optimizer": {}, "config": DictConfig(config) if wrapped else config, "iteration": 2, "last_result": last}
        torch.save(saved, folder / "checkpoint.pt")
        (folder.parent / "params.json").write_text(json.dumps({"optimizer": {"lr": 0.1}}))
    done = import_zoo(tmp_path / "src", tmp_path / "zoo")
    assert (done.rows, len(done.architectures)) == (4, 2)
    x, found = torch.randn(2, 3, 32, 32), {}
    for part in load_parts(tmp_path / "zoo").values():
        answers = wslfast.batched_forward(part.weights, x, part.architecture).double()
        for row in range(len(part)):
            number = round(part.properties["test_acc"][row] * 10)
            found[number] = part.properties["epoch"][row]
            assert all(torch.equal(part.state_dict(row)[k], v) for k, v in states[number].items())
            torch.testing.assert_close(answers[row], park_answers(states[number], PARK[number % 2], x), rtol=FP32_DEEP, atol=FP32)
    assert found == dict.fromkeys(range(4), 2)


# -- WeightCLIP ----------------------------------------------------------------------------------------------------------


class Slim(nn.Module):
    """ResNet18Slim by its key names, written down once more."""

    class Block(nn.Module):
        def __init__(self, a: int, b: int, stride: int) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b)
            self.conv2, self.bn2 = nn.Conv2d(b, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b)
            self.shortcut = nn.Sequential()
            if stride != 1 or a != b:
                self.shortcut = nn.Sequential(nn.Conv2d(a, b, 1, stride, bias=False), nn.BatchNorm2d(b))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.bn2(self.conv2(torch.tanh(self.bn1(self.conv1(x))))) + self.shortcut(x))

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        for s in range(1, 5):
            blocks = [Slim.Block(widths[s - 1], widths[s], 1 if s == 1 else 2), Slim.Block(widths[s], widths[s], 1)]
            self.add_module(f"layer{s}", nn.Sequential(*blocks))
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.bn1(self.conv1(x)))
        for s in range(1, 5):
            x = self.get_submodule(f"layer{s}")(x)
        return self.fc(x.mean((2, 3)))


def trial(folder: Path, state: dict[str, Tensor], settings: dict[str, Any], *, config: str = "params.json", bom: bool = False) -> None:
    (folder / "checkpoint_000005").mkdir(parents=True)
    torch.save(state, folder / "checkpoint_000005" / "checkpoints")
    encoding = "utf-8-sig" if bom else "utf-8"
    (folder / config).write_text(json.dumps(settings), encoding=encoding)
    lines = [{"training_iteration": e, "test_acc": e / 10, "val_acc": e / 20, "train_acc": e / 5} for e in range(6)]
    (folder / "result.json").write_text("\n".join(map(json.dumps, lines)), encoding=encoding)


def test_weightclip_resnets(tmp_path: Path) -> None:
    torch.manual_seed(0)
    nets = [Slim(4, 7) for _ in range(2)]
    for i, net in enumerate(nets):
        net(torch.randn(8, 3, 32, 32))
        trial(
            tmp_path / "src" / f"tune_zoo_x{i}", net.state_dict(), {"model::type": "ResNet18Slim", "model::nlin": "tanh", "model::o_dim": 7}
        )
    done = import_zoo(tmp_path / "src", tmp_path / "zoo")
    zoo, x = load_zoo(tmp_path / "zoo"), torch.randn(2, 3, 32, 32)
    assert (done.rows, zoo.architecture.output_shape) == (2, (7,))
    with torch.no_grad():
        expected = torch.stack([net.eval()(x) for net in nets])
    torch.testing.assert_close(wslfast.batched_forward(zoo.weights, x, zoo.architecture), expected, rtol=FP32_AMPLIFIED, atol=FP32_DEEP)


@pytest.mark.parametrize("kind", ["ResNet18Slim", "CNN3"])
def test_the_same_weights_under_several_activations_are_several_networks(tmp_path: Path, kind: str) -> None:
    """Trials of one seed begin from the same numbers, to the bit; the settings tell their functions apart."""
    torch.manual_seed(0)
    net = Slim(2, 5)
    net(torch.randn(8, 3, 32, 32))
    net.eval()
    arch = Architecture.cnn3(3, "tanh", num_classes=5)
    cnn3 = wslfast.Population(arch, arch.initial_weights(["kaiming_uniform"], [0]))
    state = net.state_dict() if kind == "ResNet18Slim" else cnn3.state_dict(0)
    names = {"relu": F.relu, "tanh": torch.tanh, "leakyrelu": F.leaky_relu}
    for name in names:
        trial(tmp_path / "src" / f"tune_zoo_{name}", state, {"model::type": kind, "model::nlin": name, "model::o_dim": 5})
    trial(tmp_path / "src" / "tune_zoo_z_copy", state, {"model::type": kind, "model::nlin": "relu", "model::o_dim": 5})
    done = import_zoo(tmp_path / "src", tmp_path / "zoo")
    assert (done.rows, len(done.architectures), dict(done.skipped)) == (3, 3, {"identical weights": 1})
    x = torch.randn(2, 3, 32, 32)
    for part in load_parts(tmp_path / "zoo").values():
        name = part.properties["activation"][0]
        assert part.properties["name"] == (f"tune_zoo_{name}",)
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            if kind == "ResNet18Slim":
                patch.setattr(torch, "tanh", names[name])  # what Slim calls
                expected = net(x)
            else:
                expected = wslfast.batched_forward(part.weights, x, Architecture.cnn3(3, name, num_classes=5))[0]
        answer = wslfast.batched_forward(part.weights, x, part.architecture)[0]
        torch.testing.assert_close(answer, expected, rtol=FP32_AMPLIFIED, atol=FP32_DEEP)


def test_a_root_with_the_grid_and_the_images_of_its_trials(tmp_path: Path) -> None:
    """``config.json`` and ``dataset.pt`` lie beside the trials, as published zoos have them: the root is no trial."""
    arch = Architecture.cnn(1, "tanh", num_classes=7)
    weights = arch.initial_weights(["uniform"] * 3, [0, 1, 2])
    settings = {"model::type": "CNN", "model::nlin": "tanh", "model::o_dim": 7, "optim::lr": 0.1}
    for i in range(3):
        trial(tmp_path / "src" / f"tune_zoo_{i}", wslfast.Population(arch, weights).state_dict(i), settings)
    (tmp_path / "src" / "config.json").write_text(json.dumps({"model::type": "CNN", "seed": {"grid_search": [0, 1, 2]}}))
    images = torch.utils.data.TensorDataset(torch.rand(14, 1, 28, 28), torch.arange(14) % 7)
    torch.save({"trainset": images, "testset": images}, tmp_path / "src" / "dataset.pt")
    done = import_zoo(tmp_path / "src", tmp_path / "zoo", dataset=tmp_path / "src" / "dataset.pt")
    assert (done.rows, dict(done.skipped)) == (3, {})
    assert torch.equal(load_zoo(tmp_path / "zoo").weights, weights)
    empty = tmp_path / "none"
    empty.mkdir()
    (empty / "config.json").write_text("{}")
    with pytest.raises(WslfastError, match="no checkpoints: 1"):
        import_zoo(empty, tmp_path / "nothing")


def test_right_properties(tmp_path: Path) -> None:
    """Settings under either spelling, config.json, other numbers of classes, dropout, byte-order marks; several activations are one zoo."""
    arches = {}
    for i, (activation, dropout) in enumerate(itertools.product(("relu", "tanh", "sigmoid", "gelu"), (0.0, 0.5))):
        arch = Architecture.cnn(1, activation, dropout, 7)
        state = wslfast.Population(arch, arch.initial_weights(["uniform"], [i])).state_dict(0)
        own = {"lr": 0.1, "weight_decay": 0.2} if i % 2 else {"optim::lr": 0.1, "optim::wd": 0.2, "optim::momentum": 0.9}
        settings = {"model::type": "CNN", "model::nlin": activation, "model::dropout": dropout, "model::o_dim": 7, **own}
        for copy in range(2):
            state = wslfast.Population(arch, arch.initial_weights(["uniform"], [2 * i + copy])).state_dict(0)
            form: dict[str, Any] = {"config": ("params.json", "config.json")[i % 2], "bom": i % 3 == 0}
            trial(tmp_path / "src" / f"tune_zoo_{i}{copy}", state, settings, **form)
        arches[i] = arch
    done = import_zoo(tmp_path / "src", tmp_path / "zoo")
    assert (done.rows, dict(done.skipped), len(done.architectures)) == (16, {}, 8)
    held = read_manifest(tmp_path / "zoo")
    assert set(held.properties["lr"]) == {0.1}
    assert set(held.properties["wd"]) == {0.2}
    assert set(held.properties["test_acc"]) == {0.5}
    assert {(a, d) for a, d in zip(held.properties["activation"], held.properties["dropout"], strict=True)} == set(
        itertools.product(("relu", "tanh", "sigmoid", "gelu"), (0.0, 0.5))
    )
    for part in load_parts(tmp_path / "zoo").values():
        i = int(part.properties["name"][0].removeprefix("tune_zoo_")[0])
        assert part.architecture.same_network(arches[i])
        expected = arches[i].initial_weights(["uniform"] * 2, [2 * i, 2 * i + 1])
        assert torch.equal(part.weights, expected)
