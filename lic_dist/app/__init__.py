"""What people type: the command line, the quick start, a study of many jobs, a starting file for one's own photos.

In: arguments and experiment files. Out: calls of the other rooms, and what they say in words. Imports every room;
none imports it.
"""
