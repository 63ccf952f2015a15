"""Rollouts from the student itself, in process: KV-cached, tensor- and pipeline-parallel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from torch import Tensor

from megatron_phf.config.settings import Config
from megatron_phf.model.gpt import FlowGPTModel, evaluating, without_sequence_parallel
from megatron_phf.rollout.context import RolloutContext
from megatron_phf.rollout.megatron.batch import Batch
from megatron_phf.rollout.megatron.cache import KVCache
from megatron_phf.rollout.megatron.decode import decode_layer, normalise
from megatron_phf.rollout.megatron.graphs import StepGraphs, wants_graphs
from megatron_phf.rollout.protocol import Response
from megatron_phf.rollout.sampling import SamplingParams, VocabularyShard, sample
from megatron_phf.runtime import device, parallel
from megatron_phf.teacher.architecture import Models


def make_engine(context: RolloutContext) -> MegatronRollouts:
    """What samples from the student in process."""
    return student_engine(context.config, context.models, context.student)


def student_engine(config: Config, models: Models, student: list[FlowGPTModel]) -> MegatronRollouts:
    """The same, of chunks that are there."""
    size = config.rollout.rollout_batch_size
    required = config.rollout.decode_cuda_graphs == "on"
    graphs = StepGraphs(wants_graphs(config, models.student), required)
    return MegatronRollouts(student, models.vocab_size, size, graphs)


class MegatronRollouts:
    """Samples from model chunks that live in this process (see ``RolloutEngine``)."""

    def __init__(
        self,
        chunks: list[FlowGPTModel],
        vocab_size: int,
        batch_size: int,
        graphs: StepGraphs | None = None,
    ) -> None:
        self._chunks, self._graphs = chunks, graphs or StepGraphs(wanted=False)
        self._vocab_size = vocab_size
        self._batch_size = batch_size
        self._step: int | None = None

    def prepare(self, step: int) -> None:
        """The weights are here: nothing but the step's number is kept."""
        self._step = step

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        sample_ids: Sequence[int],
        limits: Sequence[int] | None = None,
    ) -> list[Response]:
        """See ``RolloutEngine.generate``."""
        assert len(prompts) == len(sample_ids) and all(prompts), "prompts have at least one token"
        most = sampling.max_new_tokens
        limits = [most] * len(prompts) if limits is None else [min(n, most) for n in limits]
        assert min(limits, default=1) >= 1, "a rollout has at least one token"
        # Neighbours in length share a batch: less padding in front of the shorter.  Equal ones are
        # read once a batch.
        first: dict[tuple[int, ...], int] = {}
        met = [first.setdefault(tuple(prompt), i) for i, prompt in enumerate(prompts)]
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), met[i]))
        responses: list[list[int]] = [[] for _ in prompts]
        size = self._batch_size
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        with evaluating(self._chunks), without_sequence_parallel(self._chunks):
            for index in range(parallel.max_over_experts(len(batches))):
                rows = batches[index] if index < len(batches) else []
                # Experts wait for tokens of all their ranks: one that has no batch left sends some.
                given = [(prompts[i], sample_ids[i], limits[i]) for i in rows] or [((0,), 0, 1)]
                batch = Batch(self, self._graphs, sampling, *zip(*given, strict=True))
                for i, response in zip(rows, batch.run(), strict=False):
                    responses[i] = response
        return [Response(ids, policy_version=self._step) for ids in responses]

    def forward(self, tokens: Tensor, positions: Tensor, cache: list[KVCache]) -> Tensor | None:
        """tokens and positions [b, s] through all stages -> logits behind the last column.

        This rank's part of them, [b, padded vocabulary / TP], on the last stage, None elsewhere.
        """
        hidden: Tensor | None = None
        for index, chunk in enumerate(self._chunks):
            if not chunk.pre_process:
                hidden = self._receive(tokens.shape, chunk)
            hidden = self._stage(chunk, tokens, positions, hidden, cache[index])
            if chunk.post_process:
                return self._logits(chunk, hidden[-1])
            dist.send(hidden.contiguous(), self._neighbour(+1), self._pipeline_group())
        return None

    def next_token_logits(self, sequences: Tensor) -> Tensor:
        """sequences [b, s] -> logits [b, vocabulary] after each, on every model-parallel rank."""
        tokens = sequences.to(device.device())
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        with evaluating(self._chunks), without_sequence_parallel(self._chunks):
            caches = self.new_caches(tokens.shape[1], torch.ones_like(tokens, dtype=torch.bool))
            logits = self.forward(tokens, positions, caches)
        dtype = self._chunks[0].config.params_dtype
        shape = (tokens.shape[0], self._vocab_size)
        result = torch.empty(shape, dtype=dtype, device=tokens.device)
        if logits is not None:
            whole = torch.cat(parallel.gather_over_tensor_parallel(logits), dim=-1)
            result.copy_(whole[:, : self._vocab_size])
        parallel.broadcast_from_last_stage(result)
        return result

    def choose(self, logits: Tensor, uniform: Tensor, sampling: SamplingParams) -> Tensor:
        """The result of :meth:`forward` -> token ids [b], on the last stage."""
        if parallel.tensor_parallel_size() == 1:
            return sample(logits, uniform, sampling)
        rank = parallel.tensor_parallel_rank()
        start, gather = rank * logits.shape[-1], parallel.gather_over_tensor_parallel
        return sample(logits, uniform, sampling, VocabularyShard(rank, start, gather))

    def _stage(
        self,
        chunk: FlowGPTModel,
        tokens: Tensor,
        positions: Tensor,
        hidden: Tensor | None,
        cache: KVCache,
    ) -> Tensor:
        if chunk.pre_process:
            hidden = chunk.embedding(input_ids=tokens, position_ids=positions)
        assert hidden is not None
        cache.begin(chunk.rotary_pos_emb.inv_freq, positions, hidden.dtype)
        for layer in chunk.decoder.layers:
            hidden = decode_layer(layer, hidden, cache)
        cache.finish()
        # Only what follows the last column is asked for.
        last = chunk.post_process
        return normalise(chunk.decoder.final_layernorm, hidden[-1:]) if last else hidden

    def _logits(self, chunk: FlowGPTModel, hidden: Tensor) -> Tensor:
        """hidden [b, h] -> this rank's logits [b, v_local], -inf where the vocabulary is padded."""
        weight = chunk.output_weight()
        if weight.dtype == torch.float32:
            # The long side first: small batches multiply up to twice as fast that way on CPUs.
            logits = torch.mm(weight, hidden.T).T.contiguous()
        else:
            logits = F.linear(hidden, weight)
        real = self._vocab_size - parallel.tensor_parallel_rank() * weight.shape[0]
        if real < weight.shape[0]:
            logits[:, max(real, 0) :] = -torch.inf
        return logits

    @staticmethod
    def _pipeline_group() -> dist.ProcessGroup:
        return mpu.get_pipeline_model_parallel_group()

    @staticmethod
    def _neighbour(step: int) -> int:
        ranks = parallel.pipeline_ranks()
        return ranks[(parallel.pipeline_rank() + step) % len(ranks)]

    def _receive(self, shape: torch.Size, chunk: FlowGPTModel) -> Tensor:
        config = chunk.config
        hidden = torch.empty(
            (shape[1], shape[0], config.hidden_size),
            dtype=config.pipeline_dtype,
            device=device.device(),
        )
        dist.recv(hidden, self._neighbour(-1), self._pipeline_group())
        return hidden

    def new_caches(self, most: int, seen: Tensor, fixed: bool = False) -> list[KVCache]:
        """One empty cache a model chunk (see ``KVCache``)."""
        return [KVCache(seen, most, fixed) for _ in self._chunks]
