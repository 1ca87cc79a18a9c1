"""Write a checkpoint as a Hugging Face folder: for `transformers`, vLLM, or `init_from` of another run.

    python -m dsv2 export runs/quickstart exported/quickstart
    python -m dsv2 export runs/lite/checkpoints/step-00120000 exported/lite --dtype fp32 --shard-gb 10

The layout that the checkpoint was written on does not matter. Parameters are read one after the other, so
memory holds one shard and one parameter, never the model. The folder has a temporary name until it is
complete, so an interrupted export never looks like a whole one.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv2.errors import CheckpointError, UserError

if TYPE_CHECKING:
    import torch

    from dsv2.checkpoint.reader import CheckpointReader
    from dsv2.model.transformer import DeepseekV2

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
GB = 10**9


def export(
    checkpoint: Path,
    out: Path,
    dtype: str = "bf16",
    shard_gb: float = 5.0,
    tokenizer: str | None = None,
    max_position_embeddings: int | None = None,
) -> None:
    """Write the folder `out`.

    Args:
        checkpoint: a step-N folder, or a run's folder for its newest whole checkpoint.
        dtype: bf16 or fp32.
        shard_gb: largest file of weights, in GB of 10^9 bytes; one tensor may be larger.
        tokenizer: a file to use instead of the one that the run's configuration names.
        max_position_embeddings: tokens that config.json promises, instead of those of `with_positions`.

    Raises:
        UserError: there is no whole checkpoint or no tokenizer, the format cannot express the model, or
            `out` already exists or cannot be created.
        CheckpointError: `out` could not be written; partial files are removed.
    """
    from dsv2.checkpoint.files import find_checkpoint
    from dsv2.checkpoint.saved import saved_config, saved_tokenizer
    from dsv2.hf.fields import check_exportable, published_config, with_positions

    if not 0 < shard_gb < math.inf:
        raise UserError(f"--shard-gb {shard_gb}: must be above 0 and finite")
    if out.exists():
        raise UserError(f"out={out}: already exists; remove it, or give another folder")
    path = find_checkpoint(checkpoint)
    run_config = saved_config(path)
    model = with_positions(run_config, max_position_embeddings)
    check_exportable(model)
    pieces = saved_tokenizer(path, run_config, tokenizer)
    # Only now torch is imported, which takes seconds.
    from safetensors import SafetensorError

    from dsv2.checkpoint.reader import CheckpointReader
    from dsv2.hf.names import model_outline
    from dsv2.hf.tokenizer import write_tokenizer

    reader = CheckpointReader(path)
    config = published_config(model, pieces.bos_id, pieces.eos_id, DTYPES[dtype])
    partial = _partial_folder(out)
    try:
        write_tokenizer(pieces, model.max_position_embeddings, partial)
        _write_json(partial / "config.json", config)
        ids = {name: config[name] for name in ("bos_token_id", "eos_token_id")}
        _write_json(partial / "generation_config.json", ids)
        _write_weights(reader, model_outline(model), DTYPES[dtype], int(shard_gb * GB), partial)
        os.rename(partial, out)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{out} could not be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _partial_folder(out: Path) -> Path:
    """Return a new, empty folder, which becomes `out` when it is complete."""
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be created ({error.strerror}); give another folder") from None
    return partial


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def plan_shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Return the names of each shard, in order. Only a shard of one tensor may exceed `limit` bytes."""
    shards: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not shards or filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write_weights(
    reader: "CheckpointReader", outline: "DeepseekV2", dtype_name: str, limit: int, folder: Path
) -> None:
    import torch
    from safetensors.torch import save_file

    from dsv2.hf.names import published_parts

    dtype: torch.dtype = getattr(torch, dtype_name)
    n_parameters = 0
    sizes: dict[str, int] = {}
    for _, tensor, parts in published_parts(outline):
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        for part in parts:
            count = torch.Size(part.shape).numel()
            n_parameters += count if is_parameter else 0
            sizes[part.name] = count * (dtype if is_parameter else tensor.dtype).itemsize
    shards = plan_shards(sizes, limit)
    tensors = published_tensors(reader.tensor, outline, dtype)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard = dict(next(tensors) for _ in names)
        assert list(shard) == names
        save_file(shard, folder / file, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / file)  # save_file lets only the owner read
        weight_map |= dict.fromkeys(names, file)
        print(f"{file}: {len(names)} tensors, {sum(sizes[name] for name in names) / 1e6:.1f} MB", flush=True)
        del shard  # before the next one is gathered
    total = {"total_parameters": n_parameters, "total_size": sum(sizes.values())}
    _write_json(folder / "model.safetensors.index.json", {"metadata": total, "weight_map": weight_map})


def published_tensors(
    read: "Callable[..., torch.Tensor]", outline: "DeepseekV2", dtype: "torch.dtype"
) -> "Iterator[tuple[str, torch.Tensor]]":
    """Yield every published tensor by name, in the outline's order; one tensor is read at a time.

    Parameters are converted to `dtype`; buffers keep theirs.

    Args:
        read: returns a tensor's values, flat, by its name, their number and, for buffers, "buffer".
    """
    from torch import nn

    from dsv2.hf.names import published_parts

    for name, tensor, parts in published_parts(outline):
        is_parameter = isinstance(tensor, nn.Parameter)
        kind = () if is_parameter else ("buffer",)
        whole = read(name, tensor.numel(), *kind).view(tensor.shape)
        for part in parts:
            yield part.name, whole[part.indices].to(dtype if is_parameter else tensor.dtype, copy=True)
        del whole  # before the next one is read
