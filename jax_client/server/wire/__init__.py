"""Bytes: connections, guards, bodies, the protocol's messages, and how much may wait."""
