"""quality.json: what was measured of a package, beside its manifest and outside of the digest that engines are bound to."""

from datetime import date
from pathlib import Path

import llmtrt.files as files
from llmtrt.errors import UserError
from llmtrt.package import PACKAGE, QUALITY

_MEASURED = ("perplexity", "kl_divergence", "top1_agreement")


def save_quality(package: Path, text: Path, result: dict, **how: object) -> None:
    """Adds ``result`` to the package's quality.json, in place of an earlier one that was measured in the same way.

    ``text`` is the file that it was measured on; ``how`` names what else decides the number (runtime, accuracy level).
    Raises UserError if ``package`` is no package or cannot be written.
    """
    require_package(package)
    way = {"text": text.name, "sha256": files.digest_file(text)["sha256"], "context": result["context"]}
    way |= {"tokens": result["tokens"]} | how
    kept = [entry for entry in read_quality(package) if any(entry.get(key) != value for key, value in way.items())]
    measured = {name: round(result[name], 4) for name in _MEASURED if name in result}
    entry = way | measured | {"date": date.today().isoformat()}
    with files.staged_file(package / QUALITY) as staging:
        files.write_json(staging, {"measured": [*kept, entry]})


def require_package(path: Path) -> None:
    """UserError unless ``path`` is a package: what can be said before the hours of an evaluation."""
    if not PACKAGE.is_at(path):
        raise UserError(f"--save keeps results in a package, and {path} is none: leave it out")


def read_quality(package: Path) -> list[dict]:
    """The entries of the package's quality.json; none where there is no such file."""
    if not (package / QUALITY).is_file():
        return []
    entries = files.read_json(package / QUALITY).get("measured")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{package / QUALITY}: 'measured' should be a list of objects: remove the file")
    return entries
