"""Plan a run: predicted memory a rank and communication a step of each layout, the best first.

    python tools/plan.py --hf-config path/to/config.json --gpus 64 --gpu-memory 80

No GPU and no torch are needed.  Memory is by the formulas of megatron_phf/estimate, checked
against measured peaks; time is a model (see --help for its assumptions) that ranks layouts, no
promise.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_phf.config.flags import check_fields, parse_args
from megatron_phf.config.settings import Config, flag_of
from megatron_phf.console import print_anything
from megatron_phf.estimate.flops import forward_flops, student_flops
from megatron_phf.estimate.memory import Machine, peak_estimate
from megatron_phf.estimate.traffic import traffic
from megatron_phf.files.foreign import read_json_object
from megatron_phf.model.architecture import Architecture, check_split, parse_architecture
from megatron_phf.teacher.architecture import Models

_WIDTH = 2  # bf16
# Flags of the training job that decide memory and time, whatever the layout.
_JOB = {
    "preset": "a published recipe; the flags below win",
    "global_batch_size": "rollouts a step",
    "max_prompt_length": "tokens",
    "max_teacher_prompt_length": "tokens",
    "max_new_tokens": "of a rollout",
    "teacher": "frozen, ema or live",
    "lora_rank": "0: all weights are trained",
    "lora_dropout": "of the adapters' input, whose masks are kept",
}
# Of the tool's own flags those that divide.
_HARDWARE = (
    *("gpus", "gpu_memory", "gpus_per_node", "gpu_tflops"),
    *("node_gbytes", "network_gbytes", "memory_gbytes"),
)
_FRAMEWORK_GIB = 2.0  # CUDA context, NCCL's buffers, the allocator's fragments


@dataclass(frozen=True)
class Hardware:
    """What the machines reach.

    FLOP/s of a GPU; bytes a second between GPUs of a node and of two nodes, and from its memory;
    ``launch``: seconds that a layer takes at least for one decoded token.
    """

    flops: float
    inside: float
    between: float
    gpus_a_node: int
    memory: float
    launch: float


@dataclass(frozen=True)
class Plan:
    """A layout: GiB of each part on the fullest rank; bytes a rank sends and seconds of a step.

    ``source`` of the memory: formula or simulation.
    """

    config: Config
    replicas: int
    memory: dict[str, float]
    traffic: dict[str, float]
    times: dict[str, float]
    source: str = "formula"

    @property
    def seconds(self) -> float:
        """Of a step."""
        return sum(self.times.values())

    @property
    def total(self) -> float:
        """GiB on the fullest rank."""
        return sum(self.memory.values()) + _FRAMEWORK_GIB

    def describe(self) -> str:
        """TP x PP x DP, experts, recompute."""
        p = self.config.parallel
        expert = p.expert_model_parallel_size
        experts = "" if expert == 1 else f" EP {expert} ETP {p.expert_tensor_size}"
        recompute = " recompute" if p.recompute_granularity else ""
        tp, pp = p.tensor_model_parallel_size, p.pipeline_model_parallel_size
        return f"TP {tp} PP {pp} DP {self.replicas}{experts}{recompute}"


def _expert_splits(arch: Architecture, tp: int, replicas: int) -> list[tuple[int, int | None]]:
    """(EP, ETP) of a model with experts: over data-parallel ranks, and over those of TP too."""
    if arch.experts is None:
        return [(1, None)]
    powers = [2**i for i in range(1, 11)]
    cuts = dict.fromkeys((tp, 1))
    several = [(n, cut) for cut in cuts for n in powers if replicas * tp // cut % n == 0]
    return [(1, None), *several]


def layouts(arch: Architecture, base: Config, gpus: int, node: int) -> Iterator[tuple[Config, int]]:
    """Every layout that the model and the batch allow, with its number of replicas."""
    powers = [2**i for i in range(11)]
    for tp in (n for n in powers if n <= node):
        for pp in (n for n in range(1, arch.num_layers + 1) if arch.num_layers % n == 0):
            replicas, rest = divmod(gpus, tp * pp)
            if rest or replicas == 0 or base.train.global_batch_size % replicas:
                continue
            for expert, cut in _expert_splits(arch, tp, replicas):
                for recompute in (None, "full"):
                    config = base.replaced(
                        tensor_model_parallel_size=tp,
                        pipeline_model_parallel_size=pp,
                        expert_model_parallel_size=expert,
                        expert_tensor_parallel_size=cut,
                        sequence_parallel=tp > 1,
                        use_distributed_optimizer=True,
                        recompute_granularity=recompute,
                    )
                    try:
                        check_split(arch, config)
                    except ValueError:
                        continue
                    yield config, replicas


def rollout_seconds(arch: Architecture, config: Config, replicas: int, hardware: Hardware) -> float:
    """Of decoding in process, stage after stage: a token reads every weight of its ranks once.

    Of the experts those that some row of the batch is routed to.
    """
    p, r = config.parallel, config.rollout
    local = config.train.global_batch_size // replicas
    rows = min(r.rollout_batch_size, local)
    experts, share = arch.num_expert_parameters(), 1.0
    if arch.experts is not None:
        share = 1 - (1 - arch.experts.per_token / arch.experts.count) ** rows
    weights = (arch.num_parameters() - experts) / p.tensor_model_parallel_size
    weights += experts * share / p.expert_model_parallel_size / p.expert_tensor_size
    read = weights * _WIDTH / hardware.memory
    token = max(read, arch.num_layers * hardware.launch)
    return -(-local // rows) * r.max_new_tokens * token


def evaluate(
    arch: Architecture, config: Config, replicas: int, hardware: Hardware, lengths: tuple[int, int]
) -> Plan:
    """``lengths``: student's and teacher's tokens a sequence, prompt and response."""
    p, responses = config.parallel, config.rollout.max_new_tokens
    local = config.train.global_batch_size // replicas
    memory = peak_estimate(Models(arch), config, Machine(_WIDTH, replicas), lengths[0])
    sent = traffic(arch, config, replicas, local * sum(lengths) // 2)
    student = student_flops(arch, arch, config, [lengths[0]] * local, local * responses)
    again = forward_flops(arch, [lengths[0]] * local, 0)
    flops = student + forward_flops(arch, [lengths[1]] * local, 0).total
    flops += again.total if p.recompute_granularity else 0.0
    tp, pp = p.tensor_model_parallel_size, p.pipeline_model_parallel_size
    bubble = 1 + (pp - 1) / local
    wide = hardware.between if replicas * tp * pp > hardware.gpus_a_node else hardware.inside
    times = {
        "rollouts": rollout_seconds(arch, config, replicas, hardware),
        "training": flops / (tp * pp) / hardware.flops * bubble,
        "communication": (sent["tensor"] + sent["expert tensor"]) / hardware.inside
        + (sent["pipeline"] + sent["data"] + sent["experts"]) / wide,
    }
    return Plan(config, replicas, memory, sent, times)


def plans(
    arch: Architecture, base: Config, gpus: int, gib: float, hardware: Hardware
) -> tuple[list[Plan], list[Plan]]:
    """(layouts that fit, fastest first; those that do not, smallest first)."""
    data, new = base.data, base.rollout.max_new_tokens
    lengths = data.max_prompt_length + new, data.max_teacher_prompt_length + new
    found = [
        evaluate(arch, config, replicas, hardware, lengths)
        for config, replicas in layouts(arch, base, gpus, hardware.gpus_a_node)
    ]
    fit = sorted((p for p in found if p.total <= gib), key=lambda p: p.seconds)
    return fit, sorted((p for p in found if p.total > gib), key=lambda p: p.total)


def _simulated(arch: Architecture, found: list[Plan], given: argparse.Namespace) -> list[Plan]:
    """The best layouts with the memory that a dry run finds; those that do not fit then go."""
    from megatron_phf.simulate.peaks import simulated_peaks  # the one thing here that needs torch

    best, limit = found[: given.simulate], given.gpu_memory * 1e9 / 2**30
    peaks = simulated_peaks(Models(arch), [plan.config for plan in best], given.gpus)
    known = [
        dataclasses.replace(plan, memory=parts, source="simulation")
        for plan, parts in zip(best, peaks, strict=True)
    ]
    return [p for p in known if p.total <= limit] + found[given.simulate :]


def table(found: list[Plan]) -> str:
    """Three lines a layout: seconds, GiB and GB sent, each by part."""
    lines = []
    for plan in found:
        parts = ", ".join(f"{k} {v:.1f}" for k, v in plan.memory.items() if v >= 0.05)
        sent = ", ".join(f"{k} {v / 1e9:.1f}" for k, v in plan.traffic.items() if v >= 5e7)
        times = ", ".join(f"{k} {v:.1f}" for k, v in plan.times.items())
        lines.append(f"{plan.describe()}: {plan.seconds:.1f} s a step ({times})")
        lines.append(f"    {plan.total:.1f} GiB by {plan.source} ({parts})")
        lines.append(f"    GB sent a rank: {sent or 'nothing'}")
    return "\n".join(lines)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hf-config", required=True, help="the model's config.json")
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--gpu-memory", type=float, default=80.0, help="GB a GPU")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--gpu-tflops", type=float, default=400.0, help="reached, not the peak")
    parser.add_argument("--node-gbytes", type=float, default=300.0, help="GB/s within a node")
    parser.add_argument("--network-gbytes", type=float, default=40.0, help="GB/s a GPU, between")
    parser.add_argument("--memory-gbytes", type=float, default=2500.0, help="GB/s of GPU memory")
    parser.add_argument(
        "--layer-microseconds", type=float, default=300.0,
        help="that a layer takes at least for one decoded token: kernel launches",
    )  # fmt: skip
    for name, text in _JOB.items():
        parser.add_argument(flag_of(name), help=f"{text} (the training job's flag and default)")
    parser.add_argument("--best", type=int, default=5, help="layouts to show")
    parser.add_argument(
        "--simulate", type=int, default=0, metavar="N",
        help="take the memory of the best N layouts from a dry run of each (minutes; needs torch)",
    )  # fmt: skip
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Print the best layouts; status 1 where none fits, 2 for bad input."""
    print_anything()
    given = _arguments(argv)
    job = {name: getattr(given, name) for name in _JOB if getattr(given, name) is not None}
    try:
        for name in _HARDWARE:
            if getattr(given, name) <= 0:
                raise ValueError(f"{flag_of(name)}: need more than 0")
        arch = parse_architecture(read_json_object(given.hf_config), given.hf_config)
        words = [word for name, value in job.items() for word in (flag_of(name), value)]
        base = parse_args(["--hf-model", given.hf_config, *words])
        check_fields(base)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    speeds = given.gpu_tflops * 1e12, given.node_gbytes * 1e9, given.network_gbytes * 1e9
    slow = given.memory_gbytes * 1e9, given.layer_microseconds * 1e-6
    hardware = Hardware(*speeds, given.gpus_per_node, *slow)
    fit, rest = plans(arch, base, given.gpus, given.gpu_memory * 1e9 / 2**30, hardware)
    if given.simulate > 0:
        fit = _simulated(arch, fit, given)
    print(f"{arch.model_type}, {arch.num_parameters() / 1e9:.1f} B parameters, {given.gpus} GPUs")
    print(table(fit[: given.best]) if fit else f"nothing fits in {given.gpu_memory:g} GB; nearest:")
    if not fit:
        print(table(rest[:1]) or "no layout divides model and batch; change --global-batch-size")
    return 0 if fit else 1


if __name__ == "__main__":
    sys.exit(main())
