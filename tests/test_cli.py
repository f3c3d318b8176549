"""The command line as a user meets it: every mistake one sentence, exit code 2, and nothing half-written."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import samples
from families import save
from safetensors.numpy import load_file, save_file

from llmtrt.cli.main import main

WEIGHTS = "model.safetensors"
GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return save("llama-gqa-tied", tmp_path / "checkpoint")


@pytest.fixture(scope="module")
def stories(tmp_path_factory) -> Path:
    """A package of stories260k, not to be changed."""
    package = tmp_path_factory.mktemp("stories") / "package"
    assert main(["quantize", str(samples.stories260k()), "-o", str(package), "--recipe", "int4-g32"]) == 0
    return package


@pytest.fixture
def own_stories(stories, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(stories, tmp_path / "own"))


def refused(capsys, *arguments: str) -> str:
    """Runs the command, which must end in exit code 2 and one sentence; returns that."""
    capsys.readouterr()
    assert main(list(map(str, arguments))) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1 and printed.err.startswith(f"llmtrt {arguments[0]}: error: ")
    assert "Traceback" not in printed.err
    return printed.err


def edit(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def with_tensors(checkpoint: Path, **changed) -> None:
    file = checkpoint / WEIGHTS
    tensors = load_file(file)
    for name, change in changed.items():
        full = {"gate": GATE}[name]
        tensors[full] = change(tensors[full])
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)


def split(checkpoint: Path) -> None:
    """Makes a sharded checkpoint of it whose second shard is absent."""
    tensors = load_file(checkpoint / WEIGHTS)
    (checkpoint / WEIGHTS).unlink()
    save_file(tensors, checkpoint / "model-00001-of-00002.safetensors")
    where = {name: "model-00001-of-00002.safetensors" for name in tensors} | {GATE: "model-00002-of-00002.safetensors"}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def nan(values: np.ndarray) -> np.ndarray:
    values[3, 5] = np.nan
    return values


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda c: (c / WEIGHTS).unlink(), "safetensors"),
        (lambda c: truncate(c / WEIGHTS), WEIGHTS),
        (split, "model-00002-of-00002.safetensors"),
        (lambda c: with_tensors(c, gate=nan), f"{GATE} has NaN"),
        (
            lambda c: with_tensors(c, gate=lambda w: w[:-1]),
            f"{GATE} has shape [79, 48], but config.json asks for [80, 48]",
        ),
        (lambda c: with_tensors(c, gate=lambda w: None), f"{GATE} is missing"),
        (lambda c: edit(c / "config.json", architectures=["MambaForCausalLM"]), "'MambaForCausalLM' is not supported"),
        (lambda c: edit(c / "config.json", logit_scale=0.0625), "logit_scale = 0.0625"),
        (lambda c: edit(c / "config.json", num_hidden_layers=2), "model.layers.2"),
        (lambda c: edit(c / "generation_config.json", eos_token_id=97), "97 is not below vocab_size"),
        (lambda c: (c / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda c: (c / "config.json").unlink(), "config.json"),
        (lambda c: edit(c / "config.json", quantization_config={"quant_method": "awq", "bits": 4}), "awq"),
    ],
)
def test_quantize_refuses_a_bad_checkpoint(checkpoint, tmp_path, capsys, damage, said):
    damage(checkpoint)
    assert said in refused(capsys, "quantize", checkpoint, "-o", tmp_path / "package")
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_quantize_refuses_an_output_that_exists(checkpoint, tmp_path, capsys):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "keep").write_text("mine")
    assert "exists already" in refused(capsys, "quantize", checkpoint, "-o", tmp_path / "package")
    assert (tmp_path / "package" / "keep").read_text() == "mine"


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("nonesuch", "neither a file nor one of the recipes"),
        ("group_size: 48", "group_size is 48, expected one of 16, 32"),
        ("colour: 3", "unknown key 'colour'"),
        ("algorithm: [rtn", "is not valid YAML"),
        ("!!python/object/apply:os.system [false]", "is not valid YAML"),
    ],
)
def test_quantize_refuses_a_bad_recipe(checkpoint, tmp_path, capsys, recipe, said):
    if recipe != "nonesuch":
        (tmp_path / "recipe.yaml").write_text(recipe)
        recipe = tmp_path / "recipe.yaml"
    assert said in refused(capsys, "quantize", checkpoint, "-o", tmp_path / "package", "--recipe", recipe)
    assert not (tmp_path / "package").exists()


def test_a_hub_id_gets_the_command_that_downloads_it(tmp_path, capsys):
    said = refused(capsys, "quantize", "meta-llama/Llama-3.2-1B", "-o", tmp_path / "package")
    assert "hf download meta-llama/Llama-3.2-1B --local-dir" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-p", ""], "the prompt is empty"),
        (["-p", "caf\udce9"], "the text is not valid Unicode"),
        (["-p", "Once upon a time " * 200], "and the context of 512 has room for 511"),
        (["-p", "Once", "--max-tokens", "0"], "max_tokens"),
        (["-p", "Once", "--temperature", "-1"], "temperature"),
        (["-p", "Once", "--max-seq", "513"], "max_seq is 513"),
        (["-p", "Once", "--chat"], "chat template"),
        (["-p", "Once", "--threads", "100000"], "threads should be an integer between 1 and 1024"),
        (["-p", "Once", "--runtime", "tensorrt"], "llmtrt build"),
    ],
)
def test_generate_refuses_a_bad_prompt(stories, capsys, arguments, said):
    assert said in refused(capsys, "generate", stories, *arguments)


def test_a_chat_without_a_template_does_not_begin(stories, capsys):
    assert "has no chat template: give the whole prompt as text" in refused(capsys, "chat", stories)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda p: flip(p / "model.onnx.data"), "model.onnx.data is corrupt"),
        (lambda p: flip(p / "tokenizer.json"), "tokenizer.json is corrupt"),
        (lambda p: truncate(p / "model.onnx.data"), "model.onnx.data has"),
        (lambda p: (p / "manifest.json").write_text("{}"), "is not a package's manifest"),
        (lambda p: (p / "manifest.json").write_text("[1]"), "should hold a JSON object"),
        (lambda p: (p / "manifest.json").write_bytes(b"\xff\xfe"), "is not valid JSON"),
        (lambda p: edit(p / "manifest.json", format_version=99), "has format version 99"),
        (
            lambda p: edit(p / "manifest.json", files={"model.onnx": {}, "model.onnx.data": {}, "../../x": {}}),
            "is not a plain file name",
        ),
        (lambda p: edit(p / "manifest.json", model={}), "'model' lacks"),
        (lambda p: shutil.rmtree(p), "is not a folder"),
    ],
)
@pytest.mark.parametrize("verb", ["generate", "inspect", "eval", "build"])
def test_every_verb_refuses_a_corrupt_package(own_stories, tmp_path, capsys, damage, said, verb):
    (tmp_path / "text").write_text("Once upon a time")
    more = {
        "generate": ["-p", "Once"],
        "inspect": [],
        "eval": ["--text", tmp_path / "text"],
        "build": ["-o", tmp_path / "engine"],
    }[verb]
    damage(own_stories)
    assert said in refused(capsys, verb, own_stories, *more)
    assert not (tmp_path / "engine").exists()


def test_verification_can_be_skipped(own_stories, capsys):
    tokenizer = own_stories / "tokenizer_config.json"
    tokenizer.write_bytes(tokenizer.read_bytes() + b"\n")
    assert "tokenizer_config.json has" in refused(capsys, "inspect", own_stories)
    assert main(["inspect", str(own_stories), "--no-verify"]) == 0


@pytest.mark.parametrize("flags", ["--strip", "--refit identical", "--refit any", "--strip --refit any"])
def test_flags_that_need_a_gpu_say_so(stories, tmp_path, capsys, flags):
    from llmtrt.engine.gpu import find_gpus

    if not find_gpus().problem:
        pytest.skip("there is a GPU here")
    said = refused(capsys, "build", stories, "-o", tmp_path / "engine", *flags.split())
    assert f"{flags.split()[0]} needs an NVIDIA GPU where the engine is built, but" in said
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--version-compatible", "cannot do --version-compatible: leave it out"),
        ("--kernel-specialization FAST", "--kernel-specialization should be LAZY, EAGER, NONE, but is 'FAST'"),
        ("--workspace 0", "--workspace should be an integer from 1 to"),
        ("--tactic-shared-memory -1", "--tactic-shared-memory should be an integer from 1 to"),
        ("--opt-batch 2", "--opt-batch should be an integer from 1 to 1, but is 2"),
        ("--opt-context 100 --max-seq 64", "--opt-context should be an integer from 1 to 64, but is 100"),
        ("--debug-tensors nothing*", "no tensor that the graph computes is named like 'nothing*': names are as in"),
        ("--flavor rtx==0.1", "TensorRT flavor rtx==0.1: "),
    ],
)
def test_build_refuses_what_the_flavor_does_not_take(stories, tmp_path, capsys, flags, said):
    assert said in refused(capsys, "build", stories, "-o", tmp_path / "engine", *flags.split())
    assert os.listdir(tmp_path) == []


def test_refit_takes_one_of_two_kinds(stories, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["build", str(stories), "-o", str(tmp_path / "engine"), "--refit", "some"])
    assert ended.value.code == 2 and "choose from identical, any" in capsys.readouterr().err.replace("'", "")


@pytest.fixture(scope="module")
def engine(stories, tmp_path_factory) -> Path:
    """An engine of stories260k with something of all that `inspect` shows, not to be changed."""
    folder = tmp_path_factory.mktemp("engine") / "engine"
    more = "--max-batch 4 --max-seq 96 --chunk 32 --weight-streaming --workspace 67108864 --kernel-specialization LAZY"
    assert main(["build", str(stories), "-o", str(folder), *more.split(), "--debug-tensors", "model.norm/RMS*"]) == 0
    return folder


def inspected(capsys, engine) -> dict[str, str]:
    """The rows that `inspect` prints."""
    capsys.readouterr()
    assert main(["inspect", str(engine)]) == 0
    rows = (line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    return {name: value.strip() for name, value in rows}


def test_inspect_tells_what_an_engine_will_take(engine, capsys, monkeypatch):
    from llmtrt.engine import gpu as gpus
    from llmtrt.engine.gpu import Gpu, Gpus

    memory = json.loads((engine / "manifest.json").read_text())["memory"]
    monkeypatch.setattr(gpus, "find_gpus", lambda: Gpus((), problem="the driver sleeps"))
    rows = inspected(capsys, engine)
    assert rows["kernel specialization"] == "LAZY" and rows["debug tensors"] == "1"
    assert rows["limits"] == "workspace 67108864 bytes"
    assert f"{memory['weights'] / 1e6:.2f} MB for weights" in rows["GPU memory"]
    kv_cache = 256 * 5 * 2 * 4 * 8 * 2  # rows, layers, keys and values, heads, head dim, bytes of fp16
    assert f"{kv_cache / 1e6:.2f} MB for the KV cache of one sequence" in rows["GPU memory"]
    assert f"{max(memory['activations']) / 1e6:.2f} MB for activations" in rows["GPU memory"]  # it streams: all
    assert rows["weight budget"] == f"auto depends on a GPU: the driver sleeps (of {memory['weights'] / 1e6:.2f} MB)"

    monkeypatch.setattr(gpus, "find_gpus", lambda: Gpus((Gpu(0, "Some GPU", "8.9", 1 << 34),)))
    for free, kept in ((8 << 30, memory["weights"]), (1000, 0)):
        monkeypatch.setattr(gpus, "free_bytes", lambda gpu, free=free: free)
        rows = inspected(capsys, engine)
        assert rows["weight budget"] == (
            f"auto keeps {kept / 1e6:.2f} of {memory['weights'] / 1e6:.2f} MB on Some GPU, of which {free / 1e6:.2f} MB "
            "are free"
        )
        assert f"{kept / 1e6:.2f} MB for weights" in rows["GPU memory"]


def test_inspect_of_an_engine_imports_no_tensorrt(engine):
    code = (
        "import sys\nfrom llmtrt.cli.main import main\ncode = main(['inspect', sys.argv[1]])\n"
        "assert not [name for name in sys.modules if name.startswith(('tensorrt', 'onnx', 'cuda.'))]\nsys.exit(code)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, engine],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert run.returncode == 0, run.stderr
    assert "GPU memory" in run.stdout


def test_a_token_id_out_of_range(stories):
    from llmtrt import LLM
    from llmtrt.errors import UserError

    with LLM(stories) as llm, pytest.raises(UserError, match="token id 512 is out of range"):
        llm.generate([1, 512])


def command(*arguments, **options) -> subprocess.Popen:
    root = Path(__file__).parents[1]
    return subprocess.Popen(
        [sys.executable, "-m", "llmtrt", *map(str, arguments)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root)},
        **options,
    )


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # noqa: E731
    run = command("quantize", samples.stories260k(), "-o", tmp_path / "package", preexec_fn=limit)
    _, said = run.communicate(timeout=120)
    assert run.returncode == 2 and "Traceback" not in said
    assert said.count("\n") == 1 and f"cannot write {tmp_path / 'package'}" in said
    assert os.listdir(tmp_path) == []


def test_ctrl_c_in_the_middle_leaves_nothing_behind(tmp_path):
    smollm2 = samples.smollm2_gguf()
    run = command("quantize", smollm2, "-o", tmp_path / "package")
    for _ in range(6000):
        found = list(tmp_path.glob(".package.partial-*/model.onnx.data"))
        if found and found[0].stat().st_size > 10_000_000:
            break
        time.sleep(0.01)
    else:
        pytest.fail("quantize wrote nothing")
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=120)
    assert run.returncode == 2
    assert said == "llmtrt quantize: error: interrupted, nothing was left behind\n"
    assert os.listdir(tmp_path) == []


def test_an_interrupted_calibration_says_where_it_goes_on(tmp_path, monkeypatch, capsys):
    kept = tmp_path / "package.calibration"

    def interrupted(*_):
        kept.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr("llmtrt.quantize", interrupted)
    said = refused(capsys, "quantize", samples.stories260k(), "-o", tmp_path / "package")
    assert said.endswith(f"interrupted, {kept} keeps what was done: run the same command again to go on\n")


@pytest.mark.parametrize("below", ["package", "folder/package"])
def test_a_file_where_a_folder_should_be_is_told(tmp_path, capsys, below):
    file = tmp_path / "file"
    file.write_text("")
    said = refused(capsys, "quantize", samples.stories260k(), "-o", file / below)
    assert said.endswith(f"cannot write {file / below}: {file} is a file, not a folder\n")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_mistake(stories, closed):
    line = f'"$0" -c "from llmtrt.cli.main import script; script()" generate "$1" -p Once --max-tokens 2 {closed}'
    run = subprocess.run(["bash", "-c", line, sys.executable, stories], capture_output=True, text=True)
    assert run.returncode == 0 and "Traceback" not in run.stderr
    assert bool(run.stdout) == (closed in ("<&-", "2>&-"))


def test_what_a_program_reads_is_json(stories, tmp_path, capsys):
    def output(*arguments) -> dict:
        capsys.readouterr()
        assert main(list(map(str, arguments))) == 0
        return json.loads(capsys.readouterr().out)

    answer = output("generate", stories, "-p", "Once upon a time", "-p", "Lily", "--max-tokens", 8, "--json")
    assert [len(completion["token_ids"]) for completion in answer["completions"]] == [8, 8]
    assert answer["completions"][0]["finish_reason"] == "length" and "ONNX Runtime" in answer["runtime"]
    (tmp_path / "text").write_text("Once upon a time there was a little girl. " * 40)
    result = output("eval", stories, "--text", tmp_path / "text", "--context", 64, "--tokens", 256, "--json")
    assert result["tokens"] == 256 and 1 < result["perplexity"] < 100
    assert output("inspect", stories, "--json")["recipe"]["group_size"] == 32
    assert output("lint", stories, "--json") is not None
    facts = output("doctor", "--json")
    assert {component["name"] for component in facts["components"]} >= {"onnxruntime", "TensorRT rtx"}


def test_generate_streams_and_says_what_ran(stories, capsys):
    assert main(["generate", str(stories), "-p", "Once upon a time", "--max-tokens", "12"]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() and "ONNX Runtime" in printed.err and "tokens/s" in printed.err


def test_help_names_every_verb_and_imports_nothing_heavy():
    code = (
        "import sys, contextlib\nfrom llmtrt.cli.main import main\n"
        "with contextlib.suppress(SystemExit): main(['--help'])\n"
        "heavy = {'numpy', 'onnx', 'onnx_ir', 'onnxruntime', 'torch', 'tokenizers', 'rich', 'transformers'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert run.returncode == 0, run.stderr
    verbs = "quantize build refit generate chat eval bench debug inspect lint doctor".split()
    assert all(f"\n    {verb} " in run.stdout for verb in verbs)


@pytest.mark.parametrize(
    "arguments",
    [
        ["quantize", "{checkpoint}", "-o", "{tmp}/package"],
        ["generate", "{package}", "-p", "Once", "--max-tokens", "3"],
        ["inspect", "{package}"],
        ["lint", "{package}"],
        ["doctor"],
        ["build", "{package}", "-o", "{tmp}/engine"],
        ["eval", "{package}", "--text", "{tmp}/text", "--context", "16"],
    ],
)
def test_torch_is_not_imported(stories, tmp_path, arguments):
    (tmp_path / "text").write_text("Once upon a time there was a little girl. " * 4)
    filled = [a.format(checkpoint=samples.stories260k(), package=stories, tmp=tmp_path) for a in arguments]
    code = (
        "import sys\nfrom llmtrt.cli.main import main\ncode = main(sys.argv[1:])\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\nsys.exit(code)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, *filled],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert run.returncode == 0, run.stderr


def test_eval_keeps_its_result_beside_the_manifest(own_stories, tmp_path, capsys):
    (tmp_path / "text").write_text("Once upon a time there was a little girl. " * 40)
    before = (own_stories / "manifest.json").read_bytes()
    for context in ("64", "128", "64"):
        said = ["eval", str(own_stories), "--text", str(tmp_path / "text"), "--context", context, "--save"]
        assert main(said) == 0
    kept = json.loads((own_stories / "quality.json").read_text())["measured"]
    assert sorted(entry["context"] for entry in kept) == [64, 128]
    assert {entry["text"] for entry in kept} == {"text"} and all(entry["accuracy_level"] == 1 for entry in kept)
    assert (own_stories / "manifest.json").read_bytes() == before
    capsys.readouterr()
    assert main(["inspect", str(own_stories)]) == 0
    assert f"perplexity {kept[0]['perplexity']}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        {"source": None},
        {"recipe": None},
        {"quantization": {}},
        {"quantization": {"tensors": {"a": 5}}},
        {"files": {"x": 1}},
    ],
)
def test_inspect_refuses_a_manifest_that_nobody_wrote(own_stories, capsys, change):
    edit(own_stories / "manifest.json", **change)
    said = refused(capsys, "inspect", own_stories, "--layers", "--no-verify")
    assert "manifest" in said and str(own_stories) in said


def test_names_too_long_and_folders_that_may_not_be_read_are_told(stories, tmp_path, capsys):
    long = tmp_path / ("x" * 300)
    for arguments in (["quantize", long, "-o", tmp_path / "p"], ["quantize", samples.stories260k(), "-o", long]):
        assert "File name too long" in refused(capsys, *arguments)
    for verb in ("generate", "inspect", "lint"):
        assert "File name too long" in refused(capsys, verb, long, *(["-p", "Once"] if verb == "generate" else []))


def test_a_missing_library_is_told_with_the_command_that_installs_it(tmp_path):
    code = (
        "import sys\nsys.modules['onnx_ir'] = None\nfrom llmtrt.cli.main import main\n"
        "sys.exit(main(['quantize', sys.argv[1], '-o', sys.argv[2]]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, samples.stories260k(), tmp_path / "package"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert run.returncode == 2
    assert run.stderr == (
        "llmtrt quantize: error: the Python module onnx_ir is missing: pip install 'llmtrt[quantize]'\n"
    )


def test_a_checkpoint_where_a_package_is_wanted_gets_the_command_that_makes_one(checkpoint, capsys):
    assert "which `llmtrt quantize CHECKPOINT -o PACKAGE` makes" in refused(
        capsys, "generate", checkpoint, "-p", "Once"
    )


def test_eval_says_what_it_cannot_measure_before_it_measures(stories, tmp_path, capsys):
    (tmp_path / "text").write_text("Once upon a time there was a little girl. " * 40)
    for tokens in ("-5", "3", "1000000"):
        refused(capsys, "eval", stories, "--text", tmp_path / "text", "--context", "64", "--tokens", tokens)
    assert "--save" in refused(capsys, "eval", tmp_path, "--text", tmp_path / "text", "--save")
