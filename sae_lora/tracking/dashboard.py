"""A W&B workspace for a sweep: curves, gap closed over each factor, and the best runs."""

from collections.abc import Sequence
from typing import Any

from sae_lora.common.errors import UserError
from sae_lora.common.secrets import redacted
from sae_lora.config.compose import PROJECT
from sae_lora.config.serialize import load
from sae_lora.records.factors import FACTORS, differing, values_of
from sae_lora.records.folder import RunFolder
from sae_lora.tracking.wandb_run import obstacle
from sae_lora.tracking.wandb_view import WandbView

_CLOSED = "result.gap_closed"
_SHOWN = [FACTORS[name] for name in ("rank", "width", "l0", "block")]
"""Factors on the axes of gap closed."""


def specification(folders: Sequence[RunFolder]) -> str:
    """The workspace as JSON, as it would be sent to the server. No server is asked.

    Raises:
        UserError: If wandb-workspaces is not installed, or the runs belong to several projects.
    """
    view = _workspace(folders)._to_model()
    return view.model_dump_json(by_alias=True, exclude_none=True, indent=2)


def save(folders: Sequence[RunFolder]) -> str:
    """Create the workspace and return its address.

    Raises:
        UserError: As for `specification`; also if the server cannot be reached, or refuses.
    """
    workspace = _workspace(folders)
    if (reason := obstacle(probe=True)) is not None:
        raise UserError(f"cannot create the dashboard: {reason}")
    import wandb

    try:
        workspace.entity = workspace.entity or wandb.Api().default_entity
        workspace.save()
    except Exception as error:  # wandb raises errors of many types
        raise UserError(f"cannot create the dashboard: {redacted(str(error))}") from error
    return workspace.url


def _workspace(folders: Sequence[RunFolder]) -> Any:
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as workspaces
        from wandb_workspaces import expr
        from wandb_workspaces.reports.v2.interface import ParallelCoordinatesPlotColumn
    except ImportError as error:
        raise UserError("a dashboard needs `pip install wandb-workspaces`") from error

    configs = [load(folder.config.read_text()) for folder in folders]
    projects = {(config.tracking.entity, config.tracking.project or PROJECT) for config in configs}
    if len(projects) > 1:
        names = ", ".join(sorted(f"{entity or '(default)'}/{project}" for entity, project in projects))
        raise UserError(f"a dashboard shows one W&B project, but these runs are in several: {names}")
    ((entity, project),) = projects

    varying = differing([values_of(folder.read_config(), {}) for folder in folders])
    # A line for each rank is a mean, which is right only over seeds.
    by_rank: dict[str, Any] = {}
    if set(varying) <= {"rank"}:
        by_rank = {"groupby": panels.Config("lora.rank"), "groupby_aggfunc": "mean"}
        by_rank |= {"groupby_rangefunc": "minmax"}

    def curves(title: str, metric: str, axis: str) -> Any:
        return panels.LinePlot(title=title, x=axis, y=[metric], **by_rank)

    def section(name: str, *contents: Any) -> Any:
        return workspaces.Section(name=name, is_open=True, panels=list(contents))

    closed = panels.SummaryMetric(_CLOSED)
    keys = {factor.tag: panels.Config(factor.keys[0]) for factor in _SHOWN}
    scatters = [
        panels.ScatterPlot(
            title=f"gap closed against {factor.tag}",
            x=keys[factor.tag],
            y=closed,
            log_x=factor.is_logarithmic,
        )
        for factor in _SHOWN
    ]
    columns = [
        ParallelCoordinatesPlotColumn(metric, display_name=name)
        for name, metric in (keys | {"gap closed": closed}).items()
    ]
    return workspaces.Workspace(
        entity=entity or "",
        project=project,
        name=f"sae_lora {configs[0].sweep}",
        sections=[
            section(
                "CE gap",
                curves("CE gap over tokens", "ce_gap", "tokens"),
                curves("CE gap over seconds of training", "ce_gap", "train_seconds"),
                curves("KL over tokens", "kl", "tokens"),
            ),
            section(
                "Gap closed by factor",
                *scatters,
                panels.ParallelCoordinatesPlot(title="all factors", columns=columns),
            ),
            section(
                "Best runs",
                panels.BarPlot(title="gap closed", metrics=[closed], max_bars_to_show=20),
                panels.RunComparer(diff_only="split"),
            ),
        ],
        # The table of runs beside the panels, with the best run first.
        runset_settings=workspaces.RunsetSettings(
            filters=[expr.Metric("Group") == WandbView(folders[0], configs[0]).group],
            order=[expr.Ordering(expr.Summary(_CLOSED), ascending=False)],
            pinned_columns=[
                *(f"summary:result.{name}" for name in ("gap_closed", "ce_gap", "kl")),
                *(f"config:{factor.keys[0]}" for factor in _SHOWN),
            ],
        ),
    )
