"""What labels are made of: the emotions, and the classes that scores are binned into."""

EMOTIONS = ("happy", "sad", "angry", "neutral")
"""Column order of emotion labels in the store (the papers' order)."""

SCORE_CLASS_NAMES = {
    2: ("negative", "nonnegative"),
    3: ("negative", "zero", "positive"),
    7: ("-3", "-2", "-1", "0", "1", "2", "3"),
}
"""Names of the score classes, by how many there are."""
