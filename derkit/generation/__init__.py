"""Images from a classifier read as an energy-based model, and how they are judged."""
