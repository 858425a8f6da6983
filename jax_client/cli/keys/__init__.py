"""The keys of a server with several: what makes one, and how the server's file of them is read."""
