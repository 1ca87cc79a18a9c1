"""Create the project's dashboard in W&B: a saved view with the sections of dsv2/monitoring/panels.py.

`python -m dsv2 dashboard` calls this. Each call creates a new view. With --spec the view is only written as
JSON, which needs neither network nor account.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import first_line
from dsv2.errors import UserError
from dsv2.monitoring.panels import SECTIONS, Chart

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace  # takes seconds to import

NAME = "dsv2"


def build(entity: str, project: str) -> "Workspace":
    """Return the view without sending it."""
    import wandb_workspaces.workspaces as ws

    return ws.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=[
            ws.Section(
                name=section.title,
                panels=[_panel(chart) for chart in section.charts],
                is_open=True,
                layout_settings=ws.SectionLayoutSettings(columns=3, rows=-(-len(section.charts) // 3)),
            )
            for section in SECTIONS
        ],
    )


def _panel(chart: Chart) -> Any:
    import wandb_workspaces.reports.v2 as wr

    title = f"{chart.group}: {chart.title}" if chart.group else chart.title
    if chart.is_map:
        return wr.MediaBrowser(title=title, media_keys=list(chart.names), num_columns=1, gallery_axis="run")
    if chart.is_family:
        pattern = f"^{chart.names[0].replace('*', r'[0-9]+')}$"
        return wr.LinePlot(title=title, x="Step", metric_regex=pattern, title_y=chart.unit)
    return wr.LinePlot(title=title, x="Step", y=list(chart.names), title_y=chart.unit)


def spec_of(workspace: "Workspace") -> dict[str, Any]:
    """Return the view's definition as W&B receives it."""
    return json.loads(workspace._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))


def write_spec(file: Path, project: str) -> None:
    """Write the view as JSON.

    Raises:
        UserError: FILE cannot be written.
    """
    text = json.dumps(spec_of(build("", project)), indent=1) + "\n"
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--spec {file}: cannot be written ({error.strerror})") from None


def create(entity: str | None, project: str) -> str:
    """Save the view and return its address.

    Raises:
        UserError: nobody is logged in, or W&B refuses or cannot be reached.
    """
    import wandb

    offline = "or write the view with --spec FILE, which needs no account"
    wandb.setup(settings=wandb.Settings(silent=True))  # or W&B prints its own lines
    try:
        logged_in = wandb.login(prompt=False, verify=True)
    except Exception as error:
        raise UserError(
            f"W&B: the login failed ({first_line(error)}); see `wandb login`, {offline}"
        ) from None
    if not logged_in:
        raise UserError(f"W&B: not logged in; run `wandb login` first, {offline}")
    try:
        workspace = build(entity or wandb.Api().default_entity or "", project)
        workspace.save()
        return workspace.url
    except Exception as error:
        where = f"--entity {entity} --project {project}" if entity else f"--project {project}"
        raise UserError(f"{where}: W&B did not save the view ({first_line(error)})") from None
    finally:
        wandb.teardown()
