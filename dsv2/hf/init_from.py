"""The weights of a Hugging Face folder as the start of a run.

The folder is checked before any process group exists: config.json and the headers of the files are enough
to find every mistake. Each rank then reads only the rows that it holds.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from data.reading import is_plain_name, read_json, reading
from dsv2.config.schema import ModelConfig
from dsv2.errors import UserError
from dsv2.hf.fields import compare_config, read_config
from dsv2.hf.names import model_outline, published_parts
from dsv2.model.transformer import DeepseekV2

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = ("F32", "BF16", "F16")


class HFWeights:
    """A folder whose tensors fit the run's model, name by name and shape by shape.

    Args:
        folder: config.json beside model.safetensors, or beside an index and its shards.
        config: the run's model.

    Raises:
        UserError: the folder, a file or a tensor is missing, damaged, or not this model's.
        Unreadable: the file system refuses to read a file.
    """

    def __init__(self, folder: Path, config: ModelConfig):
        self.folder = folder
        compare_config(read_config(folder), config, folder)
        self._file_of: dict[str, str] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for file in self._files():
            for name, shape in self._header(file):
                self._file_of[name] = file
                shapes[name] = shape
        self._stacked = any(name.endswith(".mlp.experts.gate_up_proj") for name in shapes)
        self._check(shapes, config)

    def _files(self) -> list[str]:
        try:
            files = set(read_json(self.folder / INDEX)["weight_map"].values())
        except FileNotFoundError:
            return [SINGLE]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"init_from={self.folder}: {INDEX} cannot be read ({error!r})") from None
        if outside := [file for file in files if not is_plain_name(file)]:
            raise UserError(f"init_from={self.folder}: {INDEX} names a file outside: {outside[0]}")
        return sorted(files)

    def _header(self, file: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        try:
            with reading(self.folder / file):
                (self.folder / file).open("rb").close()  # safetensors does not say why it could not read
            with safe_open(self.folder / file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (it is no dict)
                    tensor = opened.get_slice(name)
                    if tensor.get_dtype() not in DTYPES:
                        raise UserError(
                            f"init_from={self.folder}: {name} in {file} is of type {tensor.get_dtype()}, "
                            f"not one of {', '.join(DTYPES)}"
                        )
                    yield name, tuple(tensor.get_shape())
        except FileNotFoundError:
            raise UserError(f"init_from={self.folder}: {file} is missing") from None
        except (OSError, SafetensorError) as error:
            raise UserError(f"init_from={self.folder}: {file} cannot be read ({error})") from None

    def _check(self, shapes: dict[str, tuple[int, ...]], config: ModelConfig) -> None:
        wanted = {
            part.name: part.shape
            for _, _, parts in published_parts(model_outline(config), self._stacked)
            for part in parts
        }
        for name, shape in wanted.items():
            if name not in shapes:
                raise UserError(
                    f"init_from={self.folder}: no file has {name}, of shape {list(shape)} in this run's model"
                )
            if shapes[name] != shape:
                raise UserError(
                    f"init_from={self.folder}: {name} in {self._file_of[name]} has the shape "
                    f"{list(shapes[name])}, in this run's model {list(shape)}"
                )
        if extra := sorted(shapes.keys() - wanted.keys()):
            raise UserError(
                f"init_from={self.folder}: {extra[0]} in {self._file_of[extra[0]]}, of shape "
                f"{list(shapes[extra[0]])}, is not part of this run's model"
            )

    @torch.no_grad()
    def fill(self, model: DeepseekV2) -> None:
        """Fill every parameter and buffer of this rank's share of the model, in its own dtype."""
        with ExitStack() as stack:
            opened: dict[str, Any] = {}
            for _, tensor, parts in published_parts(model, self._stacked):
                for part in parts:
                    file = self._file_of[part.name]
                    if file not in opened:
                        opened[file] = stack.enter_context(safe_open(self.folder / file, "pt"))
                    tensor[part.indices].copy_(opened[file].get_slice(part.name)[part.rows])
