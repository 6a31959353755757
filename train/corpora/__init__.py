"""The corpora: where text comes from and how it becomes tokens."""
