"""Results as pictures: for each operation the speed of everyone relative to PyTorch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks import registry, report
from fastldm.errors import InputError
from fastldm.io import atomic_file

_OURS = ("#1b6ca8", "#5aa9e6", "#0b3c5d", "#8ecae6", "#3d5a80")
_RIVALS = ("#9a9a9a", "#c98b3a", "#6b705c", "#b5838d", "#a5a58d", "#7f5539", "#cb997e")


def draw(files: Iterable[Path], folder: Path | None = None) -> list[Path]:
    """Writes `<name of the file>-<operation>.png` beside each file or in `folder`; the paths.

    Raises InputError for files that are not results of `run`, or a folder that is not there.
    """
    documents = [(path, report.read(path)) for path in files]
    for path, document in documents:
        if not document["command"].startswith("run"):
            raise InputError(f"{path} was made by `{document['command']}`; plots are of `run`")
    if folder is not None and not folder.is_dir():
        raise InputError(f"cannot write to {folder}: there is no such folder")
    written = []
    for path, document in documents:
        timed = [row for row in document["rows"] if row["seconds"] is not None]
        for op in dict.fromkeys(row["op"] for row in timed):
            target = (folder or path.parent) / f"{path.stem}-{op}.png"
            _picture(target, [row for row in timed if row["op"] == op], document)
            written.append(target)
    return written


def relative(rows: Sequence[dict], baseline: str) -> dict[str, dict[str, float]]:
    """{provider: {shape: how many times as fast as the baseline}} of rows that differ in nothing else."""
    times = {(row["provider"], row["shape"]): row["seconds"] for row in rows}
    found: dict[str, dict[str, float]] = {}
    for (provider, shape), seconds in times.items():
        if provider != baseline and (baseline, shape) in times:
            found.setdefault(provider, {})[shape] = times[baseline, shape] / seconds
    return found


def _picture(target: Path, rows: Sequence[dict], document: dict) -> None:
    """A panel for each dtype, layout and direction: groups of bars by shape, a bar for each provider."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    baseline = registry.find(rows[0]["op"]).torch
    panels: dict[tuple[str, ...], list[dict]] = {}
    for row in rows:
        panels.setdefault((row["dtype"], row["layout"], row["direction"]), []).append(row)
    speeds = {key: relative(panel, baseline) for key, panel in panels.items()}
    colours = _colours(rows)
    bars = sum(len(values) for panel in speeds.values() for values in panel.values())
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(8.0 * columns, max(2.5 * lines, 0.17 * bars / columns + 1.2 * lines)), dpi=110)
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True).flatten()
    for axis, (key, panel) in zip(axes, speeds.items()):
        _panel(axis, panel, colours)
        axis.set_title(", ".join(key), fontsize=10)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_locator(LogLocator(base=2, subs=(1.0, 1.5), numticks=12))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}x"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel(f"times as fast as PyTorch ({baseline})", fontsize=8)
        axis.tick_params(labelsize=8, labelbottom=True)
    for axis in axes[len(speeds) :]:
        axis.set_visible(False)
    handles = {label: bar for axis in axes for bar, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, fontsize=8)
    machine, versions = document["machine"], document["versions"]
    where = f"{machine['gpu'] or machine['cpu']}, {rows[0]['threads']} threads, torch {versions['torch']}"
    figure.suptitle(f"{rows[0]['op']}: {where}", fontsize=11)
    figure.set_layout_engine("constrained")
    try:
        with atomic_file(target) as temporary:
            figure.savefig(temporary, format="png")
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror or error}") from error


def _colours(rows: Sequence[dict]) -> dict[str, str]:
    """Blues for ours, other colours for rivals, in order of appearance."""
    found = {}
    for ours, palette in ((True, _OURS), (False, _RIVALS)):
        names = dict.fromkeys(row["provider"] for row in rows if row["ours"] == ours)
        found |= {name: palette[i % len(palette)] for i, name in enumerate(names)}
    return found


def _panel(axis, panel: dict[str, dict[str, float]], colours: dict[str, str]) -> None:
    shapes = list(dict.fromkeys(shape for values in panel.values() for shape in values))
    names = [name for name in colours if name in panel]
    height = 0.8 / max(1, len(names))
    for i, name in enumerate(names):
        offsets = [shapes.index(shape) - 0.4 + (i + 0.5) * height for shape in panel[name]]
        values = list(panel[name].values())
        bars = axis.barh(offsets, [v - 1 for v in values], height, left=1, color=colours[name], label=name)
        axis.bar_label(bars, [f"{v:.2f}" for v in values], fontsize=6, padding=2)
    axis.axvline(1.0, color="#222222", linewidth=0.8)
    axis.set_yticks(range(len(shapes)), shapes)
    axis.set_ylim(len(shapes) - 0.4, -0.6)
    axis.use_sticky_edges = False
    axis.margins(x=0.12)
