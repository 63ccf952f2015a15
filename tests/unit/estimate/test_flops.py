"""FLOPs by formula against torch's counter on transformers' model; MFU from them."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_phf.config.settings import Config
from megatron_phf.data.rollouts import Rollout
from megatron_phf.estimate import utilisation
from megatron_phf.estimate.flops import forward_flops, student_flops
from megatron_phf.estimate.memory import Machine, last_layer_bytes, memory_estimate
from megatron_phf.estimate.utilisation import gpu_peak, measured_peak
from megatron_phf.model.architecture import read_architecture
from megatron_phf.reference import load_model
from megatron_phf.runtime import parallel
from megatron_phf.teacher.architecture import Models
from tests.models import make_model


@pytest.mark.parametrize(
    "settings", [{}, {"architecture": "llama", "tie_word_embeddings": False, "head_dim": 8}]
)
def test_equal_torchs_counter(tmp_path, settings: dict) -> None:
    path = make_model(str(tmp_path / "model"), **settings)
    arch, length = read_architecture(path), 33
    with FlopCounterMode(display=False) as counter:
        output = load_model(path)(torch.ones(2, length, dtype=torch.long)).logits
        forward = counter.get_total_flops()
        output.sum().backward()
    found = forward_flops(arch, [length] * 2, 2 * length)
    # Eager attention multiplies all pairs of tokens, the upper triangle too.
    all_pairs = found.attention * 2 * length / (length + 1)
    rotary = 2 * length * arch.kv_channels // 2 * 2  # angles: positions times frequencies
    assert forward - (found.layers + all_pairs + found.head) in (0, rotary, rotary // 2)
    whole = counter.get_total_flops() - (forward - found.layers - all_pairs - found.head)
    trained = student_flops(arch, arch, Config(), [length] * 2, 2 * length)
    assert trained + 3 * (all_pairs - found.attention) - found.head == pytest.approx(whole)


def test_lora_and_peaks(tmp_path) -> None:
    path = make_model(str(tmp_path / "model"))
    arch = read_architecture(path)
    full = student_flops(arch, arch, Config(), [40, 9], 30)
    lora = student_flops(arch, arch, Config().replaced(lora_rank=4), [40, 9], 30)
    assert 0.6 * full < lora < full
    forward = forward_flops(arch, [40, 9], 30)
    for name, more in (
        ("position", 0.0),
        ("teacher_entropy", forward.head),
        ("student_entropy", forward.total),
        ("divergence_top_p", forward.total + forward.head),
    ):
        weighted = student_flops(arch, arch, Config().replaced(token_weighting=name), [40, 9], 30)
        assert weighted == pytest.approx(full + more)
    assert gpu_peak("NVIDIA H100 80GB HBM3, 79 GiB, NCCL") == 989e12
    assert gpu_peak("NVIDIA GeForce") is None
    assert 1e8 < measured_peak(torch.float32) < 1e14


def test_no_step_is_faster_than_its_machine(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peak that was measured while others computed is no peak; then the MFU is not known."""
    arch = read_architecture(make_model(str(tmp_path / "model")))
    peaks = iter([1e9, 1e3])
    monkeypatch.setattr(utilisation, "measured_peak", lambda dtype: next(peaks))
    monkeypatch.setattr(parallel, "gather_objects", lambda value: [value])
    monkeypatch.setattr(parallel, "gather_over_data_parallel", lambda value: [value])
    rollouts = [Rollout((1,) * 20, (1,), (1,) * 20)]
    quiet, busy = (utilisation.Utilisation(Config(), Models(arch)) for _ in range(2))
    seconds = student_flops(arch, arch, Config(), [40], 20) / 1e9
    assert quiet.mfu(rollouts, 4 * seconds) == pytest.approx(0.25)
    assert quiet.mfu(rollouts, seconds / 2) is None and busy.mfu(rollouts, 4 * seconds) is None


def test_the_last_layers_targets(tmp_path) -> None:
    """fp32 rows of the window, once for each kind of states that meets the teacher's last layer."""
    arch = read_architecture(make_model(str(tmp_path / "model")))
    models = Models(arch)
    base = Config().replaced(phf_window_size=8, phf_terms="last_layer,direction")
    assert last_layer_bytes(models, base, 4) == 4 * 8 * arch.hidden_size * 4
    assert (
        last_layer_bytes(models, base.replaced(max_new_tokens=5), 4) == 4 * 5 * arch.hidden_size * 4
    )
    assert last_layer_bytes(models, base.replaced(phf_terms="pointwise"), 4) == 0
    assert last_layer_bytes(models, base.replaced(phf_alpha=0.0), 4) == 0
    machine = Machine(2, 1)
    with_it, without = (
        memory_estimate(models, base.replaced(phf_terms=terms, phf_window_size=128), machine)
        for terms in ("last_layer", "pointwise")
    )
    more = (with_it["targets"] - without["targets"]) * 2**30
    assert more == pytest.approx(32 * 128 * arch.hidden_size * 4)
