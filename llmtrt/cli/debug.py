"""Find the first tensor in which an engine differs from its package.

Prefills the prompt on TensorRT and on ONNX Runtime and compares them tensor by tensor. Exit code 1 if one leaves its band.

An engine has to be built with --debug-tensors for this, and its package has to be where it was. From a package, such an
engine is built for the occasion, in the folder for temporary files. A tensor that is looked at cannot be fused away, so
the numbers are those of an engine built for debugging.

Without --tensors, a package is looked at where a layer adds to the residual stream and in its norms; then narrow it down
in the layer that is named: --tensors 'model.layers.3.*'.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from llmtrt.cli.model_options import add_trust

if TYPE_CHECKING:
    from llmtrt.evaluate.debug import Comparison, Difference
    from llmtrt.package import Package
    from llmtrt.runtime.tensorrt import TrtSession


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="an engine built with --debug-tensors, or a package")
    parser.add_argument(
        "-p", "--prompt", required=True, metavar="TEXT", help="one step long: at most the engine's --chunk"
    )
    parser.add_argument(
        "--tensors",
        action="append",
        metavar="PATTERN",
        help="only tensors named so, as 'model.layers.3.*'; may be repeated (default: all debug tensors of an engine)",
    )
    parser.add_argument(
        "--band",
        type=float,
        metavar="X",
        help="error allowed, as a share of the largest value (default: 0.02 for fp16, 0.005 for fp32)",
    )
    parser.add_argument("--flavor", metavar="NAME", help="for a package: the TensorRT to build with (default auto)")
    parser.add_argument("--threads", type=int, metavar="N", help="ONNX Runtime's threads (default: one a core)")
    add_trust(parser)
    parser.add_argument("--no-verify", action="store_true", help="do not compare the files with their SHA-256")
    parser.add_argument("--all", action="store_true", help="print a line for every tensor")
    parser.add_argument("--json", action="store_true", help="print the comparison as JSON")


def run(options: argparse.Namespace) -> int:
    from pathlib import Path

    from llmtrt.engine.gpu import find_gpus
    from llmtrt.engine.manifest import ENGINE
    from llmtrt.errors import UserError
    from llmtrt.evaluate.debug import compare

    if options.band is not None and not options.band >= 0:
        raise UserError(f"--band should be a number from 0 on, but is {options.band}")
    if problem := find_gpus().problem:
        raise UserError(f"debug runs an engine and needs an NVIDIA GPU, but {problem}")
    opened = _of_engine if ENGINE.is_at(Path(options.model)) else _of_package
    with opened(Path(options.model), options) as (package, session, ids):
        found = compare(package, session, ids, options.tensors or ("*",), options.band, options.threads)
        _print(found, session.description, options)
    return int(found.first is not None)


_Opened = tuple["Package", "TrtSession", list[int]]


@contextmanager
def _of_engine(path, options: argparse.Namespace) -> Iterator[_Opened]:
    """The package of the engine in ``path``, a session of it, and the prompt's token ids."""
    from contextlib import closing

    from llmtrt.engine.manifest import open_engine
    from llmtrt.errors import UserError
    from llmtrt.evaluate.debug import check_length
    from llmtrt.runtime.tensorrt import TrtSession

    engine = open_engine(path, not options.no_verify)
    if options.flavor is not None:
        raise UserError(f"{path} is an engine, and --flavor is for a package: leave it out")
    if not engine.debug_tensors:
        raise UserError(
            f"{path} was built without --debug-tensors: build an engine with them, or give its package in its place"
        )
    if engine.package_path is None:
        raise UserError(
            f"the package that {path} was built from is not found: put it back at "
            f"{engine.manifest['package'].get('path')!r} seen from there, or give a package in the engine's place"
        )
    package = _package(engine.package_path, options)
    ids = _ids(package, options)
    check_length(len(ids), engine.chunk)
    with closing(TrtSession(engine, trust_host_code=options.trust_host_code, verify=False)) as session:
        yield package, session, ids


@contextmanager
def _of_package(path, options: argparse.Namespace) -> Iterator[_Opened]:
    """The package in ``path``, a session of an engine that lasts as long as this block, and the prompt's token ids."""
    import tempfile
    from contextlib import closing
    from pathlib import Path

    from llmtrt import build, progress
    from llmtrt.errors import UserError
    from llmtrt.evaluate.debug import PATTERNS
    from llmtrt.runtime.tensorrt import TrtSession

    package = _package(path, options)
    ids, most = _ids(package, options), package.spec.max_seq
    if len(ids) > most:
        raise UserError(f"the prompt has {len(ids)} tokens and {path} is for up to {most}: shorten it")
    with tempfile.TemporaryDirectory(prefix="llmtrt-debug-") as folder:
        with progress.shown("building") as report:
            engine = build(
                path,
                Path(folder) / "engine",
                options.flavor or "auto",
                max_seq=min(most, -(-len(ids) // 16) * 16),
                chunk=len(ids),
                debug_tensors=tuple(options.tensors or PATTERNS),
                verify=False,
                report=report,
            ).engine
        with closing(TrtSession(engine, kernel_cache=None, verify=False)) as session:
            yield package, session, ids


def _package(path, options: argparse.Namespace) -> "Package":
    from llmtrt.package import open_package
    from llmtrt.runtime.onnxruntime import require_runnable

    package = open_package(path, not options.no_verify)
    require_runnable(package)
    return package


def _ids(package: "Package", options: argparse.Namespace) -> list[int]:
    from llmtrt.errors import UserError
    from llmtrt.runtime.tokenizer import Tokenizer

    ids = Tokenizer(package.path, package.spec.bos_token_id).encode(options.prompt)
    if not ids or not options.prompt:
        raise UserError("the prompt is empty: give at least one token")
    return ids


def _print(found: "Comparison", runtime: str, options: argparse.Namespace) -> None:
    import json

    if options.json:
        first = found.first and _plain(found.first)
        tensors = list(map(_plain, found.differences))
        print(json.dumps({"runtime": runtime, "first": first, "tensors": tensors, "left_out": found.left_out}))
        return
    for each in found.differences if options.all else ():
        print(f"{'outside' if each.outside else 'inside '}  {each.error:.1e}  {_named(each)}")
    if found.left_out:
        print(f"{len(found.left_out)} tensors left out, which ONNX Runtime does not have in this form")
    first, worst = found.first, found.worst
    if first is None:
        print(
            f"all {len(found.differences)} tensors within their bands, worst {_named(worst)}: error {worst.error:.1e}, "
            f"band {worst.band:.1e}"
        )
        return
    print(f"first tensor outside its band: {_named(first)}")
    print(f"  error {first.error:.1e} of the largest value {first.largest:.4g}, band {first.band:.1e}")
    print(f"  worst at {[*first.place]}: {first.value:.6g} on {runtime}, {first.reference:.6g} on ONNX Runtime")
    if first.not_finite:
        print(f"  {first.not_finite} elements are NaN or infinite where ONNX Runtime's are finite")
    if first.reference_not_finite:
        print(f"  {first.reference_not_finite} elements are NaN or infinite on ONNX Runtime, and not compared")


def _named(each: "Difference") -> str:
    return f"{each.name}{'' if each.layer is None else f' (layer {each.layer})'}, {each.dtype} {[*each.shape]}"


def _plain(each: "Difference") -> dict:
    """For JSON, which has neither NaN nor infinity."""
    import math
    from dataclasses import asdict

    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in (asdict(each) | {"outside": each.outside}).items()
    }
