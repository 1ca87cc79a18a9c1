"""Continue prompts with the model of a checkpoint, in one process on the CPU or one GPU.

    python -m dsv2 generate runs/quickstart --prompt "def main(" [--prompt ...] [--temperature 0.8]

With one prompt, each token of the answer is printed at once. Several prompts are decoded together, and the
answers are printed at the end. The answer to a prompt does not depend on the other prompts.
"""

from argparse import ArgumentParser, Namespace

from dsv2.cli.base import ExitCode, Verb, add_checkpoint


class Generate(Verb):
    name = "generate"
    help = "continue prompts with a checkpoint's model"
    text = __doc__

    def arguments(self, parser: ArgumentParser) -> None:
        add = parser.add_argument
        add_checkpoint(parser)
        add("--prompt", action="append", required=True, help="Text to continue; may be given several times.")
        add(
            "--max-tokens",
            type=int,
            default=64,
            metavar="N",
            help="At most this many new tokens (default 64).",
        )
        temperature = "Divides the logits before a token is drawn; 0 takes the likeliest token (default 0)."
        add("--temperature", type=float, default=0.0, metavar="T", help=temperature)
        top_p = "Draw only from the likeliest tokens whose probabilities sum to P (default 1: from all)."
        add("--top-p", type=float, default=1.0, metavar="P", help=top_p)
        add("--seed", type=int, default=0, metavar="N", help="Seed of each prompt's draws (default 0).")
        tokenizer = "A .model or tokenizer.json to use instead of the tokenizer of the run's data."
        add("--tokenizer", metavar="FILE", help=tokenizer)
        device = "Where to compute; auto takes a GPU if there is one (default auto)."
        add("--device", choices=["auto", "cpu", "cuda"], default="auto", help=device)
        precision = "Data type of weights and activations (default fp32)."
        add("--precision", choices=["fp32", "bf16"], default="fp32", help=precision)

    def run(self, options: Namespace) -> int:
        from dsv2.inference.answers import answer

        answer(options)
        return ExitCode.ok
