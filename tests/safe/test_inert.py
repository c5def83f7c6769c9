"""Files of torch.save, read without running anything: lying, damaged and arbitrary ones."""

from __future__ import annotations

import contextlib
import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pickled import Calls, as_archive, honest_file
from torch import nn

from wslfast import WslfastError
from wslfast.safe.inert import InertFile, StoredTensor, Stub


def _tensor_program(size: tuple[int, ...], stride: tuple[int, ...], numel: int, offset: int = 0, kind: str = "FloatStorage") -> bytes:
    """The pickle of one tensor with whatever numbers."""

    class Machine(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", getattr(torch, kind, kind), "0", "cpu", numel) if value is storage else None

    storage = object.__new__(_Token)
    out = io.BytesIO()
    Machine(out, protocol=2).dump({"w": Calls(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, OrderedDict())})
    return out.getvalue()


class _Token:
    pass


@pytest.mark.parametrize(
    ("size", "stride", "numel", "offset", "held"),
    [
        ((4,), (1,), 3, 0, 12), ((2,), (5,), 4, 0, 16), ((1 << 40,), (0,), 4, 0, 16), ((2, 2), (2,), 4, 0, 16), ((-1,), (1,), 4, 0, 16),
        ((4,), (1,), 4, 1, 16), ((4,), (-1,), 4, 3, 16), ((4,), (1,), 4, 0, 12), ((4,), (1,), 1 << 50, 0, 16), ((1 << 62, 4), (0, 1), 4, 0, 16),
    ],
)  # fmt: skip
def test_views_that_lie_are_refused(tmp_path: Path, size: Any, stride: Any, numel: int, offset: int, held: int) -> None:
    (tmp_path / "x.pt").write_bytes(as_archive(_tensor_program(size, stride, numel, offset), {"0": bytes(held)}))
    with InertFile(tmp_path / "x.pt") as opened, pytest.raises(WslfastError):
        opened.root["w"].tensor()


def test_an_honest_view_is_read(tmp_path: Path) -> None:
    numbers = torch.arange(12.0)
    (tmp_path / "x.pt").write_bytes(as_archive(_tensor_program((2, 3), (1, 4), 12, 1), {"0": numbers.numpy().tobytes()}))
    with InertFile(tmp_path / "x.pt") as opened:
        assert torch.equal(opened.root["w"].tensor(), numbers.as_strided((2, 3), (1, 4), 1))


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool], ids=str
)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "stream"])
def test_every_dtype_and_any_stride(tmp_path: Path, dtype: torch.dtype, zipped: bool) -> None:
    x = torch.randint(0, 2, (3, 4)).to(dtype)
    content = {
        "plain": x,
        "turned": x.t(),
        "part": x[1:, ::2],
        "scalar": x[0, 0],
        "none": x[:0],
        "parameter": nn.Parameter(x) if dtype.is_floating_point else x,
    }
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    with InertFile(tmp_path / "x.pt") as opened:
        for name, value in content.items():
            assert isinstance(opened.root[name], StoredTensor)
            assert torch.equal(opened.root[name].tensor(), value.detach()), name


def test_a_memo_index_costs_no_memory(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(as_archive(b"\x80\x02]r\xff\xff\xff\xff."))  # LONG_BINPUT at 2^32 - 1
    with InertFile(tmp_path / "x.pt") as opened:
        assert opened.root == []


def test_a_compressed_bomb_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"]" * 10_000_000 + b".")
    with pytest.raises(WslfastError, match="larger than the file"):
        InertFile(tmp_path / "x.pt")


def _read_all(value: Any) -> Any:
    if isinstance(value, StoredTensor):
        return value.tensor()
    if isinstance(value, dict):
        return {str(k)[:50]: _read_all(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_read_all(v) for v in value]
    return repr(value)[:50] if isinstance(value, Stub) else value


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "stream"])
@settings(max_examples=300)
@given(st.data())
def test_damaged_files_raise_nothing_else(tmp_path: Path, zipped: bool, data: st.DataObject) -> None:
    content = bytearray(honest_file(zipped))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "x.pt").write_bytes(content[: data.draw(st.integers(1, len(content)))] if data.draw(st.booleans()) else content)
    with contextlib.suppress(WslfastError), InertFile(tmp_path / "x.pt") as opened:
        _read_all(opened.root)


@settings(max_examples=300)
@given(st.binary(max_size=200), st.sampled_from([b"", b"\x80\x02", b"\x80\x04\x95"]))
def test_any_program_raises_nothing_else(tmp_path: Path, program: bytes, start: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(as_archive(start + program))
    with contextlib.suppress(WslfastError), InertFile(tmp_path / "x.pt") as opened:
        _read_all(opened.root)


def test_a_stream_storage_larger_than_the_file(tmp_path: Path) -> None:
    data = honest_file(False)
    count = struct.pack("<q", 6)
    at = data.rindex(count)
    (tmp_path / "x.pt").write_bytes(data[:at] + struct.pack("<q", 1 << 40) + data[at + 8 :])
    with pytest.raises(WslfastError):
        InertFile(tmp_path / "x.pt")


@pytest.mark.parametrize("use", [b"}" + b"%bNs", b"(%bNd", b"\x8f(%b\x90", b"(%b\x91"], ids=["setitem", "dict", "additems", "frozenset"])
def test_a_key_of_nested_tuples_is_refused_at_once(tmp_path: Path, use: bytes) -> None:
    deep = b")" + b"2\x86" * 100  # t = (t, t), a hundred times: hashing it would outlive the machine
    (tmp_path / "x.pt").write_bytes(as_archive(b"\x80\x04" + use % deep + b"."))
    with pytest.raises(WslfastError, match="key of nested tuples"):
        InertFile(tmp_path / "x.pt")
