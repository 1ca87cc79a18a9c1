"""W&B's mode and project: the configuration's, else those of W&B's own environment variables."""

from collections.abc import Mapping

from dsv2.config.schema import LoggingConfig, WandbMode

PROJECT = "dsv2"  # if neither the configuration nor WANDB_PROJECT names one
_MODES = {"offline": WandbMode.offline, "dryrun": WandbMode.offline, "disabled": WandbMode.disabled}


def wandb_mode(logging: LoggingConfig, environment: Mapping[str, str]) -> WandbMode:
    """Return `logging.wandb`; if that is `auto`, WANDB_MODE may turn W&B off or keep it offline."""
    if logging.wandb is not WandbMode.auto:
        return logging.wandb
    return _MODES.get(environment.get("WANDB_MODE", "").lower(), WandbMode.auto)


def wandb_project(project: str | None, environment: Mapping[str, str]) -> str:
    """Return the project; without one, the project that WANDB_PROJECT names, or this project's default."""
    return project or environment.get("WANDB_PROJECT") or PROJECT
