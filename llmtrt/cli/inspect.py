"""Show what a package or an engine holds."""

import argparse


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="PACKAGE|ENGINE")
    parser.add_argument("--layers", action="store_true", help="also every matrix, its form and its error")
    parser.add_argument("--no-verify", action="store_true", help="do not compare the files with their SHA-256")
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON")


def run(options: argparse.Namespace) -> None:
    import json
    from pathlib import Path

    from llmtrt.engine.manifest import ENGINE, open_engine
    from llmtrt.errors import UserError
    from llmtrt.package import open_package

    path, verify = Path(options.model), not options.no_verify
    is_engine = ENGINE.is_at(path)
    opened = open_engine(path, verify) if is_engine else open_package(path, verify)
    if options.json:
        print(json.dumps(opened.manifest))
        return
    try:
        rows = dict(_rows(opened.manifest)) | (dict(_memory_rows(opened)) if is_engine else _quality_rows(path))
        lines = list(_layers(opened.manifest)) if options.layers else []
    except (KeyError, TypeError, AttributeError, ValueError):
        # The parts that only a person reads are not checked when it is opened.
        raise UserError(f"{path}: its manifest is not as llmtrt writes it: make it anew") from None
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
    for line in lines:
        print(f"  {line}")


def _layers(manifest: dict):
    for name, tensor in manifest.get("quantization", {}).get("tensors", {}).items():
        block = f" in blocks of {tensor['block']}" if "block" in tensor else ""
        error = f", relative error {tensor['error']}" if "error" in tensor else ""
        if "output_error" in tensor:
            error = f", relative error of its product {tensor['output_error']}"
        yield f"{name}  {tensor['form']}{block} {tensor['shape']}{error}"


def _rows(manifest: dict):
    spec, files = manifest["model"], manifest["files"]
    yield "format", f"{manifest['format']} {manifest['format_version']}, by {manifest.get('producer', 'unknown')}"
    yield (
        "model",
        (
            f"{spec['family']}, {spec['layers']} layers, {spec['kv_heads']} KV heads of {spec['head_dim']}, "
            f"vocabulary {spec['vocab_size']}, up to {spec['max_seq']} tokens"
        ),
    )
    if "flavor" in manifest:
        yield from _engine_rows(manifest)
    yield "types", f"{spec['dtype']}, KV cache {spec['kv_dtype']}"
    if "quantization" in manifest:
        report = manifest["quantization"]
        yield "weights", f"{report['weights'] / 1e6:.1f} M at {report['bits_per_weight']} bits on average"
        forms: dict[str, int] = {}
        for tensor in report["tensors"].values():
            forms[tensor["form"]] = forms.get(tensor["form"], 0) + 1
        yield "matrices", ", ".join(f"{count} {form}" for form, count in sorted(forms.items()))
        if report["kept"]:
            yield (
                "not quantized",
                "; ".join(f"{name} ({why})" for name, why in list(report["kept"].items())[:3])
                + (f"; and {len(report['kept']) - 3} more" if len(report["kept"]) > 3 else ""),
            )
        yield (
            "recipe",
            ", ".join(f"{key} {value}" for key, value in manifest["recipe"].items() if value not in ((), [])),
        )
        yield "source", ", ".join(f"{key} {value}" for key, value in manifest["source"].items())
    for note in spec["notes"]:
        yield "note", note
    yield "files", ", ".join(f"{name} {file['bytes'] / 1e6:.2f} MB" for name, file in files.items())


def _quality_rows(path) -> dict[str, str]:
    from llmtrt.evaluate.quality import read_quality

    return {
        f"perplexity {entry.get('perplexity')}": f"on {entry.get('text')}, {entry.get('tokens')} tokens, context "
        f"{entry.get('context')}, {entry.get('runtime')}, {entry.get('date')}"
        + (
            f"; KL divergence {entry['kl_divergence']} nats, top-1 agreement {100 * entry['top1_agreement']:.2f} %"
            if "kl_divergence" in entry
            else ""
        )
        for entry in read_quality(path)
    }


def _memory_rows(engine):
    """What the engine will take of a GPU's memory, and for one that streams its weights what it would keep here."""
    from llmtrt.engine.gpu import find_gpus, free_bytes
    from llmtrt.runtime.footprint import predict
    from llmtrt.runtime.streaming import WeightBudget

    found = find_gpus()
    free = None if found.problem else free_bytes(found.gpus[0])
    needed, weights = predict(engine, 1, WeightBudget(), free), f"{engine.weight_bytes / 1e6:.2f} MB"
    yield (
        "GPU memory",
        (
            f"{needed.weights / 1e6:.2f} MB for weights, {needed.kv_cache / 1e6:.2f} MB for the KV cache of one sequence, "
            f"{needed.activations / 1e6:.2f} MB for activations, {needed.scratch / 1e6:.2f} MB of scratch"
        ),
    )
    if not engine.streams:
        return
    if free is None:
        yield "weight budget", f"auto depends on a GPU: {found.problem or 'its free memory is unknown'} (of {weights})"
        return
    yield (
        "weight budget",
        (
            f"auto keeps {needed.weights / 1e6:.2f} of {weights} on {found.gpus[0].name}, of which {free / 1e6:.2f} MB "
            "are free"
        ),
    )


def _engine_rows(manifest: dict):
    flavor = manifest["flavor"]
    targets = ", ".join(manifest["compute_capabilities"]) or "the flavor's own choice"
    yield "flavor", f"TensorRT {flavor['name']} {flavor['version']}, compute capability: {targets}"
    yield "flags", ", ".join(manifest["flags"]) or "none"
    yield "lowerings", ", ".join(manifest["lowerings"]) or "none"
    if manifest["one_row"]:
        yield "lowerings for one row", ", ".join(manifest["one_row"]["lowerings"])
    if manifest["weight_inputs"]:
        size = sum(length for _, length in manifest["weight_inputs"].values())
        yield "weights as inputs", f"{len(manifest['weight_inputs'])} of {size / 1e6:.2f} MB"
    if kinds := manifest["runtime"].get("kernel_specialization"):
        yield "kernel specialization", kinds
    limits = [f"{name.replace('_', ' ')} {size} bytes" for name, size in manifest["limits"].items() if size is not None]
    yield "limits", ", ".join(limits) or "none"
    yield "debug tensors", str(len(manifest["debug_tensors"]))
    for profile in manifest["profiles"]:
        shapes = {name: profile["shapes"][name] for name in ("input_ids", "logits_index", "kv_range")}
        yield (
            f"{profile['name']} profile",
            ", ".join(f"{name} {low} … {high}" for name, (low, _, high) in shapes.items()),
        )
    yield (
        "cache",
        (
            f"{manifest['max_batch']} sequences of {manifest['max_seq']} tokens, {manifest['capacity']} rows each: "
            f"the rest takes a prefill chunk of {manifest['chunk']}"
        ),
    )
    yield "package", f"{manifest['package']['path']}, manifest's SHA-256 {manifest['package']['sha256']}"
