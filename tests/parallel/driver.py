"""Run cases of the product in real processes, and save what each gives.

    torchrun --nproc-per-node N tests/parallel/driver.py CASES.json OUTPUT_DIR

CASES.json: a list of {"name", "argv", "kind"}.  Kinds: ``gradients``: one forward and backward
pass of the first global batch; metrics, with the norm that the optimizer then clips by, and
gradients under HuggingFace names.  ``train``:
``steps`` optimizer steps; metrics and final weights.  ``both``: one after the other.
``rollouts``: tokens for ``prompts`` by the sampling of ``sampling``, and the model exported again.
``teacher_memory``: bytes of the tensors that the teacher adds, and of the adapters.
``job``: the whole training job.  ``engine``: the contract of a rollout engine, ``decoding``: of
decoding in process.  ``reshard``: save the weights to ``save`` where given; else load those of
``load`` into a random model; export.
"""

# ruff: noqa: E402

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_phf.runtime import environment

environment.set_cuda_defaults(os.environ)  # as the product does

import torch
from safetensors.torch import save_file

from megatron_phf.runtime import device

device.import_megatron()  # as the product does

from megatron.core import dist_checkpointing

from megatron_phf.cli import cases
from megatron_phf.config.settings import Config
from megatron_phf.lora.files import save_peft_adapter
from megatron_phf.lora.linears import is_adapter
from megatron_phf.model.architecture import read_architecture
from megatron_phf.model.gpt import build_model
from megatron_phf.model.gpt_config import model_dtype
from megatron_phf.rollout.megatron.engine import MegatronRollouts
from megatron_phf.rollout.sampling import SamplingParams
from megatron_phf.rollout.sources import ReplaySource
from megatron_phf.runtime import parallel
from megatron_phf.teacher.architecture import read_models
from megatron_phf.teacher.kinds import make_teacher
from megatron_phf.train.build import load_student, make_distiller
from megatron_phf.train.metrics import PhaseTimer
from megatron_phf.train.step import Distiller
from megatron_phf.weights.huggingface import export_hf_weights, load_hf_weights, save_hf
from megatron_phf.weights.sharded import load_weights, save_weights
from tests.counted_device import CountedDevice
from tests.parallel.decoding import decoding
from tests.parallel.engine_contract import contract
from tests.parallel.loading import check_comparison


def steps(distiller: Distiller, source: ReplaySource, count: int, path: str) -> list[dict]:
    """Train ``count`` steps; export the weights."""
    history = [
        distiller.step(i, source.rollouts(i), PhaseTimer()).as_json() for i in range(1, count + 1)
    ]
    cases.export(distiller, path)
    check_replicas(distiller)
    check_teacher_state(distiller, path)
    return history


def check_only_adapters_train(distiller: Distiller) -> None:
    """Gradients, DDP's buffers and the optimizer hold the adapters and nothing else."""
    named = [pair for chunk in distiller.student for pair in chunk.named_parameters()]
    adapters = {p for name, p in named if is_adapter(name)}
    assert adapters and adapters == {p for _, p in named if p.requires_grad}
    assert adapters == {p for _, p in named if hasattr(p, "main_grad")}
    wrapped = distiller.optimizer.wrapped
    assert all(not chunk.expert_parallel_buffers for chunk in wrapped)
    assert adapters == {p for chunk in wrapped for buffer in chunk.buffers for p in buffer.params}
    if (
        distiller.config.parallel.use_distributed_optimizer
        or model_dtype(distiller.config) is torch.bfloat16
    ):
        return  # it holds fp32 shards or copies
    groups = distiller.optimizer.optimizer.param_groups
    assert adapters == {p for group in groups for p in group["params"]}


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


def check_teacher_weights(distiller: Distiller) -> None:
    """Nothing of the optimizer or of DDP clings to the weights of a teacher that has its own."""
    if distiller.config.method.teacher == "live":
        return
    frozen = [p for chunk in distiller.teacher.chunks for p in chunk.parameters()]
    assert not any(p.requires_grad or hasattr(p, "main_grad") for p in frozen)
    optimizer = distiller.optimizer
    buffers = [b for c in optimizer.wrapped for b in (*c.buffers, *c.expert_parallel_buffers)]
    trained = {id(p) for buffer in buffers for p in buffer.params}
    trained |= {id(p) for group in optimizer.optimizer.param_groups for p in group["params"]}
    assert trained
    assert not trained & {id(p) for p in frozen}
    memory = {p.untyped_storage().data_ptr() for c in distiller.student for p in c.parameters()}
    assert not memory & {p.untyped_storage().data_ptr() for p in frozen}


def check_offload(distiller: Distiller, counted: CountedDevice) -> None:
    """Every weight is on the device in the teacher's pass, its head in the student's, then none.

    Of several teachers one is there at a time, beside the heads of those before.
    """
    weights = sum(1 for chunk in distiller.teacher.chunks for _ in chunk.parameters())
    forward_backward, update = distiller.student_pass, distiller.teacher.update

    def student_pass(batch, teacher):
        heads = len({head.data_ptr() for head in teacher.heads.values()})
        assert counted.most == weights + max(0, heads - 1)
        assert counted.alive() == heads
        return forward_backward(batch, teacher)

    def after(student):
        update(student)
        assert counted.alive() == 0

    distiller.student_pass, distiller.teacher.update = student_pass, after


def check_replicas(distiller: Distiller) -> None:
    """Parameters that tensor-parallel ranks replicate are the same on all, bit for bit."""
    for chunk in distiller.student:
        for p in chunk.parameters():
            if not p.tensor_model_parallel:
                parts = parallel.gather_over_tensor_parallel(p.data)
                assert all(torch.equal(part, parts[0]) for part in parts)


def storages() -> dict[int, torch.UntypedStorage]:
    """All tensors' memory in this process, by address."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if isinstance(t, torch.Tensor)]
    return {s.data_ptr(): s for s in (t.untyped_storage() for t in tensors)}


def teacher_memory(student: list, config: Config) -> dict:
    """What ``make_teacher`` allocates.

    Only new storages count, not a difference of sums: something old may be let go meanwhile.  The
    old ones are held, so that no new one takes an old one's address.
    """
    before = storages()
    teacher = make_teacher(student, read_models(config), config)
    named = [pair for chunk in student for pair in chunk.named_parameters()]
    adapters = sum(p.nbytes for name, p in named if is_adapter(name))
    added = sum(s.nbytes() for address, s in storages().items() if address not in before)
    del teacher
    return {"added": added, "adapters": adapters, "model": sum(p.nbytes for _, p in named)}


def rollouts(student: list, config: Config, case: dict, path: str) -> list[list[int]]:
    """Generate for ``prompts``, twice; the export goes beside ``path``.

    ``spread``: every data-parallel rank generates for some of them, else all do for all.
    """
    arch = read_architecture(config.model.hf_model)
    engine = MegatronRollouts(student, arch.vocab_size, case["batch_size"])
    sampling = SamplingParams(**case["sampling"])
    ids = range(len(case["prompts"]))
    if case.get("spread"):
        ids = ids[parallel.data_parallel_rank() :: parallel.data_parallel_size()]
    asked = [case["prompts"][i] for i in ids]
    limits = [case["limits"][i] for i in ids] if "limits" in case else None
    first, again = (
        [r.token_ids for r in engine.generate(asked, sampling, ids, limits)] for _ in range(2)
    )
    assert first == again
    if case.get("spread"):
        shares = parallel.gather_over_data_parallel(dict(zip(ids, first, strict=True)))
        rows = {i: row for share in shares for i, row in share.items()}
        first = [rows[i] for i in sorted(rows)]
    target = path.removesuffix(".safetensors")
    save_hf(student, arch, config, config.model.hf_model, target)
    if config.lora.lora_rank:
        save_peft_adapter(student, config, target + ".adapter")
    return first


def reshard(config: Config, case: dict, path: str) -> None:
    """Save the model's weights, or load another layout's, and export what there is then."""
    arch = read_architecture(config.model.hf_model)
    if case.get("save"):
        chunks = load_student(arch, config, config.model.hf_model)
        check_comparison(chunks, arch, config)
        save_weights(chunks, case["save"])
    else:
        chunks = build_model(arch, config)
        load_weights(chunks, case["load"])
    tensors = {k: v.cpu().contiguous() for k, v in export_hf_weights(chunks, arch, config)}
    if parallel.is_first_rank():
        save_file(tensors, path)


def run_case(config: Config, case: dict, path: str) -> object:
    """One case in the layout of its flags."""
    cases.begin(config)
    if case["kind"] == "reshard":
        return reshard(config, case, path)
    if case["kind"] == "job":
        return cases.job(config, {})
    if case["kind"] == "engine":
        return contract(config)
    arch = read_architecture(config.model.hf_model)
    counted = CountedDevice()
    if config.teacher.teacher_offload and not device.has_cuda():
        counted.install()
    student = load_student(arch, config, config.model.hf_model)
    if case["kind"] == "rollouts":
        return rollouts(student, config, case, path)
    if case["kind"] == "decoding":
        return decoding(student, arch.vocab_size, case)
    if case["kind"] == "teacher_memory":
        return teacher_memory(student, config)
    return distill_case(config, case, student, counted, path)


def distill_case(
    config: Config, case: dict, student: list, counted: CountedDevice, path: str
) -> object:
    """The kinds that train."""
    arch = read_architecture(config.model.hf_model)
    source = ReplaySource(config.rollout.replay_file, arch.vocab_size, config)
    distiller = make_distiller(read_models(config), config, student)
    if config.lora.lora_rank:
        check_only_adapters_train(distiller)
    if distiller.teacher.chunks is not student:
        check_teacher_weights(distiller)
    if config.teacher.teacher_offload:
        check_offload(distiller, counted)
    if case.get("teacher_model"):
        load_hf_weights(distiller.teacher.chunks, arch, config, case["teacher_model"])
    if case["kind"] == "train":
        return steps(distiller, source, case["steps"], path)
    if case["kind"] == "gradients":
        return cases.gradients_and_norm(distiller, source, path)
    first = cases.gradients(
        distiller, source, path.replace(".safetensors", ".gradient.safetensors")
    )
    return [first, *steps(distiller, source, case["steps"], path)]


def main() -> None:
    """All cases; ``run_case`` is looked up late, so that another driver may replace it."""
    cases.main(lambda *each: run_case(*each))


if __name__ == "__main__":
    main()
