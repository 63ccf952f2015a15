"""Of the run around it: resume, evaluation, grading, reports, vLLM, files from elsewhere."""

from __future__ import annotations

from tests.breakages.breakage import Breakage

RESUME = "tests/parallel/test_resume.py"
EVALUATE = "tests/end_to_end/test_evaluate.py"
AHEAD = "tests/unit/rollout/test_ahead.py"
VLLM = "tests/unit/rollout/test_vllm_server.py"
VLLM_JOB = "tests/end_to_end/test_vllm_job.py"
GRADING = "tests/unit/evaluation/test_grading.py"
REPORT = "tests/unit/report/test_report.py"
SECURITY = "tests/unit/test_security.py"
FUZZ = "tests/unit/test_fuzz.py"

RUN = (
    Breakage(
        "a resumed run keeps evaluations from after its checkpoint",
        "megatron_phf/train/evaluation.py",
        "bool(done) and 0 <= step_of(line) <= done",
        "True",
        ("tests/unit/evaluation/test_evaluation.py", "-k", "resumed_run"),
    ),
    Breakage(
        "an evaluation draws each problem's samples anew after a restart",
        "megatron_phf/evaluation/evaluate.py",
        "(first + problem) * k + draw",
        "problem * k + draw",
        (EVALUATE, "-k", "every_draw"),
    ),
    Breakage(
        "a grading function may take for ever",
        "megatron_phf/evaluation/grader_process.py",
        "        timer.start()\n",
        "        threading.Timer(20, _kill, [process]).start()\n",
        (GRADING, "-k", "plug_in_that_fails"),
    ),
    Breakage(
        "a grading function may take all memory",
        "megatron_phf/evaluation/grader_process.py",
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
        "an agent's second turn meets the random numbers of the first",
        "examples/engines/calculator.py",
        "sampling.seed, turn) if turn else sampling.seed",
        "sampling.seed, turn) if not turn else sampling.seed",
        ("tests/unit/rollout/test_engines.py", "-k", "dialogue"),
    ),
    Breakage(
        "ranks of one model may train on different responses",
        "megatron_phf/rollout/checked.py",
        "digest = None if problem else _digest(responses)",
        "digest = None",
        ("tests/unit/rollout/test_engines.py", "-k", "differ_between"),
    ),
    Breakage(
        "a rollout may be a step older than --max-off-policy-steps",
        "megatron_phf/rollout/ahead.py",
        "step - oldest > self._steps",
        "step - oldest > self._steps + 1",
        (AHEAD, "-k", "too_old"),
    ),
    Breakage(
        "a checkpoint is without the rollouts that are being sampled",
        "megatron_phf/rollout/ahead.py",
        "sorted({*self._pending, *self._there})",
        "sorted(self._there)",
        (AHEAD, "-k", "resumed_run"),
    ),
    Breakage(
        "a server that lost its weights beside training is asked again without them",
        "megatron_phf/rollout/ahead.py",
        "            self._engine.prepare(version)\n            self._submit(step)\n",
        "            self._submit(step)\n",
        (AHEAD, "-k", "lost"),
    ),
    Breakage(
        "the weights that ended a rollout are taken for those that began it",
        "megatron_phf/train/metrics.py",
        "iteration - (r.policy_version_end or r.policy_version))",
        "iteration - r.policy_version)",
        (AHEAD, "-k", "staleness"),
    ),
    Breakage(
        "vLLM samples with the weights of the first step for ever",
        "megatron_phf/rollout/vllm/engine.py",
        "due = (step - 1) % self._config.vllm.vllm_sync_interval == 0",
        "due = False",
        (VLLM_JOB, "-k", "adapters or checkpoints"),
    ),
    Breakage(
        "a restarted vLLM server stays without its adapter",
        "megatron_phf/rollout/vllm/sync.py",
        "            if adapter:\n                server.load_adapter(",
        "            if not adapter:\n                server.load_adapter(",
        (VLLM_JOB, "-k", "adapters or checkpoints"),
    ),
    Breakage(
        "vLLM's checkpoint is without the tied head",
        "megatron_phf/rollout/vllm/sync.py",
        "tied_head=True",
        "tied_head=False",
        (VLLM_JOB, "-k", "checkpoints"),
    ),
    Breakage(
        "a prefix cache that vLLM did not reset is taken for reset",
        "megatron_phf/rollout/vllm/server.py",
        'answer.get("success") is False',
        'answer.get("success") is None',
        (VLLM, "-k", "prefix_cache"),
    ),
    Breakage(
        "vLLM's log-probabilities meet those of the next token",
        "megatron_phf/train/student_pass.py",
        "self._drift.add(log_probs, batch.log_probs)",
        "self._drift.add(log_probs, batch.log_probs.roll(1))",
        (VLLM_JOB, "-k", "adapters or checkpoints"),
    ),
    Breakage(
        "an answer that comes byte by byte has no end",
        "megatron_phf/rollout/vllm/http.py",
        "end = time.monotonic() + self._patience.timeout",
        "end = time.monotonic() + 3600",
        (VLLM, "-k", "survived and drip"),
    ),
    Breakage(
        "a resumed run starts its schedule anew",
        "megatron_phf/train/optimizer.py",
        "self._schedule.step(increment=schedule_steps * self._batch)",
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
        "a weight index may lead out of its directory",
        "megatron_phf/files/foreign.py",
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
        "megatron_phf/files/foreign.py",
        "    except RecursionError as error:",
        "    except MemoryError as error:",
        (FUZZ, "-k", "test_model_configurations"),
    ),
    Breakage(
        "the name of a special token in a problem ends its message",
        "megatron_phf/data/special_text.py",
        "return self._names.sub(lambda match: match[0][0] + _MARK + match[0][1:], text)",
        "return text",
        ("tests/unit/data/test_special_text.py", "-k", "names_of_special_tokens"),
    ),
    Breakage(
        "config.json's stop tokens are not read",
        "megatron_phf/data/stop_tokens.py",
        '("generation_config.json", "config.json")',
        '("generation_config.json",)',
        ("tests/unit/data/test_special_text.py", "-k", "stop_tokens"),
    ),
    Breakage(
        "numbers are compared as floats, which have no 1/2024!",
        "megatron_phf/evaluation/reading.py",
        "    return ours.number == wanted.number",
        "    return float(ours.number) == float(wanted.number)",
        ("tests/unit/evaluation/test_answers.py", "-k", "test_pairs"),
    ),
    Breakage(
        "top-p 1 loses the tail",
        "megatron_phf/rollout/sampling.py",
        "    if top_p == 1:",
        "    if top_p > 1:",
        ("tests/unit/rollout/test_sampling.py", "-k", "top_p_of_one"),
    ),
)
