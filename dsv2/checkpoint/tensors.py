"""Read and write shards with torch.distributed.checkpoint, as ranges of flat tensors named "KEY/NAME"."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.distributed_c10d import ProcessGroup

from dsv2.checkpoint.safe_reader import SafeReader
from dsv2.optimizers.base import Shard


class _Range:
    """A rank's range of a flat tensor, with the methods that torch.distributed.checkpoint's planners call."""

    def __init__(self, local: Tensor, offset: int, total: int):
        self.local = local
        self.offset = torch.Size([offset])
        self.total = torch.Size([total])

    def size(self) -> torch.Size:
        return self.total

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(self.offset, self.local.size())]

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        data = TensorWriteData(
            chunk=self.__create_chunk_list__()[0],
            properties=TensorProperties.create_from_tensor(self.local),
            size=self.total,
        )
        return [WriteItem(MetadataIndex(name, self.offset), WriteItemType.SHARD, tensor_data=data)]


class _SavePlanner(DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.state_dict[index.fqn].local


class _LoadPlanner(DefaultLoadPlanner):
    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        # The default planner replaces everything in the dict that is not a tensor with None.
        self.state_dict = state_dict
        self.original_state_dict = state_dict
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].local


def _ranges(shards: Iterable[Shard]) -> dict[str, _Range]:
    return {
        f"{key}/{shard.name}": _Range(tensor, shard.offset, shard.total)
        for shard in shards
        for key, tensor in shard.tensors.items()
    }


def write(shards: Iterable[Shard], folder: Path, group: ProcessGroup | None) -> None:
    """Write every rank's shards. A range that several ranks hold is written once. Collective.

    Raises:
        CheckpointException: on every rank, if any rank could not write.
    """
    dcp.save(
        _ranges(shards),
        storage_writer=dcp.FileSystemWriter(folder),
        planner=_SavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
        process_group=group,
    )


def read(shards: Iterable[Shard], folder: Path, group: ProcessGroup | None) -> None:
    """Fill every rank's shards in place. Collective.

    Raises:
        CheckpointException: on every rank, if any rank could not read.
    """
    dcp.load(
        _ranges(shards),
        storage_reader=SafeReader(folder),
        planner=_LoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
        process_group=group,
    )
