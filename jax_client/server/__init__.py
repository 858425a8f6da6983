"""The tinker wire protocol over `runs/`, for the unmodified SDK."""

# Only this machine reaches a server under these names.
LOOPBACK = ("127.0.0.1", "::1", "localhost")
