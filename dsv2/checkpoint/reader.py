"""The weights of a checkpoint in one process, without DeepSpeed: for generation and export."""

from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from data.errors import first_line
from dsv2.checkpoint.files import check, damaged_file
from dsv2.checkpoint.safe_reader import SafeReader
from dsv2.config.compose import from_plain
from dsv2.config.schema import Config
from dsv2.errors import UserError


class CheckpointReader:
    """A whole checkpoint, read one tensor at a time.

    Raises:
        UserError: `path` is no whole checkpoint, or a tensor is missing, has another size or is unreadable.
    """

    config: Config  # of the run that wrote the checkpoint

    def __init__(self, path: Path):
        self.path = path
        content = check(path)
        if problem := damaged_file(path, content["files"], content.get("crc32", {})):
            raise UserError(f"checkpoint {path}: {problem}; use an older one")
        self.config = from_plain(content["config"])
        self._reader = SafeReader(path)
        try:
            self._metadata = self._reader.read_metadata()
        except Exception as error:  # whatever unpickling strange bytes may raise
            raise UserError(f"checkpoint {path}: cannot be read ({error}); use an older one") from None
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    def tensor(self, name: str, numel: int, kind: str = "fp32") -> Tensor:
        """Return a whole flattened tensor: a parameter with all experts, an optimizer state or a buffer.

        Args:
            name: of the parameter or buffer.
            numel: elements that the tensor must have.
            kind: "fp32" for a parameter, "buffer", or the name of an optimizer state. Parameters and states
                are fp32; a buffer has the dtype it was saved in.
        """
        key = f"{kind}/{name}"
        saved = self._metadata.state_dict_metadata.get(key)
        size = tuple(getattr(saved, "size", ()))
        if size != (numel,):
            content = f"{size[0]} numbers" if size else "nothing"
            raise UserError(f"checkpoint {self.path}: {content} under {key} instead of {numel} numbers")
        assert isinstance(saved, TensorStorageMetadata), "only a tensor has a size"
        flat = torch.empty(numel, dtype=saved.properties.dtype if kind == "buffer" else torch.float32)
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner({key: flat}, self._metadata, is_coordinator=True)
        try:
            self._reader.read_data(planner.create_local_plan(), planner).wait()
        except Exception as error:  # whatever unpickling damaged bytes may raise
            raise UserError(
                f"checkpoint {self.path}: {key} cannot be read ({first_line(error)}); use an older one"
            ) from error
        return flat
