"""The papers' tables as LaTeX (package booktabs)."""

from __future__ import annotations

from fastmmkd.evaluation.tables import HEADERS, Cell, MetricTable, cell_text

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "–": "--",
    "±": r"$\pm$",
    "−": "$-$",
    "†": r"$^\dagger$",
}


def escape(text: str) -> str:
    """Text that LaTeX prints as it stands: special characters escaped, line breaks to spaces."""
    return "".join(_SPECIAL.get(character, character) for character in " ".join(text.split()))


def latex_metric(table: MetricTable, caption: str) -> str:
    """One metric as a `table` environment, the best run per column bold, references below a rule."""

    def row(name: str, cells: list[str]) -> str:
        return " & ".join([escape(name), *cells]) + r" \\"

    def text(cell: Cell) -> str:
        plain = escape(cell_text(table.key, cell)).replace(" $\\pm$ ", "$\\pm$").replace(" $^", "$^")
        return rf"\textbf{{{plain}}}" if cell.best else plain

    lines = [
        r"\begin{table*}[t]",
        r"\centering",
        rf"\caption{{{escape(caption)}}}",
        r"\begin{tabular}{l" + "c" * len(HEADERS) + "}",
        r"\toprule",
        row("", [escape(h) for h in HEADERS]),
        r"\midrule",
        *(row(r.name, [text(c) for c in r.cells]) for r in table.runs),
        *([r"\midrule"] if table.published else []),
        *(row(r.name, [text(c) for c in r.cells]) for r in table.published),
        r"\midrule",
        *(row(r.name, [text(c) for c in r.cells]) for r in table.references),
        row("samples", [str(n) for n in table.samples]),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table*}",
    ]
    return "\n".join(lines) + "\n"
