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
from matplotlib.text import Text
from PIL import Image

from experiment.conditions import CONDITIONS
from support.artifacts import fingerprint, replacing
from support.run_folder import RunFolder

logger = logging.getLogger(__name__)

NAME_WIDTH = 40  # characters of a persona's name in a line of a title or legend
FONT_SIZE = 13  # points; 12 pixels where a figure is shown at half its size


def save_figure(figure: Figure, path: Path, cache_key: str) -> None:
    """Write a PNG in one step, with its fingerprint, the key, in the metadata.

    Characters that the font lacks are drawn as boxes, and one line a figure warns of them.
    """
    with replacing(path) as file, warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", message="Glyph .* missing")
        figure.savefig(file, format="png", dpi=130, metadata={"Fingerprint": cache_key})
    lacking = {str(warning.message) for warning in caught if str(warning.message).startswith("Glyph ")}
    if lacking:
        logger.warning("%s: the font lacks %d characters, drawn as boxes", path.name, len(lacking))
    for warning in caught:
        if str(warning.message) not in lacking:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def draw_or_remove(path: Path, draw: Callable[[Any], Figure], content: Any) -> None:
    """Draw a figure of the content; without any, remove that of an earlier configuration from the report."""
    if content:
        save_figure(draw(content), path, fingerprint(content))
    else:
        path.unlink(missing_ok=True)


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
    return without_formulas("\n".join(textwrap.wrap(name, NAME_WIDTH) or [""]))


def without_formulas(text: str) -> str:
    """Return a text that a figure shows as it is: `$` begins no formula."""
    return text.replace("$", r"\$")


def signed(value: float, form: str = "+.2f") -> str:
    """Return a number with a minus of full width; one that is shown as 0 has no minus."""
    return f"{round(value, 2) + 0.0:{form}}".replace("-", "−")


def look_of(condition: str) -> dict[str, str]:
    """Return a condition's colour and marker as arguments of a plot."""
    return {"color": CONDITIONS[condition].colour, "marker": CONDITIONS[condition].marker}


def titled(figure: Figure, title: str) -> Figure:
    """Return a figure with its title, and all its letters in a size that can be read at half the figure's."""
    figure.suptitle(title)
    for panel in figure.axes:
        panel.tick_params(labelsize=FONT_SIZE)
    for text in figure.findobj(Text):
        text.set_fontsize(FONT_SIZE)
    return figure


def persona_panels(personas: Sequence[str], xlabel: str, ylabel: str) -> tuple[Figure, dict[str, Axes]]:
    """Return a figure and persona -> its panel, three in a row, all with the same axes."""
    n_columns = min(3, len(personas))
    n_rows = math.ceil(len(personas) / n_columns)
    figure = Figure(figsize=(4.4 * n_columns + 2.4, 3.8 * n_rows + 1), layout="constrained")
    panels = figure.subplots(n_rows, n_columns, squeeze=False, sharex=True, sharey=True)
    for panel in panels.flatten()[len(personas) :]:
        panel.remove()
    for panel in panels[:, 0]:
        panel.set_ylabel(ylabel)
    figure.supxlabel(xlabel)
    by_persona = dict(zip(personas, panels.flatten(), strict=False))
    for persona, panel in by_persona.items():
        panel.tick_params(labelbottom=True)
        panel.set_title(as_label(persona))
        hide_frame(panel)
    return figure, by_persona


def persona_columns(
    personas: Sequence[str], size: tuple[float, float], ylabels: Sequence[str], **shared: Any
) -> tuple[Figure, dict[str, list[Axes]]]:
    """Return a figure and persona -> its two panels, one above the other.

    size: width of a column and height of the figure. shared: axes, as arguments of `subplots`.
    """
    figure = Figure(figsize=(size[0] * len(personas) + 2.4, size[1]), layout="constrained")
    panels = figure.subplots(2, len(personas), squeeze=False, **shared)
    for panel, label in zip(panels[:, 0], ylabels, strict=True):
        panel.set_ylabel(label)
    for panel, persona in zip(panels[0], personas, strict=True):
        panel.set_title(as_label(persona))
    for panel in panels.flatten():
        hide_frame(panel)
    return figure, dict(zip(personas, map(list, panels.T), strict=True))


def hide_frame(panel: Axes) -> None:
    """Leave out the lines above and to the right of a panel."""
    panel.spines[["top", "right"]].set_visible(False)


def add_legend(figure: Figure, drawn: Mapping[str, Artist], others: Sequence[Artist] = ()) -> Any:
    """Put a legend beside the panels: conditions in the order of their table, then other artists."""
    shown = {CONDITIONS[name].label: drawn[name] for name in CONDITIONS if name in drawn}
    shown |= {artist.get_label(): artist for artist in others}
    return figure.legend(shown.values(), shown.keys(), loc="outside right upper", fontsize=FONT_SIZE)


def number_plainly(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers, the fewer the wider it is; call it when all is drawn."""
    low, high = sorted(axis.get_view_interval())
    subs = (1, 1.5, 2, 3, 5, 7) if high / low < 15 else (1, 2, 5) if high / low < 200 else (1,)
    few = high / low < 2  # in which hardly one of them lies
    axis.set_major_locator(ticker.MaxNLocator(5) if few else ticker.LogLocator(base=10, subs=subs))
    axis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())
