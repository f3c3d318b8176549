"""The tests that need a GPU, as many processes side by side as there are cores but two: they build for longer than they run.

    python tools/gpu_tests.py FOLDER [SECONDS]     # FOLDER gets a log of each process; they end after SECONDS (500)

Tests of one package are one process, since they share what they build. Those that look at the GPU's free memory come last,
by themselves. The exit code is 1 if any test failed or did not end.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore"]
TOGETHER = 6  # tests of one package in one process
GRACE = 5  # seconds from asking a process to end to making it
SLOWEST = "inputs"  # a plan for steps of one row takes minutes to build: first, each by itself


def collect(marks: str) -> list[str]:
    command = [*PYTEST, "--collect-only", "-m", marks, "tests"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if said.returncode:
        sys.exit(f"{said.stdout}{said.stderr}")
    return [line for line in said.stdout.splitlines() if "::" in line]


def groups(tests: list[str]) -> list[list[str]]:
    """Tests of one file and package, or of one function; the slowest first."""
    found: dict[tuple, list[str]] = defaultdict(list)
    for test in tests:
        package = re.search(r"\[((?:stories|smollm2)-\w+)", test)
        file, name = re.match(r"(.*)::(\w+)", test).groups()
        found[file, package[1] if package else name, test if SLOWEST in test else ""].append(test)
    parts = [each[i : i + TOGETHER] for each in found.values() for i in range(0, len(each), TOGETHER)]
    return sorted(parts, key=lambda part: ("smollm2" not in part[0], SLOWEST not in part[0]))


def run(tests: list[str], log: Path, end: float) -> bool:
    """Whether all of ``tests`` passed before ``end``."""
    with log.open("w") as out:
        process = subprocess.Popen([*PYTEST, *tests], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
        try:
            code = process.wait(max(1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            code = None
            process.send_signal(signal.SIGINT)  # pytest then says what passed, unless TensorRT is building
            time.sleep(GRACE)
            process.kill()
            process.wait()
    last = "had not ended" if code is None else [f"ended with {code}", *log.read_text().splitlines()][-1]
    print(f"{log.name}: {last} ({tests[0].split('::')[1]}, …)", flush=True)
    return code == 0


def main() -> None:
    folder, seconds = Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 500
    folder.mkdir(parents=True, exist_ok=True)
    end, parts = time.monotonic() + seconds, groups(collect("gpu and not alone"))
    with ThreadPoolExecutor(max(1, os.cpu_count() - 2)) as pool:
        passed = list(pool.map(lambda job: run(job[1], folder / f"{job[0]}.log", end), enumerate(parts)))
    passed.append(run(collect("gpu and alone"), folder / "alone.log", end))
    sys.exit(not all(passed))


if __name__ == "__main__":
    main()
