"""Average@k of a HuggingFace model, TP x PP x DP: k sampled answers a problem, graded.

    torchrun --nproc-per-node 8 tools/evaluate.py --hf-model DIR --data problems.jsonl \\
        --k 12 --output average.json --tensor-model-parallel-size 2

The defaults are the published evaluation: thinking mode, temperature 1.0, top-p 0.95, at most 38912
new tokens (fewer where the model's positions end).  All flags of examples/pretrain_phf.sh are
understood; those of training have no effect.  Every problem needs an answer, and no solution.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_phf.config import Config
from megatron_phf.flags import parse_args
from megatron_phf.main import run_rank

_DEFAULTS = ["--student-thinking", "--rollout-temperature", "1.0", "--rollout-top-p", "0.95"]
_DEFAULTS += ["--rollout-top-k", "0", "--max-new-tokens", "38912"]


def _prompts(config: Config, tokenizer: Any) -> list[Any]:
    from megatron_phf.data.problems import FieldNames, read_problems
    from megatron_phf.data.prompts import PromptPair, fill, prompt_templates

    data = config.data
    assert data.data is not None
    fields = FieldNames(data.problem_field, data.solution_field, data.answer_field)
    template, limit = prompt_templates(data).student, data.max_prompt_length
    pairs = []
    for problem in read_problems(data.data, fields):
        name = f"--data {data.data}: problem {problem.index + 1}"
        if problem.answer is None:
            raise ValueError(f"{name} has no {data.answer_field!r}; see --answer-field")
        ids = tuple(tokenizer.prompt(fill(template, problem), data.student_thinking))
        if len(ids) > limit:
            raise ValueError(f"{name} has {len(ids)} tokens, over --max-prompt-length {limit}")
        pairs.append(PromptPair(problem, ids, ids))
    return pairs


def evaluate_model(config: Config, k: int, output: str | None) -> None:
    """Sample, grade, print; rank 0 writes ``output``.  Every rank calls it.

    Raises:
        ValueError: a file is damaged, or ``output`` cannot be written.
    """
    from megatron_phf import parallel
    from megatron_phf.data.tokenizer import check_token_ids, load_tokenizer, stop_token_ids
    from megatron_phf.evaluate import evaluate
    from megatron_phf.model.architecture import read_architecture
    from megatron_phf.rollout.megatron import MegatronRollouts
    from megatron_phf.train.logging import say
    from megatron_phf.train.loop import load_student, sampling_params

    directory = config.model.hf_model
    assert directory is not None
    arch, tokenizer = read_architecture(directory), load_tokenizer(config)
    stop_ids = stop_token_ids(tokenizer, directory)
    check_token_ids(tokenizer, stop_ids, arch.vocab_size)
    pairs = _prompts(config, tokenizer)
    room = arch.max_position_embeddings - max(len(p.student_ids) for p in pairs)
    sampling = sampling_params(config, stop_ids)
    sampling = dataclasses.replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
    engine = MegatronRollouts(
        load_student(arch, config, directory), arch.vocab_size, config.rollout.rollout_batch_size
    )
    start = time.perf_counter()
    result = evaluate(engine, tokenizer, pairs, sampling, k)
    seconds = time.perf_counter() - start
    low, high = result.interval
    say(
        f"Average@{k} {100 * result.average:.2f} % (95 % interval {100 * low:.2f} - "
        f"{100 * high:.2f}) over {len(pairs)} problems in {seconds:.0f} s"
    )
    report = {
        "hf_model": directory, "data": config.data.data, "k": k, "problems": len(pairs),
        "average_at_k": result.average, "interval_95": list(result.interval),
        "correct": result.correct, "sampling": dataclasses.asdict(sampling),
        "seconds": round(seconds, 2),
    }  # fmt: skip
    problem = None
    if output is not None and parallel.is_first_rank():
        try:
            _write(output, report)
        except OSError as error:
            problem = f"--output {output}: cannot be written ({error.strerror})"
    problem = parallel.broadcast_object(problem)
    if problem is not None:
        raise ValueError(problem)


def _write(path: str, report: dict[str, Any]) -> None:
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        json.dump(report, f, indent=1)
    os.replace(path + ".tmp", path)


def _parse(given: list[str], k: int) -> Config:
    if k < 1:
        raise ValueError(f"--k {k}: need at least 1")
    config = parse_args([*_DEFAULTS, *given])
    if config.model.hf_model is None or config.data.data is None:
        raise ValueError("--hf-model and --data are needed")
    # What only training needs is set so that its checks hold here.
    return config.replaced(
        solution_field=config.data.problem_field,
        max_teacher_prompt_length=config.data.max_prompt_length,
        global_batch_size=int(os.environ.get("WORLD_SIZE", "1")),
        micro_batch_size=1,
    )


def main(argv: list[str] | None = None) -> None:
    """One rank of the evaluation; status 1 and one error line for a mistake."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--k", type=int, default=12, help="samples a problem (default: 12)")
    parser.add_argument("--output", default=None, help="write the result to this JSON file")
    args, given = parser.parse_known_args(argv)
    run_rank(
        lambda: _parse(given, args.k),
        lambda config, *_: evaluate_model(config, args.k, args.output),
    )


if __name__ == "__main__":
    main()
