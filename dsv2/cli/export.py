"""Write a checkpoint as a Hugging Face folder: for `transformers`, vLLM, or `init_from` of another run.

    python -m dsv2 export runs/quickstart exported/quickstart
    python -m dsv2 export runs/lite/checkpoints/step-00120000 exported/lite --dtype fp32 --shard-gb 10

docs/hugging_face.md explains what the folder holds.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from dsv2.cli.base import ExitCode, Verb, add_checkpoint


class Export(Verb):
    name = "export"
    help = "write a checkpoint as a Hugging Face folder"
    text = __doc__

    def arguments(self, parser: ArgumentParser) -> None:
        from dsv2.hf.export import DTYPES

        add = parser.add_argument
        add_checkpoint(parser)
        add("out", type=Path, help="The folder to write; it must not exist.")
        add("--dtype", choices=list(DTYPES), default="bf16", help="Data type of the weights (default bf16).")
        size = "Size of the largest file of weights, in GB of 10^9 bytes (default 5)."
        add("--shard-gb", type=float, default=5.0, metavar="GB", help=size)
        tokenizer = "The run's tokenizer, if it is no longer where the run found it."
        add("--tokenizer", metavar="FILE", help=tokenizer)
        positions = (
            "Context that config.json promises, tokens (default: that of the training sequences or YaRN)."
        )
        add("--max-position-embeddings", type=int, metavar="N", help=positions)

    def run(self, options: Namespace) -> int:
        from dsv2.hf.export import export

        export(**vars(options))
        print(f"wrote {options.out}")
        return ExitCode.ok
