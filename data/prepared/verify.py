"""The content of a prepared folder against its checksums.

A start compares sizes and the small files: a folder may hold terabytes. `PackedTokens` compares the checksum
of a record batch before it hands out the batch's first token. `verify` reads the whole folder.
"""

import hashlib
import io
import zlib
from pathlib import Path

import numpy as np

from data.errors import UserError, first_line
from data.prepared.manifest import AGAIN, TOKEN_BYTES, Manifest, load_manifest
from data.prepared.shards import verified_tokens
from data.reading import reading


def check_small_files(folder: Path, manifest: Manifest) -> None:
    """Refuse a tokenizer or token_bytes.npy that the folder was not prepared with."""
    check_tokenizer(folder, manifest)
    read_token_bytes(folder, manifest)


def check_tokenizer(folder: Path, manifest: Manifest) -> None:
    """Refuse a tokenizer that the folder was not prepared with."""
    file = folder / manifest.tokenizer_file
    with reading(file):
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    if sha256 != manifest.tokenizer_sha256:
        raise UserError(
            f"data.path={folder}: {file.name} is not the tokenizer that the folder was prepared with; "
            "prepare it again"
        )


def read_token_bytes(folder: Path, manifest: Manifest) -> np.ndarray:
    """Return int32 [vocab_size]: the UTF-8 bytes that each id stands for.

    Raises:
        UserError: the file holds something else. Nothing in it is executed.
    """
    path = folder / TOKEN_BYTES
    with reading(path):
        content = path.read_bytes()
    try:
        sizes = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except Exception as error:  # whatever strange bytes may raise
        raise UserError(
            f"data.path={folder}: {TOKEN_BYTES} cannot be read ({first_line(error)}); {AGAIN}"
        ) from None
    if sizes.dtype != np.int32 or sizes.shape != (manifest.vocab_size,):
        found = f"{sizes.dtype} {list(sizes.shape)} instead of int32 [{manifest.vocab_size}]"
        raise UserError(f"data.path={folder}: {TOKEN_BYTES} holds {found}; {AGAIN}")
    if manifest.token_bytes_crc32 not in (None, zlib.crc32(sizes.data)):
        raise UserError(
            f"data.path={folder}: {TOKEN_BYTES} does not hold what was written (its checksum differs); "
            f"{AGAIN}"
        )
    return sizes


def verify(folder: Path) -> Manifest:
    """Read everything in a prepared folder, and return its manifest.

    Raises:
        UserError: something is missing, or is not what was written; the message names the file.
    """
    manifest = load_manifest(folder)
    check_small_files(folder, manifest)
    for shard in (*manifest.train.shards, *manifest.validation.shards):
        verified_tokens(folder, shard)
    return manifest
