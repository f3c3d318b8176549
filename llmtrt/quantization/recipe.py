"""A recipe: a short YAML file that says how a package is made. It is data; no recipe carries code."""

from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path

from llmtrt.errors import UserError

DEFAULT = "int4"
SELF = "self"  # calibration on what the model itself writes
_LIMIT = 1 << 20
_FOLDERS = (Path(__file__).parents[1] / "recipes", Path(__file__).parents[2] / "recipes")  # installed, or a source tree


_ALLOWED = {
    "algorithm": ("rtn", "gptq", "none"),
    "group_size": (16, 32, 64, 128, 256, 512),
    "dtype": ("float16", "bfloat16", "float32"),
    "embedding": ("keep", "int8", "int4"),
    "lm_head": ("keep", "int8", "int4"),
}


@dataclass(frozen=True)
class Recipe:
    """``algorithm``: ``rtn`` (INT4 blocks, round to nearest), ``gptq`` (INT4 blocks, calibrated) or ``none``.
    ``group_size``: weights along K that share a scale, halved where it does not divide K. ``bits`` (``gptq`` alone): instead
    of one group size, what a weight of the projections takes on average, more of it where the model is sensitive: blocks of
    128 to 16, and INT8. ``dtype``: of activations, scales, KV cache and all that is not quantized.
    ``embedding``, ``lm_head``: ``keep`` (in dtype), ``int8`` or ``int4``. ``exclude``: patterns (as in a shell) of
    modules that are not quantized. ``calibration_sequences`` of ``calibration_length`` tokens each: what ``gptq`` sees.

    Raises UserError for a value that is none of those.
    """

    algorithm: str = "rtn"
    group_size: int = 128
    dtype: str = "float16"
    embedding: str = "keep"
    lm_head: str = "keep"
    exclude: tuple[str, ...] = ()
    bits: float | None = None
    calibration_sequences: int = 64
    calibration_length: int = 512

    def __post_init__(self) -> None:
        for key, allowed in _ALLOWED.items():
            value = getattr(self, key)
            # By type first: what comes from a file may be anything, and a nested value may print as gigabytes.
            if type(value) is not type(allowed[0]) or value not in allowed:
                found = repr(value)[:40] if isinstance(value, str | int | float) else f"a {type(value).__name__}"
                raise UserError(f"{key} is {found}, expected one of {', '.join(map(str, allowed))}")
        for key in ("calibration_sequences", "calibration_length"):
            value = getattr(self, key)
            if type(value) is not int or not 2 <= value <= 1 << 20:
                raise UserError(f"{key} should be an integer from 2 to {1 << 20}")
        bits = self.bits
        if bits is not None and (
            self.algorithm != "gptq" or type(bits) not in (int, float) or not 4.125 <= bits <= 8.5
        ):
            raise UserError("bits should be a number from 4.125 to 8.5, and is for the algorithm gptq alone")
        exclude = self.exclude
        if not isinstance(exclude, list | tuple) or not all(isinstance(pattern, str) for pattern in exclude):
            raise UserError("exclude should be a list of patterns of module names")
        object.__setattr__(self, "exclude", tuple(exclude))

    def to_json(self) -> dict:
        calibrated = ("bits", "calibration_sequences", "calibration_length")
        return {key: value for key, value in asdict(self).items() if self.calibrates or key not in calibrated}

    @property
    def calibrates(self) -> bool:
        return self.algorithm == "gptq"

    def excluding(self, name: str) -> list[str]:
        """The patterns of ``exclude`` that match the weight ``name``."""
        return [pattern for pattern in self.exclude if fnmatchcase(name.removesuffix(".weight"), pattern)]


def names() -> list[str]:
    """The recipes that come with llmtrt."""
    return sorted({path.stem for folder in _FOLDERS for path in folder.glob("*.yaml")})


def read_recipe(name_or_file: str | Path) -> Recipe:
    """The recipe of that name, or in that file; UserError naming the file and key that are not as they should be."""
    import yaml

    path = next(
        (
            folder / f"{name_or_file}.yaml"
            for folder in _FOLDERS
            if f"{name_or_file}" in names() and (folder / f"{name_or_file}.yaml").is_file()
        ),
        Path(name_or_file),
    )
    if not path.is_file():
        raise UserError(f"--recipe {name_or_file}: neither a file nor one of the recipes {', '.join(names())}")
    if path.stat().st_size > _LIMIT:
        raise UserError(f"{path} is larger than a recipe may be")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML ({' '.join(str(error).split())[:200]})") from None
    return recipe_from(values, path)


def recipe_from(values: object, where: Path | str) -> Recipe:
    """The Recipe of a mapping; UserError names ``where`` it is from and the first key or value that is wrong."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: a recipe should be a mapping of keys to values")
    known = {field.name for field in fields(Recipe)}
    for key in values:
        if not isinstance(key, str) or key not in known:
            said = repr(key)[:40] if isinstance(key, str) else f"a {type(key).__name__}"
            raise UserError(f"{where}: unknown key {said}: a recipe has {', '.join(sorted(known))}")
    try:
        return Recipe(**values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
