"""Other hosts: those that compute with this one as one engine, and those that only sample."""
