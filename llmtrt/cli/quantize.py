"""Make a package (ONNX graph, INT4 weights, tokenizer) from a checkpoint.

CHECKPOINT is a Hugging Face folder (config.json, *.safetensors, tokenizer.json) or a .gguf file.
"""

import argparse


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder or .gguf file")
    parser.add_argument("-o", "--output", required=True, metavar="PACKAGE", help="the folder to make")
    parser.add_argument(
        "--recipe",
        default="int4",
        metavar="NAME|FILE",
        help="int4 (default), int4-g64, int4-g32, int4-vocab8, gptq-g64, gptq-mixed, fp16, fp32, or a YAML file",
    )
    parser.add_argument(
        "--max-seq", type=int, metavar="N", help="declared capacity in tokens (default: the model's own)"
    )
    parser.add_argument(
        "--ignore-field",
        action="append",
        default=[],
        metavar="FIELD",
        help="a field of config.json that is known to change nothing",
    )
    parser.add_argument(
        "--calibration",
        default="self",
        metavar="self|FILE",
        help="what a gptq recipe calibrates on: text sampled from the model itself (default), a text, or a .jsonl of chats; "
        "an interrupted run goes on where it was if it is started again",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(options: argparse.Namespace) -> None:
    import json

    from llmtrt import progress, quantize
    from llmtrt.quantization.pipeline import calibration_folder

    try:
        with progress.shown("quantizing") as report:
            made = quantize(
                options.checkpoint,
                options.output,
                options.recipe,
                options.max_seq,
                options.ignore_field,
                options.calibration,
                report,
            )
    except KeyboardInterrupt:
        work = calibration_folder(options.output)
        if work.is_dir():
            raise KeyboardInterrupt(f"{work} keeps what was done: run the same command again to go on") from None
        raise
    if options.json:
        print(json.dumps({"package": options.output} | made.report))
        return
    for note in made.package.spec.notes:
        print(f"note: {note}")
    if kept := made.report["kept"]:
        reasons: dict[str, list[str]] = {}
        for name, reason in kept.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            print(f"not quantized: {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''} ({reason})")
    print(
        f"{options.output}: {made.report['weights'] / 1e6:.1f} M weights at {made.report['bits_per_weight']} bits on average"
    )
