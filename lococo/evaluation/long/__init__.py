"""``lococo eval long``: questions about long documents, and needles in generated ones."""
