"""The figures: each is a function of numbers by label, and returns a matplotlib figure.

They do not use pyplot, which has global state and chooses a backend.
"""

import io
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minillm.config.schema import ConfigError
from minillm.evaluation.result import Evaluation
from minillm.evaluation.text import BUCKETS
from minillm.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVES = {
    "loss": "loss (its meaning differs by stage)",
    "kl/reverse": "reverse KL on rollouts, nats/token",
    "reward/mean": "reward log p/q, nats/token",
    "completions/mean_length": "length of rollouts, tokens",
    "entropy": "student entropy, nats",
    "clip_fraction": "share of tokens clipped",
    "grad_norm": "gradient norm",
    "loss/pt": "loss on plain text",
    "validation/loss": "validation loss",
    "validation/rouge_l": "validation ROUGE-L",
    "tokens_per_second": "training tokens per second",
}


def learning_curves(metrics: Mapping[str, Sequence[dict[str, Any]]]) -> "Figure | None":
    """Every metric of CURVES that a run has logged, against the optimiser step; lines break between stages."""
    shown = [key for key in CURVES if any(key in row for rows in metrics.values() for row in rows)]
    if not shown:
        return None
    columns = min(3, len(shown))
    lines = -(-len(shown) // columns)
    figure = new_figure(4.2 * columns, 2.6 * lines + 0.4)
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True).flatten()
    for panel, key in zip(panels, shown, strict=False):
        for color, (label, rows) in enumerate(metrics.items()):
            for i, stage in enumerate(dict.fromkeys(row["stage"] for row in rows)):
                found = [(row["step"], row[key]) for row in rows if row["stage"] == stage and key in row]
                if found:
                    steps, values = [s for s, _ in found], [v for _, v in found]
                    style = {"color": f"C{color}", "label": plain(label) if i == 0 else None}
                    if len(values) > 20:
                        panel.plot(steps, values, alpha=0.25, linewidth=1, **{**style, "label": None})
                        values = smooth(values)
                    panel.plot(steps, values, marker="." if len(values) < 20 else None, **style)
        for rows in metrics.values():
            for before, after in pairwise(rows):
                if before["stage"] != after["stage"]:
                    panel.axvline((before["step"] + after["step"]) / 2, color="0.7", linewidth=1, linestyle=":")
        panel.set_title(CURVES[key], fontsize=9)
    for panel in panels[len(shown) :]:
        panel.remove()
    staged = any(len({row["stage"] for row in rows}) > 1 for rows in metrics.values())
    figure.supxlabel("optimiser step" + (" (dotted: next stage)" if staged else ""), fontsize=9)
    names = [(f"C{i}", label) for i, label in enumerate(metrics)]
    if len(names) > 1:
        from matplotlib.lines import Line2D

        handles = [Line2D([], [], color=color, label=plain(label)) for color, label in names]
        figure.legend(handles=handles, loc="outside upper center", ncols=min(4, len(names)), fontsize=9)
    return figure


def exposure(results: Mapping[str, Evaluation]) -> "Figure | None":
    """ExAccErr by length, with one standard error; a flat curve means that the error does not grow with length."""
    found = {label: result.exposure_bias for label, result in results.items() if result.exposure_bias}
    if not found:
        return None
    figure = new_figure(6.5, 4)
    panel = figure.subplots()
    for label, bias in found.items():
        (line,) = panel.plot(bias.length, bias.exaccerr, label=plain(label))
        error = [0.0 if math.isnan(e) else e for e in bias.standard_error]
        low, high = ([v + sign * e for v, e in zip(bias.exaccerr, error, strict=True)] for sign in (-1, 1))
        panel.fill_between(bias.length, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
    panel.axhline(0, color="0.6", linewidth=1)
    panel.set(
        xlabel="response length l, tokens",
        ylabel=f"{' or '.join(dict.fromkeys(bias.name for bias in found.values()))}(l), %",
    )
    panel.legend(fontsize=9)
    return figure


def reliability(results: Mapping[str, Evaluation], what: str = "next_token") -> "Figure | None":
    """Accuracy against confidence; below the diagonal a model is overconfident."""
    found = {label: part for label, result in results.items() if (part := result.calibration.get(what))}
    if not found:
        return None
    figure = new_figure(6.5, 5)
    panel, counts = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    panel.plot([0, 1], [0, 1], color="0.6", linewidth=1)
    for i, (label, part) in enumerate(found.items()):
        bins = [b for b in part.bins if b.count]
        name = f"{plain(label)}: ECE {part.ece:.3f}"
        panel.plot([b.confidence for b in bins], [b.accuracy for b in bins], marker="o", markersize=4, label=name)
        width = 0.8 / len(part.bins) / len(found)
        left = [b.lower + 0.1 / len(part.bins) + (i + 0.5) * width for b in part.bins]
        counts.bar(left, [b.count / part.count for b in part.bins], width=width)
    panel.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    counts.set(xlabel="confidence", ylabel="share")
    panel.legend(fontsize=9)
    return figure


def buckets(results: Mapping[str, Evaluation], score: str = "rouge_l/sampled") -> "Figure | None":
    """ROUGE-L by the length of the reference, with one standard error."""
    parts = {label: result.by_reference_length for label, result in results.items()}
    names = [name for name in BUCKETS if any(score in part.get(name, {}) for part in parts.values())]
    if not names:
        return None
    figure = new_figure(6.5, 3.6)
    panel = figure.subplots()
    width = 0.8 / len(results)
    counts = [0] * len(names)
    for i, (label, part) in enumerate(parts.items()):
        found = {j: mean for j, name in enumerate(names) if (mean := part.get(name, {}).get(score))}
        places = [j + (i - (len(results) - 1) / 2) * width for j in found]
        errors = [0.0 if math.isnan(mean.standard_error) else mean.standard_error for mean in found.values()]
        panel.bar(
            places, [m.mean for m in found.values()], width, yerr=errors, label=plain(label), error_kw={"linewidth": 1}
        )
        for j, mean in found.items():
            counts[j] = counts[j] or mean.prompts  # of the first evaluation that has any
    ticks = [f"{name} tokens\n({n} prompt{'s' * (n != 1)})" for name, n in zip(names, counts, strict=True)]
    panel.set_xticks(range(len(names)), ticks)
    panel.set(ylabel="ROUGE-L")
    panel.legend(fontsize=9)
    return figure


def curves(name: str, at: Sequence[float], panels: Mapping[str, Sequence[tuple[float, float]]]) -> "Figure":
    """A panel each of means and standard errors against one quantity."""
    figure = new_figure(4.2 * len(panels), 3)
    for panel, (title, points) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        means, errors = zip(*points, strict=True)
        panel.errorbar(at, means, yerr=[0.0 if math.isnan(e) else e for e in errors], marker="o", capsize=3)
        panel.set(xlabel=name, title=title)
    return figure


def plain(label: str) -> str:
    """A name that matplotlib takes as it is: between dollar signs it would read a formula."""
    return label.replace("$", r"\$")


def smooth(values: Sequence[float], window: int = 9) -> list[float]:
    """Centred running mean; at the ends it is over fewer values."""
    half = window // 2
    parts = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def new_figure(width: float, height: float) -> "Figure":
    """A figure of that size in inches. Raises ConfigError if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError('figures need matplotlib: pip install "minillm-kernels[report]"') from error
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: "Figure", path: Path) -> Path:
    """Write a PNG, without the upper and right edges of its panels."""
    for panel in figure.axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
    image = io.BytesIO()
    figure.savefig(image, dpi=130)
    write_atomically(path, image.getvalue())
    return path
