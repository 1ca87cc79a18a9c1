"""Generate text from a checkpoint, in one process on the CPU or one GPU.

    python -m dsv2 generate runs/quickstart --prompt "def main(" [--prompt ...] [--temperature 0.8]

The checkpoint is a step-N folder, or a run's folder for its newest whole checkpoint. The answer to a single
prompt is printed token by token. Several prompts are decoded together, and their answers printed at the end.
An answer does not depend on the other prompts. No token is dropped, whatever the balance recipe (section
2.2.4).
"""

import math
import sys
from argparse import Namespace
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dsv2.errors import UserError

GIB = 2**30

if TYPE_CHECKING:  # slow imports are inside functions, so that --help and mistakes are answered at once
    from data.tokenizers.base import Tokenizer
    from dsv2.config.schema import Config


def check_arguments(arguments: Namespace) -> None:
    """Refuse options out of range or without effect, before anything is loaded."""
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
    """Return the ids of each prompt, after the token that begins a document.

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
    """Return the text without an incomplete character at its end, whose bytes have not all been decoded."""
    return text.rstrip("\N{REPLACEMENT CHARACTER}")


def print_answers(texts: list[str], steps: Iterator[list[int | None]], tokenizer: "Tokenizer") -> None:
    """Print each prompt with its answer: a single one token by token, several under headings at the end."""
    answers: list[list[int]] = [[] for _ in texts]
    alone = len(texts) == 1
    shown = ""
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


def _require_memory(config: "Config", precision: str, free: int) -> None:
    """Refuse a model whose weights need more memory than is free. The kernel would kill other processes."""
    from dsv2.model.sizes import count_parameters

    needed = count_parameters(config.model).total * (2 if precision == "bf16" else 4)
    if needed > free:
        smaller = "use a machine with more memory" if precision == "bf16" else "try --precision bf16"
        raise UserError(
            f"--precision {precision}: the weights need {needed / GIB:.1f} GiB of memory, and "
            f"{free / GIB:.1f} GiB are free; {smaller}"
        )


def answer(arguments: Namespace) -> None:
    """Print the model's answer to each prompt. The fields are the options of `python -m dsv2 generate`.

    Raises:
        UserError: an option, the checkpoint or the tokenizer is wrong.
    """
    check_arguments(arguments)
    from dsv2.checkpoint.files import find_checkpoint
    from dsv2.checkpoint.saved import saved_config, saved_tokenizer

    path = find_checkpoint(arguments.checkpoint)
    config = saved_config(path)
    tokenizer = saved_tokenizer(path, config, arguments.tokenizer)
    prompts = encode_prompts(arguments.prompt, tokenizer, config, arguments.max_tokens)
    # Only now torch is imported, which takes seconds.
    import torch

    from dsv2.inference.model import load_model
    from dsv2.inference.sampling import Sampling, generate
    from dsv2.parallel.host_memory import free_host_memory

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no GPU here; use --device cpu")
    on_gpu = arguments.device == "cuda" or (arguments.device == "auto" and torch.cuda.is_available())
    _require_memory(
        config, arguments.precision, torch.cuda.mem_get_info()[0] if on_gpu else free_host_memory()
    )
    dtype = torch.bfloat16 if arguments.precision == "bf16" else torch.float32
    print(f"{path}, {arguments.precision}, {'GPU' if on_gpu else 'CPU'}", file=sys.stderr)
    model = load_model(path, dtype, "cuda" if on_gpu else "cpu")
    sampling = Sampling(arguments.temperature, arguments.top_p, arguments.seed)
    steps = generate(
        model,
        prompts,
        max_tokens=arguments.max_tokens,
        sampling=sampling,
        eos_id=tokenizer.eos_id,
        vocab_size=tokenizer.vocab_size,
    )
    print_answers(arguments.prompt, steps, tokenizer)
