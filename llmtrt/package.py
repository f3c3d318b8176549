"""The package: the folder that `llmtrt quantize` writes and every runtime starts from.

    model.onnx  model.onnx.data  tokenizer.json  tokenizer_config.json  chat_template.jinja  manifest.json

The manifest is a pure function of the checkpoint and the recipe; what was measured later stands in quality.json.
"""

from dataclasses import asdict, dataclass, fields
from pathlib import Path

import llmtrt.files as files
from llmtrt.errors import UserError
from llmtrt.manifest import MANIFEST, Kind, read_manifest

PACKAGE = Kind("llmtrt-package", 1, "a package", "llmtrt quantize CHECKPOINT -o PACKAGE")
GRAPH = "model.onnx"
WEIGHTS = "model.onnx.data"
QUALITY = "quality.json"


@dataclass(frozen=True)
class ModelSpec:
    """What a runtime has to know of a model without reading its graph.

    ``dtype`` and ``kv_dtype`` are NumPy names (float16, float32) or ``bfloat16``; ``max_seq`` is the context in tokens
    that the graph was made for; ``bos_token_id`` is None where the model has none.
    """

    family: str
    layers: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_seq: int
    dtype: str
    kv_dtype: str
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    notes: tuple[str, ...] = ()  # what a user should know of this package, such as the long-RoPE factor in it

    @classmethod
    def from_json(cls, value: object, where: Path) -> "ModelSpec":
        """Checks names, types and ranges of an untrusted manifest's ``model``; UserError names the field."""
        if not isinstance(value, dict):
            raise UserError(f"{where}: 'model' should be a JSON object")
        names = {field.name for field in fields(cls)}
        if missing := names - value.keys():
            raise UserError(f"{where}: 'model' lacks {', '.join(sorted(missing))}: make the package anew")
        spec = {name: value[name] for name in names}
        for name in ("layers", "kv_heads", "head_dim", "vocab_size", "max_seq"):
            if not isinstance(spec[name], int) or isinstance(spec[name], bool) or not 0 < spec[name] < 1 << 31:
                raise UserError(f"{where}: model.{name} should be a positive integer, but is {spec[name]!r}")
        for name in ("dtype", "kv_dtype"):
            if spec[name] not in ("float16", "bfloat16", "float32"):
                raise UserError(f"{where}: model.{name} should be float16, bfloat16 or float32, but is {spec[name]!r}")
        ids = [*spec["eos_token_ids"]] if isinstance(spec["eos_token_ids"], list) else [None]
        if spec["bos_token_id"] is not None:
            ids.append(spec["bos_token_id"])
        if not all(isinstance(token, int) and 0 <= token < spec["vocab_size"] for token in ids):
            raise UserError(f"{where}: bos_token_id and eos_token_ids should be ids below {spec['vocab_size']}")
        if not isinstance(spec["family"], str) or not isinstance(spec["notes"], list):
            raise UserError(f"{where}: model.family should be a string and model.notes a list")
        return cls(**spec | {"eos_token_ids": tuple(spec["eos_token_ids"]), "notes": tuple(map(str, spec["notes"]))})

    def to_json(self) -> dict:
        return asdict(self)

    def kv_bytes_per_token(self) -> int:
        """Bytes of KV cache that one token of one sequence takes over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * (4 if self.kv_dtype == "float32" else 2)


@dataclass(frozen=True)
class Package:
    """An opened package. ``generation`` holds generation_config.json's sampling defaults (temperature, top_k, …)."""

    path: Path
    spec: ModelSpec
    generation: dict
    manifest: dict

    @property
    def graph(self) -> Path:
        return self.path / GRAPH

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest, which holds the SHA-256 of every other file: what an engine is bound to."""
        return files.digest_file(self.path / MANIFEST)["sha256"]


def open_package(path: str | Path, verify: bool = True) -> Package:
    """Reads the manifest of the package in ``path`` and, with ``verify``, checks every file's SHA-256.

    Raises UserError naming the file that is missing, corrupt or of another format version.
    """
    path = Path(path)
    manifest, where = read_manifest(path, PACKAGE), path / MANIFEST
    listed = manifest.get("files")
    if not isinstance(listed, dict) or not {GRAPH, WEIGHTS} <= listed.keys():
        raise UserError(f"{where}: 'files' should list {GRAPH} and {WEIGHTS}: make the package anew")
    generation = manifest.get("generation")
    if not isinstance(generation, dict):
        raise UserError(f"{where}: 'generation' should be a JSON object: make the package anew")
    spec = ModelSpec.from_json(manifest.get("model"), where)
    if verify:
        files.verify_files(path, listed)
    return Package(path, spec, generation, manifest)
