"""Load a tokenizer file of the kind that its suffix says."""

from pathlib import Path

from data.errors import UserError
from data.reading import is_file
from data.tokenizers import sentencepiece_model, tokenizer_json
from data.tokenizers.base import Tokenizer

LOADERS = {".model": sentencepiece_model.load, ".json": tokenizer_json.load}


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a sentencepiece `.model` or a `tokenizer.json`; a UserError says why it cannot be loaded."""
    path = Path(path)
    if path.suffix not in LOADERS:
        raise UserError(f"tokenizer: {path} is neither a sentencepiece .model nor a tokenizer.json")
    if not is_file(path):
        raise UserError(f"tokenizer: there is no file {path}")
    return LOADERS[path.suffix](path)
