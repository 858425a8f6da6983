"""The routes of the protocol, by noun: each module turns HTTP requests into calls of one member of the server."""
