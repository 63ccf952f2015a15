"""The CPU view of torch stays inside megatron-core."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.models import make_model

CODE = """
import sys, torch
from megatron_phf.runtime import device
from megatron_phf.train import loop  # what the training job imports
device.setup()
device.setup()
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    torch.save(model(torch.arange(20)[None]).logits, sys.argv[2])
"""


def test_transformers_in_the_same_process_is_not_affected(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    directory = make_model(str(tmp_path / "model"), "llama")
    output = tmp_path / "logits.pt"
    subprocess.run([sys.executable, "-c", CODE, directory, str(output)], check=True)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(directory).eval()(torch.arange(20)[None])
    assert torch.equal(torch.load(output), expected.logits)
