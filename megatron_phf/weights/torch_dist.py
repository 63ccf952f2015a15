"""megatron-core's ``torch_dist`` format: written inside this process, read without running code.

megatron-core's own writer forks a process a file, and keeps a manager process that outlives a
killed rank.  Here torch's writer does it in this process (or in a thread of it, for asynchronous
saves); what lies on the disk is the same, and ``megatron.core.dist_checkpointing.load`` reads it.
"""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import (
    CheckpointingConfig,
    CheckpointingException,
    save_config,
)
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    mcore_to_pyt_state_dict,
)
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_phf.runtime import device, private_names
from megatron_phf.runtime.private_names import INDEX_NAMES
from megatron_phf.runtime.together import on_first_rank

COMMON, INDEX = "common.pt", ".metadata"
# What torch's index of a checkpoint consists of; every other name in the pickle is refused.
_INDEX_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
    },
    "torch": {
        "Size",
        "device",
        *(n for n in dir(torch) if isinstance(getattr(torch, n), torch.dtype)),
    },
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},
}


class HostBuffers:
    """Host memory for the tensors of a state, one snapshot after the other.

    Kept between saves, as pinned memory is slow to get; the state has the same tensors each time.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[Any, ...], torch.Tensor] = {}

    def copy(self, place: tuple[Any, ...], tensor: torch.Tensor) -> torch.Tensor:
        """A copy of ``tensor`` in the buffer of ``place``; on CUDA it has only been queued."""
        buffer = self._buffers.get(place)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            buffer = self._buffers[place] = device.host_buffer(tensor)
        return buffer.copy_(tensor, non_blocking=True)


class Snapshot:
    """A state on its way to the disk: plain values (rank 0 writes them) and tensors by key."""

    def __init__(self, state: dict[str, Any], buffers: HostBuffers | None = None) -> None:
        """Collective.  With ``buffers``: the values may change before they are written."""
        sharded, self.common = save_preprocess(_without_objects(state))
        self._copied: Callable[[], object] = lambda: None
        if buffers is not None:
            _copy_tensors(sharded, buffers)
            self._copied = device.when_done()
            self.common = copy.deepcopy(self.common)  # Adam's step counts on in place
        self.tensors = mcore_to_pyt_state_dict(private_names.by_sharded_key(sharded), False)

    def write(self, directory: str, group: dist.ProcessGroup | None = None) -> None:
        """Every rank of ``group`` writes its part into the existing ``directory``.

        Raises:
            OSError: on every rank, where one cannot write.
        """
        self._copied()
        writer = dcp.FileSystemWriter(directory, thread_count=1, sync_files=False)
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        try:
            dcp.save(self.tensors, storage_writer=writer, planner=planner, process_group=group)
        except CheckpointException as error:  # not an Exception; the same on every rank
            raise OSError(_short(next(iter(error.failures.values()))[0])) from error
        on_first_rank(self._write_rest, directory, group=group)

    def _write_rest(self, directory: str) -> None:
        try:
            torch.save(self.common, os.path.join(directory, COMMON))
        except RuntimeError as error:  # so torch reports a full disk
            raise OSError(_short(error)) from error
        save_config(CheckpointingConfig("torch_dist", 1), directory)


def read(state: dict[str, Any], directory: str, *, complete: bool = True) -> dict[str, Any]:
    """The ``directory``'s values for ``state``, a sharded state dictionary; collective.

    ``complete``: everything the directory holds is asked for.

    Raises:
        ValueError: it is no checkpoint, lacks or has other tensors, or holds more than tensors
            and plain values.
    """
    check_plain(directory)
    strict = "raise_all" if complete else "raise_unexpected"
    try:
        return dist_checkpointing.load(_without_objects(state), directory, strict=strict)
    except (CheckpointException, CheckpointingException, KeyError, OSError, RuntimeError) as error:
        raise ValueError(f"{directory}: does not fit this model ({_short(error)})") from error


def check_plain(directory: str) -> None:
    """Raise ValueError unless reading ``directory`` runs no code that it contains.

    torch reads the index with the unrestricted pickle and objects without ``weights_only``.
    """
    index = read_index(directory)
    for key, entry in index.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise ValueError(
                f"{directory}: {key} is not a tensor; refused, as reading it runs code"
            )
    for info in (index.storage_data or {}).values():
        name = info.relative_path
        if os.path.basename(name) != name or not os.path.isfile(os.path.join(directory, name)):
            raise ValueError(
                f"{directory}: the file {name!r} is missing; copy the checkpoint again"
            )
    path = os.path.join(directory, COMMON)
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing; copy the checkpoint again") from error
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: damaged, or not plain values ({_short(error)})") from error


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in {*_INDEX_CLASSES.get(module, ()), *INDEX_NAMES.get(module, ())}:
            raise pickle.UnpicklingError(f"{module}.{name} does not belong there")
        return super().find_class(module, name)


def read_index(directory: str) -> Metadata:
    """Which tensors ``directory`` holds, their shapes and dtypes.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    path = os.path.join(directory, INDEX)
    try:
        with open(path, "rb") as f:
            index = _IndexUnpickler(f).load()
    except FileNotFoundError as error:
        raise ValueError(f"{directory}: not a checkpoint ({INDEX} is missing)") from error
    except Exception as error:  # a damaged pickle raises anything
        raise ValueError(f"{path}: damaged ({_short(error)}); copy the checkpoint again") from error
    if not isinstance(index, Metadata):
        raise ValueError(f"{path}: damaged (not an index); copy the checkpoint again")
    return index


def _without_objects(state: Any) -> Any:
    """Leave out pickled objects: the extra state of layers, empty without FP8."""
    if isinstance(state, dict):
        kept = {k: v for k, v in state.items() if not isinstance(v, ShardedObject)}
        return {k: _without_objects(v) for k, v in kept.items()}
    if isinstance(state, list):
        return [_without_objects(v) for v in state]
    return state


def _copy_tensors(state: Any, buffers: HostBuffers, place: tuple[Any, ...] = ()) -> None:
    for name, value in state.items() if isinstance(state, dict) else enumerate(state):
        if isinstance(value, ShardedTensor):
            value.data = buffers.copy((*place, name), value.data.detach())
        elif isinstance(value, dict | list):
            _copy_tensors(value, buffers, (*place, name))


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    # torch's own words for a file that did not grow as it should: "unexpected pos 704 vs 598".
    full = " (is the disk full?)" if "inline_container" in text else ""
    return f"{type(error).__name__}: {text[:300]}{full}"
