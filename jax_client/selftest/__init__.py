"""Does this package compute right on the devices at hand? Small checks of every part, each with a verdict in words."""
