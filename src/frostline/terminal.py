"""What a person sees of models, selections and audits in the terminal. Renders; never computes.

Equal layers and experts are folded into one line, written so that it can be pasted into an expression
(`layers[0:5].attn.q`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from frostline.anatomy import Anatomy, Proof, SliceProof, parse_path
from frostline.audit import FAILED, Audit, Diff, Row
from frostline.experiment.bench import Claims
from frostline.experiment.demo import Findings
from frostline.folding import Fold, fold
from frostline.run import RunResult
from frostline.selection import Selection, compare, shared_heads
from frostline.units import format_bytes, format_changes, format_count, format_share


def parts_table(anatomy: Anatomy) -> Group:
    """The anatomy, equal layers and experts folded."""
    title = f"{anatomy.model_type}: {format_count(anatomy.n_parameters)} parameters, {anatomy.n_layers} layers"
    table = Table()
    table.add_column("part", overflow="fold")
    table.add_column("parameters each", justify="right")
    table.add_column("parameters", justify="right")
    table.add_column("share", justify="right")
    table.add_column("tensor of the first", overflow="fold")
    tied = dict(anatomy.tied_components)
    items = [(c.name, (anatomy.n_own_elements(c), len(c.slices))) for c in anatomy.components]
    for group in fold(items):
        first = anatomy.component[group.names[0]]
        each = anatomy.n_own_elements(first)
        note = f"tied to {tied[first.name]}" if first.name in tied else ""
        note = note or ("buffers only" if not any(map(anatomy.learnable, first.slices)) else "")
        table.add_row(
            group.title,
            note or format_count(each),
            "" if note else format_count(each * len(group.names)),
            "" if note else format_share(each * len(group.names), anatomy.n_parameters),
            "\n".join(str(s) for s in first.slices),
        )
    return Group(Text(title), table, *([_cuts_table(anatomy)] if anatomy.cuts else []))


def _cuts_table(anatomy: Anatomy) -> Table:
    """Heads, neurons and rows, equal ones folded, with the slices of the first member."""
    table = Table(title="divided further, across parts", title_justify="left", title_style="")
    table.add_column("members", overflow="fold")
    table.add_column("parameters each", justify="right")
    table.add_column("the first of the first", overflow="fold")
    cuts = {c.name: c for c in anatomy.cuts}
    for group in fold([(c.name, (c.n, len(c.pieces))) for c in anatomy.cuts]):
        cut = cuts[group.names[0]]
        first = cut.members([0])
        table.add_row(
            f"{group.title}[0:{cut.n}]", format_count(sum(s.n_elements for s in first)), "\n".join(map(str, first))
        )
    return table


def proof_table(proof: Proof) -> Group:
    """What was measured of the blocks of a tiny model, equal blocks folded."""
    table = Table()
    for column in ("layers", "topology", "norms", "mixes tokens", "alone", "adds to the stream", "residual inside"):
        table.add_column(column, overflow="fold")
    kinds: dict[tuple[str, ...], list[int]] = {}
    row: tuple[str, ...]
    for b in proof.blocks:
        mixing = ", ".join(n for n, mixes in b.mixes_tokens.items() if mixes)
        alone = ", ".join(n for n, mixes in b.mixes_tokens.items() if not mixes)
        scales = ", ".join(f"{f:g} × {n}" for n, f in b.residual_scale.items()) or "not a plain sum"
        feeds = [f"{n} → {', '.join(f)}" for n, f in b.feeds.items()] + [f"{b_} → {n}" for n, b_ in b.follows.items()]
        norms = f"{b.placement}: {'; '.join(feeds)}"
        row = (b.topology, norms, mixing or "–", alone or "–", scales, ", ".join(b.residual_inside) or "–")
        kinds.setdefault(row, []).append(b.layer)
    for row, layers in kinds.items():
        table.add_row(", ".join(map(str, layers)), *row)
    notes = "".join(f"\nknown: {e}" for e in proof.exceptions)
    return Group(
        Text(f"proved on a tiny {proof.model_type} with the same flags, {len(proof.blocks)} layers{notes}"),
        table,
        *([_slice_proof(proof.slices)] if proof.slices else []),
    )


def _slice_proof(proof: SliceProof) -> Text:
    """What was measured below the tensors, in words."""
    what = {
        "attn": "queries, keys and values", "gate": "gate and up", "experts": "single experts", "heads": "heads",
        "kv_heads": "key/value heads", "neurons": "neurons", "linear_attn": "no softmax in linear attention",
    }  # fmt: skip
    found = dict.fromkeys(what[last] for n in proof.measured if (last := parse_path(n)[-1][0]) in what)
    lines = [f"element by element, in one layer of each kind: {', '.join(found) or 'nothing'}"]
    lines += [f"known: {e}" for e in proof.exceptions] + [f"not measured: {u}" for u in proof.unmeasured]
    return Text("\n".join(lines))


def selection_table(selection: Selection) -> Group:
    """What each term of an expression matched, and what all of it selects."""
    table = Table()
    table.add_column("term")
    for column in ("layers", "parts", "tensors", "parameters", "size", "share"):
        table.add_column(column, justify="right")
    n_layers, total = selection.anatomy.n_layers, selection.anatomy.n_parameters
    for m in selection.matches:
        layers = f"{len(m.layers)} of {n_layers}" if m.layers else "–"
        table.add_row(
            m.text,
            layers,
            str(m.n_components),
            str(m.n_tensors),
            format_count(m.n_elements),
            format_bytes(m.n_bytes),
            format_share(m.n_elements, total),
        )
    table.add_section()
    table.add_row(
        "selected",
        f"{len(selection.layers)} of {n_layers}",
        str(sum(1 for _ in selection.by_component())),
        str(selection.n_tensors),
        format_count(selection.n_elements),
        format_bytes(selection.n_bytes),
        format_share(selection.n_elements, total),
    )
    return Group(Text(str(selection)), table, *map(Text, _notes(selection)))


def _notes(selection: Selection) -> Iterator[str]:
    """What a term means beyond what it says."""
    for named, too in selection.pulled_in:
        yield f"{too} learns too: it is the same tensor as {named}"
    sharing = shared_heads(selection)
    if sharing:
        n, n_kv = sharing
        yield (
            f"{n} query heads share {n_kv} key/value heads: heads[i] holds the query rows and output columns of one, "
            f"kv_heads[j] the key and value rows that {n // n_kv} of them share"
        )


def slices_table(selection: Selection) -> Table:
    """The exact slices that an expression selects, by component."""
    table = Table(title=selection.expression, title_justify="left", title_style="")
    table.add_column("part", overflow="fold")
    table.add_column("slice", overflow="fold")
    table.add_column("parameters", justify="right")
    for component, slices in selection.by_component():
        for i, s in enumerate(slices):
            table.add_row(component.name if i == 0 else "", str(s), str(s.n_elements))
    return table


def comparison_table(first: Selection, second: Selection) -> Group:
    """What each of two selections takes and the other does not, components of equal numbers folded."""
    differences = compare(first, second)
    table = Table()
    table.add_column("part", overflow="fold")
    for column in ("only in the first", "only in the second", "in both"):
        table.add_column(column, justify="right")
    by_name = {d.component: d for d in differences}
    numbers = {d.component: (d.only_first, d.only_second, d.both) for d in differences}
    for group in fold(list(numbers.items())):
        d = by_name[group.names[0]]
        counts = (n * len(group.names) for n in (d.only_first, d.only_second, d.both))
        table.add_row(group.title, *(format_count(n) if n else "–" for n in counts))
    table.add_section()
    sums = (sum(n[i] for n in numbers.values()) for i in range(3))
    table.add_row("together", *(format_count(n) if n else "–" for n in sums))
    verdict = "the two select the same" if first == second else "the two differ"
    return Group(Text(f"first:  {first}\nsecond: {second}\n{verdict}"), table)


FEW_STAGES = 8
"""So many stages have a column each; of more, what happened to a part is summed up."""


def audit_table(audit: Audit) -> Table:
    """Parts by stages: what was asked and what happened."""
    if len(audit.stages) > FEW_STAGES:
        return _many_stages_table(audit)
    table = Table()
    table.add_column("part", overflow="fold")
    for stage in audit.stages:
        table.add_column(f"stage {stage}")
    cells: dict[str, dict[str, Row]] = {}
    for row in audit.rows:
        cells.setdefault(row.component, {})[row.stage] = row
    items = [(name, tuple((r.declared, r.verdict) for r in rows.values())) for name, rows in cells.items()]
    for group in fold(items):
        columns = [[cells[name][stage] for name in group.names] for stage in audit.stages]
        table.add_row(group.title, *(_cell(rows) for rows in columns))
    return table


def _many_stages_table(audit: Audit) -> Table:
    """Parts, layers whose parts all fared alike as one, over all stages together."""
    table = Table()
    table.add_column("part", overflow="fold")
    for column in ("learned in", "moved, per stage", "frozen in", "otherwise"):
        table.add_column(column)
    fates: dict[str, dict[str, list[Row]]] = {}
    for row in audit.rows:
        fates.setdefault(row.component.partition(".")[0], {}).setdefault(row.component, []).append(row)
    for outer, parts in fates.items():
        alike = len({tuple((r.declared, r.verdict) for r in rows) for rows in parts.values()}) == 1
        together = {outer: [r for rows in parts.values() for r in rows]}
        for name, found in (together if alike else parts).items():
            table.add_row(name, *_summary_cells(found, len(audit.stages)))
    return table


def _summary_cells(rows: Sequence[Row], n_stages: int) -> Iterator[Text]:
    """How often a part learned, how far it moved, how often it was frozen, and what else is said of it."""
    learned = {r.stage for r in rows if r.declared != "frozen"}
    moves = [r.relative_change for r in rows if r.verdict == "moved" and r.relative_change is not None]
    other = Counter(r.verdict for r in rows if r.verdict not in ("moved", "unchanged"))
    yield Text(f"{len(learned)} of {n_stages} stages" if learned else "no stage")
    yield Text(format_changes(moves), style="green")
    n_frozen = n_stages - len(learned)
    intact = all(r.verdict in ("unchanged", "derived") for r in rows if r.declared == "frozen")
    yield Text(f"{n_frozen}: 0 bytes changed" if n_frozen and intact else str(n_frozen or "–"), style="cyan")
    bad = any(v in FAILED for v in other)
    yield Text(", ".join(f"{v} ({n})" for v, n in other.items()), style="bold red" if bad else "yellow")


def _cell(rows: Sequence[Row]) -> Text:
    verdict, declared = rows[0].verdict, rows[0].declared
    if verdict in FAILED:
        return Text(f"✗ {verdict}", style="bold red")
    if verdict == "unchanged":
        return Text("✓ frozen, 0 bytes changed", style="cyan")
    if verdict == "moved":
        sizes = [r.relative_change for r in rows if r.relative_change is not None]
        return Text(f"✓ {declared}, moved {format_changes(sizes)}", style="green")
    return Text(f"– {declared}, {verdict}", style="yellow")


def print_audit(console: Console, audit: Audit) -> None:
    """The table, the checks on the whole run, the verdict."""
    console.print(audit_table(audit))
    for evidence in audit.evidence:
        mark, style = ("✓", "green") if evidence.passed else ("✗", "bold red")
        console.print(Text(f"{mark} {evidence.claim}: {evidence.measured}", style=style))
    for row in audit.failures:
        for detail in row.details:
            console.print(Text(f"  {row.component} (stage {row.stage}): {detail}", style="red"))
    if audit.verdict == "passed":
        console.print(Text("AUDIT PASSED: what was asked, and only that, happened.", style="bold green"))
    elif audit.verdict == "interrupted":
        text = "INTERRUPTED: what was asked, and only that, happened so far; go on with `frostline resume`."
        console.print(Text(text, style="bold yellow"))
    else:
        console.print(Text("AUDIT FAILED", style="bold red"))


def diff_table(diff: Diff) -> Group:
    """Two checkpoints by component."""
    table = Table()
    table.add_column("part", overflow="fold")
    for column in ("parameters", "bytes changed", "‖Δ‖/‖w‖"):
        table.add_column(column, justify="right")
    rows = {r.component: r for r in diff.rows}
    known = [r.component for r in diff.rows if _is_component(r.component)]
    groups = fold((name, rows[name].bytes_changed > 0) for name in known)
    groups += [Fold([r.component]) for r in diff.rows if r.component not in known]
    for group in groups:
        found = [rows[n] for n in group.names]
        changed = sum(r.bytes_changed for r in found)
        table.add_row(
            group.title if found[0].component in known else group.names[0],
            format_count(sum(r.n_elements for r in found)),
            f"{changed}" if changed else "equal",
            format_changes([r.relative_change for r in found]) if changed else "",
            style="green" if changed else "cyan",
        )
    for what, names in (
        ("only in the first", diff.only_before),
        ("only in the second", diff.only_after),
        ("of another shape", diff.reshaped),
    ):
        for name in names:
            table.add_row(name, "", what, "", style="red")
    return Group(Text(f"{diff.before} → {diff.after}"), table)


def _is_component(name: str) -> bool:
    return name.split("[")[0].split(".")[0] in ("embed", "position", "layers", "final_norm", "head")


def print_claims(console: Console, claims: Claims) -> None:
    """Every claim: what is said, the verdict, the numbers."""
    for claim in claims.claims:
        console.print(Text(f"{claim.key}  “{claim.belief}”", style="bold"))
        if claim.holds:
            style = "green" if claim.verdict == "TRUE" else "red"
            console.print(Text(f"    {claim.verdict}. ", style=style).append(claim.measured, style="default"))
        else:
            console.print(
                Text(f"    THE MEASUREMENT CONTRADICTS our verdict ({claim.verdict}): {claim.measured}", "bold red")
            )
        if claim.table and claim.table[0][0] != "part":
            for point, parts in claim.table[1:]:
                console.print(Text(f"    {point}: {parts}", style="dim"))
        elif claim.table:
            received = ", ".join(name for name, answer in claim.table[1:] if answer == "yes")
            none = ", ".join(name for name, answer in claim.table[1:] if answer == "none")
            console.print(Text(f"    gradient: {received}\n    none: {none}", style="dim"))


def print_demo(console: Console, result: RunResult, found: Findings) -> None:
    """The whole demo: audit, losses, samples, claims."""
    print_audit(console, result.audit)
    console.print()
    for prompt in dict.fromkeys(s.prompt for s in found.samples):
        console.print(Text(f"{prompt}…", style="bold"))
        for s in found.samples:
            if s.prompt == prompt:
                text = " ".join(s.text.split())
                console.print(Text(f"  {s.when}: ", style="cyan").append(text[:110], style="default"))
    console.print()
    print_claims(console, found.claims)
    console.print()
