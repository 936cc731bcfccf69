"""Models of a Grafana dashboard's JSON, as far as ours uses it.

They are our own, of the panel types that are used, with the fields of Grafana 11's schema (schemaVersion 39).
What is not in them is refused, since Grafana would silently ignore it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic.alias_generators import to_camel

UNITS = {"none", "short", "s", "bytes", "Bps", "percentunit", "suffix: days"}
NAMED_COLORS = {"green", "red", "orange", "blue", "yellow", "purple"}
Color = Annotated[str, Field(pattern=r"^(#[0-9a-f]{6}|" + "|".join(NAMED_COLORS) + r"|rgba\(.*\))$")]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, alias_generator=to_camel)


class DataSource(Strict):
    type: Literal["prometheus"]
    uid: Literal["${datasource}"]


class GridPos(Strict):
    x: Annotated[int, Field(ge=0, lt=24)]
    y: Annotated[int, Field(ge=0)]
    w: Annotated[int, Field(ge=1, le=24)]
    h: Annotated[int, Field(ge=1)]


class Target(Strict):
    ref_id: Annotated[str, Field(pattern=r"^[A-Z]$")]
    datasource: DataSource
    editor_mode: Literal["code"]
    expr: Annotated[str, Field(min_length=1)]
    legend_format: str
    range: bool
    instant: bool = False
    format: Literal["time_series", "table"] = "time_series"
    interval: Annotated[str, Field(pattern=r"^\d+[smh]$")] | None = None


class ColorMode(Strict):
    mode: Literal["thresholds", "palette-classic", "fixed"]
    fixed_color: Color | None = None


class Step(Strict):
    color: Color
    value: float | int | None


class Thresholds(Strict):
    mode: Literal["absolute"]
    steps: Annotated[list[Step], Field(min_length=1)]

    @field_validator("steps")
    @classmethod
    def _rising(cls, steps: list[Step]) -> list[Step]:
        assert steps[0].value is None, "the first step has no value"
        later = [step.value for step in steps[1:]]
        assert None not in later
        assert later == sorted(later, key=lambda value: value or 0)
        return steps


class Mapped(Strict):
    text: str
    color: Color
    index: int


class Mapping(Strict):
    type: Literal["value"]
    options: dict[str, Mapped]


class Hide(Strict):
    legend: bool
    tooltip: bool
    viz: bool


class Stacking(Strict):
    group: str
    mode: Literal["none", "normal"]


class Linear(Strict):
    type: Literal["linear"]


class Off(Strict):
    mode: Literal["off"]


class TimeSeriesCustom(Strict):
    axis_border_show: bool
    axis_centered_zero: bool
    axis_color_mode: Literal["text"]
    axis_label: str
    axis_placement: Literal["auto"]
    bar_alignment: Literal[-1, 0, 1]
    draw_style: Literal["line", "bars"]
    fill_opacity: Annotated[int, Field(ge=0, le=100)]
    gradient_mode: Literal["none"]
    hide_from: Hide
    insert_nulls: bool
    line_interpolation: Literal["linear", "stepAfter"]
    line_width: Annotated[int, Field(ge=0, le=10)]
    point_size: int
    scale_distribution: Linear
    show_points: Literal["never", "auto", "always"]
    span_nulls: bool
    stacking: Stacking
    thresholds_style: Off


class TimelineCustom(Strict):
    fill_opacity: Annotated[int, Field(ge=0, le=100)]
    hide_from: Hide
    insert_nulls: bool
    line_width: int
    span_nulls: bool


class Cell(Strict):
    type: Literal["auto"]


class TableCustom(Strict):
    align: Literal["auto", "left", "right", "center"]
    cell_options: Cell
    filterable: bool
    inspect: bool


class Defaults(Strict):
    color: ColorMode
    mappings: list[Mapping]
    thresholds: Thresholds
    unit: str = "none"
    decimals: int | None = None
    min: float | int | None = None

    @field_validator("unit")
    @classmethod
    def _known(cls, unit: str) -> str:
        assert unit in UNITS, f"{unit} is no unit of Grafana's that is used here"
        return unit


class TimeSeriesDefaults(Defaults):
    custom: TimeSeriesCustom


class TimelineDefaults(Defaults):
    custom: TimelineCustom


class TableDefaults(Defaults):
    custom: TableCustom


class ByName(Strict):
    id: Literal["byName"]
    options: str


class ColorProperty(Strict):
    id: Literal["color"]
    value: ColorMode


class UnitProperty(Strict):
    id: Literal["unit"]
    value: Literal["s", "Bps", "bytes"]


class DecimalsProperty(Strict):
    id: Literal["decimals"]
    value: int


class Override(Strict):
    matcher: ByName
    properties: list[Annotated[ColorProperty | UnitProperty | DecimalsProperty, Field(discriminator="id")]]


class Reduce(Strict):
    calcs: list[Literal["lastNotNull"]]
    fields: str
    values: bool


class Legend(Strict):
    display_mode: Literal["list", "table"]
    placement: Literal["bottom", "right"]
    show_legend: bool
    calcs: list[str] = []


class Tooltip(Strict):
    mode: Literal["single", "multi", "none"]
    sort: Literal["none", "asc", "desc"]


class StatOptions(Strict):
    color_mode: Literal["background", "value", "none"]
    graph_mode: Literal["none", "area"]
    justify_mode: Literal["center", "auto"]
    orientation: Literal["auto"]
    reduce_options: Reduce
    text_mode: Literal["value", "auto"]
    wide_layout: bool


class TimeSeriesOptions(Strict):
    legend: Legend
    tooltip: Tooltip


class TimelineOptions(Strict):
    align_value: Literal["left", "center", "right"]
    legend: Legend
    merge_values: bool
    row_height: Annotated[float, Field(gt=0, le=1)]
    show_value: Literal["auto", "always", "never"]
    tooltip: Tooltip


class BarGaugeOptions(Strict):
    display_mode: Literal["basic", "gradient", "lcd"]
    max_viz_height: int
    min_viz_height: int
    min_viz_width: int
    name_placement: Literal["auto", "left", "top"]
    orientation: Literal["horizontal", "vertical", "auto"]
    reduce_options: Reduce
    show_unfilled: bool
    sizing: Literal["auto", "manual"]
    value_mode: Literal["color", "text", "hidden"]


class Footer(Strict):
    count_rows: bool
    enable_pagination: bool
    fields: str
    reducer: list[str]
    show: bool


class SortBy(Strict):
    desc: bool
    display_name: str


class TableOptions(Strict):
    cell_height: Literal["sm", "md", "lg"]
    footer: Footer
    show_header: bool
    sort_by: list[SortBy]


class JoinOptions(Strict):
    by_field: str
    mode: Literal["inner", "outer"]


class Join(Strict):
    id: Literal["joinByField"]
    options: JoinOptions


class OrganizeOptions(Strict):
    exclude_by_name: dict[str, bool]
    include_by_name: dict[str, bool]
    index_by_name: dict[str, int]
    rename_by_name: dict[str, str]


class Organize(Strict):
    id: Literal["organize"]
    options: OrganizeOptions


class StatConfig(Strict):
    defaults: Defaults
    overrides: list[Override]


class TimeSeriesConfig(Strict):
    defaults: TimeSeriesDefaults
    overrides: list[Override]


class TimelineConfig(Strict):
    defaults: TimelineDefaults
    overrides: list[Override]


class TableConfig(Strict):
    defaults: TableDefaults
    overrides: list[Override]


class Panel(Strict):
    id: Annotated[int, Field(ge=1)]
    title: Annotated[str, Field(min_length=1)]
    description: Annotated[str, Field(min_length=10)]
    datasource: DataSource
    grid_pos: GridPos
    targets: Annotated[list[Target], Field(min_length=1)]


class Stat(Panel):
    type: Literal["stat"]
    field_config: StatConfig
    options: StatOptions


class TimeSeries(Panel):
    type: Literal["timeseries"]
    field_config: TimeSeriesConfig
    options: TimeSeriesOptions


class Timeline(Panel):
    type: Literal["state-timeline"]
    field_config: TimelineConfig
    options: TimelineOptions


class BarGauge(Panel):
    type: Literal["bargauge"]
    field_config: StatConfig
    options: BarGaugeOptions


class Table(Panel):
    type: Literal["table"]
    field_config: TableConfig
    options: TableOptions
    transformations: list[Annotated[Join | Organize, Field(discriminator="id")]]


class Row(Strict):
    id: Annotated[int, Field(ge=1)]
    type: Literal["row"]
    title: Annotated[str, Field(min_length=1)]
    collapsed: Literal[False]
    panels: Annotated[list[Any], Field(max_length=0)]
    grid_pos: GridPos


class Offered(Strict):
    selected: bool | None = None
    text: list[str] = []
    value: list[str] = []


class AskedFor(Strict):
    qry_type: Literal[1]
    query: str
    ref_id: Literal["PrometheusVariableQueryEditor-VariableQuery"]


class Variable(Strict):
    name: Annotated[str, Field(pattern=r"^\w+$")]
    label: str
    current: Offered
    hide: Literal[0]
    include_all: bool
    multi: bool
    options: list[Any]
    refresh: Literal[1, 2]
    regex: str
    skip_url_sync: bool


class DataSourceVariable(Variable):
    type: Literal["datasource"]
    query: Literal["prometheus"]


class QueryVariable(Variable):
    type: Literal["query"]
    datasource: DataSource
    definition: str
    query: AskedFor
    sort: Literal[1]


class Templating(Strict):
    list: list[Annotated[DataSourceVariable | QueryVariable, Field(discriminator="type")]]


class Range(Strict):
    from_: Annotated[str, Field(alias="from", pattern=r"^now-\d+[mhd]$")]
    to: Literal["now"]


class Dashboard(Strict):
    annotations: dict[str, Any]
    description: str
    editable: bool
    fiscal_year_start_month: Literal[0]
    graph_tooltip: Literal[0, 1, 2]
    id: None
    links: list[Any]
    panels: list[
        Annotated[Stat | TimeSeries | Timeline | BarGauge | Table | Row, Field(discriminator="type")]
    ]
    refresh: str
    schema_version: Annotated[int, Field(ge=39)]
    tags: list[str]
    templating: Templating
    time: Range
    timepicker: dict[str, Any]
    timezone: Literal["browser"]
    title: Literal["wg-agent"]
    uid: Annotated[str, Field(pattern=r"^[\w-]{1,40}$")]
    version: int
    week_start: str
