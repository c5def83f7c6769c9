"""``wslfast zoo``: build, import, export, show, push and pull zoos."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Annotated, Literal, Union

import tyro

from ..architecture import Architecture
from ..errors import require
from ..zoo import Signals, build_zoo, export_zoo, image_shape, image_signals, import_zoo, load_dataset, network, read_manifest, summarize
from ..zoo.importers.checkpoint import is_note
from ..zoo.importers.network_files import architecture_of
from .console import console, say, show
from .options import Networks


@dataclass(frozen=True)
class ZooBuild:
    """Train a zoo: many small networks at once, each with its own initialisation, learning rate, decay, seed and batch order.

    The folder receives manifest.json (what every model is and how well it does) and safetensors shards of stacked weights.

    Example: wslfast zoo build --dataset digits --models 64 --epochs 8 --seed 0 --out runs/zoo
    """

    out: str
    """Folder of the new zoo."""
    dataset: str = "digits"
    """digits, fashion, fashion-full, photos, svhn, cifar10, eurosat or stl10 (local files, nothing is downloaded), or an .npz file
    with images and labels."""
    data: str | None = None
    """Folder with a named data set's files, as torchvision lays them out (default: data; fashion is also looked for where Debian's
    dataset-fashion-mnist puts it; digits and photos need none)."""
    architecture: Literal["auto", "cnn", "cnn2", "cnn3", "lenet5", "resnet18", "siren"] = "auto"
    """The published networks; auto takes the one that fits the images. siren makes a zoo of implicit neural representations: one network
    per image, fitted to its pixels."""
    network: str | None = None
    """FILE.py:NAME of your own network: a class, or a function, that is called without arguments. FILE.py is run. Every model has initial
    weights of its own, drawn as --grid says, in place of those that the file gives."""
    input_shape: tuple[int, ...] = ()
    """Shape of one query of --network, as 1 8 8 (default: the first that its images may have and the network takes)."""
    output: str | None = None
    """Which part of the network's answer counts, if it returns a tuple (a number) or a dict (a name)."""
    dropout: float = 0.0
    """Probability of dropout in a published CNN; every model draws its own."""
    width: int | None = None
    """Channels of resnet18's first stage (default: 16; 64 in the paper)."""
    models: int = 64
    """Networks to train."""
    epochs: int = 5
    """Epochs of training."""
    keep: tuple[int, ...] = ()
    """Epochs whose weights are kept (default: three, spread over the last half)."""
    grid: Literal["auto", "small", "published", "signals"] = "auto"
    """Hyper-parameters that models are drawn from; published is the paper's (50 epochs), signals is for siren."""
    batch_size: int = 0
    """Images per step, for each model (default: 32, and for siren every pixel)."""
    seed: int = 0
    """Seed of the draw from the grid, of the split and of every model."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    backend: Literal["auto", "triton", "torch"] = "auto"
    """What runs the networks: Triton kernels, plain torch, or whatever is best and proved."""
    overwrite: bool = False
    """Replace a zoo that is already there."""
    resume: bool = False
    """Go on with a build that was interrupted, from the end of its last epoch; pass the same flags."""

    def run(self) -> None:
        data: str | Signals = self.dataset
        if self.architecture == "siren":
            data = image_signals(load_dataset(self.dataset, image_shape(self.dataset), root=self.data, standardise=False))
        population = build_zoo(
            data,
            self.out,
            architecture=self._architecture(),
            models=self.models,
            epochs=self.epochs,
            keep=self.keep or None,
            grid=None if self.grid == "auto" else self.grid,
            batch_size=self.batch_size or None,
            seed=self.seed,
            device=self.device,
            backend=self.backend,
            progress=console.is_terminal,
            overwrite=self.overwrite,
            resume=self.resume,
            root=self.data,
        )
        saw = read_manifest(self.out).provenance.get("dataset", {})
        if saw.get("standardise"):
            figures = "; ".join(f"{n} {', '.join(f'{v:.4g}' for v in saw[k])}" for n, k in (("mean", "mean"), ("deviation", "std")))
            say(f"images: standardised ({figures})")
        column, what = ("test_acc", "test accuracy") if "test_acc" in population.properties else ("train_loss", "mean squared error")
        values = population.column(column)
        mean, spread = float(values.mean()), float(values.std()) if len(values) > 1 else 0.0
        spread = 0.0 if spread < 1e-9 * abs(mean) else spread  # of equal numbers rounding leaves one
        say(f"{self.out}: {len(population)} rows, {what} {mean:.3g} +- {spread:.3g}")

    def _architecture(self) -> Architecture | None:
        wide = self.width is None or self.architecture == "resnet18"
        require(wide, "--width: it is for --architecture resnet18; other networks have their own")
        if self.network is not None:
            require(
                self.architecture == "auto", f"--network: {self.network} and --architecture {self.architecture} are two networks; name one"
            )
            require(self.dropout == 0, f"--dropout: it is for published networks; {self.network} says what dropout it has")
            return architecture_of(self.network, self.input_shape or None, self.dataset, _part(self.output))
        require(not self.input_shape, "--input-shape: it is for --network; a published network says its own")
        require(self.output is None, "--output: it is for --network; a published network has one answer")
        if self.architecture in ("auto", "siren"):
            require(self.dropout == 0, f"--dropout: name a network with --architecture, got {self.architecture}")
            return None
        channels = image_shape(self.dataset)[0]
        if self.architecture == "resnet18":
            require(self.dropout == 0, "--dropout: resnet18 has none")
            return Architecture.resnet18(channels, width=16 if self.width is None else self.width)
        return network(self.architecture, channels, dropout=self.dropout)


def _part(output: str | None) -> str | int | None:
    """A part of an answer as a library call names it: numbers count in tuples."""
    return int(output) if output is not None and output.isdigit() else output


@dataclass(frozen=True)
class ZooShow:
    """Show what a zoo holds: models, splits, epochs, accuracies, how it was made.

    Example: wslfast zoo show runs/zoo
    """

    path: tyro.conf.Positional[str]
    """Folder of the zoo."""
    json: bool = False
    """Print JSON."""

    def run(self) -> None:
        summary = summarize(self.path)
        if not self.json:
            quantiles = summary.pop("quantiles")
            summary |= {"accuracies (least, quartiles, greatest)": quantiles} if quantiles else {}
            summary["provenance"] = {k: v for k, v in summary["provenance"].items() if v not in ({}, [])}
        show(summary, self.json)


@dataclass(frozen=True)
class ZooImport:
    """Read trained networks, your own or a published zoo, and store them as a zoo.

    Your own: a folder with a file per network (.pt, .pth, .ckpt, .safetensors, .npz: state dicts, bare or under a key such as model or
    state_dict), --network FILE.py:NAME for what they are, --dataset for what they were trained on, --table for what you know of each:

    Example: wslfast zoo import models/ runs/zoo --network net.py:Net --dataset images.npz --table accuracies.csv

    Published: ray-tune trees (NN_tune_trainable_*, tune_zoo_*), dataset_{train,val,test}.pt, the Small CNN Zoo's weights.npy, implicit
    representations of DWSNets and NFN, the CNN Wild Park, and what wslfast zoo export wrote (docs/zoos.md):

      wslfast zoo import ~/zoos/svhn_cnn3 runs/svhn --epochs 20 30 40 50 --dataset svhn --standardise

    Nothing in the files is run, whatever they contain; FILE.py is the only code that runs. What is missing, broken, not finite, too large
    or there twice is left out; the counts are printed, and OUT/skipped.json lists every case.
    """

    source: tyro.conf.Positional[str]
    """Folder (or one file) to read."""
    out: tyro.conf.Positional[str]
    """Folder of the new zoo."""
    network: tuple[str, ...] = ()
    """FILE.py:NAME of the module of your own networks: a class, or a function, that is called without arguments. Several of them make a zoo
    of several architectures. The column network of --table says which network a file is of; without it, the first that fits is taken."""
    table: str | None = None
    """CSV file with a column file (names of the models' files) and what is known of each, such as test_acc, val_acc, lr. The columns model,
    epoch and split say which model, epoch and split a file is of."""
    dataset: str | None = None
    """What the models were trained on: a name (as for zoo build), an .npz file of images and labels, a dataset.pt, or grid:28x28, the
    coordinates at which implicit representations are evaluated. Training, evaluation and generation find their images by it."""
    standardise: bool = False
    """The models saw its images standardised: mean 0 and deviation 1 of each channel (named sets: with the published figures). Without
    this flag they saw bytes as numbers in [0, 1], and other numbers unchanged."""
    mean: tuple[float, ...] = ()
    """The models saw (image - mean) / std: a number per channel, or one for all (with --std)."""
    std: tuple[float, ...] = ()
    """See --mean."""
    input_shape: tuple[int, ...] = ()
    """Shape of one query of --network, as 3 32 32 (default: that of the images)."""
    output: str | None = None
    """Which part of the network's answer counts, if it returns a tuple (a number) or a dict (a name)."""
    epochs: tuple[int, ...] = ()
    """Epochs to keep (default: every one that is there)."""
    architecture: Literal["auto", "cnn", "cnn2", "cnn3", "lenet5", "resnet18"] = "auto"
    """What the models are, for published ones; auto reads params.json, and the names and shapes of the weights."""
    activation: str | None = None
    """Activation of a named --architecture (default: relu). Without one it is what params.json says."""
    channels: int | None = None
    """Input channels of a named --architecture (default: 3)."""
    threshold: float = 10_000.0
    """Leave out checkpoints with a larger weight."""
    split: tuple[float, float, float] = (0.7, 0.15, 0.15)
    """Shares of the models for train, val and test (a split that the source states is kept)."""
    seed: int = 0
    """Seed of the split."""
    padding: Literal["valid", "same"] = "valid"
    """Padding of the Small CNN Zoo's convolutions (docs/zoos.md says why this is the default)."""
    omega: float = 30.0
    """Frequency of implicit representations of DWSNets and NFN."""
    overwrite: bool = False
    """Replace a zoo that is already there."""

    def run(self) -> None:
        done = import_zoo(
            self.source,
            self.out,
            epochs=self.epochs or None,
            architecture=self._architecture(),
            network=self.network or None,
            table=self.table,
            input_shape=self.input_shape or None,
            output=_part(self.output),
            threshold=self.threshold,
            split=self.split,
            seed=self.seed,
            dataset=self.dataset,
            standardise=self.standardise,
            mean=self.mean or None,
            std=self.std or None,
            padding=self.padding,
            omega=self.omega,
            overwrite=self.overwrite,
        )
        names = list(done.architectures)
        few = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
        what = f"architecture {names[0]}" if len(names) == 1 else f"{len(names)} architectures: {few}"
        say(f"{self.out}: {done.rows} rows of {done.models} models, {what}")
        for reason, count in done.skipped.items():
            say(f"  {'note' if is_note(reason) else 'skipped'}: {count} x {reason}")
        if not done.has_dataset:
            say("  no --dataset: evaluate and generate need what the models were trained on")
        opaque = [kind for kind in done.architectures.values() if kind.graph is None]
        if opaque:  # a manifest can hold operations, and no code
            say(f"{opaque[0].name} cannot be traced: {opaque[0].reason}")
            text = "it runs as it is, one model after another, and every command asks for its code again (--network)"
            say(f"  {text}")
        again = f" --network {shlex.join(self.network) or 'FILE.py:NAME'}" if opaque else ""
        say(f"next: wslfast train --zoo {shlex.quote(self.out)} --out RUN{again}")

    def _architecture(self) -> Architecture | None:
        named = self.architecture != "auto"
        for flag, value in (("--activation", self.activation), ("--channels", self.channels)):
            require(named or value is None, f"{flag}: name a network with --architecture, got {flag} {value} alone")
        if not named:
            return None
        channels = 3 if self.channels is None else self.channels
        if self.architecture == "resnet18":
            require(self.activation is None, f"--activation: resnet18 has its own, got {self.activation}")
            return Architecture.resnet18(channels)
        return getattr(Architecture, self.architecture)(channels, self.activation or "relu")


@dataclass(frozen=True)
class ZooExport:
    """Write a zoo's checkpoints for other code: as a ray-tune tree that the published loaders read, or one .pt file per checkpoint.

    Example: wslfast zoo export runs/zoo exported --format ray
    """

    path: tyro.conf.Positional[str]
    """Folder of the zoo."""
    out: tyro.conf.Positional[str]
    """A new or empty folder."""
    format: Literal["ray", "state-dicts"] = "ray"
    """ray: params.json, result.json, checkpoint_000020/checkpoints per model; state-dicts: 00000.pt ... and index.json."""
    split: Literal["all", "train", "val", "test"] = "all"
    """Which models."""
    skip_bad: bool = False
    """Leave out shards that are missing or damaged, with a count, instead of stopping."""
    network: Networks = ()

    def run(self) -> None:
        split = None if self.split == "all" else self.split
        count = export_zoo(self.path, self.out, format=self.format, split=split, skip_bad=self.skip_bad)
        say(f"{self.out}: {count} checkpoints")


@dataclass(frozen=True)
class ZooPush:
    """Upload a zoo to the Hugging Face Hub: shards, manifest, and a card with the zoo's picture and table.

    Log in first (hf auth login, or HF_TOKEN). The repository is made where there is none. Needs pip install 'wslfast[hub]'.

    Example: wslfast zoo push runs/zoo USER/digits-zoo
    """

    path: tyro.conf.Positional[str]
    """Folder of the zoo."""
    repository: tyro.conf.Positional[str]
    """USER/NAME, a data set on the Hub."""
    private: bool = False
    """Make a repository that only you can see."""
    revision: str | None = None
    """Branch (default: main)."""

    def run(self) -> None:
        from ..hub import push_zoo

        say(push_zoo(self.path, self.repository, private=self.private, revision=self.revision))


@dataclass(frozen=True)
class ZooPull:
    """Download a zoo from the Hugging Face Hub. It passes the checks that every zoo does, and nothing in it is executed.

    An interrupted download goes on when the command is given again. Needs pip install 'wslfast[hub]'.

    Example: wslfast zoo pull USER/digits-zoo runs/zoo
    """

    repository: tyro.conf.Positional[str]
    """USER/NAME, a data set on the Hub."""
    out: tyro.conf.Positional[str]
    """A new or empty folder."""
    revision: str | None = None
    """Branch, tag or commit (default: main)."""

    def run(self) -> None:
        from ..hub import pull_zoo

        manifest = pull_zoo(self.repository, self.out, revision=self.revision)
        models = len(set(manifest.properties["model"]))
        say(f"{self.out}: {manifest.rows} rows of {models} models; wslfast zoo show {shlex.quote(self.out)}")


@dataclass(frozen=True)
class Zoo:
    """Build, import, export and show zoos of trained networks, and exchange them with the Hub."""

    command: Union[
        Annotated[ZooBuild, tyro.conf.subcommand("build")],
        Annotated[ZooImport, tyro.conf.subcommand("import")],
        Annotated[ZooExport, tyro.conf.subcommand("export")],
        Annotated[ZooShow, tyro.conf.subcommand("show")],
        Annotated[ZooPush, tyro.conf.subcommand("push")],
        Annotated[ZooPull, tyro.conf.subcommand("pull")],
    ]

    def run(self) -> None:
        self.command.run()
