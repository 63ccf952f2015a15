"""Of the model: Transformer Engine, FP8, adapters, experts, context parallelism, offload."""

from __future__ import annotations

from tests.breakages.breakage import Breakage

TRAINING = "tests/parallel/test_training.py"
LORA = "tests/parallel/test_lora.py"
ENGINE = "tests/parallel/test_transformer_engine.py"
MOE = "tests/parallel/test_moe.py"
CONTEXT = "tests/parallel/test_context.py"

MODEL = (
    Breakage(
        "rollouts and a live teacher's pass are in FP8",
        "megatron_phf/model/gpt.py",
        "with torch.no_grad(), fp8_off(chunks), userbuffers_off(chunks):",
        "with torch.no_grad(), userbuffers_off(chunks):",
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
        "an offloaded teacher stays on the device",
        "megatron_phf/teacher/offload.py",
        "                p.data = data\n",
        "                del data\n",
        ("tests/unit/teacher/test_offload.py",),
    ),
    Breakage(
        "the last teacher's output head is every teacher's",
        "megatron_phf/train/teacher_pass.py",
        "chunks[-1].output_weight().detach()",
        "chunks[-1].output_weight()",
        ("tests/parallel/test_teacher_model.py", "-k", "two_tp2_sp"),
    ),
    Breakage(
        "padding counts in the routers' load-balancing loss",
        "megatron_phf/train/student_pass.py",
        "set_padding(self._student, [b.padding for b in batches])",
        "set_padding(self._student, None)",
        (MOE, "-k", "test_gradient and ep2_mb4"),
    ),
    Breakage(
        "the flow loss forgets the average over context-parallel ranks",
        "megatron_phf/train/student_pass.py",
        "averaged = replicas * parallel.context_parallel_size()",
        "averaged = replicas",
        (CONTEXT, "-k", "test_gradient and cp2_full"),
    ),
    Breakage(
        "context-parallel ranks hold neighbouring chunks instead of megatron's zig-zag",
        "megatron_phf/hidden/rows.py",
        "    return torch.cat((chunks[rank], chunks[-1 - rank]))",
        "    return torch.cat((chunks[2 * rank], chunks[2 * rank + 1]))",
        (CONTEXT, "-k", "test_gradient and cp2_full"),
    ),
    Breakage(
        "context parallelism cuts a packed row as if it were one sequence",
        "megatron_phf/hidden/rows.py",
        "if cu_seqlens is None else cu_seqlens.tolist()",
        "",
        (CONTEXT, "-k", "test_gradient and cp2_full"),
    ),
    Breakage(
        "rotary positions run on through the sequences of a context rank's row",
        "megatron_phf/train/pipeline.py",
        "params.cu_seqlens_q_padded = params.cu_seqlens_kv_padded = limits",
        "params.cu_seqlens_q_padded, params.max_seqlen_q = limits[[0, -1]], int(limits[-1])",
        (CONTEXT, "-k", "test_gradient and cp2_full"),
    ),
    Breakage(
        "the flow window of a packed row is looked up as in one sequence",
        "megatron_phf/train/batch.py",
        "shards.in_part(batch.window, shape[1], limits)",
        "shards.in_part(batch.window, shape[1])",
        (CONTEXT, "-k", "test_gradient and cp2_full"),
    ),
    Breakage(
        "sequence-parallel ranks do not sum the gradient of a replicated LoRA matrix",
        "megatron_phf/lora/adapter.py",
        "whole.sequence_parallel = config.parallel.sequence_parallel and tp > 1",
        "whole.sequence_parallel = False",
        (LORA, "-k", "test_value_and_gradient_equal_peft and tp2_sp]"),
    ),
    Breakage(
        "adapters add q, k and v one after the other, not by query group",
        "megatron_phf/lora/linears.py",
        "torch.cat(parts, -1).flatten(-2)",
        "torch.cat([p.flatten(-2) for p in parts], -1)",
        (LORA, "-k", "test_value_and_gradient_equal_peft and tp2]"),
    ),
    Breakage(
        "a recomputed first layer gets no gradient for its adapters",
        "megatron_phf/lora/linears.py",
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
        "megatron_phf/lora/adapter.py",
        "F.pad(part, padding)",
        "F.pad(part, padding, value=0.1)",
        (LORA, "-k", "test_value_and_gradient_equal_peft and padded_heads"),
    ),
    Breakage(
        "userbuffers stay on where rows have any length",
        "megatron_phf/model/gpt.py",
        "fp8_off(chunks), userbuffers_off(chunks)",
        "fp8_off(chunks)",
        (ENGINE, "-k", "test_userbuffers"),
    ),
    Breakage(
        "an EMA teacher averages weights that are still on their way",
        "megatron_phf/teacher/average.py",
        "        wait_for_weights(student)\n",
        "",
        (TRAINING, "-k", "ema_dp2_gather"),
    ),
    Breakage(
        "rollouts decode from weights that are still on their way",
        "megatron_phf/model/gpt.py",
        """    wait_for_weights(chunks)
    modes =""",
        "    modes =",
        ("tests/unit/teacher/test_offload.py", "-k", "waits_for_them"),
    ),
    Breakage(
        "the gradient norm is torch's, of each whole tensor",
        "megatron_phf/runtime/grad_norm.py",
        "        clip_grads.l2_norm_impl = _multi_tensor_l2_norm\n",
        "        pass\n",
        ("tests/parallel/test_parity.py", "-k", "equals_reference and dp2_tp2 and not empty"),
    ),
)
