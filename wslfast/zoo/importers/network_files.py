"""``FILE.py:NAME``: the module that a user's own networks are of. That file is the only code that an import runs, because its user named
it."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ...architecture import Architecture
from ...errors import WslfastError, describe, require
from ..datasets import input_shapes
from ..export import PUBLISHED


def module_of(network: str) -> nn.Module:
    """The module that ``FILE.py:NAME`` gives: NAME called without arguments, or NAME itself where it is a module already.

    A file of a package (its folder has ``__init__.py``, or it imports ``from .other``) is imported as a part of it; modules are found
    beside the file, beside its package, and in the working folder. What the file sets in torch (the default dtype, say) is undone.

    Raises WslfastError for a file that is not there or does not run, a name that it has not, and what gives no module.
    """
    file, colon, name = network.rpartition(":")
    require(bool(colon) and file.endswith(".py") and name.isidentifier(), f"network: expected FILE.py:NAME, got {network!r}")
    path = Path(file)
    require(path.is_file(), f"network: {file}: no such file")
    with _settings_kept():
        code = _run(path, file)
        made = getattr(code, name, None)
        classes = [n for n, v in vars(code).items() if isinstance(v, type) and issubclass(v, nn.Module) and v.__module__ == code.__name__]
        require(made is not None, f"network: {file} has no {name!r}; its modules are {classes[:8]}")
        if not isinstance(made, nn.Module):
            require(callable(made), f"network: {network}: expected a class or a function that gives the module, got {describe(made)}")
            try:
                made = made()  # type: ignore[misc]
            except Exception as error:
                need = f"{type(error).__name__}: {error} (it is called without arguments; a function that gives the module will do)"
                raise WslfastError(f"network: {network}: {need}") from error
    require(isinstance(made, nn.Module), f"network: {network}: expected a torch.nn.Module, got {describe(made)}")
    return made


def _run(path: Path, file: str) -> ModuleType:
    """What a file defines."""
    package, root = _package(path)
    name = f"{package}.{path.stem}" if package else f"_wslfast_network_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    code = importlib.util.module_from_spec(spec)
    places = [str(path.resolve().parent), *([str(root)] if package else []), os.getcwd()]
    with _found_in(places):
        try:
            if package:
                importlib.import_module(package)
            sys.modules[name] = code  # dataclasses and the like look their module up
            spec.loader.exec_module(code)
        except SystemExit as error:
            guard = "it ends the program when it is imported; put what it does as a script below if __name__ == '__main__':"
            raise WslfastError(f"network: {file} does not run: SystemExit: {error}: {guard}") from error
        except Exception as error:
            raise WslfastError(f"network: {file} does not run: {type(error).__name__}: {error}") from error
    return code


def _package(path: Path) -> tuple[str, Path]:
    """The package that a file is a part of, empty where it is none, and the folder that the package is in."""
    folder = path.resolve().parent
    parts: list[str] = []
    while (folder / "__init__.py").is_file() and folder.name.isidentifier():
        parts, folder = [folder.name, *parts], folder.parent
    if parts or not folder.name.isidentifier():
        return ".".join(parts), folder
    try:
        relative = any(line.startswith("from .") for line in path.read_text("utf-8-sig").splitlines())
    except (OSError, UnicodeDecodeError):
        relative = False
    return (folder.name, folder.parent) if relative else ("", folder)  # a folder without __init__.py is a package, too


@contextlib.contextmanager
def _found_in(places: Sequence[str]) -> Iterator[None]:
    """Modules are looked for in these folders first."""
    before = list(sys.path)
    sys.path[:0] = [place for place in places if place not in before]
    try:
        yield
    finally:
        sys.path[:] = before


@contextlib.contextmanager
def _settings_kept() -> Iterator[None]:
    """What somebody's file changes of torch's settings, and of its random state, is as before after the block."""
    dtype, gradients, threads = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()
    device, deterministic = torch.get_default_device(), torch.are_deterministic_algorithms_enabled()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(gradients)
        torch.use_deterministic_algorithms(deterministic)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        if torch.get_default_device() != device:
            torch.set_default_device(None if device.type == "cpu" else device)  # a device that is set costs every call of torch


def architecture_of(network: str, input_shape: Sequence[int] | None, dataset: str | Path | None, output: str | int | None) -> Architecture:
    """The architecture of ``FILE.py:NAME``; the shape of a query comes from the images of ``dataset`` where it is not given.

    Raises WslfastError where neither is given, or the module takes none of the shapes that the images may have.
    """
    module = module_of(network)
    if input_shape is not None:
        shapes: list[tuple[int, ...]] = [tuple(input_shape)]
    else:
        if dataset is None:
            raise WslfastError("input shape: expected --dataset (the shape of its images counts), or --input-shape 3 32 32")
        shapes, _ = input_shapes(dataset)
    name = network.rpartition(":")[2]
    label = None if name in PUBLISHED else name  # a function resnet18() gives its author's network, not the published one
    failed = []
    for shape in shapes:
        try:
            return Architecture.from_module(module, shape, label, output=output)
        except Exception as error:  # a module has errors of its own for inputs that it does not take
            words = str(error) if isinstance(error, WslfastError) else f"{type(error).__name__}: {error}"
            failed.append(f"{list(shape)}: {words}")
    raise WslfastError(f"network: {network} does not take the images: {'; '.join(failed)[:600]}")


def named_again(networks: Sequence[str]) -> Callable[[Mapping[str, Any]], Architecture | None]:
    """What gives the architecture that a record of an untraceable module is of, out of files ``FILE.py:NAME``; see
    :func:`wslfast.tracing.untraced.naming`; nothing where no file is named. Each is run once. Raises WslfastError where none has the
    record's names and shapes."""
    architectures: dict[tuple[str, str], Architecture] = {}

    def maker(record: Mapping[str, Any]) -> Architecture | None:
        if not networks:
            return None
        order = sorted(networks, key=lambda network: network.rpartition(":")[2] != record.get("name"))  # its own name first
        for network in order:
            key = network, str((record["input_shape"], record.get("output")))
            if key not in architectures:
                architectures[key] = architecture_of(network, record["input_shape"], None, record.get("output"))
            if architectures[key].to_dict().get("parameters") == record["parameters"]:
                return architectures[key]
        raise WslfastError(f"network: {', '.join(networks)}: other names or shapes of weights than {record.get('name')!r} has")

    return maker
