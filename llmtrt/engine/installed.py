"""TensorRT's flavors as products: how each is installed, whose engines it runs, and which versions are here. These are
told by folders and the names of their metadata; nothing is imported.

A Python environment holds one version of a module. Further ones lie in folders made by ``pip install --target FOLDER``;
the environment variable LLMTRT_TENSORRT lists them, and they come before the environment's own.
"""

import contextlib
import importlib
import os
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmtrt.errors import UserError

VARIABLE = "LLMTRT_TENSORRT"
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Product:
    """How NVIDIA ships a flavor. Flavors of one ``family`` run each other's version-compatible engines."""

    module: str
    packages: tuple[str, ...]
    purpose: str
    family: str = ""

    @property
    def modules(self) -> tuple[str, ...]:
        """The names it may be imported by: without the source package that adds the plain one, the bindings' own."""
        return self.module, f"{self.module}_bindings"


_BOTH = "builds and runs engines"
_RUNS = "runs version-compatible engines of TensorRT tensorrt"
PRODUCTS = {
    "rtx": Product("tensorrt_rtx", ("tensorrt-rtx-cu12-bindings", "tensorrt-rtx-cu12-libs"), _BOTH),
    "tensorrt": Product("tensorrt", ("tensorrt",), _BOTH, "tensorrt"),
    "lean": Product("tensorrt_lean", ("tensorrt-lean",), _RUNS, "tensorrt"),
    "dispatch": Product("tensorrt_dispatch", ("tensorrt-dispatch",), _RUNS, "tensorrt"),
}
NAMES = tuple(PRODUCTS)


def runs(name: str, version: str, built_by: str, built: str, version_compatible: bool) -> bool:
    """Whether ``version`` of the flavor ``name`` runs the engines that ``built`` of ``built_by`` made. NVIDIA lets
    version-compatible ones run on the same and later minor versions of their family."""
    if (name, version) == (built_by, built):
        return True
    family = PRODUCTS[built_by].family if version_compatible and built_by in NAMES else ""
    (major, minor), (built_major, built_minor) = _release(version), _release(built)
    return bool(family) and family == PRODUCTS[name].family and major == built_major and minor >= built_minor


def _release(version: str) -> tuple[int, int]:
    """Major and minor, -1 where there is none."""
    major, minor, *_ = [*map(int, re.findall(r"\d+", version)), -1, -1]
    return major, minor


@dataclass(frozen=True)
class Installed:
    """A version of the flavor ``name`` that can be imported as ``module`` with ``folder`` first on sys.path. ``version``
    is UNKNOWN where the folder has no metadata."""

    name: str
    module: str
    version: str
    folder: str


def install_command(name: str, pin: str = "") -> str:
    """The command that installs a flavor; ``pin`` as in "==1.7.*"."""
    return shlex.join(["pip", "install", *(f"{package}{pin}" for package in PRODUCTS[name].packages)])


def advice(name: str, pin: str) -> str:
    """How a flavor, or the version of it that ``pin`` names, comes here, as the end of a sentence."""
    keep = f" (with --target FOLDER, and FOLDER in {VARIABLE}, to keep what is here)"
    return f"install it with `{install_command(name, pin)}`{keep if pin and find_installed(name) else ''}"


def find_installed(name: str) -> list[Installed]:
    """The installed versions of a flavor in the order in which they are searched.

    Raises UserError where LLMTRT_TENSORRT lists something else than folders.
    """
    product, found = PRODUCTS[name], []
    for folder in _search_path():
        module = next((module for module in product.modules if _holds(folder, module)), None)
        if module:
            found.append(Installed(name, module, _version(folder, product.module, "(_bindings)?"), folder))
    return found


def mixed_with(installed: Installed) -> str:
    """Why importing it would load another version's libraries, which bear the same file names; empty if it would not."""
    module = PRODUCTS[installed.name].module
    libraries = f"{module}_libs"
    loaded = sys.modules.get(libraries)
    places = [folder_of(loaded)] if loaded else [installed.folder, *map(os.path.abspath, sys.path)]
    place = next((place for place in places if _holds(place, libraries)), "")
    version = _version(place, module, "_libs") if place else UNKNOWN
    if UNKNOWN in (version, installed.version) or version == installed.version:
        return ""
    return f"{installed.version} in {installed.folder} would load the libraries of {version} in {place}"


@contextlib.contextmanager
def first_on_path(folder: str) -> Iterator[None]:
    """Imports look into ``folder`` first."""
    importlib.invalidate_caches()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def folder_of(module: object) -> str:
    """The folder that has to be on sys.path for a module that is imported; empty where the module does not say."""
    file = getattr(module, "__file__", None)
    if not file:
        return ""
    path = Path(os.path.abspath(file))
    return str(path.parents[1] if path.name == "__init__.py" else path.parent)


def _search_path() -> list[str]:
    listed = [folder for folder in os.environ.get(VARIABLE, "").split(os.pathsep) if folder]
    for folder in listed:
        if not os.path.isdir(folder):
            raise UserError(f"{VARIABLE} lists {folder}, which should be a folder made by `pip install --target`")
    return list(dict.fromkeys(map(os.path.abspath, [*listed, *sys.path])))


def _holds(folder: str, module: str) -> bool:
    return os.path.isfile(os.path.join(folder, module, "__init__.py")) or os.path.isfile(
        os.path.join(folder, f"{module}.py")
    )


def _version(folder: str, module: str, part: str) -> str:
    """The version in the name of the metadata's folder: MODULE, the CUDA version or none, PART, -VERSION.dist-info."""
    for path in sorted(Path(folder).glob("*.dist-info")):
        name, _, version = path.stem.partition("-")
        if re.fullmatch(rf"{module}(_cu\d+)?{part}", name):
            return version
    return UNKNOWN
