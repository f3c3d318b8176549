"""Fill an engine with the weights of a package.

The package is the engine's own, or, where the engine was built with --refit any, another one of the same architecture.
"""

import argparse

from llmtrt.cli.model_options import add_trust


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("engine", metavar="ENGINE")
    parser.add_argument("--package", required=True, metavar="PACKAGE", help="where the weights come from")
    parser.add_argument("-o", "--output", required=True, metavar="NEW_ENGINE", help="the folder to make")
    add_trust(parser)
    parser.add_argument("--no-verify", action="store_true", help="do not compare the files with their SHA-256")
    parser.add_argument("--json", action="store_true", help="print what was made as JSON")


def run(options: argparse.Namespace) -> None:
    import json
    import time

    from llmtrt import progress, refit

    start = time.monotonic()
    with progress.shown("refitting") as report:
        engine = refit(
            options.engine,
            options.package,
            options.output,
            verify=not options.no_verify,
            trust_host_code=options.trust_host_code,
            report=report,
        )
    seconds = time.monotonic() - start
    if options.json:
        print(json.dumps({"engine": options.output, "seconds": round(seconds, 2), "manifest": engine.manifest}))
        return
    size = engine.manifest["files"][engine.plan.name]["bytes"]
    print(f"{options.output}: weights of {options.package}, plan of {size / 1e6:.1f} MB, written in {seconds:.0f} s")
