"""Zoos on the Hugging Face Hub: pushed with a card, pulled as distrustfully as any other zoo is read.

The client is huggingface_hub, an extra (``pip install 'wslfast[hub]'``); tokens and caches are its own. A repository of ours is a data
set: the manifest, the safetensors shards, the images where they are a file of the zoo's folder, a card and its picture.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import WslfastError, logger, require
from .files import check_empty, sha256_of
from .page.card import PICTURE, zoo_card, zoo_picture
from .zoo import read_manifest
from .zoo.manifest import MANIFEST, Manifest
from .zoo.shards import check_shards, read_shard, regular_file

_CARD = "README.md"
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_IMAGES = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,126}\.npz")
_LARGEST_MANIFEST = 1 << 30


def push_zoo(
    zoo: str | Path,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> str:
    """Upload a zoo as one commit, and return the commit's address.

    The zoo is checked first, every shard by its SHA-256. The repository, a data set, is made where there is none; files of an older zoo
    there that this one does not have are removed in the same commit; files of others stay. Its card is written anew.

    Args:
        zoo: folder of the zoo.
        repository: ``USER/NAME`` or ``ORGANISATION/NAME``.
        private: of a repository that is made.
        revision: branch; default: main.
        message: of the commit.
        token: default: what ``hf auth login`` or ``HF_TOKEN`` gave the client.
        endpoint: address of another Hub; default: the client's (``HF_ENDPOINT``).

    Raises:
        WslfastError: huggingface_hub is missing, no such zoo or a damaged one, no network, or the Hub refuses.
    """
    hub, name, folder = _client(), _checked(repository), Path(zoo)
    manifest = checked_zoo(folder)
    picture = _picture(folder)
    card = zoo_card(folder, name, picture=picture is not None).encode()
    files: dict[str, Any] = {shard.file: str(folder / shard.file) for shard in manifest.shards}
    images = _images_of(manifest)
    if images is not None and (folder / images).is_file():
        files[images] = str(regular_file(folder, images))
    files |= {_CARD: card, **({PICTURE: picture} if picture is not None else {}), MANIFEST: str(folder / MANIFEST)}
    api = hub.HfApi(endpoint=endpoint, token=token, library_name="wslfast")
    with _asked(f"push {name}"):
        api.create_repo(name, repo_type="dataset", private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(name, repo_type="dataset", branch=revision, exist_ok=True)
        stored = {f.rfilename for f in api.dataset_info(name, revision=revision).siblings or ()}
        operations: list[Any] = [hub.CommitOperationAdd(path_in_repo=path, path_or_fileobj=what) for path, what in files.items()]
        old = sorted(f for f in stored if re.fullmatch(r"shard-.*\.safetensors", f) and f not in files)
        operations += [hub.CommitOperationDelete(path_in_repo=path) for path in old]
        done = api.create_commit(
            name,
            operations,
            commit_message=message or f"Zoo of {manifest.rows} rows (wslfast)",
            repo_type="dataset",
            revision=revision,
        )
    return str(done.commit_url)


def pull_zoo(
    repository: str, out: str | Path, *, revision: str | None = None, token: str | None = None, endpoint: str | None = None
) -> Manifest:
    """Download a zoo into a new or empty folder, and return its manifest.

    The manifest comes first and is validated; then the files that it names, all of one commit, and nothing else of the repository; each
    has the size and the SHA-256 that the manifest says, and each shard's header, dtype and shape are checked, before the folder has
    its name. What came of an interrupted download is beside ``out``; the same call goes on with it. Nothing is executed.

    Args:
        repository: ``USER/NAME``.
        out: a new or empty folder.
        revision: branch, tag or commit; default: main.
        token, endpoint: as for :func:`push_zoo`.

    Raises:
        WslfastError: huggingface_hub is missing, no network, the Hub refuses, no such repository, or what is there is no sound zoo.
    """
    hub, name, folder = _client(), _checked(repository), Path(out)
    check_empty(out)
    staging = folder.resolve().parent / f".{folder.resolve().name}.pull"
    api = hub.HfApi(endpoint=endpoint, token=token, library_name="wslfast")
    with _asked(f"pull {name}", f"; what has come is kept in {staging}, and the same call goes on with it"):
        info = api.dataset_info(name, revision=revision, files_metadata=True)
        sizes = {f.rfilename: f.size for f in info.siblings or ()}

        def fetch(file: str, expected: int | None) -> Path:
            require(file in sizes, f"{name}: no {file} there" + ("; it is not a zoo of wslfast's" if file == MANIFEST else ""))
            size = sizes[file]
            same = None in (expected, size) or size == expected
            require(same, lambda: f"{name}: {file}: expected {expected:,} bytes, there are {size:,}")
            api.hf_hub_download(name, file, repo_type="dataset", revision=info.sha, local_dir=staging)
            return staging / file

        require((sizes.get(MANIFEST) or 0) <= _LARGEST_MANIFEST, f"{name}: its manifest has more than {_LARGEST_MANIFEST:,} bytes")
        fetch(MANIFEST, None)
        manifest = read_manifest(staging)
        for shard in manifest.shards:
            fetch(shard.file, shard.bytes)
            _discard_damaged(staging / shard.file, shard.sha256, name)
        images = _images_of(manifest)
        if images is not None and images in sizes:
            _discard_damaged(fetch(images, None), str(manifest.provenance["dataset"].get("sha256")), name)
    manifest = checked_zoo(staging)
    shutil.rmtree(staging / ".cache", ignore_errors=True)  # the client's notes on the download
    try:
        for stray in {p.name for p in staging.iterdir()} - {MANIFEST, images, *(shard.file for shard in manifest.shards)}:
            (staging / stray).unlink()
        if folder.exists():
            folder.rmdir()
        staging.rename(folder)
    except OSError as error:
        raise WslfastError(f"out: {out}: cannot be made: {error.strerror or error} (the zoo is in {staging})") from error
    return manifest


def checked_zoo(folder: Path) -> Manifest:
    """The manifest of a zoo whose every shard is sound. Raises WslfastError naming what is not."""
    manifest = read_manifest(folder)
    check_shards(folder, manifest)
    for label in manifest.kinds or (None,):
        manifest.rebuild(str(folder / MANIFEST), *([label] if label is not None else []))
    for shard, shape in zip(manifest.shards, manifest.shapes, strict=True):
        read_shard(folder, shard, shape, True)
    return manifest


def _discard_damaged(file: Path, sha256: str, name: str) -> None:
    """Raise WslfastError, and let the file go, if it is not the one that the manifest means: the next call downloads it again."""
    if sha256_of(file) != sha256:
        file.unlink(missing_ok=True)
        raise WslfastError(f"{name}: {file.name}: its SHA-256 is not the manifest's; the file there is damaged, or another one")


def _images_of(manifest: Manifest) -> str | None:
    """The file of images that a zoo's folder may hold, by the manifest: a plain name with a digest."""
    record: Any = manifest.provenance.get("dataset")
    name = record.get("name") if isinstance(record, dict) else None
    named = isinstance(name, str) and _IMAGES.fullmatch(name) is not None and isinstance(record.get("sha256"), str)
    return name if named else None


def _picture(folder: Path) -> bytes | None:
    """The card's picture; without matplotlib the card has none, which is said."""
    try:
        return zoo_picture(folder)
    except WslfastError as error:
        logger.info("the card has no picture: %s", error)
        return None


def _checked(repository: str) -> str:
    fits = isinstance(repository, str) and _REPOSITORY.fullmatch(repository) is not None and ".." not in repository
    require(fits, f"repository: expected USER/NAME, got {repository!r:.120}")
    return repository


def _client() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise WslfastError(f"the Hub needs huggingface_hub: pip install 'wslfast[hub]' ({error})") from error
    return huggingface_hub


@contextmanager
def _asked(what: str, kept: str = "") -> Iterator[None]:
    """Every way in which the client fails as one sentence that says what to do."""
    from huggingface_hub import errors

    try:
        yield
    except WslfastError:
        raise
    except errors.OfflineModeIsEnabled as error:
        raise WslfastError(f"cannot {what}: the client is offline by its settings (HF_HUB_OFFLINE)") from error
    except errors.HFValidationError as error:
        raise WslfastError(f"cannot {what}: {_line(error)}") from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        raise WslfastError(f"cannot {what}: {_refusal(error, status)}{kept if status is None or status >= 500 else ''}") from error
    except (errors.LocalEntryNotFoundError, OSError) as error:
        raise WslfastError(f"cannot {what}: the Hub cannot be reached, or a file not be written: {_line(error)}{kept}") from error
    except Exception as error:  # the transport's own, whose package differs by version of the client
        if not type(error).__module__.partition(".")[0].startswith(("httpx", "httpcore", "requests", "urllib3", "hf_xet")):
            raise
        raise WslfastError(f"cannot {what}: the Hub cannot be reached: {_line(error)}{kept}") from error


def _refusal(error: Any, status: int | None) -> str:
    said = f" ({_line(error.server_message)})" if getattr(error, "server_message", None) else ""
    if status == 401:
        return f"the Hub does not know you, or no such repository is public: log in with hf auth login{said}"
    if status == 403:
        return f"the Hub refuses: your token may not do this, or the repository asks for consent first{said}"
    if status == 404:
        return f"no such repository or revision{said}"
    return f"the Hub answers {status}{said or ': ' + _line(error)}"


def _line(error: Any) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."
