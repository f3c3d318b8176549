"""Build a TensorRT engine from a package.

With TensorRT-RTX this needs no GPU: the plan is built ahead of time and its kernels are compiled where it first runs.
"""

import argparse


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("package", metavar="PACKAGE")
    parser.add_argument("-o", "--output", required=True, metavar="ENGINE", help="the folder to make")
    parser.add_argument(
        "--flavor", default="auto", metavar="NAME", help="a TensorRT: auto, rtx, tensorrt, or one version as rtx==1.7"
    )
    parser.add_argument("--max-batch", type=int, default=1, metavar="N", help="most sequences at once (default 1)")
    parser.add_argument("--opt-batch", type=int, default=1, metavar="N", help="sequences to tune for (default 1)")
    parser.add_argument("--opt-context", type=int, metavar="N", help="context to tune for, in tokens (default 1024)")
    parser.add_argument("--max-seq", type=int, metavar="N", help="context in tokens (default: the package's)")
    parser.add_argument(
        "--chunk", type=int, default=512, metavar="N", help="most tokens of one prefill step (default 512)"
    )
    parser.add_argument(
        "--compute-capability",
        action="append",
        default=[],
        metavar="X.Y",
        help="a GPU to build for, such as 8.9, or current; may be repeated (default: the flavor's own choice)",
    )
    parser.add_argument("--weight-streaming", action="store_true", help="weights may stay in host memory")
    parser.add_argument(
        "--strip", action="store_true", help="leave the weights in the package, for a plan of a few MB (needs a GPU)"
    )
    parser.add_argument(
        "--refit",
        choices=("identical", "any"),
        help="a plan that takes its own weights again, or those of any package of its architecture (needs a GPU)",
    )
    parser.add_argument(
        "--weights",
        choices=("auto", "plan", "inputs", "both"),
        default="auto",
        help="where they are: inputs: in a file beside the plans, of which one is for steps of one row and one for all "
        "others; both: there for steps of one row, and once more in the plan for all others; auto: inputs where that was "
        "measured to be faster, else in the plan (default: auto)",
    )
    parser.add_argument(
        "--version-compatible",
        action="store_true",
        help="for later versions and the lean runtime; carries code that runs on the host, which loading it must allow",
    )
    parser.add_argument(
        "--kernel-specialization",
        default="NONE",
        metavar="KIND",
        help="TensorRT-RTX: LAZY, EAGER or NONE (default), how kernels are chosen for shapes at run time",
    )
    parser.add_argument("--workspace", type=int, metavar="BYTES", help="most GPU memory that one kernel may use")
    parser.add_argument("--tactic-shared-memory", type=int, metavar="BYTES", help="most shared memory of one kernel")
    parser.add_argument("--timing-cache", metavar="FILE", help="measured tactics, read and rewritten (RTX has none)")
    parser.add_argument(
        "--debug-tensors",
        action="append",
        default=[],
        metavar="PATTERN",
        help="values of the graph to keep as outputs for `llmtrt debug`; may be repeated",
    )
    parser.add_argument(
        "--no-verify", action="store_true", help="do not compare the package's files with their SHA-256"
    )
    parser.add_argument("--json", action="store_true", help="print what was built as JSON")


def run(options: argparse.Namespace) -> None:
    import json

    from llmtrt import build, progress
    from llmtrt.engine.manifest import DECODE, PLAN

    with progress.shown("building") as report:
        built = build(
            options.package,
            options.output,
            options.flavor,
            max_batch=options.max_batch,
            max_seq=options.max_seq,
            chunk=options.chunk,
            opt_batch=options.opt_batch,
            opt_context=options.opt_context,
            compute_capabilities=tuple(options.compute_capability),
            weight_streaming=options.weight_streaming,
            strip=options.strip,
            refit=options.refit,
            version_compatible=options.version_compatible,
            kernel_specialization=options.kernel_specialization,
            workspace=options.workspace,
            tactic_shared_memory=options.tactic_shared_memory,
            timing_cache=options.timing_cache,
            debug_tensors=tuple(options.debug_tensors),
            weights=options.weights,
            verify=not options.no_verify,
            report=report,
        )
    engine = built.engine
    if options.json:
        print(
            json.dumps(
                {
                    "engine": options.output,
                    "seconds": round(built.seconds, 2),
                    "peak_host_bytes": built.peak_host_bytes,
                    "manifest": engine.manifest,
                }
            )
        )
        return
    plans = [size["bytes"] for name, size in engine.manifest["files"].items() if name in (PLAN, DECODE)]
    size = " and ".join(f"{bytes / 1e6:.1f}" for bytes in sorted(plans, reverse=True))
    lowered = f", lowered: {', '.join(engine.manifest['lowerings'])}" if engine.manifest["lowerings"] else ""
    print(
        f"{options.output}: TensorRT {engine.flavor} {engine.flavor_version}, plan of {size} MB, up to "
        f"{engine.max_batch} sequences of "
        f"{engine.max_seq} tokens, built in {built.seconds:.0f} s with {built.peak_host_bytes / 1e9:.1f} GB of host memory"
        f"{lowered}"
    )
