"""Result files, and long runs that go on where they stopped."""
