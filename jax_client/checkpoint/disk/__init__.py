"""Files that survive a power failure: atomic writes, sealed JSON, hashes, locks and deadlines."""
