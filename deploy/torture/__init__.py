"""`headrace torture`: the real workers under a real broker, hurt at random moments, held to an undisturbed run."""

# The figures that count what must not be.
WRONG = ("lost", "duplicated", "replica_torn_reads", "missing_versions", "differing_rows", "undetected_damage")
