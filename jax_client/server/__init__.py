"""The tinker wire protocol over `runs/`, for the unmodified SDK."""
