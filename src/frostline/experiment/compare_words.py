"""The numbers of a comparison as a person reads them, in the terminal and on the page. Nothing here computes."""

from __future__ import annotations

from frostline.experiment.compare_measures import Outcome
from frostline.experiment.compare_results import Compared, EqualCost, Outlook, StrategyResult
from frostline.experiment.statistics import Difference, Summary
from frostline.units import format_count, format_duration, format_flops


def mean_sd(values: Summary) -> str:
    """`5.3021 ± 0.0110`."""
    if values.mean is None:
        return "–"
    return f"{values.mean:.4f}" + (f" ± {values.sd:.4f}" if values.sd is not None else "")


def interval(difference: Difference | None) -> str:
    """`+0.0312 (+0.0101 to +0.0523)`."""
    if difference is None or difference.mean is None:
        return "–"
    ends = f" ({difference.low:+.4f} to {difference.high:+.4f})" if difference.low is not None else " (no interval)"
    return f"{difference.mean:+.4f}{ends}"


def verdict(result: StrategyResult, compared: Compared) -> str:
    """What is said of a strategy."""
    if result.outlook.name == compared.baseline:
        return "baseline"
    if result.difference is None:
        return "not comparable"
    return result.difference.verdict if result.difference.n else "no runs"


def cost(equal: EqualCost) -> str:
    """`240 steps`, `1.2 TFLOP`."""
    return f"{equal.spent:,} steps" if equal.axis == "steps" else format_flops(equal.spent)


def learning(outlook: Outlook) -> str:
    """Of every stage, or from the least to the most of many."""
    counts = list(dict.fromkeys(n for _, _, _, n in outlook.stages))
    if len(counts) > 3:
        return f"{format_count(min(counts))} – {format_count(max(counts))}"
    return " → ".join(map(format_count, counts))


def agreed(result: StrategyResult) -> str:
    """Whether the metered steps computed what the plan said."""
    return {True: "exactly", False: "NO", None: "–"}[result.flops_as_planned]


def run_line(outcome: Outcome) -> str:
    """How one run ended."""
    measures = outcome.measures
    if outcome.state == "not run":
        return "not run"
    if measures is None or not measures.curve:
        return f"FAILED: {outcome.why}"
    loss = f"held-out loss {measures.curve[0].loss:.4f} → {measures.curve[-1].loss:.4f}"
    skipped = f" ({measures.skipped} skipped)" if measures.skipped else ""
    line = f"{loss}, {measures.steps} steps{skipped} in {format_duration(measures.clock.seconds)}"
    return f"{line}, {'interrupted' if outcome.state == 'interrupted' else outcome.why or 'audit passed'}"


def comparison_markdown(compared: Compared) -> str:
    """The losses, differences and costs as a Markdown table."""
    difference = f"difference to {compared.baseline}, 95 %"
    costs = ("at equal FLOPs", "FLOPs", "learning parameters")
    head = ("strategy", "runs", "held-out loss, mean ± sd", difference, *costs)
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for s in compared.strategies:
        equal = f"{interval(s.equal_flops.difference)} {s.equal_flops.difference.verdict}" if s.equal_flops else "–"
        told = verdict(s, compared)
        cells = (
            s.outlook.name,
            f"{s.loss.n} of {len(s.outcomes)}",
            mean_sd(s.loss),
            told if s.difference is None else f"{interval(s.difference)} {told}",
            equal,
            format_flops(s.flops) if s.flops else "–",
            learning(s.outlook),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
