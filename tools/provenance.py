"""What a measurement has to say about itself."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path


def write(name: str, results: dict, packages: tuple[str, ...], quiet: bool = False) -> None:
    """Keeps ``results`` with machine, versions and command as benchmarks/NAME.json, and in the folder $OUT where that is
    set; prints it unless ``quiet``."""
    root = Path(__file__).parents[1]
    # with "-dirty" where the code that ran is not that commit's
    describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=7"]
    commit = subprocess.run(describe, capture_output=True, text=True)
    record = {
        "command": " ".join(["python", *sys.argv]),
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "system": platform.platform(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        },
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
        "results": results,
    }
    text = json.dumps(record, indent=1)
    if not quiet:
        print(text)
    (root / "benchmarks").mkdir(exist_ok=True)
    (root / "benchmarks" / f"{name}.json").write_text(text + "\n")
    if "OUT" in os.environ:
        (Path(os.environ["OUT"]) / f"{name}.json").write_text(text + "\n")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
