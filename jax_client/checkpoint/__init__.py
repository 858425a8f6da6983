"""Run state on disk: orbax arrays under a sealed manifest; what was acknowledged is whole or its damage reported."""
