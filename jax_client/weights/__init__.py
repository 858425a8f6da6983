"""Models in and out: `read` loads them from files, `write` exports them."""
