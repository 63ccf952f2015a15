"""Linears, norms and attention under Transformer Engine's names, tensor-parallel as they are."""

import torch
import torch.nn.functional as F
from torch.nn import Parameter

from transformer_engine.pytorch import distributed, fp8, module, ops, optimizers, tensor
from transformer_engine.pytorch.fp8 import FP8GlobalStateManager, fp8_autocast
from transformer_engine.recording import record

__all__ = ["distributed", "fp8", "fp8_autocast", "module", "ops", "optimizers", "tensor"]


def fp8_model_init(*args, **kwargs):
    """Nobody gets FP8 weights here."""
    raise NotImplementedError("the stand-in has no FP8 weights")


class _Base(torch.nn.Module):
    """FP8 state: the history of absolute maxima, in the state dict as ``_extra_state``."""

    def _start(self) -> None:
        self.amax_history: list[float] = []

    def _note(self, x: torch.Tensor) -> None:
        on = FP8GlobalStateManager.enabled
        tokens = x.shape[:-1].numel()
        record.append(
            {
                "what": type(self).__name__, "module": id(self), "fp8": on, "tokens": tokens,
                "sequence": x.shape[0], "recipe": type(FP8GlobalStateManager.recipe).__name__,
                "training": self.training, "grad": torch.is_grad_enabled(),
            }
        )  # fmt: skip
        if on:
            assert tokens % 16 == 0 and x.shape[-1] % 16 == 0, f"FP8 GEMM of {tuple(x.shape)}"
            self.amax_history.append(float(x.detach().abs().max()))

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor(self.amax_history[-1:]).view(torch.uint8)

    def set_extra_state(self, state) -> None:
        if state is not None and state.numel():
            self.amax_history = state.cpu().view(torch.float32).tolist()


def _parallel(parameter: Parameter, dim: int) -> None:
    parameter.tensor_model_parallel = True
    parameter.partition_dim, parameter.partition_stride = dim, 1


class Linear(_Base):
    """y = x W^T + b."""

    def __init__(self, in_features, out_features, sequence_parallel=False,
                 fuse_wgrad_accumulation=False, tp_group=None, tp_size=1,
                 get_rng_state_tracker=None, rng_tracker_name=None, init_method=None,
                 bias=True, return_bias=False,
                 params_dtype=None, parallel_mode=None, parameters_split=None, device="cpu",
                 ub_overlap_ag=False, ub_overlap_rs=False, ub_overlap_rs_dgrad=False,
                 ub_bulk_dgrad=False, ub_bulk_wgrad=False, ub_name=None, delay_wgrad_compute=False,
                 symmetric_ar_type=None, save_original_input=False,
                 name=None) -> None:  # fmt: skip
        super().__init__()
        self._start()
        column, row = (parallel_mode == mode and sequence_parallel for mode in ("column", "row"))
        self.ub_name = ub_name
        self.ub_overlap_ag_fprop, self.ub_overlap_ag_dgrad = (
            way and ub_overlap_ag for way in (column, row)
        )
        self.ub_overlap_rs_fprop = row and ub_overlap_rs
        self.ub_overlap_rs_dgrad = column and ub_overlap_rs_dgrad
        self.ub_bulk_dgrad, self.ub_bulk_wgrad = (
            column and bulk for bulk in (ub_bulk_dgrad, ub_bulk_wgrad)
        )
        self.parallel_mode, self.tp_size = parallel_mode, tp_size
        self.sequence_parallel = sequence_parallel and tp_size > 1
        if parallel_mode == "column":
            out_features //= tp_size
        elif parallel_mode == "row":
            in_features //= tp_size
        self.in_features, self.out_features = in_features, out_features
        self.use_bias, self.return_bias = bias, return_bias
        self.save_original_input = save_original_input
        options = {"dtype": params_dtype, "device": device}
        self.weight = Parameter(torch.empty(out_features, in_features, **options))
        if get_rng_state_tracker is None or parallel_mode is None:
            init_method(self.weight)
        else:
            with get_rng_state_tracker().fork():
                init_method(self.weight)
        if bias:
            self.bias = Parameter(torch.zeros(out_features, **options))
        if parallel_mode == "column":
            for parameter in self.parameters():
                _parallel(parameter, 0)
        elif parallel_mode == "row":
            _parallel(self.weight, 1)

    def forward(self, inp, is_first_microbatch=None, fp8_output=False, fp8_grad=False):
        x = inp
        assert not (fp8_output or fp8_grad)
        from megatron.core import tensor_parallel as tp

        if self.parallel_mode == "column" and self.sequence_parallel:
            x = tp.gather_from_sequence_parallel_region(x)
        elif self.parallel_mode == "column" and self.tp_size > 1:
            x = tp.copy_to_tensor_model_parallel_region(x)
        self._note(x)
        out = F.linear(x, self.weight)
        if self.ub_overlap_ag_fprop or self.ub_overlap_rs_fprop:
            assert self.ub_name in ("qkv", "proj", "fc1", "fc2")
            buffered = x if self.ub_overlap_ag_fprop else out
            module.base._check(buffered, FP8GlobalStateManager.enabled)
            record[-1]["userbuffers"] = True
        if self.parallel_mode == "row" and self.sequence_parallel:
            out = tp.reduce_scatter_to_sequence_parallel_region(out)
        elif self.parallel_mode == "row" and self.tp_size > 1:
            out = tp.reduce_from_tensor_model_parallel_region(out)
        if not self.use_bias:
            return out
        return (out, self.bias) if self.return_bias else out + self.bias


class LayerNormLinear(Linear):
    """RMSNorm and the linear behind it."""

    def __init__(self, in_features, out_features, eps=1e-5, sequence_parallel=False,
                 fuse_wgrad_accumulation=False, tp_group=None, tp_size=1,
                 get_rng_state_tracker=None, init_method=None, bias=True,
                 normalization="LayerNorm", return_bias=False, params_dtype=None,
                 parallel_mode=None, return_layernorm_output=False,
                 return_layernorm_output_gathered=False, parameters_split=None,
                 zero_centered_gamma=False, device="cpu", ub_overlap_ag=False,
                 ub_overlap_rs=False, ub_overlap_rs_dgrad=False, ub_bulk_wgrad=False,
                 ub_bulk_dgrad=False, ub_name=None, delay_wgrad_compute=False,
                 symmetric_ar_type=None, name=None) -> None:  # fmt: skip
        assert normalization == "RMSNorm" and not zero_centered_gamma
        super().__init__(
            in_features, out_features, sequence_parallel=sequence_parallel, tp_group=tp_group,
            tp_size=tp_size, get_rng_state_tracker=get_rng_state_tracker, init_method=init_method,
            bias=bias, return_bias=return_bias, params_dtype=params_dtype,
            parallel_mode=parallel_mode, device=device, ub_overlap_ag=ub_overlap_ag,
            ub_overlap_rs=ub_overlap_rs, ub_overlap_rs_dgrad=ub_overlap_rs_dgrad,
            ub_bulk_dgrad=ub_bulk_dgrad, ub_bulk_wgrad=ub_bulk_wgrad, ub_name=ub_name,
        )  # fmt: skip
        self.eps, self.return_layernorm_output = eps, return_layernorm_output
        self.return_layernorm_output_gathered = False
        self.layer_norm_weight = Parameter(
            torch.ones(in_features, dtype=params_dtype, device=device)
        )
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel

    def forward(self, inp, is_first_microbatch=None, fp8_output=False, fp8_grad=False):
        x = inp
        normed = F.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.eps)
        out = super().forward(normed)
        return (out, normed) if self.return_layernorm_output else out


class RMSNorm(torch.nn.RMSNorm):
    """torch's."""

    def __init__(self, normalized_shape=None, eps=1e-5, sequence_parallel=False, params_dtype=None,
                 zero_centered_gamma=False, hidden_size=None, **kwargs) -> None:  # fmt: skip
        size = normalized_shape or hidden_size  # megatron-core 0.19 and newer; older
        super().__init__(size, eps=eps, dtype=params_dtype, device=kwargs.get("device"))
        self.weight.sequence_parallel = sequence_parallel


class LayerNorm(torch.nn.LayerNorm):
    """Not used by the product's models."""


class GroupedLinear(_Base):
    """One linear for each of the experts here: weight0, weight1, ..."""

    def __init__(self, num_gemms, in_features, out_features, sequence_parallel=False,
                 fuse_wgrad_accumulation=False, tp_group=None, tp_size=1,
                 get_rng_state_tracker=None, rng_tracker_name=None, init_method=None,
                 bias=False, return_bias=False,
                 params_dtype=None, parallel_mode=None, device="cpu", ub_overlap_rs=False,
                 ub_overlap_ag=False, ub_name=None, delay_wgrad_compute=False,
                 save_original_input=False, single_grouped_weight=False, single_grouped_bias=False,
                 name=None) -> None:  # fmt: skip
        super().__init__()
        self._start()
        assert not bias
        if parallel_mode == "column":
            out_features //= tp_size
        elif parallel_mode == "row":
            in_features //= tp_size
        self.save_original_input = save_original_input
        self.num_gemms, self.parallel_mode, self.use_bias = num_gemms, parallel_mode, bias
        self.fp8 = self.fp8_calibration = False
        self.fp8_meta = {"fp8_checkpoint": False}
        for i in range(num_gemms):
            weight = torch.empty(out_features, in_features, dtype=params_dtype, device=device)
            init_method(weight)
            setattr(self, f"weight{i}", Parameter(weight))

    def init_fp8_metadata(self, num_gemms=1) -> None:
        pass

    def forward(self, inp, m_splits, is_first_microbatch=None):
        x = inp
        self._note(x)
        parts = x.split(list(map(int, m_splits)))
        weights = [getattr(self, f"weight{i}") for i in range(self.num_gemms)]
        return torch.cat([F.linear(p, w) for p, w in zip(parts, weights, strict=True)])


def _partitioned_indices(cu_seqlens, size: int, rank: int) -> torch.Tensor:
    """As ``thd_get_partitioned_indices``: the row's positions of a context rank's tokens."""
    if size == 1:
        return torch.arange(int(cu_seqlens[-1]))
    assert not (cu_seqlens % (2 * size)).any(), f"{cu_seqlens.tolist()}: not multiples of 2 CP"
    token = torch.arange(int(cu_seqlens[-1]) // size)
    start = (cu_seqlens // size)[torch.bucketize(token, cu_seqlens // size, right=True) - 1]
    ends = (cu_seqlens // size)[torch.bucketize(token, cu_seqlens // size, right=True)]
    chunk, offset = (ends - start) // 2, token - start
    moved = torch.where(offset < chunk, rank, 2 * (size - 1) - rank)
    return start * size + offset + moved * chunk


class DotProductAttention(_Base):
    """Causal attention of [s, b, heads, hn], or of packed [t, heads, hn]."""

    def __init__(self, num_attention_heads, kv_channels, num_gqa_groups=None,
                 attention_dropout=0.0, qkv_format="sbhd", attn_mask_type="causal",
                 window_size=None, bottom_right_diagonal=None, sequence_parallel=False, tp_size=1,
                 get_rng_state_tracker=None, tp_group=None, layer_number=None,
                 attention_type="self", cp_group=None, cp_global_ranks=None, cp_stream=None,
                 cp_comm_type="p2p", softmax_scale=None, softmax_type="vanilla",
                 return_max_logit=False, name=None) -> None:  # fmt: skip
        super().__init__()
        self._start()
        assert not attention_dropout
        self.softmax_scale, self.cp_group = softmax_scale, cp_group
        if cp_group is not None:
            assert cp_global_ranks == torch.distributed.get_process_group_ranks(cp_group)
            assert cp_stream is not None and cp_comm_type == "p2p"

    def forward(self, query_layer, key_layer, value_layer, attention_mask=None, qkv_format="sbhd",
                cu_seqlens_q=None, cu_seqlens_kv=None, cu_seqlens_q_padded=None,
                cu_seqlens_kv_padded=None, max_seqlen_q=None, max_seqlen_kv=None,
                attn_mask_type="causal", window_size=None, bottom_right_diagonal=None,
                checkpoint_core_attention=False, core_attention_bias_type="no_bias",
                core_attention_bias=None, alibi_slopes=None, fast_zero_fill=True,
                inference_params=None, pad_between_seqs=None, fp8_output=False,
                num_splits=1):  # fmt: skip
        query, key, value = query_layer, key_layer, value_layer
        assert core_attention_bias is None and not fp8_output
        from megatron.core import tensor_parallel as tp

        assert attention_mask is None and not pad_between_seqs  # of megatron-core 0.19
        packed, size = qkv_format == "thd", 1 if self.cp_group is None else self.cp_group.size()
        rank = 0 if self.cp_group is None else self.cp_group.rank()
        whole, limits = len(query) * size, cu_seqlens_q
        if packed:
            padded = [cu_seqlens_q_padded, cu_seqlens_kv_padded]
            assert attn_mask_type == "padding_causal" and query.dim() == 3
            assert cu_seqlens_q.dtype is torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_kv)
            # The same object says that there is no padding between sequences.
            assert all(x is (None if size == 1 else cu_seqlens_q) for x in padded)
            assert max_seqlen_q == max_seqlen_kv == cu_seqlens_q.diff().max()
            assert cu_seqlens_q[0] == 0 and cu_seqlens_q[-1] == whole
            query, key, value = (x[:, None] for x in (query, key, value))
            record.append(
                {
                    "what": "packed attention", "cu_seqlens": cu_seqlens_q.tolist(),
                    "padded": [None if x is None else x.tolist() for x in padded],
                    "max_seqlen": max_seqlen_q, "tokens": len(query), "context": size,
                }
            )  # fmt: skip
        else:
            assert attn_mask_type == "causal"
            limits = torch.tensor([0, whole], dtype=torch.int32)
        mask = None
        if packed or size > 1:
            tokens = [_partitioned_indices(limits, size, r) for r in range(size)]
            mine, every = tokens[rank], torch.cat(tokens)
            sequences = [torch.bucketize(t, limits, right=True) for t in (mine, every)]
            mask = (sequences[0][:, None] == sequences[1]) & (mine[:, None] >= every)
        if size > 1:
            key, value = (
                tp.gather_from_sequence_parallel_region(x, group=self.cp_group)
                for x in (key, value)
            )
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, scale=self.softmax_scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        out = out.permute(2, 0, 1, 3).flatten(2)
        return out[:, 0] if packed else out


class Fp8Padding(torch.nn.Module):
    """Rows of zeros behind each expert's tokens, up to a multiple of 16."""

    def __init__(self, num_gemms, align_size=16) -> None:
        super().__init__()

    def forward(self, inp, m_splits):
        x = inp
        parts = x.split(list(m_splits))
        padded = [F.pad(p, (0, 0, 0, -len(p) % 16)) for p in parts]
        return torch.cat(padded), [len(p) for p in padded]


class Fp8Unpadding(torch.nn.Module):
    """Undoes :class:`Fp8Padding`; ``m_splits`` are those before it."""

    def __init__(self, num_gemms, align_size=16) -> None:
        super().__init__()

    def forward(self, inp, m_splits):
        x = inp
        sizes = [n + -n % 16 for n in m_splits]
        parts = zip(x.split(sizes), m_splits, strict=True)
        return torch.cat([p[:n] for p, n in parts])
