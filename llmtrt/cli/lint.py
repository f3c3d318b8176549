"""Check an ONNX file against the graph contract.

Finds what TensorRT's parser rejects or, worse, takes with another meaning. Exit code 1 if there is an error.
"""

import argparse


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="FILE|PACKAGE", help="an .onnx file, or a package")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(options: argparse.Namespace) -> int:
    import json
    from dataclasses import asdict
    from pathlib import Path

    from llmtrt.graph.lint import lint

    path = Path(options.model)
    findings = lint(path)
    if options.json:
        print(json.dumps([asdict(finding) for finding in findings]))
    else:
        for finding in findings:
            where = f" at {finding.node} ({finding.operator})" if finding.node else ""
            advice = f"; {finding.advice}" if finding.advice else ""
            print(f"{finding.severity}: {finding.rule}{where}: {finding.message}{advice}")
        errors = sum(finding.severity == "error" for finding in findings)
        print(f"{path}: {errors} errors, {len(findings) - errors} warnings")
    return int(any(finding.severity == "error" for finding in findings))
