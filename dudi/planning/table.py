"""A plan on a terminal: memory by part and phase, FLOPs, the verdict, and what to change."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.table import Table

from dudi.planning.advice import Advice
from dudi.planning.plan import GIB, RESERVED, RunPlan


def size(count: float) -> str:
    """Bytes for people: three figures."""
    for unit, name in ((GIB, "GiB"), (2**20, "MiB")):
        if abs(count) >= unit:
            return f"{_figures(count / unit)} {name}"
    return f"{_figures(count / 1024)} KiB"


def _figures(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def flops(count: float) -> str:
    for unit, name in ((1e15, "P"), (1e12, "T"), (1e9, "G")):
        if count >= unit:
            return f"{_figures(count / unit)} {name}FLOP"
    return f"{_figures(count / 1e6)} MFLOP"


def show_plan(plan: RunPlan, console: Console) -> None:
    console.print(_what(plan), highlight=False)
    console.print(phases_table(plan))
    console.print(parts_table(plan))
    console.print(verdict(plan), highlight=False)


def _what(plan: RunPlan) -> str:
    load = plan.load
    models = ", ".join(f"{name} {count:,}" for name, count in plan.parameters.items())
    ranks = f"on each of {plan.gpus} ranks " if plan.gpus > 1 else ""
    teacher = ""
    if plan.load.taught:
        teacher = f", the teacher's of {load.teacher_prompt_length}"
    return (
        f"[bold]parameters[/] {models}\n"
        f"[bold]step[/] {ranks}{plan.micro_batches} micro-batches of {load.prompts} prompts x "
        f"{load.sides} responses: prompts of {load.prompt_length} tokens{teacher}, responses of "
        f"{load.completion_length}"
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", header_style="", box=box.SIMPLE_HEAD
    )
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", overflow="fold")
    return table


def phases_table(plan: RunPlan) -> Table:
    table = _table("An optimizer step on a rank", "phase", "peak memory", "FLOPs")
    peaks = {phase.name: size(phase.bytes) for phase in plan.phases}
    for name in dict.fromkeys([*plan.flops, *peaks]):
        style = "bold" if name == plan.peak.name else ""
        count = plan.flops.get(name)
        table.add_row(name, peaks.get(name, ""), flops(count) if count else "", style=style)
    table.add_section()
    table.add_row("all", size(plan.peak.bytes), flops(sum(plan.flops.values())))
    return table


def parts_table(plan: RunPlan) -> Table:
    peak = plan.peak
    table = _table(f"Memory at the peak, in the {peak.name}", "part", "memory", "share")
    for part, count in sorted(peak.parts.items(), key=lambda item: -item[1]):
        table.add_row(part, size(count), f"{count / peak.bytes:.1%}")
    return table


def verdict(plan: RunPlan) -> str:
    peak = f"The peak is {size(plan.peak.bytes)}, in the {plan.peak.name}."
    if plan.shards > 1:
        peak += f" Shards over {plan.shards} ranks are an estimate."
    if plan.room is None:
        return f"{peak} --gpu_memory GIB says whether it fits."
    word = "[green]fits[/]" if plan.fits else "[red]does not fit[/]"
    return (
        f"{peak} It {word} a GPU of {plan.gpu_memory:g} GiB, of which {RESERVED:.0%} are left for "
        "the CUDA context, libraries and fragmentation."
    )


def advice_table(title: str, advice: Iterable[Advice]) -> Table:
    table = _table(title, "change", "saves", "then", "fits", "effect on training")
    table.columns[0].no_wrap = True
    table.columns[-1].justify = "left"
    for one in advice:
        fits = "yes" if one.plan.fits else "no"
        told = "\n".join(one.change)
        table.add_row(told, size(one.saved), size(one.plan.peak.bytes), fits, one.effect)
    return table
