"""One plan: an ONNX graph parsed, configured and compiled by one flavor of TensorRT."""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llmtrt import files
from llmtrt.engine.flavor import Flavor
from llmtrt.engine.logger import make_logger
from llmtrt.engine.monitor import make_monitor
from llmtrt.engine.options import BuildOptions
from llmtrt.engine.parse import parse
from llmtrt.engine.profiles import Profile, Shape, add_profiles
from llmtrt.errors import UserError
from llmtrt.progress import Report

_LARGEST_TIMING_CACHE = 1 << 30
_MAGIC_BYTES = 8  # of a timing cache, the same in every one of a version


@dataclass(frozen=True)
class PlanMemory:
    """Bytes of GPU memory that the builder says a plan takes; None where the flavor does not say.

    ``activations``: for each profile at its largest shapes.
    """

    weights: int | None
    activations: tuple[int, ...] | None


def build_plan(
    flavor: Flavor,
    graph: bytes,
    source: Path,
    make_profiles: Callable[[dict[str, Shape]], list[Profile]],
    options: BuildOptions,
    plan: Path,
    report: Report,
    refittable: Iterable[str] = (),
    given: Mapping[str, Callable[[], bytes]] = MappingProxyType({}),
) -> tuple[list[Profile], PlanMemory]:
    """Compiles ``graph``, an ONNX model whose external data lie beside ``source``, into the file ``plan``.

    ``make_profiles`` gets the network's inputs, −1 where a dimension is dynamic. ``refittable``: the weights that
    REFIT_INDIVIDUAL leaves open. ``given``: initializers whose data are made here. Raises UserError with TensorRT's reason.
    """
    trt, logger = flavor.module, make_logger(flavor)
    try:
        builder = trt.Builder(logger)
    except TypeError as error:  # pybind11's word for a factory that returned nullptr
        raise UserError(
            f"TensorRT {flavor.name} {flavor.version} does not start ({logger.reason() or error}): see `llmtrt doctor`"
        ) from None
    network = builder.create_network(_network_flags(trt))
    owners = parse(flavor, network, graph, source, logger, {name: make() for name, make in given.items()})
    _mark_refittable(flavor, network, refittable)
    config = builder.create_builder_config()
    _configure(flavor, config, options)
    inputs = {tensor.name: tuple(tensor.shape) for tensor in map(network.get_input, range(network.num_inputs))}
    profiles = make_profiles(inputs)
    add_profiles(flavor, builder, config, profiles)
    _set_timing_cache(config, options.timing_cache)
    config.progress_monitor = monitor = make_monitor(flavor, report)
    logger.clear()
    with ThreadPoolExecutor(1) as pool:
        # In a thread of its own, so that Ctrl-C reaches this one while TensorRT is at work.
        job = pool.submit(builder.build_serialized_network, network, config)
        try:
            built = job.result()
        except BaseException:
            monitor.cancel()
            raise
    del owners
    if monitor.error:
        raise monitor.error
    if built is None:
        raise UserError(
            f"TensorRT {flavor.name} {flavor.version} could not build {source.parent}: "
            f"{logger.reason() or 'it gave no reason'}"
        )
    with plan.open("wb") as file:
        file.write(built)
    _keep_timing_cache(config, options.timing_cache)
    activations = tuple(logger.activations) if len(logger.activations) == len(profiles) else None
    return profiles, PlanMemory(logger.weights, activations)


def _network_flags(trt: Any) -> int:
    """Strongly typed: since TensorRT 11 every network is, and the flag may be gone."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _mark_refittable(flavor: Flavor, network: Any, names: Iterable[str]) -> None:
    if refused := [name for name in names if not network.mark_weights_refittable(name)]:
        raise UserError(
            f"TensorRT {flavor.name} {flavor.version} does not leave {', '.join(refused)} open for a refit: build without "
            "--refit any"
        )


def _configure(flavor: Flavor, config: Any, options: BuildOptions) -> None:
    trt = flavor.module
    config.clear_flag(trt.BuilderFlag.TF32)  # set by default; an fp32 package is to be computed in fp32
    for name in options.flags:
        config.set_flag(getattr(trt.BuilderFlag, name))
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    if options.tactic_shared_memory is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.TACTIC_SHARED_MEMORY, options.tactic_shared_memory)
    if options.compute_capabilities:
        config.num_compute_capabilities = len(options.compute_capabilities)
        for index, target in enumerate(options.compute_capabilities):
            member = getattr(trt.ComputeCapability, "SM" + target.replace(".", ""))
            if not config.set_compute_capability(member, index):
                raise UserError(f"TensorRT {flavor.name} {flavor.version} refuses compute capability {target}")


def _set_timing_cache(config: Any, path: Path | None) -> None:
    if path is None:
        return
    content = b""
    try:
        if path.exists():
            if path.stat().st_size > _LARGEST_TIMING_CACHE:
                raise UserError(f"--timing-cache {path} has more than {_LARGEST_TIMING_CACHE} bytes: name another file")
            content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read --timing-cache {path}: {error.strerror}") from None
    # TensorRT makes an empty cache of what it cannot read, without an error, and that would then replace the file.
    magic = bytes(config.create_timing_cache(b"").serialize())[:_MAGIC_BYTES]
    cache = config.create_timing_cache(content) if not content or content.startswith(magic) else None
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise UserError(
            f"--timing-cache {path} is no timing cache of this TensorRT and GPU: remove it or name another file"
        )


def _keep_timing_cache(config: Any, path: Path | None) -> None:
    if path is not None:
        with files.staged_file(path) as staging:
            staging.write_bytes(config.get_timing_cache().serialize())
