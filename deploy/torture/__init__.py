"""`headrace torture`: the real workers under a real broker, hurt at random moments, held to an undisturbed run."""
