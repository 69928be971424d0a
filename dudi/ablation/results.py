"""What a grid's results say, as numbers and as tables of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from dudi.ablation.grid import START, Cell, Grid, Measured
from dudi.ablation.statistics import Values, difference, estimate, values_of
from dudi.ablation.tuning import SELECTED_BY
from dudi.evaluation.bootstrap import MEAN
from dudi.evaluation.figures import FIGURES
from dudi.intervals import Mean, or_none, spelt
from dudi.report_figures import DASH, POINTS
from dudi.verbalize import LANGUAGE_NAMES

COMPARED = ("nll_per_char", "kl_to_teacher", "chrf++", "fidelity", "accuracy")
CHOSEN = (*COMPARED, "length_ratio", "ece_tokens", "ece_choices")
BASES = ("dudi", "sft")
POINTS_SHOWN = (0.25, 0.5, 1.0)  # of the seconds of the slowest method's run


class Table(NamedTuple):
    """Text, as all reports draw it."""

    setting: str
    title: str
    note: str
    head: list[str]
    lines: list[list[str]]


class Results:
    """The done cells of a grid; `values` are by setting, method, domain, figure and language."""

    def __init__(self, grid: Grid, done: Mapping[Cell, dict[str, Any]]) -> None:
        self.grid, self.done = grid, done

    def title(self, name: str) -> str:
        return "*start*" if name == START else self.grid.method(name).title

    def cells(self, setting: str, name: str) -> dict[int, dict[str, Any]]:
        """By seed."""
        found = {
            c.seed: r for c, r in self.done.items() if (c.setting, c.method) == (setting, name)
        }
        return dict(sorted(found.items()))

    def methods(self, setting: str) -> list[str]:
        """With a result, the start first; methods of `like` are not repeated."""
        return [name for name in (START, *self.grid.known) if self.cells(setting, name)]

    def domains(self, setting: str) -> list[str]:
        """Those that any cell was tested in."""
        there = {d for c, r in self.done.items() if c.setting == setting for d in r["domains"]}
        return [name for name in self.grid.domains if name in there]

    @cached_property
    def _values(self) -> dict[tuple[str, str, str, str], dict[str, Values]]:
        return {}

    def values(self, setting: str, name: str, domain: str, figure: str) -> dict[str, Values]:
        """By language and in the mean; empty where it was not measured."""
        key = (setting, name, domain, figure)
        if key not in self._values:
            rows = {
                seed: result["domains"][domain]["rows"]
                for seed, result in self.cells(setting, name).items()
                if domain in result["domains"]
            }
            self._values[key] = values_of(figure, rows) if rows else {}
        return self._values[key]

    def figures(self, setting: str, domain: str, wanted: Sequence[str]) -> list[str]:
        names = self.methods(setting)
        return [f for f in wanted if any(self.values(setting, m, domain, f) for m in names)]

    def base(self, setting: str, name: str) -> tuple[str, str] | None:
        """Where the results of a method to compare with are: here, or where this is like."""
        for place in (setting, self.grid.settings[setting].like):
            if place is not None and self.cells(place, name):
                return place, name
        return None

    def mean_of(self, setting: str, name: str, key: str) -> float:
        own = self.cells(setting, name).values()
        return sum(r[key] if key in r else r["cell"][key] for r in own) / len(own)

    def curve(self, setting: str, name: str) -> POINTS:
        """Seconds and validation NLL, means over seeds, from the start on."""
        own = list(self.cells(setting, name).values())
        if not own:
            return [], []
        begin = self.base(setting, START)
        starts = [] if begin is None else list(self.cells(*begin).values())
        first = [(0.0, _mean([r["curve"][0][SELECTED_BY] for r in starts]))] if starts else []
        points = zip(*(r["curve"] for r in own), strict=True)
        later = [
            (_mean([p["seconds"] for p in same]), _mean([p[SELECTED_BY] for p in same]))
            for same in points
        ]
        xs, ys = zip(*(first + later), strict=True)
        return list(xs), list(ys)

    def numbers(self, setting: str) -> dict[str, Any]:
        """JSON-safe."""
        return {
            name: {
                "steps": self.mean_of(setting, name, "steps"),
                "seconds": self.mean_of(setting, name, "seconds"),
                "wall_seconds": self.mean_of(setting, name, "wall_seconds"),
                "curve": self.curve(setting, name),
                "domains": {
                    domain: {
                        figure: {
                            language: _told(own)
                            for language, own in self.values(setting, name, domain, figure).items()
                        }
                        for figure in self.figures(setting, domain, list(FIGURES))
                    }
                    for domain in self.domains(setting)
                },
                "differences": {
                    base: self._differences(setting, name, base) for base in BASES if base != name
                },
            }
            for name in self.methods(setting)
        }

    def _differences(self, setting: str, name: str, base: str) -> dict[str, Any]:
        return {
            domain: {
                figure: _safe(found)
                for figure in self.figures(setting, domain, COMPARED)
                if (found := self.compared(setting, name, base, domain, figure)) is not None
            }
            for domain in self.domains(setting)
        }

    def compared(
        self, setting: str, name: str, base: str, domain: str, figure: str, language: str = MEAN
    ) -> Mean | None:
        """Method - base, paired by seed and row; None where one was not measured."""
        found = self.base(setting, base)
        if found is None or found == (setting, name):
            return None
        new = self.values(setting, name, domain, figure).get(language)
        old = self.values(*found, domain, figure).get(language)
        return None if new is None or old is None else difference(new, old)

    @property
    def seconds(self) -> str:
        """Which ones (cell.py)."""
        there = {own["device"] for own in self.environments()}
        return "seconds of one CPU core" if there == {"cpu"} else "seconds"

    def environments(self) -> list[dict[str, Any]]:
        """The machines that the cells ran on, each once."""
        found: list[dict[str, Any]] = []
        for result in self.done.values():
            if result["environment"] not in found:
                found.append(result["environment"])
        return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _told(values: Values) -> dict[str, Any]:
    return {**_safe(estimate(values)), "by_seed": values.by_seed}


def _safe(found: Mean) -> dict[str, Any]:
    """For JSON."""
    return {
        "value": or_none(found.value),
        "half": or_none(found.half),
        "seeds": len(found.runs),
    }


# ---- tables --------------------------------------------------------------------------------------


def marked(found: Mean | None, digits: int, better: str) -> str:
    """Bold where the interval leaves 0 out, with what that means."""
    text = spelt(found, digits, signed=True)
    if found is None or not found.clear or not better:
        return text
    good = (found.value < 0) == (better == "lower")
    return f"**{text}** {'better' if good else 'worse'}"


def tables(results: Results, measured: Mapping[str, Measured]) -> list[Table]:
    """All tables of a report."""
    found = [table] if (table := _methods_table(results, measured)) else []
    for name, setting in results.grid.settings.items():
        if not results.methods(name):
            continue
        found.append(_means(results, name, setting.title))
        found += [_differences(results, name, setting.title, base) for base in BASES]
        found += _by_language(results, name, setting.title)
        found += _equal_seconds(results, name, setting.title)
    return [table for table in found if table.lines]


def _methods_table(results: Results, measured: Mapping[str, Measured]) -> Table:
    used = {cell.method for cell in results.done}
    lines = []
    for name in (m for m in results.grid.known if m in used):
        own = results.grid.method(name)
        rate = measured.get(results.grid.rate_of(name))
        told = rate_told(results.grid, rate)
        paper = f"[{own.paper}](https://arxiv.org/abs/{own.paper})" if own.paper else DASH
        lines.append([own.title, paper, told, " ".join(own.about.split())])
    note = "Each is a configuration of one trainer."
    if results.grid.tune is not None:
        rates = ", ".join(f"{rate:g}" for rate in results.grid.tune.learning_rates)
        note += (
            f" The learning rate is the best of {rates} by NLL a character on the validation "
            f"split, with seed {results.grid.tune.seed}; ablations of DuDi try its rate and those "
            "next to it."
        )
        if results.grid.tune.beyond:
            note += (
                " Where the best is at an end of those tried, further ones are tried, up to "
                f"{results.grid.tune.beyond}."
            )
    return Table("Methods", "What was compared", note, ["", "arXiv", "rate", "what"], lines)


def rate_told(grid: Grid, rate: Measured | None) -> str:
    """A learning rate; of a sweep, whether a better one may lie beyond its ends."""
    if rate is None:
        return str(grid.training.get("learning_rate"))
    return f"{rate.learning_rate:g}" + (f" (the {rate.end} tried)" if rate.end else "")


def _columns(results: Results, setting: str, wanted: Sequence[str]) -> list[tuple[str, str]]:
    return [
        (domain, figure)
        for domain in results.domains(setting)
        for figure in results.figures(setting, domain, wanted)
    ]


def _head(columns: Sequence[tuple[str, str]]) -> list[str]:
    arrows = {"lower": " ↓", "higher": " ↑", "": ""}
    return [f"{d}: {FIGURES[f].title}{arrows[FIGURES[f].better]}" for d, f in columns]


def _means(results: Results, setting: str, title: str) -> Table:
    columns = _columns(results, setting, CHOSEN)
    lines = []
    for name in results.methods(setting):
        cells = []
        for domain, figure in columns:
            own = results.values(setting, name, domain, figure).get(MEAN)
            cells.append(spelt(own and estimate(own), FIGURES[figure].digits))
        steps, seconds = (results.mean_of(setting, name, key) for key in ("steps", "seconds"))
        seeds = len(results.cells(setting, name))
        lines.append([results.title(name), str(seeds), f"{steps:.0f}", f"{seconds:.0f}", *cells])
    note = (
        "Means over seeds of the unweighted mean over a domain's languages, with 95 % "
        f"intervals; {results.seconds} in training, without what a teacher wrote beforehand."
    )
    head = ["", "seeds", "steps", "seconds", *_head(columns)]
    return Table(title, "Means", note, head, lines)


def _differences(results: Results, setting: str, title: str, base: str) -> Table:
    columns = _columns(results, setting, COMPARED)
    found = results.base(setting, base)
    lines = []
    for name in results.methods(setting) if found else []:
        if found == (setting, name):
            continue
        cells = [
            marked(
                results.compared(setting, name, base, domain, figure),
                FIGURES[figure].digits,
                FIGURES[figure].better,
            )
            for domain, figure in columns
        ]
        lines.append([results.title(name), *cells])
    note = (
        f"Each method less {results.title(base)}, paired by seed and test row. Bold: the 95 % "
        "interval leaves 0 out; intervals are not corrected for how many there are."
    )
    if found is not None and found[0] != setting:
        note += f" {results.title(base)} is that of “{results.grid.settings[found[0]].title}”."
    return Table(title, f"Differences to {results.title(base)}", note, ["", *_head(columns)], lines)


def _by_language(results: Results, setting: str, title: str) -> list[Table]:
    """NLL a character of each method less SFT's, in the first domain."""
    domain, figure = next(iter(_columns(results, setting, ("nll_per_char",))), ("", ""))
    if not domain:
        return []
    names = results.methods(setting)
    languages = [k for k in results.values(setting, names[-1], domain, figure) if k != MEAN]
    lines = []
    for name in names:
        own = [results.compared(setting, name, "sft", domain, figure, code) for code in languages]
        if any(found is not None for found in own):
            digits, better = FIGURES[figure].digits, FIGURES[figure].better
            lines.append([results.title(name), *(marked(found, digits, better) for found in own)])
    head = ["", *(LANGUAGE_NAMES.get(code, code) for code in languages)]
    note = (
        f"{FIGURES[figure].title} in {domain}: each method less SFT, by language of the response."
    )
    return [Table(title, "By language", note, head, lines)]


def _equal_seconds(results: Results, setting: str, title: str) -> list[Table]:
    """The validation curve at the same seconds of all methods, interpolated between validations."""
    curves = {
        name: results.curve(setting, name) for name in results.methods(setting) if name != START
    }
    curves = {name: own for name, own in curves.items() if len(own[0]) > 1}
    if not curves:
        return []
    longest = max(xs[-1] for xs, _ in curves.values())
    marks = [round(share * longest, 1) for share in POINTS_SHOWN]
    lines = [
        [
            results.title(name),
            *(at(own, mark) for mark in marks),
            f"{own[1][-1]:.3f} ({own[0][-1]:.0f} s)",
        ]
        for name, own in curves.items()
    ]
    note = (
        f"Validation NLL a character after so many {results.seconds}, means over seeds; a run "
        "that had ended by then has a dash. Rates decay over a run, so that a point on the way is "
        "not a shorter run's end."
    )
    head = ["", *(f"{mark:g} s" for mark in marks), "end"]
    return [Table(title, "On the way, by seconds", note, head, lines)]


def at(points: POINTS, second: float) -> str:
    """Linear between the two nearest points."""
    xs, ys = points
    if second > xs[-1] * (1 + 1e-6):
        return DASH
    for (x0, y0), (x1, y1) in zip(
        zip(xs, ys, strict=True), zip(xs[1:], ys[1:], strict=True), strict=False
    ):
        if second <= x1 * (1 + 1e-6):
            share = (second - x0) / (x1 - x0) if x1 > x0 else 0.0
            return f"{y0 + share * (y1 - y0):.3f}"
    return f"{ys[-1]:.3f}"
