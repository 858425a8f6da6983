"""What does the machine under the package allow? Its disks, home directories and proxies."""
