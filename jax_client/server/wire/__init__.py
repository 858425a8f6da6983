"""What happens to bytes: connections, the guard, bodies, the protocol's messages, and limits on what may wait."""
