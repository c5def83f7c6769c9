"""The shell: ``wslfast zoo build | import | export | show | push | pull``, ``train``, ``evaluate``, ``report``, ``generate``,
``queries``, ``ablate``, ``gradients``, ``demo``, ``doctor``, ``info``."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Union

import torch
import tyro
from rich.console import Console

from .. import __version__
from ..engine.precision import matmul_precision
from ..engine.ranks import first
from ..errors import WslfastError, first_line
from ..tracing.untraced import naming
from ..training import TrainConfig
from ..training.checkpoint import checkpoint_path
from ..training.progress import Interrupted
from ..zoo.importers.network_files import named_again
from ..zoo.unfinished import FILE as UNFINISHED
from .analysis import Ablate, Gradients, Queries
from .console import console, show
from .doctor import Doctor
from .evaluation import Demo, Evaluate, Generate, Report
from .training import Train
from .zoo import Zoo, ZooBuild


@dataclass(frozen=True)
class Info:
    """Versions, devices and optional packages, for a bug report."""

    json: bool = False
    """Print JSON."""

    def run(self) -> None:
        optional = ("triton", "nvtx", "sklearn", "matplotlib", "torchvision", "tensorboard")
        cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        show(
            {
                "wslfast": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
                "platform": platform.platform(),
                "threads": torch.get_num_threads(),
                "cuda": cuda or "none",
                "float32 matmul precision": matmul_precision(),
                "optional packages": {name: _package(name) for name in optional},
            },
            self.json,
        )


def _package(name: str) -> bool | str:
    """Whether a package is there; of one that is there and does not import (as torchvision beside another torch), why."""
    if importlib.util.find_spec(name) is None:
        return False
    try:
        importlib.import_module(name)
    except Exception as error:  # whatever a broken package raises
        return f"there, and does not import: {type(error).__name__}: {first_line(error)}"[:160]
    return True


def _given(argv: Sequence[str], flag: str) -> str | None:
    """The value of a flag, ahead of the real parsing; None if it is not there."""
    values = [a.partition("=")[2] if "=" in a else b for a, b in zip(argv, [*argv[1:], ""]) if a.partition("=")[0] == flag]
    return values[-1] if values else None


def _once(argv: Sequence[str]) -> list[str]:
    """The arguments with the values of a flag that is there several times behind its first: the parser would take its last alone."""
    several = {"--network"} | ({"--epochs"} if list(argv[:2]) == ["zoo", "import"] else set())  # which take a list
    parts: list[list[str]] = [[]]  # a flag and its values each
    first: dict[str, list[str]] = {}
    current = parts[0]
    for argument in argv:
        name, equals, value = argument.partition("=")
        if name in several:
            if name not in first:
                first[name] = [name]
                parts.append(first[name])
            current = first[name]
            current += [value] if equals else []
        elif argument.startswith("--"):
            current = [argument]
            parts.append(current)
        else:
            current.append(argument)
    return [argument for part in parts for argument in part]


def _commands(argv: Sequence[str]) -> Any:
    """All commands; ``train``'s defaults come from ``--config`` and ``--preset`` where those are given."""
    options: dict[str, Any] = {}
    if argv and argv[0] == "train":
        path, preset = (_given(argv, flag) for flag in ("--config", "--preset"))
        given = {name: "" for name in ("zoo", "out") if _given(argv, f"--{name}") is not None}  # flags fill these in
        given |= {"preset": preset} if preset is not None else {}
        if path is not None:
            options = {"default": Train(**TrainConfig.from_toml(path, **given).to_dict(), config=path)}
        elif preset is not None:
            options = {"default": Train(**TrainConfig.from_dict(given).to_dict())}
    return Union[
        Annotated[Zoo, tyro.conf.subcommand("zoo")],
        Annotated[Train, tyro.conf.subcommand("train", **options)],
        Annotated[Evaluate, tyro.conf.subcommand("evaluate")],
        Annotated[Report, tyro.conf.subcommand("report")],
        Annotated[Generate, tyro.conf.subcommand("generate")],
        Annotated[Queries, tyro.conf.subcommand("queries")],
        Annotated[Ablate, tyro.conf.subcommand("ablate")],
        Annotated[Gradients, tyro.conf.subcommand("gradients")],
        Annotated[Demo, tyro.conf.subcommand("demo")],
        Annotated[Doctor, tyro.conf.subcommand("doctor")],
        Annotated[Info, tyro.conf.subcommand("info")],
    ]


class _ConsoleHandler(logging.Handler):
    """Log lines through the console, so that they stand above a progress bar and not in it; beside JSON, to standard error."""

    def __init__(self, beside_json: bool) -> None:
        super().__init__()
        self.console = Console(stderr=True) if beside_json else console

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.console.print(record.getMessage(), markup=False, soft_wrap=True)
        except BrokenPipeError:  # who reads has gone: the command ends
            raise
        except OSError:  # a full disk behind standard error: a line that cannot be shown is no reason to lose the work
            pass


def _interrupted(command: Any, error: KeyboardInterrupt) -> str:
    """What is left after Ctrl-C, as far as the command knows."""
    command = getattr(command, "command", command)  # zoo has commands of its own
    if isinstance(error, Interrupted) and isinstance(command, Train):
        return str(error)
    if isinstance(command, Train) and command.out and checkpoint_path(command.out).exists():
        return f"interrupted; {command.out} goes on from its last checkpoint with --resume (resume=True)"
    if isinstance(command, ZooBuild) and (Path(command.out) / UNFINISHED).exists():
        return f"interrupted; {command.out} goes on from the end of its last epoch with --resume (resume=True)"
    page = isinstance(command, Evaluate) and command.out is not None and not command.out.endswith(".json")
    if page or isinstance(command, (Ablate, Demo)):
        return "interrupted; the same command goes on with what is done"
    return "interrupted; nothing was saved"


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``wslfast``. Exits with 2 and one line on wrong input, 130 when interrupted."""
    arguments = _once(sys.argv[1:] if argv is None else argv)
    if arguments == ["--version"]:
        print(f"wslfast {__version__}")
        return
    handler = _ConsoleHandler("--json" in arguments)
    logger = logging.getLogger("wslfast")
    logger.addHandler(handler)
    if not first():  # of torchrun's processes one speaks; the others' warnings and errors are heard
        console.quiet = True
        handler.console, handler.level = Console(stderr=True), logging.WARNING
    logger.setLevel(logging.INFO)
    command: Any = None
    try:
        command = tyro.cli(
            _commands(arguments),
            args=arguments,
            prog="wslfast",
            description="Weight-space learning, fast: zoos of small networks, autoencoders over their weights, and how the rebuilt "
            "networks behave (arXiv 2503.17138). Start with: wslfast demo",
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff),
        )
        network = getattr(getattr(command, "command", command), "network", ()) or ()  # zoo has commands of its own
        with naming(named_again((network,) if isinstance(network, str) else network)):  # zoo build takes one
            command.run()
    except WslfastError as error:
        print(f"wslfast: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "allocate memory" not in str(error) and "not enough memory" not in str(error):
            raise
        print(f"wslfast: not enough memory: {str(error)[:200]}", file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:  # the reader, say `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except KeyboardInterrupt as error:
        print(f"wslfast: {_interrupted(command, error)}", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        logger.removeHandler(handler)
