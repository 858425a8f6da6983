"""Commands that let a model speak: one answer, or a conversation."""
