"""What an operator sees: metrics, Prometheus, health."""
