"""A weight-transfer engine of vLLM that receives over torch.distributed (see ``wire``).

Written against vLLM 0.32's ``WeightTransferEngine``; only vLLM imports it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from megatron_phf.rollout.vllm import wire


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Where the trainer waits for ``world_size`` - 1 workers, and how many seconds."""

    master_address: str
    master_port: int
    world_size: int
    timeout_seconds: float


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """What comes next, in this order."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


class TorchDistributedReceiver(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Receives a message's tensors on every worker, and lets the model load them."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    _group: Any = None

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Join the trainer's group; a trainer before it is forgotten."""
        self.shutdown()
        layout = self.parallel_config
        rank = 1 + layout.data_parallel_index * layout.world_size + layout.rank
        seconds = init_info.timeout_seconds
        store = wire.meet(init_info.master_address, init_info.master_port, seconds)
        cuda = self.device.type == "cuda"
        self._group = wire.join(store, rank, init_info.world_size, seconds, cuda)

    def start_weight_update(self) -> None:
        """Layers are processed again as their weights come in."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """One message: received whole, then loaded."""
        if self._group is None:
            raise RuntimeError("/init_weight_transfer_engine comes first")
        tensors = wire.receive(
            self._group, update_info.dtype_names, update_info.shapes, self.device
        )
        self.model.load_weights(list(zip(update_info.names, tensors, strict=True)))

    def finish_weight_update(self) -> None:
        """Process the layers that are left."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Leave the group."""
        self._group = None
