"""Every private name of torch, megatron-core and mbridge that is used, and nowhere else.

A private name may go with any release.  :func:`check`, at start-up, says which one is missing, in
which version, and which versions are known to have it.  Undocumented names without an underscore
are in the table too.  Nothing is imported here before a name is needed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Package:
    """``seen``: versions that the names below were found in, and the tests passed with."""

    name: str
    seen: str
    names: tuple[str, ...]  # module:attribute, or module:class.attribute


TORCH = Package(
    "torch",
    "2.11 and 2.13",
    (
        "torch:_C._autograd._get_current_graph_task_keep_graph",
        "torch:_C._accelerator_setAllocatorSettings",
        "torch.distributed.distributed_c10d:_get_default_store",
        "torch.distributed.distributed_c10d:_world.pg_map",
        "torch.cuda.memory:_record_memory_history",
        "torch.cuda.memory:_dump_snapshot",
    ),
)
MEGATRON = Package(
    "megatron-core",
    "0.16.1 and 0.19.2",
    (
        "megatron.core.tensor_parallel.random:_get_cuda_rng_state",
        "megatron.core.tensor_parallel.random:_set_cuda_rng_state",
        "megatron.core.models.gpt.gpt_model:GPTModel._postprocess",
        "megatron.core.pipeline_parallel.p2p_communication:P2PCommunicator._communicate_shapes",
        "megatron.core.dist_checkpointing.strategies.torch:_replace_state_dict_keys_with_sharded_keys",
        "megatron.core.dist_checkpointing.strategies.torch:MCoreSavePlanner",
        "megatron.core.dist_checkpointing.strategies.torch:mcore_to_pyt_state_dict",
        "megatron.core.dist_checkpointing.state_dict_utils:save_preprocess",
        "megatron.core.utils:local_multi_tensor_l2_norm",
        "megatron.core.optimizer.clip_grads:l2_norm_impl",
    ),
)
MBRIDGE = Package(
    "mbridge",
    "0.15.1",
    (
        "mbridge.core.bridge:_MODEL_REGISTRY",
        "mbridge.core.bridge:Bridge._build_config",
        "mbridge.core.bridge:Bridge._adjust_mapping_for_shared_weights",
        "mbridge.core.bridge:Bridge._get_actual_hf_path",
        "mbridge.core.bridge:Bridge._get_safetensor_io",
        "mbridge.core.bridge:Bridge._weight_to_mcore_format",
        "mbridge.core.bridge:Bridge._weight_to_hf_format",
        "mbridge.core.bridge:Bridge._DIRECT_MAPPING",
        "mbridge.core.bridge:Bridge._MLP_MAPPING",
        "mbridge.core.bridge:Bridge._OTHER_MAPPING",
    ),
)
# Looked for where its layers are used (model/gpt.py); none begins with an underscore.
ENGINE = Package(
    "transformer-engine",
    "2.16.1 and 2.20.2 (read, not run)",
    (
        "transformer_engine.pytorch.fp8:FP8GlobalStateManager",
        "transformer_engine.pytorch.module.base:initialize_ub",
    ),
)
# Names that torch's pickled index of a checkpoint may hold, by module (model/torch_dist.py).
INDEX_NAMES = {
    "torch.distributed.checkpoint.metadata": {"_MEM_FORMAT_ENCODING"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "pathlib._local": {"PosixPath"},  # of Python 3.13; others say pathlib
}


def find(name: str) -> Any:
    """The value of ``module:attribute.attribute``; ImportError or AttributeError where missing."""
    module, _, path = name.partition(":")
    value = importlib.import_module(module)
    for part in path.split("."):
        value = getattr(value, part)
    return value


def check(packages: Sequence[Package] = (TORCH, MEGATRON, MBRIDGE)) -> None:
    """Look for every name of ``packages``.

    Raises:
        ValueError: one is missing; names it, the package's version and those seen to work.
    """
    for package in packages:
        for name in package.names:
            try:
                find(name)
            except (ImportError, AttributeError) as error:
                raise ValueError(
                    f"{package.name} {_version(package.name)} has no {name.replace(':', '.')}, "
                    f"which megatron_phf uses ({error}); seen to work: {package.name} "
                    f"{package.seen}; install one of those"
                ) from error


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


# torch


def keeps_graph() -> bool:
    """Within a backward pass: whether another one through the same graph may follow."""
    return find("torch:_C._autograd._get_current_graph_task_keep_graph")()


def default_store() -> Any:
    """The key-value store of the default process group."""
    return find("torch.distributed.distributed_c10d:_get_default_store")()


def process_groups() -> list[Any]:
    """All process groups of this process."""
    return list(find("torch.distributed.distributed_c10d:_world.pg_map"))


def set_allocator(settings: str) -> None:
    """Let CUDA's allocator go by ``settings``, as PYTORCH_ALLOC_CONF has them, from now on."""
    find("torch:_C._accelerator_setAllocatorSettings")(settings)


def record_memory_history() -> None:
    """From now on, CUDA's allocator notes who allocates."""
    find("torch.cuda.memory:_record_memory_history")()


def dump_memory_snapshot(path: str) -> None:
    """Write what CUDA's allocator holds."""
    find("torch.cuda.memory:_dump_snapshot")(path)


# megatron-core


def replace_rng_functions(module: Any, get: Callable[..., Any], put: Callable[..., Any]) -> None:
    """In megatron-core's module of random generators: how CUDA's state is read and set."""
    module._get_cuda_rng_state, module._set_cuda_rng_state = get, put


def by_sharded_key(state: dict[str, Any]) -> dict[str, Any]:
    """A sharded state dictionary under its tensors' keys, lists of shards as values."""
    module = "megatron.core.dist_checkpointing.strategies.torch"
    return find(f"{module}:_replace_state_dict_keys_with_sharded_keys")(state, True)[0]


class HiddenStatesOut:
    """Mixed in before megatron-core's ``GPTModel``: its forward ends before the output head."""

    def _postprocess(self, hidden_states: Any, **kwargs: Any) -> Any:
        """[s, b, h] -> [s, b, h]."""
        return hidden_states


class ShapesOfMessages:
    """Mixed in before megatron-core's ``P2PCommunicator``: who is asked for what will arrive."""

    def shapes_of_next(self, *asked: bool) -> Any:
        """Shapes of the next tensor from the stage before and from the one behind, if ``asked``."""
        raise NotImplementedError

    def _communicate_shapes(self, send_next: Any, send_prev: Any, *asked: bool) -> Any:
        return self.shapes_of_next(*asked)


# mbridge


class BridgeHooks:
    """mbridge's hooks under public names, mixed in before its class of an architecture."""

    def build_config(self) -> Any:
        """What mbridge reads of a ``TransformerConfig``."""
        raise NotImplementedError

    def weight_reader(self) -> Any:
        """What mbridge reads weights through: ``load_one_hf_weight(name)``."""
        raise NotImplementedError

    def direct_mapping(self, mapping: dict[str, str]) -> dict[str, str]:
        """The names that map one to one, from a copy of the class's ``mapping``."""
        return mapping

    def to_megatron(self, name: str, weights: list[Any], convert: Callable[..., Any]) -> Any:
        """HuggingFace's ``weights`` as megatron's ``name``; ``convert``: what mbridge does."""
        return convert(name, weights)

    def to_hf(self, name: str, weight: Any, convert: Callable[..., Any]) -> Any:
        """(HuggingFace's names, weights) of megatron's; ``convert``: what mbridge does."""
        return convert(name, weight)

    def _build_config(self) -> Any:
        return self.build_config()

    def _get_safetensor_io(self, weights_path: str) -> Any:
        return self.weight_reader()

    def _adjust_mapping_for_shared_weights(self) -> None:
        # mbridge writes into its class's dictionary here, for every later model of the process.
        self._DIRECT_MAPPING = self.direct_mapping(dict(self._DIRECT_MAPPING))  # type: ignore[has-type]

    def _get_actual_hf_path(self, weight_path: str) -> str:
        return weight_path  # no cache of a hub

    def _weight_to_mcore_format(self, name: str, weights: list[Any]) -> Any:
        return self.to_megatron(name, weights, super()._weight_to_mcore_format)  # type: ignore[misc]

    def _weight_to_hf_format(self, name: str, weight: Any) -> Any:
        return self.to_hf(name, weight, super()._weight_to_hf_format)  # type: ignore[misc]


def bridge_class(hooks: type[BridgeHooks], model_type: str, norms: dict, **fields: Any) -> Any:
    """mbridge's class of ``model_type`` with ``hooks`` before it and ``norms`` in its mappings."""
    base = find("mbridge.core.bridge:_MODEL_REGISTRY")[model_type]
    mappings = {  # it sends any name with "mlp" in it to the second
        "_OTHER_MAPPING": {**base._OTHER_MAPPING, **norms},
        "_MLP_MAPPING": {**base._MLP_MAPPING, **norms},
    }
    return type("FlowBridge", (hooks, base), {**mappings, **fields})
