"""Tables for LaTeX: every cell comes back as it was, and nothing in it is a command."""

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from llm.common.tables import latex_table

SPECIAL = {"\\textbackslash{}": "\\", "\\textasciitilde{}": "~", "\\textasciicircum{}": "^", "$\\rightarrow$": "→",
           "$\\leq$": "≤", "$\\pm$": "±", "$<$": "<", "$>$": ">"}  # fmt: skip


def plain(cell: str) -> str:
    """What LaTeX would set."""
    tokens = re.findall(r"\\text\w+\{\}|\$\\?\w+\$|\$[<>-]\$|\\[&%$#_{}]|[^\\$]", cell)
    assert "".join(tokens) == cell  # no command, no opened mathematics
    return "".join(SPECIAL.get(token, "-" if token == "$-$" else token.removeprefix("\\")) for token in tokens)


@settings(deadline=None, derandomize=True)
@given(st.lists(st.lists(st.text("ab-05.%&_#{}$\\~^<>→≤± ", max_size=9), min_size=3, max_size=3), max_size=4))
def test_cells_come_back(rows):
    lines = latex_table(["", "classic", "values"], rows).splitlines()
    assert lines[:4] == [r"\begin{tabular}{lrr}", r"\toprule", r" & classic & values \\", r"\midrule"]
    assert lines[-2:] == [r"\bottomrule", r"\end{tabular}"]
    found = [re.split(r"(?<!\\) ?& ?", line.removesuffix(r" \\")) for line in lines[4:-2]]
    assert len(found) == len(rows)
    for line, row in zip(lines[4:-2], rows, strict=True):
        assert plain(line.removesuffix(r" \\").replace(" & ", "\0")) == "\0".join(row)


def test_a_minus_is_one_and_a_hyphen_is_one():
    line = latex_table(["", "difference"], [["arc-easy, 0-shot, %", "-0.0642 to -0.0596"]]).splitlines()[4]
    assert line == r"arc-easy, 0-shot, \% & $-$0.0642 to $-$0.0596 \\"
