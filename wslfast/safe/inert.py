"""Reading what ``torch.save`` wrote without running any of it.

A pickle is a program: ``REDUCE`` calls whatever the file names. Here nothing of the file is ever imported or called. Tensors and plain
containers are rebuilt, every other class becomes a :class:`Stub` that remembers its name and what it was made of, and storages are
read one by one, when a tensor is asked for, after its size and strides have been checked against them. Both forms of ``torch.save``
are read: the zip archive (torch >= 1.6) and the older stream of pickles. Nothing is unpacked to disk.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch
from torch import Tensor

from ..errors import WslfastError, require

_LONGEST_PROGRAM = 256 << 20  # bytes of pickle; tensors are not among them
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of the stream form
_STORAGES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16, "CharStorage": torch.int8,
    "ByteStorage": torch.uint8, "BoolStorage": torch.bool, "UntypedStorage": torch.uint8,
}  # fmt: skip
_PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state", "torch.nn.parameter.Parameter")
_Read = Callable[["_Storage"], bytearray]


class Stub:
    """An object of a class that is not known here: its name, and what the file would have made it of."""

    def __init__(self, kind: str, arguments: tuple[Any, ...] = ()) -> None:
        self.kind, self.arguments = kind, arguments
        self.state: Any = None
        self.items: list[Any] = []

    def attribute(self, name: str, default: Any = None) -> Any:
        """What the object would have had under this name."""
        states = self.state if isinstance(self.state, tuple) else (self.state,)
        return next((s[name] for s in states if isinstance(s, dict) and name in s), default)

    def __repr__(self) -> str:
        return f"<{self.kind}>"


class _Name:
    """A class or function that the file names; never looked up."""

    def __init__(self, kind: str) -> None:
        self.kind = kind


class Ordered(dict[Any, Any]):
    """What an ``OrderedDict`` or ``defaultdict`` of the file becomes."""


@dataclass(frozen=True)
class _Storage:
    kind: str
    key: str
    numel: int


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor of the file, not read yet."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    read: _Read

    @property
    def num_bytes(self) -> int:
        """What its whole storage takes."""
        return self.storage.numel * _width(self.storage)

    def tensor(self) -> Tensor:
        """The numbers, in memory of their own. Raises WslfastError for a view that leaves its storage."""
        view = self.within(self.read)
        return view if view.numel() == self.storage.numel else view.clone()  # a small part does not keep a large storage alive

    def within(self, read: _Read) -> Tensor:
        """The numbers, in the memory that ``read(storage)`` gives."""
        dtype = _STORAGES.get(self.storage.kind)
        require(dtype is not None, f"storage of unknown kind {self.storage.kind!r:.60}")
        whole = all(type(v) is int and 0 <= v < 1 << 62 for v in (self.offset, self.storage.numel, *self.shape, *self.stride))
        require(whole and len(self.shape) == len(self.stride) <= 16, "a tensor whose shape is not one")
        numel = math.prod(self.shape)
        reach = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True)) + 1 if numel else 0
        require(
            numel <= self.storage.numel and reach <= self.storage.numel,
            f"a tensor {list(self.shape)} that leaves its storage of {self.storage.numel} numbers",
        )
        assert dtype is not None
        if numel == 0:
            return torch.empty(self.shape, dtype=dtype)
        return torch.frombuffer(read(self.storage), dtype=dtype).as_strided(self.shape, self.stride, self.offset)


# The pure-Python one: its memo is a dict, whatever index a file claims. Any, since type stubs know little of it and differ in what.
_PurePython: Any = pickle._Unpickler  # type: ignore[attr-defined]


class _Machine(_PurePython):
    """Pickle's stack machine with every door to running code closed."""

    dispatch: ClassVar[dict[int, Any]] = dict(_PurePython.dispatch)

    def __init__(self, file: io.BytesIO, read: _Read) -> None:
        super().__init__(file, encoding="latin1")
        self._storage_reader = read

    def find_class(self, module: str, name: str) -> Any:
        return _Name(f"{module}.{name}"[:200])

    def get_extension(self, code: int) -> Any:
        raise WslfastError("it uses pickle's extension registry")

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, tuple) and len(pid) >= 2 and pid[0] == "module":  # the stream form keeps a module class's source beside it
            return pid[1]
        require(isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage", "a reference that is not a storage")
        kind, key, numel = pid[1], pid[2], pid[4]
        require(isinstance(kind, (_Name, str)) and isinstance(key, str) and type(numel) is int, "a storage reference of wrong types")
        name = (kind.kind if isinstance(kind, _Name) else kind).rpartition(".")[2]
        return _Storage(name, key, numel)

    def _made(self, what: Any, arguments: Any) -> Any:
        require(isinstance(what, _Name) and isinstance(arguments, tuple), "it calls something that is no class")
        if what.kind in ("collections.OrderedDict", "collections.defaultdict"):
            pairs = arguments[0] if len(arguments) == 1 and what.kind.endswith("OrderedDict") else ()
            return Ordered((_key(key), value) for key, value in pairs)
        if what.kind == "torch._utils._rebuild_tensor_v2" and len(arguments) >= 4 and isinstance(arguments[0], _Storage):
            shape, stride = (tuple(v) if isinstance(v, (tuple, list)) else (None,) for v in arguments[2:4])
            return StoredTensor(arguments[0], arguments[1], shape, stride, self._storage_reader)  # type: ignore[arg-type]
        if what.kind in _PARAMETERS and arguments:
            return arguments[0]
        if what.kind == "torch.Size" and len(arguments) == 1 and isinstance(arguments[0], tuple):
            return arguments[0]
        if what.kind in ("builtins.set", "__builtin__.set") and len(arguments) == 1 and isinstance(arguments[0], list):
            return set(map(_key, arguments[0]))
        return Stub(what.kind, arguments)

    def _reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self._made(self.stack[-1], arguments)

    def _new_with_keywords(self) -> None:
        self.stack.pop()
        self._reduce()

    def _build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Stub):
            self.stack[-1].state = state  # of a container (a state dict's _metadata) it is left out

    def _instance(self) -> None:
        module, name = self.readline()[:-1].decode("ascii"), self.readline()[:-1].decode("ascii")
        arguments = tuple(self.pop_mark())
        self.append(self._made(_Name(f"{module}.{name}"[:200]), arguments))

    def _object(self) -> None:
        arguments = self.pop_mark()
        require(bool(arguments), "an object of no class")
        self.append(self._made(arguments[0], tuple(arguments[1:])))

    def _appends(self) -> None:
        items = self.pop_mark()
        self._extend(self.stack[-1], items)

    def _append(self) -> None:
        item = self.stack.pop()
        self._extend(self.stack[-1], [item])

    @staticmethod
    def _extend(target: Any, items: Sequence[Any]) -> None:
        require(isinstance(target, (list, Stub)), "it appends to something that is no list")
        (target.items if isinstance(target, Stub) else target).extend(items)

    def _set_items(self) -> None:
        items = self.pop_mark()
        target = self.stack[-1]
        require(isinstance(target, (dict, Stub)), "it sets items of something that is no dict")
        if isinstance(target, dict):
            target.update(zip(map(_key, items[::2]), items[1::2], strict=True))

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        require(isinstance(self.stack[-1], (dict, Stub)), "it sets items of something that is no dict")
        if isinstance(self.stack[-1], dict):
            self.stack[-1][_key(key)] = value

    def _dict(self) -> None:
        items = self.pop_mark()
        self.append(dict(zip(map(_key, items[::2]), items[1::2], strict=True)))

    def _add_items(self) -> None:
        items = self.pop_mark()
        require(isinstance(self.stack[-1], (set, Stub)), "it adds items to something that is no set")
        if isinstance(self.stack[-1], set):
            self.stack[-1].update(map(_key, items))

    def _frozen_set(self) -> None:
        self.append(frozenset(map(_key, self.pop_mark())))

    for _code, _method in (
        (pickle.REDUCE, _reduce),
        (pickle.NEWOBJ, _reduce),
        (pickle.NEWOBJ_EX, _new_with_keywords),
        (pickle.BUILD, _build),
        (pickle.INST, _instance),
        (pickle.OBJ, _object),
        (pickle.APPENDS, _appends),
        (pickle.APPEND, _append),
        (pickle.SETITEMS, _set_items),
        (pickle.SETITEM, _set_item),
        (pickle.DICT, _dict),
        (pickle.ADDITEMS, _add_items),
        (pickle.FROZENSET, _frozen_set),
    ):
        dispatch[_code[0]] = _method


def _key(value: Any) -> Any:
    """A dict's key or a set's item: no tuple of tuples, whose hash takes time exponential in its depth where they share parts."""
    require(not (isinstance(value, tuple) and any(isinstance(v, tuple) for v in value)), "a key of nested tuples")
    return value


class InertFile:
    """An open file of ``torch.save``: ``root`` is the object, its tensors :class:`StoredTensor`. A context manager.

    Args:
        path: the file.
        check: called with the open file before anything is read of it; what it raises is this class's error.

    Raises:
        WslfastError: for anything that is not such a file, or is damaged; nothing else, whatever the bytes.
    """

    root: Any

    def __init__(self, path: str | Path, check: Callable[[BinaryIO], None] | None = None) -> None:
        self.path = Path(path)
        try:
            self._file = open(path, "rb")  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise WslfastError(f"{path}: cannot be read: {error.strerror or error}") from None
        try:
            if check is not None:
                check(self._file)
            self.size = self._file.seek(0, io.SEEK_END)
            self._file.seek(0)
            start = self._file.read(8)
            self._file.seek(0)
            if start.startswith(b"PK\x03\x04"):
                self._open_archive()
            else:
                require(start[:1] == b"\x80", "neither an archive nor a stream of torch.save (very old tar files are not read)")
                self._open_stream()
        except WslfastError as error:
            self.close()
            raise WslfastError(f"{path}: {error}") from None
        except Exception as error:  # whatever zipfile, pickle or the machine's memory make of bytes that nobody wrote
            self.close()
            raise WslfastError(f"{path}: damaged: {type(error).__name__}: {str(error)[:100]}") from None

    def __enter__(self) -> InertFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    # -- the archive ---------------------------------------------------------------------------------------------------

    def _open_archive(self) -> None:
        self._archive = zipfile.ZipFile(self._file)
        programs = [i for i in self._archive.infolist() if i.filename.endswith("/data.pkl") or i.filename == "data.pkl"]
        require(len(programs) == 1, f"expected one data.pkl in the archive, got {len(programs)}")
        self._root = programs[0].filename[: -len("data.pkl")]
        order = self._root + "byteorder"
        if order in self._archive.NameToInfo:
            require(self._member(order, 16).strip() == b"little", "written on a big-endian machine")
        program = self._member(programs[0].filename, _LONGEST_PROGRAM)
        self.root = _run(io.BytesIO(program), self._archived)

    def _member(self, name: str, limit: int) -> bytearray:
        info = self._archive.getinfo(name)
        require(info.file_size <= min(limit, self.size) and info.compress_type == zipfile.ZIP_STORED, f"{name:.60}: larger than the file")
        data = bytearray(info.file_size)
        with self._archive.open(info) as member:
            filled = member.readinto(data)  # type: ignore[attr-defined, unused-ignore] # a BufferedIOBase, whatever the stubs call it
            require(filled == len(data) and not member.read(1), f"{name:.60}: shorter than it says")  # and its CRC is right
        return data

    def _archived(self, storage: _Storage) -> bytearray:
        name = f"{self._root}data/{storage.key}"
        try:
            return exactly(self._member(name, self.size), storage)
        except WslfastError as error:
            raise WslfastError(f"{self.path}: {error}") from None
        except KeyError:
            raise WslfastError(f"{self.path}: storage {storage.key!r:.40} is missing") from None
        except Exception as error:  # whatever zipfile makes of bytes that nobody wrote
            raise WslfastError(f"{self.path}: storage {storage.key!r:.40}: damaged: {error}") from None

    # -- the stream ----------------------------------------------------------------------------------------------------

    def _open_stream(self) -> None:
        require(self.size <= 16 * _LONGEST_PROGRAM, "a stream larger than 4 GiB")
        data = io.BytesIO(self._file.read())
        refuse: _Read = _no_storage
        require(_run(data, refuse) == _MAGIC and _run(data, refuse) == _PROTOCOL, "not a file of torch.save")
        system = _run(data, refuse)
        require(isinstance(system, dict) and system.get("little_endian") is True, "written on a big-endian machine")
        places: dict[str, tuple[int, int]] = {}

        def streamed(storage: _Storage) -> bytearray:
            require(storage.key in places, f"{self.path}: storage {storage.key!r:.40} is missing")
            at, count = places[storage.key]
            width = _width(storage)
            return exactly(data.getbuffer()[at : at + count * width], storage)

        self.root = _run(data, streamed)
        keys = _run(data, refuse)
        require(isinstance(keys, list) and all(isinstance(k, str) for k in keys), "its list of storages is not one")
        kinds = _kinds(self.root)
        for key in keys:
            (count,) = struct.unpack("<q", data.read(8))
            width = kinds.get(key, 0)
            require(count >= 0 and width > 0 and data.tell() + count * width <= self.size, f"storage {key:.40}: larger than the file")
            places[key] = data.tell(), count
            data.seek(count * width, io.SEEK_CUR)


def _run(file: io.BytesIO, read: _Read) -> Any:
    try:
        return _Machine(file, read).load()
    except WslfastError:
        raise
    except RecursionError:
        raise WslfastError("nested too deeply") from None


def _no_storage(storage: _Storage) -> bytearray:
    raise WslfastError("a storage where none can be")


def _width(storage: _Storage) -> int:
    return _STORAGES[storage.kind].itemsize if storage.kind in _STORAGES else 0


def exactly(data: bytearray | memoryview, storage: _Storage) -> bytearray:
    """The data, if it is as long as the storage says."""
    require(
        len(data) == storage.numel * _width(storage),
        f"storage {storage.key!r:.40}: expected {storage.numel} numbers, got {len(data)} bytes",
    )
    return data if isinstance(data, bytearray) else bytearray(data)


def _kinds(root: Any) -> dict[str, int]:
    """Bytes a number of every storage that the object refers to, by key."""
    widths: dict[str, int] = {}
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        value = waiting.pop()
        if isinstance(value, StoredTensor):
            widths[value.storage.key] = _width(value.storage)
        elif isinstance(value, (dict, list, tuple, set, Stub)) and id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, Stub):
                waiting += [value.state, value.arguments, value.items]
            else:
                waiting += value.values() if isinstance(value, dict) else value
    return widths
