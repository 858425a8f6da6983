"""What did loops write into directories of their own, as the cookbook does?"""
