"""Which entries are kept, which are blended, and how."""
