"""What every rollout engine and source must do, held to it in real processes (driver.py calls)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

from megatron_phf.config.settings import Config
from megatron_phf.data.rollouts import rollout_to_json
from megatron_phf.data.stop_tokens import stop_token_ids
from megatron_phf.data.tokenizer import load_tokenizer
from megatron_phf.rollout.context import Prompts, RolloutContext
from megatron_phf.rollout.engines import engine_row
from megatron_phf.rollout.protocol import Response
from megatron_phf.rollout.sources import make_engine, make_source, sampling_params
from megatron_phf.runtime import parallel
from megatron_phf.teacher.architecture import read_models
from megatron_phf.train.build import load_student, read_prompts

SAMPLES, LIMITS = [7, 3, 11, 900], [12, 1, 5, 12]


def content(responses: list[Response]) -> list[tuple]:
    """What is trained on."""
    return [(list(r.token_ids), r.mask and list(r.mask)) for r in responses]


def make_context(config: Config) -> RolloutContext:
    directory = config.model.hf_model
    models, tokenizer = read_models(config), load_tokenizer(config)
    pairs = read_prompts(config, tokenizer)
    prompts = Prompts(tokenizer, pairs, stop_token_ids(tokenizer, directory))
    return RolloutContext(
        config, models, prompts, lambda: load_student(models.student, config, directory)
    )


def contract(config: Config) -> dict:
    """Asserts on every rank; what came out, for the test."""
    context = make_context(config)
    if not engine_row(config.rollout.rollout_engine).samples:
        return source_contract(config, context)
    engine = make_engine(context)
    sampling = sampling_params(config, context.prompts.stop_ids)
    prompts = [context.prompts.pairs[i].student_ids for i in range(len(SAMPLES))]
    weights = [p.detach().clone() for chunk in context.student for p in chunk.parameters()]
    engine.prepare(1)
    first = engine.generate(prompts, sampling, SAMPLES, LIMITS)
    # One each in order, within room, ids of the vocabulary: by hand, the wrapper aside.
    assert len(first) == len(prompts)
    for response, most in zip(first, LIMITS, strict=True):
        count = len(response.token_ids)
        assert 0 <= count <= most and response.policy_version == 1
        assert all(0 <= i < context.vocab_size for i in response.token_ids)
        mask = [True] * count if response.mask is None else response.mask
        assert len(mask) == count and {type(m) for m in mask} <= {bool}
        assert response.log_probs is None or len(response.log_probs) == count
        pairs = zip(response.token_ids, mask, strict=True)
        stops = [written and i in sampling.stop_ids for i, written in pairs]
        assert not any(stops[:-1]) and (count == most or stops[-1])
    # The same on all ranks of the model, again, alone and among others, and none at all.
    every = parallel.gather_objects((parallel.data_parallel_rank(), content(first)))
    assert all(c == content(first) for rank, c in every if rank == parallel.data_parallel_rank())
    assert content(engine.generate(prompts, sampling, SAMPLES, LIMITS)) == content(first)
    order = [2, 0]
    some = engine.generate(
        *([prompts[i] for i in order], sampling, [SAMPLES[i] for i in order]),
        [LIMITS[i] for i in order],
    )
    assert content(some) == [content(first)[i] for i in order]
    assert engine.generate([], sampling, []) == []
    if hasattr(engine._engine, "sampler") and parallel.decides_for_model():
        # The same in a thread, without the other ranks.
        sampler = engine._engine.sampler(prompts, sampling, SAMPLES, LIMITS)
        with ThreadPoolExecutor(1) as pool:
            assert content(pool.submit(sampler).result()) == content(first)
    # Another step, the same weights: the same tokens, of a version that is no older.
    engine.prepare(2)
    later = engine.generate(prompts, sampling, SAMPLES, LIMITS)
    assert content(later) == content(first) and {r.policy_version for r in later} == {2}
    # The student is as it was.
    now = [p.detach() for chunk in context.student for p in chunk.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(weights, now, strict=True))
    texts = [context.prompts.tokenizer.decode(r.token_ids) for r in first]
    return {"texts": texts, "masks": [r.mask and list(r.mask) for r in first]}


def source_contract(config: Config, context: RolloutContext) -> dict:
    """A source gives the same share of a step whatever came before."""
    source = make_source(context)
    second, first, again = (source.rollouts(i) for i in (2, 1, 2))
    assert second == again != first
    assert len(first) * parallel.data_parallel_size() == config.train.global_batch_size
    return {"rollouts": [rollout_to_json(r) for r in first]}
