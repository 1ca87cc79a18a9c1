"""Text from a checkpoint, in one process on CPU or one GPU.

    python -m dsv2 generate runs/quickstart --prompt "def main(" [--prompt ...] [--temperature 0.8]

The checkpoint is a step-N folder, or a run's folder, of which the newest whole one is taken. One prompt
is answered as the tokens come; several are decoded together and printed at the end. What a prompt gets
does not depend on the others. Nothing is dropped, whatever the balance recipe (section 2.2.4).
"""

import math
import sys
from argparse import Namespace
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dsv2.errors import UserError

if TYPE_CHECKING:  # what takes seconds to import waits: --help and mistakes are answered without it
    from data.tokenizers.base import Tokenizer
    from dsv2.config.schema import Config


def check_arguments(arguments: Namespace) -> None:
    """Refuse values that mean nothing, before anything is loaded."""
    if "" in arguments.prompt:
        raise UserError("--prompt '': must not be empty; give the text to continue")
    if arguments.max_tokens < 1:
        raise UserError(f"--max-tokens {arguments.max_tokens}: must be at least 1")
    if not 0 <= arguments.temperature < math.inf:
        raise UserError(f"--temperature {arguments.temperature}: must be 0 (the likeliest token) or above")
    if not 0 < arguments.top_p <= 1:
        raise UserError(f"--top-p {arguments.top_p}: must be above 0 and at most 1")
    if arguments.top_p < 1 and arguments.temperature == 0:
        raise UserError(f"--top-p {arguments.top_p}: changes nothing at --temperature 0; give one above 0")
    if not 0 <= arguments.seed < 2**63:
        raise UserError(f"--seed {arguments.seed}: must be from 0 to 2^63 - 1")


def encode_prompts(
    texts: list[str], tokenizer: "Tokenizer", config: "Config", max_tokens: int
) -> list[list[int]]:
    """Their ids behind the beginning of a document.

    Raises:
        UserError: prompt and answer do not fit into the model's context.
    """
    context = config.model.max_position_embeddings
    prompts = [[tokenizer.bos_id, *ids] for ids in tokenizer.encode_batch(texts)]
    longest = max(map(len, prompts))
    if longest >= context:
        raise UserError(
            f"--prompt: {longest} tokens with the document's beginning; must be fewer than the model's "
            f"max_position_embeddings={context}"
        )
    if longest + max_tokens > context:
        raise UserError(
            f"--max-tokens {max_tokens}: must be at most {context - longest}, what the longest prompt leaves "
            f"of the model's max_position_embeddings={context}"
        )
    return prompts


def settled(text: str) -> str:
    """The text without a character at its end whose bytes have not all come."""
    return text.rstrip("\N{REPLACEMENT CHARACTER}")


def print_answers(texts: list[str], steps: Iterator[list[int | None]], tokenizer: "Tokenizer") -> None:
    """Each prompt with what follows it: a single one as it comes, several under headings at the end."""
    answers: list[list[int]] = [[] for _ in texts]
    alone, shown = len(texts) == 1, ""
    if alone:
        print(texts[0], end="", flush=True)
    for ids in steps:
        for answer, token in zip(answers, ids, strict=True):
            if token is not None:
                answer.append(token)
        if alone:
            text = settled(tokenizer.decode(answers[0]))
            print(text[len(shown) :], end="", flush=True)
            shown = text
    if alone:
        print(tokenizer.decode(answers[0])[len(shown) :])
        return
    for number, (text, answer) in enumerate(zip(texts, answers, strict=True), start=1):
        print(f"--- prompt {number}\n{text}{tokenizer.decode(answer)}")


def answer(arguments: Namespace) -> None:
    """Print what the model says to each prompt. The fields are the options of `python -m dsv2 generate`.

    Raises:
        UserError: an option, the checkpoint or the tokenizer is wrong.
    """
    check_arguments(arguments)
    import torch

    from dsv2.checkpoint.files import find_checkpoint
    from dsv2.checkpoint.reader import CheckpointReader, run_tokenizer
    from dsv2.inference.model import load_model
    from dsv2.inference.sampling import Sampling, generate

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no GPU here; use --device cpu")
    path = find_checkpoint(arguments.checkpoint)
    config = CheckpointReader(path).config
    tokenizer = run_tokenizer(config, arguments.tokenizer)
    prompts = encode_prompts(arguments.prompt, tokenizer, config, arguments.max_tokens)
    on_gpu = arguments.device == "cuda" or (arguments.device == "auto" and torch.cuda.is_available())
    dtype = torch.bfloat16 if arguments.precision == "bf16" else torch.float32
    print(f"{path}, {arguments.precision}, {'GPU' if on_gpu else 'CPU'}", file=sys.stderr)
    model = load_model(path, dtype, "cuda" if on_gpu else "cpu")
    sampling = Sampling(arguments.temperature, arguments.top_p, arguments.seed)
    steps = generate(model, prompts, arguments.max_tokens, sampling, tokenizer.eos_id, tokenizer.vocab_size)
    print_answers(arguments.prompt, steps, tokenizer)
