"""Files from outside are data, and files we write appear whole or not at all."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llmtrt.errors import UserError

CHUNK_BYTES = 64 << 20
_READ_BYTES = 1 << 20
_UMASK = threading.Lock()
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextlib.contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Yields a temporary sibling of ``target`` and renames it to ``target`` when the block ends without an exception.

    Raises UserError if ``target`` exists already or its parent cannot be written. After any exception (Ctrl-C and a full
    disk too) the temporary folder is gone and ``target`` does not exist.
    """
    target = Path(os.path.abspath(target))
    with _reporting_disk_errors(target):
        require_absent(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
        try:
            yield staging
            staging.chmod(0o777 & ~_umask())
            for path in sorted(staging.rglob("*")):
                if path.is_file():
                    _sync(path)
            staging.rename(target)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise


def require_absent(target: Path) -> None:
    """UserError if there is something at ``target``: long work asks before it starts as well as when it ends."""
    if target.exists() or target.is_symlink():
        raise UserError(f"{target} exists already: name another output folder with -o or remove this one")


@contextlib.contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """As ``staged_folder`` for one file; an old file at ``target`` is replaced in one step, or stays as it was."""
    target = Path(os.path.abspath(target))
    with _reporting_disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.partial-", dir=target.parent)
        os.close(handle)
        staging = Path(name)
        try:
            yield staging
            staging.chmod(0o666 & ~_umask())
            _sync(staging)
            staging.replace(target)
        except BaseException:
            staging.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def _reporting_disk_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        name = os.path.abspath(error.filename or target)
        if not name.startswith(str(target.parent / f".{target.name}.partial-")) and not str(target).startswith(name):
            raise UserError(f"cannot read {name}: {error.strerror}") from error
        said = error.strerror or str(error)
        if error.errno in _NO_ROOM:
            said += " (free some space or choose another folder)"
        elif above := next((path for path in target.parents if path.is_file()), None):
            said = f"{above} is a file, not a folder"
        raise UserError(f"cannot write {target}: {said}") from error


def _umask() -> int:
    with _UMASK:  # which is the process's, and asked by setting it
        current = os.umask(0o022)
        os.umask(current)
    return current


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def read_json(path: Path, limit: int = 64 << 20) -> dict:
    """The JSON object in ``path``; UserError if it is missing, larger than ``limit`` bytes or not a JSON object."""
    try:
        size = path.stat().st_size
        if size > limit:
            raise UserError(f"{path} has {size} bytes, more than the {limit} that such a file may have")
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} should hold a JSON object, but holds a {type(value).__name__}")
    return value


def write_json(path: Path, value: dict) -> None:
    """Writes ``value`` with sorted keys, so that equal values give equal bytes; UserError for what is not JSON (NaN)."""
    try:
        path.write_text(json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
    except ValueError as error:
        raise UserError(f"{path.name} cannot hold NaN or infinity ({error})") from None


def child(folder: Path, name: object) -> Path:
    """``folder / name`` for a plain file name from an untrusted file; UserError if it would leave the folder."""
    if not isinstance(name, str) or not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise UserError(f"{folder}: {name!r} is not a plain file name inside this folder")
    return folder / name


def digest_file(path: Path) -> dict:
    """``{"bytes", "sha256", "chunks"}`` of a file; chunks are the SHA-256 of each 64 MiB, absent if there is but one."""
    whole = hashlib.sha256()
    chunks, size = [], 0
    with path.open("rb") as file:
        while True:
            chunk, taken = hashlib.sha256(), 0
            while taken < CHUNK_BYTES and (data := file.read(min(_READ_BYTES, CHUNK_BYTES - taken))):
                whole.update(data)
                chunk.update(data)
                taken += len(data)
            if not taken:
                break
            chunks.append(chunk.hexdigest())
            size += taken
    digest = {"bytes": size, "sha256": whole.hexdigest()}
    return digest | {"chunks": chunks} if len(chunks) > 1 else digest


def verify_files(folder: Path, digests: dict[str, dict], threads: int | None = None) -> None:
    """Compares every file of ``digests`` (name → ``digest_file``) with the folder's; large files chunk by chunk.

    Raises UserError naming the first file, in order of name, that is missing or differs.
    """
    work = []
    for name, digest in sorted(digests.items()):
        path = child(folder, name)
        try:
            size = path.stat().st_size
        except OSError:
            raise UserError(f"{path} is missing: copy the folder again or make it anew") from None
        if not isinstance(digest, dict) or size != digest.get("bytes"):
            wanted = digest.get("bytes") if isinstance(digest, dict) else None
            raise UserError(f"{path} has {size} bytes instead of {wanted}: copy the folder again or make it anew")
        chunks = digest.get("chunks") or [digest.get("sha256")]
        if not isinstance(chunks, list) or len(chunks) != max(1, -(-size // CHUNK_BYTES)):
            raise UserError(f"{folder}: the manifest's chunk digests of {name} are not those of a file of {size} bytes")
        work += [(path, index, wanted) for index, wanted in enumerate(chunks)]
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        for (path, index, wanted), actual in zip(work, pool.map(lambda item: _chunk_digest(*item[:2]), work)):
            if actual != wanted:
                first = index * CHUNK_BYTES
                raise UserError(
                    f"{path} is corrupt: its SHA-256 differs from the manifest's in the bytes from {first} on: "
                    "copy the folder again or make it anew"
                )


def _chunk_digest(path: Path, index: int) -> str:
    digest, left = hashlib.sha256(), CHUNK_BYTES
    try:
        with path.open("rb") as file:
            file.seek(index * CHUNK_BYTES)
            while left and (data := file.read(min(_READ_BYTES, left))):
                digest.update(data)
                left -= len(data)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return digest.hexdigest()
