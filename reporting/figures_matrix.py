"""Draw several runs as matrices of source and target: `matrix.png` of `tools.compare_runs`.

Of a cell, which is a persona of a run, are read: `source`, `target`, `persona`, `verdict`, `is_validated`,
the intervals `recovery` and `beyond_lexical` (None if not known), and `missing`: why the latter is None.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle

from reporting.style import FONT_SIZE, as_label, without_formulas
from reporting.tables import percent

CELL = (2.1, 1.3)  # inches; holds four lines of CELL_WIDTH characters
CELL_WIDTH, MODEL_WIDTH, TITLE_WIDTH = 18, 17, 30  # characters of a line; of a title at least
BAR_WIDTH = 0.15  # inches
MOST_COLUMNS = 6  # cells side by side, so that letters are large enough where the figure is shown
NO_LEXICAL = "no lexical control"
# Light, so that black letters can be read on each of them; below 0 it is another colour.
COLOURS = LinearSegmentedColormap.from_list("share", ["#ffffff", "#7fc7a3"]).with_extremes(
    bad="#dcdcdc", under="#f2b8a0", over="#7fc7a3"
)
Cell = Mapping[str, Any]


def matrix_axes(cells: Sequence[Cell]) -> tuple[list[str], list[str]]:
    """Return sources and targets, both in one order, so that a model onto itself lies on the diagonal."""
    sides = [[cell[side] for cell in cells] for side in ("source", "target")]
    models = dict.fromkeys([*sides[0], *sides[1]])
    return [name for name in models if name in sides[0]], [name for name in models if name in sides[1]]


def matrix_figure(matrices: Mapping[str, Sequence[Cell]]) -> Figure:
    """Draw each matrix, by its title, as a panel a persona: sources in rows, targets in columns.

    The colour of a cell is the recovery beyond the lexical control. A cell without that control is hatched, a
    cell for which it is not known is grey, one without a run is empty.
    """
    grids = [_grid(cells) for cells in matrices.values()]
    sizes = [
        (CELL[0] * n_columns * width + 2.6, (CELL[1] * height + 0.8) * n_rows + 0.7)
        for n_rows, n_columns, height, width in grids
    ]
    figure = Figure(
        figsize=(max(width for width, _ in sizes), sum(height for _, height in sizes)), layout="constrained"
    )
    ratios = [height for _, height in sizes]
    places = figure.subfigures(len(matrices), 1, squeeze=False, height_ratios=ratios)[:, 0]
    for place, (title, cells), grid in zip(places, matrices.items(), grids, strict=True):
        place.suptitle(as_title(title, figure.get_figwidth()), fontsize=FONT_SIZE)
        _draw_matrix(place, cells, grid)
    return figure


def as_title(title: str, width: float) -> str:
    """Return a title in lines that a figure of this width in inches holds."""
    return _in_lines(title, max(TITLE_WIDTH, int(8 * width)))  # about 8 characters an inch


def _grid(cells: Sequence[Cell]) -> tuple[int, int, int, int]:
    """Return rows and columns of panels, and of a panel."""
    n_personas = len({cell["persona"] for cell in cells})
    sources, targets = matrix_axes(cells)
    n_columns = min(n_personas, max(1, MOST_COLUMNS // len(targets)))
    return math.ceil(n_personas / n_columns), n_columns, len(sources), len(targets)


def _draw_matrix(place: SubFigure, cells: Sequence[Cell], grid: tuple[int, int, int, int]) -> None:
    personas = list(dict.fromkeys(cell["persona"] for cell in cells))
    panels = place.subplots(*grid[:2], squeeze=False, sharey=True)
    for panel in panels.flatten()[len(personas) :]:
        panel.remove()
    shown = panels.flatten()[: len(personas)]
    for panel, persona in zip(shown, personas, strict=True):
        own = {(cell["source"], cell["target"]): cell for cell in cells if cell["persona"] == persona}
        image = _draw_persona(panel, own, *matrix_axes(cells))
        panel.set_title(as_label(persona), fontsize=FONT_SIZE)
    place.supxlabel("target", fontsize=FONT_SIZE)
    place.supylabel("source", fontsize=FONT_SIZE)
    aspect = CELL[1] * grid[0] * grid[2] / BAR_WIDTH
    bar = place.colorbar(image, ax=list(shown), extend="both", extendfrac=0.05, aspect=aspect, pad=0.01)
    bar.set_label("recovery beyond\nthe lexical control", fontsize=FONT_SIZE)
    bar.ax.yaxis.set_major_formatter("{x:.0%}")
    bar.ax.tick_params(labelsize=FONT_SIZE)


def _draw_persona(
    panel: Axes, cells: Mapping[tuple[str, str], Cell], sources: Sequence[str], targets: Sequence[str]
) -> AxesImage:
    values = [[_colour_value(cells.get((source, target))) for target in targets] for source in sources]
    image = panel.imshow(values, cmap=COLOURS, vmin=0, vmax=1, aspect="auto")
    for row, source in enumerate(sources):
        for column, target in enumerate(targets):
            cell = cells.get((source, target))
            if cell is None or cell["missing"] == NO_LEXICAL:
                look = {"facecolor": "white"} if cell is None else {"fill": False, "hatch": "//"}
                corner = column - 0.5, row - 0.5
                panel.add_patch(Rectangle(corner, 1, 1, edgecolor="#b0b0b0", linewidth=0, **look))
            text = "no run" if cell is None else _cell_text(cell)
            panel.text(column, row, text, ha="center", va="center", fontsize=FONT_SIZE)
    for line in range(1, max(len(sources), len(targets))):
        panel.axhline(line - 0.5, color="white", linewidth=3)
        panel.axvline(line - 0.5, color="white", linewidth=3)
    for axis, names in ((panel.xaxis, targets), (panel.yaxis, sources)):
        axis.set_ticks(
            range(len(names)), [_in_lines(name, MODEL_WIDTH) for name in names], fontsize=FONT_SIZE
        )
    panel.tick_params(length=0)
    return image


def _colour_value(cell: Cell | None) -> float:
    return math.nan if cell is None or not cell["beyond_lexical"] else cell["beyond_lexical"]["estimate"]


def _cell_text(cell: Cell) -> str:
    star = "" if cell["is_validated"] else " *"
    recovery = percent(cell["recovery"]) + star if cell["recovery"] else "no recovery"
    parts = [cell["verdict"], recovery, *([NO_LEXICAL] if cell["missing"] == NO_LEXICAL else [])]
    return "\n".join(map(_in_lines, parts))


def _in_lines(text: str, width: int = CELL_WIDTH) -> str:
    return without_formulas("\n".join(textwrap.wrap(text, width)))
