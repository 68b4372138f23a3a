"""Where the teacher's law comes from."""
