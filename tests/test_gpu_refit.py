"""One stripped plan filled from two packages of one architecture, against whole engines of each."""

import dataclasses

import numpy as np
import pytest
import samples
from safetensors.numpy import load_file, save_file
from test_gpu import gpu, tokens  # noqa: F401 - gpu skips where there is none

from llmtrt.engine.build import build
from llmtrt.engine.flavor import choose
from llmtrt.engine.manifest import open_engine
from llmtrt.engine.refit import refit_engine
from llmtrt.errors import UserError
from llmtrt.quantization.pipeline import quantize
from llmtrt.runtime.scheduler import logits_of
from llmtrt.runtime.tensorrt import TrtSession

pytestmark = pytest.mark.gpu

SIZES = dict(max_seq=256, chunk=64)  # of one sequence: a whole plan for several merges projections


@pytest.fixture(scope="module", params=["fp16", "int4-g32"])
def made(request, tmp_path_factory):
    """Packages A and B of stories260k and of the same with other weights; for each its whole engine's logits; and the
    stripped engine of A that takes any weights."""
    if not choose().can("strip"):
        pytest.skip("this flavor has no STRIP_PLAN")
    folder, packages, whole = tmp_path_factory.mktemp("refit"), [], []
    for name, other in (("a", False), ("b", True)):
        checkpoint = samples.stories260k()
        if other:
            checkpoint = perturbed(checkpoint, folder / "checkpoint")
        packages.append(quantize(checkpoint, folder / name, request.param).package)
        whole.append(logits(build(packages[-1].path, folder / f"{name}.engine", **SIZES).engine, packages[0]))
    stripped = build(packages[0].path, folder / "stripped", strip=True, refit="any", **SIZES).engine
    return packages, whole, stripped


def perturbed(checkpoint, folder):
    """A copy with every weight 10 % off."""
    folder.mkdir()
    for path in checkpoint.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    rng, weights = np.random.default_rng(0), folder / "model.safetensors"
    noisy = {n: t * rng.normal(1, 0.1, t.shape).astype(t.dtype) for n, t in sorted(load_file(weights).items())}
    save_file(noisy, weights)
    return folder


def logits(engine, package) -> np.ndarray:
    session = TrtSession(engine)
    try:
        return np.concatenate([*logits_of(session, tokens(package, 150), 64)])
    finally:
        session.close()


def test_one_stripped_plan_takes_either_package_when_it_is_loaded(made):
    packages, whole, stripped = made
    assert stripped.manifest["flags"] == ["REFIT_INDIVIDUAL", "STRIP_PLAN"]
    assert not np.array_equal(*whole)
    for package, wanted in zip(packages, whole):
        filled = logits(dataclasses.replace(stripped, package_path=package.path), packages[0])
        assert np.array_equal(filled, wanted), np.abs(filled - wanted).max()


def test_what_refit_writes_has_its_weights_and_takes_others_again(made, tmp_path):
    (own, other), (of_own, of_other), stripped = made
    new = refit_engine(stripped.path, other.path, tmp_path / "new")
    assert new.plan.stat().st_size > stripped.plan.stat().st_size
    assert np.array_equal(logits(open_engine(new.path), own), of_other)
    back = refit_engine(new.path, own.path, tmp_path / "back")
    assert np.array_equal(logits(back, own), of_own)


def test_identical_weights_are_filled_in_and_others_refused(made, tmp_path):
    (own, other), (of_own, _), _ = made
    stripped = build(own.path, tmp_path / "stripped", strip=True, **SIZES).engine
    new = refit_engine(stripped.path, own.path, tmp_path / "new")
    assert new.manifest["flags"] == [] and np.array_equal(logits(new, own), of_own)
    with pytest.raises(UserError, match="--refit any"):
        refit_engine(stripped.path, other.path, tmp_path / "never")


def test_a_package_that_does_not_fit_is_named(made, tmp_path):
    _, _, stripped = made
    other = quantize(samples.stories260k(), tmp_path / "fp32", "fp32").package
    with pytest.raises(UserError, match=r"model\.layers\.4\.mlp\.down_proj\.weight.*should be .*but is"):
        refit_engine(stripped.path, other.path, tmp_path / "never")
