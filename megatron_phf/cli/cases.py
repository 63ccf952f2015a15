"""Cases of the product in real processes, each of which leaves what it gave: for comparisons.

    torchrun --nproc-per-node N -m megatron_phf.cli.cases CASES.json OUTPUT_DIR

CASES.json: a list of {"name", "argv", "kind"}.  Kinds: ``gradients``: one forward and backward pass
of the first global batch of a replay; metrics, with the norm that the optimizer then clips by, and
gradients under HuggingFace names.  ``job``: the whole training job; ``term``: the step amid which
each rank gets SIGTERM; ``kill_server``: whether vLLM's server dies amid the second step's transfer.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_phf.runtime import environment

environment.set_cuda_defaults(os.environ)  # before torch is imported

import psutil  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from megatron_phf.runtime import device  # noqa: E402

device.import_megatron()  # as the product does

from megatron_phf.cli import preflight  # noqa: E402
from megatron_phf.config.flags import parse_args  # noqa: E402
from megatron_phf.config.settings import Config  # noqa: E402
from megatron_phf.console import print_anything  # noqa: E402
from megatron_phf.files.replace import write_json  # noqa: E402
from megatron_phf.lora.files import export_adapter  # noqa: E402
from megatron_phf.rollout.sources import ReplaySource  # noqa: E402
from megatron_phf.rollout.vllm.control import Control  # noqa: E402
from megatron_phf.runtime import parallel  # noqa: E402
from megatron_phf.runtime.heartbeat import Heartbeat  # noqa: E402
from megatron_phf.runtime.signals import StopSignals  # noqa: E402
from megatron_phf.teacher.architecture import read_models  # noqa: E402
from megatron_phf.train.batch import make_batch  # noqa: E402
from megatron_phf.train.build import load_student, make_distiller  # noqa: E402
from megatron_phf.train.hooks import RunHook  # noqa: E402
from megatron_phf.train.loop import train  # noqa: E402
from megatron_phf.train.step import Distiller  # noqa: E402
from megatron_phf.weights.huggingface import export_hf_weights  # noqa: E402

# (configuration, case, path of its tensors) -> what NAME.json holds.
RunCase = Callable[[Config, dict[str, Any], str], object]


def export(distiller: Distiller, path: str) -> None:
    """Save what is trained of the student as it is: all weights, or the adapters."""
    if distiller.config.lora.lora_rank:
        weights = export_adapter(distiller.student)
    else:
        weights = export_hf_weights(distiller.student, distiller.arch, distiller.config)
    tensors = {name: weight.float().cpu().contiguous() for name, weight in weights}
    if parallel.is_first_rank():
        save_file(tensors, path)


def complete_gradients(distiller: Distiller) -> None:
    """Undo the distributed optimizer's reduce-scatter: all ranks get all of the summed gradient."""
    for chunk in distiller.optimizer.wrapped:
        for buffer in chunk.buffers + chunk.expert_parallel_buffers:
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                shards = bucket.grad_data.chunk(group.size())
                mine = shards[group.rank()].clone()
                torch.distributed.all_gather(list(shards), mine, group=group)


def gradients(distiller: Distiller, source: ReplaySource, path: str) -> dict:
    """Forward and backward of one batch; export the gradients as if they were weights."""
    batch = make_batch(source.rollouts(1), distiller.config, distiller.shards)
    student = distiller.student_pass(batch, distiller.teacher_pass(batch))
    if distiller.config.parallel.use_distributed_optimizer:
        complete_gradients(distiller)
    parameters = [p for chunk in distiller.student for p in chunk.parameters() if p.requires_grad]
    weights = [p.data for p in parameters]
    for p in parameters:
        p.data = p.main_grad.to(p.dtype)
    metrics = distiller.metrics(student, 0.0, 0.0)
    export(distiller, path)
    for p, data in zip(parameters, weights, strict=True):
        p.data = data
    return metrics.as_json()


def gradients_and_norm(distiller: Distiller, source: ReplaySource, path: str) -> dict:
    """As :func:`gradients`, with the norm that the optimizer's own step then clips by."""
    found = gradients(distiller, source, path.replace(".safetensors", ".gradient.safetensors"))
    _, found["grad_norm"] = distiller.optimizer.step()
    distiller.optimizer.zero_grad()  # waits for weights that are under way
    return found


class Trouble(RunHook):
    """What comes from outside amid a job."""

    def __init__(self, case: dict[str, Any]) -> None:
        self._term, self._kill = case.get("term"), case.get("kill_server")

    def before_step(self, iteration: int) -> None:
        """See the module."""
        if iteration == self._term:
            os.kill(os.getpid(), signal.SIGTERM)
        if iteration == 2 and self._kill:
            kill_servers_at_update()


def kill_servers_at_update() -> None:
    """The processes that this one has started, once a server is told of new weights."""
    update = Control.update

    def killing(self: Control, info: dict[str, Any]) -> None:
        for child in psutil.Process().children(recursive=True):
            child.kill()
        update(self, info)

    Control.update = killing  # type: ignore[method-assign]


def job(config: Config, case: dict[str, Any]) -> list[dict]:
    """The whole training job; its steps' metrics."""
    heartbeat = Heartbeat()
    steps_done = train(config, StopSignals(), heartbeat, more=[Trouble(case)])
    heartbeat.stop()  # as the product does; Python may abort at its end otherwise
    return [metrics.as_json() for metrics in steps_done]


def begin(config: Config) -> None:
    """Check a case and make its process groups."""
    preflight.check(config)
    preflight.check_world_size(config, torch.distributed.get_world_size())
    parallel.initialize(config.parallel)


def run_case(config: Config, case: dict[str, Any], path: str) -> object:
    """One case in the layout of its flags."""
    begin(config)
    if case["kind"] == "job":
        return job(config, case)
    assert case["kind"] == "gradients" and config.rollout.replay_file is not None
    assert config.model.hf_model is not None
    models = read_models(config)
    source = ReplaySource(config.rollout.replay_file, models.vocab_size, config)
    student = load_student(models.student, config, config.model.hf_model)
    return gradients_and_norm(make_distiller(models, config, student), source, path)


def main(
    run: RunCase = run_case, after: Callable[[], None] = parallel.destroy_model_parallel
) -> None:
    """All cases, ``after`` each; a failed one is named and ends the run."""
    print_anything()
    cases, output = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2]
    device.setup()
    device.init_distributed(int(os.environ["LOCAL_RANK"]), timeout_minutes=5)
    for case in cases:
        base = os.path.join(output, case["name"])
        try:
            result = run(parse_args(case["argv"]), case, base + ".safetensors")
        except Exception:
            print(f"case {case['name']} failed\n{traceback.format_exc()}", flush=True)
            os._exit(1)
        if parallel.is_first_rank():
            write_json(base + ".json", result)
        after()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
