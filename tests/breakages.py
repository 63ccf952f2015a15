"""Break the product on purpose, one line at a time, and see the tests turn red.

    make breakages        (python -m tests.breakages; about six minutes)

Each breakage is made in a copy of the tree, after the same tests have passed in an unbroken one.
Exits with 1 if any of them goes unnoticed, or if the line that it breaks is no longer there.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.launch import REPO, environment

PARITY = "tests/parallel/test_parity.py"
LARGER = "tests/parallel/test_teacher_model.py"
MOE, CONTEXT = "tests/parallel/test_moe.py", "tests/parallel/test_context.py"
LORA = "tests/parallel/test_lora.py"
RESUME = "tests/parallel/test_resume.py"
EVALUATE = "tests/end_to_end/test_evaluate.py"
ENGINE = "tests/parallel/test_transformer_engine.py"
VLLM, VLLM_JOB = "tests/unit/test_vllm_server.py", "tests/end_to_end/test_vllm_job.py"
GRADING, REPORT = "tests/unit/test_grading.py", "tests/unit/test_report.py"
SECURITY, FUZZ = "tests/unit/test_security.py", "tests/unit/test_fuzz.py"


@dataclass(frozen=True)
class Breakage:
    """In ``file``, ``old`` becomes ``new``; ``tests`` (pytest arguments) must then fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


BREAKAGES = (
    Breakage(
        "layers left out of the flow loss still count in its mean",
        "megatron_phf/flow_spec.py",
        "share / len(chosen) / max(len(local), 1)",
        "share / num_layers / max(len(local), 1)",
        (PARITY, "-k", "test_equals_reference and geometry"),
    ),
    Breakage(
        "pointwise matching divides by the transitions",
        "megatron_phf/model/flow_tap.py",
        "window.valid.sum(-1) if self.pointwise else",
        "window.valid.sum(-1) - 1 if self.pointwise else",
        (PARITY, "-k", "test_equals_reference and pointwise"),
    ),
    Breakage(
        "the supervised loss is weighted as the policy gradient",
        "megatron_phf/losses/_vocab_parallel.py",
        "torch.ones_like(sums[0]) if supervised else",
        "torch.ones_like(sums[0]) if not supervised else",
        (PARITY, "-k", "test_equals_reference and supervised"),
    ),
    Breakage(
        "a resumed run keeps evaluations from after its checkpoint",
        "megatron_phf/train/evaluation.py",
        "bool(done) and 0 <= step_of(line) <= done",
        "True",
        ("tests/unit/test_evaluation.py", "-k", "resumed_run"),
    ),
    Breakage(
        "an evaluation draws each problem's samples anew after a restart",
        "megatron_phf/evaluate.py",
        "(first + problem) * k + draw",
        "problem * k + draw",
        (EVALUATE, "-k", "every_draw"),
    ),
    Breakage(
        "a grading function may take for ever",
        "megatron_phf/grader_process.py",
        "        timer.start()\n",
        "        threading.Timer(20, _kill, [process]).start()\n",
        (GRADING, "-k", "plug_in_that_fails"),
    ),
    Breakage(
        "a grading function may take all memory",
        "megatron_phf/grader_process.py",
        "    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))\n",
        "",
        (GRADING, "-k", "plug_in_that_fails"),
    ),
    Breakage(
        "differences between seeds that are not each other's",
        "megatron_phf/report/statistics.py",
        "others = {run.seed: scored(run) for run in baseline.runs}",
        "others = {run.seed % 3 + 1: scored(run) for run in baseline.runs}",
        (REPORT, "-k", "paired_by_seed"),
    ),
    Breakage(
        "the report takes text from runs for HTML",
        "megatron_phf/report/page.py",
        "autoescape=True",
        "autoescape=False",
        (REPORT, "-k", "is_text"),
    ),
    Breakage(
        "rollouts and a live teacher's pass are in FP8",
        "megatron_phf/model/gpt.py",
        "with torch.no_grad(), fp8_off(chunks):",
        "with torch.no_grad():",
        (ENGINE, "-k", "nowhere_else and delayed"),
    ),
    Breakage(
        "the flow loss is taken in the layer's FP8 context",
        "megatron_phf/model/layer.py",
        "with outside_fp8(self.config):",
        "with __import__('contextlib').nullcontext():",
        (ENGINE, "-k", "nowhere_else and delayed"),
    ),
    Breakage(
        "sequences have any length in FP8",
        "megatron_phf/model/fp8.py",
        "return get_fp8_align_size(config.fp8_recipe) if config.fp8 else 1",
        "return 1",
        (ENGINE, "-k", "lengths"),
    ),
    Breakage(
        "the norm before experts has another key in the local spec",
        "megatron_phf/model/gpt.py",
        'spec.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)',
        "pass",
        (ENGINE, "-k", "other_spec_loads and moe"),
    ),
    Breakage(
        "vLLM samples with the weights of the first step for ever",
        "megatron_phf/rollout/vllm.py",
        "if not self._synced or (iteration - 1) % self._config.vllm.vllm_sync_interval == 0:",
        "if not self._synced:",
        (VLLM_JOB, "-k", "adapters or checkpoints"),
    ),
    Breakage(
        "a restarted vLLM server stays without its adapter",
        "megatron_phf/rollout/vllm.py",
        "            if self._adapters:\n                server.load_adapter(",
        "            if not self._adapters:\n                server.load_adapter(",
        (VLLM_JOB, "-k", "adapters or checkpoints"),
    ),
    Breakage(
        "vLLM's log-probabilities meet those of the next token",
        "megatron_phf/train/step.py",
        "batch.log_probs[here])",
        "batch.log_probs[here].roll(1))",
        (VLLM_JOB, "-k", "adapters or checkpoints"),
    ),
    Breakage(
        "an answer that comes byte by byte has no end",
        "megatron_phf/rollout/vllm_http.py",
        "end = time.monotonic() + self._patience.timeout",
        "end = time.monotonic() + 3600",
        (VLLM, "-k", "survived and drip"),
    ),
    Breakage(
        "a resumed run starts its schedule anew",
        "megatron_phf/train/optimizer.py",
        "self._schedule.step(increment=schedule_steps)",
        "self._schedule.step(increment=0)",
        (RESUME, "-k", "frozen_tp2"),
    ),
    Breakage(
        "one step count for all parameters of a resumed distributed Adam",
        "megatron_phf/train/optimizer.py",
        's.pop("step").clone() for',
        's.pop("step") for',
        (RESUME, "-k", "ema_dp2_distributed"),
    ),
    Breakage(
        "a resumed run leaves the average out of the EMA teacher's bf16 weights",
        "megatron_phf/train/checkpoint.py",
        'self._distiller.teacher.load_state_dict(state.get("teacher", {}))',
        "pass",
        (RESUME, "-k", "ema_dp2_distributed"),
    ),
    Breakage(
        "a resumed run keeps the lines after its checkpoint",
        "megatron_phf/train/logging.py",
        "0 < step_of(line) <= done",
        "0 < step_of(line)",
        ("tests/faults", "-k", "killed"),
    ),
    Breakage(
        "no adjacent term on the first layer of a pipeline stage",
        "megatron_phf/model/flow_tap.py",
        "            if layer > 1:\n                before",
        "            if layer > 1 and layer != 3:\n                before",  # of 4 layers at PP 2
        (PARITY, "-k", "test_equals_reference and llama_pp2"),
    ),
    Breakage(
        "the flow loss forgets the number of microbatches",
        "megatron_phf/train/step.py",
        "flow_scale = self.config.method.phf_alpha * averaged / num_sequences",
        "flow_scale = self.config.method.phf_alpha * averaged * len(batches) / num_sequences",
        (PARITY, "-k", "test_equals_reference and pp2_full_two"),
    ),
    Breakage(
        "the output loss forgets the number of microbatches",
        "megatron_phf/train/step.py",
        "token_weight = replicas * len(batches) / num_tokens",
        "token_weight = replicas / num_tokens",
        (PARITY, "-k", "test_equals_reference and pp2_full_two"),
    ),
    Breakage(
        "the window is off by one",
        "megatron_phf/data/batch.py",
        "prompt_lengths + positions, valid",
        "prompt_lengths + positions - 1, valid",
        (PARITY, "-k", "test_equals_reference and one]"),
    ),
    Breakage(
        "logits are off by one token",
        "megatron_phf/data/batch.py",
        "prompt_lengths - 1 + generated",
        "prompt_lengths + generated",
        (PARITY, "-k", "test_equals_reference and one]"),
    ),
    Breakage(
        "data-parallel ranks average instead of sharing a mean",
        "megatron_phf/train/step.py",
        "replicas = parallel.data_parallel_size()",
        "replicas = 1",
        (PARITY, "-k", "test_equals_reference and empty_dp2 and not pp2 and not tp2"),
    ),
    Breakage(
        "relative depth rounds down",
        "megatron_phf/layer_map.py",
        "2 * layer * teacher_layers + student_layers",
        "2 * layer * teacher_layers",
        (LARGER, "-k", "tall] or deep] or shallow]"),
    ),
    Breakage(
        "an absent direction term halves the geometry term",
        "megatron_phf/flow_spec.py",
        "share / len(chosen) / max(len(local), 1)",
        "share / len(chosen) / 2",
        (LARGER, "-k", "tall] or deep] or shallow]"),
    ),
    Breakage(
        "padding that only the student has takes part",
        "megatron_phf/train/step.py",
        '"vocab_size": self._vocab_size',
        '"vocab_size": self.arch.vocab_size',
        (LARGER, "-k", "tall] or deep] or shallow]"),
    ),
    Breakage(
        "a stage unpacks microbatches in another order than they were sent",
        "megatron_phf/model/flow_targets.py",
        "extend((i, move.item) for i in numbers)",
        "extend((i, move.item) for i in reversed(numbers))",
        (LARGER, "-k", "deep_pp2_late or deep_pp2_apart"),
    ),
    Breakage(
        "an offloaded teacher stays on the device",
        "megatron_phf/offload.py",
        "                p.data = data\n",
        "                del data\n",
        ("tests/unit/test_offload.py",),
    ),
    Breakage(
        "padding counts in the routers' load-balancing loss",
        "megatron_phf/train/step.py",
        "set_padding(self.student, [self.shards.piece(b.padding) for b in batches])",
        "set_padding(self.student, None)",
        (MOE, "-k", "test_gradient and ep2_mb4"),
    ),
    Breakage(
        "the flow loss forgets the average over context-parallel ranks",
        "megatron_phf/train/step.py",
        "averaged = replicas * parallel.context_parallel_size()",
        "averaged = replicas",
        (CONTEXT, "-k", "test_gradient and cp2_full"),
    ),
    Breakage(
        "context-parallel ranks hold neighbouring chunks instead of megatron's zig-zag",
        "megatron_phf/model/rows.py",
        "    return torch.cat((chunks[rank], chunks[-1 - rank]))",
        "    return torch.cat((chunks[2 * rank], chunks[2 * rank + 1]))",
        (CONTEXT, "-k", "test_gradient and cp2_full"),
    ),
    Breakage(
        "sequence-parallel ranks do not sum the gradient of a replicated LoRA matrix",
        "megatron_phf/model/lora.py",
        "whole.sequence_parallel = config.parallel.sequence_parallel and tp > 1",
        "whole.sequence_parallel = False",
        (LORA, "-k", "test_value_and_gradient_equal_peft and tp2_sp]"),
    ),
    Breakage(
        "adapters add q, k and v one after the other, not by query group",
        "megatron_phf/model/lora.py",
        "torch.cat(parts, -1).flatten(-2)",
        "torch.cat([p.flatten(-2) for p in parts], -1)",
        (LORA, "-k", "test_value_and_gradient_equal_peft and tp2]"),
    ),
    Breakage(
        "a recomputed first layer gets no gradient for its adapters",
        "megatron_phf/model/lora.py",
        "return output.requires_grad_() if torch.is_grad_enabled() else output",
        "return output",
        (LORA, "-k", "test_value_and_gradient_equal_peft and pp2_full]"),
    ),
    Breakage(
        "rollouts drop out",
        "megatron_phf/model/gpt.py",
        "        chunk.eval()\n    try",
        "        pass\n    try",
        (LORA, "-k", "test_rollouts_use_the_adapters and rollouts_tp2_pp2"),
    ),
    Breakage(
        "zero heads get channels in an adapter",
        "megatron_phf/model/lora.py",
        "F.pad(part, padding)",
        "F.pad(part, padding, value=0.1)",
        (LORA, "-k", "test_value_and_gradient_equal_peft and padded_heads"),
    ),
    Breakage(
        "a weight index may lead out of its directory",
        "megatron_phf/data/hf_files.py",
        '        check_file_name(name, f"{path}: weight_map[{shown(weight)}]")',
        "        pass",
        (SECURITY, "-k", "test_names_that_lead_out"),
    ),
    Breakage(
        "a tokenizer's code runs untold",
        "megatron_phf/data/tokenizer.py",
        "trust_remote_code=trust_remote_code\n",
        "trust_remote_code=True\n",
        (SECURITY, "-k", "test_code_of_a_tokenizer"),
    ),
    Breakage(
        "half a surrogate pair passes as text",
        "megatron_phf/data/problems.py",
        "        text.encode()\n",
        '        text.encode("utf-8", "surrogatepass")\n',
        (FUZZ, "-k", "test_problems"),
    ),
    Breakage(
        "JSON nested too deeply ends in a traceback",
        "megatron_phf/data/hf_files.py",
        "    except RecursionError as error:",
        "    except MemoryError as error:",
        (FUZZ, "-k", "test_model_configurations"),
    ),
)


def run_tests(breakage: Breakage, directory: Path, broken: bool) -> int:
    """pytest's exit status for the breakage's tests in a copy of the tree."""
    tree = directory / "tree"
    shutil.copytree(REPO, tree, ignore=shutil.ignore_patterns(".*", "runs", "__pycache__"))
    path = tree / breakage.file
    content = path.read_text()
    if content.count(breakage.old) != 1:
        raise SystemExit(f"{breakage.file}: the line to break is not there once: {breakage.old!r}")
    if broken:
        path.write_text(content.replace(breakage.old, breakage.new))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", *breakage.tests],
        cwd=tree,
        env={**environment(), "PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        check=False,
    )
    shutil.rmtree(tree)
    state = "broken" if broken else "whole"
    print(f"    {state}: {done.stdout.strip().splitlines()[-1]}", flush=True)
    return done.returncode


def main() -> int:
    """All breakages, a line each."""
    unnoticed, sound = 0, set()
    for breakage in BREAKAGES:
        print(f"{breakage.name} ({breakage.file})", flush=True)
        with tempfile.TemporaryDirectory() as directory:
            if breakage.tests not in sound and run_tests(breakage, Path(directory), broken=False):
                raise SystemExit("the tests fail without any breakage: mend that first")
            sound.add(breakage.tests)
            red = run_tests(breakage, Path(directory), broken=True) == 1  # 1: tests failed
        print(f"    {'RED, as it must be' if red else 'UNNOTICED'}", flush=True)
        unnoticed += not red
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
