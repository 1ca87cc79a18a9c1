"""Read torch.distributed.checkpoint's files without executing anything that they say.

A checkpoint may come from someone else. torch reads the index, `.metadata`, by unpickling it, and a pickle
may call any function. This reader lets it name the index's own classes only. torch's way of reading tensors
executes nothing.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

INDEX_FILE = ".metadata"
_INDEX = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("torch", "Size"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    (_INDEX, "ChunkStorageMetadata"),
    (_INDEX, "Metadata"),
    (_INDEX, "MetadataIndex"),
    (_INDEX, "StorageMeta"),
    (_INDEX, "TensorProperties"),
    (_INDEX, "TensorStorageMetadata"),
    (_INDEX, "_MEM_FORMAT_ENCODING"),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{INDEX_FILE} names {module}.{name}, which no checkpoint contains")


class SafeReader(FileSystemReader):
    """torch's reader of a checkpoint folder, for folders that are not trusted."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the checkpoint's index.

        Raises:
            UnpicklingError: the index names more than its own classes, or a file outside the folder.
        """
        with (Path(self.path) / INDEX_FILE).open("rb") as file:
            metadata = _Unpickler(file).load()
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise pickle.UnpicklingError(f"{INDEX_FILE} is not the index of a checkpoint")
        for part in metadata.storage_data.values():
            if Path(part.relative_path).name != part.relative_path:
                raise pickle.UnpicklingError(f"{INDEX_FILE} names a file outside: {part.relative_path}")
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata
