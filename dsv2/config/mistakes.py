"""Turn a mistake in the configuration into one line that names the field and suggests what would be right."""

import difflib
import re
from collections.abc import Collection

from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import OmegaConfBaseException

from dsv2.config.fields import field_types, options_of, type_text
from dsv2.config.renamed import FIELDS, OPTIONS
from dsv2.errors import UserError

# What Hydra and OmegaConf raise for a mistake in a configuration.
COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException)

SHORT = {  # the planner's short names
    "ep": "parallel.expert_parallel_size",
    "zero": "parallel.zero_stage",
    "micro_batch": "runtime.micro_batch_size",
}


def unknown_key(key: str, override: str | None = None, words: Collection[str] = ()) -> str:
    """Return the message for a key that is no field; it suggests the nearest field.

    Args:
        key: dotted name.
        override: the override as the user wrote it, if it is known.
        words: further keys that the command line takes.
    """
    if key in FIELDS:
        return f"{override or key}: this field is now {FIELDS[key]}"
    names = [*words, *field_types()]
    last = key.split(".")[-1]
    near = [SHORT[key]] if key in SHORT else difflib.get_close_matches(key, names, n=1, cutoff=0.7)
    if not near:  # the right name in the wrong section, such as lr for optim.lr
        leaf = difflib.get_close_matches(last, [n.split(".")[-1] for n in names], n=1, cutoff=0.7)
        near = [n for n in names if leaf and n.split(".")[-1] == leaf[0]]
    hint = f"did you mean {near[0]}?" if near else "train.py --cfg job lists all fields"
    if last in ("steps", "max_steps", "num_steps", "train_steps", "epochs", "max_epochs"):
        hint = "optim.total_tokens sets the length of a run, stop_step stops it earlier"
    return f"{override or key}: there is no such field; {hint}"


def check_command_line(overrides: list[str], read_by_hydra: bool = False) -> None:
    """Refuse sweeps, and overrides such as `model=null` or `+optim=1`, which Hydra answers with a traceback.

    On a command line that is `read_by_hydra`, Hydra's options pass, such as --cfg job.
    """
    asks_hydra = read_by_hydra and any(override.startswith("-") for override in overrides)
    for override in overrides:
        if override in ("-m", "--multirun"):
            raise UserError(f"{override}: {ONE_RUN}")
        name = override.removeprefix("--").split("=")[0]
        if override.startswith("--") and (name == "experiment" or name in field_types()):
            right = f"{name}={override.partition('=')[2] or 'VALUE'}"
            raise UserError(f"{override}: must be written without dashes, such as {right}")
        as_option = override.startswith("-") or ("=" not in override and not override.startswith("~"))
        if as_option and not asks_hydra:
            raise UserError(f"{override}: must be written as name=value, such as experiment=quickstart")
        if override in OPTIONS:
            raise UserError(f"{override}: this option is now {OPTIONS[override]}")
        choice = re.fullmatch(r"[+~]*(model|rope_scaling|data|optim|runtime|logging)=(.*)", override)
        if choice and (override[0] in "+~" or not re.fullmatch(r"(?!null$)[A-Za-z]\w*", choice[2])):
            raise UserError(f"{override}: must name a file of conf/{choice[1]}, without .yaml")
        if re.match(r"\+*model\.rope_scaling(\.\w+)?=(?!null$)", override) and not any(
            re.match(r"rope_scaling=(?!none$)|experiment=", other) for other in overrides
        ):
            raise UserError(f"{override}: plain RoPE has no such field; choose rope_scaling=yarn too")


ONE_RUN = (
    "a job trains one model; start one job per value, such as: "
    "for lr in 1e-3 2e-3; do launch/local.sh name=lr-$lr optim.lr=$lr; done"
)


def explain(error: Exception, overrides: list[str]) -> UserError:
    """Return one message that names the field, for an error that Hydra or OmegaConf raised while composing.

    Args:
        error: the exception.
        overrides: the command line's arguments; the message quotes the wrong one.
    """
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, option = (error.missing_cfg_file or "").partition("/")
        options = options_of(group)
        near = difflib.get_close_matches(option, options, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        return UserError(f"{group}={option}: there is no such option; {hint}one of {', '.join(options)}")
    text = f"{error}\n{error.__cause__ or ''}"
    if "--multirun" in text:
        return UserError(f"{next((o for o in overrides if ',' in o), 'overrides')}: {ONE_RUN}")
    match = re.search(r"Could not override '([^'@]+)", text) or re.search(r"full_key: (\S+)", text)
    if match is None:
        return UserError(" ".join(str(error).split("\nSee https")[0].split()))
    key = re.sub(r"\[\d+\]$", "", match.group(1))  # for an item of a list, name the list's field
    override = next((o for o in overrides if o.lstrip("+~").startswith(f"{key}=")), None)
    if key not in field_types():
        return UserError(unknown_key(key, override))
    reason = str(error.__cause__ or error).splitlines()[0].split("composing config: ")[-1]
    expected = type_text(field_types()[key])
    hint = ""
    if expected == "int" and override and re.fullmatch(r"[\d.]+e\+?\d+", value := override.split("=", 1)[1]):
        hint = f"; write it out: {key}={float(value):_.0f}"
    return UserError(f"{override or key}: {reason} (expected {expected}{hint})")
