"""manifest.json: says what kind of folder this is, and which bytes belong to it."""

from dataclasses import dataclass
from pathlib import Path

import llmtrt.files as files
from llmtrt.errors import UserError

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Kind:
    """A kind of folder that llmtrt writes: ``format`` and ``version`` stand in its manifest, ``name`` is its name with an
    article, ``maker`` the command that makes one."""

    format: str
    version: int
    name: str
    maker: str

    def is_at(self, path: Path) -> bool:
        """Whether ``path`` is a folder whose manifest says that it is of this kind."""
        try:
            return files.read_json(path / MANIFEST).get("format") == self.format
        except UserError:
            return False


def read_manifest(path: Path, kind: Kind) -> dict:
    """The manifest of the folder ``path``; UserError if there is none, or it is of another kind or format version."""
    if not path.is_dir():
        raise UserError(f"{path} is not a folder: expected {kind.name} made by `{kind.maker}`")
    where = path / MANIFEST
    if not where.is_file():
        raise UserError(f"{where} is missing: expected {kind.name}, which `{kind.maker}` makes")
    manifest = files.read_json(where)
    if (found := manifest.get("format")) != kind.format:
        raise UserError(
            f"{where} is not {kind.name}'s manifest: expected format {kind.format!r}, found {str(found)[:40]!r}; "
            f"`{kind.maker}` makes one"
        )
    if (version := manifest.get("format_version")) != kind.version:
        raise UserError(
            f"{where} has format version {str(version)[:40]}, this llmtrt reads {kind.version}: make it anew with "
            f"`{kind.maker}`"
        )
    return manifest


def write_manifest(folder: Path, kind: Kind, fields: dict) -> None:
    """Digests every file in ``folder`` and writes its manifest with ``fields``: the last step of making it."""
    from llmtrt import __version__

    head = {"format": kind.format, "format_version": kind.version, "producer": f"llmtrt {__version__}"}
    listed = {path.name: files.digest_file(path) for path in sorted(folder.iterdir())}
    files.write_json(folder / MANIFEST, head | fields | {"files": listed})
