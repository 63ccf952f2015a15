"""What vLLM loads by its entry point ``vllm.general_plugins``: one more way to get weights.

    vllm serve MODEL --weight-transfer-config '{"backend": "torch_distributed"}'

Runs in vLLM's environment, where neither megatron-core nor anything else of the trainer is needed.
"""

from __future__ import annotations

from megatron_phf.rollout.vllm.wire import BACKEND


def register() -> None:
    """Name the receiver to vLLM; its module is imported where it is asked for."""
    try:
        from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    except ImportError:  # a vLLM from before its weight-transfer API
        return
    module = "megatron_phf.rollout.vllm.receiver"
    try:
        WeightTransferEngineFactory.register_engine(BACKEND, module, "TorchDistributedReceiver")
    except ValueError:  # of this process already
        return
