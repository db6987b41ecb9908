"""The README says what the records say."""

import re

from bench import readme


def test_tables_are_rendered_from_the_records() -> None:
    assert readme.main(["--check"]) == 0


def test_render_replaces_only_the_marked_parts() -> None:
    text = readme.README.read_text(encoding="utf-8")
    broken = re.sub(r"(<!-- begin: study [^\n]*-->\n).*?(<!-- end: study -->)", r"\1stale\n\2", text, flags=re.DOTALL)
    assert broken != text
    assert readme.render(broken) == text
