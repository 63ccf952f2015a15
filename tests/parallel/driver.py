"""Run cases of the product in real processes, and save what each gives.

    torchrun --nproc-per-node N tests/parallel/driver.py CASES.json OUTPUT_DIR

CASES.json: a list of {"name", "argv", "kind"}.  Kinds: ``gradients``: one forward and backward
pass of the first global batch; metrics, and gradients under HuggingFace names.  ``train``:
``steps`` optimizer steps; metrics and final weights.  ``both``: one after the other.
``rollouts``: tokens for ``prompts`` by the sampling of ``sampling``, and the model exported again.
``job``: the whole training job.  ``reshard``: save the weights to ``save`` where given; else load
those of ``load`` into a random model; export.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as mpu
from safetensors.torch import save_file

from megatron_phf import device, parallel, preflight
from megatron_phf.config import Config
from megatron_phf.flags import parse_args
from megatron_phf.model.architecture import read_architecture
from megatron_phf.model.gpt import build_model
from megatron_phf.model.hf_weights import export_hf_weights, load_hf_weights, save_hf
from megatron_phf.model.sharded_weights import load_weights, save_weights
from megatron_phf.rollout.megatron import MegatronRollouts
from megatron_phf.rollout.sampling import SamplingParams
from megatron_phf.signals import StopSignals
from megatron_phf.train.heartbeat import Heartbeat
from megatron_phf.train.loop import load_student, make_distiller, train
from megatron_phf.train.metrics import PhaseTimer, summarize
from megatron_phf.train.source import ReplaySource
from megatron_phf.train.step import Distiller


def export(distiller: Distiller, path: str) -> None:
    """Save the student's weights as they are."""
    weights = export_hf_weights(distiller.student, distiller.arch, distiller.config)
    tensors = {name: weight.float().cpu().contiguous() for name, weight in weights}
    if parallel.is_first_rank():
        save_file(tensors, path)


def complete_gradients(distiller: Distiller) -> None:
    """Undo the distributed optimizer's reduce-scatter: all ranks get all of the summed gradient."""
    group = mpu.get_data_parallel_group()
    for chunk in distiller.optimizer.wrapped:
        for buffer in chunk.buffers:
            for bucket in buffer.buckets:
                shards = bucket.grad_data.chunk(mpu.get_data_parallel_world_size())
                mine = shards[mpu.get_data_parallel_rank()].clone()
                torch.distributed.all_gather(list(shards), mine, group=group)


def gradients(distiller: Distiller, source: ReplaySource, path: str) -> dict:
    """Forward and backward of one batch; export the gradients as if they were weights."""
    batch = distiller._local_batch(source.rollouts(1))
    outputs = distiller._forward_backward(batch, distiller._teacher_targets(batch))
    if distiller.config.parallel.use_distributed_optimizer:
        complete_gradients(distiller)
    parameters = [p for chunk in distiller.student for p in chunk.parameters()]
    weights = [p.data for p in parameters]
    for p in parameters:
        p.data = p.main_grad.to(p.dtype)
    values = distiller.tap.values
    metrics = summarize(outputs, values, distiller.arch.num_layers, distiller.config, 0.0, 0.0)
    export(distiller, path)
    for p, data in zip(parameters, weights, strict=True):
        p.data = data
    return metrics.as_json()


def steps(distiller: Distiller, source: ReplaySource, count: int, path: str) -> list[dict]:
    """Train ``count`` steps; export the weights."""
    history = [
        distiller.step(i, source.rollouts(i), PhaseTimer()).as_json() for i in range(1, count + 1)
    ]
    export(distiller, path)
    check_teacher_state(distiller, path)
    return history


def check_teacher_state(distiller: Distiller, path: str) -> None:
    """What an EMA teacher keeps survives a checkpoint; the others keep nothing."""
    teacher = distiller.teacher
    if not teacher.sharded_state_dict():
        assert distiller.config.method.teacher != "ema"
        return
    directory = path.replace(".safetensors", ".teacher")
    os.makedirs(directory, exist_ok=True)
    torch.distributed.barrier()
    dist_checkpointing.save(teacher.sharded_state_dict(), directory)
    pairs = teacher.average.pairs()
    before = [(weight.data.clone(), average.clone()) for weight, average in pairs]
    for _, average in pairs:
        assert average.dtype is torch.float32
        average.fill_(7.0)
    teacher.load_state_dict(dist_checkpointing.load(teacher.sharded_state_dict(), directory))
    for pair, expected in zip(teacher.average.pairs(), before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(pair, expected, strict=True))


def rollouts(student: list, config: Config, case: dict, path: str) -> list[list[int]]:
    """Generate for ``prompts``, twice; the export goes beside ``path``."""
    arch = read_architecture(config.model.hf_model)
    engine = MegatronRollouts(student, arch.vocab_size, case["batch_size"])
    sampling = SamplingParams(**case["sampling"])
    ids = range(len(case["prompts"]))
    first = engine.generate(case["prompts"], sampling, ids, case.get("limits"))
    assert first == engine.generate(case["prompts"], sampling, ids, case.get("limits"))
    save_hf(student, arch, config, config.model.hf_model, path.removesuffix(".safetensors"))
    return first


def reshard(config: Config, case: dict, path: str) -> None:
    """Save the model's weights, or load another layout's, and export what there is then."""
    arch = read_architecture(config.model.hf_model)
    chunks = build_model(arch, config)
    if case.get("save"):
        load_hf_weights(chunks, arch, config, config.model.hf_model)
        save_weights(chunks, case["save"])
    else:
        load_weights(chunks, case["load"])
    tensors = {k: v.cpu().contiguous() for k, v in export_hf_weights(chunks, arch, config)}
    if parallel.is_first_rank():
        save_file(tensors, path)


def run_case(config: Config, case: dict, path: str) -> object:
    """One case in the layout of its flags."""
    preflight.check(config)
    preflight.check_world_size(config, torch.distributed.get_world_size())
    parallel.initialize(config.parallel)
    if case["kind"] == "reshard":
        return reshard(config, case, path)
    if case["kind"] == "job":
        return [m.as_json() for m in train(config, StopSignals(), Heartbeat())]
    arch = read_architecture(config.model.hf_model)
    student = load_student(arch, config, config.model.hf_model)
    if case["kind"] == "rollouts":
        return rollouts(student, config, case, path)
    source = ReplaySource(config.rollout.replay_file, arch.vocab_size, config)
    distiller = make_distiller(arch, config, student)
    if config.method.teacher != "live":  # nothing of the optimizer or of DDP may cling to it
        frozen = [p for chunk in distiller.teacher.chunks for p in chunk.parameters()]
        assert not any(p.requires_grad or hasattr(p, "main_grad") for p in frozen)
    if case.get("teacher_model"):
        load_hf_weights(distiller.teacher.chunks, arch, config, case["teacher_model"])
    if case["kind"] == "train":
        return steps(distiller, source, case["steps"], path)
    first = gradients(distiller, source, path.replace(".safetensors", ".gradient.safetensors"))
    if case["kind"] == "gradients":
        return first
    return [first, *steps(distiller, source, case["steps"], path)]


def main() -> None:
    """All cases; a failed one is recorded and ends the run."""
    cases, output = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2]
    device.setup()
    device.init_distributed(int(os.environ["LOCAL_RANK"]), timeout_minutes=5)
    for case in cases:
        base = os.path.join(output, case["name"])
        try:
            result = run_case(parse_args(case["argv"]), case, base + ".safetensors")
        except Exception:
            print(f"case {case['name']} failed\n{traceback.format_exc()}", flush=True)
            os._exit(1)
        if torch.distributed.get_rank() == 0:
            with open(base + ".json", "w") as f:
                json.dump(result, f)
        parallel.destroy_model_parallel()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
