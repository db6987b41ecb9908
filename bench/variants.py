"""The names of the ways to take a training step, as records and `--variants` have them."""

REFERENCE, SDPA, PLAIN = "reference", "reference + SDPA", "plain + SDPA"
CROPPED, JAGGED = "reference, cropped", "jagged"
COMPILED, COMPILED_GRAPHED, AUTOTUNED = "compile", "compile + graph, bare loop", "compile max-autotune"
OURS, AS_TRAINED, GRAPHED = "ours", "as trained", "ours + graph, bare loop"
OURS_COMPILED, SEEDS = "ours, compiled, in a graph", "ours x seeds"
