"""The session on a TensorRT engine: weights, KV cache and activations in the memory of one GPU."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmtrt.engine.flavor import choose_for
from llmtrt.engine.gpu import Gpu, find_gpus, free_bytes
from llmtrt.engine.load import deserialize, make_runtime
from llmtrt.engine.logger import make_logger
from llmtrt.engine.manifest import DECODE, GREEDY, PLAN, SAMPLER, Engine, sampler_rows
from llmtrt.engine.options import CONTEXT_STEP
from llmtrt.engine.refit import refit
from llmtrt.errors import CannotRunHere, UserError
from llmtrt.graph.names import VALUE_ROWS
from llmtrt.package import Package
from llmtrt.runtime.context import Context, Settings, Shapes
from llmtrt.runtime.cuda import Cuda, Region
from llmtrt.runtime.decode import DecodeLoop, DecodeState
from llmtrt.runtime.footprint import (
    Footprint,
    MemoryUse,
    logit_rows,
    most_checked,
    predict,
    room_for_weights,
    state_bytes,
)
from llmtrt.runtime.kernel_cache import KernelCache, default_folder
from llmtrt.runtime.kv_cache import KvCache, aligned
from llmtrt.runtime.profiles import Profiles
from llmtrt.runtime.sampling import Sampler
from llmtrt.runtime.session import Decoding
from llmtrt.runtime.streaming import WeightBudget
from llmtrt.runtime.tensors import Tensor, tensors_of
from llmtrt.runtime.weight_inputs import WeightInputs

_SMALLEST_CONTEXT = CONTEXT_STEP
_INPUTS = ("input_ids", "positions", "logits_index")
_CHOSEN = ("tokens", "next_ids", "next_positions")
_NOTHING = Region(0, 0)
_NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "BF16": np.uint16}


class TrtSession:
    """A ``DeviceSession`` on TensorRT, on the machine's first GPU.

    Contexts for prefill, for decode (S = K = 1) and for the sampler share the weights, the KV cache, which each layer
    updates in place, and one block of activation memory, since no two of them run at the same time. A step of one slot has a
    plan of its own where the engine has one.

    Each profile has one context, from which a CUDA graph is captured for each shape that comes. NVIDIA's developer guide
    advises a context for each graph; its TensorRT Edge-LLM (EngineExecutor) has one for all. To make one takes TensorRT 8 to
    15 ms a layer, during which no step begins; to give it other shapes and capture a step, some 10 ms in all (TensorRT-RTX
    1.6.1, H100). That the graphs do not disturb each other is tested in tests/test_gpu.py.

    ``package``: fills a plan without weights, or one that takes any, instead of the package it was built from.
    ``allocation``: "user" (one block for all, as large as the shapes in use need), "profile" or "static" (TensorRT
    allocates for each context by itself). ``kernel_specialization`` (LAZY, EAGER, NONE; TensorRT-RTX alone has it): by
    default as the engine's manifest records it. ``weight_budget``: weights to keep on the GPU, of an engine that was built
    to stream them, as ``WeightBudget.parse`` reads it. ``cuda_graphs``: without, every step is put on the stream
    anew. ``kernel_cache``: the folder for compiled kernels; "auto": the user's, None: none. ``trust_host_code``: loads a
    version-compatible plan, which carries code that runs on the host. ``verify``: whether the package that a plan without
    weights is filled from is compared with its SHA-256.

    Raises CannotRunHere if there is no GPU or driver, if the engine's flavor is not installed or has another version, and
    if the plan was made for another GPU, as far as TensorRT tells that; UserError if the plan is damaged, or has no weights
    and its package is not found, and, before the GPU is touched, if weights and the cache of one sequence need more memory
    than is free.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        package: Package | None = None,
        allocation: str = "user",
        kernel_specialization: str | None = None,
        weight_budget: str | int | WeightBudget = "auto",
        cuda_graphs: bool = True,
        kernel_cache: str | Path | None = "auto",
        trust_host_code: bool = False,
        verify: bool = True,
    ):
        self._settings = Settings(
            allocation, kernel_specialization or engine.manifest["runtime"].get("kernel_specialization")
        )
        budget = WeightBudget.parse(weight_budget)
        if not engine.streams and budget != WeightBudget():
            raise UserError(
                f"{engine.path} does not stream its weights, so it takes no --weight-budget: leave it out, or build it with "
                "--weight-streaming"
            )
        if engine.streams and allocation == "profile":
            # TensorRT-RTX 1.6.1: NaN, or the failed check "weight_streaming.cpp: reservoir_.base != 0".
            raise UserError(
                f"{engine.path} streams its weights, with which TensorRT computes wrong values where it allocates for each "
                "profile by itself: use --allocation user or static"
            )
        kernel_folder = default_folder() if kernel_cache == "auto" else kernel_cache and Path(kernel_cache)
        gpu = _find_gpu(engine)
        self._flavor = choose_for(engine.flavor, engine.flavor_version, engine.version_compatible, str(engine.path))
        self._settings.check(self._flavor)
        self.spec, self.chunk, self.check_rows = engine.spec, engine.chunk, engine.check_rows
        self.most_checked = most_checked(engine, engine.max_batch)
        self._opened = engine
        self._profiles = Profiles(engine)
        free = free_bytes(gpu)
        self._predicted = predict(engine, 1, budget, free)
        remedy = "build it with fewer bits, --weight-streaming or a smaller --max-seq or --chunk"
        self._predicted.require(
            free, f"{engine.path}", f"lower --weight-budget, or {remedy}" if engine.streams else remedy
        )
        self._logger = make_logger(self._flavor)
        self._cuda = Cuda(gpu.index)
        self._runtime: Any = None
        self._engines: dict[str, Any] = {}
        self._tensors: dict[str, tuple[Tensor, ...]] = {}  # of each engine
        self._contexts: dict[tuple[str, int], Context] = {}  # by plan and profile
        self._needed: dict[tuple, int] = {}  # bytes of activations by plan, profile and shapes
        self._kernels: dict[str, KernelCache] = {}
        self._layout = 0  # changes whenever memory moves that contexts were told of
        self._reserved = (0, 0)  # slots and rows of each that may be used
        self._activations, self._inputs, self._logits = _NOTHING, _NOTHING, _NOTHING
        self._host_inputs = self._host_logits = self._loop = None
        self._ready: set[tuple[Context, tuple[int, ...]]] = set()  # contexts, by the shapes that they were given
        self._state: DecodeState | None = None
        self._rows: DecodeState | None = None  # of the rows of a check, each as a sequence of its own
        self._weights: WeightInputs | None = None
        self._debug: dict[str, tuple[Region, tuple[int, ...]]] = {}
        self._written_out: dict[str, Region] = {}  # what a plan has for outputs only to compute them once
        self._free_at_start, self._measured, self._streaming_scratch = 0, {}, 0
        try:
            self._free_at_start = self._cuda.free_bytes()
            self._load(engine, package, budget, gpu, kernel_folder, trust_host_code, verify)
            steps = self._contexts_of_step, self._context_of_check, self._context_of_choice
            self._loop = DecodeLoop(self._cuda, *steps, cuda_graphs, self._read_once)
        except BaseException:
            self.close()
            raise
        kernels = f", {self._settings.specialization} kernel specialization" if self._settings.specialization else ""
        self.description = f"TensorRT {self._flavor.name} {self._flavor.version}, {gpu.name}{kernels}"

    def reserve(self, slots: int, max_seq: int, keep: Sequence[int] = ()) -> int:
        """See ``Session``; the cache of each slot has the rows that the engine was built for."""
        if not self._engines:
            raise UserError(f"{self._opened.path} is closed: load it again")
        if slots > self._opened.max_batch:
            raise UserError(
                f"{self._opened.path} runs {self._opened.max_batch} sequences at a time, not {slots}: ask for fewer, or "
                f"build it with --max-batch {slots}"
            )
        if max_seq > self._opened.max_seq:
            raise UserError(
                f"{self._opened.path} was built for {self._opened.max_seq} tokens, not {max_seq}: ask for fewer, or build "
                f"it with --max-seq {max_seq}"
            )
        self._loop.discard()
        grows, self._reserved = slots > self._kv.slots, (0, 0)
        if grows:
            self._free_slots()
        self._take_activations(slots, max_seq)
        if grows:
            self._allocate_slots(slots)
        rows = min(self._opened.capacity, max_seq + self.chunk)
        keeps = any(keep) and not grows
        if not keeps:
            self._kv.zero()
        self._kv.used(slots, self._bucket(rows))
        self._reserved = slots, rows
        return self._kv.slots if keeps else 0

    def step(
        self, input_ids: np.ndarray, positions: np.ndarray, logits_index: np.ndarray, first: int = 0
    ) -> np.ndarray:
        """See ``Session``."""
        batch, rows = input_ids.shape
        wanted, last = logits_index.shape[1], int(positions.max())
        self._require_reserved(first, batch, rows, last)
        # Everything below is on one stream: the copies run before the step that reads them, so nobody waits in between.
        # The pinned array may be written again only after the copies from it have run, which the wait for the logits at
        # the end assures. A caller that did not wait would need TensorRT's set_input_consumed_event, or a second array.
        if rows == wanted == 1 and first == 0:
            self._state.feed(input_ids, positions)
            self._loop.logits(batch, self._bucket(last + 1))
        else:
            room = self._reserved[1] - int(positions.min())
            profile, padded = self._profiles.padded(batch, rows, wanted, room)
            if padded > rows:
                input_ids = np.pad(input_ids, ((0, 0), (0, padded - rows)))
                positions = positions[:, :1] + np.arange(padded)
                last = int(positions.max())
            context = self._prefill(first, batch, padded, wanted, self._bucket(last + 1), profile)
            self._upload(input_ids, positions, logits_index)
            context.run()
        return self._fetch_logits(batch, wanted)

    def likeliest(self, input_ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """See ``DeviceSession``; as ``step``, it waits for the end."""
        self._check(input_ids, positions, sampled=False)
        return self._fetch_tokens(input_ids.shape)

    def drawn(self, input_ids: np.ndarray, positions: np.ndarray, samplers: Sequence[Sampler | None]) -> np.ndarray:
        """See ``DeviceSession``; as ``step``, it waits for the end."""
        if input_ids.size > self.check_rows:
            raise ValueError(f"{input_ids.size} rows are to be drawn of, more than {self.check_rows}")
        if len(samplers) != len(input_ids) or any(each and each.seen is not None for each in samplers):
            raise ValueError(
                "every sequence of a step that is drawn takes a sampler without a repetition penalty, or None"
            )
        self._check(input_ids, positions, True, samplers)
        return self._fetch_tokens(input_ids.shape)

    def row_logits(self, input_ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """See ``DeviceSession``; as ``step``, it waits for the end."""
        self._check(input_ids, positions, sampled=None)
        return self._fetch_logits(*input_ids.shape)

    def _check(
        self,
        input_ids: np.ndarray,
        positions: np.ndarray,
        sampled: bool | None,
        samplers: Sequence[Sampler | None] = (),
    ) -> None:
        batch, rows = input_ids.shape
        last = int(positions.max())
        self._require_reserved(0, batch, rows, last)
        if batch * rows > self.most_checked:
            raise ValueError(f"{batch} × {rows} rows are to be checked, more than {self.most_checked}")
        self._upload(input_ids, positions, np.broadcast_to(np.arange(rows), (batch, rows)))
        if sampled:
            self._rows.draw(samplers, rows)
        self._loop.check(batch, rows, self._bucket(last + 1), sampled)

    def _fetch_tokens(self, shape: tuple[int, ...]) -> np.ndarray:
        tokens = np.empty(shape, np.int64)
        self._cuda.download(tokens, self._input_places()["tokens"].address)
        self._cuda.synchronize()
        return tokens

    def _fetch_logits(self, batch: int, wanted: int) -> np.ndarray:
        logits = self._host_logits[: batch * wanted * self.spec.vocab_size]
        self._cuda.download(logits, self._logits.address)
        self._cuda.synchronize()
        return logits.reshape(batch, wanted, self.spec.vocab_size).copy()

    def copy_rows(self, source: int, target: int, rows: int) -> None:
        """See ``Session``."""
        self._kv.copy_rows(source, target, rows)

    def clear_rows(self, slot: int, start: int) -> None:
        """See ``Session``."""
        self._kv.clear_rows(slot, start)

    @property
    def prepared(self) -> int:
        """See ``DeviceSession``."""
        return len(self._ready) + self._loop.captured

    def admit(self, index: int, decoding: Decoding) -> None:
        """See ``DeviceSession``."""
        slots, room = self._reserved
        if index >= slots or decoding.position + decoding.steps > room:
            raise ValueError(f"slot {index} is to decode more than what was reserved")
        self._state.admit(index, decoding)

    def park(self, index: int, position: int) -> None:
        """See ``DeviceSession``."""
        self._state.park(index, position)

    def decode(self, slots: int, length: int, greedy: bool) -> None:
        """See ``DeviceSession``."""
        reserved, room = self._reserved
        if slots > reserved or length > room:
            raise ValueError(f"a step of {slots} slots up to row {length} is more than what was reserved")
        self._loop.start(self._state, slots, self._bucket(length), not greedy)

    def tokens(self) -> np.ndarray:
        """See ``DeviceSession``."""
        return self._loop.tokens()

    def memory(self) -> MemoryUse:
        """GPU memory by kind: as predicted for the slots that are reserved, and as measured so far."""
        taken, gone = self._measured, max(0, self._free_at_start - self._cuda.free_bytes())
        activations = max(0, self._activations.size - self._streaming_scratch)
        known = [taken.get("weights", 0), self._kv.bytes_for(self._kv.slots), activations]
        return MemoryUse(self._predicted, Footprint(*known, max(0, gone - sum(known))))

    def debug_values(self) -> dict[str, np.ndarray]:
        """What the last step computed for each of the engine's debug tensors; bfloat16 as fp32."""
        values = {}
        for name, (region, shape) in self._debug.items():
            values[name] = np.empty(shape, _NUMPY[self._engines[PLAN].get_tensor_dtype(name).name])
            self._cuda.download(values[name], region.address)
        self._cuda.synchronize()
        return {name: _numbers(array) for name, array in values.items()}

    def close(self) -> None:
        """See ``Session``."""
        try:
            for kernels in self._kernels.values():
                kernels.save()
        finally:
            # Contexts use the stream and the memory, and each object of TensorRT the one that made it.
            self._cuda.finish()
            if self._loop is not None:
                self._loop.close()  # a generator that nobody finished still holds it
            self._loop = None
            self._ready, self._contexts, self._kernels, self._engines = set(), {}, {}, {}
            self._runtime = None
            self._state = self._rows = None
            self._cuda.close()
            self._reserved = (0, 0)

    def _load(
        self,
        engine: Engine,
        package: Package | None,
        budget: WeightBudget,
        gpu: Gpu,
        kernel_folder: Path | None,
        trust_host_code: bool,
        verify: bool,
    ) -> None:
        flavor, logger, cuda = self._flavor, self._logger, self._cuda
        self._runtime = make_runtime(flavor, logger, engine, trust_host_code)
        for name in engine.plans:
            streams = engine.streams and name == PLAN
            self._engines[name] = deserialize(flavor, self._runtime, engine.path / name, logger, streams)
            self._tensors[name] = tensors_of(self._engines[name])
            key = engine.manifest["files"][name]["sha256"], flavor.version, gpu.name, gpu.compute_capability, gpu.driver
            self._kernels[name] = KernelCache(flavor, kernel_folder, *key)
        decoder = self._engines[PLAN]
        if engine.weight_inputs:
            if package is not None:
                raise UserError(
                    f"{engine.path} has its weights beside the plan and takes no others: leave --package out, or build an "
                    "engine from that package"
                )
            self._weights = WeightInputs(engine, self._decoders(), cuda)
        elif engine.stripped or package is not None:
            refit(flavor, decoder, engine, logger, verify, package=package)
        if engine.streams:
            room = room_for_weights(engine, 1, cuda.free_bytes())
            streamable = decoder.streamable_weights_size
            wanted = budget.resolve(streamable, room, engine.streaming_scratch_bytes)
            logger.clear()
            decoder.weight_streaming_budget_v2 = wanted
            if decoder.weight_streaming_budget_v2 != wanted:  # the setter drops TensorRT's answer
                raise UserError(
                    f"TensorRT refuses a weight budget of {wanted} bytes for {engine.path} "
                    f"({logger.reason() or 'it gave no reason'}): ask for another --weight-budget"
                )
            self._measured["weights"] = wanted
            if self._settings.allocation == "user":  # it is part of what contexts then ask of us
                self._streaming_scratch = decoder.weight_streaming_scratch_memory_size
        else:
            cuda.synchronize()
            self._measured["weights"] = max(0, self._free_at_start - cuda.free_bytes())
        caches = [KvCache(tensors, cuda) for tensors in self._decoders()]
        self._kv = caches[0]
        for cache in caches:
            if not cache.aliased or len(cache) != 2 * self.spec.layers or cache.capacities() != {engine.capacity}:
                raise UserError(
                    f"{engine.path}: the plan's KV cache is not the one that the manifest describes, updated in place: "
                    "build the engine anew with `llmtrt build`"
                )
        if engine.max_batch > 1 and not self._kv.slots_are_aligned:
            raise UserError(
                f"{engine.path}: {engine.capacity} rows of cache do not end where TensorRT lets the next sequence's begin: "
                "build the engine anew with `llmtrt build`"
            )
        positions = np.arange(engine.capacity, dtype=np.int64)
        self._range = Region(cuda.allocate(positions.nbytes), positions.nbytes)
        cuda.upload(self._range.address, positions)
        for tensor in self._tensors.get(DECODE, ()):
            if not tensor.is_input and tensor.alias is None and tensor.name != "logits":
                self._written_out[tensor.name] = Region(cuda.allocate(tensor.bytes), tensor.bytes)
        cuda.synchronize()

    def _decoders(self) -> list[tuple[Tensor, ...]]:
        """The tensors of each plan that decodes."""
        return [self._tensors[name] for name in (PLAN, DECODE) if name in self._engines]

    def _context(self, plan: str, profile: int) -> Context:
        """That of the profile, made when it is first asked for."""
        if (plan, profile) not in self._contexts:
            engine, tensors, kernels = self._engines[plan], self._tensors[plan], self._kernels[plan]
            self._contexts[plan, profile] = Context(
                self._flavor, engine, tensors, profile, self._settings, kernels, self._cuda, self._logger
            )
            kernels.save()
        return self._contexts[plan, profile]

    def _decoder(self, batch: int, bucket: int) -> Context:
        """The decode context for ``batch`` slots and a bucket; its inputs are those of the ``DecodeState``."""
        context = self._context(*self._profiles.decode(batch))
        return self._prepared(context, 0, (batch, 1, 1, bucket), self._state.places())

    def _read_once(self) -> tuple[list[Region], list[Region]]:
        """Weights and caches, as a step reads them, where they lie now."""
        weights = self._weights.places() if self._weights else {}
        return list(weights.values()), list(self._kv.places().values())

    def _require_reserved(self, first: int, batch: int, rows: int, last: int) -> None:
        slots, room = self._reserved
        if first + batch > slots or rows > self.chunk or last >= room:
            # TensorRT would drop the rows beyond the cache without a word.
            raise ValueError(
                f"a step of {batch} × {rows} rows from slot {first} on, up to position {last}, is more than what was "
                "reserved"
            )

    def _upload(self, *inputs: np.ndarray) -> None:
        """Puts the copies of a prefill step's inputs on the stream."""
        places = self._input_places()
        for name, values in zip(_INPUTS, inputs):
            offset = (places[name].address - self._inputs.address) // 8
            staged = self._host_inputs[offset : offset + values.size]
            staged[:] = values.reshape(-1)
            self._cuda.upload(places[name].address, staged)

    def _contexts_of_step(self, batch: int, bucket: int, sampled: bool | None) -> tuple[Context, ...]:
        decoder = self._decoder(batch, bucket)
        if sampled is None:
            return (decoder,)
        return decoder, self._sampler(sampled, batch, self._state.places(), self._opened.capacity)

    def _context_of_check(self, batch: int, rows: int, bucket: int) -> tuple[Context]:
        """That of a prefill step whose every row's logits are wanted."""
        return (self._prefill(0, batch, rows, rows, bucket, self._profiles.prefill),)

    def _context_of_choice(self, rows: int, sampled: bool) -> tuple[Context]:
        """That of a sampler for rows of a check, each as if it were a sequence."""
        places = self._input_places()
        places = self._rows.places() | places | {"last_rows": places["positions"]}
        return (self._sampler(sampled, rows, places, 1),)

    def _prefill(self, first: int, batch: int, rows: int, wanted: int, length: int, profile: int) -> Context:
        context = self._context(PLAN, profile)
        return self._prepared(context, first, (batch, rows, wanted, length), self._input_places())

    def _sampler(self, sampled: bool, batch: int, places: dict[str, Region], steps: int) -> Context:
        """The context of a sampler, made ready for ``batch`` rows of logits and noise of ``steps``, unless it is."""
        plan, where = SAMPLER if sampled else GREEDY, places["last_rows"]
        context = self._context(plan, 0)
        if context.state != (batch, where, self._layout):
            self._grow_activations(context.set_shapes(self._sampler_shapes(plan, batch, steps)))
            context.bind(places | {"logits": self._logits}, self._activations)
            context.state = (batch, where, self._layout)
            self._ready.add((context, (batch, steps)))
        return context

    def _sampler_shapes(self, plan: str, batch: int, steps: int) -> Shapes:
        return {
            each.name: (batch, *(steps if size < 0 else size for size in each.shape[1:]))
            for each in self._tensors[plan]
            if each.is_input
        }

    def _prepared(
        self, context: Context, first: int, shapes: tuple[int, int, int, int], inputs: dict[str, Region]
    ) -> Context:
        """Makes ``context`` ready for a step of B, S, K, L = ``shapes`` of the slots from ``first`` on, unless it is."""
        if context.state != (first, *shapes, self._layout):
            batch, _, wanted, _ = shapes
            self._grow_logits(batch * wanted * self.spec.vocab_size)
            self._grow_activations(context.set_shapes(self._shapes(context.inputs, context.profile, *shapes)))
            places = self._kv.places(first) | inputs | {"kv_range": self._range, "logits": self._logits}
            places |= {"decode_rows": self._range} | self._written_out
            places |= self._weights.places() if self._weights else {}
            context.bind(places | self._debug_places(context), self._activations)
            context.state = (first, *shapes, self._layout)
            self._ready.add((context, shapes))
        return context

    def _shapes(
        self, tensors: Sequence[Tensor], profile: int, batch: int, rows: int, wanted: int, length: int
    ) -> Shapes:
        named = {"input_ids": (batch, rows), "positions": (batch, rows), "logits_index": (batch, wanted)}
        for each in tensors:
            if each.name == "decode_rows":
                named[each.name] = (int(self._profiles.decodes(profile)),)
            elif each.name.startswith(VALUE_ROWS):
                named[each.name] = (length // each.shape[1], *each.shape[1:])
        return named | {"kv_range": (length,)} | self._kv.shapes(batch)

    def _needs(self, plan: str, profile: int, sizes: tuple[int, ...]) -> int:
        """The bytes of activations of a step of B, S, K, L = ``sizes``, or of a sampler's of B, N; asked of TensorRT
        once, which takes it some milliseconds."""
        key = plan, profile, sizes
        if key not in self._needed:
            if plan in (GREEDY, SAMPLER):
                shapes = self._sampler_shapes(plan, *sizes)
            else:
                shapes = self._shapes(self._tensors[plan], profile, *sizes)
            self._needed[key] = self._context(plan, profile).set_shapes(shapes)
        return self._needed[key]

    def _bucket(self, length: int) -> int:
        """The rows of cache that a step sees whose last position is ``length`` − 1. Each is a shape of its own, with a graph
        of its own, so there are eight between a power of two and the next, of 256 rows at least."""
        step = _SMALLEST_CONTEXT
        while 16 * step < length:
            step *= 2
        return min(-(-length // step) * step, self._opened.capacity)

    def _take_activations(self, slots: int, max_seq: int) -> None:
        """Takes what ``slots`` sequences need of memory for activations; UserError, before anything is allocated, if that,
        their KV cache and the sampler's state do not fit."""
        capacity, check_rows = self._opened.capacity, self.check_rows
        length = self._bucket(min(capacity, max_seq + self.chunk))
        side_by_side = min(slots, self.chunk)  # a prefill step has a chunk of rows, of one prompt or of several
        samplers = [(plan, (slots, capacity)) for plan in (GREEDY, SAMPLER)]
        samplers += [(GREEDY, (most_checked(self._opened, slots), 1)), (SAMPLER, (check_rows, 1))]
        if self._streaming_scratch:
            most = sampler_rows(check_rows, self._opened.max_batch)
            samplers = [(plan, (rows, capacity)) for plan, rows in most.items()]
        decoding = {slots, max(1, slots - 1)} | ({1} if DECODE in self._engines else set())  # not all are always in use
        rows, prefill = min(self.chunk, max_seq), (PLAN, self._profiles.prefill)
        checked = min(check_rows, max_seq)
        together = most_checked(self._opened, slots) // check_rows
        profile, padded = self._profiles.padded(1, rows, 1, capacity)
        steps = [(self._profiles.decode(count), (count, 1, 1, length)) for count in decoding]
        steps += [
            (prefill, (1, rows, 1, length)),
            (prefill, (1, checked, checked, length)),
            (prefill, (together, checked, checked, length)),
            (prefill, (side_by_side, min(self.chunk // side_by_side, max_seq), 1, length)),
            ((PLAN, profile), (1, padded, 1, length)),
        ]
        activations = max(
            *(self._needs(*place, sizes) for place, sizes in steps),
            *(self._needs(plan, 0, sizes) for plan, sizes in samplers),
        )
        if self._streaming_scratch:
            # One block for good, of the largest shapes: sized by each step's shapes and moved when they grew, it gave NaN
            # at the 8B shape with half the weights streamed (TensorRT-RTX 1.6.1).
            decoder = self._engines[PLAN]
            sizes = map(decoder.get_device_memory_size_for_profile_v2, range(decoder.num_optimization_profiles))
            activations = max(activations, *sizes)
        grows = slots > self._kv.slots
        needed = Footprint(
            0,
            self._kv.bytes_for(slots) if grows else 0,
            max(0, aligned(activations) - self._activations.size),
            state_bytes(self._opened, slots) if grows else 0,
        )
        needed.require(
            self._cuda.free_bytes(),
            f"generating {slots} sequences together",
            "use a smaller max_batch, or build the engine with a smaller --max-seq or --chunk",
            reserve=0,
        )
        self._predicted = Footprint(
            self._predicted.weights,
            max(self._predicted.kv_cache, self._kv.bytes_for(slots)),
            max(self._predicted.activations, activations - self._streaming_scratch),
            max(self._predicted.scratch, needed.scratch),
        )
        self._grow_activations(activations)

    def _allocate_slots(self, slots: int) -> None:
        try:
            self._kv.allocate(slots)
            self._state = DecodeState(self._cuda, slots, self.spec.vocab_size, self._opened.capacity)
            self._rows = DecodeState(self._cuda, self.check_rows, self.spec.vocab_size, 1)
            size = len(_INPUTS + _CHOSEN) * aligned(slots * self.chunk * 8)
            self._inputs = Region(self._cuda.allocate(size), size)
            self._host_inputs = self._cuda.pinned(size // 8, np.int64)
            self._grow_logits(logit_rows(self._opened, slots) * self.spec.vocab_size)
        except BaseException:
            self._free_slots()
            raise
        self._moved()

    def _input_places(self) -> dict[str, Region]:
        """Where the inputs of a prefill step lie, and what is chosen from its logits."""
        names = _INPUTS + _CHOSEN
        size = self._inputs.size // len(names)
        return {name: Region(self._inputs.address + index * size, size) for index, name in enumerate(names)}

    def _free_slots(self) -> None:
        self._moved()
        self._kv.free()
        for state in (self._state, self._rows):
            if state is not None:
                state.free()
        self._state = self._rows = None
        self._cuda.free(self._inputs.address)
        self._inputs = _NOTHING
        if self._host_inputs is not None:
            self._cuda.free_pinned(self._host_inputs)
            self._host_inputs = None

    def _grow_activations(self, size: int) -> None:
        if size > self._activations.size:
            self._moved()
            self._cuda.free(self._activations.address)
            self._activations = _NOTHING
            self._activations = Region(self._cuda.allocate(aligned(size)), aligned(size))

    def _grow_logits(self, count: int) -> None:
        if count * 4 <= self._logits.size:
            return
        self._moved()
        self._cuda.free(self._logits.address)
        self._logits = _NOTHING
        if self._host_logits is not None:
            self._cuda.free_pinned(self._host_logits)
            self._host_logits = None
        self._host_logits = self._cuda.pinned(count, np.float32)
        self._logits = Region(self._cuda.allocate(count * 4), count * 4)

    def _debug_places(self, context: Context) -> dict[str, Region]:
        """Fresh memory for the debug tensors in the shapes that they have now."""
        if self._debug:
            self._moved()
        for region, _ in self._debug.values():
            self._cuda.free(region.address)
        self._debug = {}
        for name in self._opened.debug_tensors:
            shape = context.shape_of(name)
            size = int(np.prod(shape)) * self._engines[PLAN].get_tensor_dtype(name).itemsize
            self._debug[name] = Region(self._cuda.allocate(size), size), shape
        return {name: region for name, (region, _) in self._debug.items()}

    def _moved(self) -> None:
        """Memory that contexts and graphs were told of is about to go."""
        self._layout += 1
        if self._loop is not None:
            self._loop.forget()


def _find_gpu(engine: Engine) -> Gpu:
    found = find_gpus()
    if found.problem:
        raise CannotRunHere(f"{engine.path} is an engine and needs an NVIDIA GPU, but {found.problem}")
    gpu, targets = found.gpus[0], engine.compute_capabilities
    if targets and gpu.compute_capability not in targets:
        raise CannotRunHere(
            f"{engine.path} was built for compute capability {', '.join(targets)}, but {gpu.name} has "
            f"{gpu.compute_capability}: build it with --compute-capability {gpu.compute_capability}, or without"
        )
    return gpu


def _numbers(values: np.ndarray) -> np.ndarray:
    """Bits of bfloat16, which numpy does not have, as fp32; anything else as it is."""
    return (values.astype(np.uint32) << 16).view(np.float32) if values.dtype == np.uint16 else values
