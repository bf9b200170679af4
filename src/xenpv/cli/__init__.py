"""The command line: one file for each family of verbs.

It picks files and hosts. Other rooms do the work.
"""
