"""What the Python bindings of a TensorRT wheel offer, listed without TensorRT's libraries, a GPU or a driver.

    python tools/list_bindings.py FOLDER WHEEL...    # needs gcc and binutils; the Python that the wheels are for

The bindings of the full flavor install from PyPI, its libraries do not. The bindings want a handful of C functions from
them, called only when something is built or run, so shared libraries of empty functions let the real module import; its
classes and their members are then read from itself. Writes FOLDER/NAME-VERSION.json for each wheel.
"""

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

_SYSTEM = ("libstdc++", "libm.", "libgcc_s", "libc.", "ld-linux", "librt", "libdl", "libpthread")
_DUMP = """
import importlib, json, sys
sys.path.insert(0, sys.argv[1])
module = importlib.import_module(sys.argv[2])
def members(value):
    return sorted(name for name in dir(value) if not name.startswith("_"))
names = [name for name in members(module)]
classes = {name: members(getattr(module, name)) for name in names if isinstance(getattr(module, name), type)}
print(json.dumps({"classes": classes, "functions": [name for name in names if name not in classes]}))
"""


def main() -> None:
    folder, *wheels = map(Path, sys.argv[1:])
    folder.mkdir(parents=True, exist_ok=True)
    for wheel in wheels:
        name, version, *_ = wheel.name.split("-")
        listing = {"wheel": wheel.name} | list_wheel(wheel)
        path = folder / f"{name}-{version}.json"
        path.write_text(json.dumps(listing, indent=0, sort_keys=True) + "\n")
        print(f"{path}: {len(listing['classes'])} classes")


def list_wheel(wheel: Path) -> dict:
    """The public names of the wheel's extension module: {"classes": {name: members}, "functions": names}."""
    with tempfile.TemporaryDirectory() as place:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(place)
        (module,) = Path(place).glob("tensorrt*_bindings/tensorrt*.so")
        wanted = _stub_libraries(module, Path(place))
        run = subprocess.run(
            [sys.executable, "-c", _DUMP, place, module.parent.name],
            env=os.environ | {"LD_LIBRARY_PATH": place},
            capture_output=True,
            text=True,
        )
        if run.returncode:
            sys.exit(f"{wheel.name} does not import over stubs of {wanted}: {run.stderr[-500:]}")
        return json.loads(run.stdout)


def _stub_libraries(module: Path, place: Path) -> list[str]:
    """Empty functions for everything that the module takes from NVIDIA's libraries."""
    dynamic = subprocess.run(["readelf", "-d", module], capture_output=True, text=True, check=True).stdout
    needed = [line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "(NEEDED)" in line]
    missing = [library for library in needed if not library.startswith(_SYSTEM)]
    undefined = subprocess.run(
        ["nm", "-D", "--undefined-only", module], capture_output=True, text=True, check=True
    ).stdout
    functions = [line.split()[-1] for line in undefined.splitlines()]
    functions = [name for name in functions if name.startswith(("create", "get", "init")) and "@" not in name]
    (place / "stub.c").write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in functions))
    (place / "empty.c").write_text("")
    for index, library in enumerate(missing):
        source = "stub.c" if index == 0 else "empty.c"
        command = ["gcc", "-shared", "-fPIC", "-o", library, f"-Wl,-soname,{library}", source]
        subprocess.run(command, cwd=place, check=True)
    return functions


if __name__ == "__main__":
    main()
