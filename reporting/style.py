"""Keep what all figures share: how they are saved, their names and axes, and the look of each condition.

PNG files carry the fingerprint of their data, so that a figure is drawn again only when these change.
"""

import logging
import math
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import ticker
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from PIL import Image

from experiment.conditions import CONDITIONS
from support.artifacts import replacing
from support.run_folder import RunFolder

logger = logging.getLogger(__name__)

NAME_WIDTH = 40  # characters of a persona's name in a line of a title or legend


def save_figure(figure: Figure, path: Path, fingerprint: str) -> None:
    """Write a PNG in one step, with its fingerprint in the metadata.

    Characters that the font lacks are drawn as boxes, and one line a figure warns of them.
    """
    with replacing(path) as file, warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", message="Glyph .* missing")
        figure.savefig(file, format="png", dpi=130, metadata={"Fingerprint": fingerprint})
    lacking = {str(warning.message) for warning in caught if str(warning.message).startswith("Glyph ")}
    if lacking:
        logger.warning("%s: the font lacks %d characters, drawn as boxes", path.name, len(lacking))
    for warning in caught:
        if str(warning.message) not in lacking:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def figure_fingerprint(path: Path) -> str | None:
    """Return the fingerprint that `save_figure` wrote, or None if there is no readable figure."""
    try:
        with Image.open(path) as image:
            image.load()
            return image.info.get("Fingerprint")
    except (OSError, SyntaxError, ValueError):  # what Pillow raises for damaged PNG files
        return None


def draw_once(
    folder: RunFolder, name: str, cache_key: str, draw: Callable[..., Figure], *arguments: Any
) -> None:
    """Draw a figure of a run, unless the folder has it with this key."""
    path = folder.path / name
    if folder.fresh or figure_fingerprint(path) != cache_key:
        folder.lock()
        save_figure(draw(*arguments), path, cache_key)


def as_label(name: str) -> str:
    """Return a name as text of a figure: in lines of 40 characters, and `$` begins no formula."""
    return "\n".join(textwrap.wrap(name, NAME_WIDTH) or [""]).replace("$", r"\$")


def label_of(condition: str) -> str:
    """Return what figures call a condition."""
    return CONDITIONS[condition].label


def look_of(condition: str) -> dict[str, str]:
    """Return a condition's colour and marker as arguments of a plot."""
    return {"color": CONDITIONS[condition].colour, "marker": CONDITIONS[condition].marker}


def persona_panels(n: int, size: tuple[float, float] = (4.4, 3.6)) -> tuple[Figure, list[Axes], list[Axes]]:
    """Return a figure, n panels of the same axes, three in a row, and the leftmost of each row."""
    n_columns = min(3, n)
    n_rows = math.ceil(n / n_columns)
    figure = Figure(figsize=(size[0] * n_columns + 1.6, size[1] * n_rows + 0.6), layout="constrained")
    panels = figure.subplots(n_rows, n_columns, squeeze=False, sharex=True, sharey=True)
    for panel in panels.flatten()[n:]:
        panel.remove()
    for panel in panels.flatten()[:n]:
        panel.tick_params(labelbottom=True)
        hide_frame(panel)
    return figure, list(panels.flatten()[:n]), list(panels[:, 0])


def hide_frame(panel: Axes) -> None:
    """Leave out the lines above and to the right of a panel."""
    panel.spines[["top", "right"]].set_visible(False)


def add_legend(figure: Figure, drawn: Mapping[str, Artist], others: Sequence[Artist] = ()) -> Any:
    """Put a legend beside the panels: conditions in the order of their table, then other artists."""
    names = [name for name in CONDITIONS if name in drawn]
    handles = [*(drawn[name] for name in names), *others]
    labels = [*map(label_of, names), *(artist.get_label() for artist in others)]
    return figure.legend(handles, labels, loc="outside right upper", fontsize=8)


def number_plainly(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers, the fewer the wider it is; call it when all is drawn."""
    low, high = sorted(axis.get_view_interval())
    subs = (1, 1.5, 2, 3, 5, 7) if high / low < 15 else (1, 2, 5) if high / low < 200 else (1,)
    axis.set_major_locator(ticker.LogLocator(base=10, subs=subs))
    axis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())
