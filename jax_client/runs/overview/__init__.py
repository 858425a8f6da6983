"""What do the runs of a state directory, and of log directories, look like to someone who watches them?"""
