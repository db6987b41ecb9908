"""Modalities and the seven testing conditions of the papers, in their fixed order."""

MODALITIES = ("language", "audio", "visual")
"""Index 0, 1, 2 everywhere: L, A, V."""

CONDITIONS = ("l", "a", "v", "la", "lv", "av", "lav")
"""Which modalities a test sample keeps; `"lav"` is the complete one."""

INCOMPLETE_CONDITIONS = CONDITIONS[:-1]
"""The six conditions that "Avg." averages."""


def condition_modalities(condition: str) -> tuple[bool, bool, bool]:
    """Presence of (language, audio, visual) under a condition: `"la"` -> `(True, True, False)`.

    Raises:
        ValueError: the condition is not one of `CONDITIONS`.
    """
    if condition not in CONDITIONS:
        raise ValueError(f"condition {condition!r} is not one of {', '.join(CONDITIONS)}")
    return "l" in condition, "a" in condition, "v" in condition


def condition_label(condition: str) -> str:
    """The papers' notation: `"la"` -> `"{l,a}"`."""
    return "{" + ",".join(condition) + "}"
