"""What does the doctor ask in a process of its own, as the answer may hang or end that process?"""
