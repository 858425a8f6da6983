"""The families of Qwen, one file each; the newer ones build on the readers of the older."""
