"""Say what this machine can build and run, and which command installs what is missing."""

import argparse


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(options: argparse.Namespace) -> None:
    import json

    from llmtrt.engine.doctor import examine

    facts = examine()
    if options.json:
        print(json.dumps(facts.to_json()))
        return
    print(f"Python {facts.python}, {facts.platform}")
    for component in facts.components:
        print(f"{component.name} {component.version}".rstrip() + f": {component.problem or 'ok'}, {component.purpose}")
        for ability in component.abilities:
            print(f"    {ability}")
        if component.command:
            print(f"    install: {component.command}")
    if facts.gpu_problem:
        print(f"GPU: {facts.gpu_problem}")
    for found in facts.gpus:
        gpu = found.gpu
        print(
            f"GPU: {gpu.name}, compute capability {gpu.compute_capability}, {gpu.memory / 1e9:.0f} GB, driver "
            f"{facts.driver}, CUDA {facts.cuda}"
        )
        for flavor, fit in found.flavors.items():
            print(f"    TensorRT {flavor}: {fit}")
    for line in facts.verdict:
        print(f"→ {line}")
