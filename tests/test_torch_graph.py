"""The canonical graph on torch against transformers: every family, layer by layer."""

import numpy as np
import pytest
import torch
from families import CONFIGS, save
from transformers import AutoModelForCausalLM

from llmtrt.checkpoints import open_checkpoint
from llmtrt.models import decoder_of
from llmtrt.quantization.torch_model import LayerwiseModel


def layerwise(path):
    checkpoint = open_checkpoint(path)
    decoder = decoder_of(checkpoint.config, str(path), 64, ())  # longrope: short factors up to 64
    return LayerwiseModel(checkpoint, decoder)


@pytest.mark.parametrize("family", CONFIGS)
def test_logits_are_those_of_transformers(family, tmp_path):
    path = save(family, tmp_path / "checkpoint")
    model = layerwise(path)
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, 90, (2, 21)))
    logits = model.finish(model.hidden(ids), ids)
    wanted = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        reference = wanted(ids).logits
    assert torch.allclose(logits, reference, atol=2e-4 * float(reference.abs().max()), rtol=0)
