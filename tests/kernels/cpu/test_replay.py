"""Recordings: what replays gives the bits of the call itself on other numbers, what cannot be replayed is run, and nobody shares memory."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from functools import partial

import numpy as np
import pytest
import torch
from field_images import IMAGES
from field_sequences import SEQUENCES
from field_spectra import SPECTRA
from field_vectors import VECTORS
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import wslfast
from wslfast import engine
from wslfast.kernels.cpu import recording, replay
from wslfast.kernels.stacked import company
from wslfast.kernels.stacked import engine as stacked

K, N = 3, 5


@pytest.fixture(autouse=True)
def _nothing_seen(monkeypatch):
    monkeypatch.setattr(replay, "_kept", replay._Kept())


def _call(run, *inputs):
    return replay.run_or_replay(run, run, lambda *_: False, *inputs)


def _same(a, b) -> bool:
    return all(map(recording._same_bits, a, b))


def _recordings() -> list[recording.Recording]:
    return [free for known in replay._kept.kinds.values() for free in known.free]


def _plain(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    total = torch.zeros(3)
    total += x.transpose(0, 1).sum(1)
    total[0] = 7
    kept = torch.empty_like(x)
    torch.mul(x, y, out=kept)
    return total.clone(), torch.cat([kept.exp_(), y.view(-1, 3)], 1, out=torch.empty(2, 6))


def test_a_replay_is_the_call_on_other_numbers():
    for seed in range(5):
        torch.manual_seed(seed)
        x, y = torch.randn(2, 3), torch.randn(2, 3)
        made = _call(_plain, x, y)
        assert _same(made, _plain(x, y))
        assert len(_recordings()) == (1 if seed >= 1 else 0)


def test_recordings_have_to_be_worth_it():
    """A few are made at once; later ones when earlier ones were replayed, or where their kind is called often."""
    sizes = range(2, 2 + replay._FREE)
    for n in sizes:
        for _ in range(2):
            _call(_plain, torch.randn(n, 3), torch.randn(n, 3))
    assert len(_recordings()) == replay._FREE
    x, y = torch.randn(50, 3), torch.randn(50, 3)
    for calls in range(1, replay._OFTEN + 1):
        assert _same(_call(_plain, x, y), _plain(x, y))
        assert len(_recordings()) == replay._FREE + (calls == replay._OFTEN)
    for _ in range(replay._EARNED * 2):
        _call(_plain, x, y)
    before = len(_recordings())
    for _ in range(2):
        _call(_plain, torch.randn(60, 3), torch.randn(60, 3))
    assert len(_recordings()) == before + 1


def test_results_stay_what_they_were():
    calls = [(torch.full((2, 3), float(i)), torch.ones(2, 3)) for i in range(4)]
    made = [_call(_plain, *inputs) for inputs in calls]
    assert all(_same(results, _plain(*inputs)) for results, inputs in zip(made, calls, strict=True))


def test_inputs_are_not_kept():
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    for _ in range(3):
        _call(_plain, x, y)
    wanted = _plain(x, y)
    x.zero_()
    assert not _same(_call(_plain, x, y), wanted)
    assert _same(_call(_plain, x, y), _plain(x, y))


def _decides(x: Tensor) -> tuple[Tensor, ...]:
    return (x * 2 if float(x.sum()) > 0 else x * 3,)


def _counts(x: Tensor) -> tuple[Tensor, ...]:
    return (x.new_full((), len((x > 0).nonzero().tolist())),)


def _large(x: Tensor) -> tuple[Tensor, ...]:
    """Nothing in both trials, and much in a later call."""
    return (x[x > 100].sum() + x.sum(),)


def _draws(x: Tensor) -> tuple[Tensor, ...]:
    return (x + torch.rand(x.shape, generator=torch.Generator().manual_seed(0)),)


def _moved(x: Tensor) -> tuple[Tensor, ...]:
    return (x.clone().resize_(3, 3).fill_(1),)


def _itself(x: Tensor) -> tuple[Tensor, ...]:
    return (x.view(-1),)


def _elsewhere(x: Tensor) -> tuple[Tensor, ...]:
    return (torch.from_numpy(np.exp(x.numpy())) + 1,)


_KEPT = torch.zeros(2, 3)


def _kept(x: Tensor) -> tuple[Tensor, ...]:
    _KEPT.numpy()[:] = x.numpy()
    return (_KEPT + x,)


def _told(x: Tensor) -> tuple[Tensor, ...]:
    with torch._C.DisableTorchFunction():
        return (x * x.tolist()[0][0],)


REFUSED = {
    "decides": (_decides, "returns no tensor"),
    "counts": (_counts, "its numbers say"),
    "as many as there are": (_large, "its numbers say"),
    "draws": (_draws, "random"),
    "other memory": (_moved, "no plain tensor"),
    "its own input": (_itself, "elsewhere"),
    "numpy": (_elsewhere, "numpy"),
    "kept by numpy": (_kept, "numpy"),
    "told behind our back": (_told, "other bits"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_replayed_is_run(name):
    run, reason = REFUSED[name]
    x = torch.randn(2, 3)
    made = recording.record(run, [x])
    assert isinstance(made, str)
    assert reason in made
    for i in range(4):
        assert _same(_call(run, x * (-1) ** i), run(x * (-1) ** i))
    assert not _recordings()


def test_a_recording_that_misses_an_operator_is_not_used(monkeypatch):
    noted = recording._Recorder._note

    def forgets(self, func, args, kwargs, result):
        if func.overloadpacket.__name__ != "exp_":
            noted(self, func, args, kwargs, result)

    monkeypatch.setattr(recording._Recorder, "_note", forgets)
    assert recording.record(_plain, [torch.zeros(2, 3), torch.zeros(2, 3)]) == "its replay gives other bits"


def _graph(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """A gradient that torch computes, behind a view that moves its axes in place."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        made = leaf.clone().t_().contiguous().t() * y
        (slope,) = torch.autograd.grad(made.square().sum(), leaf)
    return slope, made.detach() + torch.tensor([1.0, 2.0, 3.0])


@pytest.mark.parametrize("graphs", [False, True])
def test_a_gradient_of_torch_is_replayed(graphs):
    with torch.set_grad_enabled(graphs):
        for _ in range(4):
            x, y = torch.randn(2, 3), torch.randn(2, 3)
            made = _call(_graph, x, y)
            assert _same(made, _graph(x, y))
            assert not any(t.requires_grad for t in made)
    assert len(_recordings()) == 1


def test_errors_are_those_of_the_call():
    def run(x: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        return (x.gather(1, labels.unsqueeze(1)) * 2,)

    good, bad = torch.tensor([0, 2]), torch.tensor([0, 3])
    for labels in (good, good, good):
        _call(run, torch.randn(2, 3), labels)
    assert len(_recordings()) == 1
    with pytest.raises(RuntimeError, match="out of bounds"):
        _call(run, torch.randn(2, 3), bad)
    x = torch.randn(2, 3)
    assert _same(_call(run, x, good), run(x, good))


def test_a_call_that_fails_once_is_recorded_later():
    def run(x: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        return (x.gather(1, labels.unsqueeze(1)) * 2,)

    good, bad, x = torch.tensor([0, 2]), torch.tensor([0, 3]), torch.randn(2, 3)
    for failures, recordings in ((2, 1), (3, 0)):
        replay._kept.kinds.clear()
        _call(run, x, good)
        for _ in range(failures):
            with pytest.raises(RuntimeError, match="out of bounds"):
                _call(run, x, bad)
        for _ in range(3):
            assert _same(_call(run, x, good), run(x, good))
        assert len(_recordings()) == recordings


def test_recordings_of_a_kind_that_was_forgotten_are_not_kept(monkeypatch):
    monkeypatch.setattr(replay, "_KINDS", 1)
    kept, made = replay._Kept(), recording.record(_plain, [torch.ones(2, 3), torch.ones(2, 3)])
    assert isinstance(made, recording.Recording)
    kind, _, _ = kept.take("a kind", object())
    kept.take("another", object())
    again, _, _ = kept.take("a kind", object())
    kept.give(kind, made, new=True)
    assert again is not kind
    assert not kind.free
    assert not again.free
    assert again.bytes == 0


def test_every_thread_has_memory_of_its_own():
    results: dict[int, list] = {}
    inputs = {i: torch.full((2, 3), float(i)) for i in range(4)}
    ones = torch.ones(2, 3)

    def work(i: int) -> None:
        results[i] = [_call(_plain, inputs[i], ones) for _ in range(50)]

    threads = [threading.Thread(target=work, args=(i,)) for i in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(_same(made, _plain(inputs[i], ones)) for i, every in results.items() for made in every)
    assert 1 <= len(_recordings()) <= len(threads)


def test_two_threads_at_once_have_two_recordings(monkeypatch):
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    for _ in range(2):
        _call(_plain, x, y)
    both, replayed, seen = threading.Barrier(2, timeout=60), recording.Recording.into, []

    def meet(self, *arguments):
        if replay._here.busy:  # a new one is held against the call
            return replayed(self, *arguments)
        both.wait()
        seen.append(self)
        made = replayed(self, *arguments)
        both.wait()
        return made

    monkeypatch.setattr(recording.Recording, "into", meet)
    inputs = {i: torch.full((2, 3), float(i)) for i in range(2)}
    results: dict[int, list] = {}
    threads = [threading.Thread(target=lambda i=i: results.update({i: [_call(_plain, inputs[i], y) for _ in range(5)]})) for i in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    monkeypatch.undo()
    assert len(set(seen)) == 2
    assert all(a is not b for a, b in zip(seen[::2], seen[1::2], strict=True))
    assert all(_same(made, _plain(inputs[i], y)) for i, every in results.items() for made in every)


def test_kinds_that_were_driven_out_are_run(monkeypatch):
    """Or recordings would be made for ever, each in the place of the next."""
    monkeypatch.setattr(replay, "ALL_BYTES", 5000)
    recorded = []
    monkeypatch.setattr(replay, "record", lambda *arguments: recorded.append(1) or recording.record(*arguments))
    run = lambda x: (x * 2 + 1,)  # noqa: E731
    for _ in range(10):
        for n in range(100, 105):
            x = torch.randn(n)
            assert _same(_call(run, x), run(x))
    assert len(recorded) == 5
    assert 0 < sum(r.bytes for r in _recordings()) <= 5000


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_forked_process_runs():
    """OpenMP's threads do not survive a fork, and whatever is shared out among them waits for ever."""
    code = """
import os, sys, torch, wslfast
from wslfast import engine
architecture = wslfast.Architecture.mlp(64, (32,), 10)
weights, x, y = torch.randn(8, architecture.num_weights), torch.randn(64, 64), torch.randn(8, 64, 10)
wanted = engine.loss_and_gradient(weights, x, y, architecture, "mse")
child = os.fork()
if child == 0:
    made = [engine.loss_and_gradient(weights, x, y, architecture, "mse") for _ in range(4)]
    os._exit(0 if all((m[1].numpy() == wanted[1].numpy()).all() for m in made) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, timeout=120, check=False).returncode == 0


def _convolved(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """Two results that torch puts into memory of its own, views of both, a place that is written over, and one that is returned."""
    made = torch.nn.functional.conv2d(x, w)
    part = made[:, :, 1:, 1:]
    part.mul_(2)
    again = torch.nn.functional.conv2d(made.flip(1), w)
    again.add_(made.mean())
    return again.transpose(1, 2).sum(1), again


def test_memory_that_torch_makes_is_given_back(monkeypatch):
    monkeypatch.setattr(recording, "_LOOSE", 1)
    shapes = (2, 3, 8, 8), (3, 3, 3, 3)
    x, w = map(torch.randn, shapes)
    held = recording.record(_convolved, [x, w])
    assert isinstance(held, recording.Recording)
    kept = []
    for _ in range(3):
        x, w = map(torch.randn, shapes)
        kept.append((held(x, w), _convolved(x, w)))
    assert all(_same(made, wanted) for made, wanted in kept)
    monkeypatch.setattr(recording, "_LOOSE", 1 << 30)
    copied = recording.record(_convolved, [x, w])
    assert isinstance(copied, recording.Recording)
    assert copied.bytes > held.bytes
    assert _same(copied(x, w), _convolved(x, w))


def test_a_call_inside_of_a_recorded_one_is_part_of_it():
    def outer(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return (_call(_plain, x, y)[0] * 2,)

    x, y = torch.randn(2, 3), torch.randn(2, 3)
    for _ in range(6):
        assert _same(_call(outer, x, y), (_plain(x, y)[0] * 2,))
    assert len(_recordings()) == 1


def test_what_is_kept_has_bounds(monkeypatch):
    monkeypatch.setattr(replay, "ALL_BYTES", 3 * 4096)
    run = lambda x: (x * 2 + 1,)  # noqa: E731
    for n in range(1, 9):
        for _ in range(3):
            _call(run, torch.ones(100, n))
        assert sum(r.bytes for r in _recordings()) <= 3 * 4096
    assert _recordings()
    monkeypatch.setattr(replay, "_KINDS", 4)
    for n in range(1, 20):
        _call(run, torch.ones(n))
    assert len(replay._kept.kinds) <= 4


def test_large_calls_are_run(monkeypatch):
    monkeypatch.setattr(recording, "MOST_BYTES", 4096)
    assert "takes more than" in recording.record(lambda x: (x.repeat(1, 40) + 1,), [torch.zeros(4, 10)])
    monkeypatch.setattr(replay, "_INPUT", 1024)
    for _ in range(3):
        _call(lambda x: (x + 1,), torch.zeros(4000))
    assert not replay._kept.kinds


def test_settings_are_part_of_the_kind():
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    for _ in range(3):
        _call(_plain, x, y)
    kinds = len(replay._kept.kinds)
    with torch.backends.mkldnn.flags(enabled=False):
        _call(_plain, x, y)
    assert len(replay._kept.kinds) == kinds + 1
    before = len(_recordings())
    with torch.device("cpu"), pytest.MonkeyPatch.context() as patch:  # a mode looks on
        patch.setattr(recording.Recording, "into", lambda *_: pytest.fail("replayed"))
        assert _same(_call(_plain, x, y), _plain(x, y))
    assert len(_recordings()) == before


def test_a_checkpoint_counts_the_same_before_and_after():
    make, shape = VECTORS["mlp_with_batch_norm"]  # a part of it runs through torch's own graph
    models = [make().eval() for _ in range(K)]
    architecture = wslfast.Architecture.from_module(models[0], shape)
    rows = wslfast.Population.from_state_dicts(architecture, [model.state_dict() for model in models]).weights
    x, targets = torch.randn(N, *shape), torch.randn(K, N, *architecture.output_shape)
    loss = partial(wslfast.batched_behavioral_loss, original=None, queries=x, architecture=architecture, targets=targets)
    slopes = []
    for checkpointed in (True, True, True, False, False, False, True):
        leaf = rows.clone().requires_grad_()
        value = checkpoint(lambda leaf: loss(leaf * 1), leaf, use_reentrant=False) if checkpointed else loss(leaf * 1)
        slopes += torch.autograd.grad(value, leaf)
    assert all(_same([slope], slopes[:1]) for slope in slopes)
    assert len(_recordings()) == 1 or torch.get_num_threads() > 1  # whose calls may be spread over threads


def test_inference_mode_before_and_after():
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    for inference in (True, True, True, False, True):
        with torch.inference_mode(inference):
            made = _call(_plain, x, y)
        assert _same(made, _plain(x, y))
        assert made[0].is_inference() == inference
    assert len(_recordings()) == 1


PLAIN = replay._small_and_plain
NETWORKS = {**IMAGES, **VECTORS, **SEQUENCES, **SPECTRA}
RUN = {"every_activation"}  # torch's RReLU makes noise in evaluation mode, too


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_losses_of_the_field_are_those_of_the_call(name, own, monkeypatch):
    monkeypatch.setattr(recording, "MOST_BYTES", 64 << 20)
    monkeypatch.setattr(recording, "_BORROWED", 1 if own else recording._BORROWED)  # inputs and results where the caller has them, or not
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    models = [make().eval() for _ in range(K)]
    for model in models:
        model(_queries(name, 1, shape))  # some learn their shapes from the first batch
    try:
        architecture = wslfast.Architecture.from_module(models[0], shape)
    except wslfast.WslfastError:
        pytest.skip("its output has several parts")
    if architecture.graph is None:
        pytest.skip("it is not traced")
    rows = wslfast.Population.from_state_dicts(architecture, [model.state_dict() for model in models]).weights
    loss = partial(engine.loss_and_gradient, architecture=architecture, criterion="huber")
    for seed in range(4):
        torch.manual_seed(seed)
        x = _queries(name, K * N, shape).unflatten(0, (K, N)) if own else _queries(name, N, shape)
        weights = rows * (1 + 0.1 * seed)
        targets = torch.randn(K, N, *architecture.output_shape)
        made, outputs = loss(weights, x, targets), engine.forward(weights, x, architecture)
        replay._here.busy = True  # runs
        wanted, expected = loss(weights, x, targets), engine.forward(weights, x, architecture)
        replay._here.busy = False
        assert _same(made, wanted)
        assert _same([outputs], [expected])
    if torch.get_num_threads() == 1 and name not in RUN:
        assert len(_recordings()) == 2  # of the loss, and of the outputs


FEW = ("zoo_cnn_with_batch_norm", "ResNet", "every_pooling", "siren", "mlp_with_batch_norm", "LstmClassifier", "VisionTransformer")


@pytest.mark.parametrize("own", ["shared", "own", "index"])
@pytest.mark.parametrize("name", FEW)
def test_groups_are_replayed_one_by_one(name, own, monkeypatch):
    """Groups of four models, the last one not full; each thread has its own recording."""
    monkeypatch.setattr(stacked, "group_shape", lambda graph, n: (4, n))
    monkeypatch.setattr(company, "_split", {})
    monkeypatch.setattr(recording, "_BORROWED", recording._BORROWED if own == "index" else 1)
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    models = [make().eval() for _ in range(11)]
    for model in models:
        model(torch.randn(1, *shape))
    architecture = wslfast.Architecture.from_module(models[0], shape)
    rows = wslfast.Population.from_state_dicts(architecture, [model.state_dict() for model in models]).weights
    replayed, into = [], recording.Recording.into
    monkeypatch.setattr(recording.Recording, "into", lambda self, *arguments: replayed.append(self) or into(self, *arguments))
    for seed in range(4):
        torch.manual_seed(seed)
        x = torch.randn(*((11,) if own == "own" else ()), N, *shape)
        index = torch.randint(N, (11, N)) if own == "index" else None
        weights, targets = rows * (1 + 0.1 * seed), torch.randn(11, N, *architecture.output_shape)
        calls = [partial(engine.loss_and_gradient, weights, x, targets, architecture, "mse", index=index, backend="torch")]
        calls += [] if own == "index" else [lambda x=x, weights=weights: (engine.forward(weights, x, architecture, backend="torch"),)]
        made = [call() for call in calls]
        monkeypatch.setattr(replay, "_small_and_plain", lambda inputs: False)  # runs
        wanted = [call() for call in calls]
        monkeypatch.setattr(replay, "_small_and_plain", PLAIN)
        assert all(map(_same, made, wanted))
    assert len(replayed) >= 2 * len(calls) * 2  # of the last two calls at least, all groups that one thread takes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inference_mode_changes_no_gradient(dtype):
    """Some paths go through torch's graph, and there is none in that mode."""
    make, shape = NETWORKS["zoo_cnn_with_batch_norm"]
    architecture = wslfast.Architecture.from_module(make().eval(), shape)
    weights, x = torch.rand(3, architecture.num_weights, dtype=dtype), torch.randn(N, *shape, dtype=dtype)
    targets = torch.randn(3, N, *architecture.output_shape, dtype=dtype)
    wanted = engine.loss_and_gradient(weights, x, targets, architecture, "mse")
    assert wanted[1].abs().max() > 0
    for _ in range(4):
        with torch.inference_mode():
            made = engine.loss_and_gradient(weights.clone(), x, targets, architecture, "mse")
        assert _same(made, wanted)


def test_autocast_of_the_caller_is_that_of_its_groups(monkeypatch):
    """A thread that takes a group knows nothing of it."""
    monkeypatch.setattr(stacked, "group_shape", lambda graph, n: (4, n))
    monkeypatch.setattr(company, "_split", {})
    make, shape = NETWORKS["siren"]
    architecture = wslfast.Architecture.from_module(make().eval(), shape)
    weights, x = torch.randn(9, architecture.num_weights), torch.randn(N, *shape)
    targets = torch.randn(9, N, *architecture.output_shape)
    loss = partial(engine.loss_and_gradient, weights, x, targets, architecture, "mse", backend="torch")
    for _ in range(4):
        plain = loss()
    for _ in range(4):
        with torch.autocast("cpu", torch.bfloat16):
            cast = loss()
        assert not _same(plain, cast)


def test_engines_of_one_graph_have_recordings_of_their_own():
    make, shape = IMAGES["zoo_cnn_with_batch_norm"]
    models = [make().eval() for _ in range(K)]
    architecture = wslfast.Architecture.from_module(models[0], shape)
    rows = wslfast.Population.from_state_dicts(architecture, [model.state_dict() for model in models]).weights
    x, targets = torch.randn(N, *shape), torch.randn(K, N, *architecture.output_shape)
    loss = partial(engine.loss_and_gradient, rows, x, targets, architecture, "mse")
    for _ in range(4):
        made = {backend: loss(backend=backend) for backend in ("auto", "torch")}
    replay._here.busy = True  # runs
    wanted = {backend: loss(backend=backend) for backend in ("auto", "torch")}
    replay._here.busy = False
    assert not _same(wanted["auto"], wanted["torch"])  # they are two engines
    assert all(_same(made[backend], wanted[backend]) for backend in wanted)


def _queries(name: str, n: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randint(0, 3, (n, *shape)).float() if name == "LanguageModel" else torch.randn(n, *shape)


def test_operators_are_called_by_the_shortest_way():
    """Numbers of Python's are tensors by then, and no operator is looked up by its arguments."""

    def run(x, g):
        y = (x * 2).tanh()
        return (torch.ops.aten.tanh_backward(g / 3, y).add_(0.5).sub(1, alpha=2), y)

    inputs = torch.randn(2, 5, 7).unbind()
    kept = recording.record(run, inputs)
    assert isinstance(kept, recording.Recording)
    others = torch.randn(2, 5, 7).unbind()
    for made, wanted in zip(kept(*others), run(*others), strict=True):
        assert torch.equal(made, wanted)
    for step in kept._steps:
        assert not isinstance(step.func, torch._ops.OpOverloadPacket)
    scaled = [step for step in kept._steps if getattr(step.func, "__name__", "") in ("mul", "div", "add_")]
    assert [type(step.args[1]) for step in scaled] == [torch.Tensor] * 3


def test_a_default_device_is_not_asked_for_numbers():
    inputs = torch.randn(2, 5, 7).unbind()
    try:
        torch.set_default_device("meta")
        kept = recording.record(lambda x, g: ((x * 2).add_(g / 3),), inputs)
    finally:
        torch.set_default_device(None)
    assert isinstance(kept, recording.Recording), kept
    assert torch.equal(kept(*inputs)[0], (inputs[0] * 2).add_(inputs[1] / 3))
