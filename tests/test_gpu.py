"""Engines on a real GPU against ONNX Runtime on the CPU, both on the same package."""

import numpy as np
import pytest
import samples

from llmtrt.engine.build import build
from llmtrt.engine.flavor import choose
from llmtrt.engine.gpu import find_gpus
from llmtrt.engine.manifest import open_engine
from llmtrt.errors import UserError
from llmtrt.package import open_package
from llmtrt.quantization.recipe import Recipe
from llmtrt.runtime import decode, read_once
from llmtrt.runtime.cuda import Cuda
from llmtrt.runtime.llm import LLM
from llmtrt.runtime.load import Loaded
from llmtrt.runtime.onnxruntime import OrtSession
from llmtrt.runtime.params import SamplingParams
from llmtrt.runtime.sampling import Sampler
from llmtrt.runtime.scheduler import logits_of
from llmtrt.runtime.session import Decoding
from llmtrt.runtime.speculation import Speculation
from llmtrt.runtime.tensorrt import TrtSession

pytestmark = pytest.mark.gpu

TEXT = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park with her friends. " * 3
)
NEW = 24
# package → (where its checkpoint is, recipe, allowed |Δlogit| as a share of their range, allowed disagreement of top-1)
PACKAGES = {
    "stories-fp32": (samples.stories260k, "fp32", 1e-3, 0.0),
    "stories-fp16": (samples.stories260k, "fp16", 1e-2, 0.02),
    "stories-int4": (samples.stories260k, "int4-g32", 1e-2, 0.02),
    "stories-small": (samples.stories260k, "int4-vocab8", 1e-2, 0.02),
    "smollm2-fp16": (samples.smollm2_gguf, "fp16", 1e-2, 0.02),
    "smollm2-int4": (samples.smollm2_gguf, "int4-g64", 1e-2, 0.02),
}
FAMILIES = ("mistral-sliding", "qwen3", "gemma3", "phi3-partial")
EVEN = "llama-even"  # in INT4 whose weights can be inputs


@pytest.fixture(scope="module", autouse=True)
def gpu():
    found = find_gpus()
    if found.problem:
        pytest.skip(found.problem)
    try:
        choose(need="run")
        Cuda().close()
    except UserError as error:
        pytest.skip(str(error))
    return found.gpus[0]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """``made(name)``: (package, engine) of PACKAGES or FAMILIES, made once."""
    cache = {}

    def make(name):
        if name not in cache:
            from llmtrt.quantization.pipeline import quantize

            folder = tmp_path_factory.mktemp(name)
            if name in PACKAGES:
                where, recipe, *_ = PACKAGES[name]
                checkpoint = where()
            else:
                families = pytest.importorskip("families", reason="needs torch and transformers")
                checkpoint = families.save(name, folder / "checkpoint")
                recipe = Recipe("rtn", 64, lm_head="int4") if name == EVEN else "fp16"
            package = quantize(checkpoint, folder / "package", recipe).package
            max_seq = min(512, package.spec.max_seq)
            cache[name] = package, build(package.path, folder / "engine", max_batch=3, max_seq=max_seq, chunk=64).engine
        return cache[name]

    return make


@pytest.fixture
def sessions(made):
    """``sessions(name)``: (engine's session, package's session at accuracy level 1), closed after the test."""
    opened = []

    def start(name, **options):
        package, engine = made(name)
        opened.extend((TrtSession(engine, **options), OrtSession(package, accuracy_level=1, chunk=64)))
        return opened[-2:]

    yield start
    for session in opened:
        session.close()


def tokens(package, count: int) -> np.ndarray:
    """The first ``count`` tokens of TEXT, or random ones where the package has no tokenizer."""
    if not (package.path / "tokenizer.json").is_file():
        return np.random.default_rng(0).integers(0, package.spec.vocab_size, count)
    from tokenizers import Tokenizer

    return np.array(Tokenizer.from_file(str(package.path / "tokenizer.json")).encode(TEXT).ids[:count], np.int64)


def greedy(session, prompts, count=NEW, chunk=64) -> list[list[int]]:
    """``count`` greedy tokens after each prompt, all prompts in one batch, prefilled in chunks."""
    lengths = np.array([[len(prompt)] for prompt in prompts])
    made, longest = [[] for _ in prompts], int(lengths.max())
    session.reserve(len(prompts), longest + count)
    for start in range(0, longest, chunk):
        rows = min(chunk, longest - start)
        ids = np.zeros((len(prompts), rows), np.int64)
        for slot, prompt in enumerate(prompts):
            part = prompt[start : start + rows]
            ids[slot, : len(part)] = part
        last = lengths - 1 - start
        logits = session.step(ids, np.minimum(lengths, start) + np.arange(rows), np.clip(last, 0, rows - 1))
        for slot in range(len(prompts)):
            if 0 <= last[slot, 0] < rows:
                made[slot].append(int(logits[slot, 0].argmax()))
    for done in range(count - 1):
        ids = np.array([[ids[-1]] for ids in made])
        logits = session.step(ids, lengths + done, np.zeros((len(prompts), 1), np.int64))
        for slot, ids in enumerate(made):
            ids.append(int(logits[slot, 0].argmax()))
    return made


@pytest.mark.parametrize("name", [*PACKAGES, *FAMILIES])
def test_teacher_forced_logits(made, sessions, name):
    on_gpu, on_cpu = sessions(name)
    ids = tokens(made(name)[0], 150)
    ours, wanted = (np.concatenate([*logits_of(session, ids, 64)]) for session in (on_gpu, on_cpu))
    _, _, error, disagreement = PACKAGES.get(name, (None, None, 2e-2, 0.04))
    assert np.isfinite(ours).all()
    worst = np.abs(ours - wanted).max() / np.ptp(wanted)
    other = (ours.argmax(1) != wanted.argmax(1)).mean()
    print(f"{name}: max error {worst:.1e} of the range, top-1 differs in {other:.1%}")
    assert worst <= error and other <= disagreement


@pytest.mark.parametrize("name", PACKAGES)
def test_greedy_tokens(made, sessions, name):
    on_gpu, on_cpu = sessions(name)
    prompt = tokens(made(name)[0], 12)
    assert greedy(on_gpu, [prompt]) == greedy(on_cpu, [prompt])


@pytest.mark.parametrize("name", ["stories-fp32", "smollm2-int4"])
def test_chunked_prefill_and_batches_equal_each_prompt_alone(made, sessions, name):
    on_gpu, _ = sessions(name)
    ids = tokens(made(name)[0], 90)
    prompts = [ids[:90], ids[3:8], ids[10:75]]
    alone = [greedy(on_gpu, [prompt], chunk=64)[0] for prompt in prompts]
    assert [greedy(on_gpu, [prompt], chunk=7)[0] for prompt in prompts] == alone
    assert greedy(on_gpu, prompts) == alone


@pytest.mark.parametrize("strategy", ["LAZY", "EAGER", "NONE"])
def test_every_kernel_specialization_gives_the_same_tokens(made, sessions, strategy):
    if not choose(need="run").can("kernel_specialization"):
        pytest.skip("this flavor has no kernel specialization")
    on_gpu, on_cpu = sessions("smollm2-int4", kernel_specialization=strategy)
    prompt = tokens(made("smollm2-int4")[0], 12)
    assert strategy in on_gpu.description
    assert greedy(on_gpu, [prompt]) == greedy(on_cpu, [prompt])


@pytest.mark.parametrize("strategy", ["LAZY", "EAGER", "NONE"])
@pytest.mark.parametrize("name", ["stories-int4", "smollm2-int4"])
def test_graphs_of_one_context_do_not_disturb_each_other(made, name, strategy):
    """Shapes that take turns, captured and not; specialized kernels may be others than those of a step that was not."""
    package, engine = made(name)
    if not choose(need="run").can("kernel_specialization"):
        pytest.skip("this flavor has no kernel specialization")
    ids, where = np.resize(tokens(package, 60), 512), [(1, 100), (2, 100), (16, 200), (1, 300), (4, 300), (16, 400)]
    seen = []
    for graphs in (True, False):
        session = TrtSession(engine, cuda_graphs=graphs, kernel_specialization=strategy)
        try:
            *_, last = logits_of(session, ids[:500], 64)
            found = [last]
            for rows, start in where * 3:
                places = start + np.arange(rows)[None]
                found.append(
                    session.row_logits(ids[places], places)
                    if rows > 1
                    else session.step(ids[places], places, np.zeros((1, 1), np.int64))
                )
        finally:
            session.close()
        seen.append([each.copy() for each in found])
    for captured, eager in zip(*seen):
        assert np.abs(captured - eager).max() <= (0 if strategy == "NONE" else 1e-2) * np.ptp(eager)
    # The latest turn is the first one's, but for what other shapes leave in the cache, whose last bits may be others.
    first, latest = seen[0][1 : 1 + len(where)], seen[0][-len(where) :]
    assert all(np.abs(one - other).max() <= 1e-2 * np.ptp(one) for one, other in zip(first, latest))


def test_streamed_weights_give_the_same_tokens(made, sessions, tmp_path):
    """Whatever stays on the GPU; across a context bucket and with several sequences, whose graphs are of one context."""
    package, _ = made("smollm2-int4")
    options = dict(max_batch=3, max_seq=512, chunk=64, weight_streaming=True)
    engine = build(package.path, tmp_path / "engine", **options).engine
    on_gpu, _ = sessions("smollm2-int4")
    ids, wanted = np.resize(tokens(package, 60), 250), []
    for budget in ("0%", "50%", "auto"):
        streamed = TrtSession(engine, weight_budget=budget)
        try:
            assert greedy(streamed, [ids[:12]]) == greedy(on_gpu, [ids[:12]])
            made_of = [greedy(streamed, [ids[:count] for count in each]) for each in ((250,), (9, 250, 70), (250, 30))]
            logits = np.concatenate([*logits_of(streamed, ids[:12], 64)])
        finally:
            streamed.close()
        wanted = wanted or [made_of, logits]
        assert made_of == wanted[0] and np.array_equal(logits, wanted[1])


@pytest.mark.parametrize("name", ["stories-int4", "smollm2-int4"])
def test_a_stripped_plan_is_small_and_filled_from_its_package(made, tmp_path, name):
    package, _ = made(name)
    if not choose().can("strip"):
        pytest.skip("this flavor has no STRIP_PLAN")
    # Of one sequence: a plan for several merges projections, which a stripped one leaves as the package has them.
    engine, stripped = (
        build(package.path, tmp_path / f"strip {strip}", max_seq=512, chunk=64, strip=strip, weights="plan").engine
        for strip in (False, True)
    )
    assert stripped.manifest["flags"] == ["REFIT_IDENTICAL", "STRIP_PLAN"]
    # A tied table, which is gathered from as well as multiplied with, stays in the plan: all other weights are gone.
    rows, columns = package.manifest["quantization"]["tensors"]["model.embed_tokens.weight"]["shape"]
    others = (package.path / "model.onnx.data").stat().st_size - 2 * rows * columns
    if others > 10 << 20:  # a tiny model's plan is compiled code in the main
        assert stripped.plan.stat().st_size < engine.plan.stat().st_size - others
    prompt, sessions = tokens(package, 150), [TrtSession(each) for each in (stripped, engine)]
    try:
        filled, whole = (np.concatenate([*logits_of(session, prompt, 64)]) for session in sessions)
        print(f"{name}: {stripped.plan.stat().st_size / 1e6:.1f} MB, max difference {np.abs(filled - whole).max():.1e}")
        assert np.array_equal(filled, whole)
        assert greedy(sessions[0], [prompt[:12]]) == greedy(sessions[1], [prompt[:12]])
    finally:
        for session in sessions:
            session.close()


@pytest.mark.parametrize("name, weights", [(EVEN, "inputs"), (EVEN, "both"), ("smollm2-int4", "inputs")])
def test_weights_as_inputs_give_the_same(made, tmp_path, name, weights):
    """Steps of one row by a plan of their own, other steps too, against the package on ONNX Runtime."""
    package, _ = made(name)
    max_seq = min(512, package.spec.max_seq)
    engine = build(package.path, tmp_path / "engine", max_batch=3, max_seq=max_seq, chunk=64, weights=weights).engine
    prompt = tokens(package, 150)
    session, reference = TrtSession(engine), OrtSession(package, accuracy_level=1, chunk=64)
    try:
        wanted = np.concatenate([*logits_of(reference, prompt, 64)])
        for rows in (64, 1):  # in chunks, and every token by itself
            ours = np.concatenate([*logits_of(session, prompt, rows)])
            error, other = np.abs(ours - wanted).max() / np.ptp(wanted), (ours.argmax(1) != wanted.argmax(1)).mean()
            print(f"{name}, {weights}, {rows} rows: error {error:.1e} of the range, {100 * other:.1f} % other top-1")
            assert error <= 2e-2 and other <= 0.04
    finally:
        session.close()
        reference.close()


def test_what_a_step_reads_once_is_told_to_the_cache_and_gives_the_same(made, tmp_path, monkeypatch):
    """Of weights of any size: a kernel for each product and each cache."""
    package, _ = made(EVEN)
    max_seq = min(512, package.spec.max_seq)
    engine = build(package.path, tmp_path / "engine", max_seq=max_seq, chunk=64, weights="inputs").engine
    prompt, marked, answers = tokens(package, 40).tolist(), [], []
    monkeypatch.setattr(decode, "mark", lambda *what: marked.append(read_once.mark(*what)))
    for smallest in (1e9, 0):
        monkeypatch.setattr(read_once, "_OF_L2", smallest)
        with on(TrtSession(engine), engine) as llm:
            answers.append(
                llm.generate(prompt, SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)).token_ids
            )
    print(f"kernels marked: {marked}")
    assert marked[0] == 0 and marked[-1] >= 6 * package.spec.layers + 1
    assert answers[0] == answers[1]


def on(session, engine, **options) -> LLM:
    loaded = Loaded(session, engine.path, engine.generation, engine.max_batch, engine.max_seq)
    return LLM.from_loaded(loaded, **options)


SAMPLED = [
    dict(temperature=0.0),
    dict(temperature=0.0, repetition_penalty=1.3),
    dict(temperature=0.8, seed=3),
    dict(temperature=1.2, top_k=20, seed=4),
    dict(temperature=1.0, top_p=0.8, min_p=0.02, seed=5),
    dict(temperature=0.7, top_k=50, top_p=0.95, repetition_penalty=1.1, seed=6),
]


@pytest.mark.parametrize("captured", [True, False], ids=["captured", "eager"])
@pytest.mark.parametrize("name", ["stories-fp32", "stories-int4", "smollm2-int4"])
def test_tokens_chosen_on_the_device_are_the_hosts(made, name, captured):
    """Asked for log-probabilities, the host chooses from each step's logits. The answers of tiny models cross a context
    bucket, and sequences join while others decode. SmolLM2 has near ties, whose order may be another for each batch size and
    number of rows of a prefill step: there all start together, and nothing is reused."""
    package, engine = made(name)
    prompts = [tokens(package, count).tolist() for count in ((20, 5, 21) if name == "smollm2-int4" else (240, 5, 70))]
    # Of 49,152 tokens that nothing cuts off, many weigh no more than what fp32 rounds off their sum.
    told_apart = [each for each in SAMPLED if not each["temperature"] or each.keys() & {"top_k", "top_p"}]
    with on(TrtSession(engine, cuda_graphs=captured), engine, reuse_prefixes=False) as llm:
        for params in told_apart if name == "smollm2-int4" else SAMPLED:
            device = llm.generate(prompts, SamplingParams(max_tokens=40, ignore_eos=True, **params))
            host = llm.generate(prompts, SamplingParams(max_tokens=40, ignore_eos=True, logprobs=0, **params))
            assert [one.token_ids for one in device] == [one.token_ids for one in host], params
            alone = llm.generate(prompts[1], SamplingParams(max_tokens=40, ignore_eos=True, **params))
            if name == "stories-fp32":  # in fp16 another batch size may round a near tie the other way
                assert alone.token_ids == device[1].token_ids, params


def test_slots_are_refilled_and_starts_are_reused(made):
    """Nine requests in three slots, twice: the second time every start is in the cache."""
    package, engine = made("stories-fp32")
    texts = [tokens(package, count).tolist() for count in (240, 5, 70, 239, 30, 31, 200, 6, 68)]
    prompts = [[*text, 20 + index] for index, text in enumerate(texts)]
    params = [
        SamplingParams(max_tokens=10 + 7 * index % 30, ignore_eos=True, **SAMPLED[index % len(SAMPLED)])
        for index in range(len(prompts))
    ]
    with on(TrtSession(engine), engine, reuse_prefixes=False) as llm:
        alone = [llm.generate(*pair).token_ids for pair in zip(prompts, params)]
    with on(TrtSession(engine), engine) as llm:
        for _ in range(2):
            assert [one.token_ids for one in llm.generate(prompts, params)] == alone


@pytest.mark.parametrize("name", ["stories-fp32", "stories-int4"])
def test_the_tokens_that_are_chosen_of_all_rows_are_the_hosts(made, name):
    package, engine = made(name)
    ids, session = tokens(package, 16), TrtSession(engine)
    params = SamplingParams(temperature=0.9, top_k=40, top_p=0.95, seed=3)
    try:
        session.reserve(1, 64)
        rows = np.arange(16)[None]
        logits = session.step(ids[None], rows, rows)
        for _ in range(2):  # captured and launched, and launched alone
            assert np.array_equal(session.likeliest(ids[None], rows), logits.argmax(2))
            assert np.array_equal(session.row_logits(ids[None], rows), logits)
            sampler = Sampler(params, package.spec.vocab_size, ids)
            drawn = session.drawn(ids[None], rows, [sampler])[0].tolist()
            assert drawn == [sampler.choose(row)[0] for row in logits[0]]
    finally:
        session.close()


def test_sampled_checks_between_do_not_break_the_graph_of_a_step(made):
    """Steps and checks have one context of the sampler, with noise for as many steps as there are rows, and for one."""
    package, engine = made("stories-fp32")
    ids, one = tokens(package, 12), np.zeros((1, 1), np.int64)
    params = SamplingParams(temperature=1.0, top_p=0.8, min_p=0.02, seed=5)
    session, chosen = TrtSession(engine), []
    try:
        for on_host in (True, False):
            sampler, text = Sampler(params, package.spec.vocab_size, ids), ids.tolist()
            session.reserve(1, 64)
            logits = session.step(ids[None], np.arange(12)[None], one + 11)
            text.append(sampler.choose(logits[0, 0])[0])
            while len(text) < 48:
                if on_host:
                    logits = session.step(np.array([text[-1:]]), one + len(text) - 1, one)
                    text.append(sampler.choose(logits[0, 0])[0])
                    continue
                session.admit(0, Decoding(text[-1], len(text) - 1, 5, params, sampler))
                for _ in range(5):
                    session.decode(1, len(text), greedy=False)
                    text.append(int(session.tokens()[0]))
                    sampler.take(text[-1])
                rows = len(text) - 1 + np.arange(4)[None]
                for token in session.drawn(np.array([chosen[0][rows[0, 0] : rows[0, 0] + 4]]), rows, [sampler])[0]:
                    text.append(int(token))
                    sampler.take(text[-1])
            chosen.append(text)
    finally:
        session.close()
    assert chosen[1][: len(chosen[0])] == chosen[0]


@pytest.mark.parametrize("params", SAMPLED)
def test_drafts_change_no_token(made, params):
    package, engine = made("stories-fp32")
    text = tokens(package, 60).tolist()
    prompts, asked = [[*text, *text[:9]], text], SamplingParams(max_tokens=120, ignore_eos=True, **params)
    speculation = Speculation()
    with on(TrtSession(engine), engine) as plain, on(TrtSession(engine), engine, speculation=speculation) as fast:
        assert [one.token_ids for one in fast.generate(prompts, asked)] == [
            one.token_ids for one in plain.generate(prompts, asked)
        ]
    # Who shuns what was said before, or says whatever comes, does not follow it.
    assert speculation.steps > 0 and (speculation.accepted > 0 or len(params) > 1)


def test_a_stop_ends_the_tokens_where_the_host_would(made):
    package, engine = made("stories-fp32")
    prompt = tokens(package, 12).tolist()
    with on(TrtSession(engine), engine) as llm:
        free = llm.generate(prompt, SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)).token_ids
        for place in (0, 1, 7):
            stop = free[place]
            done = llm.generate(prompt, SamplingParams(max_tokens=30, temperature=0, stop_token_ids=[stop]))
            assert done.token_ids == free[: free.index(stop) + 1] and done.finish_reason == "stop"


def test_logits_that_are_not_numbers_are_told(made, tmp_path):
    from safetensors.numpy import load_file, save_file

    from llmtrt.quantization.pipeline import quantize

    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for path in samples.stories260k().iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = np.full_like(weights["model.norm.weight"], 6e4)  # times any weight above 1: no fp16
    save_file(weights, folder / "model.safetensors")
    package = quantize(folder, tmp_path / "package", "fp16").package
    engine = build(package.path, tmp_path / "engine", max_seq=64, chunk=8).engine
    session = TrtSession(engine)
    try:
        session.reserve(1, 32)
        logits = session.step(np.array([[5]]), np.array([[0]]), np.array([[0]]))
        assert not np.isfinite(logits).all()
        params = SamplingParams(temperature=1.0, seed=0)
        for each in (SamplingParams(), params):
            session.admit(0, Decoding(5, 0, 3, each, Sampler(each, package.spec.vocab_size, np.array([5]))))
            session.decode(1, 1, each.greedy)
            assert session.tokens().tolist() == [-1]
    finally:
        session.close()


@pytest.mark.parametrize("allocation", ["user", "profile", "static"])
def test_every_allocation_strategy_gives_the_same_tokens(made, sessions, allocation):
    on_gpu, on_cpu = sessions("smollm2-int4", allocation=allocation)
    prompt = tokens(made("smollm2-int4")[0], 12)
    assert greedy(on_gpu, [prompt]) == greedy(on_cpu, [prompt])


@pytest.mark.alone
def test_memory_is_about_what_was_predicted(made):
    _, engine = made("smollm2-fp16")
    with on(TrtSession(engine), engine) as llm:
        llm.generate(list(range(100)), SamplingParams(max_tokens=8, temperature=0))
        used = llm.memory()
        print(used)
        assert used.predicted.weights <= used.measured.weights + (8 << 20) and used.measured.weights < (
            1.15 * used.predicted.weights + (8 << 20)
        )
        assert used.measured.kv_cache == engine.capacity * engine.spec.kv_bytes_per_token()
        assert used.measured.activations <= used.predicted.activations
        assert used.measured.scratch < 256 << 20


def test_compiled_kernels_are_kept_on_disk(made, tmp_path):
    if not choose(need="run").can("runtime_cache"):
        pytest.skip("this flavor has no runtime cache")
    _, engine = made("stories-fp16")
    found = []
    for _ in range(2):
        with on(TrtSession(engine, kernel_cache=tmp_path / "kernels"), engine) as llm:
            found.append(llm.generate([5, 6, 7], SamplingParams(max_tokens=20, temperature=0)).token_ids)
        files = {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in (tmp_path / "kernels").iterdir()}
        found.append(files)
    assert found[0] == found[2] and found[1] == found[3]  # the second time nothing was compiled
    assert len(found[1]) >= 2 and all(size > 1000 for size, _ in found[1].values())


@pytest.mark.alone
def test_closing_gives_all_memory_back(made):
    _, engine = made("stories-fp16")
    probe = Cuda()
    try:
        free = []
        for _ in range(6):
            session = TrtSession(engine)
            session.reserve(3, 100)
            params = SamplingParams()
            session.admit(0, Decoding(5, 10, 4, params, Sampler(params, engine.spec.vocab_size, np.array([5]))))
            for length in range(11, 15):
                session.decode(1, length, greedy=True)
                assert session.tokens().shape == (1,)
            used = probe.free_bytes()
            session.close()
            free.append(probe.free_bytes())
            assert used < free[-1]
        # The driver keeps 8 MiB of its own in the first ones; memory that was lost would be 2 MiB at least, each time.
        assert free[2] - free[5] < 4 << 20, free
    finally:
        probe.close()


def test_a_truncated_plan_is_refused(made, tmp_path):
    import shutil

    folder = shutil.copytree(made("stories-fp16")[1].path, tmp_path / "engine")
    plan = (folder / "engine.plan").read_bytes()
    (folder / "engine.plan").write_bytes(plan[: len(plan) // 2])
    with pytest.raises(UserError, match=r"engine\.plan has"):
        open_engine(folder)
    with pytest.raises(UserError, match="does not load"):
        TrtSession(open_engine(folder, verify=False))


def test_the_engine_of_a_package_is_found_again(made):
    package, engine = made("stories-fp16")
    assert open_package(engine.package_path).digest == package.digest


def test_rotary_angles_are_right_at_far_positions(tmp_path):
    """cos and sin are computed in the graph: a fast approximation would go wrong where the angle is 100,000."""
    families = pytest.importorskip("families", reason="needs torch and transformers")
    from llmtrt.quantization.pipeline import quantize

    checkpoint = families.save("mistral-sliding", tmp_path / "checkpoint", max_position_embeddings=131072)
    package = quantize(checkpoint, tmp_path / "package", "fp32").package
    sessions = (
        TrtSession(build(package.path, tmp_path / "engine", chunk=64).engine),
        OrtSession(package, accuracy_level=1, chunk=64),
    )
    ids, rows = np.random.default_rng(0).integers(0, package.spec.vocab_size, (1, 40)), np.arange(40)[None]
    logits = {}
    for session in sessions:
        for start in (0, 100_000):
            session.reserve(1, 131072)
            logits.setdefault(start, []).append(session.step(ids, rows + start, rows).copy())
        session.close()
    near, far = (np.abs(ours - wanted).max() / np.ptp(wanted) for ours, wanted in logits.values())
    print(f"error {near:.1e} of the range from position 0 on, {far:.1e} from 100,000 on")
    assert far <= 2 * near
