"""Any module as an Architecture: a chain of records, a graph, or run as it is; its record in JSON; bad input."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerances import FP32, FP64_ROUNDING
from torch import Tensor, nn

from wslfast import batched_forward, errors
from wslfast.architecture import Architecture
from wslfast.errors import WslfastError
from wslfast.kernels.layers import Activation, Conv2d, Dropout, Flatten, Linear
from wslfast.population import Population
from wslfast.testing import relative_error
from wslfast.tracing import untraced

# -- from_module: planned ----------------------------------------------------------------------------------------------


class ZooCode(nn.Module):
    """The published form: a ModuleList walked in forward."""

    def __init__(self, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.module_list = nn.ModuleList()
        for a, b in ((3, 16), (16, 32), (32, 15)):
            self.module_list.extend([nn.Conv2d(a, b, 3), nn.MaxPool2d(2, 2), activation or nn.ReLU(), nn.Dropout(0.0)])
        self.module_list.extend([nn.Flatten(), nn.Linear(60, 20), activation or nn.ReLU(), nn.Dropout(0.0), nn.Linear(20, 10)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.module_list:
            x = layer(x)
        return x


class Inspecting(ZooCode):
    """Reads shapes and parameters that its output does not depend on, as the published MLP does."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.module_list:
            _ = x.shape, getattr(layer, "bias", None)
            x = layer(x)
        return x


class Functional(nn.Module):
    """The tutorials' form."""

    def __init__(self, flatten: str) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 3)
        self.fc1, self.fc2 = nn.Linear(12, 7), nn.Linear(7, 5)
        self.how = flatten

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.avg_pool2d(torch.tanh(self.conv2(x)), kernel_size=(1, 2), stride=(1, 2))
        if self.how == "torch.flatten":
            x = torch.flatten(x, 1)
        elif self.how == "flatten":
            x = x.flatten(1)
        elif self.how == "start_dim":
            x = x.flatten(start_dim=1)
        elif self.how == "size":
            x = x.view(x.size(0), -1)
        elif self.how == "shape":
            x = x.reshape(x.shape[0], -1)
        else:
            x = x.view(-1, 12)
        x = F.silu(self.fc1(x)).sigmoid()
        x = F.dropout(x, 0.3, training=self.training)
        return self.fc2(F.leaky_relu(F.gelu(F.elu(x, 0.7), approximate="tanh"), 0.3)).relu()


SEQUENTIAL = nn.Sequential(
    nn.Conv2d(2, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), bias=False), nn.LeakyReLU(0.2),
    nn.Conv2d(6, 4, 3, groups=2, padding="same", dilation=2), nn.AvgPool2d((2, 1), (1, 1)), nn.GELU(approximate="tanh"),
    nn.Conv2d(4, 3, 2, padding="valid"), nn.ELU(0.5), nn.Dropout2d(0.3), nn.Flatten(), nn.CELU(1.3), nn.Identity(),
    nn.Linear(72, 9), nn.SiLU(), nn.Linear(9, 4, bias=False), nn.Sigmoid(),
)  # fmt: skip

NESTED = nn.Sequential(
    OrderedDict(
        body=nn.Sequential(OrderedDict(conv=nn.Conv2d(1, 3, 3), act=nn.Tanh(), inner=nn.Sequential(nn.MaxPool2d(3, 2), nn.Flatten()))),
        head=nn.Linear(27, 2),
    )
)

PLANNED: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "zoo-code": (ZooCode(), (3, 32, 32)),
    "shapes-read": (Inspecting(), (3, 32, 32)),
    "sequential": (SEQUENTIAL, (2, 9, 11)),
    "nested": (NESTED, (1, 9, 9)),
    "shared-activation": (ZooCode(nn.GELU()), (3, 32, 32)),
    "torch.flatten": (Functional("torch.flatten"), (1, 10, 13)),
    "flatten": (Functional("flatten"), (1, 10, 13)),
    "start_dim": (Functional("start_dim"), (1, 10, 13)),
    "view-size": (Functional("size"), (1, 10, 13)),
    "reshape-shape": (Functional("shape"), (1, 10, 13)),
    "view-minus-one": (Functional("view"), (1, 10, 13)),
    "flat-input": (nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), (5,)),
    "flat-input-flattened": (nn.Sequential(nn.Flatten(), nn.Linear(5, 3)), (5,)),
    "double": (nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double(), (3, 2, 2)),
    "frozen": (nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).requires_grad_(False), (3, 2, 2)),
}


def _outputs(module: nn.Module, arch: Architecture, k: int = 3, n: int = 4) -> tuple[Tensor, Tensor]:
    """What wslfast computes, and what the module itself does with the same weights, in float64 (weights loaded by key)."""
    keys = [key for key, t in module.state_dict().items() if t.is_floating_point()]
    weights = torch.randn(k, arch.num_weights, dtype=torch.float64) / 4
    for slot in arch.parameters:
        if slot.name.endswith("running_var"):
            weights[:, slot.offset : slot.stop] = weights[:, slot.offset : slot.stop].abs() + 0.5
    queries = torch.randn(n, *arch.input_shape, dtype=torch.float64)
    outputs = []
    twin = copy.deepcopy(module).double().eval()
    for row in weights:
        state = {s.name: row[s.offset : s.stop].view(s.shape) for s in arch.parameters}
        assert set(state) <= set(keys)
        twin.load_state_dict(state, strict=False)
        outputs.append(twin(queries).detach())
    return batched_forward(weights, queries, arch), torch.stack(outputs)


@pytest.mark.parametrize(("module", "shape"), PLANNED.values(), ids=PLANNED)
def test_chains_are_planned(module: nn.Module, shape: tuple[int, ...]) -> None:
    arch = Architecture.from_module(module, shape)
    assert arch.planned
    assert [(s.name, s.shape) for s in arch.parameters] == [(key, tuple(t.shape)) for key, t in module.state_dict().items()]
    actual, expected = _outputs(module, arch)
    assert relative_error(actual, expected) < FP64_ROUNDING
    assert Architecture.from_dict(json.loads(json.dumps(arch.to_dict()))) == arch


def test_the_published_net_from_its_module() -> None:
    assert Architecture.from_module(ZooCode(), (3, 32, 32), "cnn3") == Architecture.cnn3()


def test_same_padding_record() -> None:
    layer = Architecture.from_module(
        nn.Sequential(nn.Conv2d(1, 1, (3, 5), padding="same", dilation=(2, 1)), nn.Flatten()), (1, 6, 6)
    ).layers[0]
    assert isinstance(layer, Conv2d)
    assert layer.padding == (2, 2)


def test_gelu_tanh_record() -> None:
    arch = Architecture.from_module(nn.Sequential(nn.Linear(2, 2), nn.GELU("tanh"), nn.GELU()), (2,))
    assert [layer.approximate for layer in arch.layers if isinstance(layer, Activation)] == ["tanh", "none"]


# -- from_module: graphs -----------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b((F.relu(self.a(x)) + x).flatten(1))


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)
        self.norm, self.fc = nn.BatchNorm1d(12, affine=False), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.bn(self.conv(x)).relu().flatten(1)))


class Branching(nn.Module):
    """Control flow on values, which no tracer follows; and a scalar parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.scale = nn.Linear(5, 3), nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x) * self.scale
        return y if x.shape[0] > 0 and float(x.sum()) > 1e9 else -y


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc(self.fc(x).relu()).relu())


class AlwaysDropout(nn.Module):
    """Random in evaluation too (of probability zero, so that outputs can be compared)."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.fc, self.p = nn.Linear(5, 3), p

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * F.dropout(torch.ones_like(x[:, :1]), self.p)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.scale = nn.Linear(5, 3), nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.scale


def _tied() -> nn.Module:
    module = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2))
    module[2].weight = module[0].weight
    return module


def _hooked() -> nn.Module:
    module = nn.Sequential(nn.Linear(5, 3), nn.ReLU())
    module[0].register_forward_hook(lambda m, x, y: 2 * y)
    return module


GRAPHS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "residual": (Residual(), (2, 4, 4)),
    "batch-norm": (Norm(), (2, 4, 4)),
    "module-used-twice": (Twice(), (5,)),
    "tied-weights": (_tied(), (5,)),
    "bare-layer": (nn.Linear(5, 3), (5,)),
    "always-dropout": (AlwaysDropout(), (5,)),
    "layer-norm": (nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 2)), (5,)),
    "uneven-same": (nn.Sequential(nn.Conv2d(1, 2, 2, padding="same"), nn.Flatten()), (1, 3, 3)),
    "reflect": (nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), nn.Flatten()), (1, 3, 3)),
    "padded-pool": (nn.Sequential(nn.Conv2d(1, 2, 2), nn.MaxPool2d(2, padding=1), nn.Flatten()), (1, 4, 4)),
    "ceil-pool": (nn.Sequential(nn.Conv2d(1, 2, 2), nn.MaxPool2d(2, ceil_mode=True), nn.Flatten()), (1, 4, 4)),
    "hook": (_hooked(), (5,)),
    "softplus": (nn.Sequential(nn.Linear(5, 3), nn.Softplus()), (5,)),
    "linear-on-images": (nn.Sequential(nn.Linear(4, 3), nn.Flatten()), (2, 3, 4)),
    "transposed": (nn.Sequential(nn.ConvTranspose2d(2, 3, 2), nn.Flatten()), (2, 3, 3)),
    "scalar-parameter": (Scaled(), (5,)),
}
CHAINS = {"bare-layer", "hook", "always-dropout", "softplus"}  # which are plain after all
UNTRACEABLE: dict[str, tuple[nn.Module, tuple[int, ...]]] = {"branching": (Branching(), (5,))}


@pytest.mark.parametrize("name", GRAPHS)
def test_anything_else_is_a_graph_and_computes_the_same(name: str) -> None:
    module, shape = GRAPHS[name]
    arch = Architecture.from_module(module, shape)
    assert arch.graph is not None, arch.reason
    assert not arch.planned or name in CHAINS
    actual, expected = _outputs(module, arch)
    assert relative_error(actual, expected) < FP64_ROUNDING
    assert arch.num_classes == expected.shape[-1]
    again = Architecture.from_dict(json.loads(json.dumps(arch.to_dict(), allow_nan=False)))
    assert again == arch == Architecture.from_module(copy.deepcopy(module), shape) == pickle.loads(pickle.dumps(arch))
    assert hash(again) == hash(arch)


@pytest.mark.parametrize("name", UNTRACEABLE)
def test_what_cannot_be_traced_runs_as_it_is(name: str) -> None:
    module, shape = UNTRACEABLE[name]
    arch = Architecture.from_module(module, shape)
    assert arch.graph is None
    assert "cannot be followed" in arch.reason
    actual, expected = _outputs(module, arch)
    assert relative_error(actual, expected) < FP64_ROUNDING


def test_a_module_that_is_run_as_it_is_is_said_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_said", set())
    arch = Architecture.from_module(Branching(), (5,), "mine")
    with caplog.at_level(logging.INFO, logger="wslfast"):
        for _ in range(3):
            batched_forward(torch.zeros(1, arch.num_weights), torch.zeros(1, 5), arch)
    assert len([r for r in caplog.records if r.name == "wslfast"]) == 1
    assert "'mine'" in caplog.text
    assert "run as a module" in caplog.text
    assert "control flow" in caplog.text


def test_batch_norm_entries() -> None:
    arch = Architecture.from_module(Norm(), (2, 4, 4))
    floats = [key for key in Norm().state_dict() if not key.endswith("num_batches_tracked")]
    assert [s.name for s in arch.parameters] == floats
    assert arch.num_parameters == sum(p.numel() for p in Norm().parameters())
    assert arch.num_weights == arch.num_parameters + 6 + 24


def test_batch_norm_statistics_get_gradients() -> None:
    arch, module = Architecture.from_module(Norm(), (2, 4, 4)), Norm().double().eval()
    weights = torch.cat([t.flatten() for key, t in module.state_dict().items() if key in arch.slots])[None].requires_grad_()
    queries = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    batched_forward(weights, queries, arch).square().sum().backward()
    assert weights.grad is not None
    for key in ("bn.running_mean", "bn.running_var", "norm.running_var"):
        slot, i = arch.slots[key], 1
        moved = weights.detach().clone().repeat(2, 1)
        moved[0, slot.offset + i] += 1e-6
        moved[1, slot.offset + i] -= 1e-6
        up, down = batched_forward(moved, queries, arch).square().sum((1, 2))
        assert float(weights.grad[0, slot.offset + i]) == pytest.approx(float((up - down) / 2e-6), rel=1e-5)  # a finite difference


def test_tied_weights_are_one_entry() -> None:
    module = _tied()
    arch = Architecture.from_module(module, (5,))
    assert arch.num_weights == arch.num_parameters == sum(p.numel() for p in module.parameters())
    population = Population.from_state_dicts(arch, [module.state_dict()])
    assert relative_error(batched_forward(population, torch.ones(2, 5), arch)[0], module(torch.ones(2, 5))) < FP32 / 10
    other = _tied()
    other.load_state_dict(population.state_dict(0))
    assert torch.equal(other[2].weight, module[0].weight)


@pytest.mark.parametrize("name", ["zoo-code", "torch.flatten", "batch-norm", "branching", "tied-weights", "noisy"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_module_is_left_untouched(name: str, training: bool) -> None:
    module, shape = {**PLANNED, **GRAPHS, **UNTRACEABLE, "noisy": (AlwaysDropout(), (5,))}[name]
    module.train(training)
    mixed = next(iter(module.children()))
    mixed.train(not training)
    flags = [m.training for m in module.modules()]
    state = {key: t.clone() for key, t in module.state_dict().items()}
    types = [type(m) for m in module.modules()]
    grads = [(p.requires_grad, p.grad) for p in module.parameters()]
    pointers = [t.data_ptr() for t in module.state_dict().values()]
    rng = torch.get_rng_state()
    Architecture.from_module(module, shape)
    assert torch.equal(rng, torch.get_rng_state())
    assert [m.training for m in module.modules()] == flags
    assert [type(m) for m in module.modules()] == types
    assert [(p.requires_grad, p.grad) for p in module.parameters()] == grads
    assert [t.data_ptr() for t in module.state_dict().values()] == pointers
    assert all(torch.equal(t, state[key]) for key, t in module.state_dict().items())
    module.eval()


def test_the_architecture_is_independent_of_its_module() -> None:
    module = Residual()
    arch = Architecture.from_module(module, (2, 4, 4))
    weights, queries = torch.randn(1, arch.num_weights), torch.randn(2, 2, 4, 4)
    before = batched_forward(weights, queries, arch)
    module.a = nn.Conv2d(2, 2, 1)
    assert torch.equal(before, batched_forward(weights, queries, arch))
    assert arch.module is None
    kept = Architecture.from_module(Branching(), (5,)).module
    assert kept is not None
    assert not kept.training
    assert not any(p.requires_grad for p in kept.parameters())


# -- JSON and bad input ------------------------------------------------------------------------------------------------


def test_the_record_of_a_module_asks_for_it() -> None:
    record = Architecture.from_module(Branching(), (5,), "mine").to_dict()
    untraced._held.clear()  # as in another process
    with pytest.raises(WslfastError, match=r"'mine' cannot be traced .*pass architecture="):
        Architecture.from_dict(json.loads(json.dumps(record)))


FINE = {"kind": "linear", "name": "a", "in_features": 2, "out_features": 2}
HOSTILE: dict[str, Any] = {
    "list": [],
    "none": None,
    "no-shape": {"layers": [FINE]},
    "text-shape": {"input_shape": "333", "layers": [FINE]},
    "negative-shape": {"input_shape": [-2], "layers": [FINE]},
    "bool-shape": {"input_shape": [True], "layers": [FINE]},
    "huge-shape": {"input_shape": [1 << 40], "layers": [FINE]},
    "many-axes": {"input_shape": [1] * 9, "layers": [FINE]},
    "newer": {"input_shape": [2], "layers": [FINE], "version": 3},
    "graph-list": {"input_shape": [2], "graph": []},
    "graph-empty": {"input_shape": [2], "graph": {}},
    "no-layers": {"input_shape": [2]},
    "empty-layers": {"input_shape": [2], "layers": []},
    "layers-object": {"input_shape": [2], "layers": {"0": FINE}},
    "layer-text": {"input_shape": [2], "layers": ["linear"]},
    "unknown-kind": {"input_shape": [2], "layers": [{"kind": "os.system", "name": "x"}]},
    "does-not-fit": {"input_shape": [3], "layers": [FINE]},
    "same-name": {"input_shape": [2], "layers": [FINE, FINE]},
    "zero-stride": {
        "input_shape": [1, 4, 4],
        "layers": [{"kind": "pool2d", "name": "p", "stride": [0, 0]}, {"kind": "flatten", "name": "f"}],
    },
    "no-weights": {"input_shape": [1, 4, 4], "layers": [{"kind": "pool2d", "name": "p"}]},
    "recipe-unknown": {"input_shape": [3, 32, 32], "recipe": ["os.system", {"cmd": "true"}]},
    "recipe-arguments": {"input_shape": [3, 32, 32], "recipe": ["resnet18", {"depth": 3}]},
    "recipe-huge": {"input_shape": [3, 32, 32], "recipe": ["resnet18", {"width": 10**9}]},
    "recipe-zero": {"input_shape": [3, 32, 32], "recipe": ["resnet18", {"width": 0}]},
    "recipe-list": {"input_shape": [3, 32, 32], "recipe": ["resnet18", [3, 10, 64]]},
}


@pytest.mark.parametrize("record", HOSTILE.values(), ids=HOSTILE)
def test_hostile_architecture_record(record: Any) -> None:
    with pytest.raises(WslfastError):
        Architecture.from_dict(record)


def test_no_name_is_fine() -> None:
    assert Architecture.from_dict({"input_shape": [2], "layers": [FINE]}).name == "custom"


class Chosen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).argmax(-1)


WRONG: dict[str, tuple[Any, str]] = {
    "module": (lambda: Architecture.from_module(3, (3,)), r"module: expected a torch.nn.Module, got int"),  # type: ignore[arg-type]
    "module-class": (lambda: Architecture.from_module(nn.Linear, (3,)), r"module: expected a torch.nn.Module, got type"),  # type: ignore[arg-type]
    "shape-axes": (
        lambda: Architecture.from_module(nn.Linear(3, 2), (1,) * 9),
        r"input_shape: expected \(C, H, W\), \(features,\) or other",
    ),
    "shape-none": (lambda: Architecture.from_module(nn.Linear(3, 2), None), r"input_shape: expected"),  # type: ignore[arg-type]
    "shape-int": (lambda: Architecture.from_module(nn.Linear(3, 2), 3), r"input_shape: expected"),  # type: ignore[arg-type]
    "shape-float": (lambda: Architecture.from_module(nn.Linear(3, 2), (3.5,)), r"input_shape: expected"),  # type: ignore[arg-type]
    "shape-zero": (lambda: Architecture.from_layers([Linear("a", 3, 2)], (0,)), r"input_shape: expected"),
    "cannot-run": (lambda: Architecture.from_module(nn.Linear(3, 2), (4,)), r"'Linear': cannot run on \[n, 4\]"),
    "wrong-channels": (lambda: Architecture.from_module(ZooCode(), (1, 32, 32), "z"), r"'z': cannot run on \[n, 1, 32, 32\]"),
    "tuple-output": (
        lambda: Architecture.from_module(nn.LSTM(3, 2), (4, 3)),
        r"expected floating outputs .* got a tuple; name a part of it with output=",
    ),
    "integer-output": (lambda: Architecture.from_module(Chosen(), (5,)), r"expected floating outputs .* got \[4\] int64"),
    "no-forward": (lambda: Architecture.from_module(nn.ModuleDict({"a": nn.Linear(2, 2)}), (5,)), r"cannot run on"),
    "no-parameters": (lambda: Architecture.from_module(nn.Softplus(), (5,)), r"has no parameters"),
    "no-parameters-planned": (lambda: Architecture.from_module(nn.Flatten(), (5, 1, 1)), r"has no parameters"),
    "no-layers": (lambda: Architecture.from_layers([], (5,)), r"has no parameters"),
    "not-a-record": (lambda: Architecture.from_layers([nn.Linear(2, 2)], (2,)), r"layers: expected records"),  # type: ignore[list-item]
    "layer-named": (lambda: Architecture.from_layers([Linear("fc", 3, 2)], (4,)), r"layer 'fc' \(linear\): expected \[3\]"),
    "groups": (lambda: Architecture.from_layers([Conv2d("c", 4, 4, (1, 1), groups=3), Flatten("f")], (4, 1, 1)), r"layer 'c'.*groups"),
    "dropout": (lambda: Architecture.cnn3(dropout=1.5), r"dropout: expected a probability"),
    "dropout-28": (lambda: Architecture.cnn(dropout=-0.5), r"dropout: expected a probability"),
    "dropout-mlp": (lambda: Architecture.mlp(dropout=-0.5), r"dropout: expected a probability"),
    "activation": (lambda: Architecture.cnn3(activation="swish"), r"activation: expected one of .* got 'swish'"),
    "activation-none": (lambda: Architecture.cnn3(activation=None), r"activation: expected one of"),  # type: ignore[arg-type]
    "channels": (lambda: Architecture.cnn3(0), r"channels_in: expected a positive integer, got 0"),
    "channels-float": (lambda: Architecture.cnn3(1.5), r"channels_in: expected a positive integer, got 1.5"),  # type: ignore[arg-type]
    "features": (lambda: Architecture.mlp(0), r"positive integer|from 1 to"),
    "resnet-width": (lambda: Architecture.resnet18(width=0), r"width: expected a positive integer, got 0"),
    "resnet-channels": (lambda: Architecture.resnet18("3"), r"channels_in: expected a positive integer, got '3'"),  # type: ignore[arg-type]
    "initialisation": (lambda: Architecture.cnn3().initial_weights(["he"], [0]), r"initialisation: expected one of .* got 'he'"),
    "seeds": (lambda: Architecture.cnn3().initial_weights(["normal"], [0, 1]), r"1 initialisations for 2 seeds"),
    "module-init": (lambda: Architecture.from_module(Branching(), (5,)).initial_weights(["normal"], [0]), r"cannot be traced"),
}


@pytest.mark.parametrize(("call", "words"), WRONG.values(), ids=WRONG)
def test_bad_arguments(call: Any, words: str) -> None:
    with pytest.raises(WslfastError, match=words):
        call()


def test_an_architecture_is_a_value() -> None:
    assert Architecture.cnn3() == Architecture.cnn3()
    assert hash(Architecture.cnn3()) == hash(Architecture.cnn3())
    assert Architecture.cnn3() != Architecture.cnn3(activation="tanh")
    with pytest.raises(AttributeError):
        Architecture.cnn3().name = "other"  # type: ignore[misc]


def test_dropout_records_keep_p() -> None:
    assert [layer.p for layer in Architecture.lenet5(dropout=0.25).layers if isinstance(layer, Dropout)] == [0.25] * 4
